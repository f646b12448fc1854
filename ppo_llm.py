# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17", "tyro>=1.0"]
# ///
"""PPO for language models, in one file to be read from top to bottom.

    python ppo_llm.py                                 # embedded demo: no download, no GPU, under a minute
    python ppo_llm.py --model gpt2 --prompts prompts.jsonl --reward rewards.py:score     # on a GPU if there is one
    torchrun --nproc-per-node 8 ppo_llm.py --model ...                                   # on several

Part I is PPO, and complete. It ends at the line "Part I ends here", needs torch and transformers, and knows nothing of
files, flags or the terminal. Copy it whole, or one function of it: `for metrics, samples in ppo(...)` trains a model.
Part II is the program around it: prompts, rewards, checkpoints, what the terminal shows, a demo, the command line.
Delete what you do not need of it, the demo first.

One update, in six steps (`ppo` is the loop over them):

  1. Generate: sample a reply to each of B prompts from the policy (`generate`).
  2. Score: a function of yours gives each whole reply a number: scores [B].
  3. Log-probabilities and values: one forward pass of the policy gives both for every token of the replies. A frozen
     copy of the initial policy, the reference, gives its own log-probabilities (`fill_logprobs_and_values`).
  4. Advantages: the reward of a token is -β·KL, and the last token also gets the score. A value is what the critic
     expects of the rewards still to come, an advantage how much better a token did than that, a return what the critic
     should have said. GAE turns rewards and values into advantages and returns (`compute_advantages`).
  5. Update: several epochs of minibatches on the clipped surrogate and the value loss (`ppo_update`).
  6. Metrics: what happened, over valid tokens only (`rollout_metrics`).

Left out on purpose: top-k and top-p (they change the distribution that is sampled, and with it every ratio), LoRA,
other algorithms.

Shapes: B responses, P prompt tokens (left-padded), T response tokens, N valid response tokens, H hidden, V vocabulary;
small b and n are those of a micro-batch. Everything of the RL part is aligned to the response, [B, T].

Papers: PPO, Schulman et al. 2017 (arXiv 1707.06347); GAE, Schulman et al. 2015 (1506.02438); RLHF with a KL penalty,
Ziegler et al. 2019 (1909.08593); KL estimators, Schulman 2020 (joschu.net/blog/kl-approx.html).
"""
from __future__ import annotations

import contextlib
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Iterator, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# 1. The mathematics: pure functions of tensors. Each can be copied out alone.
#    A mask is boolean, True on valid tokens. Where a function takes one, masked cells may hold anything, even NaN, and
#    change nothing: torch.where drops what they hold, where a multiplication by 0 would keep NaN.
# ----------------------------------------------------------------------------------------------------------------------


def response_mask(responses: Tensor, stop_ids: list[int]) -> Tensor:  # [B, T] -> [B, T] bool
    """True on the reply: every token up to and including the first stop token, or all T if there is none.

    Never derived from `token != pad`: the pad token may equal EOS, and content may equal pad.
    """
    stop = torch.isin(responses, responses.new_tensor(stop_ids)).long()
    stops_before = stop.cumsum(1) - stop
    return stops_before == 0


def masked_mean(x: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:  # [B, T], [B, T] -> []
    """Mean over the valid cells, 0 if there are none.

    weights [B, T]: the weighted sum over the valid cells instead, which `ppo_update` divides by the tokens of a step.
    """
    x = torch.where(mask, x, 0.0)
    if weights is not None:
        return (x * torch.where(mask, weights, 0.0)).sum()
    return x.sum() / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:  # [B, T], [B, T] -> [B, T]
    """Scale the valid cells to variance 1 and, if shift_mean, shift them to mean 0. Masked cells become 0.

    The variance is the population's; the 1e-8 under the root keeps one cell, or equal cells, from giving NaN.
    shift_mean=False keeps the mean, as OpenAI's lm-human-preferences does with rewards.
    """
    mean = masked_mean(x, mask)
    centered = torch.where(mask, x - mean, 0.0)
    variance = masked_mean(centered**2, mask)
    whitened = centered * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def logprobs_from_logits(
    logits: Tensor,  # [..., V]
    tokens: Tensor,  # [...]
    temperature: float = 1.0,
) -> Tensor:  # [...]
    """log π(token) in nats. The temperature is part of the policy: it is the one that the tokens were sampled with."""
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:  # [..., V] -> [...]
    """Entropy of the next-token distribution, in nats: 0 when it is certain, log V when it is uniform."""
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    # Where a logit is -inf, p·log p must be 0, not NaN. Below -1000 p is 0 in any type, so nothing else changes.
    return -(logprobs.exp() * logprobs.clamp(min=-1000)).sum(-1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:  # [B, T], [B, T] -> [B, T]
    """Estimate KL(policy ‖ reference) per token, in nats, from tokens that the policy sampled (Schulman 2020).

    With d = log π - log π_ref at the sampled token: k1 = d, unbiased, may be negative; k2 = d²/2, biased but never
    negative; k3 = e^-d - 1 + d, unbiased and never negative. In the reward k1 gives the policy gradient of the true KL.
    As a loss, differentiated on policy, k2 has the gradient of the KL in each state that is met (what a token does to
    later states is missing), k1 has expected gradient 0 and k3 the gradient of KL(ref ‖ policy).
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {kind!r}: expected k1, k2 or k3")


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The next β of the proportional controller of Ziegler et al. 2019, section 2.2: up when KL is above its target.

    kl and target are in nats per reply. The relative error is clipped to ±0.2, so that `horizon` episodes spent far
    from the target change β by about a fifth.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:  # [B], [B, T], [B, T] -> [B, T]
    """Reward of each token: -β·KL_t, plus the score on the last response token (Ziegler et al. 2019, eq. 2)."""
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    penalty = torch.where(mask, -kl_coef * kl, 0.0)
    return penalty + torch.where(last, scores.unsqueeze(1), 0.0)


def gae(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap: Tensor | None = None,  # [B]
) -> tuple[Tensor, Tensor]:  # [B, T], [B, T]
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16; PPO eq. 11-12), backwards in time:

        δ_t = r_t + γ·V_{t+1} - V_t          A_t = δ_t + γλ·A_{t+1}          return_t = A_t + V_t

    values[:, t] is V of the state before token t. After the last token V is `bootstrap`: 0 for a reply that ended (the
    default), V of the last state for one that the length budget cut off. Masked cells of both results are 0.
    """
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = next_advantage if bootstrap is None else bootstrap
    advantages = torch.empty_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = torch.where(mask, advantages, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    return advantages, returns


def policy_loss(
    new_logprobs: Tensor,  # [B, T], with gradient
    logprobs: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # [B, T]
) -> tuple[Tensor, dict[str, Tensor]]:  # [], stats
    """The clipped surrogate, PPO eq. 7, negated: -mean min(ρA, clip(ρ, 1-ε, 1+ε)A) with ρ = π_new / π_old.

    A is the advantage. A token whose ρ has left [1-ε, 1+ε] in the direction that A asks for has no gradient any more;
    one that has left it in the other direction keeps its gradient, up to dual_clip.

    cliprange_high: upper ε, if it differs from the lower (clip-higher, DAPO, arXiv 2503.14476).
    dual_clip: c > 1 bounds the objective from below at cA where A < 0, however large ρ is (arXiv 1912.09729).
    weights: those of `masked_mean`.
    stats: means over valid tokens of ρ, of the clipped share, and of the k3 estimate of KL(old ‖ new).
    """
    upper = cliprange if cliprange_high is None else cliprange_high
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + upper) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    if dual_clip is not None:  # where A > 0 the bound is 0, and the surrogate is above it anyway
        surrogate = torch.maximum(surrogate, dual_clip * advantages.clamp(max=0))
    with torch.no_grad():
        old_new_kl = kl_estimate(logprobs, new_logprobs, "k3")
        stats = {
            "policy/approxkl": masked_mean(old_new_kl, mask),
            "policy/clipfrac": masked_mean((clipped < unclipped).to(ratio.dtype), mask),
            "policy/ratio": masked_mean(ratio, mask),
        }
    return -masked_mean(surrogate, mask, weights), stats


def value_loss(
    new_values: Tensor,  # [B, T], with gradient
    values: Tensor,  # [B, T]
    returns: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    cliprange_value: float | None = None,
    weights: Tensor | None = None,  # [B, T]
) -> tuple[Tensor, dict[str, Tensor]]:  # [], stats
    """½ mean max((V - R)², (clip(V, V_old ± ε) - R)²): at least ½ MSE. None switches the clip off.

    The clip is not in the PPO paper; it is that of openai/baselines (ppo2). weights: those of `masked_mean`.
    stats: the share of tokens where the clip binds.
    """
    error = torch.where(mask, new_values - returns, 0.0) ** 2
    larger_error = error
    if cliprange_value is not None:
        clipped = new_values.clamp(values - cliprange_value, values + cliprange_value)
        larger_error = torch.maximum(error, torch.where(mask, clipped - returns, 0.0) ** 2)
    with torch.no_grad():
        stats = {"val/clipfrac": masked_mean((larger_error > error).to(error.dtype), mask)}
    return 0.5 * masked_mean(larger_error, mask, weights), stats


# ----------------------------------------------------------------------------------------------------------------------
# 2. The settings of the algorithm
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PPOConfig:
    """What Part I reads. Names are those of TRL's PPOConfig where the thing is the same."""
    # Rollout.
    num_updates: int = 100  # updates in all; an update is a batch of replies and the PPO epochs on it
    batch_size: int = 128  # replies per update, B
    samples_per_prompt: int = 1  # replies to each prompt of an update
    response_length: int = 64  # longest reply, in tokens, T
    temperature: float = 1.0  # of the policy, in sampling and in every log-probability
    missing_eos_penalty: float | None = None  # subtracted from a score if the reply has no stop token; None: off
    score_clip: float | None = None  # scores are clipped to ± this; None: off
    seed: int = 1  # of everything: same seed, same run

    # KL penalty (Ziegler et al. 2019).
    kl_coef: float = 0.05  # β, weight of the KL to the initial model, score units per nat
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # k1 = d, k2 = d²/2, k3 = e^-d - 1 + d, where d = log π - log π_ref
    kl_in: Literal["reward", "loss"] = "reward"  # where β·KL goes: off the reward of each token, or into the loss
    kl_target: float | None = None  # KL, nats per reply, that an adaptive β aims at; None: β is fixed
    kl_horizon: float = 10000.0  # episodes over which the adaptive β moves by about a fifth

    # Advantages.
    gamma: float = 1.0  # γ, discount per token, in [0, 1]
    lam: float = 1.0  # λ of GAE, in [0, 1]: 0 trusts the critic, 1 the returns
    critic_lam: float | None = None  # λ of the critic's targets (VC-PPO); None: the same λ
    whiten_rewards: bool = False  # scale token rewards to variance 1, keeping their mean
    whiten_advantages: bool = True  # scale advantages to mean 0 and variance 1 over the whole batch
    bootstrap_truncated: bool = False  # after a reply that was cut off by its length use V, not 0

    # Update.
    num_ppo_epochs: int = 4  # passes over each batch
    num_mini_batches: int = 4  # optimizer steps per pass
    micro_batch_size: int | None = None  # most replies trained on at a time; changes no gradient; None: a minibatch
    learning_rate: float = 1e-5  # of AdamW, at its highest
    critic_lr: float | None = None  # learning rate of what only the critic uses; None: the policy's
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"  # decay after the warm-up, towards 0
    warmup_updates: int = 0  # updates of linear learning-rate warm-up
    max_grad_norm: float | None = 1.0  # gradient clipping; None: off
    cliprange: float = 0.2  # ε of the ratio
    cliprange_high: float | None = None  # upper ε, if larger (clip-higher, DAPO); None: the same ε
    dual_clip: float | None = None  # c > 1, bound on the loss of negative advantages (arXiv 1912.09729); None: off
    cliprange_value: float | None = None  # ε of the value clip, in standard deviations of the returns; None: off
    vf_coef: float = 0.3  # c1, weight of the value loss
    ent_coef: float = 0.0  # c2, weight of the entropy bonus
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"  # what has equal weight, see token_weights
    target_kl: float | None = 1.0  # KL(old ‖ new), nats per token, that ends an update and lowers the rate; None: off
    critic_warmup_updates: int = 0  # first updates, in which only the critic is trained

    @property
    def replies_at_once(self) -> int:  # most replies in a micro-batch
        return self.micro_batch_size or self.batch_size // self.num_mini_batches


# ----------------------------------------------------------------------------------------------------------------------
# 3. The data, and the actor with its value head
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    ids: list[int]  # its tokens
    row: dict = None  # what else the scoring function needs to know of it


@dataclass
class Rollout:
    """The replies of one update and all that is known of them, on the CPU. Micro-batches go to the device one by one.

    What is None at first is filled in by the steps of an update.
    """
    queries: Tensor  # [B, P] int, prompt tokens, left-padded
    query_mask: Tensor  # [B, P] bool, False on that padding
    responses: Tensor  # [B, T] int, sampled tokens, right-padded
    mask: Tensor  # [B, T] bool, the response mask
    ended: Tensor  # [B] bool, True if a stop token ended the reply, False if the length budget did
    sampler_logprobs: Tensor  # [B, T] log π of each token as the sampler saw it, only compared with `logprobs`
    logprobs: Tensor = None  # [B, T] log π_old of each token, frozen
    ref_logprobs: Tensor = None  # [B, T] the same under the reference
    entropy: Tensor = None  # [B, T] of π_old before each token, for the metrics
    values: Tensor = None  # [B, T] V_old of the state before each token, at first in the critic's units, then in scores
    final_values: Tensor = None  # [B] V_old of the state after the last token, likewise
    predictions: Tensor = None  # [B, T] old outputs of the critic, V(s) or Q(s, a), in its own units
    sampled_returns: Tensor = None  # [B, T] discounted sums of the rewards from this token on
    advantages: Tensor = None  # [B, T]
    returns: Tensor = None  # [B, T] what the critic should have said, in its units
    token_weights: Tensor = None  # [B, T] weight of each token in the losses
    valid: Tensor = None  # [n], only of a micro-batch: the places in the flattened [b, T] where the mask is True

    def replies(self) -> list:
        """The tokens of each reply, without padding."""
        return [response[mask].tolist() for response, mask in zip(self.responses, self.mask)]

    def select(self, index: Tensor, device="cpu") -> Rollout:
        """The replies `index` on the device, trimmed to the longest prompt and the longest reply among them."""
        longest_prompt = int(self.query_mask[index].sum(1).max())
        longest_reply = int(self.mask[index].sum(1).max())
        # Found on the CPU: on a GPU, nonzero would have to wait for all work that is queued before it.
        valid = self.mask[index, :longest_reply].flatten().nonzero().squeeze(1)
        fields = {"valid": valid.to(device)}
        for name, x in vars(self).items():
            if x is None or name == "valid":
                continue
            x = x[index]
            if name in ("queries", "query_mask"):
                x = x[:, -longest_prompt:]
            elif x.ndim == 2:
                x = x[:, :longest_reply]
            fields[name] = x.to(device)
        return Rollout(**fields)

    def groups(self, index: Tensor, size: int, device="cpu") -> list:
        """Cut the replies `index` into groups of at most `size` and of like length: little is computed for padding.

        Shortest first, a reply joins the last group unless the padding of that group would then cost more than one more
        pass over the model. A pass has the fixed cost of 128 tokens on a CPU (measured), of 8192 on a GPU (estimated).
        """
        affordable = 128 if torch.device(device).type == "cpu" else 8192
        prompts, replies = self.query_mask.sum(1), self.mask.sum(1)
        lengths = prompts + replies
        groups = [[]]
        for i in index[lengths[index].argsort(stable=True)].tolist():
            joined = [*groups[-1], i]
            padding = (prompts[joined].max() + replies[joined].max() - lengths[joined]).sum()
            if len(groups[-1]) == size or padding > affordable:
                groups.append([])
            groups[-1].append(i)
        return [torch.tensor(group) for group in groups]


class Processes:
    """The processes that train one model together: here, one. Part II has those that torchrun starts.

    Each holds the whole rollout and computes some of its rows, with 0 in the others; their sum makes it whole.
    """
    rank = 0
    count = 1

    def micro_batches(self, rollout: Rollout, index: Tensor, size: int, device) -> Iterator[tuple]:
        """This process's share of the replies `index`, cut into micro-batches: (their indices, the micro-batch)."""
        for group in rollout.groups(index, size, device):
            yield group, rollout.select(group, device)

    def sum(self, x: Tensor) -> Tensor:
        """x added up over the processes; x may be overwritten. If x is the norm of this process's shards of the
        gradient, the result is the norm of the whole gradient."""
        return x

    def whole(self, actor: Actor):
        """A context in which each process holds all weights of the actor."""
        return contextlib.nullcontext()


LOGITS_AT_ONCE = 2**26  # vocabulary logits in memory at a time: 256 MB in float32


class Actor(nn.Module):
    """A causal language model of transformers as the policy, and a critic: a linear head on hidden states.

    critic: the model whose hidden states the value head reads; None: the policy's, at half the work.
    action_values: the head gives Q(s, a) for every token a, and the baseline is Σ_a π(a|s)·Q(s, a).
    dtype: of matrix products (autocast); weights stay float32. ValueError for weights in half precision.
    """

    def __init__(
        self,
        lm: nn.Module,
        dtype: torch.dtype = torch.float32,
        critic: nn.Module | None = None,
        action_values: bool = False,
    ):
        super().__init__()
        for model in (lm, critic or lm):
            if model.dtype.itemsize < 4:
                expected = "expected float32, for AdamW's small steps; call model.float()"
                raise ValueError(f"weights in {model.dtype}: {expected}")
        self.dtype = dtype
        self.processes = Processes()
        self.action_values = action_values
        self.lm = lm.eval()  # no dropout: with it the first ratio would not be 1
        self.critic_trunk = None if critic is None else critic.base_model.eval()
        config = lm.config.get_text_config()
        self.logit_scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies its logits,
        self.logit_scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides them,
        self.softcap = getattr(config, "final_logit_softcapping", None)  # and Gemma 2 bounds them
        head = lm.get_output_embeddings()  # weight [V, H]
        width = head.weight.shape[1]
        if critic is not None:
            width = (critic.score if hasattr(critic, "score") else critic.get_output_embeddings()).weight.shape[1]
        vocabulary = head.weight.shape[0]
        self.tokens_at_once = max(1, LOGITS_AT_ONCE // vocabulary)
        self.value_head = nn.Linear(width, vocabulary if action_values else 1, device=lm.device, dtype=lm.dtype)
        nn.init.zeros_(self.value_head.weight)  # V starts equal in all states: no random baseline
        nn.init.zeros_(self.value_head.bias)

    @property
    def device(self):
        return self.value_head.weight.device

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def trunk(self, base: nn.Module, ids: Tensor, attention: Tensor, cache=None) -> Tensor:
        """Last hidden states of `base`. ids [b, L], attention [b, cached + L] -> [b, L, H].

        Positions count real tokens: padding on the left must not shift them.
        """
        positions = (attention.long().cumsum(1) - 1).clamp(min=0)
        with self.autocast():
            output = base(
                input_ids=ids,
                attention_mask=attention.long(),
                position_ids=positions[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return output.last_hidden_state

    def logits(self, states: Tensor) -> Tensor:  # [..., H] -> [..., V], at least float32
        """What the model's own forward makes of its last hidden states, scale and soft cap included."""
        # Outside autocast: near -100 bfloat16 numbers are 0.5 apart, and that error would be in every log ratio.
        states = states.to(self.value_head.weight.dtype) * self.logit_scale
        with torch.autocast(self.device.type, enabled=False):
            logits = self.lm.get_output_embeddings()(states)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def states(self, base: nn.Module, batch: Rollout) -> Tensor:  # -> [b, T + 1, H]
        """Response token t is predicted from state t; state T follows the last token. The only place that shifts."""
        ids = torch.cat([batch.queries, batch.responses], 1)
        # Attention is causal, so no token sees the padding to its right: only that on the left must be masked.
        attention = F.pad(batch.query_mask, (0, batch.mask.shape[1]), value=True)
        return self.trunk(base, ids, attention)[:, batch.queries.shape[1] - 1 :]

    def forward(self, batch: Rollout, temperature: float, with_entropy: bool = True):
        """(logprobs, entropy, predictions, values): [b, T] each, values [b, T + 1], see `Rollout` and `critic`.

        The old and new log-probabilities both come from here: so the first ratio is 1. with_entropy: see `logprobs`.
        """
        states = self.states(self.lm.base_model, batch)
        logprobs, entropy = self.logprobs(states[:, :-1], batch, temperature, with_entropy)
        critic_states = states
        if self.critic_trunk is not None:
            critic_states = self.states(self.critic_trunk, batch)
        predictions, values = self.critic(critic_states, states, batch, temperature)
        return logprobs, entropy, predictions, values

    def logprobs(
        self,
        states: Tensor,  # [b, T, H]
        batch: Rollout,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # [b, T], [b, T]
        """log π of the response tokens and the entropy of π before each, both 0 where the mask is False.

        with_entropy=False gives an entropy of 0: where the vocabulary is large and the model small, to compute it would
        cost as much as all the rest. Logits are computed for valid tokens only, in chunks. If there are several, the
        backward pass computes each anew: memory holds the logits of one chunk, never [b, T, V].
        """

        def head(states, tokens):  # [n, H], [n] -> [2, n]
            logits = self.logits(states)
            logprobs = logprobs_from_logits(logits, tokens, temperature)
            entropy = entropy_from_logits(logits, temperature) if with_entropy else torch.zeros_like(logprobs)
            return torch.stack([logprobs, entropy])

        states = states.flatten(0, 1)[batch.valid].split(self.tokens_at_once)  # [n, H] each
        tokens = batch.responses.flatten()[batch.valid].split(self.tokens_at_once)  # [n] each
        if len(tokens) == 1:
            results = head(states[0], tokens[0])
        else:
            parts = [checkpoint(head, *chunk, use_reentrant=False) for chunk in zip(states, tokens)]
            results = torch.cat(parts, 1)
        placed = results.new_zeros(2, batch.mask.numel()).index_copy(1, batch.valid, results)
        return placed.view(2, *batch.mask.shape).unbind()

    def critic(
        self,
        critic_states: Tensor,  # [b, T + 1, H]
        states: Tensor,  # [b, T + 1, H], of the policy
        batch: Rollout,
        temperature: float,
    ) -> tuple[Tensor, Tensor | None]:  # [b, T], [b, T + 1]
        """(predictions, values). Predictions are what the critic is trained on: V(s), or Q(s, a) of the token a.

        Values are the baseline of every state: V(s), or Σ_a π(a|s)·Q(s, a), which is None in training: only
        rollouts need it.
        """
        x = critic_states.to(self.value_head.weight.dtype)
        if not self.action_values:
            values = self.value_head(x).squeeze(-1)
            return values[:, :-1], values
        weight = self.value_head.weight[batch.responses]  # [b, T, H]: only the rows of the sampled tokens
        predictions = (x[:, :-1] * weight).sum(-1) + self.value_head.bias[batch.responses]
        if torch.is_grad_enabled():
            return predictions, None
        values = []
        policy_chunks = states.flatten(0, 1).split(self.tokens_at_once)  # rows of [b·(T + 1), H]
        for policy_chunk, critic_chunk in zip(policy_chunks, x.flatten(0, 1).split(self.tokens_at_once)):
            probabilities = (self.logits(policy_chunk) / temperature).softmax(1)
            values.append((probabilities * self.value_head(critic_chunk)).sum(1))
        return predictions, torch.cat(values).view(states.shape[:2])


# ----------------------------------------------------------------------------------------------------------------------
# 4. The rollout: generate, log-probabilities and values, advantages
# ----------------------------------------------------------------------------------------------------------------------


def left_pad(sequences: list) -> tuple[Tensor, Tensor]:  # -> [B, P], [B, P]
    """Lists of token ids, padded on the left, and their mask. Any token may pad: the mask marks the padding."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    padded = pad_sequence(ids, batch_first=True, padding_value=-1, padding_side="left")
    mask = padded >= 0  # -1 is the id of no token
    return padded.where(mask, 0), mask


def sample_replies(actor: Actor, prompts: list[Prompt], stop_ids: list[int], cfg: PPOConfig) -> Rollout:
    """A rollout with a reply to each prompt. What policy and critic say of the replies is not filled in yet."""
    queries, query_mask = left_pad([prompt.ids for prompt in prompts])
    responses, logprobs = generate(actor, queries, query_mask, stop_ids, cfg)
    if not logprobs.isfinite().all():
        raise FloatingPointError("the policy's probabilities are not finite: it has diverged; lower the learning rate")
    mask = response_mask(responses, stop_ids)
    ended = torch.isin(responses, responses.new_tensor(stop_ids)).any(1)
    return Rollout(queries, query_mask, responses, mask, ended, logprobs)


@torch.no_grad()  # not inference_mode: there autocast would round the weights again for every token
def generate(
    actor: Actor,
    queries: Tensor,  # [B, P]
    query_mask: Tensor,  # [B, P]
    stop_ids: list[int],
    cfg: PPOConfig,
) -> tuple[Tensor, Tensor]:  # [B, T], [B, T]
    """Sample a reply to each prompt from the whole distribution: (responses, their log π), 0 after the end of a reply.

    The token is the first whose cumulative probability exceeds a uniform random number. argmax(p / exponential) would
    be shorter, but one number per token can be drawn for all replies beforehand: so, up to rounding, a reply depends
    neither on its group nor on the device. Eight micro-batches are decoded together, as no activations are kept.
    """
    uniform = torch.rand(len(queries), cfg.response_length, dtype=torch.float64)
    responses = queries.new_zeros(uniform.shape)
    logprobs = torch.zeros(uniform.shape, dtype=actor.value_head.weight.dtype)
    processes = actor.processes
    share = torch.arange(len(queries))[processes.rank :: processes.count]
    with processes.whole(actor), actor.autocast():  # autocast keeps the rounded weights until it ends
        for rows in share.split(8 * cfg.replies_at_once):
            group = queries[rows], query_mask[rows], uniform[rows]
            responses[rows], logprobs[rows] = decode(actor, *group, stop_ids, cfg.temperature)
    return processes.sum(responses), processes.sum(logprobs)


def decode(
    actor: Actor,
    queries: Tensor,  # [b, P]
    query_mask: Tensor,  # [b, P]
    uniform: Tensor,  # [b, T], in [0, 1)
    stop_ids: list[int],
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [b, T], [b, T]
    """Token by token with the KV cache.

    Every fourth token the host asks which replies have stopped, and drops them from the batch once more than a quarter
    have. To ask after each token would make a GPU wait for the host.
    """
    from transformers import DynamicCache

    b, T = uniform.shape
    uniform = uniform.to(actor.device, torch.float32 if actor.device.type == "mps" else torch.float64)
    queries = queries.to(actor.device)
    attention = F.pad(query_mask, (0, T), value=True).to(actor.device)
    stop = queries.new_tensor(stop_ids)
    responses = queries.new_zeros(b, T)
    logprobs = actor.value_head.weight.new_zeros(b, T)
    alive = torch.arange(b, device=actor.device)  # replies that are still being written
    stopped = torch.zeros_like(alive, dtype=torch.bool)
    ids = queries
    cache = DynamicCache(config=actor.lm.config)
    keep = cache.update
    # Under autocast rotary embeddings give keys in float32. The cache would follow, with the values: twice the memory.
    cache.update = lambda keys, values, *rest, **more: keep(keys.to(values.dtype), values, *rest, **more)
    for t in range(T):
        states = actor.trunk(actor.lm.base_model, ids, attention[:, : queries.shape[1] + t], cache)
        logits = actor.logits(states[:, -1])  # [b, V]
        cumulative = (logits.to(uniform.dtype) / temperature).softmax(1).cumsum(1)
        tokens = torch.searchsorted(cumulative, uniform[alive, t].unsqueeze(1), right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # rounding may leave the sum of all below 1
        responses[alive, t] = torch.where(stopped, 0, tokens)
        logprobs[alive, t] = torch.where(stopped, 0.0, logprobs_from_logits(logits, tokens, temperature))
        stopped |= torch.isin(tokens, stop)
        ids = tokens.unsqueeze(1)
        if t % 4 == 3:
            going = (~stopped).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) < 0.75 * len(alive):
                alive, attention, ids, stopped = alive[going], attention[going], ids[going], stopped[going]
                cache.reorder_cache(going)
    return responses.cpu(), logprobs.cpu()


@torch.no_grad()
def fill_logprobs_and_values(actor: Actor, ref: Actor, rollout: Rollout, cfg: PPOConfig) -> None:
    """Fill in what policy, critic and reference say of every response token, by the forward that training uses."""
    B, T = rollout.mask.shape
    filled = torch.zeros(5, B, T, dtype=actor.value_head.weight.dtype)
    rollout.final_values = filled.new_zeros(B)
    processes = actor.processes
    for index, batch in processes.micro_batches(rollout, torch.arange(B), cfg.replies_at_once, actor.device):
        logprobs, entropy, predictions, values = actor(batch, cfg.temperature)
        ref_logprobs = ref(batch, cfg.temperature, with_entropy=False)[0]
        results = torch.stack([logprobs, entropy, ref_logprobs, values[:, :-1], predictions])
        filled[:, index, : results.shape[2]] = results.cpu()
        lengths = batch.mask.sum(1, keepdim=True)
        rollout.final_values[index] = values.gather(1, lengths).squeeze(1).cpu()
    rollout.final_values = processes.sum(rollout.final_values)
    filled = processes.sum(filled)
    rollout.logprobs, rollout.entropy, rollout.ref_logprobs, rollout.values, rollout.predictions = filled


@dataclass
class State:
    """Where a run stands, besides weights and optimizer. No random generator is in it: each update seeds them anew."""
    kl_coef: float  # β, which an adaptive controller moves
    update: int = 0  # finished updates; so also the place in the learning-rate schedule and in the prompts
    skipped: int = 0  # steps that were not finite, in all updates since the last one that took a step
    step_size: float = 1.0  # share of the learning rate that target_kl leaves
    returns_mean: float = 0.0  # running mean of the returns of earlier updates
    returns_std: float = 0.0  # and their largest standard deviation: the units of the critic


def compute_advantages(rollout: Rollout, scores: Tensor, state: State, cfg: PPOConfig) -> None:  # scores [B]
    """Fill in advantages and returns, and give values the units of scores: token rewards, GAE, whitening of the batch.

    The critic has the units of its task: V = mean + std·output, by a running mean of the returns and their largest
    standard deviation (after PopArt, arXiv 1809.04474, but outputs are not corrected when these move). So vf_coef and a
    clip mean the same for scores of 0.01 and of 100. The mean is that of earlier updates: a reply must not shift its
    own baseline.
    """
    mask = rollout.mask
    if cfg.score_clip is not None:
        scores = scores.clamp(-cfg.score_clip, cfg.score_clip)
    if cfg.missing_eos_penalty is not None:
        scores = scores.where(rollout.ended, scores - cfg.missing_eos_penalty)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, cfg.kl_estimator)
    rewards = token_rewards(scores, kl, mask, state.kl_coef if cfg.kl_in == "reward" else 0.0)
    if cfg.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    _, rollout.sampled_returns = gae(rewards, torch.zeros_like(rewards), mask, cfg.gamma, lam=1.0)
    mean = state.returns_mean
    spread = rollout.sampled_returns[mask].double().std(correction=0)
    std = max(state.returns_std, float(spread)) or 1.0  # that of this batch too: no huge target at first success
    rollout.values = mean + std * rollout.values
    rollout.final_values = mean + std * rollout.final_values
    bootstrap = rollout.final_values.where(~rollout.ended, 0.0) if cfg.bootstrap_truncated else None
    advantages, returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.lam, bootstrap)
    if cfg.critic_lam is not None:  # the critic may look further ahead than the policy (VC-PPO, arXiv 2503.01491)
        _, returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.critic_lam, bootstrap)
    rollout.advantages = masked_whiten(advantages, mask) if cfg.whiten_advantages else advantages
    rollout.returns = torch.where(mask, (returns - mean) / std, 0.0)


def update_critic_units(rollout: Rollout, state: State, rate: float = 0.2) -> None:
    """Move the critic's units to the returns of this update: the mean a fifth of the way, the deviation only up.

    A policy that has learned gives returns that hardly differ. In units as small as that, a small change of the returns
    would be a huge error, and shake the trunk that critic and policy share.
    """
    returns = rollout.sampled_returns[rollout.mask].double()
    state.returns_mean += rate * (float(returns.mean()) - state.returns_mean)
    state.returns_std = max(state.returns_std, float(returns.std(correction=0)))


# ----------------------------------------------------------------------------------------------------------------------
# 5. The update
# ----------------------------------------------------------------------------------------------------------------------


def ppo_loss(
    actor: Actor,
    batch: Rollout,
    kl_coef: float,
    cfg: PPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:  # [], stats
    """PPO eq. 9, negated: policy loss + c1 value loss - c2 entropy, + β KL with kl_in = loss (arXiv 2402.03300, eq. 3).

    Loss and statistics are sums over the tokens of the micro-batch; in the losses each token has its weight. Added up
    over a step and divided by its number of tokens, they are the same however the step is cut into micro-batches.
    """
    mask = batch.mask
    weights = batch.token_weights
    new_logprobs, entropy, predictions, _ = actor(batch, cfg.temperature, with_entropy=cfg.ent_coef != 0)
    pg_loss, pg_stats = policy_loss(
        new_logprobs, batch.logprobs, batch.advantages, mask, cfg.cliprange, cfg.cliprange_high, cfg.dual_clip, weights
    )
    vf_loss, vf_stats = value_loss(predictions, batch.predictions, batch.returns, mask, cfg.cliprange_value, weights)
    loss = pg_loss + cfg.vf_coef * vf_loss
    if cfg.ent_coef != 0:
        loss = loss - cfg.ent_coef * masked_mean(entropy, mask, weights)
    if cfg.kl_in == "loss":
        kl = kl_estimate(new_logprobs, batch.ref_logprobs, cfg.kl_estimator)
        loss = loss + kl_coef * masked_mean(kl, mask, weights)
    stats = {name: mean * len(batch.valid) for name, mean in (pg_stats | vf_stats).items()}
    stats |= {"loss/policy": pg_loss.detach(), "loss/value": vf_loss.detach()}
    return loss, stats


def token_weights(mask: Tensor, aggregation: str) -> Tensor:  # [B, T] of 0 and 1 -> [B, T]
    """The weight of each token in the losses of a step, which are then divided by the number of its valid tokens."""
    if aggregation == "token":  # every token of the step counts the same (DAPO, arXiv 2503.14476)
        return mask
    if aggregation == "constant":  # and the same in every step, divided by all its cells (Dr. GRPO, arXiv 2503.20783)
        return mask * (mask.sum() / mask.numel())
    lengths = mask.sum(1, keepdim=True)  # "sequence": every reply counts the same, and its tokens share its part
    return mask * (mask.sum() / (len(mask) * lengths))


def ppo_update(
    actor: Actor,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    kl_coef: float,
    cfg: PPOConfig,
    critic_only: bool = False,
) -> dict[str, float]:
    """PPO, algorithm 1: several epochs of shuffled minibatches, an optimizer step each.

    Returns metrics: means over the valid tokens of all steps, or over steps, and counts of steps. A step whose loss or
    gradient is not finite is left out, with its metrics, and counted. A step that finds the policy beyond target_kl
    ends the update and is not taken; its metrics are in the means.
    """
    processes = actor.processes
    totals = defaultdict(float)  # sums over the tokens of all steps
    tokens = 0  # in all steps
    policy_norms = []  # before clipping
    skipped = 0
    rollout.token_weights = torch.zeros_like(rollout.advantages)
    order = torch.cat([torch.randperm(len(rollout.mask)) for _ in range(cfg.num_ppo_epochs)])
    for minibatch in order.chunk(cfg.num_ppo_epochs * cfg.num_mini_batches):
        mask = rollout.mask[minibatch].to(rollout.advantages.dtype)
        step_tokens = int(mask.sum())
        rollout.token_weights[minibatch] = token_weights(mask, cfg.loss_aggregation)
        sums = 0.0  # over the tokens of this step
        for _, batch in processes.micro_batches(rollout, minibatch, cfg.replies_at_once, actor.device):
            loss, stats = ppo_loss(actor, batch, kl_coef, cfg)
            (loss / step_tokens).backward()
            sums += torch.stack(list(stats.values()))
        step = dict(zip(stats, processes.sum(sums).tolist()))  # every micro-batch has statistics of the same names
        if critic_only:  # the policy does not move: the optimizer skips parameters without a gradient
            actor.lm.zero_grad()
        # Each group by itself: large errors of a critic's own parameters must not shrink the policy's step.
        groups = [group["params"] for group in optimizer.param_groups]
        norms = [processes.sum(nn.utils.clip_grad_norm_(group, cfg.max_grad_norm or math.inf)) for group in groups]
        finite = math.isfinite(sum(norms) + sum(step.values()))
        too_far = cfg.target_kl is not None and step["policy/approxkl"] > cfg.target_kl * step_tokens
        if not finite:
            skipped += 1
        elif not too_far:
            optimizer.step()
            policy_norms.append(float(norms[0]))
        optimizer.zero_grad()  # whether a step was taken or not: no gradient stays for the next step or rollout
        if finite:
            tokens += step_tokens
            for name, x in step.items():
                totals[name] += x
            if too_far:
                break
    metrics = {name: total / tokens for name, total in totals.items()}
    metrics["policy/grad_norm"] = sum(policy_norms) / max(1, len(policy_norms))
    metrics["policy/steps"] = len(policy_norms)
    metrics["policy/skipped_steps"] = skipped
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# 6. The loop
# ----------------------------------------------------------------------------------------------------------------------


def ppo(
    actor: Actor,
    ref: Actor,
    optimizer: torch.optim.Optimizer,
    prompts: list[Prompt],
    score: Callable,
    stop_ids: list[int],
    cfg: PPOConfig,
    state: State,
) -> Iterator[tuple]:
    """Train the actor in place until cfg.num_updates updates are done. Yields the metrics and four samples of each.

    ref: the frozen initial policy. optimizer: of one group of parameters, or of two, policy and critic (cfg.critic_lr).
    Its learning rates are set anew in each update.
    score(prompts, replies) -> (scores [B], parts): replies as token ids; float scores on the CPU, higher is better.
    parts {name: [B]} are for the metrics (NaN where a part does not apply). stop_ids: the tokens that end a reply.
    state: where to begin, State(cfg.kl_coef) at first. It is complete at each yield: a checkpoint can be written then.
    A sample is (prompt, token ids of the reply, score, KL in nats).

    Raises ValueError for settings that contradict each other or the optimizer, and for scores that are not finite,
    FloatingPointError once the policy's probabilities are not.
    """
    if cfg.batch_size % cfg.num_mini_batches or cfg.batch_size % cfg.samples_per_prompt:
        raise ValueError("batch_size: expected a multiple of num_mini_batches and of samples_per_prompt")
    if cfg.kl_in == "loss" and cfg.kl_estimator == "k1":
        raise ValueError("kl_estimator: expected k2 or k3 with kl_in = loss, where k1 has no gradient on average")
    groups = len(optimizer.param_groups)
    if groups > 2 or (groups == 1 and cfg.critic_lr is not None):
        raise ValueError("optimizer: expected one group of parameters or two, policy and critic; two with critic_lr")
    while state.update < cfg.num_updates:
        seed_everything(cfg.seed, state.update)
        rates = (cfg.learning_rate, cfg.learning_rate if cfg.critic_lr is None else cfg.critic_lr)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(state.update, cfg) * state.step_size

        # 1. Generate a reply to each prompt.
        started = time.perf_counter()
        count = cfg.batch_size // cfg.samples_per_prompt
        drawn = draw_prompts(prompts, state.update * count, count, cfg.seed)
        batch = [prompt for prompt in drawn for _ in range(cfg.samples_per_prompt)]
        rollout = sample_replies(actor, batch, stop_ids, cfg)
        generated = time.perf_counter()

        # 2. Score each whole reply.
        replies = rollout.replies()
        scores, parts = score(batch, replies)
        if not scores.isfinite().all():
            raise ValueError(f"score: expected finite numbers, got {scores[~scores.isfinite()][0]}")
        scored = time.perf_counter()

        # 3. Log-probabilities and values of every token.
        fill_logprobs_and_values(actor, ref, rollout, cfg)

        # 4. Advantages.
        compute_advantages(rollout, scores, state, cfg)
        evaluated = time.perf_counter()

        # 5. Update policy and critic.
        critic_only = state.update < cfg.critic_warmup_updates
        stats = ppo_update(actor, optimizer, rollout, state.kl_coef, cfg, critic_only)
        updated = time.perf_counter()

        # 6. Metrics, and the state after this update.
        metrics = {
            "update": state.update + 1,
            "episode": (state.update + 1) * cfg.batch_size,
            "lr": optimizer.param_groups[0]["lr"],
            "kl_coef": state.kl_coef,
            **rollout_metrics(rollout, scores, parts, state.kl_coef, cfg),
            **stats,
            "time/generate": generated - started,
            "time/reward": scored - generated,
            "time/evaluate": evaluated - scored,
            "time/update": updated - evaluated,
        }
        samples = list(zip(batch, replies, scores.tolist(), reply_kl(rollout).tolist()))[:4]

        state.update += 1
        state.skipped = state.skipped + stats["policy/skipped_steps"] if stats["policy/steps"] == 0 else 0
        # Too large a learning rate makes the policy leap: an update that target_kl stops divides it by 1.5, any other
        # multiplies it by 1.5, up to what was set.
        planned = cfg.num_ppo_epochs * cfg.num_mini_batches
        stopped = stats["policy/steps"] + stats["policy/skipped_steps"] < planned
        state.step_size = state.step_size / 1.5 if stopped else min(1.0, state.step_size * 1.5)
        if stats["policy/skipped_steps"] == 0:  # else returns may be huge
            update_critic_units(rollout, state)
        if cfg.kl_target is not None and not critic_only:  # in warm-up KL is 0
            state.kl_coef = adaptive_kl_coef(
                state.kl_coef, metrics["objective/kl"], cfg.kl_target, cfg.kl_horizon, cfg.batch_size
            )
        yield metrics, samples


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy and torch from (seed, update), so that a resume needs no state of any generator."""
    from transformers import set_seed

    set_seed(random.Random(" ".join(map(str, parts))).getrandbits(32))


def schedule(update: int, cfg: PPOConfig) -> float:
    """Share of the learning rate in update `update`, counted from 0: linear warm-up, then the decay over the rest."""
    done = max(0, update - cfg.warmup_updates) / max(1, cfg.num_updates - cfg.warmup_updates)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    warmup = min(1.0, (update + 1) / (cfg.warmup_updates + 1))
    return warmup * decay[cfg.lr_scheduler_type]


def draw_prompts(prompts: list, start: int, count: int, seed: int) -> list:
    """`count` prompts from place `start` of an endless stream: pass after pass over all, each in a new order."""
    epoch, first = divmod(start, len(prompts))
    stream = []
    while len(stream) < first + count:
        stream += random.Random(f"{seed} {epoch}").sample(prompts, len(prompts))
        epoch += 1
    return stream[first : first + count]


def reply_kl(rollout: Rollout, kind: str = "k1") -> Tensor:  # -> [B]
    """Σ_t KL_t of each reply, in nats. For one reply k1 may be negative, on average it is not."""
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind)
    return torch.where(rollout.mask, kl, 0.0).sum(1)


def rollout_metrics(
    rollout: Rollout,
    scores: Tensor,  # [B]
    parts: dict[str, Tensor],  # [B] each
    kl_coef: float,
    cfg: PPOConfig,
) -> dict[str, float]:
    """What the replies of an update were like: means over replies, or over valid tokens for what a token has."""
    mask = rollout.mask
    penalty = reply_kl(rollout, cfg.kl_estimator) * (kl_coef if cfg.kl_in == "reward" else 0.0)
    returns = rollout.returns[mask]  # [N]
    residual = returns - rollout.predictions[mask]
    floor = 1e-12  # where all returns are equal there is nothing to explain: 0
    explained = 1 - (residual.var(correction=0) + floor) / (returns.var(correction=0) + floor)
    sampler_gap = rollout.logprobs - rollout.sampler_logprobs
    metrics = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(correction=0),
        "objective/kl": reply_kl(rollout).mean(),
        "objective/non_score_reward": -penalty.mean(),
        "objective/rlhf_reward": (scores - penalty).mean(),
        **{f"rewards/{name}": part.nanmean() for name, part in parts.items() if part.isfinite().any()},
        "prompt/length": rollout.query_mask.sum(1).float().mean(),
        "reply/length": mask.sum(1).float().mean(),
        "reply/ended": rollout.ended.float().mean(),
        "policy/entropy": rollout.entropy[mask].mean(),
        "policy/sampler_gap": sampler_gap[mask].abs().mean(),
        "val/mean": rollout.values[mask].mean(),
        "val/explained_variance": explained,
    }
    return {name: float(x) for name, x in metrics.items()}


# ------------------------------------------------- Part I ends here ---------------------------------------------------
# Part II: the program around it. Prompts, rewards, models, the run's folder, the terminal, the demo, the command line.
# ----------------------------------------------------------------------------------------------------------------------

import atexit
import copy
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import textwrap
import threading
import traceback
import typing
import warnings
from pathlib import Path

import torch.distributed as dist

Reward = Callable[..., list[float]]  # f(prompts, completions, **columns), as in TRL's GRPOTrainer


class UsageError(ValueError):
    """A setting or a file that the user can put right, found before anything is written: one line, exit status 2."""


class RunError(RuntimeError):
    """What stops a run that has begun: one line, exit status 1."""


class RewardError(RunError):
    """A reward that fails. The policy is sound, so the run is saved first."""


@contextlib.contextmanager
def in_one_line(what: str, error: type = UsageError):
    """Any exception inside becomes an `error` of one line, which begins with `what`: a flag, a file, what was tried."""
    try:
        yield
    except (UsageError, RunError):
        raise
    except Exception as e:
        reason = textwrap.shorten(str(e), 400)
        if not isinstance(e, ValueError):
            reason = f"{type(e).__name__}: {reason}"
        raise error(f"{what}: {reason}") from e


# ----------------------------------------------------------------------------------------------------------------------
# 7. The settings of a run
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunConfig:
    """What is trained, on what, and where."""
    # The task.
    model: str | None = None  # hub name or folder of a causal language model; None: the embedded demo
    prompts: str | None = None  # .txt, a prompt a line, or .jsonl, rows with "prompt" and reward columns; None: a demo
    reward: tuple[str, ...] = ()  # FILE.py:FUNCTION or MODULE:FUNCTION, f(prompts, completions, **columns) -> floats
    reward_model: tuple[str, ...] = ()  # hub names or folders of sequence classifiers that score prompt and reply
    reward_label: str | None = None  # the label that scores, of reward models with several; None: they have one
    reward_weights: tuple[float, ...] | None = None  # of --reward, then --reward-model; 0 measures only; None: all 1
    eval_prompts: str | None = None  # file of held-out prompts; None: one prompt in ten is held out, at most 64
    max_prompt_length: int | None = None  # longer prompts, in tokens, are dropped and counted; None: all must fit
    stop_token: str | None = None  # one more token that ends a reply; None: the model's EOS tokens only
    trust_remote_code: bool = False  # let models and tokenizers run code that comes with them

    # The critic.
    critic: Literal["shared", "separate"] = "shared"  # a head on the policy's trunk, or a trunk of its own too
    critic_model: str | None = None  # where a separate critic starts, a reward model's head included; None: the policy
    critic_target: Literal["value", "action-value"] = "value"  # V(s), or Q(s, ·) with Σ π·Q as the baseline

    # Where and how it runs.
    name: str | None = None  # the run is written to RUNS_DIR/NAME; None: time and task
    runs_dir: str = "runs"  # folder of the runs
    save_every: int | None = None  # updates between checkpoints; None: only when interrupted or when a reward fails
    resume: str | None = None  # folder of a run to go on with, under its own settings; None: a new run
    device: str = "auto"  # cpu, cuda, cuda:1, mps, ...; auto: the accelerator that torch reports, else the CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on a GPU that has it
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32; high: TF32, medium: oneDNN on CPUs
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, one forward more


@dataclass(frozen=True)
class Config(PPOConfig, RunConfig):  # in this order dataclasses, and so --help, list the fields of RunConfig first
    """PPO for language models in one file.

    Without --model, runs the embedded demo, with settings of its own.

    Names are those of TRL's PPOConfig where the thing is the same.
    """

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot be."""
        hints = typing.get_type_hints(Config)
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            if not is_of_type(x, hints[field.name]):
                raise ValueError(f"--{field.name.replace('_', '-')} {x!r}: expected {field.type}")
        B = self.batch_size
        counts = "num_updates batch_size num_ppo_epochs num_mini_batches micro_batch_size response_length"
        positive = "temperature learning_rate critic_lr kl_target kl_horizon max_grad_norm target_kl score_clip"
        not_negative = "seed kl_coef vf_coef ent_coef missing_eos_penalty warmup_updates critic_warmup_updates"
        rules = [
            ("1 or more", lambda x: x >= 1, f"{counts} samples_per_prompt max_prompt_length save_every"),
            ("a number above 0", lambda x: 0 < x < math.inf, f"{positive} cliprange_high cliprange_value"),
            ("0 or more", lambda x: 0 <= x < math.inf, not_negative),
            ("a number in [0, 1]", lambda x: 0 <= x <= 1, "gamma lam critic_lam"),
            ("a number between 0 and 1", lambda x: 0 < x < 1, "cliprange"),
            ("a number above 1", lambda x: 1 < x < math.inf, "dual_clip"),
            ("finite numbers", lambda x: all(map(math.isfinite, x)), "reward_weights"),
            ("letters, digits and ._+- only", re.compile(r"[\w.+-]+").fullmatch, "name"),
            ("a file that exists", os.path.isfile, "prompts eval_prompts"),
            (f"a divisor of --batch-size {B}", lambda x: B % x == 0, "num_mini_batches samples_per_prompt"),
        ]
        if self.kl_target is not None:
            rules.append(("a number above 0 to start from, with --kl-target", lambda x: x > 0, "kl_coef"))
            rules.append((f"at least --batch-size {B}, with --kl-target", lambda x: x >= B, "kl_horizon"))
        if self.kl_in == "loss":
            expected = "k2 or k3, with --kl-in loss: as a loss k1 has no gradient on average"
            rules.append((expected, lambda x: x != "k1", "kl_estimator"))
        if self.critic_model is not None:
            rules.append(("separate, with --critic-model", lambda x: x == "separate", "critic"))
        for expected, is_right, names in rules:
            for name in names.split():
                x = getattr(self, name)
                if x is not None and not is_right(x):
                    raise ValueError(f"--{name.replace('_', '-')} {x}: expected {expected}")


def is_of_type(x, hint) -> bool:
    """Whether x is of the type of a setting: a plain one, one of several, one of a few words, or a tuple."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return x in inner
    if typing.get_origin(hint) is tuple:
        return isinstance(x, tuple) and all(is_of_type(item, inner[0]) for item in x)
    if inner:
        return any(is_of_type(x, kind) for kind in inner)
    return isinstance(x, (int, float) if hint is float else hint)


def as_config(kind: type, settings: dict) -> Config:
    """Settings as config.json keeps them: lists become tuples, paths text, numbers of NumPy Python's own. Checked."""
    text = json.dumps(settings, default=lambda x: x.item() if hasattr(x, "item") else os.fspath(x))
    cfg = kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(text).items()})
    cfg.check()
    return cfg


# ----------------------------------------------------------------------------------------------------------------------
# 8. Prompts and rewards
# ----------------------------------------------------------------------------------------------------------------------


def as_row(x: str | dict) -> dict:
    """A prompt, or a row with one, as a row; ValueError if it is neither, or cannot be logged."""
    row = {"prompt": x} if isinstance(x, str) else x
    prompt = row.get("prompt") if isinstance(row, dict) else None
    is_right = isinstance(prompt, str) and prompt.strip()
    if isinstance(prompt, list) and prompt:
        is_right = all(isinstance(m, dict) and "role" in m and type(m.get("content")) in (str, list) for m in prompt)
    if not is_right:
        expected = 'expected a "prompt": a string that is not empty, or chat messages with "role" and "content"'
        raise ValueError(f"{expected}, got {x!r:.100}")
    json.dumps(row, ensure_ascii=False, default=str).encode()  # fails on half a surrogate pair
    return row


def load_prompts(path: str) -> list[dict]:
    """Rows with `prompt` and any other columns from .jsonl, or a prompt a line from .txt."""
    if Path(path).suffix not in (".txt", ".jsonl"):
        raise UsageError(f"the prompts {path}: expected .txt, a prompt a line, or .jsonl, a row with a prompt a line")
    rows = []
    with in_one_line(f"cannot read the prompts {path}"):
        lines = Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        with in_one_line(f"{path}, line {number}"):
            text = line.decode("utf-8-sig")
            if text.strip():
                rows.append(as_row(json.loads(text) if path.endswith(".jsonl") else text))
    if not rows:
        raise UsageError(f"{path} holds no prompts")
    return rows


def tokenize(tokenizer, text: str | list[dict], **template) -> list[int]:
    """Token ids of a string, or of chat messages by the tokenizer's template, which writes all special tokens."""
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    return tokenizer.apply_chat_template(text, return_dict=True, **template)["input_ids"]


def is_begun(text: str | list[dict]) -> bool:
    """Whether a chat ends with a message of the assistant, which the reply continues."""
    return not isinstance(text, str) and text[-1]["role"] == "assistant"


def encode(tokenizer, rows: list[dict], vocabulary: int) -> list[Prompt]:
    """Tokenize the prompts. Every row gets the columns of all rows, None where it lacks one."""
    columns = dict.fromkeys(key for row in rows for key in row)
    prompts = []
    for row in rows:
        text = row["prompt"]
        if not isinstance(text, str) and not tokenizer.chat_template:
            raise UsageError("the prompts are chats and the model's tokenizer has no chat template: give strings")
        begun = is_begun(text)
        with in_one_line(f"the prompt {text!r:.200}"):
            ids = tokenize(tokenizer, text, add_generation_prompt=not begun, continue_final_message=begun)
            if not ids:
                raise ValueError("it has no token in this tokenizer")
            if max(ids) >= vocabulary:
                raise ValueError(f"token {max(ids)} is none of the model's {vocabulary}: take the model's tokenizer")
        prompts.append(Prompt(ids, {key: row.get(key) for key in columns}))
    return prompts


def reply_text(tokenizer, prompt: Prompt, ids: list[int]) -> str:
    """The reply such that prompt + reply is the whole text. Decoded alone, it may lack the space at its start."""
    if isinstance(prompt.row["prompt"], str):
        start, text = tokenizer.batch_decode([prompt.ids, prompt.ids + ids], skip_special_tokens=True)
        if text.startswith(start):
            return text[len(start) :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def import_path(path: str):
    """The module of a file, or of a name."""
    if not path.endswith(".py"):
        sys.path.append(os.getcwd())
        return importlib.import_module(path)
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_rewards(specs: tuple[str, ...]) -> list[Reward]:
    """The functions that `path/to/file.py:function` or `module:function` name. A file is run once."""
    rewards = []
    modules = {}
    for spec in specs:
        path, _, name = spec.rpartition(":")
        expected = "expected FILE.py:FUNCTION or MODULE:FUNCTION"
        if not path:
            raise UsageError(f"--reward {spec}: {expected}")
        with in_one_line(f"--reward {spec}: {expected}, and {path} cannot be imported"):
            modules[path] = modules.get(path) or import_path(path)
        if not callable(getattr(modules[path], name, None)):
            raise UsageError(f"--reward {spec}: {path} has no function {name}")
        rewards.append(getattr(modules[path], name))
    return rewards


def join_reply(prompt: str | list[dict], completion: str | list[dict]) -> str | list[dict]:
    """Prompt and reply as one text or chat. A reply that continues the assistant's last message is put behind it."""
    if not is_begun(prompt):
        return prompt + completion
    content = prompt[-1]["content"] + completion[0]["content"]
    return [*prompt[:-1], prompt[-1] | {"content": content}]


def load_reward_model(
    name: str,
    chat: bool,  # whether any prompt is a chat
    device: torch.device,
    dtype: torch.dtype,
    cfg: Config,
) -> Reward:
    """A sequence-classification model as a reward function, with its own tokenizer and chat template.

    It scores prompt and reply together, each text as if alone. If a text is too long for it, it reads the first token,
    which may be a special one, and the end.
    """
    model = load("ModelForSequenceClassification", name, "reward-model", cfg).to(device).eval()
    tokenizer = load("Tokenizer", name, "reward-model", cfg)
    config = model.config.get_text_config()
    if chat and not tokenizer.chat_template:
        raise UsageError(f"--reward-model {name}: the prompts are chat messages and its tokenizer has no chat template")
    columns = {label: column for column, label in model.config.id2label.items()}
    label = cfg.reward_label
    if len(columns) == 1 and (label is None or len(cfg.reward_model) > 1):  # then the label is for the others
        label = min(columns)
    if label not in columns:
        raise UsageError(f"--reward-label {label}: expected one of {', '.join(sorted(columns))}, the labels of {name}")
    longest = min(most_tokens(model), tokenizer.model_max_length)
    # A decoder scores the last token, and finds it in a batch by the pad token: without one, a text at a time.
    at_once = 1 if config.pad_token_id is None else cfg.replies_at_once

    @torch.inference_mode()
    def score(prompts: list, completions: list, **others) -> list[float]:
        texts = [tokenize(tokenizer, join_reply(p, c)) for p, c in zip(prompts, completions)]
        if any(len(ids) > longest for ids in texts):
            say_once(f"reward model {name}: texts of more than its {longest} tokens lose their beginning")
            texts = [ids if len(ids) <= longest else ids[:1] + ids[1 - longest :] for ids in texts]
        scores = []
        for start in range(0, len(texts), at_once):
            ids = [torch.tensor(text) for text in texts[start : start + at_once]]
            attention = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
            padded = pad_sequence(ids, batch_first=True, padding_value=config.pad_token_id or 0)
            with torch.autocast(device.type, dtype, dtype != torch.float32):
                logits = model(input_ids=padded.to(device), attention_mask=attention.to(device)).logits
            scores += logits[:, columns[label]].float().tolist()
        return scores

    score.__name__ = Path(name).name
    return score


@functools.cache
def say_once(text: str) -> None:
    print(f"\n{text}", file=sys.stderr)


def call_rewards(rewards: dict[str, Reward], columns: dict[str, list]) -> dict[str, Tensor]:
    """What each reward function says of each reply: {name: [B]}, NaN where it says None, that it does not apply.

    RewardError, naming the reward, the prompt and the reply, for one that raises or gives anything but finite numbers.
    """
    prompts = columns["prompts"]
    parts = {}
    for name, reward in rewards.items():

        def fail(problem: str, i: int) -> None:
            prompt, reply = prompts[i], columns["completions"][i]
            raise RewardError(f"reward {name} {problem} for the prompt {prompt!r:.500} and the reply {reply!r:.500}")

        try:
            answers = list(reward(**columns))
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            problem = f"failed at {Path(where.filename).name}:{where.lineno}: {type(e).__name__}: {e},"
            for i in range(len(prompts)):  # each reply alone, to name the one that it fails on
                try:
                    list(reward(**{key: x[i : i + 1] for key, x in columns.items()}))
                except Exception:
                    fail(problem, i)
            raise RewardError(f"reward {name} {problem} for a batch of {len(prompts)} but for no reply alone") from e
        if len(answers) != len(prompts):
            raise RewardError(f"reward {name}: expected {len(prompts)} numbers, one a completion, got {len(answers)}")
        for i, x in enumerate(answers):
            x = x.item() if getattr(x, "ndim", None) == 0 else x  # a number of NumPy or torch
            if x is not None and not (isinstance(x, (int, float)) and abs(x) <= torch.finfo(torch.float32).max):
                fail(f"gave {x!r:.100}, expected a finite number or None,", i)
            answers[i] = math.nan if x is None else float(x)
        parts[name] = torch.tensor(answers)
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# 9. Models
# ----------------------------------------------------------------------------------------------------------------------


def load(auto_class: str, name: str, flag: str, cfg: Config):
    """Auto{auto_class} of transformers from a folder or the hub, models in float32. Missing weights are refused."""
    import transformers

    is_model = auto_class.startswith("ModelFor")
    options = {"dtype": torch.float32, "output_loading_info": True} if is_model else {}
    with in_one_line(f"--{flag} {name}"):
        try:
            loaded = getattr(transformers, f"Auto{auto_class}").from_pretrained(
                name, trust_remote_code=cfg.trust_remote_code, **options
            )
        except ValueError as e:
            if "trust_remote_code" not in str(e):
                raise
            advice = "it comes with code of its own: give --trust-remote-code if you trust it"
            raise UsageError(f"--{flag} {name}: {advice}") from e
    if not is_model:
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        missing = min(info["missing_keys"])
        task = auto_class.removeprefix("ModelFor")
        raise UsageError(f"--{flag} {name}: it holds no {missing}, so it is no {task} model")
    return model


def most_tokens(model: nn.Module) -> float:
    """Tokens that the model has positions for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def keep_freed_memory() -> None:
    """Stop glibc from giving freed tensors back to the system, or the next ones cost their page faults again.

    Without it an update of GPT-2 takes 1.2 times as long in bfloat16 on a CPU. It holds for the whole process.
    """
    with contextlib.suppress(OSError, AttributeError):  # there is no glibc, so nothing is done
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks too come from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which keeps up to 2 GB that are free


def pick_device(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and the type of matrix products. Sets for the process how it multiplies and keeps memory."""
    with in_one_line(f"--device {cfg.device}: expected a device that torch has here, such as cpu"):
        best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        device = best if cfg.device == "auto" else torch.device(cfg.device)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))  # torchrun's number of the process
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # so that nothing is put on the first GPU by default
    dtype = cfg.dtype
    if dtype == "auto":
        is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if is_fast else "float32"
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    if device.type == "cpu":
        keep_freed_memory()
    return device, getattr(torch, dtype)


def load_critic(cfg: Config, model: nn.Module, tokenizer) -> nn.Module:
    """What a separate critic starts from: a causal language model, or a decoder that scores, then with its head."""
    flag = f"--critic-model {cfg.critic_model}"
    architectures = load("Config", cfg.critic_model, "critic-model", cfg).architectures or [""]
    is_classifier = architectures[0].endswith("ForSequenceClassification")
    auto_class = "ModelForSequenceClassification" if is_classifier else "ModelForCausalLM"
    critic = load(auto_class, cfg.critic_model, "critic-model", cfg)
    if is_classifier and (critic.config.num_labels != 1 or not hasattr(critic, "score")):
        raise UsageError(f"{flag}: expected a decoder with a score head of one label")
    if load("Tokenizer", cfg.critic_model, "critic-model", cfg).get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"{flag}: its vocabulary is not the policy's, whose tokens it reads")
    known, sampled = (m.get_input_embeddings().weight.shape[0] for m in (critic, model))
    if known < sampled:
        raise UsageError(f"{flag}: it embeds {known} tokens, and the policy samples from {sampled}")
    return critic


def fit_to_device(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move the model, and replace what is slow there by the same function in a faster form."""
    from transformers.activations import NewGELUActivation

    if model.base_model is model:  # Llama 4's text model, which names its trunk as the one that also sees does
        model.base_model_prefix = "model"
    model.to(device)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # GPT-2's, written out in eight operations: torch has it in one
                setattr(module, name, nn.GELU(approximate="tanh"))
    if device.type == "cpu" and (dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"):
        model.set_attn_implementation("eager")  # the fused kernel calls oneDNN for each tile: several times as slow


@torch.no_grad()
def check_model(actor: Actor, model: nn.Module) -> None:
    """Refuse a model whose states or logits, computed as `decode` does, are not those of its own forward.

    Of two rows, one is left-padded. Once the other is dropped, the tokens follow one by one.
    """
    from transformers import DynamicCache

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, 9, device=actor.device) % vocabulary).repeat(2, 1)
    attention = torch.ones_like(ids)
    attention[1, :2] = 0
    tolerance = 0.02 if actor.dtype == torch.float32 else 0.1
    with in_one_line(f"{type(model).__name__} cannot be trained here, use another kind of model"):
        cache = DynamicCache(config=model.config)
        states = [actor.trunk(model.base_model, ids[:, :5], attention[:, :5], cache)[1:, 2:]]
        cache.reorder_cache(ids.new_tensor([1]))
        for t in range(5, 8):
            states.append(actor.trunk(model.base_model, ids[1:, t : t + 1], attention[1:, : t + 1], cache))
        ours = torch.cat(states, 1)
        with actor.autocast():
            if model is actor.lm:
                ours = actor.logits(ours)
                own = model(input_ids=ids[1:, 2:]).logits
            else:
                own = model.base_model(input_ids=ids[1:, 2:]).last_hidden_state
        if not (own - ours).abs().max() < tolerance * own.std():
            raise ValueError("left-padded, with a cache or through its head, its output is not that of its own forward")


def make_actors(cfg: Config, model, critic, device: torch.device, dtype: torch.dtype) -> tuple[Actor, Actor]:
    """The policy with its critic, and the frozen reference. critic: where a separate one starts; None: the policy."""
    if model.dtype in (torch.bfloat16, torch.float16):
        model.float()  # half-precision weights would lose most of AdamW's small steps
    fit_to_device(model, device, dtype)
    uses_flash = "flash" in model.config._attn_implementation  # it has no float32
    checker = Actor(model, dtype if uses_flash else torch.float32)
    check_model(checker, model)
    ref = Actor(copy.deepcopy(model), dtype).requires_grad_(False)
    if cfg.critic == "separate":
        critic = critic or copy.deepcopy(model)
        fit_to_device(critic, device, dtype)
        check_model(checker, critic)
        critic.get_input_embeddings().sparse = False  # a copy of a policy that was trained before has it on
    actor = Actor(model, dtype, critic, cfg.critic_target == "action-value")
    if hasattr(critic, "score"):
        actor.value_head.weight.data.copy_(critic.score.weight)  # a reward model's one row, for V or for every Q
    # An embedding that is tied to the head adds a few rows to its gradient, instead of a second dense [V, H].
    embedding = model.get_input_embeddings()
    tied = embedding.weight is model.get_output_embeddings().weight
    embedding.sparse = tied and device.type in ("cpu", "cuda")
    if cfg.gradient_checkpointing:
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [module for module in actor.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise UsageError(f"--gradient-checkpointing: {type(model).__name__} has no layers for it; leave it out")
        for layer in layers:
            forward = functools.partial(type(layer).forward, layer)  # not layer.forward, which may be wrapped already
            layer.forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return actor, ref


@dataclass
class Task:
    """What is trained, on which prompts, and for which rewards."""
    actor: Actor
    ref: Actor  # the frozen initial policy
    tokenizer: object
    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: dict[str, Reward]  # by name
    reward_weights: tuple[float, ...]  # of each in the score
    stop_ids: list[int]

    def score(self, prompts: list[Prompt], replies: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
        """What `ppo` asks for: scores [B], and what each reward function said, {name: [B]}.

        Each process scores its share of the prompts, with all the replies to them.
        """
        processes = self.actor.processes
        numbers = {key: n for n, key in enumerate(dict.fromkeys(map(id, prompts)))}
        rows = [i for i, prompt in enumerate(prompts) if numbers[id(prompt)] % processes.count == processes.rank]
        parts = torch.zeros(len(self.rewards), len(prompts))
        # A reward may draw random numbers. The update must not miss them, or processes would shuffle in other ways.
        with together(processes), torch.random.fork_rng(devices=[]):
            if rows:
                parts[:, rows] = self.ask_rewards([prompts[i] for i in rows], [replies[i] for i in rows])
        parts = processes.sum(parts)
        scores = sum(weight * part.nan_to_num() for weight, part in zip(self.reward_weights, parts))
        if not scores.isfinite().all():
            raise RewardError("the weighted sum of the rewards overflows float32: make rewards or weights smaller")
        return scores, dict(zip(self.rewards, parts))

    def ask_rewards(self, prompts: list[Prompt], replies: list[list[int]]) -> Tensor:  # [rewards, B]
        """What each reward function says of these replies, as text."""
        completions = []
        for prompt, ids in zip(prompts, replies):
            text = reply_text(self.tokenizer, prompt, ids)
            is_text = isinstance(prompt.row["prompt"], str)
            completions.append(text if is_text else [{"role": "assistant", "content": text}])
        columns = {key: [prompt.row[key] for prompt in prompts] for key in prompts[0].row}
        columns |= {"prompts": columns.pop("prompt"), "completions": completions, "completion_ids": replies}
        return torch.stack(list(call_rewards(self.rewards, columns).values()))


def pick_prompts(
    cfg: Config,
    model: nn.Module,
    tokenizer,
    limit: float,
    prompts: list | None,
    eval_prompts: list | None,
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones, from the arguments or the files. limit: tokens that the models take."""
    with in_one_line("the prompts"):
        rows = [as_row(x) for x in prompts] if prompts else load_prompts(cfg.prompts)
        held_out = [as_row(x) for x in eval_prompts or []]
    if cfg.eval_prompts and not held_out:
        held_out = load_prompts(cfg.eval_prompts)
    if not held_out:
        rows = random.Random(cfg.seed).sample(rows, len(rows))
        share = min(64, len(rows) // 10)
        held_out, rows = rows[:share], rows[share:]
    encoded = encode(tokenizer, held_out + rows, model.get_input_embeddings().weight.shape[0])
    allowed = cfg.max_prompt_length or math.inf
    kept_out = [prompt for prompt in encoded[: len(held_out)] if len(prompt.ids) <= allowed]
    kept = [prompt for prompt in encoded[len(held_out) :] if len(prompt.ids) <= allowed]
    if not kept:
        shortest = f"the shortest has {min(len(prompt.ids) for prompt in encoded)} tokens"
        raise UsageError(f"--max-prompt-length {allowed} leaves no prompt to train on: {shortest}")
    dropped = len(encoded) - len(kept) - len(kept_out)
    if dropped:
        print(f"Dropped {dropped} of {len(encoded)} prompts, longer than --max-prompt-length {allowed}")
    longest = max(len(prompt.ids) for prompt in kept + kept_out)
    if longest + cfg.response_length > limit:
        raise UsageError(
            f"--response-length {cfg.response_length}: the models take {limit} tokens in all and prompts have up to "
            f"{longest}; shorten the replies, or drop long prompts by --max-prompt-length"
        )
    return kept, kept_out


def pick_stop_ids(cfg: Config, model: nn.Module, tokenizer) -> list[int]:
    """The tokens that end a reply: EOS of the tokenizer and of the generation config, and --stop-token."""
    eos = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    if cfg.stop_token is not None:
        ids = tokenizer.encode(cfg.stop_token, add_special_tokens=False)
        if len(ids) != 1:
            raise UsageError(f"--stop-token {cfg.stop_token!r}: expected one token of this tokenizer, got {len(ids)}")
        stop_ids.add(ids[0])
    return sorted(stop_ids)


def prepare(cfg: Config, prompts, reward, model, tokenizer, eval_prompts) -> Task:
    """All that training needs, checked: what is wrong is told before anything is written."""
    from transformers import GenerationConfig

    device, dtype = pick_device(cfg)
    seed_everything(cfg.seed)
    if model is None and cfg.model is None:
        if not isinstance(cfg, Demo):
            raise UsageError("a model is needed: give one; the demo is train(Demo())")
        if cfg.prompts or cfg.eval_prompts or cfg.reward or cfg.reward_model or prompts or reward:
            raise UsageError("prompts and rewards need a model: give --model too")
        model, tokenizer, prompts, eval_prompts, rewards = demo_task(cfg.seed)
    else:
        rewards = [reward] if callable(reward) else list(reward or load_rewards(cfg.reward))
        if not (prompts or cfg.prompts) or not (rewards or cfg.reward_model):
            raise UsageError(
                "a model needs prompts and a reward: give --prompts FILE and --reward FILE.py:FUNCTION, "
                "or --reward-model NAME"
            )
        if tokenizer is None and cfg.model is None:
            raise UsageError("a model needs its tokenizer: pass both")
        model = load("ModelForCausalLM", cfg.model, "model", cfg) if model is None else model
        tokenizer = load("Tokenizer", cfg.model, "model", cfg) if tokenizer is None else tokenizer
    if model.generation_config is None:  # then transformers could not save it
        model.generation_config = GenerationConfig.from_model_config(model.config)
    critic = load_critic(cfg, model, tokenizer) if cfg.critic_model else None
    limit = min(most_tokens(model), most_tokens(critic or model))
    train_prompts, held_out = pick_prompts(cfg, model, tokenizer, limit, prompts, eval_prompts)
    chat = any(not isinstance(prompt.row["prompt"], str) for prompt in train_prompts + held_out)
    rewards += [load_reward_model(name, chat, device, dtype, cfg) for name in cfg.reward_model]
    weights = (1.0,) * len(rewards) if cfg.reward_weights is None else cfg.reward_weights
    if len(weights) != len(rewards):
        raise UsageError(f"--reward-weights: expected {len(rewards)} of them, one a reward, got {len(weights)}")
    names = [getattr(f, "__name__", type(f).__name__) for f in rewards]
    if len(set(names)) < len(names):
        names = [f"{name}_{i}" for i, name in enumerate(names)]
    rewards = dict(zip(names, rewards))
    for name, function in rewards.items():
        if inspect.iscoroutinefunction(function):
            raise UsageError(f"the reward {name} is an async function: expected one that returns a list of numbers")
    stop_ids = pick_stop_ids(cfg, model, tokenizer)
    with in_one_line("the model cannot be saved, as it will have to be"), tempfile.TemporaryDirectory() as folder:
        for part in (model.config, model.generation_config, tokenizer):
            part.save_pretrained(folder)
    with in_one_line(f"cannot put the models on {device}"):
        actor, ref = make_actors(cfg, model, critic, device, dtype)
    return Task(actor, ref, tokenizer, train_prompts, held_out, rewards, tuple(weights), stop_ids)


# ----------------------------------------------------------------------------------------------------------------------
# 10. Several processes: torchrun and FSDP2. Where there is one, all of it does nothing.
#     Every process holds all that Part I knows of a rollout: each computes the rows of its share, the others are 0, and
#     the sum over the processes is the whole. So advantages, metrics and shuffling are the same computation on each.
# ----------------------------------------------------------------------------------------------------------------------


class Torchrun(Processes):
    """The processes that torchrun started."""

    def __init__(self):
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()

    def micro_batches(self, rollout: Rollout, index: Tensor, size: int, device) -> Iterator[tuple]:
        """As many micro-batches on each process, since FSDP2 gathers the weights of a layer from all at the same time.

        Every process knows the shares of all. One that has fewer makes up for it with batches of no valid token.
        """
        shares = [rollout.groups(index[rank :: self.count], size, device) for rank in range(self.count)]
        groups = [group for group in shares[self.rank] if len(group) > 0]
        for group in groups:
            yield group, rollout.select(group, device)
        for _ in range(max(map(len, shares)) - len(groups)):
            batch = rollout.select(index[:1], device)
            batch.mask, batch.valid = torch.zeros_like(batch.mask), batch.valid[:0]
            yield index[:0], batch

    def sum(self, x: Tensor) -> Tensor:
        if hasattr(x, "full_tensor"):  # the norm of gradients in shards
            return x.full_tensor()
        dist.all_reduce(x)
        return x

    @contextlib.contextmanager
    def whole(self, actor: Actor):
        """Processes decode different numbers of tokens, so here the layers must not wait for each other."""
        actor.set_reshard_after_forward(False)
        for module in sharded_modules(actor):
            module.unshard()
        yield
        for module in sharded_modules(actor):
            module.reshard()
        actor.set_reshard_after_forward(True)


def start_processes() -> Processes:
    """Those that torchrun started, this one among them, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        # A thread of gloo may still hold a tensor. Before Python 3.14, dropping it while Python ends aborts the process
        # (pytorch/pytorch#190489), and destroying the group does not wait for it. So all threads get a second to end.
        atexit.register(time.sleep, 1)
        atexit.register(dist.destroy_process_group)
    return Torchrun()


@contextlib.contextmanager
def first_alone_speaks():
    """What the other processes print is lost, but not the traceback of an error that nobody expected."""
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def gather(processes: Processes, x) -> list:
    """What x is on each process."""
    if processes.count == 1:
        return [x]
    everywhere = [None] * processes.count
    dist.all_gather_object(everywhere, x)
    return everywhere


@contextlib.contextmanager
def together(processes: Processes):
    """What fails inside on one process fails on all, so that none waits for ever for one that has left."""
    error = None
    try:
        yield
    except (UsageError, RunError, SystemExit) as e:
        error = e
    for e in gather(processes, error):
        if e is not None:
            raise e


def sharded_modules(actor: Actor) -> list:
    """The units of FSDP2: each layer, and last the actor, with what is in no layer, such as embedding and heads."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in actor.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [*reversed(layers), actor]  # a layer within a layer comes first


def shard(processes: Processes, actor: Actor, ref: Actor) -> None:
    """Leave each process a part of every weight of the first process."""
    if processes.count == 1:
        return
    from torch.distributed.fsdp import fully_shard

    # It warns of the views that `Actor.forward` returns, in case somebody writes into them. Nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    actor.processes = processes
    actor.lm.get_input_embeddings().sparse = False  # FSDP2 adds up dense gradients only
    mesh = dist.init_device_mesh(actor.device.type, (processes.count,))
    one = torch.ones(1, 1, dtype=torch.long)
    smallest = Rollout(one, one == 1, one, one == 1, one[0] == 1, one).select(torch.tensor([0]), actor.device)
    for model in (actor, ref):
        for x in model.state_dict().values():
            dist.broadcast(x, 0)
        for module in sharded_modules(model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            module.set_gradient_divide_factor(1.0)  # gradients are added up, like all else
            module.set_force_sum_reduction_for_comms(True)
        with torch.no_grad():
            model(smallest, 1.0)  # the whole before its layers, which `decode` calls: FSDP2 takes what is first as root


def from_shards(processes: Processes, tensors: dict) -> dict:
    """The whole of each tensor, in the memory of the first process; the others get nothing."""
    whole = {}
    for name, x in tensors.items():
        x = x.full_tensor() if hasattr(x, "full_tensor") else x
        if processes.rank == 0:
            whole[name] = x.cpu()
    return whole


def to_shards(saved: dict, actor: Actor, optimizer: torch.optim.Optimizer) -> dict:
    """A checkpoint, which holds whole tensors, with this process's part of those that are in shards here."""
    if actor.processes.count == 1:
        return saved
    from torch.distributed.tensor import DTensor, distribute_tensor

    def part(x: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor) or x.shape != like.shape:  # Adam's count of steps is no tensor of weights
            return x
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

    weights = actor.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {name: part(x, parameters[i]) for name, x in state.items()}
        for i, state in saved["optimizer"]["state"].items()
    }
    return saved | {
        "actor": {name: part(x, weights[name]) for name, x in saved["actor"].items()},
        "optimizer": saved["optimizer"] | {"state": moments},
    }


# ----------------------------------------------------------------------------------------------------------------------
# 11. The folder of a run: logs, checkpoints, resume
# ----------------------------------------------------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "samples.jsonl")
MAY_CHANGE = (  # on a resume
    "num_updates save_every micro_batch_size gradient_checkpointing device trust_remote_code resume".split()
)


def write_log(run: Path, board, metrics: dict[str, float], samples: list[dict]) -> None:
    """Append a row of metrics and the samples to the logs. The system has them before the next update begins."""
    for name, rows in zip(LOGS, ([metrics], samples)):
        with in_one_line(f"cannot write to {run / name}", RunError), open(run / name, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    if board is not None:
        for name, x in metrics.items():
            board.add_scalar(name, x, metrics["update"])
        board.flush()


def tensorboard(run: Path, update: int):
    """A writer of TensorBoard events where tensorboard is installed, else None. Events after `update` count no more."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run, purge_step=update and update + 1)


@contextlib.contextmanager
def all_or_nothing(folder: Path):
    """Yields a temporary folder that becomes `folder` once all of it is on the disk; otherwise nothing changes."""
    temporary = folder.with_name("unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with in_one_line(f"cannot write {folder}", RunError):
            temporary.mkdir(parents=True)
            yield temporary
            if hasattr(os, "sync"):
                os.sync()
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("[0-9]*"))


def how_to_resume(run: Path, from_python: bool) -> str:
    command = f"python ppo_llm.py --resume {run}"
    if from_python:
        command = f"train(dataclasses.replace(cfg, resume={str(run)!r}), ...) with the same other arguments"
    if not checkpoints(run):
        return f"there is no checkpoint yet (see --save-every): {command} begins anew"
    return f"to go on from {checkpoints(run)[-1]}: {command}"


def save_policy(task: Task, folder: Path, weights: dict) -> None:
    task.actor.lm.save_pretrained(folder, state_dict=weights)
    task.tokenizer.save_pretrained(folder)


def save_checkpoint(run: Path, task: Task, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write run/checkpoints/UPDATE whole or not at all, then drop all but the last two.

    All that a resume needs is in state.pt. The policy beside it is for use: it loads like the final one.
    """
    processes = task.actor.processes
    weights = from_shards(processes, task.actor.state_dict())
    adam = optimizer.state_dict()
    adam["state"] = {i: from_shards(processes, moments) for i, moments in adam["state"].items()}
    folder = run / "checkpoints" / f"{state.update:06d}"
    with together(processes):
        if processes.rank == 0 and not folder.exists():
            with all_or_nothing(folder) as temporary:
                policy = {name[3:]: x for name, x in weights.items() if name.startswith("lm.")}
                save_policy(task, temporary / "policy", policy)
                content = {
                    "state": vars(state),
                    "actor": weights,
                    "optimizer": adam,
                    "logs": {name: (run / name).stat().st_size for name in LOGS},
                }
                torch.save(content, temporary / "state.pt")
            for old in checkpoints(run)[:-2]:
                shutil.rmtree(old, ignore_errors=True)


def read_config(run: Path | str) -> tuple[Config, dict]:
    """The settings of a run, and the hashes of its model and prompts."""
    with in_one_line(f"--resume {run}: expected the folder of a run of this ppo_llm.py"):
        about = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        kind = Demo if about["config"]["model"] is None else Config
        return as_config(kind, about["config"]), dict(about["sha256"])


def fingerprint(task: Task) -> dict[str, str]:
    """What must be the same on a resume, besides the settings: another model must not become the reference unseen."""
    weights = [torch.hash_tensor(x.cpu()).item() for x in task.ref.lm.state_dict().values()]
    prompts = [prompt.ids for prompt in task.prompts + task.held_out]
    content = {"initial model": weights, "prompts": prompts}
    return {name: hashlib.sha256(str(x).encode()).hexdigest() for name, x in content.items()}


def begin(run: Path, cfg: Config, task: Task, hashes: dict[str, str]) -> State:
    """Make the folder, with all that is needed to run it again in config.json."""
    import transformers

    about = {
        "config": dataclasses.asdict(cfg),
        "command": sys.argv,
        "device": f"{task.actor.device}, {task.actor.dtype}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "sha256": hashes,
    }
    if task.actor.processes.rank == 0:
        with in_one_line(f"cannot create {run}, give another --runs-dir or --name"):
            run.mkdir(parents=True)
            (run / "config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return State(cfg.kl_coef)


def refuse_changes(run: Path, there: dict, here: dict) -> None:
    """UsageError that names each setting, or the model or prompts, in which a resumed run would differ from before."""
    changed = [
        f"{name} was {there.get(name)} and is {x}"
        for name, x in here.items()
        if x != there.get(name) and name not in MAY_CHANGE
    ]
    if changed:
        raise UsageError(f"--resume {run}: {'; '.join(changed)}; only {', '.join(MAY_CHANGE[:-1])} may change")


def resume(
    run: Path,
    cfg: Config,
    task: Task,
    hashes: dict[str, str],
    optimizer: torch.optim.Optimizer,
) -> State:
    """The state of the run's last checkpoint, with the logs cut back to it; the beginning if it has none."""
    before, hashes_before = read_config(run)
    refuse_changes(run, dataclasses.asdict(before), dataclasses.asdict(cfg))
    refuse_changes(run, hashes_before, hashes)
    if cfg.num_updates != before.num_updates and cfg.lr_scheduler_type != "constant":
        end = f"now ends with update {cfg.num_updates} instead of {before.num_updates}, so the rate jumps"
        print(f"The {cfg.lr_scheduler_type} decay of the learning rate {end}")
    state = State(cfg.kl_coef)
    sizes = dict.fromkeys(LOGS, 0)
    if checkpoints(run):
        last = checkpoints(run)[-1]
        with in_one_line(f"{last} is damaged or of another program; remove it to go on from what is before it"):
            saved = torch.load(last / "state.pt", map_location="cpu", weights_only=True)
            saved = to_shards(saved, task.actor, optimizer)
            task.actor.load_state_dict(saved["actor"])
            optimizer.load_state_dict(saved["optimizer"])
            state, sizes = State(**saved["state"]), saved["logs"]
    if (run / "policy").exists() and (state.update == 0 or state.update >= cfg.num_updates):
        needs = "to go on, it needs a larger --num-updates and a checkpoint (see --save-every)"
        raise UsageError(f"--resume {run}: the run is complete; {needs}")
    for name, size in sizes.items():
        with open(run / name, "ab") as f:  # each process may cut, to the same size
            if f.tell() < size:
                raise UsageError(f"{run / name} is shorter than at the last checkpoint: put it back, or begin anew")
            f.truncate(size)
    return state


# ----------------------------------------------------------------------------------------------------------------------
# 12. The terminal
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def finish_on_signal():
    """Yields a list. The first Ctrl-C or SIGTERM is appended to it, to end after this update; a second ends at once."""
    asked = []

    def ask(number: int, frame) -> None:
        if asked:
            raise KeyboardInterrupt(number)
        asked.append(number)
        name = signal.Signals(number).name
        print(f"\n{name}: finishing the update in hand; once more to stop at once", file=sys.stderr)

    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def progress(num_updates: int, done: int):
    """A bar on a terminal, a line every half minute in a log."""
    from tqdm import tqdm

    return tqdm(
        total=num_updates,
        initial=done,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    )


def sparkline(ys: list[float], width: int = 40) -> str:
    """The course of ys, a character each; where there are more than `width`, some are left out."""
    ys = ys[:: math.ceil(len(ys) / width)]
    low, high = min(ys), max(ys)
    scale = 7 / (high - low or 1)
    return "".join("▁▂▃▄▅▆▇█"[round(scale * (y - low))] for y in ys)


def report(run: Path, seconds: dict[str, float], device: torch.device) -> None:
    """What the terminal shows at the end, from the logs."""
    width = min(120, shutil.get_terminal_size().columns)
    metrics, samples = ([json.loads(row) for row in open(run / name, encoding="utf-8")] for name in LOGS)
    before, *history, after = metrics
    held_out = [row for row in samples if row["held_out"]]
    half = len(held_out) // 2
    if held_out:
        print("\nHeld-out prompts, same seed:")
    for old, new in zip(held_out[:half], held_out[half:]):
        text = old["prompt"] if isinstance(old["prompt"], str) else str(old["prompt"][-1]["content"])
        print(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  "))
        for label, row in (("before", old), ("after", new)):
            reply = f"    {label:8}{row['reply'].strip()}"
            print(textwrap.fill(reply, width, subsequent_indent=" " * 12))
    if held_out:
        print(f"\nHeld-out evaluation ({after['eval/replies']} replies)  {'before':>16}  {'after':>16}")
    for name in after:
        if f"{name}_se" in after and name in before:
            cells = [f"{row[name]:.2f} ± {row[name + '_se']:.2f}" for row in (before, after)]
            print(f"  {name.removeprefix('eval/'):32}  {cells[0]:>16}  {cells[1]:>16}")
    print("\nLearning curves")
    for label, name in (("score", "objective/scores"), ("KL, nats per reply", "objective/kl")):
        ys = [row[name] for row in history]
        print(f"  {label:20}{sparkline(ys)}  {ys[0]:.2f} → {ys[-1]:.2f}")
    phases = ", ".join(f"{name} {x:.1f}" for name, x in seconds.items())
    rollout = statistics.median(row["perf/rollout_tokens_per_second"] for row in history)
    update = statistics.median(row["perf/update_tokens_per_second"] for row in history)
    speed = f"Rollout {rollout:.0f} tokens/s, update {update:.0f} tokens/s"
    if device.type == "cuda":
        speed += f", peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
    print()
    for line in (f"Time {sum(seconds.values()):.1f} s: {phases}", speed):
        print(textwrap.fill(line, width, subsequent_indent="  "))
    print(f"\nLoad the policy   AutoModelForCausalLM.from_pretrained('{run}/policy')")
    if importlib.util.find_spec("tensorboard"):
        print(f"See the curves    tensorboard --logdir {run.parent}")


# ----------------------------------------------------------------------------------------------------------------------
# 13. Training
# ----------------------------------------------------------------------------------------------------------------------


def sample_row(task: Task, update: int, prompt: Prompt, ids: list[int], score: float, kl: float) -> dict:
    """A sample of `ppo` as a row of samples.jsonl: the prompt with its columns, then what happened to it."""
    about = {"update": update, "reply": reply_text(task.tokenizer, prompt, ids), "score": score, "kl": kl}
    return {**prompt.row, **about, "held_out": False}


def evaluate_held_out(task: Task, cfg: Config, update: int) -> tuple[dict[str, float], list[dict]]:
    """Replies to all held-out prompts, a batch at least, from the same seed each time: metrics and a few samples.

    Each metric is a mean over replies and, under its name with _se, the standard error of that mean.
    """
    metrics = {"update": update}
    if not task.held_out:
        return metrics, []
    seed_everything(cfg.seed)
    prompts = task.held_out * max(1, cfg.batch_size // len(task.held_out))
    rollout = sample_replies(task.actor, prompts, task.stop_ids, cfg)
    replies = rollout.replies()
    scores, parts = task.score(prompts, replies)
    fill_logprobs_and_values(task.actor, task.ref, rollout, cfg)
    kl = reply_kl(rollout)
    metrics["eval/replies"] = len(prompts)
    quantities = {"score": scores, "kl": kl} | {f"rewards/{name}": part for name, part in parts.items()}
    for name, x in quantities.items():
        x = x[~x.isnan()]
        if len(x) > 0:
            metrics[f"eval/{name}"] = float(x.mean())
            variance = x.var(correction=0) / max(1, len(x) - 1)
            metrics[f"eval/{name}_se"] = float(variance) ** 0.5
    samples = list(zip(prompts, replies, scores.tolist(), kl.tolist()))
    shown = samples[: min(4, len(task.held_out))]
    return metrics, [sample_row(task, update, *sample) | {"held_out": True} for sample in shown]


def add_speeds(metrics: dict[str, float], cfg: Config) -> None:
    """Add tokens per second to the metrics of an update."""
    replied = metrics["reply/length"] * cfg.batch_size  # tokens
    trained = replied + metrics["prompt/length"] * cfg.batch_size
    epochs = metrics["policy/steps"] / cfg.num_mini_batches
    seconds = sum(x for name, x in metrics.items() if name.startswith("time/"))
    metrics["perf/tokens_per_second"] = replied / seconds
    metrics["perf/rollout_tokens_per_second"] = replied / metrics["time/generate"]
    metrics["perf/update_tokens_per_second"] = epochs * trained / metrics["time/update"]


@first_alone_speaks()
def train(
    cfg: Config,
    prompts: list | None = None,
    reward: Reward | list[Reward] | None = None,
    model: nn.Module | None = None,
    tokenizer=None,
    eval_prompts: list | None = None,
) -> Path:
    """Run PPO and return the folder of the run. What is not passed comes from cfg. The demo is train(Demo()).

    prompts, eval_prompts: strings, or dicts with "prompt" and columns for the reward. reward: one or several functions
    f(prompts, completions, **columns) -> list of floats. model, tokenizer: of transformers; this model is trained.
    Raises UsageError, before anything is written, for what cannot be; RunError for what stops a run that has begun;
    KeyboardInterrupt, with the run saved, after the update in which Ctrl-C or SIGTERM came.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # one progress bar, ours
    logging.disable_progress_bar()
    processes = start_processes()
    now = gather(processes, time.strftime("%Y%m%d-%H%M%S"))[0]
    with together(processes):
        with in_one_line("the settings"):
            cfg = as_config(type(cfg), vars(cfg))
        if processes.count > max(1, cfg.batch_size // 2):
            expected = f"at least {2 * processes.count}, two replies for each process"
            raise UsageError(f"--batch-size {cfg.batch_size}: expected {expected}")
        if cfg.resume:
            read_config(cfg.resume)  # before models are loaded: is it a run at all?
        from_python = any(x is not None for x in (prompts, reward, model, tokenizer, eval_prompts))
        subject = "demo" if model is None else type(model).__name__
        if cfg.model is not None:
            subject = Path(cfg.model).name
        run = Path(cfg.resume or Path(cfg.runs_dir, cfg.name or f"{now}-{subject}"))
        if run.exists() and not cfg.resume:
            raise UsageError(f"{run} exists and is not overwritten: give another --name, or go on with --resume {run}")
        work = f"{cfg.num_updates} updates of {cfg.batch_size} replies of up to {cfg.response_length} tokens"
        print(f"PPO on {subject}: {work}, written to {run}", flush=True)
        started = time.perf_counter()
        task = prepare(cfg, prompts, reward, model, tokenizer, eval_prompts)
    hashes = gather(processes, fingerprint(task))[0]
    shard(processes, task.actor, task.ref)
    critic = [p for name, p in task.actor.named_parameters() if not name.startswith("lm.")]
    groups = [{"params": task.actor.lm.parameters()}, {"params": critic}]
    fused = task.actor.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=fused)
    with together(processes):
        state = resume(run, cfg, task, hashes, optimizer) if cfg.resume else begin(run, cfg, task, hashes)
    board = tensorboard(run, state.update) if processes.rank == 0 else None

    def log(metrics: dict[str, float], samples: list[dict]) -> None:
        with together(processes):
            if processes.rank == 0:
                write_log(run, board, metrics, samples)

    seconds = defaultdict(float, setup=time.perf_counter() - started)
    try:
        with finish_on_signal() as asked, progress(cfg.num_updates, state.update) as bar:
            if state.update == 0:
                bar.set_postfix_str("held-out prompts, before")
                log(*evaluate_held_out(task, cfg, 0))
            updates = ppo(task.actor, task.ref, optimizer, task.prompts, task.score, task.stop_ids, cfg, state)
            for metrics, samples in updates:
                add_speeds(metrics, cfg)
                log(metrics, [sample_row(task, state.update, *sample) for sample in samples])
                for name in ("generate", "reward", "evaluate", "update"):
                    seconds[name] += metrics[f"time/{name}"]
                score, kl = metrics["objective/scores"], metrics["objective/kl"]
                speed = metrics["perf/tokens_per_second"]
                bar.set_postfix_str(f"score {score:.2f}, KL {kl:.1f}, {speed:.0f} tokens/s", refresh=False)
                bar.update()
                if state.skipped >= 3:
                    steps = f"{state.skipped} optimizer steps in a row, up to update {state.update}"
                    raise RunError(f"loss or gradient were not finite in {steps}, with a mean score of {score:.3g}")
                # The end of a run with checkpoints is one too: a resume must not go back to what was before it.
                at_end = state.update == cfg.num_updates and (cfg.save_every or checkpoints(run))
                save = at_end or (cfg.save_every and state.update % cfg.save_every == 0)
                # Here all processes learn whether one of them was asked to stop, and what the first sees in the folder.
                stops, saves = zip(*gather(processes, (tuple(asked), bool(save))))
                stop = sum(stops, ())
                if stop or saves[0]:
                    save_checkpoint(run, task, optimizer, state)
                if stop:
                    bar.close()
                    name = signal.Signals(stop[0]).name
                    print(f"Stopped by {name} after update {state.update}; {how_to_resume(run, from_python)}")
                    raise KeyboardInterrupt(*stop)
            log(*evaluate_held_out(task, cfg, state.update))
            weights = from_shards(processes, task.actor.lm.state_dict())
            with together(processes):
                if processes.rank == 0:
                    with all_or_nothing(run / "policy") as folder:
                        save_policy(task, folder, weights)
    except (RunError, FloatingPointError, torch.OutOfMemoryError) as e:
        if isinstance(e, RewardError) and state.update > 0:
            save_checkpoint(run, task, optimizer, state)
        reason = str(e)
        if isinstance(e, torch.OutOfMemoryError):
            if processes.count > 1:
                raise  # on this process alone, whatever is printed on the others
            reason = "out of memory: give a smaller --micro-batch-size, or --gradient-checkpointing"
        raise RunError(f"{reason}; {how_to_resume(run, from_python)}") from e
    seconds["the rest"] = time.perf_counter() - started - sum(seconds.values())
    if processes.rank == 0:
        report(run, seconds, task.actor.device)
    return run


# ----------------------------------------------------------------------------------------------------------------------
# 14. The demo: delete it, and a trainer is left
# ----------------------------------------------------------------------------------------------------------------------

GOOD = "superb moving charming funny clever".split()
BAD = "dull clumsy boring weak bland".split()
NOUNS = "plot acting music script cast ending dialogue".split()
VERBS = "was felt seemed".split()
ADVERBS = "rather very".split()
LINKS = "and but".split()
CLAUSE = f"the ({'|'.join(NOUNS)}) ({'|'.join(VERBS)})( ({'|'.join(ADVERBS)}))? ({'|'.join(GOOD + BAD)})"
REVIEW = re.compile(f"{CLAUSE}( ({'|'.join(LINKS)}) {CLAUSE})* \\.")


@dataclass(frozen=True)
class Demo(Config):
    """The settings of the demo, where they are not those of any run, and why."""
    num_updates: int = 20  # under a minute
    response_length: int = 24  # most reviews end before
    missing_eos_penalty: float | None = 3.0  # else a review without an end would earn more
    kl_coef: float = 0.3  # holds the policy to the grammar
    learning_rate: float = 1e-3  # a model this small needs large steps
    lr_scheduler_type: str = "linear"  # small steps at the end keep it fluent
    reward_weights: tuple[float, ...] | None = (1.0, 0.0)  # sentiment is rewarded, fluency only measured


def sentiment(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """Positive words less negative words in each reply."""
    return [float(sum((word in GOOD) - (word in BAD) for word in text.split())) for text in completions]


def fluency(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """1 if the grammar parses the whole review. Measured with weight 0, never rewarded: it shows reward hacking."""
    return [float(bool(REVIEW.fullmatch(prompt + text))) for prompt, text in zip(prompts, completions)]


def demo_task(seed: int, steps: int = 160):
    """A small Llama, trained on film reviews from the grammar: model, tokenizer, prompts, held-out prompts, rewards."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "the", ".", *NOUNS, *VERBS, *ADVERBS, *LINKS, *GOOD, *BAD]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    lm = LlamaForCausalLM(config)
    rng = random.Random(seed)

    def clause() -> str:
        adverb = [rng.choice(ADVERBS)] if rng.random() < 0.5 else []
        return " ".join(["the", rng.choice(NOUNS), rng.choice(VERBS), *adverb, rng.choice(GOOD + BAD)])

    def review() -> str:
        text = clause()
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            text += f" {rng.choice(LINKS)} {clause()}"
        return f"{text} . </s>"

    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95))
    for step in tqdm(range(steps), desc="language model", dynamic_ncols=True, leave=False, disable=None):
        optimizer.param_groups[0]["lr"] = 1.5e-2 * min(1, (step + 1) / 10) * (1 - step / steps)
        texts = [" <s> ".join(review() for _ in range(5)) for _ in range(32)]  # at least 7 tokens each
        ids = tokenizer(texts, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        lm(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    openings = [f"the {noun}" for noun in NOUNS]
    openings += [f"{opening} {verb}" for opening in openings for verb in VERBS]
    openings += [f"{opening} {adverb}" for opening in openings[len(NOUNS) :] for adverb in ADVERBS]
    random.Random(0).shuffle(openings)
    return lm, tokenizer, openings[16:], openings[:16], [sentiment, fluency]


# ----------------------------------------------------------------------------------------------------------------------
# 15. The command line
# ----------------------------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> Config:
    """The command line as a Config. Defaults are those of the resumed run, or the demo's if there is no model."""
    import tyro

    cfg = tyro.cli(Config, args=argv)
    if cfg.resume is not None:
        before, _ = read_config(cfg.resume)
        # Code of somebody else's model is run if this command says so, not if the folder does.
        return tyro.cli(type(before), args=argv, default=dataclasses.replace(before, trust_remote_code=False))
    if cfg.model is None:
        cfg = tyro.cli(Demo, args=argv)
        flags = " ".join(f"--{name.replace('_', '-')} {getattr(cfg, name)}" for name in Demo.__annotations__)
        flags = re.sub("[(),]", "", flags)  # tuples as the command line takes them
        text = f"The demo, with settings of its own where --help shows other defaults: {flags}"
        print(textwrap.fill(text, shutil.get_terminal_size().columns, subsequent_indent="  ", break_on_hyphens=False))
    return cfg


@first_alone_speaks()
def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 bad usage, 130 interrupted, 143 terminated."""
    with contextlib.suppress(AttributeError):  # a notebook's output cannot
        sys.stdout.reconfigure(errors="replace")  # an encoding without arrows must not end a run
    try:
        with together(start_processes()):
            cfg = parse(sys.argv[1:] if argv is None else argv)
        train(cfg)
    except UsageError as e:
        print(f"ppo_llm.py: {e}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"ppo_llm.py: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        return 128 + (e.args or (signal.SIGINT,))[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
