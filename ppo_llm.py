# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11,<2.14", "transformers>=5.19,<5.24", "tyro>=1.0,<2"]
# ///
"""PPO for language models, in one file to be read in a sitting.

    python ppo_llm.py                                 # embedded demo: no download, no GPU, about a minute
    python ppo_llm.py --model gpt2 --prompts prompts.jsonl --reward rewards.py:ten_words     # on a GPU if there is one
    torchrun --nproc-per-node 8 ppo_llm.py --model ...                                   # on several

Part I, down to where Part II begins, is PPO, complete, and is to be copied whole. It needs torch and transformers,
and knows nothing of files, flags or the terminal. Part II is the program around it.

Start reading at `ppo`, near the end of Part I: it is the loop, and one update of it has six steps:

  1. Generate: the policy π, the model that is trained, writes a reply to each of B prompts (`sample_replies`). A
     `Rollout` holds the replies and all that is computed for them.
  2. Score: a function of yours gives each reply a number, or one for each of its tokens.
  3. Log-probabilities and values: the policy gives log π of each token of the replies. The critic, by default a second
     head of the policy, gives V, the value of the state before each token (a state is prompt and reply so far): it
     predicts what the reply earns from there on. One forward pass gives both; a critic that is a model of its own takes
     another. A frozen copy of the first policy, the reference, gives log π_ref (`fill_logprobs_and_values`).
  4. Advantages: the reward of a token is its score less β·KL_t, the price of leaving the reference. By default KL_t is
     the token's log π - log π_ref, in nats; its sum over a reply estimates the KL. A return, which V predicts, is the
     sum of the rewards from a token on, so a score at the end reaches every token. An advantage is how much better the
     reply went on than predicted: by default (λ = 1) the return less V. Then all get mean 0 and variance 1
     (`compute_advantages`).
  5. Update: several epochs of minibatches on the policy loss, PPO's clipped surrogate, and the value loss
     (`ppo_update`). In its formulas the policy that wrote the replies is the old one, that of now the new one.
  6. Metrics: what happened, as means over replies or over the tokens that were trained on (`rollout_metrics`).

Three choices of this file that the papers below do not have:

- The critic's output is in a unit of its own, the largest standard deviation that returns have had so far, and step 4
  moves its bias so that its mean error is 0 (`Actor.fit_returns`). So vf_coef, cliprange_value and learning rates need
  no change whether scores are of size 0.01 or 100, or all near 1000. (kl_coef must follow: its unit is score per nat.)
- Step 5 ends early when KL(old ‖ new), between the policy that wrote the replies and that of now, passes `target_kl`.
  OpenAI's Spinning Up has such a stop too.
- All random numbers of an update come from (seed, update), and the order of the prompts from (seed, number of the pass
  over them), so that a resumed run needs no state of any generator.

Left out on purpose: top-k and top-p. They change the probabilities by which tokens are sampled, so π would be wrong.

Shapes: B replies, P prompt tokens (padded on the left), T reply tokens (padded on the right), vocab tokens that the
model knows; b are the replies of a micro-batch, which in training has its own P and T, as long as its longest. What
each token has is aligned to the reply, [B, T].

Papers: PPO, Schulman et al. 2017 (arXiv 1707.06347); GAE, Schulman et al. 2015 (1506.02438); RLHF with a KL penalty,
Ziegler et al. 2019 (1909.08593); KL estimators, Schulman 2020 (joschu.net/blog/kl-approx.html).
"""
from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Callable, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# The mathematics: pure functions of tensors. Each works alone too: copy it and those that it calls.
#
# A mask is True on the tokens that the policy wrote. It may have holes: parts of a reply that something else wrote,
# such as the output of a tool. Cells outside the mask may hold anything, even NaN, and change nothing (but for scores:
# see `token_rewards`): torch.where drops what they hold, where a multiplication by 0 would keep NaN.
# ----------------------------------------------------------------------------------------------------------------------


def response_mask(responses: Tensor, stop_ids: list[int]):  # [B, T] -> [B, T] bool
    """True on the reply: every token up to and including the first stop token, or all T if there is none.

    Never derived from `token != pad`: the pad token may equal EOS, and content may equal pad.
    """
    stop = torch.isin(responses, responses.new_tensor(stop_ids)).long()
    stops_before = stop.cumsum(1) - stop
    return stops_before == 0


def masked_mean(
    x: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
):  # []
    """Mean over the cells of the mask, 0 if there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def masked_whiten(
    x: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
):  # [B, T]
    """Shift and scale the cells of the mask to mean 0 and variance 1, the population's. The others become 0.

    Cells that are all equal, but for the rounding of float32, become 0 too. Computed in float64: in float32 the mean of
    equal numbers differs from them by rounding, which the division would blow up.
    """
    wide = x.double()
    centered = torch.where(mask, wide - masked_mean(wide, mask), 0.0)
    std = masked_mean(centered**2, mask).sqrt()
    are_equal = std <= 1e-6 * masked_mean(wide.abs(), mask)
    return torch.where(are_equal, 0.0, centered / std).to(x.dtype)


def logprobs_from_logits(
    logits: Tensor,  # [..., vocab]
    tokens: Tensor,  # [...]
):  # [...]
    """log π(token) in nats."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor):  # [..., vocab] -> [...]
    """Entropy of the next token, in nats: 0 when it is certain, log of n when n tokens are equally likely."""
    logprobs = logits.log_softmax(-1)
    # Where a logit is -inf, p·log p must be 0, not NaN. Below -1000 p is 0 in any type, so nothing else changes.
    return -(logprobs.exp() * logprobs.clamp(min=-1000)).sum(-1)


def kl_estimate(
    logprobs: Tensor,  # [B, T]
    ref_logprobs: Tensor,  # [B, T]
    kind: str = "k1",
):  # [B, T]
    """Estimate KL(policy ‖ reference) per token, in nats, from tokens that the policy sampled (Schulman 2020).

    With d = log π - log π_ref at the sampled token: k1 = d, unbiased, may be negative; k2 = d²/2, biased but never
    negative; k3 = e^-d - 1 + d, unbiased and never negative. In the reward keep k1: the gradient of a mean of k is the
    mean of k·∇log π + ∇k. A reward gives only the first term (see `policy_loss`), and ∇k has a mean of 0 only for k1.
    KeyError for any other kind.
    """
    d = logprobs - ref_logprobs
    return {"k1": d, "k2": d**2 / 2, "k3": torch.expm1(-d) + d}[kind]


def adaptive_kl_coef(kl_coef, kl, target, horizon, episodes):
    """The next β of the proportional controller of Ziegler et al. 2019, section 2.2: up when KL is above its target.

    kl and target are in nats per reply. The relative error is clipped to ±0.2: while KL is that far off,
    `horizon` episodes (replies) change β by about a fifth. One call changes it by a fifth at most.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(1, episodes / horizon))


def token_rewards(
    scores: Tensor,  # [B] or [B, T]
    kl: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    kl_coef: float,
):  # [B, T]
    """Reward of each token: its score less β·KL_t (Ziegler et al. 2019, eq. 2).

    A number for the whole reply belongs to its last token. A number at a token that the policy did not write, such as
    the output of a tool, goes back to the last token that it did write, which earned it; if there is none, it is lost.
    """
    T = mask.shape[1]
    if scores.ndim == 1:
        scores = F.pad(scores.unsqueeze(1), (T - 1, 0))  # in the last column, and moved as below
    # [B, T], for each column the column, counted from 1, of the last written token up to it, 0 if there is none: the
    # mask 0 1 1 0 0 1 gives 0 2 3 3 3 6. Scores that nobody earned are added up in column 0, which is cut off.
    earner = torch.where(mask, torch.arange(1, T + 1, device=mask.device), 0).cummax(1).values
    rewards = scores.new_zeros(len(scores), T + 1).scatter_add(1, earner, scores)[:, 1:]
    if kl_coef:  # else the KL need not even be known
        rewards -= torch.where(mask, kl_coef * kl, 0.0)
    return rewards


def gae(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    gamma: float = 1.0,
    lam: float = 1.0,
):  # [B, T], [B, T]
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16; PPO eq. 11-12), backwards in time:

        δ_t = r_t + γ·V_{t+1} - V_t          A_t = δ_t + γλ·A_{t+1}          return_t = A_t + V_t

    values[:, t] is V of the state before token t: of the prompt and the reply so far. After the last token V is 0, even
    if the reply was cut off at length T. With λ = 1 a return is the sum of the rewards from its token on, discounted
    by γ. With λ < 1 the values of the next tokens take the place of a part of the later rewards: there is less noise,
    but the critic's errors enter. A hole takes no time: after the token before it comes the one behind it. Outside the
    mask both results are 0.
    """
    next_advantage = next_value = 0.0
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    returns = advantages + values
    return torch.where(mask, advantages, 0.0), torch.where(mask, returns, 0.0)


def policy_loss(
    new_logprobs: Tensor,  # [B, T], with gradient
    logprobs: Tensor,  # [B, T], log π_old
    advantages: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
):  # [], stats
    """The clipped surrogate, PPO eq. 7, negated: -mean min(ρA, clip(ρ, 1-ε, 1+ε)A) with ρ = π_new / π_old.

    A is the advantage: a token that went better than predicted, A > 0, is made likelier, one that went worse less
    likely. At ρ = 1 the gradient of ρA is A·∇log π. Its mean over samples points along the gradient of the expected
    return: it is the policy gradient. That A has V subtracted does not change this mean, as ∇log π has mean 0 in each
    state, only its noise. One batch is used for several steps, after the first of which the policy is no longer the one
    that sampled it: ρ corrects for that at its own token, not for the tokens before and after, and with the clip
    nothing is gained by moving ρ further than ε from 1. A token whose ρ has left [1-ε, 1+ε] in the direction that A
    asks for has no gradient any more; one that has left it in the other direction keeps its gradient.

    cliprange_high: upper ε (clip-higher, DAPO, arXiv 2503.14476); None: the same as the lower.
    stats: over the mask, the k3 estimate of KL(old ‖ new), the share of tokens where the clip binds, and the mean of ρ.
    """
    upper = cliprange if cliprange_high is None else cliprange_high
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + upper) * advantages
    stats = {
        "policy/approxkl": masked_mean(kl_estimate(logprobs, new_logprobs, "k3"), mask),
        "policy/clipfrac": masked_mean((clipped < unclipped).to(ratio.dtype), mask),
        "policy/ratio": masked_mean(ratio, mask),
    }
    return -masked_mean(torch.minimum(unclipped, clipped), mask), stats


def value_loss(
    new_values: Tensor,  # [B, T], with gradient
    values: Tensor,  # [B, T], V_old
    returns: Tensor,  # [B, T], R
    mask: Tensor,  # [B, T]
    cliprange_value: float | None = None,
):  # [], stats
    """½ mean max((V - R)², (clip(V, V_old ± ε) - R)²) with ε = cliprange_value: at least ½ MSE. If ε is None: ½ MSE.

    All come in the critic's unit (`Actor.unit`), so that ε means the same for scores of any size. The clip is not in
    the PPO paper, but in openai/baselines (ppo2).
    stats: the share of tokens where the clip binds.
    """
    error = larger_error = torch.where(mask, new_values - returns, 0.0) ** 2
    if cliprange_value is not None:
        clipped = new_values.clamp(values - cliprange_value, values + cliprange_value)
        larger_error = torch.maximum(error, torch.where(mask, clipped - returns, 0.0) ** 2)
    stats = {"val/clipfrac": masked_mean((larger_error > error).to(error.dtype), mask)}
    return 0.5 * masked_mean(larger_error, mask), stats


# ----------------------------------------------------------------------------------------------------------------------
# The settings of the algorithm
# ----------------------------------------------------------------------------------------------------------------------

# Types of settings, each with its allowed values in words and a test for them. Only Part II runs the tests.
Count = Annotated[int, "1 or more", lambda x: x >= 1]
Whole = Annotated[int, "0 or more", lambda x: x >= 0]
Positive = Annotated[float, "a number above 0", lambda x: 0 < x < math.inf]
NotNegative = Annotated[float, "a number of 0 or more", lambda x: 0 <= x < math.inf]
Share = Annotated[float, "a number in [0, 1]", lambda x: 0 <= x <= 1]


@dataclass(frozen=True)
class PPOConfig:
    """The algorithm. Names are those of TRL's PPOConfig where the thing is the same."""
    # Rollout.
    num_updates: Count = 100  # updates in all; an update is a batch of replies and the PPO epochs on it
    batch_size: Count = 128  # replies per update, B
    samples_per_prompt: Count = 1  # replies to each prompt of an update
    response_length: Count = 64  # longest reply, in tokens, T
    temperature: Positive = 1.0  # of the policy, in sampling and in every log-probability
    seed: int = 1  # of everything: on the same CPU the same seed gives the same run

    # KL penalty (Ziegler et al. 2019).
    kl_coef: NotNegative = 0.05  # β, weight of the KL to the first policy, score units per nat
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # k1 = d, k2 = d²/2, k3 = e^-d - 1 + d, d = log π - log π_ref
    kl_target: Positive | None = None  # KL to the first policy, nats per reply, for an adaptive β; None: β is fixed
    kl_horizon: Positive = 10000.0  # replies in which an adaptive β moves by a fifth, while KL is far off

    # Advantages.
    gamma: Share = 1.0  # γ, discount per token
    lam: Share = 1.0  # λ of GAE: 0 trusts the critic, 1 the rewards that came
    whiten_advantages: bool = True  # advantages with mean 0, variance 1 over the batch; else in the critic's unit

    # Update.
    num_ppo_epochs: Count = 4  # passes over each batch
    num_mini_batches: Count = 4  # optimizer steps per pass
    micro_batch_size: Count = 16  # replies at a time, b (8b in sampling); logits: up to 6 float32 copies of b·T·vocab
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"  # of each learning rate, after the warm-up
    warmup_updates: Whole = 0  # first updates of the run, in which learning rates rise linearly
    max_grad_norm: Positive = 1.0  # gradient clipping
    cliprange: Positive = 0.2  # ε of the ratio
    cliprange_high: Positive | None = None  # upper ε (clip-higher, DAPO); None: the same ε
    cliprange_value: Positive | None = None  # ε of the value clip, in units of the critic; None: off
    vf_coef: NotNegative = 0.3  # c1, weight of the value loss
    ent_coef: NotNegative = 0.0  # c2, weight of the entropy bonus, which keeps replies varied; 0: not computed
    target_kl: Positive | None = 1.0  # not kl_target: KL(old ‖ new), nats per token, that ends an update; None: off
    critic_warmup_updates: Whole = 0  # first updates, of the critic alone: its head, and its own model if any


# ----------------------------------------------------------------------------------------------------------------------
# The data, and the actor with its value head
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    ids: list[int]  # its tokens
    row: dict = None  # what else the scoring function needs to know of it


@dataclass
class Rollout:
    """The replies of one update and all that is computed for them, on the CPU. What is None is filled in step by step.

    Queries and responses are prompts and replies, by TRL's names. Rewards, values and returns are in units of the
    score, advantages in the critic's unit (`Actor.unit`) or, by default, whitened. The state before a token is the
    prompt and the reply up to it, without it.
    """
    queries: Tensor  # [B, P] int, prompt tokens, padded on the left
    query_mask: Tensor  # [B, P] bool, False on that padding
    responses: Tensor  # [B, T] int, reply tokens, padded on the right with any token
    present: Tensor  # [B, T] bool, False on that padding, True on all else, also on what a tool wrote
    mask: Tensor  # [B, T] bool, True on the tokens that are trained on: those present that the policy wrote
    sampler_logprobs: Tensor  # [B, T] log π as the sampler saw it, finite on the mask, for metrics and a loss of yours
    logprobs: Tensor = None  # [B, T] log π_old of each token, by the forward pass of training, frozen
    entropy: Tensor = None  # [B, T] of π_old before each token, for the metrics
    values: Tensor = None  # [B, T] V_old of the state before each token; `compute_advantages` moves all by one number
    ref_logprobs: Tensor = None  # [B, T] log π_ref of each token, NaN if there is no reference
    rewards: Tensor = None  # [B, T] score less β·KL
    sampled_returns: Tensor = None  # [B, T] the discounted sum of the rewards from each token on
    advantages: Tensor = None  # [B, T]
    returns: Tensor = None  # [B, T] what the critic is trained to predict, A + V: at λ = 1 the sampled returns

    def check(self, n):
        """ValueError if this is not a rollout of n replies as described above: `select` could cut off tokens."""
        # cumprod is 1 up to the first 0. A prompt is padded on the left, so its mask is read backwards.
        has_holes = any((mask > mask.cumprod(1)).any() for mask in (self.present, self.query_mask.flip(1)))
        is_empty = not self.query_mask[:, -1].all()
        if len(self.mask) != n or has_holes or is_empty or (self.mask > self.present).any():
            raise ValueError(
                "sample: expected a row for each prompt, `queries` not empty and padded on the left, `present` without "
                "holes, `mask` within it"
            )

    def replies(self):
        """The tokens of each reply, without padding."""
        return [response[:n].tolist() for response, n in zip(self.responses, self.present.sum(1))]

    def select(self, index: Tensor, device="cpu"):
        """The replies `index` on the device, trimmed to the longest prompt and the longest reply among them."""
        P, T = (int(mask[index].sum(1).max()) for mask in (self.query_mask, self.present))
        fields = {}
        for name, x in vars(self).items():
            if x is not None:
                x = x[index, -P:] if name in ("queries", "query_mask") else x[index, :T]
                fields[name] = x.to(device)
        return Rollout(**fields)


# Every process holds the whole rollout and computes some rows of it, with 0 in the others: their sum is the whole. With
# one process world() is (0, 1), and all_sum changes nothing. With several, the group must take tensors of CPU and GPU
# ("cpu:gloo,cuda:nccl"). Part I does not add up the gradients of the processes: what spreads the model over them must
# do so, and not average them. Each process decodes until its own replies have ended, so there the policy's forward
# pass must not wait for the others. Part II uses FSDP2, told to add up, with reshard_after_forward=False.


def world():
    """This process's number and how many there are: torchrun's, where a process group has been started."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(x):
    """x, added up over the processes in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def micro_batches(rollout: Rollout, index: Tensor, size: int, device):  # index [n]
    """Yields this process's share of the replies `index`, cut into micro-batches: (their indices, the micro-batch).

    Sorted by length, so that little is computed for padding.
    """
    rank, count = world()
    lengths = rollout.query_mask.sum(1) + rollout.present.sum(1)
    by_length = index[lengths[index].argsort(stable=True)]
    for rows in by_length[rank::count].split(size):
        yield rows, rollout.select(rows, device)


class Head(nn.Linear):
    """The model's own head with products in float32 (TF32, if torch is told so): in bfloat16 a logit near 100 is a
    multiple of 0.5, and that error would be in every log ratio."""

    def forward(self, states):
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.to(dtype), *(x.to(dtype) for x in self.parameters()))  # weight, and bias if any


class Actor(nn.Module):
    """A causal language model of transformers as the policy, and with it a critic: a linear head on hidden states. The
    reference is an Actor too; its values are not used.

    lm: the model, which is trained in place, and whose output head becomes a `Head`; adapters of peft may sit on its
    layers, not on the head.
    dtype: of matrix products (autocast). Exceptions: the two heads, float32 or wider; experts (MoE) whose products
    transformers does in one grouped call, of the weights' type. At float32, the default, no autocast: all but the heads
    are of the weights' type. Not float16, whose gradients would need a scale. Weights that are trained must be float32
    or wider, or ValueError.
    critic: the model whose hidden states the value head reads; None: the policy's, at half the work. It must be causal,
    else a value would know the tokens that follow, and must have the policy's token ids.
    """

    def __init__(self, lm: nn.Module, dtype: torch.dtype = torch.float32, critic: nn.Module | None = None):
        super().__init__()
        self.dtype = dtype
        # No dropout, else the first ratio of new to old is not 1. In eval mode transformers' own gradient checkpointing
        # is off: Part II wraps the layers itself.
        self.lm = lm.eval()
        self.critic = None if critic is None else critic.base_model.eval()
        for name, weight in self.named_parameters():
            if weight.requires_grad and weight.dtype.itemsize < 4:
                raise ValueError(
                    f"{name} is {weight.dtype}: expected float32, for AdamW's small steps; call .float(), or "
                    ".requires_grad_(False) where it is not trained"
                )
        head = lm.get_output_embeddings()
        head.__class__ = Head  # the same weights: what is tied stays tied
        width = head.in_features if critic is None else critic.get_input_embeddings().embedding_dim
        self.real = torch.promote_types(lm.dtype, torch.float32)  # type of values and log-probabilities
        self.value_head = nn.Linear(width, 1, device=lm.device, dtype=self.real)
        for weight in self.value_head.parameters():
            nn.init.zeros_(weight)  # V starts at 0 in all states, not at random
        self.register_buffer("spread", self.value_head.bias.new_zeros(()))  # the largest std of returns so far

    @property
    def unit(self):  # []
        """What the value head's outputs are multiplied by: the largest spread of returns so far, or 1 before that."""
        return self.spread.where(self.spread > 0, 1.0)

    @torch.no_grad()
    def fit_returns(self, spread: float, shift: float):
        """`spread` is the standard deviation of the sampled returns, 0 where they are equal. If it is the largest so
        far, it becomes the critic's unit, and the head is rescaled so that no V changes. Then `shift`, the mean of
        return - V, is added to every V.

        After PopArt, arXiv 1809.04474. Errors of the critic then have mean 0, and at first a size of about 1, whatever
        the scores are. So vf_coef and the value clip mean the same for all, and a constant in all scores does not
        disturb the weights that critic and policy share. The unit never shrinks: a policy that has learned gives almost
        equal returns, and small differences of them must not become huge errors. So one outlier makes it too large for
        the rest of the run: clip scores that may have outliers.
        """
        before = float(self.unit)
        self.spread.clamp_(min=spread)
        after = float(self.unit)
        self.value_head.weight *= before / after
        self.value_head.bias *= before / after
        self.value_head.bias += shift / after

    def autocast(self):
        return torch.autocast(self.lm.device.type, self.dtype, self.dtype != torch.float32)

    def run(self, model, ids, attention, **options):
        """The model's own output. ids [b, L], those after what is cached; attention [b, cached + L], False on padding.
        """
        attention = attention.long()
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # padding on the left shifts no position
        with self.autocast():
            return model(input_ids=ids, attention_mask=attention, position_ids=positions, **options)

    def forward(self, batch: Rollout, temperature: float, with_entropy: bool = True):  # [b, T], [b, T], [b, T]
        """(logprobs, entropy, values) of the reply tokens, with gradient: see `Rollout`.

        Old and new ones both come from here, so the first ratio is 1 up to rounding. with_entropy=False gives an
        entropy of 0: where the vocabulary is large and the model small, it would cost as much as all the rest.
        """
        T = batch.responses.shape[1]
        ids = torch.cat([batch.queries, batch.responses], 1)
        # Attention is causal, so no token sees the padding to its right: only that on the left must be masked.
        attention = F.pad(batch.query_mask, (0, T), value=True)
        # The output at a token predicts the next one, and that at the last token is not used. This is the only shift.
        before = slice(-T - 1, -1)
        output = self.run(self.lm, ids, attention, logits_to_keep=T + 1, output_hidden_states=True, use_cache=False)
        logits, states = output.logits[:, before] / temperature, output.hidden_states[-1]
        if self.critic is not None:
            states = self.run(self.critic, ids, attention, use_cache=False).last_hidden_state
        values = self.unit * self.value_head(states[:, before].to(self.real)).squeeze(-1)
        logprobs = logprobs_from_logits(logits, batch.responses)
        entropy = entropy_from_logits(logits) if with_entropy else torch.zeros_like(logprobs)
        return logprobs, entropy, values


# ----------------------------------------------------------------------------------------------------------------------
# The rollout: replies, log-probabilities and values, advantages
# ----------------------------------------------------------------------------------------------------------------------


def left_pad(sequences):  # -> [B, P], [B, P]
    """Lists of token ids, padded on the left, and their mask. Any token may pad: the mask marks the padding."""
    P = max(map(len, sequences))
    padded = torch.tensor([[-1] * (P - len(ids)) + ids for ids in sequences])
    mask = padded >= 0  # -1 is the id of no token
    return padded.where(mask, 0), mask


def sample_replies(actor: Actor, prompts: list[Prompt], stop_ids: list[int], cfg: PPOConfig) -> Rollout:
    """A rollout with a reply to each prompt, sampled without top-k or top-p. Fields that have a default stay None.
    T is cfg.response_length; Part II's scores need that width of any other `sample` too.

    One random number per token is drawn for all replies beforehand: so, up to rounding, a reply depends neither on its
    neighbours nor on the device. Eight micro-batches are decoded together, as no activations are kept.
    """
    queries, query_mask = left_pad([prompt.ids for prompt in prompts])
    responses = queries.new_zeros(len(prompts), cfg.response_length)
    logprobs = torch.zeros_like(responses, dtype=actor.real)
    uniform = torch.rand_like(responses, dtype=torch.float64)
    rank, count = world()
    for rows in torch.arange(len(prompts))[rank::count].split(8 * cfg.micro_batch_size):
        tokens, logps = decode(actor, queries[rows], query_mask[rows], uniform[rows], stop_ids, cfg.temperature)
        T = tokens.shape[1]
        responses[rows, :T], logprobs[rows, :T] = tokens.cpu(), logps.cpu()
    all_sum(responses)
    all_sum(logprobs)
    present = response_mask(responses, stop_ids)
    return Rollout(queries, query_mask, responses, present, present.clone(), logprobs)  # mask: all that is present


@torch.no_grad()  # not inference_mode, in which autocast casts the weights again for every token
def decode(
    actor: Actor,
    queries: Tensor,  # [b, P]
    query_mask: Tensor,  # [b, P]
    uniform: Tensor,  # [b, T], in [0, 1)
    stop_ids: list[int],
    temperature: float,
):  # [b, T or fewer], [b, T or fewer]
    """Tokens and their log π, one by one with the KV cache, until all have stopped or T are there.

    Inverse transform sampling: a token is the first whose cumulative probability exceeds its random number. What
    follows a stop is noise.
    """
    device = actor.lm.device
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    ids, attention, uniform = queries.to(device), query_mask.to(device), uniform.to(device, wide)
    stop = ids.new_tensor(stop_ids)
    tokens, logprobs, cache = [], [], None
    with actor.autocast():  # around the whole loop: the copies that it casts weights to are kept until it ends
        for t, draw in enumerate(uniform.split(1, 1)):  # draw [b, 1]
            output = actor.run(actor.lm, ids, attention, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = output.logits[:, -1] / temperature  # [b, vocab]
            cumulative = logits.softmax(-1, dtype=wide).cumsum(-1)
            # The last token has all that remains: rounding may leave the sum of all below 1.
            ids = (cumulative[:, :-1] <= draw).sum(1, keepdim=True)  # [b, 1]
            tokens.append(ids)
            logprobs.append(logprobs_from_logits(logits.unsqueeze(1), ids))
            if t % 4 == 3 and torch.isin(torch.cat(tokens, 1), stop).any(1).all():  # seldom: it makes a GPU wait
                break
            attention, cache = F.pad(attention, (0, 1), value=True), output.past_key_values
    return torch.cat(tokens, 1), torch.cat(logprobs, 1)


@torch.no_grad()
def fill_logprobs_and_values(actor: Actor, ref: Actor | None, rollout: Rollout, cfg: PPOConfig):
    """Fill in the outputs of policy, critic and reference for every trained token, by the forward that training uses.

    FloatingPointError if one of them, or of the sampler's, is NaN or infinite.
    """
    B, T = rollout.mask.shape
    filled = torch.zeros(4, B, T, dtype=actor.real)
    for rows, batch in micro_batches(rollout, torch.arange(B), cfg.micro_batch_size, actor.lm.device):
        outputs = [*actor(batch, cfg.temperature)]
        outputs.append(math.nan * outputs[0] if ref is None else ref(batch, cfg.temperature, with_entropy=False)[0])
        filled[:, rows, : batch.mask.shape[1]] = torch.stack(outputs).cpu()
    filled = torch.where(rollout.mask, all_sum(filled), 0.0)
    known = [*filled[: 3 if ref is None else 4], rollout.sampler_logprobs]  # the fourth is the reference's
    if not all(x[rollout.mask].isfinite().all() for x in known):
        raise FloatingPointError("probabilities or values are NaN or infinite; in training, lower the learning rate")
    rollout.logprobs, rollout.entropy, rollout.values, rollout.ref_logprobs = filled


def compute_advantages(
    actor: Actor,
    rollout: Rollout,
    scores: Tensor,  # [B] or [B, T]
    kl_coef: float,
    cfg: PPOConfig,
):
    """Fill in rewards and the sampled returns, fit the critic's unit and bias to these, fill in advantages and returns.
    """
    mask = rollout.mask
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, cfg.kl_estimator)
    rollout.rewards = token_rewards(scores, kl, mask, kl_coef)
    # With λ = 1, gae's default, and V = 0 an advantage is the discounted sum of the rewards from its token on.
    rollout.sampled_returns, _ = gae(rollout.rewards, torch.zeros_like(kl), mask, cfg.gamma)
    rounding = 16 * torch.finfo(kl.dtype).eps * rollout.sampled_returns.abs().max()  # smaller differences are noise
    spread = rollout.sampled_returns[mask].std(correction=0)  # NaN where there is no trained token
    shift = masked_mean(rollout.sampled_returns - rollout.values, mask)
    actor.fit_returns(float(spread) if spread >= rounding else 0.0, float(shift))
    rollout.values += shift  # as `fit_returns` has just done to what the actor says
    advantages, rollout.returns = gae(rollout.rewards, rollout.values, mask, cfg.gamma, cfg.lam)
    advantages[advantages.abs() < rounding] = 0  # noise around 0, which `masked_whiten` would blow up
    rollout.advantages = masked_whiten(advantages, mask) if cfg.whiten_advantages else advantages / float(actor.unit)


# ----------------------------------------------------------------------------------------------------------------------
# The update
# ----------------------------------------------------------------------------------------------------------------------


def ppo_loss(actor: Actor, batch: Rollout, cfg: PPOConfig):  # [], stats
    """PPO eq. 9, negated: policy loss + c1 value loss - c2 entropy, means over the trained tokens of a micro-batch."""
    mask, unit = batch.mask, actor.unit
    new_logprobs, entropy, new_values = actor(batch, cfg.temperature, with_entropy=cfg.ent_coef > 0)
    pg_loss, pg_stats = policy_loss(
        new_logprobs, batch.logprobs, batch.advantages, mask, cfg.cliprange, cfg.cliprange_high
    )
    vf_loss, vf_stats = value_loss(
        new_values / unit, batch.values / unit, batch.returns / unit, mask, cfg.cliprange_value
    )
    loss = pg_loss + cfg.vf_coef * vf_loss - cfg.ent_coef * masked_mean(entropy, mask)
    return loss, {"loss/policy": pg_loss, "loss/value": vf_loss} | pg_stats | vf_stats


def ppo_update(
    actor: Actor,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    cfg: PPOConfig,
    critic_only: bool = False,
    loss: Callable = ppo_loss,
):
    """PPO, algorithm 1: several epochs of shuffled minibatches, an optimizer step each. Returns means over the steps.

    Each trained token of a step has the same weight, however the step is cut into micro-batches. Statistics are of the
    policy before the step. A step before which KL(old ‖ new) is above target_kl is not taken and ends the update; it
    counts in the means. FloatingPointError for a step with a statistic or a gradient norm that is NaN or infinite,
    which is not taken either. critic_only: the policy's model gets no gradient.
    """
    minibatches = [
        indices
        for _ in range(cfg.num_ppo_epochs)
        for indices in torch.randperm(len(rollout.mask)).chunk(cfg.num_mini_batches)
    ]
    steps, taken = [], 0
    for minibatch in minibatches:
        optimizer.zero_grad()
        actor.zero_grad()  # also of parameters that the optimizer lacks, whose gradients count in the norm
        tokens = max(1, int(rollout.mask[minibatch].sum()))
        sums = 0.0
        for rows, batch in micro_batches(rollout, minibatch, cfg.micro_batch_size, actor.lm.device):
            share = int(rollout.mask[rows].sum()) / tokens
            mean, stats = loss(actor, batch, cfg)
            (share * mean).backward()  # summed over micro-batches and processes: the gradient of the mean of the step
            sums += share * torch.stack([*stats.values()]).detach()
        step = dict(zip(stats, all_sum(sums).tolist()))  # every micro-batch has the same names
        if critic_only:  # the policy does not move: the optimizer skips parameters without a gradient
            actor.lm.zero_grad()
        norm = nn.utils.clip_grad_norm_(actor.parameters(), cfg.max_grad_norm)
        step["grad_norm"] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # FSDP2: DTensor
        if not math.isfinite(sum(step.values())):
            raise FloatingPointError("loss or gradient of a step is NaN or infinite; lower the learning rate")
        steps.append(step)
        if cfg.target_kl is not None and step["policy/approxkl"] > cfg.target_kl:
            break
        optimizer.step()
        taken += 1
    actor.zero_grad()  # gradients would take memory while the next replies are sampled
    return {name: fmean(step[name] for step in steps) for name in steps[0]} | {"policy/steps": taken}


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a run is, besides weights and optimizer. No random generator is in it: each update seeds them anew."""
    kl_coef: float  # β, which an adaptive controller moves
    update: int = 0  # finished updates; so also the place in the learning-rate schedule and in the prompts


def ppo(
    actor: Actor,
    ref: Actor | None,
    optimizer: torch.optim.Optimizer,
    prompts: list[Prompt],
    score: Callable,
    stop_ids: list[int],
    cfg: PPOConfig,
    progress: Progress,
    sample: Callable = sample_replies,
    loss: Callable = ppo_loss,
):
    """Train the actor in place until cfg.num_updates updates are done. Yields the metrics of each update and the first
    four replies, each as (prompt, token ids, sum of its scores, KL in nats or NaN without a reference). A generator: it
    trains while it is iterated.

    ref: the first policy, frozen, with weights of its own: Actor(copy.deepcopy(lm)).requires_grad_(False). None is
    allowed where kl_coef is 0: it saves memory, and the metrics have no KL.
    optimizer: of `actor.parameters()`, which include the value head, in any groups. In each update every group gets its
    own initial rate times the schedule.
    score(prompts, replies) -> (scores, metrics): gets the `Prompt` and token ids of each reply; scores are finite
    floats in a tensor on the CPU, [B], or [B, T] with a number for the t-th token of a reply in column t, T the width
    of the rollout, by default cfg.response_length; metrics are floats by name, to be logged. With several processes
    `score` must give the same in all.
    stop_ids: the tokens that end a reply.
    progress: where to begin, Progress(cfg.kl_coef) at first. It is complete at each yield: a checkpoint can be written.
    progress.update counts finished updates, so it is 0 during the first: functions of yours may read it, for a
    coefficient that changes. progress.kl_coef is the β of now.
    sample(actor, prompts, stop_ids, cfg) -> Rollout: a function in place of `sample_replies`, such as an environment or
    a serving engine. It gives the whole rollout, in each process the same: a row for each prompt in their order, and
    all fields that have no default.
    loss(actor, batch, cfg) -> (loss, stats): a function in place of `ppo_loss`. It is called for each micro-batch and
    gives a mean over `batch.mask`; stats are such means too, as tensors of no dimension, in each call the same names in
    the same order, among them "policy/approxkl".

    Raises ValueError for settings that do not fit together, and for a missing reference, wrong scores or wrong masks;
    FloatingPointError for a policy that diverges. Ranges of settings are checked in Part II.
    """
    check(cfg)
    if ref is None and progress.kl_coef:
        raise ValueError("ref is None: expected a reference, or a kl_coef of 0")
    for update in range(progress.update + 1, cfg.num_updates + 1):
        seed_everything(cfg.seed, update)
        actor.eval()  # whatever was done with it between two updates
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(update, cfg)
        clock = [time.perf_counter()]

        # 1. Generate a reply to each prompt.
        drawn = draw_prompts(prompts, update, cfg)
        rollout = sample(actor, drawn, stop_ids, cfg)
        rollout.check(len(drawn))
        clock.append(time.perf_counter())

        # 2. Score the replies.
        replies = rollout.replies()
        scores, own_metrics = score(drawn, replies)
        B, T = rollout.mask.shape
        if scores.shape not in ((B,), (B, T)) or not scores.isfinite().all():
            raise ValueError(f"score: expected finite numbers of shape [{B}] or [{B}, {T}], got {scores}")
        if scores.ndim == 2:
            scores = scores.where(rollout.present, 0)  # nothing is paid on padding
        scores = scores.detach().to(actor.real)
        clock.append(time.perf_counter())

        # 3. Log-probabilities and values of every trained token.
        fill_logprobs_and_values(actor, ref, rollout, cfg)

        # 4. Advantages.
        compute_advantages(actor, rollout, scores, progress.kl_coef, cfg)
        clock.append(time.perf_counter())

        # 5. Update policy and critic.
        seed_everything(cfg.seed, update, "minibatches")  # the same ones whatever `sample` and `score` have drawn
        critic_only = update <= cfg.critic_warmup_updates
        stats = ppo_update(actor, optimizer, rollout, cfg, critic_only, loss)
        clock.append(time.perf_counter())

        # 6. Metrics, and the progress that was made.
        reply_scores = scores.view(B, -1).sum(1)  # [B]
        metrics = {
            **own_metrics,  # first, so that none of yours replaces another
            "update": update,
            "lr": optimizer.param_groups[0]["lr"],
            "kl_coef": progress.kl_coef,
            **stats,
            **rollout_metrics(rollout, reply_scores),
        }
        # "reward" is step 2, "evaluate" steps 3 and 4.
        for phase, start, end in zip(("generate", "reward", "evaluate", "update"), clock, clock[1:]):
            metrics[f"time/{phase}"] = end - start
        progress.update = update
        if cfg.kl_target is not None and not critic_only:  # while the critic warms up, the policy does not move
            progress.kl_coef = adaptive_kl_coef(
                progress.kl_coef, metrics["objective/kl"], cfg.kl_target, cfg.kl_horizon, cfg.batch_size
            )
        yield metrics, list(zip(drawn, replies, reply_scores.tolist(), reply_kl(rollout).tolist()))[:4]


def check(cfg: PPOConfig):
    """ValueError for settings that do not fit together. Each of several processes gets as many replies of a minibatch
    as any other and, where Part II scores, whole prompts."""
    if cfg.kl_target and not cfg.kl_coef:
        raise ValueError("kl_target: expected with it a kl_coef above 0")
    parts = world()[1] * math.lcm(cfg.num_mini_batches, cfg.samples_per_prompt)
    if cfg.batch_size % parts:
        raise ValueError(
            f"batch_size {cfg.batch_size}: expected a multiple of {parts} (processes, minibatches, samples per prompt)"
        )


def seed_everything(*parts):
    """Seed Python, NumPy and torch from the parts, such as (seed, update)."""
    from transformers import set_seed

    set_seed(random.Random(str(parts)).getrandbits(32))


def schedule(update, cfg: PPOConfig):
    """Share of the learning rate in update `update`, counted from 1: linear warm-up, then the decay over the rest."""
    done = max(0, update - 1 - cfg.warmup_updates) / max(1, cfg.num_updates - cfg.warmup_updates)
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return min(1.0, update / (cfg.warmup_updates + 1)) * decay[cfg.lr_scheduler_type]


def draw_prompts(prompts, update, cfg: PPOConfig):
    """The prompts of an update, each samples_per_prompt times, from endless passes over them, each in a new order."""
    count = cfg.batch_size // cfg.samples_per_prompt
    nth_pass, first = divmod((update - 1) * count, len(prompts))
    stream = []
    while len(stream) < first + count:
        stream += random.Random(f"{cfg.seed} {nth_pass}").sample(prompts, len(prompts))
        nth_pass += 1
    return [prompt for prompt in stream[first : first + count] for _ in range(cfg.samples_per_prompt)]


def reply_kl(rollout: Rollout):  # -> [B]
    """Σ_t KL_t of each reply, in nats, by k1. For few replies it may be negative, its expectation is not."""
    return torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).sum(1)


def rollout_metrics(rollout: Rollout, scores: Tensor):  # scores [B]
    """What the replies of an update were like: means over replies, or over trained tokens for what a token has.

    What is not known is left out: the KL if there is no reference, the explained variance of the sampled returns (1: V
    is right, 0: no better than a constant) if these are all equal. With λ < 1 `returns` would not do: they hold V.
    """
    mask = rollout.mask
    sampled = rollout.sampled_returns[mask].double()  # [N] trained tokens; in float32 equal numbers may have a variance
    residual = sampled - rollout.values[mask]
    metrics = {
        "objective/scores": scores.mean(),
        "objective/kl": reply_kl(rollout).mean(),
        "objective/rlhf_reward": rollout.rewards.sum(1).mean(),
        "reply/length": rollout.present.sum(1).float().mean(),
        "policy/entropy": rollout.entropy[mask].mean(),
        "policy/sampler_gap": (rollout.logprobs - rollout.sampler_logprobs)[mask].abs().mean(),
        "val/explained_variance": 1 - residual.var(correction=0) / sampled.var(correction=0),
    }
    return {name: float(x) for name, x in metrics.items() if x.isfinite()}


# ------------------------------------------------- Part I ends here ---------------------------------------------------
# Part II: the program around it. Prompts, rewards, models, the run's folder, the terminal, the demo, the command line.
# An error is an ordinary exception, with notes that say what it is about; `main` alone makes one line of it.
# ----------------------------------------------------------------------------------------------------------------------

import asyncio
import atexit
import bisect
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import traceback
import typing
import warnings
from pathlib import Path

from torch.distributed.checkpoint import state_dict as dcp
from typeguard import check_type, typechecked


@contextlib.contextmanager
def about(what):
    """Adds to an error inside what it is about: a flag, a file, a reward."""
    try:
        yield
    except Exception as e:
        e.add_note(what)
        raise


@contextlib.contextmanager
def foreign(what):
    """Around a user's code. What that does to the gradient mode and default type of torch, or to the working directory,
    ends with it. Random numbers are seeded anew before they are needed. Its sys.exit() is an error.
    """
    dtype = torch.get_default_dtype()
    try:
        with about(what), torch.enable_grad(), contextlib.chdir("."):
            yield
    except SystemExit as e:
        raise ValueError(f"{what}: it called sys.exit()") from e
    finally:
        torch.set_default_dtype(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The settings of a run
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskConfig:
    """What is trained, on which prompts, and for which rewards."""
    model: str | None = None  # hub name or folder of a causal language model; None: the embedded demo
    prompts: str | None = None  # .txt, a prompt a line, or .jsonl, rows with "prompt" and columns; None: the demo's
    reward: tuple[str, ...] = ()  # FILE.py:FUNCTION, f(prompts, completions, **columns): a number, list or None a reply
    reward_model: tuple[str, ...] = ()  # name or folder of a sequence classifier for prompt and reply
    reward_label: str | None = None  # the label that scores, of reward models with several; None: they have one
    reward_weights: tuple[float, ...] = ()  # of each --reward, then --reward-model; 0 measures only; none: all 1
    missing_eos_penalty: NotNegative = 0.0  # subtracted from the score of a reply that no stop token ends
    eval_prompts: str | None = None  # file of held-out prompts; None: of 20 or more one in ten, at most 64
    stop_token: tuple[str, ...] = ()  # text of a token that ends a reply beside EOS; in most tokenizers "." is not " ."


@dataclass(frozen=True)
class RunConfig:
    """Optimizer and critic; where and how it runs."""
    learning_rate: Positive = 1e-5  # of AdamW, at its highest
    critic_lr: Positive | None = None  # that of the value head, and of a separate critic; None: the policy's
    critic: Literal["shared", "separate"] = "shared"  # a head on the policy's hidden states; separate: on a copy's
    output_dir: str | None = None  # new folder of the run; None: runs/TIME-PROCESS
    save_every: Count | None = None  # updates between checkpoints; None: at the end, on Ctrl-C, on errors but NaN
    eval_every: Count | None = None  # updates between held-out evaluations with samples; None: only first and last
    resume: str | Path | None = None  # folder of a run to go on with, under its own settings; None: a new run
    device: str = "auto"  # cpu, cuda, cuda:1, mps, ...; auto: the accelerator that torch reports, else the CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA that has it
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, one forward more


@dataclass(frozen=True)
class Config(TaskConfig, PPOConfig, RunConfig):
    """All settings. Each is checked against its annotation: its type, and what it expects besides."""

    def __post_init__(self):
        for name, hint in typing.get_type_hints(Config, include_extras=True).items():
            x = getattr(self, name)
            with about(f"--{name.replace('_', '-')} {x!r}"):
                check_type(x, hint)
                for kind in (hint, *typing.get_args(hint)):  # Annotated[...], or one of those in a union
                    expected, holds = getattr(kind, "__metadata__", ("a text that is not empty", lambda x: x != ""))
                    if x is not None and not holds(x):
                        raise ValueError(f"expected {expected}")
        if self.reward_label and not self.reward_model:
            raise ValueError("--reward-label: expected with it a --reward-model")


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and rewards
# ----------------------------------------------------------------------------------------------------------------------


def load_prompts(path):
    """Rows with `prompt` and any other columns from .jsonl, or a prompt a line from .txt. No path gives no rows."""
    if path is None:
        return []
    with about(f"the prompts {path}: expected .txt, a prompt a line, or .jsonl, a row with a prompt a line"):
        text = Path(path).read_text(encoding="utf-8-sig")
        read = {".txt": str, ".jsonl": json.loads}[Path(path).suffix]
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            with about(f"line {number}"):
                if line.strip():
                    rows.append(read(line))
        if not rows:
            raise ValueError("there is no prompt in it")
        return rows


def encode(tokenizer, rows, vocabulary, room):
    """Tokenize prompts: texts, or chat messages, by the tokenizer's template. Those that are too long are dropped.

    The columns `tools` and `chat_template_kwargs` of a chat go to the template, as in TRL.
    """
    prompts = []
    for row in rows:
        row = row if isinstance(row, dict) else {"prompt": row}
        with about(f"the prompt {row!r:.300}: expected a text, or chat messages, under prompt"):
            text = row["prompt"]
            if isinstance(text, str):
                bare = tokenizer.encode(text, add_special_tokens=False)
                # A text that has its BOS already gets no second one.
                ids = bare if bare[:1] == [tokenizer.bos_token_id] else tokenizer.encode(text)
                is_over = bare and bare[-1] != ids[-1]  # as with [SEP] of BERT's tokenizers
            else:
                ids = tokenizer.apply_chat_template(
                    text,
                    tools=row.get("tools"),
                    return_dict=False,
                    add_generation_prompt=True,
                    **(row.get("chat_template_kwargs") or {})
                )
                is_over = text[-1]["role"] == "assistant"
            if is_over or not ids or max(ids) >= vocabulary:
                raise ValueError(
                    "it has no token, or one that the model does not know, or it is over: the tokenizer ends it, or "
                    f"the assistant spoke last: {ids}"
                )
        if len(ids) <= room:
            prompts.append(Prompt(ids, row))
    if rows and not prompts:
        raise ValueError(f"all {len(rows)} prompts have more than the {room} tokens that --response-length leaves them")
    if len(prompts) < len(rows):
        print(f"Dropped {len(rows) - len(prompts)} of {len(rows)} prompts, of more than {room} tokens")
    return prompts


def reply_text(tokenizer, prompt: Prompt, ids):
    """The reply such that prompt + reply is the whole text. Decoded alone, it may lack the space at its start."""
    if isinstance(prompt.row["prompt"], str):
        start, text = tokenizer.batch_decode([prompt.ids, prompt.ids + ids], skip_special_tokens=True)
        if text.startswith(start):
            return text[len(start) :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def load_reward(spec):
    """The function that `path/to/file.py:function` names. Each call runs the file anew."""
    path, _, name = spec.rpartition(":")
    sys.path.insert(0, os.path.dirname(path))  # what stands beside the file can be imported by it
    with foreign(f"--reward {spec}: expected FILE.py:FUNCTION"):
        file = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(file)
        sys.modules.setdefault(file.name, module)  # pickle looks there; but no other module of this name is pushed out
        file.loader.exec_module(module)
        return getattr(module, name)


def load_reward_model(name, device, cfg: Config):
    """A sequence classifier as a reward function: the logit of its label, or of --reward-label if it has several.

    It reads prompt and reply together, by its own tokenizer and chat template; of texts too long for it, the end. A
    text at a time: how padding must be masked differs between classifiers. It is not shown whether a reply has ended,
    as its EOS may be another: --missing-eos-penalty is for that.
    """
    model = load("ModelForSequenceClassification", name).to(device)
    tokenizer = load("Tokenizer", name)
    tokenizer.truncation_side = "left"
    labels = {label: i for i, label in model.config.id2label.items()}  # not in the order of i in every config.json
    with about(f"--reward-label: expected one of {', '.join(labels)}, the labels of {name}"):
        column = labels[cfg.reward_label] if len(labels) > 1 else 0

    def score(prompts, completions, **columns):
        scores = []
        for prompt, completion in zip(prompts, completions):
            text = prompt + completion
            is_chat = not isinstance(prompt, str)
            if is_chat:  # the template writes all special tokens
                text = tokenizer.apply_chat_template(text, tokenize=False)
            inputs = tokenizer(
                text,
                add_special_tokens=not (is_chat or text.startswith(tokenizer.bos_token or "\0")),  # no second BOS
                truncation=True,
                max_length=min(most_tokens(model), tokenizer.model_max_length),
                return_tensors="pt"
            )
            with torch.no_grad():
                scores.append(float(model(**inputs.to(device)).logits[0, column]))
        return scores

    score.__name__ = Path(name).name
    return score


EVENT_LOOP = asyncio.Runner()  # one for all calls: a reward's semaphores and connections belong to it


def ask(reward: Callable, columns: dict):
    """What a reward function says of each token of each reply: a list of tensors. A number for the whole reply stands
    at its last token; NaN stands there for None, that the reward does not apply.
    """
    answers = reward(**copy.deepcopy(columns))
    if inspect.isawaitable(answers):
        answers = EVENT_LOOP.run(answers)
    asked = columns["prompts"], columns["completions"], columns["completion_ids"]
    with about(f"expected a list, an answer to each of {len(columns['prompts'])} replies, got {answers!r:.300}"):
        rows = [*zip(answers[:], *asked, strict=True)]  # neither a dict nor a set
    scores = []
    for answer, prompt, completion, ids in rows:
        with about(f"to the prompt {prompt!r:.300} with the reply {completion!r:.300}, it gives {answer!r:.300}"):
            x = torch.as_tensor(math.nan if answer is None else answer, dtype=torch.float32).detach()
            if x.ndim == 0:
                x = F.pad(x.view(1), (len(ids) - 1, 0))
            if x.shape != (len(ids),) or not (answer is None or x.isfinite().all()):
                raise ValueError(f"expected a finite number, {len(ids)} of them, or None")
            scores.append(x)
    return scores


def token_scores(
    tokenizer,
    text: str,  # of the reply
    ids: list,  # its tokens
    scored: dict,  # the number of each span, by where in the text the span ends
):
    """For a reward function: a number for each token of a reply, from numbers for spans of its text. The token that
    completes a span gets its number; what ends one behind the text belongs to the last token.

    A number must be settled by then: what a later token decides must be paid there, or that token is not credited.
    ValueError for a text that is not of these tokens, and for an end outside it.
    """
    def written(t):  # characters of the text up to token t; half a character is not written yet
        return len(tokenizer.decode(ids[: t + 1], skip_special_tokens=True).rstrip("\ufffd"))

    whole = tokenizer.decode(ids, skip_special_tokens=True)
    if not text.endswith(whole) or not all(0 < end <= len(text) + 1 for end in scored):
        raise ValueError(f"expected a text that ends with {whole!r}, and ends of spans in it: {text!r}, {scored}")
    lead = len(text) - len(whole)  # a space at the start, which tokens decoded alone lack
    scores = [0.0] * len(ids)
    for end, score in scored.items():
        scores[bisect.bisect_left(range(len(ids) - 1), end - lead, key=written)] += score
    return scores


@dataclass
class Task:
    """What is trained, on which prompts, for which rewards, and how far it is."""
    cfg: Config
    run: Path  # its folder
    actor: Actor
    ref: Actor
    optimizer: torch.optim.Optimizer
    progress: Progress
    tokenizer: object
    prompts: list
    held_out: list  # prompts too
    rewards: list  # each with its weight
    stop_ids: list
    columns: set  # of all rows, "prompt" too; a reward is told None where a row lacks one
    lock: object = contextlib.nullcontext()  # of the folder, until the run ends

    def judge(self, prompts, replies):  # -> [B, T], metrics
        """The score of each token, and by name what is said of each reply, [B]: by each reward function, the sum over
        its tokens, and whether it has ended.

        Scores are the weighted sum of the rewards, less the penalty at the last token of a reply that does not end.
        Each process asks for its share of the replies: in training, that is whole prompts with all the replies to them.
        """
        B = len(prompts)
        ended = torch.tensor([float(reply[-1] in self.stop_ids) for reply in replies])
        scores = torch.zeros(B, self.cfg.response_length)
        scores[range(B), [len(reply) - 1 for reply in replies]] = self.cfg.missing_eos_penalty * (ended - 1)
        said = {"reply/ended": ended}
        rank, count = world()
        share = slice(rank * B // count, (rank + 1) * B // count)
        prompts = prompts[share]
        replies = replies[share]
        columns = {key: [prompt.row.get(key) for prompt in prompts] for key in self.columns}
        asked = columns.pop("prompt")
        texts = [reply_text(self.tokenizer, *pair) for pair in zip(prompts, replies)]
        with about("the columns of the prompts, none of which may have the name of what a reward gets besides"):
            columns = dict(
                prompts=asked,
                completions=[
                    text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                    for prompt, text in zip(asked, texts)
                ],
                completion_ids=replies,
                raw_completions=self.tokenizer.batch_decode(replies),  # with special tokens
                **columns
            )
        heard = torch.zeros(B)
        for reward, weight in self.rewards:
            part = torch.zeros_like(scores)
            name = f"rewards/{getattr(reward, '__name__', type(reward).__name__)}"
            with foreign(f"{name}, f(prompts, completions, **columns) -> for each reply a number or a list"):
                for i, x in enumerate(ask(reward, columns), share.start):
                    part[i, : len(x)] = x
            scores += weight * all_sum(part).nan_to_num()
            part = part.sum(1)
            heard += bool(weight) * part.isfinite()
            said[f"{name}_{len(said)}" if name in said else name] = part
        if not heard.all() or not scores.isfinite().all():
            raise ValueError("expected for each reply a reward that is not None, and finite --reward-weights")
        return scores, said

    def score(self, prompts, replies):  # -> [B, T], metrics
        """What `ppo` asks for: scores, and the mean of all that is said."""
        scores, said = self.judge(prompts, replies)
        return scores, {name: float(x.nanmean()) for name, x in said.items() if x.isfinite().any()}


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def load(auto_class, name):
    """Auto{auto_class} of transformers from a folder or the hub. Missing weights are refused."""
    import transformers

    with about(f"{name} as {auto_class}"):
        auto = getattr(transformers, f"Auto{auto_class}")
        if auto_class == "Tokenizer":
            return auto.from_pretrained(name)
        # Not in the type of the file: in bfloat16 scores of a reward model near 20 are 0.125 apart, and Gemma rounds a
        # factor of its embeddings, which the policy that is saved in float32 does not.
        model, info = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if hasattr(model, "peft_config"):  # of their folder, `info` does not say what is missing
            raise ValueError("it holds adapters: merge them first")
        if info["missing_keys"]:
            raise ValueError(f"it holds no {min(info['missing_keys'])}")
        return model


def most_tokens(model):
    """Tokens that the model has positions for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def pick_device(cfg: Config):
    """Where to compute, and the type of matrix products."""
    with about(f"--device {cfg.device}"):
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        device = torch.device(best if cfg.device == "auto" else cfg.device)
        torch.empty(0, device=device)
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = ("bfloat16" if is_fast else "float32") if cfg.dtype == "auto" else cfg.dtype
    # The float32 products of the two heads by TF32: error 5e-4, 7 times as fast. So are those of experts, where
    # transformers groups them and autocast does not reach them, and those of a reward model on the same GPU. There are
    # no others: transformers made rotary angles by one up to 5.18.
    torch.set_float32_matmul_precision("high" if is_fast and dtype == "bfloat16" else "highest")
    return device, getattr(torch, dtype)


def layers_of(model):
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def make_actors(cfg: Config, model: nn.Module, device, dtype):
    """The policy with its critic, and the frozen reference."""
    from torch.utils.checkpoint import checkpoint

    model.to(device).float()
    ref = Actor(copy.deepcopy(model), dtype).requires_grad_(False)
    actor = Actor(model, dtype, copy.deepcopy(model) if cfg.critic == "separate" else None)
    if cfg.gradient_checkpointing:
        if not layers_of(actor):
            raise ValueError(f"--gradient-checkpointing: {type(model).__name__} has no layers for it; leave it out")
        for layer in layers_of(actor):
            forward = type(layer).forward  # not layer.forward, which may be wrapped already
            layer.forward = functools.partial(checkpoint, forward, layer, use_reentrant=False, preserve_rng_state=False)
    return actor, ref


def make_optimizer(cfg: Config, actor: Actor):
    """AdamW with two groups: the policy, and what only the critic uses."""
    own = [p for name, p in actor.named_parameters() if not name.startswith("lm.")]
    # From initial_lr `ppo` makes the rate of each update, so lr need not be given.
    return torch.optim.AdamW(
        [
            {"params": actor.lm.parameters(), "initial_lr": cfg.learning_rate},
            {"params": own, "initial_lr": cfg.critic_lr or cfg.learning_rate}
        ],
        # As in openai/baselines. Gradients of this size halve a step, as those of 8 B weights, once clipped to norm 1.
        eps=1e-5,
        weight_decay=0.0,
        fused=True
    )


# ----------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun and FSDP2
# ----------------------------------------------------------------------------------------------------------------------


def start_processes():
    """Join those that torchrun started, if it did. Only the first prints."""
    # A cache that grows leaves blocks behind that fit nothing else: 18 times the memory that is in use. CUDA reads this
    # once, at the latest when a process takes its device.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(dist.get_node_local_rank())
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
        # A thread of gloo may still hold a tensor. Before Python 3.14, dropping it while Python ends aborts the process
        # (pytorch/pytorch#190489), and destroying the group does not wait for it. So all threads get a second to end.
        atexit.register(time.sleep, 1)
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")


def shard(model: nn.Module | None, reshard: bool):
    """Leave each process a part of every weight of the first: FSDP2, a unit for each layer and one for the rest."""
    from torch.distributed.fsdp import fully_shard

    if model is None or world()[1] == 1:
        return
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of what is not done here
    for x in model.state_dict().values():
        dist.broadcast(x, 0)
    for module in (*reversed(layers_of(model)), model):
        fully_shard(module, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)  # gradients are added up, like all else
        module.set_force_sum_reduction_for_comms(True)


# ----------------------------------------------------------------------------------------------------------------------
# The folder of a run: logs, checkpoint, resume
# ----------------------------------------------------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "samples.jsonl")
# These settings may change on a resume.
MAY_CHANGE = "num_updates save_every eval_every micro_batch_size gradient_checkpointing device resume".split()
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)  # whole tensors, in process 0


def save_policy(task: Task, weights, folder):
    """Write the policy of the actor's weights as a folder of transformers, and return its own."""
    own = {name[3:]: x for name, x in weights.items() if name.startswith("lm.")}
    task.actor.lm.save_pretrained(folder, state_dict=own)
    task.tokenizer.save_pretrained(folder)
    return own


def save(task: Task):
    """Write run/policy and run/checkpoint.pt, which a resume needs. A kill at any moment leaves a whole checkpoint."""
    weights, moments = dcp.get_state_dict(task.actor, task.optimizer, options=WHOLE)
    if world()[0]:
        return
    folder = task.run / "unfinished"
    file = task.run / "unfinished.pt"
    shutil.rmtree(folder, ignore_errors=True)
    save_policy(task, weights, folder)
    torch.save(
        {
            "progress": vars(task.progress),
            "logs": {name: (task.run / name).stat().st_size for name in LOGS},
            "actor": weights,
            "optimizer": moments
        },
        file
    )
    shutil.rmtree(task.run / "policy", ignore_errors=True)
    folder.rename(task.run / "policy")
    file.replace(task.run / "checkpoint.pt")


def fingerprint(model, prompts):
    """What must be the same on a resume, besides the settings: another model must not become the reference unseen. The
    file of a reward need not: what is wrong in it may be mended."""
    parts = {
        "the model": [hashlib.sha256(x.cpu().flatten().numpy()).digest() for x in model.state_dict().values()],
        "the prompts": [prompt.row for prompt in prompts]  # not their tokens: a chat template may write the date
    }
    return {name: hashlib.sha256(repr(x).encode()).hexdigest() for name, x in parts.items()}


def read_config(run):
    """The settings of a run, and the fingerprint of what it began with."""
    with about(f"--resume {run}: expected the folder of a run of this ppo_llm.py"):
        saved = json.loads(Path(run, "config.json").expanduser().read_text())
        settings = {name: tuple(x) if isinstance(x, list) else x for name, x in saved["settings"].items()}
        return Config(**settings), saved["fingerprint"]


def resume(task: Task, initial):
    """Go back to the run's checkpoint, and cut the logs to it. Without one the run begins anew. initial: `fingerprint`.
    """
    cfg_before, initial_before = read_config(task.run)
    before = vars(cfg_before) | initial_before
    now = vars(task.cfg) | initial
    changed = dict(now.items() - before.items()).keys() - MAY_CHANGE
    if changed:
        raise ValueError(
            f"--resume: not what the run began with: {', '.join(sorted(changed))}; "
            f"only {', '.join(MAY_CHANGE)} may change"
        )
    sizes = dict.fromkeys(LOGS, 0)
    path = task.run / "checkpoint.pt"
    if path.exists():
        with about(f"loading {path}: expected a whole checkpoint of this program"):
            saved = torch.load(path, map_location="cpu")
            dcp.set_state_dict(
                task.actor,
                task.optimizer,
                model_state_dict=saved["actor"],
                optim_state_dict=saved["optimizer"],
                options=dataclasses.replace(WHOLE, cpu_offload=False)
            )
            for name, parameter in task.actor.named_parameters():  # the policy has no moments while the critic warms up
                if name.replace("_orig_mod.", "") not in saved["optimizer"]["state"]:  # torch.compile's
                    task.optimizer.state.pop(parameter, None)
            vars(task.progress).update(saved["progress"])
            sizes = saved["logs"]
    if task.progress.update >= task.cfg.num_updates:
        raise ValueError(f"{task.run} is complete: to go on, give a larger --num-updates")
    if not world()[0]:  # which holds the lock
        for name, size in sizes.items():
            with open(task.run / name, "a") as f:
                f.truncate(min(size, f.tell()))  # the rest of a log may have been taken away


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def rehearse(task: Task):
    """Go the whole way once before anything is written, with the shortest prompt beside the longest: sample replies of
    full length, ask every reward, take two steps at a learning rate of 0, save the policy and load it again.

    A reply must have the same probability when the model is called with it alone, beside longer ones, and decoded with
    a cache. It has not where a model cannot be padded, counts positions from another number than 0, or has rotary
    factors that change with the length. A `ppo_loss` of yours is not tried: the advantages here are all 1.
    """
    cfg = task.cfg
    actor = task.actor
    rank, count = world()
    # While they are shards: a forward makes them whole.
    optimizer = torch.optim.AdamW(actor.parameters(), 0.0, fused=True)
    by_length = sorted(task.prompts + task.held_out, key=lambda prompt: len(prompt.ids))
    longest = by_length[-1:] * math.ceil(min(cfg.micro_batch_size, cfg.batch_size) / cfg.samples_per_prompt)
    prompts = [prompt for prompt in [by_length[0], *longest] * count for _ in range(cfg.samples_per_prompt)]
    rollout = sample_replies(actor, prompts, [], cfg)
    fill_logprobs_and_values(actor, task.ref, rollout, cfg)
    task.judge(prompts, rollout.replies())
    reply = rollout.responses[:1, :8]
    ids = torch.tensor([prompts[0].ids + reply[0].tolist()], device=actor.lm.device)
    with torch.no_grad():  # as the model is called by others: with positions of its own
        logits = actor.lm(ids).logits[:, -1 - reply.shape[1] : -1].cpu() / cfg.temperature
    alone = logprobs_from_logits(logits, reply).where(rollout.mask[:1, :8], 0)
    beside = rollout.logprobs  # 0 outside the mask, as `alone`
    # A sum, as `max` may lose a NaN. Means over a reply: in bfloat16 a single token may differ much, as where a router
    # rounds to another expert.
    gap = F.l1_loss(alone, beside[:1, :8])
    gap += (rollout.sampler_logprobs - beside).where(rollout.mask, 0).abs().mean(1).max()
    if not gap <= (0.02 if actor.dtype == torch.float32 else 0.25) * beside.std() + 1e-3:
        raise ValueError("this model cannot be trained here: a reply is another when padded or cached")
    rollout.advantages = rollout.returns = torch.ones_like(rollout.values)
    # Two steps: AdamW makes its moments at the end of the first, so only the second needs the memory of training.
    # Of no more replies at a time than in training, where a process's share of a minibatch may be below a micro-batch.
    twice = dataclasses.replace(
        cfg,
        num_ppo_epochs=2,
        num_mini_batches=1,
        micro_batch_size=min(cfg.micro_batch_size, cfg.batch_size // cfg.num_mini_batches // count),
        vf_coef=0.0
    )
    if not ppo_update(actor, optimizer, rollout, twice)["grad_norm"]:
        raise ValueError("no weight of the policy would move: expected some with a gradient, which is not 0 everywhere")
    weights = dcp.get_model_state_dict(actor, options=WHOLE)
    if not rank:
        with tempfile.TemporaryDirectory() as path, about(f"{path}: the policy must load as it is, without adapters"):
            own = save_policy(task, weights, path)
            again = load("ModelForCausalLM", path).state_dict()
            if not all(x.equal(again[name]) for name, x in own.items()):
                raise ValueError("it has other weights")


@typechecked
def prepare(
    cfg: Config,
    prompts: list | None = None,
    reward: Callable | list | None = None,
    model: nn.Module | None = None,
    tokenizer=None,
    eval_prompts: list | None = None,
) -> Task:
    """All that training needs, checked: what is wrong is told before anything is written. Last, the run's folder."""
    import transformers

    transformers.logging.set_verbosity_error()  # one progress bar, ours
    transformers.logging.disable_progress_bar()
    start_processes()
    check(cfg)
    place = [cfg.resume or cfg.output_dir or time.strftime(f"runs/%Y%m%d-%H%M%S-{os.getpid()}")]
    if dist.is_initialized():
        dist.broadcast_object_list(place)  # the folder of the first process is that of all
    run = Path(place[0]).expanduser()
    if run.exists() and not cfg.resume:
        raise ValueError(f"--output-dir {run}: it exists; expected a new folder, or --resume")
    device, dtype = pick_device(cfg)
    seed_everything(cfg.seed)
    rewards = [reward] if callable(reward) else list(reward or map(load_reward, cfg.reward))
    rewards += [load_reward_model(name, device, cfg) for name in cfg.reward_model]
    if model is None and cfg.model:
        model = load("ModelForCausalLM", cfg.model)
    if model is not None:
        tokenizer = tokenizer or load("Tokenizer", model.name_or_path)
    elif prompts or eval_prompts or cfg.prompts or cfg.eval_prompts or rewards:
        raise ValueError("prompts and rewards need a model: give --model too")
    else:
        model, tokenizer, prompts, eval_prompts, rewards = demo_task(cfg.seed)
    weights = cfg.reward_weights or [1.0] * len(rewards)
    if not any(weights) or len(rewards) != len(weights):
        raise ValueError(
            "expected --reward FILE.py:FUNCTION or --reward-model NAME, and as many --reward-weights or none, not all 0"
        )
    room = most_tokens(model) - cfg.response_length
    vocabulary = model.get_input_embeddings().num_embeddings
    train_prompts = encode(tokenizer, prompts or load_prompts(cfg.prompts), vocabulary, room)
    held_out = encode(tokenizer, eval_prompts or load_prompts(cfg.eval_prompts), vocabulary, room)
    if not held_out:
        distinct = {str(prompt.ids): prompt for prompt in train_prompts}
        # Never one alone: its mean would have no standard error.
        keys = random.Random(cfg.seed).sample([*distinct], min(64, len(distinct) // 20 * 2))
        held_out = [distinct.pop(key) for key in keys]
        train_prompts = [prompt for prompt in train_prompts if str(prompt.ids) in distinct]
    if not train_prompts:
        raise ValueError("there is no prompt to train on: expected --prompts FILE")
    with about(f"copies of {type(model).__name__}: expected a causal LM of transformers, and memory for them"):
        actor, ref = make_actors(cfg, model, device, dtype)
    initial = fingerprint(ref.lm, train_prompts + held_out)
    # The policy's weights stay whole until the backward pass, as a reply takes many forward passes. (The value head's
    # must not: `fit_returns` writes into them.)
    shard(ref.lm, True)
    shard(actor.lm, False)
    shard(actor.critic, True)
    shard(actor.value_head, True)
    optimizer = make_optimizer(cfg, actor)
    # A reply ends with EOS of the tokenizer and of the generation config, and each token whose text is a --stop-token.
    eos = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    texts = tokenizer.batch_decode([[i] for i in range(vocabulary)]) if cfg.stop_token else []
    if not {*cfg.stop_token} <= {*texts}:
        raise ValueError(f"--stop-token {cfg.stop_token}: expected each to be the text of one token of this tokenizer")
    stop_ids |= {i for i, text in enumerate(texts) if text in cfg.stop_token}
    task = Task(
        cfg, run, actor, ref, optimizer, Progress(cfg.kl_coef), tokenizer,
        train_prompts, held_out, list(zip(rewards, weights)), sorted(stop_ids),
        {key for prompt in train_prompts + held_out for key in prompt.row}
    )
    with about(f"in the rehearsal of {type(model).__name__}"):
        rehearse(task)
    if not world()[0]:
        with about(f"{run}: expected a new folder, or with --resume one in which no other run writes"):
            if not cfg.resume:
                run.mkdir(parents=True)
                (run / "config.json").write_text(json.dumps({"settings": vars(cfg), "fingerprint": initial}, indent=2))
            task.lock = open(run / "lock", "w")
            with contextlib.suppress(ImportError):  # Windows has no such locks
                import fcntl

                fcntl.lockf(task.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if cfg.resume:
        resume(task, initial)
    print(
        f"Update {task.progress.update} of {cfg.num_updates}, with {len(train_prompts)} prompts and "
        f"{len(held_out)} held out, written to {run}"
    )
    return task


def evaluate_held_out(task: Task):
    """Replies to all held-out prompts, to few of them several, from the same seed each time: metrics and a few samples.

    Each metric is a mean over prompts and, under its name with _se, its standard error where there are several. Replies
    to one prompt are first averaged: they are not independent. As each of several processes must have as many, they
    write a few more, which count nowhere.
    """
    cfg = task.cfg
    metrics = {"update": task.progress.update}
    seed_everything(cfg.seed)
    n = len(task.held_out)
    prompts = task.held_out * max(1, cfg.batch_size // n)
    total = len(prompts)
    prompts += prompts[: -total % world()[1]]
    rollout = sample_replies(task.actor, prompts, task.stop_ids, cfg)
    scores, said = task.judge(prompts, rollout.replies())
    fill_logprobs_and_values(task.actor, task.ref, rollout, cfg)
    said = {"score": scores.sum(1), **said, "kl": reply_kl(rollout)}
    for name, x in said.items():
        x = x[:total].view(-1, n).nanmean(0)
        x = x[x.isfinite()]
        if len(x):
            metrics[f"eval/{name}"] = float(x.mean())
        if len(x) > 1:
            metrics[f"eval/{name}_se"] = float(x.std() / len(x) ** 0.5)
    return metrics, list(zip(prompts, rollout.replies(), said["score"].tolist(), said["kl"].tolist()))[:4]


@contextlib.contextmanager
def finish_on_signal(go_on):
    """Yields a list. Ctrl-C, SIGTERM and SIGHUP are appended to it, to end after this update. A second ends at once,
    but not SIGHUP: a terminal that closes sends two. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    Outside the main thread, where Python lets none be caught, all stay as they are."""
    asked = []
    owner = os.getpid()

    def ask_to_end(number, frame):
        if os.getpid() != owner:  # a process that a reward has forked
            signal.signal(number, old[number])
            signal.raise_signal(number)
        elif asked and number != 1:
            raise KeyboardInterrupt(f"stopped at once; {go_on} (from the last checkpoint, if any)")
        else:
            asked.append(number)
            # Not by print, which fails where the terminal is gone, or `tee` has ended by the same Ctrl-C.
            logging.getLogger(__name__).warning("\nfinishing the update in hand; once more to stop at once")

    old = {
        n: signal.signal(n, ask_to_end)
        for n in signal.valid_signals() & {1, 2, 15}  # SIGHUP where there is one, SIGINT, SIGTERM
        if signal.getsignal(n) is not signal.SIG_IGN and threading.current_thread() is threading.main_thread()
    }
    try:
        yield asked
    finally:
        for change in old.items():
            signal.signal(*change)


def run_task(task: Task):
    """Train, log and save. KeyboardInterrupt, with the run saved, after the update in which a signal came."""
    from tqdm import tqdm

    cfg = task.cfg
    progress = task.progress
    rank, count = world()
    go_on = (
        f"to go on: {'python' if count == 1 else f'torchrun --nproc-per-node {count}'} ppo_llm.py --resume "
        f"'{task.run}' --num-updates {cfg.num_updates}, or in Python resume='{task.run}'"
    )
    bar = tqdm(total=cfg.num_updates, initial=progress.update, disable=rank)

    def log(metrics, samples):
        held_out = "eval/score" in metrics
        rows = [
            prompt.row | {
                "update": progress.update,
                "reply": reply_text(task.tokenizer, prompt, ids),
                "score": score,
                "kl": kl,
                "held_out": held_out
            }
            for prompt, ids, score, kl in samples
        ]
        for name, lines in zip(LOGS, ([metrics], rows)):
            # What UTF-8 cannot write, half an emoji where data was cut, becomes its JSON escape.
            with open(os.devnull if rank else task.run / name, "a", encoding="utf-8", errors="backslashreplace") as f:
                f.writelines(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
        if held_out or not task.held_out and is_due(cfg.eval_every):  # where none is held out, replies of training
            means = ", ".join(
                f"{name.split('/')[-1]} {metrics[name]:z.2f} ± {metrics.get(name + '_se', math.nan):.2f}"
                for name in metrics if "eval/" in name and not name.endswith("_se")
            )
            bar.write(f"\n{'Held-out' if held_out else 'Training'}, update {progress.update}: {means}")
            for row in rows:
                bar.write("  " + " ".join(f"{str(row['prompt'])[-200:]} | {row['reply'][:300]}".split()))

    def evaluate():
        if task.held_out:
            log(*evaluate_held_out(task))

    def is_due(every):
        return progress.update == cfg.num_updates or every and not progress.update % every

    with finish_on_signal(go_on) as asked, bar, task.lock:
        if not progress.update:
            evaluate()
        try:
            for metrics, samples in ppo(
                task.actor, task.ref, task.optimizer, task.prompts, task.score, task.stop_ids, cfg, progress,
                sample_replies, ppo_loss  # those of now: others may have been put into the module
            ):
                log(metrics, samples)
                if is_due(cfg.eval_every):
                    evaluate()
                stop = all_sum(torch.tensor(sum(asked)))  # here all processes learn whether one was asked to stop
                if stop or is_due(cfg.save_every):
                    save(task)
                bar.set_postfix_str(  # after the checkpoint, as the terminal may be gone
                    f"score {metrics['objective/scores']:.2f}, KL {metrics['objective/kl']:z.1f}, "
                    f"ended {metrics['reply/ended']:.0%}",
                    False
                )
                bar.update()
                if stop and progress.update < cfg.num_updates:
                    raise KeyboardInterrupt(f"stopped after update {progress.update}, {go_on}")
        except Exception as e:
            # Of several processes the others may be gone. A policy that diverges does not replace an older one.
            if progress.update and count == 1 and not isinstance(e, FloatingPointError):
                save(task)
                e.add_note(f"(saved after update {progress.update}, with any steps of the next one; {go_on})")
            raise
    print(f"Load the policy: AutoModelForCausalLM.from_pretrained('{task.run}/policy')")
    return task.run


def train(cfg: Config, prompts=None, reward=None, model=None, tokenizer=None, eval_prompts=None):
    """Run PPO and return the folder of the run. What is not passed, or empty, comes from cfg. The demo is train(DEMO).

    prompts, eval_prompts: texts, chats, or dicts with "prompt" and columns for the reward. reward: one or several
    functions f(prompts, completions, **columns) that give, for each reply, a number, a list of one for each of its
    tokens, or None. model, tokenizer: of transformers; this model is trained. Load it in float32, as it is saved: in
    bfloat16 Gemma has another factor of its embeddings. Without a tokenizer it is the one of the folder that the model
    came from.
    Raises whatever is wrong, with notes that say what it is about. KeyboardInterrupt: see `run_task`. To go on with a
    run, call it again with the same arguments, the model loaded anew, and the folder as `resume` of cfg.
    """
    return run_task(prepare(cfg, prompts, reward, model, tokenizer, eval_prompts))


# ----------------------------------------------------------------------------------------------------------------------
# The demo: delete it, and a trainer is left
# ----------------------------------------------------------------------------------------------------------------------

GOOD = "superb moving charming funny clever".split()
BAD = "dull clumsy boring weak bland".split()
NOUNS = "plot acting music script cast ending dialogue".split()
VERBS = "was felt seemed".split()
ADVERBS = "rather very".split()
LINKS = "and but".split()
CLAUSE = f"the ({'|'.join(NOUNS)}) ({'|'.join(VERBS)})( ({'|'.join(ADVERBS)}))? ({'|'.join(GOOD + BAD)})"
REVIEW = re.compile(f"{CLAUSE}( ({'|'.join(LINKS)}) {CLAUSE})* \\.")


DEMO = Config(
    num_updates=20,  # about a minute
    response_length=24,  # most reviews end before
    missing_eos_penalty=3.0,  # else a review without an end would earn more
    kl_coef=0.3,  # holds the policy to the grammar
    learning_rate=1e-3,  # a model this small needs large steps
    lr_scheduler_type="linear",  # small steps at the end keep it fluent
    reward_weights=(1.0, 0.0),  # sentiment is rewarded, fluency only measured
)


def sentiment(prompts, completions, **columns):
    """Positive words less negative words in each reply."""
    return [sum((word in GOOD) - (word in BAD) for word in text.split()) for text in completions]


def fluency(prompts, completions, **columns):
    """1 if the grammar parses the whole review. Measured with weight 0, never rewarded: it shows reward hacking."""
    return [bool(REVIEW.fullmatch(prompt + text)) for prompt, text in zip(prompts, completions)]


def demo_task(seed, steps=160):
    """A small Llama, trained on film reviews from the grammar: model, tokenizer, prompts, held-out prompts, rewards."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "the", ".", *NOUNS, *VERBS, *ADVERBS, *LINKS, *GOOD, *BAD]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.05,
        tie_word_embeddings=True,
        eos_token_id=1
    ))
    pick = random.Random(seed).choice

    def clause():
        return f"the {pick(NOUNS)} {pick(VERBS)} {pick([*ADVERBS, '', ''])} {pick(GOOD + BAD)}"

    def review():
        return clause() + "".join(f" {pick(LINKS)} {clause()}" for _ in range(pick([0, 0, 1, 1, 2, 3]))) + " . </s> "

    optimizer = torch.optim.AdamW(lm.parameters())
    print("Teaching a small language model to write film reviews, from random weights ...")
    for step in range(steps):
        texts = ["".join(review() for _ in range(5)) for _ in range(32)]  # at least 6 tokens each
        ids = tokenizer(texts, truncation=True, max_length=30, return_tensors="pt")["input_ids"]
        lm(input_ids=ids, labels=ids).loss.backward()
        # From a large rate down to 0: models taught with a small or a constant one are not as stable under PPO.
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    openings = [
        f"the {noun} {verb} {adverb}".strip() for noun in NOUNS for verb in VERBS for adverb in [*ADVERBS, ""]
    ]
    random.Random(0).shuffle(openings)
    return lm, tokenizer, openings[16:], openings[:16], [sentiment, fluency]


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Flags:
    """PPO for language models. Without --model it runs the embedded demo, with settings of its own.

    Look first at --model, --prompts, --reward, --num-updates, --batch-size.

    Then at --response-length, --learning-rate, --kl-coef, --save-every, --resume.

    python ppo_llm.py --model gpt2 --prompts prompts.txt --reward rewards.py:f

    python ppo_llm.py --resume runs/NAME --num-updates 200
    """
    task: TaskConfig
    ppo: PPOConfig
    run: RunConfig


def parse(argv):
    """The command line, a list of strings, as a Config. Its defaults are those of the resumed run, or the demo's if
    there is no model."""
    import tyro

    def read(defaults):
        parts = [
            kind(**{name: getattr(defaults, name) for name in kind.__dataclass_fields__})
            for kind in Config.__bases__
        ]
        flags = tyro.cli(
            Flags,
            args=argv,
            default=Flags(*parts),
            config=[tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction]
        )
        return Config(**vars(flags.task) | vars(flags.ppo) | vars(flags.run))

    given = read(Config())
    if given.model and not given.resume:
        return given
    known = read_config(given.resume)[0] if given.resume else DEMO
    lists = {name: x for name, x in vars(given).items() if x and isinstance(x, tuple)}
    return dataclasses.replace(read(known), **lists)  # tyro adds to a list that is known; one given takes its place


def main(argv=None):
    """Exit status: 0 done, 1 the run failed, 2 it could not begin, 130 interrupted. argv None: the command line."""
    status = 2
    try:
        task = prepare(parse(argv))
        status = 1
        run_task(task)
    except KeyboardInterrupt as e:
        print(f"ppo_llm.py: {str(e) or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as e:
        file = Path(tempfile.gettempdir(), f"ppo_llm-{os.getpid()}.txt")
        file.write_text(traceback.format_exc(), encoding="utf-8")
        said = (x.strip().removeprefix("ValueError: ") for x in reversed(traceback.format_exception_only(e)))
        print(f"ppo_llm.py: {textwrap.shorten(': '.join(said), 1500)} (traceback: {file})", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
