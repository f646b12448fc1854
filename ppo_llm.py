# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17", "tyro>=1.0"]
# ///
"""PPO for language models, in one file to be read from top to bottom.

    python ppo_llm.py                                        # embedded demo: no download, no GPU, under a minute
    python ppo_llm.py --model gpt2 --prompts prompts.jsonl --reward rewards.py:score     # your model, GPU if there is one

One update, in six steps:

  1. Generate: sample one reply to each of B prompts from the policy (`generate`).
  2. Score: the reward functions judge each whole reply: scores [B].
  3. Evaluate: one forward gives log-probabilities and values of every token; the frozen reference model gives its own.
  4. Credit: rewards are -β·KL per token with the score on the last one; GAE makes advantages and returns of them.
  5. Update: several epochs of minibatches on the clipped surrogate and the clipped value loss (`ppo_update`).
  6. Log what happened, over valid tokens only, and go on.

Left out on purpose: top-k and top-p (they change the sampling distribution and so every ratio), LoRA, a registry of
anything, other algorithms.

Shapes: B responses, P prompt tokens (left-padded), T response tokens, N valid response tokens, H hidden, V vocabulary.
Everything of the RL part is aligned to the response, [B, T].

Papers: PPO, Schulman et al. 2017 (arXiv 1707.06347); GAE, Schulman et al. 2015 (1506.02438); RLHF with a KL penalty,
Ziegler et al. 2019 (1909.08593); KL estimators, Schulman 2020 (joschu.net/blog/kl-approx.html).
"""
from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import html
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# 1. The mathematics: pure functions of tensors. Each can be copied out alone.
#    A mask is boolean, True on valid tokens. Masked cells may hold anything, NaN too, and change nothing: torch.where
#    selects where a multiplication would let NaN through.
# ----------------------------------------------------------------------------------------------------------------------


def response_mask(responses: Tensor, stop_ids: list[int]) -> Tensor:  # [B, T] -> [B, T] bool
    """True on the reply: every token up to and including the first stop token, or all T if there is none.

    Never derived from `token != pad`: the pad token may equal EOS, and content may equal pad.
    """
    stop = torch.isin(responses, torch.tensor(stop_ids, dtype=responses.dtype, device=responses.device)).long()
    return stop.cumsum(1) - stop == 0  # no stop token strictly before this one


def masked_mean(x: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:  # [B, T], [B, T] -> []
    """Mean over the valid cells, 0 if there are none.

    weights [B, T] replaces the uniform 1/N: the losses are then sums of weighted tokens. Weights that sum to 1 over an
    optimizer step make its gradient the same however the step is cut into micro-batches.
    """
    x = torch.where(mask, x, 0.0)
    return x.sum() / mask.sum().clamp(min=1) if weights is None else (x * torch.where(mask, weights, 0.0)).sum()


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:  # [B, T], [B, T] -> [B, T]
    """Scale the valid cells to variance 1 and, if shift_mean, shift them to mean 0. Masked cells become 0.

    The variance is the population's; the 1e-8 below the root keeps one cell, or equal cells, from giving NaN.
    shift_mean=False keeps the mean, as OpenAI's lm-human-preferences does for rewards (their sign carries meaning).
    """
    mean = masked_mean(x, mask)
    centered = torch.where(mask, x - mean, 0.0)
    whitened = centered * torch.rsqrt(masked_mean(centered**2, mask) + 1e-8)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def logprobs_from_logits(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:  # [..., V], [...] -> [...]
    """log π(token) in nats. The temperature is part of the policy: it is the one that the tokens were sampled with."""
    logits = logits if temperature == 1 else logits / temperature  # one pass over [..., V] less
    return F.log_softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:  # [..., V] -> [...]
    """Entropy of the next-token distribution, in nats: 0 when it is certain, log V when it is uniform."""
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:  # [B, T], [B, T] -> [B, T]
    """Estimate KL(policy ‖ reference) per token, in nats, from tokens that the policy sampled (joschu.net/blog/kl-approx).

    With d = log π - log π_ref at the sampled token: k1 = d, unbiased, a single one may be negative; k2 = d²/2, biased
    but never negative; k3 = e^-d - 1 + d, unbiased and never negative. In the reward k1 gives the policy gradient of the
    true KL. As a loss, differentiated on policy, k2 has the gradient of the KL in each state that is met (what a token does
    to later states is missing), k1 has expected gradient 0 and k3 the gradient of KL(ref ‖ policy).
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

    kl and target are in nats a reply. The relative error is clipped to ±0.2, so that `horizon` episodes spent far from
    the target change β by about a fifth.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:  # [B], [B, T], [B, T] -> [B, T]
    """Reward of each token: -β·KL_t, plus the score on the last response token (Ziegler et al. 2019, eq. 2)."""
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(last, scores.unsqueeze(1), 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95,
        bootstrap: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [B, T], [B, T], [B, T] -> [B, T], [B, T]
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16; PPO eq. 11-12), backwards in time:

        δ_t = r_t + γ·V_{t+1} - V_t          A_t = δ_t + γλ·A_{t+1}          return_t = A_t + V_t

    values[:, t] is V of the state before token t. After the last token V is `bootstrap` [B]: 0 for a reply that ended
    (the default), V of the cut-off state for one that the length budget stopped. Masked cells of both results are 0.
    """
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap
    next_advantage = torch.zeros_like(values[:, 0])
    advantages = torch.empty_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = next_advantage
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float = 0.2,
                cliprange_high: float | None = None, dual_clip: float | None = None,
                weights: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # [B, T] each -> [], stats
    """The clipped surrogate, PPO eq. 7, negated: -mean min(ρA, clip(ρ, 1-ε, 1+ε)A) with ρ = π_new / π_old.

    cliprange_high: upper ε, if it differs from the lower (clip-higher, DAPO, arXiv 2503.14476).
    dual_clip: c > 1 bounds the objective from below at cA where A < 0, however large ρ is (arXiv 1912.09729).
    stats: means over valid tokens of ρ, of the clipped share, and of the k3 estimate of KL(old ‖ new).
    """
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + (cliprange if cliprange_high is None else cliprange_high)) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    if dual_clip is not None:
        surrogate = torch.maximum(surrogate, dual_clip * advantages.clamp(max=0))  # where A > 0 it stays as it is, above 0
    with torch.no_grad():
        stats = {"policy/approxkl": masked_mean(kl_estimate(-log_ratio, torch.zeros_like(log_ratio), "k3"), mask),
                 "policy/clipfrac": masked_mean((clipped < unclipped).to(ratio.dtype), mask),
                 "policy/ratio": masked_mean(ratio, mask)}
    return -masked_mean(surrogate, mask, weights), stats


def value_loss(new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float | None = 0.2,
               weights: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:  # [B, T] each -> [], stats
    """½ mean max((V - R)², (clip(V, V_old ± ε) - R)²): at least ½ MSE. None switches the clip off.

    The clip is not in the PPO paper; it is that of openai/baselines (ppo2). stats: the share of tokens where it binds.
    """
    new_values, values, returns = (torch.where(mask, x, 0.0) for x in (new_values, values, returns))
    error = clipped_error = (new_values - returns) ** 2
    if cliprange_value is not None:
        clipped_error = (new_values.clamp(values - cliprange_value, values + cliprange_value) - returns) ** 2
    with torch.no_grad():
        stats = {"val/clipfrac": masked_mean((clipped_error > error).to(error.dtype), mask)}
    return 0.5 * masked_mean(torch.maximum(error, clipped_error), mask, weights), stats


# ----------------------------------------------------------------------------------------------------------------------
# 2. The data
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """The replies of one update and all that is known of them, on the CPU: micro-batches go to the device one by one."""
    queries: Tensor  # [B, P] int, prompt tokens, left-padded
    query_mask: Tensor  # [B, P] bool, False on that padding
    responses: Tensor  # [B, T] int, sampled tokens, right-padded
    mask: Tensor  # [B, T] bool, the response mask
    ended: Tensor  # [B] bool, whether a stop token ended the reply, and not the length budget
    sampler_logprobs: Tensor  # [B, T] log π of each token as the sampler saw it, only compared with `logprobs`
    logprobs: Tensor | None = None  # [B, T] log π_old of each token, frozen
    ref_logprobs: Tensor | None = None  # [B, T] the same under the reference
    values: Tensor | None = None  # [B, T] V_old of the state before each token, frozen: the baseline
    predictions: Tensor | None = None  # [B, T] what the critic is trained on: V_old again, or Q_old of state and token
    entropy: Tensor | None = None  # [B, T] of π_old before each token, for the metrics
    final_values: Tensor | None = None  # [B] V_old of the state after the last token
    advantages: Tensor | None = None  # [B, T]
    returns: Tensor | None = None  # [B, T] what the critic is regressed on
    weights: Tensor | None = None  # [B, T] share of each token in the losses of its optimizer step
    valid: Tensor | None = None  # [N] where the mask is True in the flattened [B, T]; made by `rows`

    def rows(self, index: Tensor, device: torch.device | str = "cpu") -> Rollout:
        """The replies `index` on the device, trimmed to the longest prompt and the longest reply among them."""
        prompt, reply = (int(mask[index].sum(1).max()) for mask in (self.query_mask, self.mask))
        whole, left = ..., (..., slice(-prompt, None))
        cut = {"queries": left, "query_mask": left, "ended": whole, "final_values": whole}
        part = {name: x[index][cut.get(name, (..., slice(reply)))] for name, x in vars(self).items() if x is not None}
        part["valid"] = part["mask"].flatten().nonzero().squeeze(1)  # not on the device, which would have to be waited for
        cuda = torch.device(device).type == "cuda"  # where a copy from pinned memory need not be waited for
        return Rollout(**{name: (x.pin_memory() if cuda else x).to(device, non_blocking=cuda) for name, x in part.items()})

    def micro_batches(self, index: Tensor, size: int, device: torch.device | str = "cpu") -> list[Tensor]:
        """Cut the replies `index` into groups of at most `size`, of like length: little is computed for padding."""
        length = (self.query_mask.sum(1) + self.mask.sum(1))[index].tolist()
        free = 128 if torch.device(device).type == "cpu" else 8192  # padding that costs less than one more pass
        groups, tokens = [[]], 0
        for i in sorted(range(len(length)), key=length.__getitem__):  # in the last group, i would widen all rows to its length
            if len(groups[-1]) == size or len(groups[-1]) * length[i] > 1.125 * tokens + free:
                groups.append([])
                tokens = 0
            groups[-1].append(i)
            tokens += length[i]
        return [index[group] for group in groups]


# ----------------------------------------------------------------------------------------------------------------------
# 3. The actor with its value head
# ----------------------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """A Hugging Face causal language model as the policy, and a critic: a linear head on last hidden states.

    The trunk (`lm.base_model`) and the vocabulary head are called apart, so that logits are computed only where a
    response token is predicted. critic: None, the value head stands on the policy's own trunk; or a model that gives it
    a trunk of its own, and its `score` head to start from if it is a sequence classifier. action_values: the head gives
    Q(s, ·), a number for each token of the vocabulary, and not V(s). ValueError for a model that cannot work.
    """

    def __init__(self, lm: nn.Module, dtype: torch.dtype = torch.float32, critic: nn.Module | None = None,
                 action_values: bool = False):
        from transformers.activations import NewGELUActivation

        super().__init__()
        self.lm, self.dtype, self.action_values = lm.eval(), torch.float32, action_values  # eval: dropout moves the ratio
        for module in [*lm.modules(), *(critic.modules() if critic is not None else ())]:
            for name, child in module.named_children():
                if isinstance(child, NewGELUActivation):  # GPT-2's, written out in eight operations: torch has it in one
                    setattr(module, name, nn.GELU(approximate="tanh"))
        if lm.device.type == "cpu" and (dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"):
            for model in filter(None, (lm, critic)):  # the fused kernel would call oneDNN for each tile: several times as slow
                model.set_attn_implementation("eager")
        self.critic_trunk = None if critic is None else critic.base_model.eval()
        config = lm.config.get_text_config()
        divisor = getattr(config, "logits_scaling", None)
        self.logit_scale = 1 / divisor if divisor else getattr(config, "logit_scale", None)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        weight = lm.get_output_embeddings().weight  # [V, H]
        for model in filter(None, (critic, lm)):  # an embedding tied to the head adds rows to its gradient, not a second [V, H]
            embedding = model.get_input_embeddings()
            embedding.sparse = embedding.weight is weight and weight.device.type in ("cpu", "cuda")
        score = getattr(critic, "score", None)
        width = (score or (critic or lm).get_output_embeddings()).weight.shape[1]
        self.value_head = nn.Linear(width, len(weight) if action_values else 1)
        self.value_head.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        with torch.no_grad():  # V = 0 at the start: the first advantages are plain returns
            self.value_head.weight.copy_(torch.zeros(1) if score is None else score.weight)
            self.value_head.bias.zero_()
        for model in (lm,) if critic is None else (lm, critic):
            self.check(model)
        self.dtype = dtype

    @torch.inference_mode()
    def check(self, model: nn.Module) -> None:
        """Refuse a model whose states or logits, left-padded and with a cache, are not those of its own forward."""
        from transformers import DynamicCache

        ids = torch.arange(1, 7, device=self.device).view(1, 6) % model.get_input_embeddings().weight.shape[0]
        padded, attention = F.pad(ids, (2, 0)), F.pad(torch.ones_like(ids), (2, 0))
        try:
            cache = DynamicCache(config=model.config)
            start = self.trunk(padded[:, :5], attention[:, :5], cache, model.base_model)
            cache.reorder_cache(torch.zeros(1, dtype=torch.long, device=self.device))  # as when replies have stopped
            ours = torch.cat([start, self.trunk(padded[:, 5:], attention, cache, model.base_model)], 1)[:, 2:]
            own = model.base_model(input_ids=ids).last_hidden_state
            if model is self.lm:
                ours, own = self.logits(ours), model(input_ids=ids).logits
            fault = "" if (own - ours).abs().max() < 0.02 * own.std() else (
                "left-padded, with a cache, or through a scaled or soft-capped head, its output is not that of its forward")
        except Exception as e:
            fault = f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"
        if fault:
            raise ValueError(f"{type(model).__name__} cannot be trained here ({fault}); use another kind of model")

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def trunk(self, ids: Tensor, attention: Tensor, cache=None, base=None) -> Tensor:  # [b, L], [b, cached + L] -> [b, L, H]
        """Last hidden states of the policy, or of `base`. Positions count real tokens: left padding must not shift them."""
        positions = (attention.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        with self.autocast():
            return (base or self.lm.base_model)(
                input_ids=ids, attention_mask=attention.long(), position_ids=positions, past_key_values=cache,
                use_cache=cache is not None).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:  # [..., H] -> [..., V], at least float32
        with self.autocast():
            logits = self.lm.get_output_embeddings()(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def states(self, batch: Rollout, base=None, after: bool = False) -> Tensor:  # -> [b, T, H], or [b, T + 1, H]
        """State t predicts response token t; with `after`, one more follows the last token. The only place that shifts."""
        ids = torch.cat([batch.queries, batch.responses if after else batch.responses[:, :-1]], 1)
        attention = torch.cat([batch.query_mask, torch.ones_like(batch.mask)], 1)  # what follows a reply is never looked at
        return self.trunk(ids, attention[:, :ids.shape[1]], base=base)[:, batch.queries.shape[1] - 1:]

    def critic_states(self, batch: Rollout, states: Tensor, after: bool = False) -> Tensor:  # as `states`
        return states if self.critic_trunk is None else self.states(batch, self.critic_trunk, after)

    def predictions(self, critic_states: Tensor, batch: Rollout) -> Tensor:  # [b, T or T + 1, H] -> [b, T]
        """What the critic is trained on: V of the state before each token, or Q of that state and the token."""
        x = critic_states[:, :batch.mask.shape[1]].to(self.value_head.weight.dtype)
        if self.action_values:  # only the rows of the sampled tokens
            return (x * self.value_head.weight[batch.responses]).sum(-1) + self.value_head.bias[batch.responses]
        return self.value_head(x).squeeze(-1)

    def values(self, critic_states: Tensor, states: Tensor, temperature: float) -> Tensor:  # [b, T + 1, H] -> [b, T + 1]
        """The baseline of every state: V(s), or Σ_a π(a|s)·Q(s, a)."""
        x = critic_states.to(self.value_head.weight.dtype)
        if not self.action_values:
            return self.value_head(x).squeeze(-1)
        chunks = zip(*(y.flatten(0, 1).split(self.tokens_at_once) for y in (x, states)))
        return torch.cat([((self.logits(y) / temperature).softmax(1) * self.value_head(z)).sum(1)
                          for z, y in chunks]).view(states.shape[:2])

    def logprobs(self, states: Tensor, batch: Rollout, temperature: float, entropy: bool = False) -> tuple[Tensor, Tensor]:
        """log π of the response tokens and, on request, the entropy of π at each: [b, T] both, 0 where the mask is False.

        Vocabulary rows are computed for valid tokens only, in chunks. More than one chunk is recomputed in the backward
        pass: memory holds the logits of one chunk, never [B, T, V].
        """
        packed = states[:, :batch.mask.shape[1]].flatten(0, 1)[batch.valid]  # [N, H]
        tokens = batch.responses.flatten()[batch.valid]  # [N]

        def head(packed: Tensor, tokens: Tensor) -> Tensor:  # [n, H], [n] -> [2, n]
            logits = self.logits(packed)
            logprobs = logprobs_from_logits(logits, tokens, temperature)
            entropies = entropy_from_logits(logits, temperature) if entropy else torch.zeros_like(logprobs)
            return torch.stack([logprobs, entropies])

        if len(packed) <= self.tokens_at_once:
            both = head(packed, tokens)
        else:
            both = torch.cat([checkpoint(head, *chunk, use_reentrant=False)
                              for chunk in zip(packed.split(self.tokens_at_once), tokens.split(self.tokens_at_once))], 1)
        return tuple(x.new_zeros(batch.mask.numel()).index_copy(0, batch.valid, x).view(batch.mask.shape) for x in both)

    @property
    def tokens_at_once(self) -> int:
        return max(1, LOGITS_AT_ONCE // self.lm.get_output_embeddings().weight.shape[0])


LOGITS_AT_ONCE = 2**26  # vocabulary logits alive at a time: 256 MB in float32


# ----------------------------------------------------------------------------------------------------------------------
# 4. The rollout: generate, evaluate, credit
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()  # inference_mode would keep autocast from caching the weights: each step would round them again
def generate(actor: Actor, queries: Tensor, query_mask: Tensor, response_length: int, temperature: float,
             stop_ids: list[int]) -> Rollout:  # [B, P], [B, P] -> the first six fields
    """Sample a reply to each prompt, token by token with the KV cache, from the whole distribution at `temperature`.

    Every few tokens the host asks which replies have stopped (its own only synchronisation with the device) and drops
    them from the batch once they are many.
    """
    from transformers import DynamicCache

    B, P = queries.shape
    responses = torch.zeros((B, response_length), dtype=torch.long, device=actor.device)
    logprobs = torch.zeros((B, response_length), device=actor.device, dtype=actor.value_head.weight.dtype)
    stop = torch.tensor(stop_ids, dtype=torch.long, device=actor.device)
    alive = torch.arange(B, device=actor.device)  # rows still being written
    stopped = torch.zeros(B, dtype=torch.bool, device=actor.device)
    attention = torch.cat([query_mask, torch.ones(B, response_length, dtype=torch.bool)], 1).to(actor.device)
    ids, cache = queries.to(actor.device), DynamicCache(config=actor.lm.config)
    wide = torch.float32 if actor.device.type == "mps" else torch.float64  # MPS has no float64
    uniform = torch.rand(B, response_length, dtype=wide, device=actor.device)  # a reply's own, whatever the others do
    for t in range(response_length):
        states = actor.trunk(ids, attention[:, :P + t], cache)[:, -1]
        distribution = F.log_softmax(actor.logits(states) / temperature, dim=1)  # [b, V]
        total = distribution.to(wide).exp().cumsum(1)  # sampling by the inverse of the distribution function
        ids = torch.searchsorted(total, uniform[alive, t, None] * total[:, -1:], right=True)
        ids = ids.clamp(max=total.shape[1] - 1)  # [b, 1]
        responses[alive, t] = ids.squeeze(1)
        logprobs[alive, t] = distribution.gather(1, ids).squeeze(1).to(logprobs.dtype)
        stopped |= torch.isin(ids.squeeze(1), stop)
        if t % 4 == 3:
            going = (~stopped).nonzero().squeeze(1)
            if len(going) == 0:
                break
            if len(going) < 0.75 * len(alive):
                alive, attention, ids, stopped = alive[going], attention[going], ids[going], stopped[going]
                cache.reorder_cache(going)
    written = responses.cpu()
    mask = response_mask(written, stop_ids)
    ended = (torch.isin(written, stop.cpu()) & mask).any(1)
    return Rollout(queries, query_mask, written.masked_fill(~mask, 0), mask, ended, logprobs.cpu().where(mask, 0.0))


@torch.inference_mode()
def evaluate(actor: Actor, ref: Actor, rollout: Rollout, temperature: float, micro_batch_size: int) -> None:
    """Fill in log-probabilities and values of every response token, by the same forward that training uses."""
    B, T = rollout.mask.shape
    kind = dict(dtype=actor.value_head.weight.dtype)
    names = "logprobs", "entropy", "ref_logprobs", "values", "predictions"
    vars(rollout).update(zip(names, torch.zeros(len(names), B, T, **kind)))
    rollout.final_values = torch.zeros(B, **kind)
    for rows in rollout.micro_batches(torch.arange(B), micro_batch_size, actor.device):
        batch = rollout.rows(rows, actor.device)
        states = actor.states(batch, after=True)
        logprobs, entropy = actor.logprobs(states, batch, temperature, entropy=True)
        ref_logprobs, _ = ref.logprobs(ref.states(batch), batch, temperature)
        critic_states = actor.critic_states(batch, states, after=True)
        values = actor.values(critic_states, states, temperature)  # [b, t + 1]
        found = logprobs, entropy, ref_logprobs, values[:, :-1], actor.predictions(critic_states, batch)
        for name, x in zip(names, found):
            getattr(rollout, name)[rows, :x.shape[1]] = x.to(**kind).cpu()
        rollout.final_values[rows] = values.gather(1, batch.mask.sum(1, keepdim=True)).squeeze(1).cpu()


def credit(rollout: Rollout, scores: Tensor, kl_coef: float, cfg: Config) -> None:  # scores [B]
    """Fill in advantages and returns: score and KL to token rewards, GAE, whitening over the whole batch."""
    mask = rollout.mask
    if cfg.missing_eos_penalty is not None:
        scores = scores.where(rollout.ended, scores - cfg.missing_eos_penalty)
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, cfg.kl_estimator)
    rewards = token_rewards(scores, kl, mask, kl_coef if cfg.kl_in == "reward" else 0.0)
    if cfg.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    bootstrap = rollout.final_values.where(~rollout.ended, 0.0) if cfg.bootstrap_truncated else None
    rollout.advantages, rollout.returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.lam, bootstrap)
    if cfg.critic_lam is not None:  # the critic may look further ahead than the policy (VC-PPO, arXiv 2503.01491)
        _, rollout.returns = gae(rewards, rollout.values, mask, cfg.gamma, cfg.critic_lam, bootstrap)
    if cfg.whiten_advantages:
        rollout.advantages = masked_whiten(rollout.advantages, mask)


# ----------------------------------------------------------------------------------------------------------------------
# 5. The PPO update
# ----------------------------------------------------------------------------------------------------------------------


def ppo_loss(actor: Actor, batch: Rollout, kl_coef: float, cfg: Config,
             critic_only: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO eq. 9, negated, on one micro-batch: clipped surrogate + c1 value loss - c2 entropy (+ β KL with kl_in = loss)."""
    mask, weights = batch.mask, batch.weights
    with torch.set_grad_enabled(torch.is_grad_enabled() and not critic_only):
        states = None if critic_only and actor.critic_trunk is not None else actor.states(batch)  # None: it reads its own
    predictions = actor.predictions(actor.critic_states(batch, states), batch)
    vf_loss, stats = value_loss(predictions, batch.predictions, batch.returns, mask, cfg.cliprange_value, weights)
    loss = cfg.vf_coef * vf_loss
    stats["loss/value"] = vf_loss.detach()
    if critic_only:
        return loss, stats
    new_logprobs, entropy = actor.logprobs(states, batch, cfg.temperature, entropy=cfg.ent_coef != 0)
    pg_loss, pg_stats = policy_loss(new_logprobs, batch.logprobs, batch.advantages, mask, cfg.cliprange, cfg.cliprange_high,
                                    cfg.dual_clip, weights)
    loss = loss + pg_loss - cfg.ent_coef * masked_mean(entropy, mask, weights)
    if cfg.kl_in == "loss":
        kl = kl_estimate(new_logprobs, batch.ref_logprobs, cfg.kl_estimator)
        loss = loss + kl_coef * masked_mean(kl, mask, weights)
    stats |= pg_stats | {"loss/policy": pg_loss.detach()}
    return loss, stats


def ppo_update(actor: Actor, optimizer: torch.optim.Optimizer, rollout: Rollout, kl_coef: float, cfg: Config,
               critic_only: bool = False) -> dict[str, float]:
    """Several epochs of shuffled minibatches, an optimizer step each. Returns metrics, means over all their valid tokens.

    A step whose loss or gradient is not finite is left out, with its metrics, and counted.
    """
    totals, tokens, norms, skipped = defaultdict(float), 0, [], 0
    rollout.weights = torch.empty_like(rollout.advantages)  # filled in for each minibatch
    epochs = [torch.randperm(len(rollout.mask)).chunk(cfg.num_mini_batches) for _ in range(cfg.num_ppo_epochs)]
    for minibatch in itertools.chain(*epochs):
        mask = rollout.mask[minibatch].to(rollout.weights.dtype)
        if cfg.loss_aggregation == "token":  # every token of the step counts the same (DAPO, arXiv 2503.14476)
            rollout.weights[minibatch] = mask / mask.sum()
        else:  # every reply counts the same, its tokens share its part (the NaN of an empty one is masked)
            rollout.weights[minibatch] = mask / (mask.sum(1, keepdim=True) * len(mask))
        optimizer.zero_grad()  # here, so that no way out of the loop leaves gradients behind
        step = defaultdict(float)  # sums over the step's tokens
        for rows in rollout.micro_batches(minibatch, cfg.micro_batch_size or len(minibatch), actor.device):
            batch = rollout.rows(rows, actor.device)
            loss, stats = ppo_loss(actor, batch, kl_coef, cfg, critic_only)
            loss.backward()
            for name, x in stats.items():  # a loss is a part of the step's weighted sum, the rest means over these tokens
                step[name] += x * (mask.sum() if name.startswith("loss/") else len(batch.valid))
        norm, *others = [nn.utils.clip_grad_norm_(group["params"], cfg.max_grad_norm or math.inf)
                         for group in optimizer.param_groups]  # apart: the critic's errors must not shrink the policy's step
        if not math.isfinite(sum([norm, *others, *step.values()])):
            skipped += 1
            continue
        tokens += int(mask.sum())
        for name, x in step.items():
            totals[name] += float(x)
        if cfg.target_kl is not None and step["policy/approxkl"] > cfg.target_kl * mask.sum():
            break
        norms.append(float(norm))
        optimizer.step()
    return {name: total / tokens for name, total in totals.items()} | {
        "policy/grad_norm": sum(norms) / max(1, len(norms)), "policy/steps": len(norms), "policy/skipped_steps": skipped}


# ----------------------------------------------------------------------------------------------------------------------
# 6. Prompts and rewards
# ----------------------------------------------------------------------------------------------------------------------

Reward = Callable[..., list[float]]  # f(prompts, completions, **columns), as in TRL's GRPOTrainer


class UsageError(ValueError):
    """A setting or a file that the user can put right, found before anything is written: one line, exit status 2."""


class RunError(RuntimeError):
    """What stops a run that has begun: one line, exit status 1."""


class RewardError(RunError):
    """A reward that fails. The policy is sound, so the run is saved first."""


def first_line(e: Exception) -> str:
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


@dataclass
class Prompt:
    row: dict  # "prompt", a string or a list of chat messages, and the columns for the reward functions
    ids: list[int]  # its tokens


def as_row(x: str | dict) -> dict:
    """A prompt, or a row with one, as a row; UsageError if it is neither."""
    row = {"prompt": x} if isinstance(x, str) else x
    prompt = row.get("prompt") if isinstance(row, dict) else None
    chat = isinstance(prompt, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    if not (chat or isinstance(prompt, str)) or not prompt or not str(prompt).strip():
        raise UsageError('expected a "prompt": a string that is not empty, or chat messages with "role" and "content"')
    return row


def load_prompts(path: str) -> list[dict]:
    """Rows with `prompt` and any other columns from .jsonl, or a prompt a line from .txt."""
    if Path(path).suffix not in (".txt", ".jsonl"):
        raise UsageError(f"the prompts {path}: expected .txt, a prompt a line, or .jsonl, a row with a prompt a line")
    rows = []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as e:
        raise UsageError(f"cannot read the prompts {path}: {e.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig")
            if text.strip():
                rows.append(as_row(json.loads(text) if path.endswith(".jsonl") else text))
        except ValueError as e:
            raise UsageError(f"{path}, line {number}: {e}") from None
    if not rows:
        raise UsageError(f"{path} holds no prompts")
    return rows


def tokens_of(tokenizer, text: str | list[dict], **template) -> list[int]:
    """Token ids of a string, or of chat messages by the tokenizer's template, which writes all special tokens itself."""
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    return tokenizer.apply_chat_template(text, return_dict=True, **template)["input_ids"]


def encode(tokenizer, rows: list[dict]) -> list[Prompt]:
    """Tokenize the prompts, and give every row the columns of all. An assistant's last message is to be gone on with."""
    columns, prompts = dict.fromkeys(key for row in rows for key in row), []
    for row in rows:
        if not isinstance(row["prompt"], str) and not tokenizer.chat_template:
            raise UsageError("the prompts are chat messages and the model's tokenizer has no chat template: give strings")
        go_on = not isinstance(row["prompt"], str) and row["prompt"][-1]["role"] == "assistant"
        ids = tokens_of(tokenizer, row["prompt"], add_generation_prompt=not go_on, continue_final_message=go_on)
        if not ids:
            raise UsageError(f"the prompt {row['prompt']!r} has no token in this tokenizer")
        prompts.append(Prompt({key: row.get(key) for key in columns}, ids))
    return prompts


def reply_text(tokenizer, prompt: Prompt, ids: list[int]) -> str:
    """The reply so that prompt + reply is the whole text. Decoded alone it may lack the space before its first word."""
    if isinstance(prompt.row["prompt"], str):
        start, whole = tokenizer.batch_decode([prompt.ids, prompt.ids + ids], skip_special_tokens=True)
        if whole.startswith(start):
            return whole[len(start):]
    return tokenizer.decode(ids, skip_special_tokens=True)


def left_pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:  # -> [B, P], [B, P]
    """Left-padded token ids and their mask. Any token does for padding, as masks come from lengths: 0."""
    width = max(map(len, rows))
    mask = torch.arange(width) >= width - torch.tensor([len(row) for row in rows]).unsqueeze(1)
    return torch.tensor([[0] * (width - len(row)) + row for row in rows]), mask


def load(kind: str, name: str, flag: str, cfg: Config):
    """Auto{kind} of transformers from a folder or the hub, in float32. Refused if weights lack: they would be random."""
    import transformers

    options = dict(dtype=torch.float32, output_loading_info=True) if kind.startswith("ModelFor") else {}
    auto = getattr(transformers, f"Auto{kind}")
    try:
        loaded = auto.from_pretrained(name, trust_remote_code=cfg.trust_remote_code, **options)
    except Exception as e:
        reason = first_line(e)
        if "trust_remote_code" in str(e):
            reason = "it comes with code of its own: give --trust-remote-code if you trust it"
        raise UsageError(f"--{flag} {name}: {reason}") from None
    if options and loaded[1]["missing_keys"]:
        raise UsageError(f"--{flag} {name}: it holds no {min(loaded[1]['missing_keys'])}, so it is no "
                         f"{kind.replace('ModelFor', '')} model")
    return loaded[0] if options else loaded


def load_reward(spec: str) -> Reward:
    """The function that `path/to/file.py:function` or `module:function` names."""
    path, _, name = spec.rpartition(":")
    try:
        if path.endswith(".py"):
            module_spec = importlib.util.spec_from_file_location(path, path)
            module = sys.modules[path] = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            sys.path.append(os.getcwd())
            module = importlib.import_module(path)
    except Exception as e:
        raise UsageError(f"--reward {spec}: expected FILE.py:FUNCTION or MODULE:FUNCTION, and {path or 'nothing'} cannot be "
                         f"imported: {type(e).__name__}: {e}") from e
    if not callable(getattr(module, name, None)):
        raise UsageError(f"--reward {spec}: {path} has no function {name}")
    return getattr(module, name)


def joined(prompt: str | list[dict], completion: str | list[dict]) -> str | list[dict]:
    """Prompt and reply as one text or chat. A reply that goes on with the assistant's last message joins it."""
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt + completion
    return prompt[:-1] + [prompt[-1] | {"content": prompt[-1]["content"] + completion[0]["content"]}]


def load_reward_model(name: str, chat: bool, device: torch.device, dtype: torch.dtype, cfg: Config) -> Reward:
    """A sequence-classification model as a reward function, with its own tokenizer and chat template.

    It scores prompt and reply together, each text as if alone. Of one too long for it, it sees the first token and the end.
    """
    model = load("ModelForSequenceClassification", name, "reward-model", cfg).to(device).eval()
    tokenizer = load("Tokenizer", name, "reward-model", cfg)
    config = model.config.get_text_config()
    if chat and not tokenizer.chat_template:
        raise UsageError(f"--reward-model {name}: the prompts are chat messages and its tokenizer has no chat template")
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if len(labels) > 1 and cfg.reward_label not in labels:
        raise UsageError(f"--reward-label {cfg.reward_label}: expected one of {', '.join(labels)}, the labels of {name}")
    column = labels.index(cfg.reward_label) if len(labels) > 1 else 0
    longest = min(getattr(config, "max_position_embeddings", None) or math.inf, tokenizer.model_max_length)
    own_pad, told = config.pad_token_id, False

    @torch.inference_mode()
    def score(prompts: list, completions: list, **columns) -> list[float]:
        nonlocal told
        rows = [tokens_of(tokenizer, joined(p, c)) for p, c in zip(prompts, completions)]
        cut = sum(len(row) > longest for row in rows)
        if cut and not told:
            told = True
            print(f"\nreward model {name}: {cut} of {len(rows)} texts are longer than its {longest} tokens and lose their "
                  "beginning (said once)", file=sys.stderr)
        rows = [row if len(row) <= longest else row[:1] + row[len(row) - longest + 1:] for row in rows]
        if own_pad is None:  # a decoder that scores the last token: to find that in a batch it needs a pad token of no text
            config.pad_token_id = min(set(range(config.vocab_size)).difference(*rows), default=None)
        size = 1 if config.pad_token_id is None else cfg.rows_at_once
        scores = torch.zeros(len(rows))
        for index in torch.tensor([len(row) for row in rows]).argsort(stable=True).split(size):
            lengths = torch.tensor([len(rows[i]) for i in index])
            ids = torch.tensor([rows[i] + [config.pad_token_id] * int(lengths.max() - len(rows[i])) for i in index]).to(device)
            attention = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long().to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                scores[index] = model(input_ids=ids, attention_mask=attention).logits[:, column].float().cpu()
        return scores.tolist()

    score.__name__ = Path(name).name
    return score


def judge(rewards: dict[str, Reward], rows: list[dict], completions: list,
          completion_ids: list[list[int]]) -> dict[str, Tensor]:
    """What each reward function says of each reply: {name: [B]}, NaN where it says None, that it does not apply.

    RewardError, naming the reward, the prompt and the reply, for one that raises or gives anything but finite numbers.
    """
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    columns |= {"prompts": [row["prompt"] for row in rows], "completions": completions, "completion_ids": completion_ids}
    told = [f"for the prompt {row['prompt']!r:.500} and the reply {reply!r:.500}" for row, reply in zip(rows, completions)]
    judged = {}
    for name, reward in rewards.items():
        try:
            answers = list(reward(**columns))
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            message = f"reward {name} failed at {Path(where.filename).name}:{where.lineno}: {type(e).__name__}: {e}"
            for i in range(len(rows)):  # one reply at a time, to name the one that does it
                try:
                    list(reward(**{key: x[i:i + 1] for key, x in columns.items()}))
                except Exception:
                    raise RewardError(f"{message}, {told[i]}") from e
            raise RewardError(f"{message}, for a batch of {len(rows)} but for no reply alone") from e
        if len(answers) != len(rows):
            raise RewardError(f"reward {name}: expected {len(rows)} numbers, one a completion, got {len(answers)}")
        answers = [x.item() if hasattr(x, "item") else x for x in answers]  # of NumPy and torch
        for x, what in zip(answers, told):
            if x is not None and not (isinstance(x, (int, float)) and math.isfinite(x)):
                raise RewardError(f"reward {name} gave {x!r:.100} {what}: expected a finite number, or None")
        judged[name] = torch.tensor([math.nan if x is None else float(x) for x in answers])
    return judged


def update_moments(moments: tuple[float, float, float], x: Tensor) -> tuple[float, float, float]:  # [n]
    """(count, mean, sum of squared deviations) of all numbers so far, with those of x (Chan et al. 1983)."""
    count, mean, squares = moments
    total, shift = count + len(x), float(x.mean()) - mean
    squares += float(((x - x.mean()) ** 2).sum()) + shift**2 * count * len(x) / total
    return total, mean + shift * len(x) / total, squares


# ------------------------------------------------------------------- the embedded demo: delete it, and a trainer is left

GOOD = "superb moving charming funny clever".split()
BAD = "dull clumsy boring weak bland".split()
NOUNS = "plot acting music script cast ending dialogue".split()
VERBS = "was felt seemed".split()
ADVERBS = "rather very".split()
LINKS = "and but".split()
CLAUSE = f"the ({'|'.join(NOUNS)}) ({'|'.join(VERBS)})( ({'|'.join(ADVERBS)}))? ({'|'.join(GOOD + BAD)})"
REVIEW = re.compile(f"{CLAUSE}( ({'|'.join(LINKS)}) {CLAUSE})* \\.")
DEMO = dict(num_updates=20, response_length=24, missing_eos_penalty=3.0, kl_coef=0.3, learning_rate=1e-3, target_kl=0.05,
            lr_scheduler_type="linear", warmup_updates=3, reward_weights=(1.0, 0.0))


def sentiment(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """Positive words less negative words in each reply."""
    return [float(sum((word in GOOD) - (word in BAD) for word in text.split())) for text in completions]


def fluency(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """1 if the grammar parses the whole review. Measured with weight 0, never rewarded: it shows reward hacking."""
    return [float(bool(REVIEW.fullmatch(prompt + text))) for prompt, text in zip(prompts, completions)]


def demo_task(seed: int, steps: int = 160):
    """A small Llama trained on film reviews from the grammar: (model, tokenizer, prompts, held-out prompts, rewards)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "the", ".", *NOUNS, *VERBS, *ADVERBS, *LINKS, *GOOD, *BAD]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    lm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.05, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2))

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
    openings += [f"{opening} {adverb}" for opening in openings[len(NOUNS):] for adverb in ADVERBS]
    random.Random(0).shuffle(openings)
    rows = [{"prompt": prompt} for prompt in openings]
    return lm, tokenizer, rows[16:], rows[:16], [sentiment, fluency]


# ----------------------------------------------------------------------------------------------------------------------
# 7. The configuration
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """PPO for language models in one file.

    Without --model, runs the embedded demo, with settings of its own.

    Names are those of TRL's PPOConfig where the thing is the same.

    An "update" is one batch of replies and the PPO epochs on it.
    """
    # The task.
    model: str | None = None  # hub name or folder of a causal language model; None: the embedded demo
    prompts: str | None = None  # .txt, a prompt a line, or .jsonl, rows with "prompt" and reward columns; None: the demo's
    eval_prompts: str | None = None  # file of held-out prompts; None: one prompt in ten is held out, at most 64
    reward: tuple[str, ...] = ()  # FILE.py:FUNCTION or MODULE:FUNCTION: f(prompts, completions, **columns) -> list of floats
    reward_model: tuple[str, ...] = ()  # hub names or folders of sequence-classification models that score prompt and reply
    reward_label: str | None = None  # the label that scores, of a reward model with several; None: it has one
    reward_weights: tuple[float, ...] | None = None  # of --reward, then --reward-model, in the score; 0 measures; None: all 1
    max_prompt_length: int | None = None  # prompts of more tokens are dropped, and counted; None: all must fit the model
    trust_remote_code: bool = False  # let models and tokenizers run code that comes with them

    # Where and how it runs.
    name: str | None = None  # the run is written to RUNS_DIR/NAME; None: time and task
    runs_dir: str = "runs"  # folder of the runs
    save_every: int | None = None  # updates between checkpoints; None: only when interrupted or when a reward fails
    resume: str | None = None  # folder of a run to go on with, under its own settings; None: a new run
    seed: int = 1  # of everything: same seed, same run
    device: str = "auto"  # cpu, cuda, cuda:1, mps, ...; auto: the accelerator that torch reports, else the CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products, weights stay float32; auto: bfloat16 on CUDA
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32: high is TF32 (CUDA), medium oneDNN (CPU)
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, one more forward pass
    profile: bool = False  # at the end, compare the update with the matrix products that this machine reaches

    # Rollout.
    num_updates: int = 100  # updates in all
    batch_size: int = 128  # replies an update, B
    samples_per_prompt: int = 1  # replies to each prompt of an update
    response_length: int = 64  # longest reply, in tokens, T
    temperature: float = 1.0  # of the policy, in sampling and in every log-probability
    stop_token: str | None = None  # one more token that ends a reply; None: the model's EOS tokens only
    missing_eos_penalty: float | None = None  # taken from the score of a reply without a stop token; None: nothing is
    score_clip: float | None = None  # scores are clipped to ± this, after scaling; None: off
    use_score_scaling: bool = False  # divide scores by the standard deviation of all scores so far

    # KL penalty (Ziegler et al. 2019).
    kl_coef: float = 0.05  # β, weight of the KL to the initial model, score units per nat
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # k1 = d, k2 = d²/2, k3 = e^-d - 1 + d, where d = log π - log π_ref
    kl_in: Literal["reward", "loss"] = "reward"  # where β·KL goes: off the reward of each token, or into the loss
    kl_target: float | None = None  # KL, nats a reply, that an adaptive β aims at; None: β is fixed
    kl_horizon: float = 10000.0  # episodes over which the adaptive β moves by about a fifth

    # Advantages.
    gamma: float = 1.0  # γ, discount per token, in [0, 1]
    lam: float = 0.95  # λ of GAE, in [0, 1]: 0 trusts the critic, 1 the returns
    critic_lam: float | None = None  # λ of the critic's targets (VC-PPO); None: the same λ
    whiten_rewards: bool = False  # scale token rewards to variance 1, keeping their mean
    whiten_advantages: bool = True  # scale advantages to mean 0 and variance 1 over the whole batch
    bootstrap_truncated: bool = False  # a reply cut off by its length counts V after it, instead of 0

    # Critic.
    critic: Literal["shared", "separate"] = "shared"  # a head on the policy's trunk, or a trunk of its own too
    critic_model: str | None = None  # where a separate critic starts, a reward model's head included; None: the policy
    critic_lr: float | None = None  # learning rate of what only the critic uses; None: the policy's
    critic_target: Literal["value", "action-value"] = "value"  # V(s), or Q(s, ·) with Σ π·Q as the baseline

    # Update.
    num_ppo_epochs: int = 4  # passes over each batch
    num_mini_batches: int = 4  # optimizer steps a pass
    micro_batch_size: int | None = None  # replies in memory at a time; changes no gradient; None: the whole minibatch
    learning_rate: float = 1e-5  # of AdamW, at its highest
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"  # decay over the updates, to 0
    warmup_updates: int = 0  # updates of linear learning-rate warm-up
    max_grad_norm: float | None = 1.0  # gradient clipping; None: off
    cliprange: float = 0.2  # ε of the ratio
    cliprange_high: float | None = None  # upper ε, if larger (clip-higher, DAPO); None: the same ε
    dual_clip: float | None = None  # c > 1, bound on the loss of negative advantages (arXiv 1912.09729); None: off
    cliprange_value: float | None = 0.2  # ε of the value clip; None: off
    vf_coef: float = 0.1  # c1, weight of the value loss
    ent_coef: float = 0.0  # c2, weight of the entropy bonus
    loss_aggregation: Literal["token", "sequence"] = "token"  # each token, or each reply, weighs the same in a step
    target_kl: float | None = None  # KL(old ‖ new), nats a token, at which an update stops early; None: never
    critic_warmup_updates: int = 0  # first updates, in which only the critic is trained

    @property
    def rows_at_once(self) -> int:  # replies in memory at a time
        return self.micro_batch_size or self.batch_size // self.num_mini_batches

    def check(self) -> None:
        """Raise UsageError for the first setting that cannot be."""
        def need(expected: str, ok: Callable[[float], bool], *flags: str) -> None:
            for flag in flags:
                x = getattr(self, flag)
                if x is not None and not ok(x):
                    raise UsageError(f"--{flag.replace('_', '-')} {x}: expected {expected}")

        need("1 or more", lambda x: x >= 1, "num_updates", "batch_size", "response_length", "num_ppo_epochs",
             "num_mini_batches", "micro_batch_size", "samples_per_prompt", "max_prompt_length", "save_every")
        need("0 or more", lambda x: 0 <= x < math.inf, "seed", "kl_coef", "vf_coef", "ent_coef", "missing_eos_penalty",
             "warmup_updates", "critic_warmup_updates")
        need("a number above 0", lambda x: 0 < x < math.inf, "temperature", "learning_rate", "kl_target", "kl_horizon",
             "max_grad_norm", "cliprange_high", "cliprange_value", "target_kl", "critic_lr", "score_clip")
        need("a number in [0, 1]", lambda x: 0 <= x <= 1, "gamma", "lam", "critic_lam")
        need("a number between 0 and 1", lambda x: 0 < x < 1, "cliprange")
        need(f"at least --batch-size {self.batch_size}", lambda x: x >= self.batch_size, "kl_horizon")
        need("a number above 1", lambda x: 1 < x < math.inf, "dual_clip")
        need(f"a divisor of --batch-size {self.batch_size}", lambda x: self.batch_size % x == 0, "num_mini_batches",
             "samples_per_prompt")
        need("letters, digits and ._+- only", lambda x: re.fullmatch(r"[\w.+-]+", x), "name")
        need("a file that exists", lambda x: Path(x).is_file(), "prompts", "eval_prompts")
        if self.kl_target is not None:
            need("a number above 0 to start from, with --kl-target", lambda x: x > 0, "kl_coef")
        if self.kl_in == "loss":
            need("k2 or k3, with --kl-in loss: as a loss k1 has no gradient on average", lambda x: x != "k1", "kl_estimator")
        if self.critic_model is not None:
            need("separate, with --critic-model", lambda x: x == "separate", "critic")


# ----------------------------------------------------------------------------------------------------------------------
# 8. Training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What is trained, on which prompts, and on what judgement."""
    actor: Actor
    ref: Actor  # the frozen initial policy
    tokenizer: object
    prompts: list[Prompt]
    held_out: list[Prompt]
    rewards: dict[str, Reward]  # by name
    weights: tuple[float, ...]  # of each reward in the score
    stop_ids: list[int]


@dataclass
class State:
    """Where a run stands: what a checkpoint holds beside weights and optimizer. No generator's state: see `reseed`."""
    kl_coef: float
    update: int = 0  # finished updates, so also the learning-rate schedule and the data cursor
    moments: tuple[float, float, float] = (0, 0.0, 0.0)  # of all scores, see `update_moments`
    skipped: int = 0  # optimizer steps in a row that were not finite, counted in whole updates
    before: tuple[dict[str, Tensor], list[str]] = ()  # the evaluation before training


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str):
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def collect(task: Task, prompts: list[Prompt], cfg: Config,
            seconds: dict[str, float]) -> tuple[Rollout, Tensor, dict[str, Tensor], list[str]]:
    """Steps 1 to 3 of an update: (rollout, scores [B], what each reward said {name: [B]}, replies)."""
    with timed(seconds, "generate"):
        queries, query_mask = left_pad([prompt.ids for prompt in prompts])
        with task.actor.autocast():  # around the whole loop, so that weights are cast once
            parts = [generate(task.actor, *rows, cfg.response_length, cfg.temperature, task.stop_ids)
                     for rows in zip(*(x.split(8 * cfg.rows_at_once) for x in (queries, query_mask)))]
        rollout = Rollout(*(torch.cat([vars(part)[name] for part in parts]) for name in list(vars(parts[0]))[:6]))
    if not rollout.sampler_logprobs.isfinite().all():
        raise RunError("the policy's probabilities are not finite: it has diverged; lower --learning-rate")
    with timed(seconds, "reward"):
        rows = [prompt.row for prompt in prompts]
        ids = [response[mask].tolist() for response, mask in zip(rollout.responses, rollout.mask)]
        replies = [reply_text(task.tokenizer, prompt, tokens) for prompt, tokens in zip(prompts, ids)]
        completions = [reply if isinstance(row["prompt"], str) else [{"role": "assistant", "content": reply}]
                       for row, reply in zip(rows, replies)]
        judged = judge(task.rewards, rows, completions, ids)
        scores = sum(weight * judged[name].nan_to_num() for weight, name in zip(task.weights, judged))
    with timed(seconds, "evaluate"):
        evaluate(task.actor, task.ref, rollout, cfg.temperature, cfg.rows_at_once)
    return rollout, scores, judged, replies


def evaluate_held_out(task: Task, cfg: Config) -> tuple[dict[str, Tensor], list[str]]:
    """Replies to all held-out prompts, a batch at least, from the same seed each time: ({quantity: [n]}, replies)."""
    if not task.held_out:
        return {}, []
    reseed(cfg.seed)
    prompts = task.held_out * max(1, cfg.batch_size // len(task.held_out))
    found, replies = defaultdict(list), []
    for i in range(0, len(prompts), cfg.batch_size):
        rollout, scores, judged, texts = collect(task, prompts[i:i + cfg.batch_size], cfg, defaultdict(float))
        replies += texts
        for name, x in {"score": scores, "kl": reply_kl(rollout), **{f"rewards/{k}": v for k, v in judged.items()}}.items():
            found[name].append(x)
    return {name: torch.cat(xs) for name, xs in found.items()}, replies


def reply_kl(rollout: Rollout) -> Tensor:  # -> [B]
    """Σ_t (log π - log π_ref) of each reply: k1, in nats. Of a single reply it may be negative, on average it is not."""
    return torch.where(rollout.mask, kl_estimate(rollout.logprobs, rollout.ref_logprobs), 0.0).sum(1)


def rollout_metrics(rollout: Rollout, scores: Tensor, judged: dict[str, Tensor], kl_coef: float) -> dict[str, float]:
    """What the replies of an update were like: means over replies, or over valid tokens where the thing is a token's."""
    mask, kl = rollout.mask, reply_kl(rollout)
    error, spread = (masked_mean((x - masked_mean(x, mask)) ** 2, mask)
                     for x in (rollout.returns - rollout.predictions, rollout.returns))
    metrics = {
        "objective/scores": scores.mean(), "objective/scores_std": scores.std(correction=0), "objective/kl": kl.mean(),
        "objective/non_score_reward": -kl_coef * kl.mean(), "objective/rlhf_reward": (scores - kl_coef * kl).mean(),
        **{f"rewards/{name}": masked_mean(part, ~part.isnan()) for name, part in judged.items()},
        "reply/length": mask.sum(1).float().mean(), "reply/ended": rollout.ended.float().mean(),
        "policy/entropy": masked_mean(rollout.entropy, mask),
        "policy/sampler_gap": masked_mean((rollout.logprobs - rollout.sampler_logprobs).abs(), mask),
        "val/mean": masked_mean(rollout.values, mask), "val/explained_variance": 1 - error / spread.clamp(min=1e-8)}
    return {name: float(x) for name, x in metrics.items()}


def schedule(update: int, cfg: Config) -> float:
    """Share of the learning rate in update `update`, counted from 0: linear warm-up, then the decay."""
    done = update / cfg.num_updates
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[cfg.lr_scheduler_type]
    return decay * min(1.0, (update + 1) / (cfg.warmup_updates + 1))


def draw(prompts: list, start: int, count: int, seed: int) -> list:
    """`count` prompts from position `start` of an endless stream that passes over them in a new order each time."""
    epochs = range(start // len(prompts), (start + count - 1) // len(prompts) + 1)
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(prompts, len(prompts)) for epoch in epochs}
    return [orders[i // len(prompts)][i % len(prompts)] for i in range(start, start + count)]


def reseed(*parts: int) -> None:
    """Seed Python, NumPy and torch from (seed, update), so that a resume needs no state of any generator."""
    from transformers import set_seed

    set_seed(random.Random(" ".join(map(str, parts))).getrandbits(32))


def keep_freed_memory() -> None:
    """Stop glibc from giving freed tensors back to the system, or the next ones cost their page faults again.

    They were a third of GPT-2's PPO epochs in bfloat16. It holds for the whole process; without glibc nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks too come from the heap,
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which keeps up to 2 GB that are free


def pick_device(cfg: Config) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and the type of matrix products. Sets how the process multiplies in float32 and keeps memory."""
    try:
        best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        device = best if cfg.device == "auto" else torch.device(cfg.device)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # pinned memory and synchronize() go by the current device
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {cfg.device}: expected a device that torch has here, such as cpu") from None
    dtype = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    if device.type == "cpu":
        keep_freed_memory()
    return device, getattr(torch, dtype)


def pick_prompts(cfg: Config, tokenizer, limit: float, prompts: list | None,
                 eval_prompts: list | None) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on and held-out ones, from the arguments or the files, tokenized. limit: the model's, in tokens."""
    rows, held_out = ([as_row(x) for x in given] if given else load_prompts(path) if path else []
                      for given, path in ((prompts, cfg.prompts), (eval_prompts, cfg.eval_prompts)))
    if not held_out:
        rows = random.Random(cfg.seed).sample(rows, len(rows))
        share = min(64, len(rows) // 10)
        held_out, rows = rows[:share], rows[share:]
    encoded = encode(tokenizer, held_out + rows)
    longest = min(max(len(prompt.ids) for prompt in encoded), cfg.max_prompt_length or math.inf)
    if longest + cfg.response_length > limit:
        raise UsageError(f"--response-length {cfg.response_length}: the model takes {limit} tokens in all and prompts have up "
                         f"to {longest}; shorten the replies, or drop long prompts by --max-prompt-length")
    kept = [[prompt for prompt in part if len(prompt.ids) <= (cfg.max_prompt_length or math.inf)]
            for part in (encoded[len(held_out):], encoded[:len(held_out)])]
    dropped = len(encoded) - sum(map(len, kept))
    if not kept[0]:
        raise UsageError(f"--max-prompt-length {cfg.max_prompt_length} leaves no prompt to train on: the shortest has "
                         f"{min(len(prompt.ids) for prompt in encoded)} tokens")
    if dropped:
        print(f"Dropped {dropped} of {len(encoded)} prompts, longer than --max-prompt-length {cfg.max_prompt_length}")
    return tuple(kept)


def make_actors(cfg: Config, model: nn.Module, tokenizer, device: torch.device,
                dtype: torch.dtype) -> tuple[Actor, Actor]:
    """The policy with its critic, and the frozen reference."""
    critic = None
    if cfg.critic == "separate" and cfg.critic_model is None:
        critic = copy.deepcopy(model)
    elif cfg.critic == "separate":
        names = load("Config", cfg.critic_model, "critic-model", cfg).architectures or [""]
        classifier = names[0].endswith("ForSequenceClassification")
        kind = "ModelForSequenceClassification" if classifier else "ModelForCausalLM"
        critic = load(kind, cfg.critic_model, "critic-model", cfg)
        if classifier and getattr(getattr(critic, "score", None), "out_features", None) != 1:
            raise UsageError(f"--critic-model {cfg.critic_model}: expected a decoder with a score head of one label")
        if load("Tokenizer", cfg.critic_model, "critic-model", cfg).get_vocab() != tokenizer.get_vocab():
            raise UsageError(f"--critic-model {cfg.critic_model}: its vocabulary is not the policy's, whose tokens it reads")
    try:
        ref = Actor(copy.deepcopy(model).to(device), dtype).requires_grad_(False)
        actor = Actor(model.to(device), dtype, critic and critic.to(device), cfg.critic_target == "action-value")
    except ValueError as e:
        raise UsageError(str(e)) from None
    if cfg.gradient_checkpointing:
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [module for module in actor.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise UsageError(f"--gradient-checkpointing: {type(model).__name__} has no layers to recompute; leave it out")
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return actor, ref


def prepare(cfg: Config, prompts, reward, model, tokenizer, eval_prompts) -> Task:
    """All that training needs, checked: what is wrong is told before anything is written."""
    device, dtype = pick_device(cfg)
    reseed(cfg.seed)
    if model is None and cfg.model is None:
        if cfg.prompts or cfg.eval_prompts or cfg.reward or cfg.reward_model or prompts or reward:
            raise UsageError("prompts and rewards need a model: give --model too")
        model, tokenizer, prompts, eval_prompts, rewards = demo_task(cfg.seed)
    else:
        rewards = [reward] if callable(reward) else list(reward or map(load_reward, cfg.reward))
        if not (prompts or cfg.prompts) or not (rewards or cfg.reward_model):
            raise UsageError("a model needs prompts and a reward: give --prompts FILE and --reward FILE.py:FUNCTION, "
                             "or --reward-model NAME")
        if tokenizer is None and cfg.model is None:
            raise UsageError("a model needs its tokenizer: pass both")
        model = load("ModelForCausalLM", cfg.model, "model", cfg) if model is None else model
        tokenizer = load("Tokenizer", cfg.model, "model", cfg) if tokenizer is None else tokenizer
    if next(model.parameters()).dtype in (torch.bfloat16, torch.float16):
        model.float()  # half-precision weights would lose most of AdamW's small steps
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    rows, held_out = pick_prompts(cfg, tokenizer, limit, prompts, eval_prompts)
    chat = any(not isinstance(prompt.row["prompt"], str) for prompt in rows + held_out)
    rewards += [load_reward_model(name, chat, device, dtype, cfg) for name in cfg.reward_model]
    weights = (1.0,) * len(rewards) if cfg.reward_weights is None else cfg.reward_weights
    if len(weights) != len(rewards):
        raise UsageError(f"--reward-weights: expected {len(rewards)} of them, one a reward, got {len(weights)}")
    names = [getattr(f, "__name__", type(f).__name__) for f in rewards]
    named = {f"{name}_{i}" if names.count(name) > 1 else name: f for i, (name, f) in enumerate(zip(names, rewards))}

    eos = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    if cfg.stop_token is not None:
        ids = tokenizer.encode(cfg.stop_token, add_special_tokens=False)
        if len(ids) != 1:
            raise UsageError(f"--stop-token {cfg.stop_token!r}: expected one token of this tokenizer, got {len(ids)}")
        stop_ids.add(ids[0])
    actor, ref = make_actors(cfg, model, tokenizer, device, dtype)
    return Task(actor, ref, tokenizer, rows, held_out, named, tuple(weights), sorted(stop_ids))


@contextlib.contextmanager
def finish_on_signal():
    """Yields a list that the first Ctrl-C or SIGTERM is appended to: finish the update in hand. A second stops at once."""
    asked = []

    def ask(number: int, frame) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print(f"\n{signal.Signals(number).name}: finishing the update in hand; once more to stop at once", file=sys.stderr)

    old = {}
    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def one_update(task: Task, optimizer: torch.optim.Optimizer, state: State,
               cfg: Config) -> tuple[dict[str, float], list[dict]]:
    """Steps 1 to 5 of the algorithm, and the state after them: (metrics, a few samples)."""
    reseed(cfg.seed, state.update)
    seconds = defaultdict(float)
    count = cfg.batch_size // cfg.samples_per_prompt
    prompts = draw(task.prompts, state.update * count, count, cfg.seed)
    prompts = [prompt for prompt in prompts for _ in range(cfg.samples_per_prompt)]
    rollout, scores, judged, replies = collect(task, prompts, cfg, seconds)
    moments, shaped = state.moments, scores
    if cfg.use_score_scaling:
        moments = update_moments(moments, scores)
        shaped = shaped / ((moments[2] / moments[0]) ** 0.5 or 1.0)
    if cfg.score_clip is not None:
        shaped = shaped.clamp(-cfg.score_clip, cfg.score_clip)
    credit(rollout, shaped, state.kl_coef, cfg)
    for group, rate in zip(optimizer.param_groups, (cfg.learning_rate, cfg.critic_lr or cfg.learning_rate)):
        group["lr"] = rate * schedule(state.update, cfg)
    with timed(seconds, "update"):
        critic_only = state.update < cfg.critic_warmup_updates
        stats = ppo_update(task.actor, optimizer, rollout, state.kl_coef, cfg, critic_only)
    epochs = stats["policy/steps"] / cfg.num_mini_batches
    metrics = {"update": state.update + 1, "episode": (state.update + 1) * cfg.batch_size,
               "lr": optimizer.param_groups[0]["lr"], "kl_coef": state.kl_coef,
               **rollout_metrics(rollout, scores, judged, state.kl_coef), **stats,
               "perf/tokens_per_second": int(rollout.mask.sum()) / sum(seconds.values()),
               "perf/rollout_tokens_per_second": int(rollout.mask.sum()) / seconds["generate"],
               "perf/update_tokens_per_second": epochs * int(rollout.query_mask.sum() + rollout.mask.sum()) / seconds["update"],
               "perf/update_flops_per_second": epochs * flops(task.actor, rollout, critic_only) / seconds["update"],
               **{f"time/{name}": x for name, x in seconds.items()}}
    samples = [{"update": state.update + 1, **prompt.row, "reply": reply, "score": float(score), "kl": float(kl)}
               for prompt, reply, score, kl in zip(prompts[:4], replies, scores, reply_kl(rollout))]

    state.update, state.moments = state.update + 1, moments
    state.skipped = state.skipped + stats["policy/skipped_steps"] if stats["policy/steps"] == 0 else 0
    if cfg.kl_target is not None:
        kl = metrics["objective/kl"]
        state.kl_coef = adaptive_kl_coef(state.kl_coef, kl, cfg.kl_target, cfg.kl_horizon, cfg.batch_size)
    return metrics, samples


def train(cfg: Config, prompts: list | None = None, reward: Reward | list[Reward] | None = None,
          model: nn.Module | None = None, tokenizer=None, eval_prompts: list | None = None) -> Path:
    """Run PPO and return the folder of the run. What is not passed comes from cfg. The demo is train(Config(**DEMO)).

    prompts, eval_prompts: strings, or dicts with "prompt" and columns for the reward. reward: one or several functions
    f(prompts, completions, **columns) -> list of floats. model, tokenizer: of transformers; the model is trained in place.
    Raises UsageError, before anything is written, for what cannot be; RunError for what stops a run that has begun;
    KeyboardInterrupt, with the run saved, after the update in which Ctrl-C or SIGTERM came.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # one progress bar, ours
    logging.disable_progress_bar()
    seconds = defaultdict(float)
    cfg.check()
    kind = Path(cfg.model).name if cfg.model else "demo" if model is None else type(model).__name__
    run = Path(cfg.resume or Path(cfg.runs_dir) / (cfg.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}"))
    if cfg.resume:
        refuse_changes(run, dataclasses.asdict(read_config(run)[0]), dataclasses.asdict(cfg))
    elif run.exists():
        raise UsageError(f"{run} exists and is not overwritten: give another --name, or go on with it by --resume {run}")
    print(f"PPO on {kind}: {cfg.num_updates} updates of {cfg.batch_size} replies of up to {cfg.response_length} tokens, "
          f"written to {run}", flush=True)
    with timed(seconds, "setup"):
        task = prepare(cfg, prompts, reward, model, tokenizer, eval_prompts)
        critic = [p for name, p in task.actor.named_parameters() if not name.startswith("lm.")]
        optimizer = torch.optim.AdamW([{"params": task.actor.lm.parameters()}, {"params": critic}], eps=1e-5,
                                      weight_decay=0.0, fused=task.actor.device.type in ("cpu", "cuda"))
        state = resume(run, cfg, task, optimizer) if cfg.resume else start(run, cfg, task)
    board = tensorboard(run, state.update)
    try:
        with finish_on_signal() as asked, progress(cfg.num_updates, state.update) as bar:
            if not state.before:
                bar.set_postfix_str("held-out prompts, before")
                with timed(seconds, "held-out"):
                    state.before = evaluate_held_out(task, cfg)
                record(run, board, {"update": 0} | eval_metrics(state.before[0]))
            while state.update < cfg.num_updates and not asked:
                metrics, samples = one_update(task, optimizer, state, cfg)
                record(run, board, metrics, samples)
                for name in ("generate", "reward", "evaluate", "update"):
                    seconds[name] += metrics[f"time/{name}"]
                bar.set_postfix_str(f"score {metrics['objective/scores']:.2f}, KL {metrics['objective/kl']:.1f}, "
                                    f"{metrics['perf/tokens_per_second']:.0f} tokens/s", refresh=False)
                bar.update()
                if state.skipped >= 3:
                    raise RunError(f"the loss or the gradient was not finite in {state.skipped} optimizer steps in a row, up "
                                   f"to update {state.update}, with scores of {metrics['objective/scores']:.3g} on average")
                if cfg.save_every and (state.update % cfg.save_every == 0 or state.update == cfg.num_updates):
                    with timed(seconds, "save"):
                        save_checkpoint(run, task, optimizer, state)
            if not asked:
                with timed(seconds, "held-out"):
                    after = evaluate_held_out(task, cfg)
            if asked:
                save_checkpoint(run, task, optimizer, state)
                bar.close()
                print(f"Stopped by {signal.Signals(asked[0]).name} after update {state.update}; {way_on(run)}")
                raise KeyboardInterrupt(*asked)
            record(run, board, {"update": state.update} | eval_metrics(after[0]))
            with whole(run / "policy") as folder:
                task.actor.lm.save_pretrained(folder)
                task.tokenizer.save_pretrained(folder)
    except RunError as e:
        if isinstance(e, RewardError) and state.before:
            save_checkpoint(run, task, optimizer, state)
        raise RunError(f"{e}; {way_on(run)}") from e
    history = [row for row in map(json.loads, open(run / "metrics.jsonl", encoding="utf-8")) if "objective/scores" in row]
    write_curves(run / "curves.svg", history)
    report(run, task.held_out, state.before, after, history, seconds, performance(task.actor, history, cfg))
    return run


# ----------------------------------------------------------------------------------------------------------------------
# 9. What a run leaves, and the command line
# ----------------------------------------------------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "samples.jsonl")
MAY_CHANGE = ("num_updates", "save_every", "micro_batch_size", "gradient_checkpointing", "device", "profile",
              "resume")  # on a resume


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk, where the system lets us."""
    if os.name == "posix":
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def whole(folder: Path):
    """Yields a temporary folder that becomes `folder` once all of it is on the disk; otherwise nothing changes."""
    temporary = folder.with_name("unfinished")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        sync(folder.parent)
    except Exception as e:  # OSError, and what safetensors and torch make of it
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"cannot write {folder}: {first_line(e)}") from e


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("[0-9]*"))


def way_on(run: Path) -> str:
    """How to resume, in words."""
    if not checkpoints(run):
        return f"there is no checkpoint yet (see --save-every): python ppo_llm.py --resume {run} begins anew"
    return f"to go on from {checkpoints(run)[-1]}: python ppo_llm.py --resume {run}"


def digest(tensors: dict[str, Tensor]) -> str:
    """Tells other weights, or damaged ones."""
    hashes = [(name, torch.hash_tensor(x.cpu()).item()) for name, x in sorted(tensors.items())]
    return hashlib.sha256(str(hashes).encode()).hexdigest()


def save_checkpoint(run: Path, task: Task, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write run/checkpoints/UPDATE whole or not at all, then drop all but the last two."""
    from safetensors.torch import save_file

    folder = run / "checkpoints" / f"{state.update:06d}"
    if not folder.exists():
        with whole(folder) as temporary:
            for name in LOGS:
                sync(run / name)
            weights = task.actor.state_dict()
            critic = {name: x.contiguous() for name, x in weights.items() if not name.startswith("lm.")}
            save_file(critic, temporary / "critic.safetensors")
            task.actor.lm.save_pretrained(temporary / "policy")
            task.tokenizer.save_pretrained(temporary / "policy")
            torch.save({"state": vars(state), "optimizer": optimizer.state_dict(), "digest": digest(weights),
                        "logs": {name: (run / name).stat().st_size for name in LOGS}}, temporary / "state.pt")
    for old in checkpoints(run)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def read_config(run: Path | str) -> tuple[Config, dict]:
    """The settings of a run, and all of its config.json."""
    try:
        about = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        return Config(**{name: tuple(x) if isinstance(x, list) else x for name, x in about["config"].items()}), about
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"--resume {run}: expected the folder of a run of this ppo_llm.py ({type(e).__name__}: {e})") from None


def identity(task: Task) -> dict[str, str]:
    """What must be the same on a resume, beside the settings."""
    prompts = hashlib.sha256(str([prompt.ids for prompt in task.prompts + task.held_out]).encode()).hexdigest()
    return {"initial model": digest(task.ref.lm.state_dict()), "prompts": prompts}


def start(run: Path, cfg: Config, task: Task) -> State:
    """A new folder with all that is needed to run it again in config.json."""
    import transformers

    commit = None
    if shutil.which("git"):
        command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    about = {"config": dataclasses.asdict(cfg), "command": sys.argv, "git_commit": commit or None,
             "device": str(task.actor.device), "dtype": str(task.actor.dtype),
             "parameters": sum(p.numel() for p in task.actor.parameters()),
             "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                          "transformers": transformers.__version__}, "sha256": identity(task)}
    try:
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as e:
        raise UsageError(f"cannot create {run}: {e.strerror}; give another --runs-dir or --name") from None
    return State(cfg.kl_coef)


def refuse_changes(run: Path, there: dict, here: dict) -> None:
    """UsageError that names each setting, or the model or prompts, in which a resumed run would differ from before."""
    changed = [f"{name} was {there.get(name)} and is {x}" for name, x in here.items()
               if x != there.get(name) and name not in MAY_CHANGE]
    if changed:
        raise UsageError(f"--resume {run}: {'; '.join(changed)}; only {', '.join(MAY_CHANGE[:-1])} may change")


def resume(run: Path, cfg: Config, task: Task, optimizer: torch.optim.Optimizer) -> State:
    """The state of the run's last checkpoint, with the logs cut back to it; the beginning if it has none."""
    from safetensors.torch import load_file

    refuse_changes(run, read_config(run)[1]["sha256"], identity(task))
    state, logs = State(cfg.kl_coef), dict.fromkeys(LOGS, 0)
    if checkpoints(run):
        last = checkpoints(run)[-1]
        try:
            policy = type(task.actor.lm).from_pretrained(last / "policy", dtype=next(task.actor.lm.parameters()).dtype)
            weights = load_file(last / "critic.safetensors") | {f"lm.{name}": x for name, x in policy.state_dict().items()}
            saved = torch.load(last / "state.pt", map_location="cpu", weights_only=True)
            if digest(weights) != saved["digest"]:
                raise ValueError("the weights are not those that were saved")
            task.actor.load_state_dict(weights)
            optimizer.load_state_dict(saved["optimizer"])
            state, logs = State(**saved["state"]), saved["logs"]
        except Exception as e:
            raise UsageError(f"{last} is damaged or of another program ({type(e).__name__}: {first_line(e)}); remove it to go "
                             "on from what is before it") from e
    if (run / "policy").exists() and (state.update == 0 or state.update >= cfg.num_updates):
        raise UsageError(f"--resume {run}: the run is complete" + (
            "; to go on, give a larger --num-updates" if state.update else " and has no checkpoint to go on from"))
    for name, size in logs.items():
        with open(run / name, "ab") as f:
            if f.tell() < size:
                raise UsageError(f"{run / name} is shorter than at the last checkpoint: put it back, or begin anew")
            f.truncate(size)
    return state


def flops(actor: Actor, rollout: Rollout, critic_only: bool = False) -> float:
    """FLOPs that an epoch on a rollout needs: 2 a weight and token forward, 4 backward, and attention to the past.

    Padding, recomputation and the optimizer are not in it; of a mixture every expert is.
    """
    lengths = (rollout.query_mask.sum(1) + rollout.mask.sum(1)).double() - 1  # the last token predicts nothing
    total = 0.0 if critic_only else 6 * float(rollout.mask.sum()) * actor.lm.get_output_embeddings().weight.numel()
    frozen = critic_only and actor.critic_trunk is None  # a head alone learns, on the policy's states
    trunks = (actor.critic_trunk,) if critic_only and not frozen else (actor.lm.base_model, actor.critic_trunk)
    for trunk in filter(None, trunks):
        config, decoder = trunk.config.get_text_config(), trunk.get_decoder()  # of a model that also sees, what reads
        embeddings = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Embedding))
        weights = sum(p.numel() for p in decoder.parameters() if p.ndim > 1) - embeddings
        attention = config.num_hidden_layers * config.hidden_size * lengths**2  # two products, half of each
        total += (2 if frozen else 6) * float((weights * lengths + attention).sum())
    return total


def matmul_flops_per_second(actor: Actor, tokens: int) -> float:
    """What a matrix product reaches on hidden states of so many tokens, as in a layer's MLP: the median of 9."""
    width = actor.value_head.in_features
    a, b = (torch.randn(shape, dtype=actor.dtype, device=actor.device) for shape in ((tokens, width), (width, 4 * width)))
    wait = torch.accelerator.synchronize if actor.device.type != "cpu" else lambda: None
    one, repeats, rates = 2 * a.numel() * b.shape[1], 1, []
    while len(rates) < 9:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait()
        spent = time.perf_counter() - start
        if spent < 0.05:
            repeats *= 2
        else:
            rates.append(repeats * one / spent)
    return statistics.median(rates)


def peak_memory(device: torch.device) -> float:
    """Most bytes that tensors held on the GPU so far; without one, that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return math.nan
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def performance(actor: Actor, history: list[dict], cfg: Config) -> str:
    """How fast the updates were, medians, and the memory that they took."""
    rollout, update, done = (statistics.median(row[f"perf/{name}_per_second"] for row in history)
                             for name in ("rollout_tokens", "update_tokens", "update_flops"))
    text = f"Rollout {rollout:.0f} tokens/s, update {update:.0f} tokens/s at {done / 1e12:.3g} TFLOP/s"
    if cfg.profile:
        reached = matmul_flops_per_second(actor, cfg.rows_at_once * cfg.response_length)
        text += f" ({done / reached:.0%} of the {reached / 1e12:.3g} that a matrix product reaches)"
    return f"{text}, memory {peak_memory(actor.device) / 1e9:.2f} GB"


def progress(total: int, done: int = 0):
    """A bar on a terminal, a line every half minute in a log."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, dynamic_ncols=True, mininterval=0.1 if sys.stderr.isatty() else 30,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]")


def mean_and_error(x: Tensor) -> tuple[float, float]:
    """Mean of n numbers and its standard error, s/√n. NaN is no number."""
    x = x[~x.isnan()] if (~x.isnan()).any() else torch.zeros(1)
    return float(x.mean()), float(x.var(correction=0) / max(1, len(x) - 1)) ** 0.5


def eval_metrics(result: dict[str, Tensor]) -> dict[str, float]:
    return {f"eval/{name}{suffix}": y for name, x in result.items() for suffix, y in zip(("", "_se"), mean_and_error(x))}


def record(run: Path, board, metrics: dict[str, float], samples: list[dict] = []) -> None:
    """Append to the logs. A row is on the disk, or with the system, before the next update begins."""
    try:
        for name, rows in zip(LOGS, ([metrics], samples)):
            with open(run / name, "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    except OSError as e:
        raise RunError(f"cannot write to {run / name}: {e.strerror}") from e
    if board is not None:
        for name, x in metrics.items():
            board.add_scalar(name, x, metrics["update"])


def tensorboard(run: Path, update: int):
    """A writer of TensorBoard events where tensorboard is installed, else None."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run, purge_step=update + 1 if update else None)


def write_curves(path: Path, history: list[dict]) -> None:
    """The learning curves as a picture: a panel for the score, the KL, and each reward that is not all of the score."""
    names = ["objective/scores", "objective/kl"]
    names += [name for name in history[0] if name.startswith("rewards/")
              and any(row[name] != row["objective/scores"] for row in history)]
    panels = []
    for i, name in enumerate(names):
        ys = [row[name] for row in history]
        low, high = min(0.0, *ys), max(0.0, *ys, min(ys) + 1e-9)
        points = " ".join(f"{50 + 170 * k / max(1, len(ys) - 1):.1f},{120 - 80 * (y - low) / (high - low):.1f}"
                          for k, y in enumerate(ys))
        panels.append(f'<g transform="translate({240 * i},0)"><text x="50" y="24" font-weight="bold">{html.escape(name)}</text>'
                      f'<path d="M50 40V120H220" fill="none" stroke="#999"/>'
                      f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/>'
                      f'<text x="45" y="44" text-anchor="end">{high:.2f}</text>'
                      f'<text x="45" y="120" text-anchor="end">{low:.2f}</text>'
                      f'<text x="220" y="136" text-anchor="end">update {history[-1]["update"]}</text></g>')
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {240 * len(names)} 145" '
                    f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
                    f'{"".join(panels)}</svg>\n', encoding="utf-8")


def sparkline(ys: list[float], width: int = 40) -> str:
    """The course of ys as one character each, averaged in groups where there are more than `width`."""
    size = math.ceil(len(ys) / width)
    ys = [sum(ys[i:i + size]) / len(ys[i:i + size]) for i in range(0, len(ys), size)]
    low, high = min(ys), max(ys)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (y - low) / (high - low))] if high > low else "▁" for y in ys)


def report(run: Path, held_out: list[Prompt], before, after, history: list[dict], seconds: dict[str, float],
           speed: str) -> None:
    """What the terminal shows at the end."""
    width = min(120, shutil.get_terminal_size().columns)
    if after[1]:
        print("\nHeld-out prompts, same seed:")
        for prompt, old, new in list(zip(held_out, before[1], after[1]))[:4]:
            text = prompt.row["prompt"]
            text = text if isinstance(text, str) else str(text[-1]["content"])
            print(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="  "))
            for label, text in (("before", old), ("after", new)):
                print(textwrap.fill(text.strip(), width, initial_indent=f"    {label:8}", subsequent_indent=" " * 12))
        print(f"\nHeld-out evaluation ({len(after[1])} replies)  {'before':>16}  {'after':>16}")
        for name in after[0]:
            cells = ["{:.2f} ± {:.2f}".format(*mean_and_error(result[0][name])) for result in (before, after)]
            print(f"  {name:32}  {cells[0]:>16}  {cells[1]:>16}")
    print("\nLearning curves")
    for label, name in (("score", "objective/scores"), ("KL, nats a reply", "objective/kl")):
        ys = [row[name] for row in history]
        print(f"  {label:18}{sparkline(ys)}  {ys[0]:.2f} → {ys[-1]:.2f}")
    phases = ", ".join(f"{name} {x:.1f}" for name, x in seconds.items())
    print()
    for line in (f"Time {sum(seconds.values()):.1f} s: {phases}", speed):
        print(textwrap.fill(line, width, subsequent_indent="  "))
    print(f"\nLoad the policy   AutoModelForCausalLM.from_pretrained('{run}/policy')")
    board = f", or: tensorboard --logdir {run.parent}" if importlib.util.find_spec("tensorboard") else ""
    print(f"Open the curves   {run}/curves.svg{board}")


def parse(argv: list[str]) -> Config:
    """The command line as a Config. What tyro refuses is told in one line."""
    import tyro

    given = {arg.partition("=")[0]: arg.partition("=")[2] or after for arg, after in zip(argv, [*argv[1:], ""])}
    if "--resume" in given:
        defaults = read_config(given["--resume"])[0]
    else:
        defaults = Config() if {"--model", "-h", "--help"} & given.keys() else Config(**DEMO)
    refused = io.StringIO()
    try:
        with contextlib.redirect_stderr(refused):
            return tyro.cli(Config, args=argv, default=defaults)
    except SystemExit as e:
        lines = [line.strip("│ ") for line in refused.getvalue().splitlines()[1:-1]]
        if e.code:
            message = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines))
            raise UsageError(f"{message} (see --help)") from None
        raise


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 bad usage, 130 interrupted, 143 terminated."""
    with contextlib.suppress(AttributeError):  # a notebook's output cannot
        sys.stdout.reconfigure(errors="replace")  # an encoding without arrows must not end a run
    try:
        cfg = parse(sys.argv[1:] if argv is None else argv)
        cfg.check()
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
