"""Facts about PPO that `ppo_llm.py` must keep: run `pytest`, or `pytest -m "not slow"` for the quick part.

The sections mirror the source. The first, on the mathematics, can be read as its specification: it is tested in
float64, on ragged batches whose padding holds NaN, inf and huge numbers, against brute force, theorems or values worked
out by hand. Errors are largest absolute differences.
"""

import ast
import atexit
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_llm as P
from ppo_llm import Config, PPOConfig, Prompt, Rollout, State

settings.register_profile("ppo", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ppo")

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
REAL = torch.float64


def real(numbers):
    return torch.tensor(numbers, dtype=REAL)


def decimals(low, high):
    return st.floats(low, high).map(lambda x: round(x, 3))


CASE = {}  # what a control of the museum wants of the cases below, by name

number = decimals(-4, 4).map(lambda x: 0.0 if CASE.get("zero") else x)
positive = decimals(0.05, 4)
fraction = decimals(0, 1)


def lists(elements, size):
    return st.lists(elements, min_size=size, max_size=size)


def vectors(size):
    return lists(number, size).map(real)


@st.composite
def masks(draw, shortest=0, holes=False):
    """[B, T] response masks of ragged replies, with empty and full rows; on request any boolean pattern."""
    B = draw(st.integers(1, 3))
    T = CASE.get("T") or draw(st.integers(1, 5))
    if CASE.get("full"):
        mask = torch.ones(B, T, dtype=torch.bool)
    elif holes:
        row = lists(st.booleans(), T)
        mask = torch.tensor(draw(lists(row, B)))
    else:
        lengths = draw(lists(st.integers(shortest, T), B))
        mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    event(f"{int(mask.sum())} valid cells")
    return mask


def cells(draw, mask, elements=number, garbage=True):
    """A tensor for the mask: drawn numbers on valid cells, at times all the same, and garbage on the others."""
    x = torch.zeros(mask.shape, dtype=REAL)
    if garbage:
        fill = [math.nan, math.inf, -math.inf, -1e300]
        x += draw(st.sampled_from(fill))
    n = int(mask.sum())
    different = lists(elements, n)
    same = elements.map(lambda c: [c] * n)
    x[mask] = real(draw(different | same))
    return x


def error(x, y):
    """Largest absolute difference; where either is NaN, the error is infinite."""
    x = torch.as_tensor(x, dtype=REAL).detach()
    y = torch.as_tensor(y, dtype=REAL).detach()
    assert x.shape == y.shape
    differences = (x - y).abs().nan_to_num(math.inf)
    return max(differences.flatten().tolist(), default=0.0)


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def average(x):
    """The mean of a vector, 0 if it is empty."""
    return x.sum(dtype=REAL) / max(1, len(x))


# --------------------------------------------------------------------------------------------------- 1. the mathematics


@given(st.data(), st.integers(1, 3), st.integers(1, 6))
def test_response_mask_is_a_naive_loop(data, B, T):
    """True up to the first stop token, which is part of the reply; True everywhere if there is none."""
    ids = st.integers(0, 3)
    stop_ids = CASE.get("stop", data.draw(st.lists(ids, max_size=2)))
    row = lists(ids, T)
    responses = data.draw(lists(row, B))
    mask = P.response_mask(torch.tensor(responses), stop_ids)
    for response, kept in zip(responses, mask.tolist()):
        stopped = False
        for token, valid in zip(response, kept):
            assert valid == (not stopped)
            stopped = stopped or token in stop_ids


@given(st.data(), masks(holes=True))
def test_masked_mean_is_over_valid_cells_only(data, mask):
    """0 if there are none. With weights it is the weighted sum over the valid cells."""
    x = cells(data.draw, mask)
    weights = cells(data.draw, mask, positive)
    assert error(P.masked_mean(x, mask), average(x[mask])) < 1e-12
    assert error(P.masked_mean(x, mask, weights), x[mask] @ weights[mask]) < 1e-12


@given(st.data(), masks(holes=True), positive, number)
def test_whitening_is_standard_and_affine_invariant(data, mask, scale, shift):
    """(x - mean) / √(variance + 1e-8): mean 0, variance 1, and the same for ax + b, but for the 1e-8.

    One cell, or equal cells, become 0. shift_mean=False adds the mean again.
    """
    x = cells(data.draw, mask)
    mean = average(x[mask])
    centered = x[mask] - mean
    variance = average(centered**2)

    white = P.masked_whiten(x, mask)
    assert error(white[mask], centered / (variance + 1e-8).sqrt()) < 1e-10
    assert error(average(white[mask]), 0) < 1e-10
    assert error(average(white[mask] ** 2), variance / (variance + 1e-8)) < 1e-10
    assert not white[~mask].any()

    with_mean = P.masked_whiten(x, mask, shift_mean=False)
    assert error(with_mean[mask], white[mask] + mean) < 1e-10
    assert not with_mean[~mask].any()

    affine = P.masked_whiten(scale * x + shift, mask)
    floor = 1e-8 / scale**2
    assert error(affine[mask], centered / (variance + floor).sqrt()) < 1e-9


def test_masked_whiten_worked_by_hand():
    """1, 3 and 8: mean 4, variance (9 + 1 + 16) / 3 = 26/3, deviation 2.943920.

    So the result is -3, -1 and 4 over 2.943920; and that plus 4.
    """
    x = real([[1.0, math.nan], [3.0, 8.0]])
    mask = x.isfinite()
    white = P.masked_whiten(x, mask)
    with_mean = P.masked_whiten(x, mask, shift_mean=False)
    assert error(white, [[-1.0190493, 0], [-0.3396831, 1.3587324]]) < 1e-7
    assert error(with_mean, [[2.9809507, 0], [3.6603169, 5.3587324]]) < 1e-7


@given(st.lists(number, min_size=2, max_size=5), positive, number)
def test_logprobs_and_entropy_from_logits(row, temperature, shift):
    """log softmax(logits / temperature), whatever is added to all logits; its entropy. The default temperature is 1."""
    V = len(row)
    tokens = torch.arange(V)
    logits = real(row).expand(V, V)  # the same logits for every token
    powers = [math.exp(x / temperature) for x in row]
    expected = [math.log(x / sum(powers)) for x in powers]
    entropy = -sum(math.exp(x) * x for x in expected)

    assert error(P.logprobs_from_logits(logits, tokens, temperature), expected) < 1e-10
    assert error(P.logprobs_from_logits(logits + shift, tokens, temperature), expected) < 1e-10
    assert error(P.entropy_from_logits(logits, temperature), [entropy] * V) < 1e-10

    at_1 = logits.log_softmax(1)
    assert error(P.logprobs_from_logits(logits[0], tokens[0]), at_1[0, 0]) < 1e-12
    entropy_at_1 = -(at_1.exp() * at_1).sum(1)
    assert error(P.entropy_from_logits(logits), entropy_at_1) < 1e-12
    uniform = real([shift] * V)
    assert error(P.entropy_from_logits(uniform), math.log(V)) < 1e-12


def test_a_token_that_cannot_come_adds_nothing_to_the_entropy():
    """A logit of -inf: 0·log 0 is 0, its limit, and the gradient is that of the other tokens."""
    logits = real([1.0, -math.inf, 0.3]).requires_grad_()
    others = real([1.0, 0.3]).requires_grad_()
    entropy = P.entropy_from_logits(logits)
    expected = P.entropy_from_logits(others)
    assert error(entropy, expected) < 1e-12
    slope = gradient(expected, others)
    assert error(gradient(entropy, logits), [slope[0], 0, slope[1]]) < 1e-12


@given(st.data(), st.integers(2, 5))
def test_kl_estimators_are_unbiased_by_enumeration(data, V):
    """E over tokens from π: k1 and k3 give KL(π ‖ ref) = E[d] exactly, k2 gives E[d²]/2, where d = log π - log ref.

    The mean of k1 is never negative, though one k1 may be; k2 and k3 never are.
    """
    policy = data.draw(vectors(V)).log_softmax(0)
    ref = data.draw(vectors(V)).log_softmax(0)
    d = policy - ref
    p = policy.exp()
    k1 = P.kl_estimate(policy, ref, "k1")
    k2 = P.kl_estimate(policy, ref, "k2")
    k3 = P.kl_estimate(policy, ref, "k3")
    assert error(p @ k1, p @ d) < 1e-12
    assert error(p @ k2, p @ d**2 / 2) < 1e-12
    assert error(p @ k3, p @ d) < 1e-12
    assert p @ k1 > -1e-12
    assert (k2 >= 0).all()
    assert (k3 >= -1e-15).all()
    assert error(P.kl_estimate(policy, ref), k1) == 0


def test_kl_estimate_worked_by_hand():
    """π = ½, ref = ¼: d = ln 2, k1 = d = 0.693147, k2 = d²/2 = 0.240227, k3 = ½ - 1 + d = 0.193147.

    π = ¼, ref = ½: d = -ln 2, k1 = -0.693147, k2 = 0.240227, k3 = 2 - 1 - 0.693147 = 0.306853.
    """
    policy = real([[0.5, 0.25]]).log()
    ref = real([[0.25, 0.5]]).log()
    assert error(P.kl_estimate(policy, ref, "k1"), [[0.693147, -0.693147]]) < 1e-6
    assert error(P.kl_estimate(policy, ref, "k2"), [[0.240227, 0.240227]]) < 1e-6
    assert error(P.kl_estimate(policy, ref, "k3"), [[0.193147, 0.306853]]) < 1e-6
    with pytest.raises(ValueError, match="k4"):
        P.kl_estimate(policy, ref, "k4")


def test_kl_gradients_as_the_docstring_says():
    """As loss terms, on policy: k2 has the gradient of KL(π ‖ ref), k1 expected gradient 0, k3 that of KL(ref ‖ π)."""
    theta = real([0.3, -0.7, 1.1]).requires_grad_()
    policy = theta.log_softmax(0)
    ref = real([-0.2, 0.5, 0.4]).log_softmax(0)
    kl_to_ref = (policy.exp() * (policy - ref)).sum()
    kl_from_ref = (ref.exp() * (ref - policy)).sum()

    def expected_gradient(kind):
        sampled_with = policy.exp().detach()
        return gradient(sampled_with @ P.kl_estimate(policy, ref, kind), theta)

    assert error(expected_gradient("k1"), [0, 0, 0]) < 1e-12
    assert error(expected_gradient("k2"), gradient(kl_to_ref, theta)) < 1e-12
    assert error(expected_gradient("k3"), gradient(kl_from_ref, theta)) < 1e-12


def test_adaptive_kl_coef():
    """β rests at the target, here 6, follows the sign of the relative error, in proportion up to 20%, and no faster."""
    def change(kl):
        return P.adaptive_kl_coef(0.2, kl, target=6.0, horizon=1000, episodes=100) / 0.2 - 1

    assert change(6.0) == 0
    assert error(change(6.6), 0.1 * 100 / 1000) < 1e-12
    assert error(change(60.0), 0.2 * 100 / 1000) < 1e-12
    assert error(change(5.4), -0.1 * 100 / 1000) < 1e-12
    assert error(change(-1.0), -0.2 * 100 / 1000) < 1e-12


@given(st.data(), masks(holes=True), positive)
def test_token_rewards_sum_to_score_less_kl(data, mask, kl_coef):
    """Each valid token pays β·KL, the last of a reply also gets the score, and masked cells get 0."""
    kl = cells(data.draw, mask)
    scores = data.draw(vectors(len(mask)))
    rewards = P.token_rewards(scores, kl, mask, kl_coef)
    assert not rewards[~mask].any()
    for b, row in enumerate(mask):
        expected = -kl_coef * kl[b, row]
        total = expected.sum()
        if row.any():
            expected[-1] += scores[b]
            total += scores[b]
        assert error(rewards[b, row], expected) < 1e-12
        assert error(rewards[b].sum(), total) < 1e-12


def td_errors(rewards, values, gamma, bootstrap):
    """δ_t = r_t + γ·V_{t+1} - V_t of one reply."""
    next_values = values[1:] + [bootstrap]
    return [r + gamma * after - v for r, v, after in zip(rewards, values, next_values)]


def discounted_sums(x, factor):
    """Σ_k factor^k x_{t+k} for every t, in O(T²)."""
    return [sum(factor**k * y for k, y in enumerate(x[t:])) for t in range(len(x))]


def gae_by_definition(rewards, values, gamma, lam, bootstrap):
    """A_t = Σ_l (γλ)^l δ_{t+l} of one reply, arXiv 1506.02438 eq. 16."""
    return discounted_sums(td_errors(rewards, values, gamma, bootstrap), gamma * lam)


@given(st.data(), masks(holes=True), fraction, fraction)
def test_gae_is_its_definition(data, mask, gamma, lam):
    """On the valid cells of each row, wherever they are; masked cells of the results are 0."""
    rewards = cells(data.draw, mask)
    values = cells(data.draw, mask)
    bootstrap = data.draw(st.none() | vectors(len(mask)))
    advantages, returns = P.gae(rewards, values, mask, gamma, lam, bootstrap)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    for b, row in enumerate(mask):
        last = 0.0 if bootstrap is None else bootstrap[b].item()
        r = rewards[b, row].tolist()
        v = values[b, row].tolist()
        expected = real(gae_by_definition(r, v, gamma, lam, last))
        assert error(advantages[b, row], expected) < 1e-10
        assert error(returns[b, row], expected + values[b, row]) < 1e-10


def test_gae_worked_by_hand():
    """γ = λ = ½. A reply of three tokens that ended: δ = 1 + ½·1 - ½ = 1, 0 + ½·1 - 1 = -½, 2 - 1 = 1.

    So A = 1 - ¼·¼ = 0.9375, -½ + ¼·1 = -0.25, 1. A reply of two tokens, cut off in a state worth 4:
    δ = 0 + ½·0 - 2 = -2, 1 + ½·4 - 0 = 3, so A = -2 + ¼·3 = -1.25, 3. The returns are A + V.
    """
    rewards = real([[1.0, 0.0, 2.0], [0.0, 1.0, math.nan]])
    values = real([[0.5, 1.0, 1.0], [2.0, 0.0, math.inf]])
    mask = rewards.isfinite()
    bootstrap = real([0.0, 4.0])
    advantages, returns = P.gae(rewards, values, mask, 0.5, 0.5, bootstrap)
    assert error(advantages, [[0.9375, -0.25, 1], [-1.25, 3, 0]]) < 1e-12
    assert error(returns, [[1.4375, 0.75, 2], [0.75, 3, 0]]) < 1e-12


@given(st.data(), masks(shortest=1), fraction)
def test_gae_at_its_ends(data, mask, gamma):
    """λ = 0 gives the TD error, λ = 1 the discounted return. The defaults: γ = 1, λ = 0.95, nothing after a reply."""
    rewards = cells(data.draw, mask)
    values = cells(data.draw, mask)
    advantages_at_0, _ = P.gae(rewards, values, mask, gamma, lam=0.0)
    _, returns_at_1 = P.gae(rewards, values, mask, gamma, lam=1.0)
    for b, row in enumerate(mask):
        r = rewards[b, row].tolist()
        v = values[b, row].tolist()
        assert error(advantages_at_0[b, row], td_errors(r, v, gamma, 0.0)) < 1e-12
        assert error(returns_at_1[b, row], discounted_sums(r, gamma)) < 1e-10
    default, _ = P.gae(rewards, values, mask)
    nothing_after = torch.zeros(len(mask))
    explicit, _ = P.gae(rewards, values, mask, P.PPOConfig.gamma, P.PPOConfig.lam, nothing_after)
    assert error(default, explicit) == 0


@given(st.data(), masks(), fraction, fraction, number)
def test_gae_is_linear_and_blind_to_potential_shaping(data, mask, gamma, lam, scale):
    """gae(ar + r', av + v') = a·gae(r, v) + gae(r', v').

    γΦ(s_{t+1}) - Φ(s_t) added to the rewards, and Φ taken off the values, change no advantage (Ng et al. 1999).
    """
    def advantages(rewards, values):
        return P.gae(rewards, values, mask, gamma, lam)[0]

    r1, v1, r2, v2, potential = (cells(data.draw, mask, garbage=False) for _ in range(5))
    combined = scale * advantages(r1, v1) + advantages(r2, v2)
    assert error(advantages(scale * r1 + r2, scale * v1 + v2), combined) < 1e-9

    next_potential = torch.nn.functional.pad(potential[:, 1:], (0, 1))
    shaping = gamma * next_potential - potential
    assert error(advantages(r1 + shaping, v1 - potential), advantages(r1, v1)) < 1e-9


@given(st.data(), masks(shortest=1), fraction, fraction)
def test_a_reply_may_be_cut_where_the_critic_is_right(data, mask, gamma, lam):
    """Where all later TD errors are 0, the advantages before are those of the reply cut there, V bootstrapped."""
    rewards, values = (cells(data.draw, mask, garbage=False) for _ in range(2))
    cut = data.draw(st.integers(1, mask.shape[1]))
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    rewards[:, cut:] = (values - gamma * next_values)[:, cut:]
    whole, _ = P.gae(rewards, values, mask, gamma, lam)
    after = torch.where(mask[:, cut], values[:, cut], 0.0) if cut < mask.shape[1] else None
    part, _ = P.gae(rewards[:, :cut], values[:, :cut], mask[:, :cut], gamma, lam, after)
    assert error(whole[:, :cut], part) < 1e-10
    assert error(whole[:, cut:], torch.zeros_like(whole[:, cut:])) < 1e-10


@given(st.data(), masks(holes=True))
def test_policy_loss_by_brute_force(data, mask):
    """-ΣρA/N, where ρ counts at most as 1 + ε_high if A > 0, and from 1 - ε_low to dual_clip if A < 0.

    Where ρ is beyond one of these bounds, the gradient is exactly 0; elsewhere it is -ρA/N.
    """
    old = cells(data.draw, mask)
    log_ratio = cells(data.draw, mask) / 4  # ratios from e^-1 to e
    new = (old + log_ratio).requires_grad_()
    advantages = cells(data.draw, mask)
    low = data.draw(st.floats(0.05, 0.5))
    cliprange_high = data.draw(st.none() | st.floats(0.05, 0.9))
    dual_clip = data.draw(st.none() | st.floats(1.1, 3))
    clips = low, cliprange_high, dual_clip
    loss, stats = P.policy_loss(new, old, advantages, mask, *clips)

    high = cliprange_high or low
    bound = dual_clip or math.inf
    ratio = (new - old)[mask].detach().exp()  # new - old is not log_ratio to the last bit
    A = advantages[mask]
    too_high = (ratio > 1 + high) & (A > 0)
    too_low = (ratio < 1 - low) & (A < 0)
    beyond_dual = (ratio > bound) & (A < 0)
    counted = ratio.clone()
    counted[too_high] = 1 + high
    counted[too_low] = 1 - low
    counted[beyond_dual] = bound
    clipped = too_high | too_low
    event(f"{int(clipped.sum())} clipped")
    assert error(loss, -average(counted * A)) < 1e-10
    assert error(stats["policy/ratio"], average(ratio)) < 1e-10
    assert error(stats["policy/approxkl"], average(ratio - 1 - ratio.log())) < 1e-10
    assert error(stats["policy/clipfrac"], average(clipped)) < 1e-12

    slope = gradient(loss, new)
    flat = clipped | beyond_dual
    expected = torch.where(flat, 0.0, -ratio * A / len(A))
    assert error(slope[mask], expected) < 1e-10
    assert not slope[mask][flat].any()
    assert not slope[~mask].any()


@given(st.data(), masks(holes=True))
def test_the_surrogate_is_a_pessimistic_bound(data, mask):
    """It never promises more than the objective without a clip, PPO eq. 6, and is that objective as ε grows."""
    old, new, advantages = (cells(data.draw, mask) / 4 for _ in range(3))
    unclipped = average((new - old)[mask].exp() * advantages[mask])
    for cliprange in (0.05, 0.2, 0.9):
        assert -P.policy_loss(new, old, advantages, mask, cliprange)[0] <= unclipped + 1e-12
    assert error(-P.policy_loss(new, old, advantages, mask, 1e9)[0], unclipped) < 1e-12


@given(st.floats(-1, 1).filter(bool), number.filter(lambda a: abs(a) > 0.01))
@example(math.log(1.5), 1.0)
@example(math.log(0.5), -1.0)
def test_policy_loss_at_a_tie(log_ratio, advantage):
    """ρ on the very edge of its range: both arguments of the minimum are ρA, nothing is clipped, the gradient flows."""
    new = real([[log_ratio]]).requires_grad_()
    ratio = new.exp().item()
    cliprange = abs(ratio - 1)
    assume(ratio in (1 - cliprange, 1 + cliprange))  # in floating point too
    old = real([[0.0]])
    mask = torch.tensor([[True]])
    loss, stats = P.policy_loss(new, old, real([[advantage]]), mask, cliprange)
    assert error(loss, -ratio * advantage) < 1e-12
    assert stats["policy/clipfrac"] == 0
    assert error(gradient(loss, new), [[-ratio * advantage]]) < 1e-12


def test_policy_loss_worked_by_hand():
    """ε = 0.2: the four objectives are 2.4, -0.8, -3 and 1.1, their mean -0.075, the loss 0.075.

    ρ = 1.5, A = 2: min(3, 2.4) = 2.4. ρ = 0.5, A = -1: min(-0.5, -0.8) = -0.8. ρ = 1.5, A = -2: min(-3, -2.4) = -3.
    ρ = 1.1, A = 1: inside, 1.1. The gradient is -ρA/4 where no clip is active.
    """
    new = real([[1.5, 0.5, 1.5, 1.1]]).log().requires_grad_()
    old = torch.zeros(1, 4)
    advantages = real([[2.0, -1.0, -2.0, 1.0]])
    arguments = new, old, advantages, new.isfinite()
    loss, stats = P.policy_loss(*arguments)
    assert error(loss, 0.075) < 1e-12
    assert error(stats["policy/clipfrac"], 0.5) < 1e-12
    assert error(gradient(loss, new), [[0, 0, 0.75, -0.275]]) < 1e-12
    loss, _ = P.policy_loss(*arguments, dual_clip=1.25)
    assert error(loss, -(2.4 - 0.8 - 2.5 + 1.1) / 4) < 1e-12
    loss, _ = P.policy_loss(*arguments, cliprange_high=0.3)
    assert error(loss, -(2.6 - 0.8 - 3 + 1.1) / 4) < 1e-12
    weights = real([[1.0, 0.0, 0.0, 2.0]])
    loss, _ = P.policy_loss(*arguments, weights=weights)
    assert error(loss, -(2.4 + 2 * 1.1)) < 1e-12


@given(st.data(), masks(holes=True), st.none() | st.floats(0.05, 1))
def test_value_loss_by_brute_force(data, mask, cliprange_value):
    """½ mean of the larger square, so at least ½ MSE; the gradient is exactly 0 where the clipped error is larger."""
    new = cells(data.draw, mask)
    old = cells(data.draw, mask)
    returns = cells(data.draw, mask)
    new.requires_grad_()
    loss, stats = P.value_loss(new, old, returns, mask, cliprange_value)

    bound = cliprange_value or math.inf
    v = new[mask].detach()
    o = old[mask]
    miss = v - returns[mask]
    clipped_miss = v.clamp(o - bound, o + bound) - returns[mask]
    gap = clipped_miss.abs() - miss.abs()
    clipped = gap > 0
    event(f"{int(clipped.sum())} clipped")
    larger = torch.where(clipped, clipped_miss, miss)
    assert error(loss, average(larger**2) / 2) < 1e-10
    assert loss >= average(miss**2) / 2 - 1e-12

    distance = (v - o).abs()
    edges = (distance - bound).abs() < 1e-9
    ties = (distance > bound) & (gap.abs() < 1e-9)
    assume(not edges.any())  # there, and where the two squares are the same, the loss has a kink
    assume(not ties.any())
    assert error(stats["val/clipfrac"], average(clipped)) < 1e-12
    slope = gradient(loss, new)
    expected = torch.where(clipped, 0.0, miss / len(v))
    assert error(slope[mask], expected) < 1e-10
    assert not slope[mask][clipped].any()
    assert not slope[~mask].any()


@given(st.data(), masks(holes=True))
def test_a_wide_value_clip_is_none(data, mask):
    """Then the loss is ½ MSE."""
    new, old, returns = (cells(data.draw, mask) for _ in range(3))
    mse = average((new - returns)[mask] ** 2)
    for cliprange_value in (1e9, None):
        assert error(P.value_loss(new, old, returns, mask, cliprange_value)[0], mse / 2) < 1e-12


@given(st.integers(-8, 8), st.integers(-4, 4).filter(bool), number)
@example(0, 1, 1.0)
@example(0, -1, 1.0)
def test_value_loss_at_a_tie(old, change, target):
    """V on the very edge of its range, in floating point too: nothing is clipped, the whole gradient flows."""
    old = real([[old / 4]])  # quarters are exact
    new = (old + change / 4).requires_grad_()
    cliprange_value = abs(change / 4)
    mask = torch.tensor([[True]])
    loss, stats = P.value_loss(new, old, real([[target]]), mask, cliprange_value)
    miss = new.item() - target
    assert error(loss, miss**2 / 2) < 1e-12
    assert stats["val/clipfrac"] == 0
    assert error(gradient(loss, new), [[miss]]) < 1e-12


def test_value_loss_worked_by_hand():
    """ε = 0.2, V_old = 0, R = 1: the larger squares are 0.64, 0.81 and 4, half their mean 5.45 / 6.

    V = 1: the clipped 0.2 errs by 0.8, and 0.64 > 0. V = 0.1: inside, 0.81. V = -1: 4 > 1.44.
    """
    new = real([[1.0, 0.1, -1.0]]).requires_grad_()
    old = real([[0.0, 0.0, 0.0]])
    returns = real([[1.0, 1.0, 1.0]])
    arguments = new, old, returns, new.isfinite(), 0.2
    loss, _ = P.value_loss(*arguments)
    assert error(loss, 5.45 / 6) < 1e-12
    assert error(gradient(loss, new), [[0, -0.3, -2 / 3]]) < 1e-12
    weights = real([[0.0, 1.0, 0.0]])
    loss, _ = P.value_loss(*arguments, weights=weights)
    assert error(loss, 0.81 / 2) < 1e-12


def test_a_value_inside_the_clip_range_is_not_clipped_in_float32():
    """-0.09 + (0.04 + 0.09) is not 0.04 there: the clip bounds the value, not its difference to the old one."""
    new = torch.tensor([[0.04]])
    old = torch.tensor([[-0.09]])
    returns = torch.tensor([[1.0]])
    _, stats = P.value_loss(new, old, returns, new.isfinite(), 0.2)
    assert stats["val/clipfrac"] == 0


def test_a_batch_without_a_token_is_0_everywhere():
    """Means, losses, rewards, advantages, and every gradient; what the cells hold is never looked at."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), math.nan, dtype=REAL, requires_grad=True)
    losses = [P.policy_loss(x, x, x, mask)[0], P.value_loss(x, x, x, mask)[0], P.masked_mean(x, mask)]
    for loss in losses:
        assert loss == 0
        assert not gradient(loss, x).any()
    scores = real([1.0, 2.0])
    for result in (P.masked_whiten(x, mask), P.token_rewards(scores, x, mask, 0.1), *P.gae(x, x, mask)):
        assert not result.any()


def test_extreme_values_stay_finite():
    """Logits of ±1000, ratios of e^±50 with either sign of the advantage, a value 1e6 off, whitening around 1e6."""
    logits = real([1000.0, 0.0, -1000.0])
    logprobs = P.logprobs_from_logits(logits.expand(3, 3), torch.arange(3))
    assert error(logprobs, [0, -1000, -2000]) < 1e-9
    assert error(P.entropy_from_logits(logits), 0) < 1e-12

    new = real([[50.0, -50.0, -50.0]]).requires_grad_()
    advantages = real([[1.0, -1.0, 1.0]])
    mask = new.isfinite()
    loss, _ = P.policy_loss(new, torch.zeros(1, 3), advantages, mask)
    assert error(loss, -(1.2 - 0.8 + math.exp(-50)) / 3) < 1e-9
    assert error(gradient(loss, new), [[0, 0, 0]]) < 1e-20

    value = real([[1e6]])
    target = real([[1.0]])
    loss, _ = P.value_loss(value, torch.zeros(1, 1), target, target.isfinite(), 0.2)
    assert error(loss, (1e6 - 1) ** 2 / 2) < 1e-3

    x = real([[1e6, 1e6 + 1, 1e6 + 2]])
    assert error(P.masked_whiten(x, mask), [[-(1.5**0.5), 0, 1.5**0.5]]) < 1e-6


# ----------------------------------------------------------------------------------------- what the tests are made with

KINDS = ["gpt2", "llama"]
EXACT = {"gpt2": 1e-9, "llama": 2e-5}  # Llama's norms compute in float32 whatever the weights are
CRITICS = [("shared", "value"), ("shared", "action-value"), ("separate", "value"), ("separate", "action-value")]
STOP = 2


def tiny(kind="gpt2", V=7, seed=0, **settings):
    """A random float64 language model with large weights, so that its distributions are far from uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings |= dict(vocab_size=V, bos_token_id=None, eos_token_id=STOP)
    if kind == "gpt2":
        settings = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3) | settings
        config = GPT2Config(**settings)
        return GPT2LMHeadModel(config).double()
    settings |= dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(max_position_embeddings=32, initializer_range=0.4, **settings)
    return LlamaForCausalLM(config).double()


def tiny_actor(kind="gpt2", V=7, seed=0, critic=CRITICS[0]):
    """An actor whose value head is random too. critic: one of CRITICS."""
    trunk, target = critic
    V = CASE.get("V", V)
    own = tiny(kind, V, seed + 5) if trunk == "separate" else None
    actor = P.Actor(tiny(kind, V, seed), critic=own, action_values=target == "action-value")
    for p in actor.value_head.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    return actor


def prompts_of(lengths, V=7, seed=0):
    """Random prompts of these lengths, left-padded, and their mask. What pads, token 3, is content elsewhere."""
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    mask |= "full" in CASE
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(CASE.get("least", 0), CASE.get("V", V), mask.shape, generator=random)
    return ids.masked_fill(~mask, 3 % V), mask


def settings_of(**changes):
    """Settings of a small update, some of them changed."""
    usual = dict(batch_size=8, num_mini_batches=2, num_ppo_epochs=2, response_length=6)
    usual |= dict(whiten_advantages=False, temperature=0.8, target_kl=None)
    return PPOConfig(**usual | changes | CASE.get("settings", {}))


def replies_to(actor, lengths, cfg, stop_ids=(STOP,), seed=0):
    """A rollout of sampled replies to random prompts of these lengths, not evaluated yet."""
    prompts = [Prompt(row[mask].tolist()) for row, mask in zip(*prompts_of(lengths, seed=seed))]
    torch.manual_seed(seed)
    return P.sample_replies(actor, prompts, list(CASE.get("stop", stop_ids)), cfg)


def experience(kind="gpt2", lengths=(3, 1, 2, 5, 4, 2, 3, 1), cfg=None, seed=0, critic=CRITICS[0]):
    """An actor, another model as the reference, and a complete rollout of sampled replies with random scores."""
    cfg = cfg or settings_of()
    actor = tiny_actor(kind, seed=seed, critic=critic)
    ref = tiny_actor(kind, seed=seed + ("same" not in CASE))
    rollout = replies_to(actor, lengths, cfg, seed=seed)
    P.fill_logprobs_and_values(actor, ref, rollout, cfg)
    P.compute_advantages(rollout, torch.randn(len(lengths), dtype=REAL), State(cfg.kl_coef), cfg)
    return actor, ref, rollout


def whole(rollout):
    """All replies as one micro-batch."""
    return rollout.select(torch.arange(len(rollout.mask)))


def each_reply(rollout):
    """The tokens of each prompt and of the reply to it, without padding."""
    for query, query_mask, reply in zip(rollout.queries, rollout.query_mask, rollout.replies()):
        yield query[query_mask].tolist(), reply


def each_reply_and_its_numbers(rollout):
    """The same, and what the rollout says of the reply: [T] for each [B, T], [] for each [B]."""
    names = [name for name, x in vars(rollout).items() if x is not None and name not in ("queries", "query_mask")]
    for b, (prompt, reply) in enumerate(each_reply(rollout)):
        rows = {name: getattr(rollout, name)[b] for name in names}
        yield prompt, reply, SimpleNamespace(**{name: x[: len(reply)] if x.ndim else x for name, x in rows.items()})


def distributions(lm, prompt, reply, temperature):
    """log π of every token in each state of the reply, by the model's own forward: [T + 1, V]"""
    logits = lm(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 :]
    return (logits / temperature).log_softmax(-1)


def alone(lm, prompt, reply, temperature):
    """log π of a reply by the model's own forward: no padding, no cache, no other replies in the batch: [T]"""
    index = torch.tensor(reply).unsqueeze(1)
    return distributions(lm, prompt, reply, temperature)[:-1].gather(1, index).squeeze(1)


def weights_of(module):
    """All its weights, copied into one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def gradients(loss, module):
    """The gradient of the loss in all weights of the module, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def ppo_steps(actor, rollout, cfg, lr=0.0, seed=0, **options):
    """One PPO update with plain gradient descent. Returns its metrics."""
    optimizer = torch.optim.SGD(actor.parameters(), lr=lr)
    torch.manual_seed(seed)
    return P.ppo_update(actor, optimizer, rollout, cfg.kl_coef, cfg, **options)


def assert_same(outcome, other, tolerance):
    """Two updates led to the same weights and reported the same metrics."""
    assert error(outcome[0], other[0]) < tolerance
    assert outcome[1] == pytest.approx(other[1], abs=tolerance)


def policy_and_critic(actor):
    """The parameters of the policy, and those that only the critic uses."""
    policy = list(actor.lm.parameters())
    critic = [p for name, p in actor.named_parameters() if not name.startswith("lm.")]
    return policy, critic


def watched(patch, owner, name, note):
    """A list. Each call of the function `name` from now on adds to it what `note` says of the arguments."""
    notes = []
    function = getattr(owner, name)

    def watching(*arguments):
        notes.append(note(*arguments))
        return function(*arguments)

    patch.setattr(owner, name, watching)
    return notes


SHAPE = dict(vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
SHAPE |= dict(max_position_embeddings=32, initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=STOP)
GROUPED = SHAPE | dict(num_key_value_heads=1)
GPT2 = dict(vocab_size=7, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.4)
EYES = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
WINDOW = GROUPED | dict(head_dim=8, sliding_window=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MODELS = {  # kind: settings of its config
    "GPT2": GPT2 | dict(bos_token_id=None, eos_token_id=STOP),
    "Llama": GROUPED,
    "Qwen3": GROUPED | dict(head_dim=8),
    "Mistral": GROUPED | dict(sliding_window=4),
    "Gemma3Text": WINDOW | dict(layer_types=["sliding_attention", "full_attention"]),
    "Phi3": GROUPED,
    "OPT": SHAPE | dict(ffn_dim=16, word_embed_proj_dim=8, init_std=0.4),
    "GPTNeoX": SHAPE,
    "Gemma2": WINDOW | dict(final_logit_softcapping=0.5),
    "Cohere": GROUPED | dict(logit_scale=0.3),
    "Granite": GROUPED | dict(logits_scaling=5.0),
    "Mixtral": GROUPED | dict(num_local_experts=4),
    "Gemma3": dict(text_config=WINDOW, vision_config=EYES),  # it also sees
    "Qwen3Moe": GROUPED | dict(head_dim=8) | EXPERTS,
}
MODELS_APART = {"Llama4Text": GROUPED | dict(head_dim=8, intermediate_size_mlp=16, num_local_experts=2)}
for unknown_to_opt in ("intermediate_size", "initializer_range"):
    del MODELS["OPT"][unknown_to_opt]


def model_of(kind, seed=0, head="ForCausalLM"):
    """A random float32 model of this kind."""
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, kind + "Config")(**(MODELS | MODELS_APART)[kind])
    return getattr(transformers, "AutoModel" + head).from_config(config).float()


# ---------------------------------------------------------------------------------------------------------- 2. the data


def test_select_trims_and_loses_nothing():
    """A micro-batch is cut to its longest prompt and reply; what is left of each reply is what it was."""
    _, _, rollout = experience()
    replies = list(each_reply(rollout))
    for index in rollout.groups(torch.arange(8), 3):
        part = rollout.select(index)
        mask = rollout.mask[index]
        assert part.queries.shape[1] == rollout.query_mask[index].sum(1).max()
        assert part.mask.shape[1] == mask.sum(1).max()
        assert list(each_reply(part)) == [replies[i] for i in index]
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
            before = getattr(rollout, name)[index][mask]
            assert torch.equal(getattr(part, name)[part.mask], before)
        assert torch.equal(part.valid, part.mask.flatten().nonzero().squeeze(1))
        assert torch.equal(part.final_values, rollout.final_values[index])


@pytest.mark.parametrize("longest_prompt", [3, 64])
@pytest.mark.parametrize("size", [256, 20])
def test_micro_batches_hold_replies_of_like_length(size, longest_prompt):
    """Sorted by length, of prompt and reply together. A group ends where it is full, or where the next reply would make
    it pad more than 128 tokens (8192 on a GPU), prompts on the left and replies on the right: so none pads more."""
    random = torch.Generator().manual_seed(0)
    replies = torch.empty(256).geometric_(1 / 8, generator=random).clamp(max=64).long()
    prompts = torch.randint(1, longest_prompt + 1, (256,), generator=random)
    mask = torch.arange(64) < replies.unsqueeze(1)
    query_mask = (torch.arange(longest_prompt) < prompts.unsqueeze(1)).flip(1)
    rollout = Rollout(query_mask.long(), query_mask, mask.long(), mask, mask.any(1), mask)
    index = torch.randperm(256, generator=random)[:200]
    groups = rollout.groups(index, size)
    in_order = torch.cat(groups)
    assert sorted(in_order.tolist()) == sorted(index.tolist())
    assert ((prompts + replies)[in_order].diff() >= 0).all()

    def padding(group):
        part = rollout.select(group)
        return (~part.query_mask).sum() + (~part.mask).sum()

    assert max(len(group) for group in groups) <= size
    assert max(padding(group) for group in groups) <= 128
    for group, following in itertools.pairwise(groups):
        assert len(group) == size or padding(torch.cat([group, following[:1]])) > 128


@pytest.mark.parametrize("device, affordable", [("cpu", 128), ("cuda", 8192)])
def test_padding_that_costs_as_much_as_a_pass_is_the_most(device, affordable):
    """A reply of one token joins one that is as many tokens longer, and not one that is a token longer still."""
    for longer, groups in ((affordable, 1), (affordable + 1, 2)):
        mask = torch.arange(longer + 1) < torch.tensor([[1], [longer + 1]])
        rollout = Rollout(mask, mask[:, :1], mask.long(), mask, mask.any(1), mask)
        assert len(rollout.groups(torch.arange(2), 2, device)) == groups


# ------------------------------------------------------------------------------------- 3. the actor with its value head


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_every_logprob_is_the_models_own(kind, temperature):
    """The sampler (cached, left-padded, stopped replies dropped) and the scorer (one padded forward pass) say what the
    bare model says of one reply at a time. So left padding, other replies in the batch and the cache change nothing,
    and the temperature is in all of them."""
    cfg = settings_of(temperature=temperature, response_length=12)
    actor, ref, rollout = experience(kind, lengths=(1, 6, 3, 2, 2, 5, 1, 4) * 3, cfg=cfg)
    assert len(rollout.mask.sum(1).unique()) > 1
    assert 0 < rollout.ended.sum() < 24
    for prompt, reply, said in each_reply_and_its_numbers(rollout):
        own = alone(actor.lm, prompt, reply, temperature)
        assert error(said.logprobs, own) < EXACT[kind]
        assert error(said.sampler_logprobs, own) < EXACT[kind]
        assert error(said.ref_logprobs, alone(ref.lm, prompt, reply, temperature)) < EXACT[kind]
    for x in (rollout.logprobs, rollout.ref_logprobs, rollout.sampler_logprobs):
        assert not x[~rollout.mask].any()


def test_training_computes_an_entropy_only_for_its_bonus(monkeypatch):
    """It costs as much as the log-probabilities, and without the bonus no gradient needs it."""
    for ent_coef, calls in ((0.0, 0), (0.1, 1)):
        cfg = settings_of(ent_coef=ent_coef)
        actor, _, rollout = experience(cfg=cfg)
        rollout.token_weights = rollout.mask.to(REAL)
        asked = watched(monkeypatch, P, "entropy_from_logits", lambda logits, temperature: len(logits))
        P.ppo_loss(actor, whole(rollout), 0.05, cfg)
        assert len(asked) == calls


def test_logits_in_chunks_are_the_same_with_the_same_gradient(monkeypatch):
    """All tokens at once, three at a time or one: the log-probabilities, the entropies and their gradients are the
    same."""
    actor, _, rollout = experience()
    batch = whole(rollout)
    n = len(batch.valid)
    assert actor.tokens_at_once == P.LOGITS_AT_ONCE // 7
    sizes = watched(monkeypatch, P.Actor, "logits", lambda actor, states: len(states))
    results = []
    for at_once in (n, 3, 1):
        sizes.clear()
        actor.tokens_at_once = at_once
        states = actor.states(actor.lm.base_model, batch)[:, :-1]
        logprobs, entropy = actor.logprobs(states, batch, 0.8, with_entropy=True)
        slopes = gradients(logprobs.sum() + (entropy**2).sum(), actor.lm)
        assert max(sizes) == at_once
        assert sum(sizes) == (
            n if at_once == n else 2 * n
        )  # only if there are several does the backward pass repeat them
        assert entropy[batch.mask].min() > 0
        results.append((logprobs, entropy, slopes))
        without, zeros = actor.logprobs(states, batch, 0.8, with_entropy=False)
        assert error(without, logprobs) == 0
        assert not zeros.any()
    for chunked in results[1:]:
        for got, expected in zip(chunked, results[0]):
            assert error(got, expected) < 1e-9


@pytest.mark.parametrize("critic", CRITICS)
def test_what_the_critic_says(critic):
    """The baseline is V(s), or Σ_a π(a|s)·Q(s, a) at the temperature. The critic is trained on V(s_t), or Q(s_t,
    a_t). All as the bare model says of one reply at a time; here with the logits in chunks, and for the state after
    the reply too."""
    actor, _, rollout = experience(critic=critic)
    actor.tokens_at_once = 4
    with pytest.MonkeyPatch.context() as patch:
        sizes = watched(patch, P.Actor, "logits", lambda actor, states: len(states))
        P.fill_logprobs_and_values(actor, actor, rollout, settings_of())
    assert max(sizes) == 4
    assert rollout.values[rollout.mask].std() > 0.1
    trunk = actor.critic_trunk or actor.lm.base_model
    for prompt, reply, said in each_reply_and_its_numbers(rollout):
        states = trunk(torch.tensor([prompt + reply])).last_hidden_state[0, len(prompt) - 1 :]
        outputs = actor.value_head(states)  # [T + 1, 1 or V]
        values = outputs[:, 0]
        predictions = values[:-1]
        if critic[1] == "action-value":
            pi = distributions(actor.lm, prompt, reply, 0.8).exp()
            values = (pi * outputs).sum(1)
            predictions = outputs[range(len(reply)), reply]
        assert error(said.values, values[:-1]) < 1e-9
        assert error(said.final_values, values[-1]) < 1e-9
        assert error(said.predictions, predictions) < 1e-9


def test_a_q_that_is_the_same_for_every_token_is_v():
    """Then Σ_a π(a|s)·Q(s, a) is that number, whatever π is."""
    actor, _, rollout = experience(critic=("shared", "action-value"))
    head = actor.value_head
    head.weight.data[:] = head.weight.data[0].clone()
    head.bias.data[:] = head.bias.data[0].clone()
    P.fill_logprobs_and_values(actor, actor, rollout, settings_of())
    assert error(rollout.predictions[rollout.mask], rollout.values[rollout.mask]) < 1e-12
    assert rollout.values[rollout.mask].std() > 0.1


def test_a_chunk_has_one_token_at_least(monkeypatch):
    monkeypatch.setattr(P, "LOGITS_AT_ONCE", 1)
    assert P.Actor(tiny()).tokens_at_once == 1


def test_a_critic_is_one_number_unless_asked_for_action_values():
    """At the start it says 0: the first advantages are plain returns."""
    assert P.Actor(tiny()).value_head.out_features == 1
    actor = P.Actor(tiny(), action_values=True)
    assert actor.value_head.out_features == 7
    assert not weights_of(actor.value_head).any()


def test_bfloat16_is_for_matrix_products_only():
    """Under autocast the logits differ by rounding from the model's own and come as float32, over float32 weights.
    Without it they are its own."""
    lm = tiny().float()
    exact = P.Actor(lm)
    rounded = P.Actor(lm, torch.bfloat16)
    ids = prompts_of([6, 6])[0]
    with torch.no_grad():
        own = lm(ids).logits
        plain, cast = (actor.logits(actor.trunk(lm.base_model, ids, torch.ones(2, 6))) for actor in (exact, rounded))
    assert error(own, plain) < 1e-5
    assert 1e-3 < error(own, cast) < 0.1 * own.std()
    assert cast.dtype == torch.float32
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


def test_logits_are_not_rounded_to_bfloat16(dtype=torch.bfloat16):
    """Logits around -100, as GPT-2 has them, where bfloat16 numbers are 0.5 apart: log π would err by 0.1."""
    actor = P.Actor(tiny().float(), dtype)
    head = actor.lm.get_output_embeddings().weight.data
    head[:, 0] = -1
    states = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    states[:, 0] = 100
    exact = (states.double() @ head.double().T).log_softmax(1)
    assert error(actor.logits(states).detach().log_softmax(1), exact) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused(dtype):
    """Of the policy, and of a critic of its own."""
    for models in ([tiny().to(dtype)], [tiny().float(), torch.float32, tiny().to(dtype)]):
        with pytest.raises(ValueError, match=f"weights in {dtype}: expected float32"):
            P.Actor(*models)


def test_the_value_head_is_as_wide_as_what_it_reads():
    assert P.Actor(tiny().float(), critic=model_of("OPT")).value_head.in_features == 8  # its trunk ends in 8, not in 16


def test_a_rollout_rounds_each_weight_once():
    """In bfloat16, decoding one token after the other from float32 weights would spend most of its time on rounding
    them."""
    lm = tiny().float()
    names = {p.data_ptr(): name for name, p in lm.named_parameters()}
    casts = Counter()

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
                casts[names.get(args[0].data_ptr())] += 1
            return func(*args, **(kwargs or {}))

    actor = P.Actor(lm, torch.bfloat16)
    cfg = settings_of(micro_batch_size=1, response_length=8)
    with Casts():
        P.generate(actor, *prompts_of([2] * 16), [STOP], cfg)  # two groups
    del casts[None]
    assert len(casts) > 4
    assert set(casts.values()) == {1}


def test_the_cache_holds_what_matrix_products_read(monkeypatch):
    """Under autocast rotary embeddings return float32, and a cache that keeps it takes twice the memory."""
    from transformers import DynamicCache

    kept = watched(monkeypatch, DynamicCache, "update", lambda cache, keys, values, *_: (keys.dtype, values.dtype))
    actor = P.Actor(model_of("Llama"), torch.bfloat16)
    P.generate(actor, *prompts_of([2] * 4), [], settings_of())
    assert set(kept) == {(torch.bfloat16, torch.bfloat16)}


# ------------------------------------------------------------------------------------------------------- 4. the rollout


def test_replies_stop_where_the_first_stop_token_is(stop_ids=(STOP, 4)):
    """A reply ends with its first stop token, `ended` tells whether it has one (on the very last place too), and the
    rest is padding."""
    cfg = settings_of(response_length=5, temperature=2.0)
    rollout = replies_to(tiny_actor(), [2] * 256, cfg, stop_ids, seed=3)
    for reply, response, ended in zip(rollout.replies(), rollout.responses.tolist(), rollout.ended.tolist()):
        stops = [t for t, token in enumerate(reply) if token in stop_ids]
        assert stops == ([len(reply) - 1] if ended else [])
        assert ended or len(reply) == 5
        assert response[len(reply) :] == [0] * (5 - len(reply))
    assert (rollout.ended & rollout.mask[:, 4]).any() == bool(stop_ids)
    assert not replies_to(tiny_actor(), [2] * 4, cfg, []).ended.any()


def test_sampling_follows_the_policy():
    """4096 first tokens at temperature 2 come with the frequencies of π, within 4 standard errors, and again with
    the same seed."""
    actor = tiny_actor()
    ids, mask = prompts_of([3])
    cfg = settings_of(response_length=1, temperature=2.0, micro_batch_size=512)
    rollouts = []
    for _ in range(2):
        torch.manual_seed(0)
        responses, _ = P.generate(actor, ids.expand(4096, -1), mask.expand(4096, -1), [STOP], cfg)
        rollouts.append(responses.flatten())
    assert torch.equal(*rollouts)
    p = distributions(actor.lm, ids[0].tolist(), [], 2.0)[0].exp()
    share = torch.bincount(rollouts[0], minlength=7) / 4096
    standard_error = (p * (1 - p) / 4096) ** 0.5
    assert ((share - p).abs() < 4 * standard_error).all()


PROBABILITIES = [0.0, 0.25, 0.25, 0.125, 0.375 - 2e-9, 1e-9, 1e-9]
DRAWN = [
    (0.0, 1),
    (0.2, 1),
    (0.26, 2),
    (0.49, 2),
    (0.51, 3),
    (0.626, 4),
    (1 - 3e-9, 4),
    (1 - 1.5e-9, 5),
    (1 - 5e-10, 6),
    (1.0, 6),
]


@pytest.mark.parametrize("u, token", DRAWN)
def test_a_token_is_the_inverse_of_the_distribution_function(u, token, monkeypatch):
    """For a uniform u it is the first whose cumulative probability exceeds u, in float64: never one of probability
    0, at times the last, of 1e-9, and that one also for a u that rounding made 1."""
    logits = torch.tensor(PROBABILITIES, dtype=REAL).log()
    monkeypatch.setattr(P.Actor, "logits", lambda self, states: logits.expand(len(states), -1))
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype: torch.full(shape, u, dtype=dtype))
    cfg = settings_of(response_length=2, temperature=1.0)
    responses, logprobs = P.generate(tiny_actor(), *prompts_of([3]), [], cfg)
    assert responses.tolist() == [[token, token]]
    assert error(logprobs, logits[token].expand(1, 2)) < 1e-9


@pytest.mark.parametrize("seed, stop_ids", [(0, [STOP]), (1, [STOP, 4]), (2, [STOP]), (3, [STOP, 4])])
def test_replies_that_have_stopped_leave_the_batch(seed, stop_ids, monkeypatch):
    """After every fourth token, all of them once fewer than three quarters are going on. Decoding ends when none is."""
    sizes = watched(monkeypatch, P.Actor, "trunk", lambda actor, base, ids, *_: len(ids))
    cfg = settings_of(response_length=24, temperature=1.0, micro_batch_size=5)  # 40 are decoded together
    rollout = replies_to(tiny_actor(), [2] * 40, cfg, stop_ids, seed)
    decoded = 40
    expected = []
    for t in range(1, 25):
        expected.append(decoded)
        going = int((~rollout.ended | (rollout.mask.sum(1) > t)).sum())
        if t % 4 == 0 and going == 0:
            break
        if t % 4 == 0 and going < 0.75 * decoded:
            decoded = going
    assert sizes == expected
    assert min(sizes) < 20
    assert len(sizes) < 24 or stop_ids == [STOP]


def test_three_quarters_of_the_replies_stay_together(monkeypatch):
    """One of four has stopped after the fourth token: that is no reason to drop it."""
    script = iter([[STOP, 5, 5, 5]] + [[5, 5, 5, 5]] * 7)
    sizes = watched(monkeypatch, P.Actor, "trunk", lambda actor, base, ids, *_: len(ids))
    monkeypatch.setattr(torch, "searchsorted", lambda *_, right: torch.tensor(next(script)).unsqueeze(1))
    P.generate(tiny_actor(), *prompts_of([2] * 4), [STOP], settings_of(response_length=8))
    assert sizes == [4] * 8


def test_eight_micro_batches_are_decoded_together(monkeypatch):
    sizes = watched(monkeypatch, P, "decode", lambda actor, queries, *_: len(queries))
    cfg = settings_of(batch_size=8, num_mini_batches=4)  # micro-batches of two
    replies_to(tiny_actor(), [2] * 40, cfg)
    assert sizes == [16, 16, 8]


def test_a_reply_is_made_by_its_own_random_numbers():
    """The same seed gives the same replies whether the prompts are decoded together or in groups of eight, whichever
    stop first."""
    actor = tiny_actor()
    lengths = (3, 1, 2, 5, 4, 2, 3, 1) * 3
    cfg = settings_of(response_length=12, temperature=1.0)
    together, groups = (replies_to(actor, lengths, dataclasses.replace(cfg, micro_batch_size=size)) for size in (3, 1))
    assert torch.equal(together.responses, groups.responses)
    assert 0 < together.ended.sum() < 24
    assert len(together.mask.sum(1).unique()) > 3


def test_a_policy_that_has_diverged_is_seen():
    actor = tiny_actor()
    actor.lm.get_output_embeddings().weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="it has diverged"):
        replies_to(actor, [2], settings_of())


ADVANTAGE_SETTINGS = st.builds(
    PPOConfig,
    gamma=st.just(0.9),
    lam=st.just(0.8),
    score_clip=st.none() | positive,
    missing_eos_penalty=st.none() | positive,
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
    kl_in=st.sampled_from(["reward", "loss"]),
    whiten_rewards=st.booleans(),
    whiten_advantages=st.booleans(),
    bootstrap_truncated=st.booleans(),
    critic_lam=st.none() | fraction,
)


@given(st.data(), masks(shortest=1), ADVANTAGE_SETTINGS)
@settings(max_examples=60)
def test_advantages_are_their_parts_in_order(data, mask, cfg):
    """Clip of the score, penalty for a missing stop, KL in the reward, whitening of rewards, the critic's units, GAE,
    the critic's own λ, and whitening of advantages."""
    cfg = dataclasses.replace(cfg, **CASE.get("settings", {}))
    B = len(mask)
    logprobs, ref, values = (cells(data.draw, mask) for _ in range(3))
    scores, final = (data.draw(vectors(B)) for _ in range(2))
    ended = torch.tensor(data.draw(lists(st.booleans(), B)))
    rollout = Rollout(mask, mask, mask.long(), mask, ended, mask, logprobs, ref, values=values, final_values=final)
    state = State(0.3, returns_mean=data.draw(number), returns_std=data.draw(st.just(0.0) | positive))
    P.compute_advantages(rollout, scores, state, cfg)

    shaped = []
    for score, whether_ended in zip(scores.tolist(), ended.tolist()):
        if cfg.score_clip is not None:
            score = min(max(score, -cfg.score_clip), cfg.score_clip)
        if cfg.missing_eos_penalty is not None and not whether_ended:
            score -= cfg.missing_eos_penalty
        shaped.append(score)
    kl = P.kl_estimate(logprobs, ref, cfg.kl_estimator)
    rewards = P.token_rewards(real(shaped), kl, mask, 0.3 if cfg.kl_in == "reward" else 0.0)
    if cfg.whiten_rewards:
        rewards = P.masked_whiten(rewards, mask, shift_mean=False)
    sampled = [discounted_sums(x[row].tolist(), 0.9) for x, row in zip(rewards, mask)]
    spread = real(sum(sampled, [])).std(correction=0).item()
    mean, std = state.returns_mean, max(state.returns_std, spread) or 1.0
    values, final = mean + std * values, mean + std * final
    after = final * ~ended if cfg.bootstrap_truncated else torch.zeros(B, dtype=REAL)
    advantages, returns = P.gae(rewards, values, mask, 0.9, 0.8, after)
    if cfg.critic_lam is not None:
        returns = P.gae(rewards, values, mask, 0.9, cfg.critic_lam, after)[1]
    if cfg.whiten_advantages:
        advantages = P.masked_whiten(advantages, mask)
    assert error(rollout.values[mask], values[mask]) < 1e-10
    assert error(rollout.advantages, advantages) < 1e-9
    assert error(rollout.returns[mask], (returns[mask] - mean) / std) < 1e-9
    assert not rollout.returns[~mask].any()


def test_advantages_worked_by_hand():
    """β = 0.1, γ = 1, λ = ½, scores clipped to ±1, ½ off for a missing stop, bootstrap where the reply was cut.

    The critic's units are a mean of 0.1 and a deviation of 2, so that it says 0.2 = 0.1 + 2 · 0.05, 0.4, 0.1 and 0.3.

    A reply that ended: score 3 → 1, KL 0.5 and -0.2, so rewards -0.05 and 1.02; δ = -0.05 + 0.4 - 0.2 = 0.15 and
    1.02 - 0.4 = 0.62; A = 0.15 + 0.31 = 0.46 and 0.62. One of a token, cut off in a state worth 0.3: score -0.2 → -0.7,
    KL 1, reward -0.8, A = -0.8 + 0.3 - 0.1 = -0.6. Whitened: mean 0.16, deviation 0.541356. The returns have λ = 1:
    0.97, 1.02 and -0.5, in the critic's units. Sampled they are 0.97, 1.02 and -0.8: mean 0.396667, deviation 0.846417.
    The mean becomes 0.1 + 0.2 · 0.296667, the deviation stays 2, the largest that was met.
    """
    mask = torch.tensor([[True, True], [True, False]])
    ended = torch.tensor([True, False])
    logprobs = real([[-1.0, -1.2], [-0.5, math.nan]])
    ref_logprobs = real([[-1.5, -1.0], [-1.5, math.nan]])
    rollout = Rollout(mask, mask, mask.long(), mask, ended, mask, logprobs, ref_logprobs)
    rollout.values = real([[0.05, 0.15], [0.0, math.nan]])
    rollout.final_values = real([9.0, 0.1])
    state = State(0.1, returns_mean=0.1, returns_std=2.0)
    cfg = PPOConfig(lam=0.5, critic_lam=1.0, score_clip=1.0, missing_eos_penalty=0.5, bootstrap_truncated=True)
    P.compute_advantages(rollout, real([3.0, -0.2]), state, cfg)
    assert error(rollout.advantages, [[0.5541635, 0.8497175], [-1.4038810, 0]]) < 1e-6
    assert error(rollout.returns, [[0.435, 0.46], [-0.3, 0]]) < 1e-12
    P.update_critic_units(rollout, state)
    assert error([state.returns_mean, state.returns_std], [0.1593333, 2.0]) < 1e-6


def test_the_critics_units_never_leave_a_target_far_away():
    """A batch that differs more than those before makes them at once; returns that are all equal make none."""
    mask = torch.tensor([[True], [True]])
    rollout = Rollout(mask, mask, mask.long(), mask, mask.any(1), mask, real([[0.0], [0.0]]), real([[0.0], [0.0]]))
    rollout.values = rollout.final_values = real([[0.0], [0.0]])
    for scores, std, returns in (([1.0, 5.0], 2.0, [0.5, 2.5]), ([1.0, 1.0], 1.0, [1.0, 1.0])):
        state = State(0.0)
        P.compute_advantages(rollout, real(scores), state, PPOConfig())
        assert error(rollout.returns.squeeze(1), returns) < 1e-12
        P.update_critic_units(rollout, state)
        assert state.returns_std == (std if scores[0] != scores[1] else 0.0)


def test_scores_in_other_units_change_no_step():
    """With β = 0, scores a hundred times as large make V a hundred times as large, and the same policy."""
    cfg = settings_of(num_updates=3, kl_coef=0.0, learning_rate=1e-2, whiten_advantages=True)
    outcomes = []
    for scale in (1, 100):
        actor, optimizer, _ = learner()

        def score(prompts, replies):
            return scale * share_of_fives(prompts, replies)[0], {}

        prompts = [Prompt([i, 1]) for i in range(7)]
        loop = P.ppo(actor, tiny_actor(seed=1), optimizer, prompts, score, [STOP], cfg, State(0.0))
        metrics = [row for row, _ in loop]
        outcomes.append((weights_of(actor), real([row["val/mean"] for row in metrics])))
    assert error(outcomes[0][0], outcomes[1][0]) < 1e-6
    assert error(100 * outcomes[0][1], outcomes[1][1]) < 1e-6
    assert abs(outcomes[0][1][-1]) > 1e-3


def test_equal_returns_leave_the_explained_variance_finite():
    """There is nothing to explain: 0 if the critic is constant too, whatever it says, and far below if it is not."""
    for offset, miss in ((0.0, 0.0), (3.0, 0.0), (0.0, 1.0)):
        _, _, rollout = experience()
        rollout.returns = torch.where(rollout.mask, 2.0, 0.0).double()
        rollout.predictions = rollout.returns + offset + miss * torch.rand(rollout.mask.shape, dtype=REAL)
        metrics = P.rollout_metrics(rollout, torch.zeros(8), {}, 0.1, settings_of())
        assert math.isfinite(metrics["val/explained_variance"])
        if miss == 0:
            assert metrics["val/explained_variance"] == 0
        else:
            assert metrics["val/explained_variance"] < -1e6


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_reward_in_the_metrics_is_the_one_that_was_used(estimator):
    """`rlhf_reward` is the mean sum of the token rewards, `non_score_reward` what of it is no score: the penalty by any
    estimator, or nothing while KL is in the loss."""
    for kl_in in ("reward", "loss"):
        cfg = settings_of(kl_in=kl_in, kl_estimator=estimator, kl_coef=0.3)
        _, _, rollout = experience(cfg=cfg)
        kl = P.kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator)
        scores = torch.arange(8, dtype=REAL)
        rewards = P.token_rewards(scores, kl, rollout.mask, 0.3 if kl_in == "reward" else 0.0)
        metrics = P.rollout_metrics(rollout, scores, {}, 0.3, cfg)
        mean = float(rewards.sum(1).mean())
        assert metrics["objective/rlhf_reward"] == pytest.approx(mean, abs=1e-9)
        assert metrics["objective/non_score_reward"] == pytest.approx(mean - 3.5, abs=1e-9)


@pytest.mark.parametrize("seed, critic", [(0, CRITICS[0]), (1, CRITICS[0]), (0, CRITICS[1])])
def test_metrics_are_means_over_the_valid_tokens(seed, critic):
    """Against brute force: the entropy is that of the bare model, KL is summed over a reply and averaged over
    replies. A part of the score that does not apply to a reply counts neither way, one that applies to none is left
    out."""
    cfg = settings_of()
    actor, _, rollout = experience(seed=seed, cfg=cfg, critic=critic)
    rollout.sampler_logprobs += torch.randn(rollout.mask.shape, dtype=REAL)  # gaps of both signs
    parts = {"length": torch.ones(8), "half": real([1.0, math.nan] * 4), "never": real([math.nan] * 8)}
    metrics = P.rollout_metrics(rollout, torch.arange(8, dtype=REAL), parts, 0.5, cfg)
    entropies, kl = [], []
    for prompt, reply, said in each_reply_and_its_numbers(rollout):
        log_pi = distributions(actor.lm, prompt, reply, 0.8)[:-1]
        entropies += (-log_pi.exp() * log_pi).sum(-1).tolist()
        kl.append(float((said.logprobs - said.ref_logprobs).sum()))
    predictions, returns = rollout.predictions[rollout.mask], rollout.returns[rollout.mask]
    gaps = (rollout.logprobs - rollout.sampler_logprobs)[rollout.mask]
    expected = {
        "objective/scores": 3.5,
        "objective/scores_std": 5.25**0.5,
        "objective/kl": fmean(kl),
        "objective/non_score_reward": -0.5 * fmean(kl),
        "objective/rlhf_reward": 3.5 - 0.5 * fmean(kl),
        "rewards/length": 1.0,
        "rewards/half": 1.0,
        "prompt/length": fmean([len(prompt) for prompt, _ in each_reply(rollout)]),
        "reply/length": fmean([len(reply) for _, reply in each_reply(rollout)]),
        "reply/ended": fmean(rollout.ended.tolist()),
        "policy/entropy": fmean(entropies),
        "policy/sampler_gap": float(gaps.abs().mean()),
        "val/mean": float(rollout.values[rollout.mask].mean()),
        "val/explained_variance": float(1 - (returns - predictions).var() / returns.var()),
    }
    assert metrics == pytest.approx(expected, abs=1e-9)


# -------------------------------------------------------------------------------------------------------- 5. the update


def every_reply(V=3, T=3):
    """Every reply of the language: up to T tokens, cut at the stop token."""
    replies = set()
    for tokens in itertools.product(range(V), repeat=T):
        end = tokens.index(STOP) + 1 if STOP in tokens else T
        replies.add(tokens[:end])
    return sorted(replies)


def language(actor, ref, lengths, cfg, scores=None):
    """A rollout that holds every reply to every prompt once. The weight of its tokens is the probability of the
    reply: so a sum over the rollout is an expectation."""
    queries, query_mask = prompts_of(lengths, V=3)
    replies = every_reply()
    padded = [[*reply, 0, 0][:3] for reply in replies]
    responses = torch.tensor(padded).repeat(len(lengths), 1)
    sizes = torch.tensor([len(reply) for reply in replies]).repeat(len(lengths), 1).view(-1, 1)
    mask = torch.arange(3) < sizes
    ended = ((responses == STOP) & mask).any(1)
    queries, query_mask = (x.repeat_interleave(len(replies), 0) for x in (queries, query_mask))
    rollout = Rollout(queries, query_mask, responses, mask, ended, mask)
    P.fill_logprobs_and_values(actor, ref, rollout, cfg)
    if scores is None:
        scores = torch.linspace(-1, 1, len(mask), dtype=REAL)
    P.compute_advantages(rollout, scores, State(cfg.kl_coef), cfg)
    probability = (rollout.logprobs * mask).sum(1).exp()
    assert error(probability.sum(), len(lengths)) < 1e-10  # the list is complete
    rollout.token_weights = probability.unsqueeze(1) * mask
    return rollout


ON_POLICY = [*itertools.product(KINDS, [0.5, 1.0, 2.0], CRITICS[:1]), *itertools.product(["gpt2"], [0.5], CRITICS[1:])]


@pytest.mark.parametrize("kind, temperature, critic", ON_POLICY)
@pytest.mark.parametrize("seed", [0, 1])
def test_expected_ppo_gradient_is_the_policy_gradient(kind, temperature, critic, seed):
    """On a language small enough to list every reply (V = 3, T ≤ 3, with a stop token), with each reply weighted by
    its probability, the gradient of the PPO loss at ratio 1 (λ = γ = 1, no whitening) is that of -(E[score] - β·KL),
    for a random critic of any kind, left-padded prompts of mixed length, any temperature. This is the policy
    gradient theorem, ∇E[R] = E Σ_t ∇log π(a_t|s_t)·(Σ_{t' ≥ t} r_t' - V(s_t)): what came before a_t, and V, go out
    as E_a[∇log π(a|s)] = ∇1 = 0. It fails for a wrong shift, sign, mask or temperature, and for a baseline that sees
    the action."""
    cfg = settings_of(temperature=temperature, lam=1.0, gamma=1.0, kl_coef=0.3, vf_coef=0.0)
    actor = tiny_actor(kind, 3, seed, critic)
    ref = tiny_actor(kind, 3, seed + 9)
    lengths = [1, 4, 2]
    torch.manual_seed(seed)
    scores = torch.randn(len(lengths) * len(every_reply()), dtype=REAL)
    rollout = language(actor, ref, lengths, cfg, scores)
    shuffled = rollout.select(torch.randperm(len(scores)))
    loss, _ = P.ppo_loss(actor, shuffled, cfg.kl_coef, cfg)
    got = gradients(loss, actor.lm)

    objective = 0.0
    for (prompt, reply), score in zip(each_reply(rollout), scores):
        logprob = alone(actor.lm, prompt, reply, temperature).sum()
        ref_logprob = alone(ref.lm, prompt, reply, temperature).sum().detach()
        objective += logprob.exp() * (score - 0.3 * (logprob - ref_logprob))
    expected = gradients(-objective, actor.lm)
    assert error(got, expected) < EXACT[kind]
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_is_that_of_the_states_met(estimator):
    """With no other term: k2 as a loss has the gradient of Σ KL(π ‖ ref) over the states met, k3 that of Σ KL(ref ‖
    π), the states taken as given. Neither is the gradient of the KL of whole replies, where a token also answers for
    later states."""
    cfg = settings_of(kl_in="loss", kl_estimator=estimator, vf_coef=0.0)
    actor = tiny_actor("gpt2", 3)
    ref = tiny_actor("gpt2", 3, 9)
    rollout = language(actor, ref, [1, 4, 2], cfg)
    rollout.advantages = torch.zeros_like(rollout.advantages)
    loss, _ = P.ppo_loss(actor, whole(rollout), 1.0, cfg)
    got = gradients(loss, actor.lm)

    of_states = of_replies = 0.0
    for prompt, reply, said in each_reply_and_its_numbers(rollout):
        p = distributions(actor.lm, prompt, reply, 0.8)[:-1]
        q = distributions(ref.lm, prompt, reply, 0.8)[:-1].detach()
        kl = (p.exp() * (p - q)).sum() if estimator == "k2" else (q.exp() * (q - p)).sum()
        of_states += said.logprobs.sum().exp() * kl
        logprob = alone(actor.lm, prompt, reply, 0.8).sum()
        of_replies += logprob.exp() * (logprob - said.ref_logprobs.sum())
    assert error(got, gradients(of_states, actor.lm)) < 1e-9
    assert error(got, gradients(of_replies, actor.lm)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_expected_ppo_gradient_off_policy(kind):
    """After the policy has moved from μ, inside the clip range, it is the gradient of the surrogate, PPO eq. 6: of
    Σ_y μ(y) Σ_t π/μ(y_t)·A_t, by the bare model. That is no longer the policy gradient: states still come from μ."""
    cfg = settings_of(lam=0.7, gamma=0.9, kl_coef=0.3, vf_coef=0.0, cliprange=0.9)
    actor = tiny_actor(kind, 3)
    ref = tiny_actor(kind, 3, 9)
    scores = torch.linspace(-1, 1, 2 * len(every_reply()), dtype=REAL)
    rollout = language(actor, ref, [1, 3], cfg, scores)
    random = torch.Generator().manual_seed(1)
    for p in actor.parameters():
        p.data += 0.005 * torch.randn(p.shape, dtype=REAL, generator=random)
    loss, stats = P.ppo_loss(actor, whole(rollout), cfg.kl_coef, cfg)
    got = gradients(loss, actor.lm)
    assert stats["policy/clipfrac"] == 0
    assert stats["policy/approxkl"] > 1e-3

    surrogate = 0.0
    for (prompt, reply, said), score in zip(each_reply_and_its_numbers(rollout), scores.tolist()):
        rewards = (-0.3 * (said.logprobs - said.ref_logprobs)).tolist()
        rewards[-1] += score
        advantages = gae_by_definition(rewards, said.values.tolist(), 0.9, 0.7, 0.0)
        ratio = (alone(actor.lm, prompt, reply, 0.8) - said.logprobs).exp()
        surrogate += said.logprobs.sum().exp() * (ratio * real(advantages)).sum()
    expected = gradients(-surrogate, actor.lm)
    assert error(got, expected) < EXACT[kind]
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_with_learning_rate_0_nothing_moves(kind):
    """In every epoch and minibatch the ratio of every token is 1, KL and clipped share are 0, and the loss is
    -mean(A)."""
    cfg = settings_of()
    actor, _, rollout = experience(kind, cfg=cfg)
    before = weights_of(actor)
    with pytest.MonkeyPatch.context() as patch:
        gaps = watched(patch, P, "policy_loss", lambda new, old, advantages, mask, *_: error(new[mask], old[mask]))
        metrics = ppo_steps(actor, rollout, cfg)
    steps = cfg.num_ppo_epochs * cfg.num_mini_batches
    assert len(gaps) >= steps
    assert max(gaps) < EXACT[kind]
    assert metrics["policy/ratio"] == pytest.approx(1, abs=EXACT[kind])
    assert metrics["policy/approxkl"] == pytest.approx(0, abs=EXACT[kind])
    assert metrics["policy/clipfrac"] == 0
    assert metrics["val/clipfrac"] == 0
    assert metrics["policy/steps"] == steps
    assert metrics["policy/grad_norm"] > 0
    assert metrics["loss/policy"] == pytest.approx(-float(rollout.advantages[rollout.mask].mean()), abs=EXACT[kind])
    errors = (rollout.predictions - rollout.returns)[rollout.mask]
    assert metrics["loss/value"] == pytest.approx(float((errors**2).mean() / 2), abs=EXACT[kind])
    assert torch.equal(weights_of(actor), before)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_any_partition_into_micro_batches_is_the_same_update(aggregation, micro):
    """The weights after two epochs, and all metrics, equal those of whole minibatches; and there are never more
    replies in memory."""
    outcomes = []
    for size in (4, micro):
        cfg = settings_of(
            micro_batch_size=size, loss_aggregation=aggregation, ent_coef=0.1, kl_in="loss", max_grad_norm=None
        )
        actor, _, rollout = experience(cfg=cfg)
        with pytest.MonkeyPatch.context() as patch:
            sizes = watched(patch, P, "ppo_loss", lambda actor, batch, *_: len(batch.mask))
            metrics = ppo_steps(actor, rollout, cfg, lr=0.05)
        assert max(sizes) == size
        outcomes.append((weights_of(actor), metrics))
    assert_same(*outcomes, 1e-10)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_aggregation_over_tokens_or_sequences(aggregation):
    """The step is that of the mean over tokens, of the mean over replies of the mean over their tokens, or of the sum
    over tokens divided by replies times `response_length`."""
    cfg = settings_of(
        loss_aggregation=aggregation, num_mini_batches=1, num_ppo_epochs=1, vf_coef=0.0, max_grad_norm=None
    )
    actor, _, rollout = experience(cfg=cfg)
    loss = 0.0
    for prompt, reply, said in each_reply_and_its_numbers(rollout):
        ratio = (alone(actor.lm, prompt, reply, cfg.temperature) - said.logprobs).exp()
        objective = ratio * said.advantages
        divisor = {"token": rollout.mask.sum(), "sequence": 8 * len(reply), "constant": 8 * cfg.response_length}
        loss -= objective.sum() / divisor[aggregation]
    expected = gradients(loss, actor.lm)
    before = weights_of(actor.lm)
    ppo_steps(actor, rollout, cfg, lr=1.0)
    assert error(before - weights_of(actor.lm), expected) < 1e-9


def test_order_of_replies_does_not_matter():
    cfg = settings_of(num_mini_batches=1, ent_coef=0.1)
    outcomes = []
    for order in (range(8), [3, 0, 7, 1, 6, 2, 5, 4]):
        actor, _, rollout = experience(cfg=cfg)
        fields = {name: x[list(order)] for name, x in vars(rollout).items() if x is not None}
        metrics = ppo_steps(actor, Rollout(**fields), cfg, lr=0.05)
        outcomes.append((weights_of(actor), metrics))
    assert_same(*outcomes, 1e-10)


def test_target_kl_stops_before_the_step_and_leaves_no_gradient_behind():
    """A minibatch whose KL is above the target takes no step. The next update starts from clean gradients: it equals
    that of a fresh actor with the same weights."""
    cfg = settings_of(target_kl=1e-6, num_ppo_epochs=3)
    actor, _, rollout = experience(cfg=cfg)
    optimizer = torch.optim.SGD(actor.parameters(), lr=0.5)
    taken = []
    optimizer.register_step_post_hook(lambda *_: taken.append(weights_of(actor)))
    torch.manual_seed(0)
    metrics = P.ppo_update(actor, optimizer, rollout, cfg.kl_coef, cfg)
    assert 1 <= len(taken) < 6
    assert metrics["policy/steps"] == len(taken)
    assert torch.equal(weights_of(actor), taken[-1])
    fresh = tiny_actor()
    fresh.load_state_dict(actor.state_dict())
    for a in (actor, fresh):
        P.fill_logprobs_and_values(a, a, rollout, cfg)
        ppo_steps(a, rollout, settings_of(), lr=0.1)
    assert torch.equal(weights_of(actor), weights_of(fresh))


def test_target_kl_is_in_nats_a_token():
    """Of two whole passes the first has KL 0 and the second twice the mean: with a target 1% above that both take a
    step, 1% below only one does."""
    cfg = settings_of(num_mini_batches=1)
    actor, _, rollout = experience(cfg=cfg)
    kl = 2 * ppo_steps(actor, rollout, cfg, lr=0.1)["policy/approxkl"]
    for target, steps in ((1.01 * kl, 2), (0.99 * kl, 1)):
        actor, _, rollout = experience(cfg=cfg)
        limited = dataclasses.replace(cfg, target_kl=target)
        assert ppo_steps(actor, rollout, limited, lr=0.1)["policy/steps"] == steps


@pytest.mark.parametrize("target_kl", [None, 1e-6])
def test_no_gradient_is_left_after_an_update(target_kl):
    """Whether its last step was taken or not: gradients would take memory in the next rollout, and move the next
    step."""
    actor, _, rollout = experience()
    ppo_steps(actor, rollout, settings_of(target_kl=target_kl), lr=0.5)
    assert all(p.grad is None for p in actor.parameters())


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    """One return that is infinite spoils one step of each epoch: it changes no weight and no metric."""
    cfg = settings_of(num_ppo_epochs=3)
    actor, _, rollout = experience(cfg=cfg)
    rollout.returns[0, 0] = math.inf
    metrics = ppo_steps(actor, rollout, cfg, lr=0.05)
    assert metrics["policy/steps"] == 3
    assert metrics["policy/skipped_steps"] == 3
    assert all(map(math.isfinite, metrics.values()))
    assert weights_of(actor).isfinite().all()
    assert all(p.grad is None for p in actor.parameters())


@pytest.mark.parametrize("critic", CRITICS)
def test_critic_warmup_trains_the_critic_alone(critic):
    """Its head, and its trunk if that is its own. Its loss falls, the policy stays as it is, and so do all ratios."""
    cfg = settings_of(num_ppo_epochs=20, vf_coef=1.0, cliprange_value=None, max_grad_norm=None)
    actor, _, rollout = experience(cfg=cfg, critic=critic)
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    metrics = ppo_steps(actor, rollout, cfg, lr=0.02, critic_only=True)
    moved = {name.split(".")[0] for name, p in actor.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ({"value_head", "critic_trunk"} if critic[0] == "separate" else {"value_head"})
    assert ppo_steps(actor, rollout, cfg)["loss/value"] < metrics["loss/value"]
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critic_learns_and_never_moves_the_policy_unless_shared(critic):
    """The value loss falls when it is followed. It has no gradient in a policy with a separate critic."""
    cfg = settings_of(vf_coef=1.0, cliprange_value=None, max_grad_norm=None, num_ppo_epochs=10)
    actor, _, rollout = experience(cfg=cfg, critic=critic)
    rollout.advantages = torch.zeros_like(rollout.advantages)
    before = weights_of(actor.lm)
    first, _, last = (ppo_steps(actor, rollout, cfg, lr=lr)["loss/value"] for lr in (0.0, 0.02, 0.0))
    assert last < 0.9 * first
    assert torch.equal(before, weights_of(actor.lm)) == (critic[0] == "separate")


def test_each_term_of_the_loss_has_its_coefficient():
    """PPO eq. 9 with the KL of eq. 8: the loss is linear in vf_coef and ent_coef, and β·KL enters with kl_in = loss
    alone."""
    actor, _, rollout = experience()
    rollout.token_weights = P.token_weights(rollout.mask, "token").double()
    batch = whole(rollout)
    n = len(batch.valid)

    def loss(**changes):
        return P.ppo_loss(actor, batch, 0.3, settings_of(**dict(vf_coef=0.0) | changes))[0]

    _, stats = P.ppo_loss(actor, batch, 0.3, settings_of())
    assert not any(x.requires_grad for x in stats.values())  # they would keep the graph in memory
    plain = loss()
    assert plain.requires_grad
    assert error(plain, stats["loss/policy"]) < 1e-12
    assert error(loss(vf_coef=0.5) - plain, 0.5 * stats["loss/value"]) < 1e-12
    for ent_coef in (0.5, 1):
        assert error(loss(ent_coef=ent_coef) - plain, -ent_coef * batch.entropy[batch.mask].sum()) < 1e-9
    kl = (batch.logprobs - batch.ref_logprobs)[batch.mask]
    assert error(loss(kl_in="loss") - plain, 0.3 * kl.sum()) < 1e-9
    assert error(loss(kl_in="loss", kl_estimator="k2") - plain, 0.3 * (kl**2 / 2).sum()) < 1e-9

    new_logprobs = batch.logprobs
    batch.logprobs = new_logprobs - 0.5  # ratio e^½: every clip binds on one sign of the advantage
    for changes in (dict(cliprange=0.1), dict(cliprange_high=0.4), dict(dual_clip=1.2)):
        expected, _ = P.policy_loss(new_logprobs, batch.logprobs, batch.advantages, batch.mask, **changes)
        assert error(loss(**changes), n * expected) < 1e-9
    new_values = batch.predictions
    batch.predictions = new_values + 0.4
    for clip in (0.1, None):
        expected, _ = P.value_loss(new_values, batch.predictions, batch.returns, batch.mask, clip)
        _, stats = P.ppo_loss(actor, batch, 0.3, settings_of(cliprange_value=clip))
        assert error(stats["loss/value"], n * expected) < 1e-9


@pytest.mark.parametrize("critic", CRITICS)
def test_gradient_of_the_whole_loss_by_finite_differences(critic):
    """Off policy, with every term on (surrogate, value, entropy, KL): the slope along random directions of all
    weights."""
    changes = dict(ent_coef=0.3, kl_in="loss", kl_estimator="k3", vf_coef=0.7, cliprange=0.9, cliprange_value=None)
    cfg = settings_of(**changes)
    actor, _, rollout = experience(cfg=cfg, critic=critic)
    rollout.token_weights = rollout.mask / rollout.mask.sum().double()
    batch = whole(rollout)
    random = torch.Generator().manual_seed(0)
    weights = weights_of(actor)
    weights += 0.01 * torch.randn(weights.shape, dtype=REAL, generator=random)

    def loss(weights):
        torch.nn.utils.vector_to_parameters(weights, actor.parameters())
        return P.ppo_loss(actor, batch, 0.4, cfg)[0]

    slopes = gradients(loss(weights), actor)
    for _ in range(3):
        step = 1e-5 * torch.randn(weights.shape, dtype=REAL, generator=random)
        expected = (loss(weights + step) - loss(weights - step)).item() / 2
        slope = (slopes @ step).item()
        assert abs(slope - expected) < 1e-5 * max(1e-5, abs(slope))
        assert abs(slope) > 1e-8


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_gradient_clipping(limit):
    """A step has the norm allowed, or its own if none is set. The metric is the mean of the norms before clipping."""
    cfg = settings_of(max_grad_norm=limit, num_ppo_epochs=1, num_mini_batches=1)
    actor, _, rollout = experience(cfg=cfg)
    thrice = ppo_steps(actor, rollout, dataclasses.replace(cfg, num_ppo_epochs=3))
    before = weights_of(actor)
    norm = ppo_steps(actor, rollout, cfg, lr=1.0)["policy/grad_norm"]
    assert norm > 0.1
    assert error((before - weights_of(actor)).norm(), limit or norm) < 1e-6
    assert thrice["policy/grad_norm"] == pytest.approx(norm)


def test_policy_and_critic_are_clipped_apart():
    """Returns a thousand times as large leave the step of a policy with a separate critic as it is. The step of each
    group has the norm allowed."""
    cfg = settings_of(max_grad_norm=1e-3, num_ppo_epochs=1, num_mini_batches=1, cliprange_value=None)
    policy_steps = []
    for scale in (1, 1000):
        actor, _, rollout = experience(cfg=cfg, critic=("separate", "value"))
        rollout.returns *= scale
        groups = [torch.nn.ParameterList(group) for group in policy_and_critic(actor)]
        before = [weights_of(group) for group in groups]
        optimizer = torch.optim.SGD([{"params": list(group)} for group in groups], lr=1.0)
        P.ppo_update(actor, optimizer, rollout, 0.1, cfg)
        steps = [weights_of(group) - x for group, x in zip(groups, before)]
        for step in steps:
            assert error(step.norm(), 1e-3) < 1e-8
        policy_steps.append(steps[0])
    assert error(*policy_steps) < 1e-12


NUMBERS = ["logprobs", "ref_logprobs", "sampler_logprobs", "values", "predictions", "entropy", "advantages", "returns"]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e300])
@pytest.mark.parametrize("micro", [None, 3])
def test_garbage_in_the_padding_changes_no_step_and_no_metric(garbage, micro):
    """In every number of the rollout that is no token's, and other tokens in the padding of prompts and replies:
    with all terms of the loss, the weights after two epochs and every metric are the same."""
    cfg = settings_of(kl_in="loss", kl_estimator="k2", ent_coef=0.1, micro_batch_size=micro)
    outcomes = []
    for dirty in (False, True):
        actor, _, rollout = experience(cfg=cfg)
        if dirty:
            for name in NUMBERS:
                setattr(rollout, name, getattr(rollout, name).masked_fill(~rollout.mask, garbage))
            rollout.queries = rollout.queries.masked_fill(~rollout.query_mask, 6)
            rollout.responses = rollout.responses.masked_fill(~rollout.mask, 5)
        metrics = P.rollout_metrics(rollout, torch.arange(8.0), {}, 0.5, cfg)
        metrics |= ppo_steps(actor, rollout, cfg, lr=0.05)
        outcomes.append((weights_of(actor), metrics))
    assert not rollout.mask.all()
    assert not rollout.query_mask.all()
    assert_same(*outcomes, 1e-12)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_an_empty_reply_counts_for_nothing(aggregation):
    """`generate` makes none, a rollout of your own may hold one: no NaN, and by tokens the same step as without it."""
    cfg = settings_of(loss_aggregation=aggregation, num_mini_batches=1, num_ppo_epochs=1)
    actor, _, rollout = experience(cfg=cfg)
    rollout.mask[2] = False
    metrics = ppo_steps(actor, rollout, cfg, lr=0.05)
    assert metrics["policy/steps"] == 1
    assert all(map(math.isfinite, metrics.values()))
    other = tiny_actor()
    ppo_steps(other, rollout.select(torch.tensor([0, 1, 3, 4, 5, 6, 7])), cfg, lr=0.05)
    same = error(weights_of(actor), weights_of(other)) < 1e-12
    assert same == (aggregation == "token")


# ---------------------------------------------------------------------------------------------------------- 6. the loop


def share_of_fives(prompts, replies):
    """The score of the tests of the loop."""
    scores = real([reply.count(5) / len(reply) for reply in replies])
    return scores, {"fives": scores}


def learner():
    """A policy with a critic of its own, the optimizer of both, and the state at the beginning."""
    actor = tiny_actor(critic=("separate", "value"))
    policy, critic = policy_and_critic(actor)
    optimizer = torch.optim.AdamW([{"params": policy}, {"params": critic}])
    return actor, optimizer, State(kl_coef=0.05)


def updates(actor, optimizer, state, cfg):
    """The loop on seven prompts, with another model as the reference."""
    prompts = [Prompt([i, 1]) for i in range(7)]
    return P.ppo(actor, tiny_actor(seed=1), optimizer, prompts, share_of_fives, [STOP], cfg, state)


def test_an_update_that_target_kl_stops_shrinks_the_next_steps():
    """The learning rate is divided by 1.5 after a stop and given back after an update without one, up to its whole.
    Without a target it stays, and a step that was skipped is no stop."""
    cfg = settings_of(num_updates=3, target_kl=1e-9, learning_rate=1e-2)
    actor, optimizer, state = learner()
    rates = [metrics["lr"] for metrics, _ in updates(actor, optimizer, state, cfg)]
    assert error(rates, [0.01, 0.01 / 1.5, 0.01 / 1.5**2]) < 1e-12
    cfg = dataclasses.replace(cfg, num_updates=7, target_kl=1e9)
    rates = [metrics["lr"] for metrics, _ in updates(actor, optimizer, state, cfg)]
    assert error(rates, [0.01 / 1.5**3, 0.01 / 1.5**2, 0.01 / 1.5, 0.01]) < 1e-12
    cfg = dataclasses.replace(cfg, num_updates=9, target_kl=None)
    actor.value_head.bias.register_hook(lambda slope: slope * math.nan)
    skipped = [(metrics["lr"], metrics["policy/skipped_steps"]) for metrics, _ in updates(actor, optimizer, state, cfg)]
    assert skipped == [(0.01, 4), (0.01, 4)]


def without_times(metrics):
    return {name: x for name, x in metrics.items() if not name.startswith(("time/", "perf/"))}


def test_the_times_of_an_update_are_those_of_its_phases():
    """None is negative, and together they are not more than went by."""
    loop = updates(*learner(), settings_of(num_updates=3))
    for _ in range(3):
        started = time.perf_counter()
        metrics, _ = next(loop)
        elapsed = time.perf_counter() - started
        seconds = [x for name, x in metrics.items() if name.startswith("time/")]
        assert len(seconds) == 4
        assert min(seconds) >= 0
        assert sum(seconds) <= elapsed


def test_the_state_is_complete_at_each_yield():
    """Stopped at each yield and begun anew from copies of state, weights and optimizer, the loop does the same, bit for
    bit: with a schedule, a moving β, critic warm-up and more updates than the prompts last."""
    cfg = settings_of(num_updates=5, learning_rate=1e-2, lr_scheduler_type="linear", critic_warmup_updates=1)
    cfg = dataclasses.replace(cfg, kl_target=0.1, kl_horizon=100, samples_per_prompt=2)
    actor, optimizer, state = learner()
    uninterrupted = list(updates(actor, optimizer, state, cfg))
    old_actor, old_optimizer, old_state = learner()
    for metrics, samples in uninterrupted:
        torch.manual_seed(99)  # what is left of the generators is not needed
        new_actor, new_optimizer, _ = learner()
        new_actor.load_state_dict(old_actor.state_dict())
        new_optimizer.load_state_dict(old_optimizer.state_dict())
        new_state = State(**vars(old_state))
        its_metrics, its_samples = next(updates(new_actor, new_optimizer, new_state, cfg))
        assert without_times(its_metrics) == without_times(metrics)
        assert its_samples == samples
        old_actor, old_optimizer, old_state = new_actor, new_optimizer, new_state
    assert torch.equal(weights_of(actor), weights_of(old_actor))
    assert state == old_state
    assert state.update == 5
    assert state.kl_coef != 0.05
    assert list(updates(actor, optimizer, state, cfg)) == []


@pytest.mark.parametrize("changes", [dict(num_mini_batches=3), dict(samples_per_prompt=3)])
def test_a_batch_that_cannot_be_divided_is_refused(changes):
    with pytest.raises(
        ValueError, match="batch_size: expected a multiple of num_mini_batches and of samples_per_prompt"
    ):
        next(updates(*learner(), settings_of(**changes)))


def test_settings_and_scores_that_cannot_train_are_refused():
    """A KL loss without a gradient; a learning rate that no group has; scores that make every advantage NaN."""
    actor, optimizer, state = learner()
    with pytest.raises(ValueError, match="kl_estimator: expected k2 or k3 with kl_in = loss"):
        next(updates(actor, optimizer, state, settings_of(kl_in="loss")))
    adam = torch.optim.Adam(actor.parameters())
    for groups, critic_lr in ((1, 0.1), (3, None)):
        adam.param_groups = adam.param_groups[:1] * groups
        with pytest.raises(ValueError, match="optimizer: expected one group of parameters or two"):
            next(updates(actor, adam, state, settings_of(critic_lr=critic_lr)))

    def half(prompts, replies):
        return torch.tensor([1.0, math.nan] * 4), {}

    loop = P.ppo(actor, actor, optimizer, [Prompt([1])], half, [STOP], settings_of(), state)
    with pytest.raises(ValueError, match="score: expected finite numbers, got nan"):
        next(loop)


@pytest.mark.parametrize("critic_lr, ratio", [(3e-2, 3), (0.0, 0), (None, 1)])
def test_learning_rates_reach_the_optimizer(critic_lr, ratio):
    """Policy and critic have learning rates of their own, on one schedule: warm-up of one update, then the linear
    decay over the other three."""
    cfg = settings_of(
        num_updates=4, learning_rate=1e-2, critic_lr=critic_lr, lr_scheduler_type="linear", warmup_updates=1
    )
    actor, optimizer, state = learner()
    policy, critic = optimizer.param_groups
    for (metrics, _), share in zip(updates(actor, optimizer, state, cfg), [1 / 2, 1, 2 / 3, 1 / 3], strict=True):
        assert policy["lr"] == pytest.approx(share * 1e-2)
        assert critic["lr"] == pytest.approx(share * 1e-2 * ratio)
        assert metrics["lr"] == policy["lr"]


def test_the_metrics_of_an_update_are_those_of_rollout_and_update(monkeypatch):
    """And where the run stands. Then β moves by the measured KL; updates without a single step are counted in a row."""
    monkeypatch.setattr(P, "rollout_metrics", lambda *_: {"objective/kl": 0.11})
    cfg = settings_of(num_updates=4, learning_rate=1e-2, kl_target=0.1, kl_horizon=80)
    actor, optimizer, state = learner()
    loop = updates(actor, optimizer, state, cfg)
    kl_coef, units = 0.05, 0.0
    for update, (steps, in_a_row) in enumerate([(0, 4), (0, 8), (4, 0), (0, 4)], 1):
        stats = {"policy/steps": steps, "policy/skipped_steps": 4 - steps}
        monkeypatch.setattr(P, "ppo_update", lambda *_: stats)
        metrics, _ = next(loop)
        expected = {"update": update, "episode": 8 * update, "lr": 1e-2, "kl_coef": kl_coef, "objective/kl": 0.11}
        assert without_times(metrics) == pytest.approx(expected | stats)
        kl_coef *= 1 + 0.1 * 8 / 80
        assert (state.kl_coef, state.update, state.skipped) == (pytest.approx(kl_coef), update, in_a_row)
        assert (state.returns_std != units) == (steps > 0)  # skipped steps leave the critic's units as they are
        units = state.returns_std


def test_each_prompt_gets_its_replies_and_their_scores(monkeypatch):
    """`samples_per_prompt` replies stand side by side; the first four are the samples. Four prompts an update of
    seven: the second update begins where the first ended."""
    this_file = sys.modules[__name__]
    batches = watched(monkeypatch, this_file, "share_of_fives", lambda prompts, replies: list(zip(prompts, replies)))
    done = list(updates(*learner(), settings_of(num_updates=2, samples_per_prompt=2)))
    asked = []
    for batch, (_, samples) in zip(batches, done, strict=True):
        assert len(batch) == 8
        assert [(prompt, reply) for prompt, reply, _, _ in samples] == batch[:4]
        assert [score for _, _, score, _ in samples] == [reply.count(5) / len(reply) for _, reply in batch[:4]]
        for (prompt, _), (same_prompt, _) in zip(batch[::2], batch[1::2]):
            assert prompt is same_prompt
            asked.append(prompt.ids[0])
    assert sorted(asked[:7]) == list(range(7))


PART_ONE_ALONE = """
import copy
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from ppo import Actor, PPOConfig, Prompt, State, ppo

def score(prompts, replies):  # the share of token 5 in each reply
    return torch.tensor([reply.count(5) / len(reply) for reply in replies]), {}

model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
ref = Actor(copy.deepcopy(model)).requires_grad_(False)
actor = Actor(model)
optimizer = torch.optim.AdamW(actor.parameters())
prompts = [Prompt([1, 2, 3]), Prompt([4])]
cfg = PPOConfig(num_updates=12, batch_size=32, response_length=8, learning_rate=3e-3)
for metrics, samples in ppo(actor, ref, optimizer, prompts, score, [0], cfg, State(cfg.kl_coef)):
    print(metrics["update"], metrics["objective/scores"])
"""


def test_part_one_can_be_copied_alone(tmp_path, monkeypatch, capsys):
    """What stands above the line is a file of its own, without tyro too. With it a dozen lines train a model: the
    mean score, a tenth at first, more than triples."""
    source = Path(P.__file__).read_text().splitlines(keepends=True)
    (end,) = (i for i, line in enumerate(source) if line.startswith("#") and "Part I ends here" in line)
    (tmp_path / "ppo.py").write_text("".join(source[:end]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "tyro", None)
    torch.manual_seed(0)
    try:
        exec(PART_ONE_ALONE, {})
    finally:
        part_one = sys.modules.pop("ppo", None)
    assert not hasattr(part_one, "train")
    scores = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 12
    assert scores[0] < 0.2
    assert fmean(scores[-3:]) > scores[0] + 0.25


# --------------------------------------------------------------------------------------------------- the museum of bugs
# Mistakes that others shipped, most of them for years and under green tests, with the project or its issue in brackets,
# and slips of the kind, without. An exhibit is a function, {the code that is right: the code that was shipped},
# properties from above that must then fail, and a control: a case in which the mistake does no harm, where the property
# must hold. So it is known that an exhibit dies of its own disease.


def edited(name, *changes):
    """The function of the module, or the method Actor.NAME, with parts of its source replaced: old, new, old, new."""
    text = Path(P.__file__).read_text()
    name = name.removeprefix("Actor.")
    functions = {node.name: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    node = functions[name]
    start = min(x.lineno for x in [node, *node.decorator_list])
    source = textwrap.dedent("\n".join(text.splitlines()[start - 1 : node.end_lineno]))
    for old, new in zip(changes[::2], changes[1::2]):
        assert source.count(old) == 1, f"{name} has changed: {old!r}"
        source = source.replace(old, new)
    defined = {}
    exec("from __future__ import annotations\n" + source, vars(P), defined)
    return defined[name]


def harmless(proof, *arguments, **case):
    return proof, arguments, case


NO_STOP = dict(stop=[])
MUSEUM = {
    # Masks, log-probabilities and entropies
    "token != pad as the mask where pad is EOS: EOS is never trained on (trl#6357)": (
        "response_mask",
        {"stops_before == 0": "(stops_before == 0) & (responses != (stop_ids + [-1])[0])"},
        test_response_mask_is_a_naive_loop,
        test_replies_stop_where_the_first_stop_token_is,
        harmless(test_response_mask_is_a_naive_loop, **NO_STOP),
    ),
    "the tokens before EOS as the mask: the policy is never paid for ending": (
        "response_mask",
        {"stops_before = stop.cumsum(1) - stop": "stops_before = stop.cumsum(1)"},
        test_response_mask_is_a_naive_loop,
        test_replies_stop_where_the_first_stop_token_is,
        harmless(test_response_mask_is_a_naive_loop, **NO_STOP),
    ),
    "attention where token != pad: prompts and replies that hold the pad token are not seen whole (trl#6357)": (
        "Actor.states",
        {"attention = F.pad(batch.query_mask, (0, batch.mask.shape[1]), value=True)": "attention = ids != 0"},
        (test_every_logprob_is_the_models_own, "gpt2", 1.0),
        harmless(test_every_logprob_is_the_models_own, "gpt2", 1.0, full=True, least=1, stop=[0]),
    ),
    "left padding without position_ids: GPT-2 counts the padding, and every logit moves (OpenRLHF#217)": (
        "Actor.trunk",
        {"position_ids=positions[:, -ids.shape[1] :],": ""},
        (test_every_logprob_is_the_models_own, "gpt2", 1.0),
        harmless(test_every_logprob_is_the_models_own, "gpt2", 1.0, full=True),
    ),
    "sampled at one temperature, scored at another: no ratio is ever 1 (trlX; OpenRLHF#853)": (
        "logprobs_from_logits",
        {"logits / temperature": "logits"},
        test_logprobs_and_entropy_from_logits,
        (test_every_logprob_is_the_models_own, "gpt2", 0.5),
        harmless(test_every_logprob_is_the_models_own, "gpt2", 1.0),
    ),
    "the entropy of logits without their temperature (OpenRLHF#1319)": (
        "entropy_from_logits",
        {"logits / temperature": "logits"},
        test_logprobs_and_entropy_from_logits,
        (test_metrics_are_means_over_the_valid_tokens, 0, CRITICS[0]),
        harmless(test_logprobs_and_entropy_from_logits.hypothesis.inner_test, [0.3, 0.9], 1.0, 0.5),
    ),
    "logits that stay in the type of matrix products: noise in ratio, KL and entropy (MiniMax-M1)": (
        "Actor.logits",
        {"with torch.autocast(self.device.type, enabled=False)": "with self.autocast()"},
        test_bfloat16_is_for_matrix_products_only,
        test_logits_are_not_rounded_to_bfloat16,
        harmless(test_logits_are_not_rounded_to_bfloat16, torch.float32),
    ),
    "replies as text, encoded again: two spellings of a text are two token sequences": (
        "fill_logprobs_and_values",
        {"logprobs, entropy, predictions": "batch.responses[batch.responses == 5] = 4; logprobs, entropy, predictions"},
        (test_with_learning_rate_0_nothing_moves, "gpt2"),
        harmless(test_with_learning_rate_0_nothing_moves, "gpt2", V=5),
    ),
    "log π_old in another type than the update computes in": (
        "fill_logprobs_and_values",
        {"torch.stack([logprobs,": "torch.stack([logprobs.float(),"},
        (test_with_learning_rate_0_nothing_moves, "gpt2"),
        harmless(test_with_learning_rate_0_nothing_moves, "llama"),
    ),
    "dropout in the update: the ratio is not 1 before the first step, and never the same twice": (
        "Actor.states",
        {"return self.trunk(": "return self.trunk(base.train() and "},
        (test_with_learning_rate_0_nothing_moves, "gpt2"),
        harmless(test_with_learning_rate_0_nothing_moves, "llama"),
    ),
    # Rewards and KL
    "the score on every token: long replies are paid by the token": (
        "token_rewards",
        {"last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))": "last = mask"},
        test_token_rewards_sum_to_score_less_kl,
        harmless(test_token_rewards_sum_to_score_less_kl, T=1),
    ),
    "a penalty for a reply whose EOS is exactly the last token (torchtune)": (
        "sample_replies",
        {"ended = torch.isin(responses, responses.new_tensor(stop_ids)).any(1)": "ended = mask.sum(1) < mask.shape[1]"},
        test_replies_stop_where_the_first_stop_token_is,
        harmless(test_replies_stop_where_the_first_stop_token_is, []),
    ),
    "a stop token of one's own that does not count as an end (trl#3750)": (
        "sample_replies",
        {"new_tensor(stop_ids)": "new_tensor(stop_ids[:1])"},
        test_replies_stop_where_the_first_stop_token_is,
        harmless(test_replies_stop_where_the_first_stop_token_is, [STOP]),
    ),
    "reference less policy as the KL: the penalty pays for leaving": (
        "kl_estimate",
        {"d = logprobs - ref_logprobs": "d = ref_logprobs - logprobs"},
        test_kl_estimators_are_unbiased_by_enumeration,
        harmless(test_kl_estimators_are_unbiased_by_enumeration, zero=True),
    ),
    'abs() against a "negative KL": what draws back to the reference is punished too (trl#486, trl#1161)': (
        "kl_estimate",
        {"return d\n": "return d.abs()\n"},
        test_kl_estimators_are_unbiased_by_enumeration,
        harmless(test_kl_estimators_are_unbiased_by_enumeration, zero=True),
    ),
    "k3 as e^d - 1 - d, from the inverted ratio: for the policy's own samples it is neither KL (rlhf-book)": (
        "kl_estimate",
        {"torch.expm1(-d) + d": "torch.expm1(d) - d"},
        test_kl_estimators_are_unbiased_by_enumeration,
        test_kl_gradients_as_the_docstring_says,
        harmless(test_kl_estimators_are_unbiased_by_enumeration, zero=True),
    ),
    "a KL loss with the wrong sign (verl#179)": (
        "ppo_loss",
        {"loss = loss + kl_coef * ": "loss = loss - kl_coef * "},
        test_each_term_of_the_loss_has_its_coefficient,
        (test_kl_in_the_loss_is_that_of_the_states_met, "k2"),
        harmless(test_each_term_of_the_loss_has_its_coefficient, same=True),
    ),
    # Advantages, whitening and the critic
    # Where λ = γ = 1 the next one goes out, whatever V is: the policy gradient on policy is right, and so is its test.
    "the score one past EOS, and GAE through that cell: EOS gets λR, a reply that was cut off R (TRL, torchtune)": (
        "compute_advantages",
        {"mask = rollout.mask\n": "mask = F.pad(rollout.mask, (1, 0), value=True)[:, :-1]\n"},
        (test_expected_ppo_gradient_off_policy, "gpt2"),
        test_advantages_are_their_parts_in_order,
        harmless(test_expected_ppo_gradient_is_the_policy_gradient, "gpt2", 1.0, CRITICS[0], 0),
    ),
    "what the critic says of padding bootstrapped into the last token (ROLL#447)": (
        "gae",
        {"next_value = torch.where(mask[:, t], values[:, t], next_value)": "next_value = values[:, t].nan_to_num()"},
        test_gae_is_its_definition,
        harmless(test_gae_is_its_definition, full=True),
    ),
    "V after a token trained on returns that contain the reward of that token (minRLHF)": (
        "Actor.critic",
        {"return values[:, :-1], values": "return values[:, 1:], values"},
        (test_what_the_critic_says, CRITICS[0]),
        harmless(test_what_the_critic_says, CRITICS[1]),
    ),
    "V after a token as the baseline of that token: the gradient is biased, whatever the critic": (
        "Actor.critic",
        {"values = self.value_head(x).squeeze(-1)": "values = self.value_head(x).squeeze(-1).roll(-1, 1)"},
        (test_expected_ppo_gradient_is_the_policy_gradient, "gpt2", 1.0, CRITICS[0], 0),
        harmless(test_expected_ppo_gradient_is_the_policy_gradient, "gpt2", 0.5, CRITICS[1], 0),
    ),
    "whitening that adds the mean again where it should not: advantages are never centred (torchtune)": (
        "masked_whiten",
        {"if shift_mean else": "if not shift_mean else"},
        test_whitening_is_standard_and_affine_invariant,
        harmless(test_whitening_is_standard_and_affine_invariant, zero=True),
    ),
    "whitening by the moments of padding too: the result depends on how far the batch is padded (minRLHF)": (
        "masked_whiten",
        {
            "mean = masked_mean(x, mask)": "mean = torch.where(mask, x, 0.0).mean()",
            "variance = masked_mean(centered**2, mask)": "variance = (centered**2).mean()",
        },
        test_whitening_is_standard_and_affine_invariant,
        harmless(test_whitening_is_standard_and_affine_invariant, full=True),
    ),
    "whitening without a floor: 0, 1 or equal elements give NaN, and the next step destroys the weights": (
        "masked_whiten",
        {"variance + 1e-8": "variance"},
        test_whitening_is_standard_and_affine_invariant,
        harmless(test_masked_whiten_worked_by_hand),
    ),
    "whiten_rewards never read (torchtune)": (
        "compute_advantages",
        {"if cfg.whiten_rewards:": "if False:"},
        test_advantages_are_their_parts_in_order,
        harmless(test_advantages_are_their_parts_in_order, settings=dict(whiten_rewards=False)),
    ),
    "returns from whitened advantages": (
        "compute_advantages",
        {"(returns - mean) / std": "(rollout.advantages + rollout.values - mean) / std"},
        test_advantages_are_their_parts_in_order,
        harmless(test_advantages_are_their_parts_in_order, settings=dict(whiten_advantages=False, critic_lam=None)),
    ),
    # Losses
    "the larger of the two objectives: the clip frees just what it should hold": (
        "policy_loss",
        {"torch.minimum(unclipped, clipped)": "torch.maximum(unclipped, clipped)"},
        test_policy_loss_by_brute_force,
        test_policy_loss_worked_by_hand,
        harmless(test_policy_loss_by_brute_force, zero=True),
    ),
    "the smaller of the two squares: below ½ MSE, no gradient for what is far off": (
        "value_loss",
        {"larger_error = torch.maximum(error, torch": "larger_error = torch.minimum(error, torch"},
        test_value_loss_by_brute_force,
        test_value_loss_worked_by_hand,
        harmless(test_value_loss_by_brute_force, zero=True),
    ),
    "an entropy bonus with the wrong sign": (
        "ppo_loss",
        {"loss - cfg.ent_coef": "loss + cfg.ent_coef"},
        test_each_term_of_the_loss_has_its_coefficient,
        harmless(test_each_term_of_the_loss_has_its_coefficient, same=True, settings=dict(temperature=1e-4)),
    ),
    # Steps
    "each micro-batch by its own mean: the gradient depends on how the step was cut (verl#5625, minRLHF)": (
        "ppo_update",
        {"(loss / step_tokens).backward()": "(loss / len(batch.valid)).backward()"},
        (test_any_partition_into_micro_batches_is_the_same_update, "token", 1),
        harmless(test_any_partition_into_micro_batches_is_the_same_update, "token", 4),
    ),
    "mini-batches that add no step (trl#5645)": (
        "ppo_update",
        {".chunk(cfg.num_ppo_epochs * cfg.num_mini_batches)": ".chunk(cfg.num_ppo_epochs)"},
        (test_with_learning_rate_0_nothing_moves, "gpt2"),
        harmless(test_with_learning_rate_0_nothing_moves, "gpt2", settings=dict(num_mini_batches=1)),
    ),
    "early stop after the backward pass, its gradients left for the next step (minRLHF)": (
        "ppo_update",
        {
            "optimizer.step()": "optimizer.step(), optimizer.zero_grad()",
            "optimizer.zero_grad()  # whether": "# whether",
        },
        test_target_kl_stops_before_the_step_and_leaves_no_gradient_behind,
        (test_no_gradient_is_left_after_an_update, 1e-6),
        harmless(test_no_gradient_is_left_after_an_update, None),
    ),
    "one norm for policy and critic: large returns shrink the policy's step": (
        "ppo_update",
        {'group["params"]': "list(actor.parameters())"},
        test_policy_and_critic_are_clipped_apart,
        harmless(test_gradient_clipping, 1e-3),
    ),
    "max_grad_norm never read (TRL)": (
        "ppo_update",
        {"cfg.max_grad_norm or math.inf": "math.inf"},
        (test_gradient_clipping, 1e-3),
        harmless(test_gradient_clipping, None),
    ),
    # Metrics
    "approx-KL over padding too, where it is 0: the longer the padding, the better the run looks (trl#6809)": (
        "policy_loss",
        {"masked_mean(old_new_kl, mask)": "old_new_kl.mean()"},
        test_policy_loss_by_brute_force,
        harmless(test_policy_loss_by_brute_force, full=True),
    ),
    "a made-up value for padding in the mean entropy (trl#2022)": (
        "rollout_metrics",
        {"rollout.entropy[mask].mean()": "rollout.entropy.masked_fill(~mask, 1.0).mean()"},
        (test_metrics_are_means_over_the_valid_tokens, 0, CRITICS[0]),
        harmless(test_metrics_are_means_over_the_valid_tokens, 0, CRITICS[0], **NO_STOP),
    ),
    "only the last minibatch in the metrics": (
        "ppo_update",
        {"tokens += step_tokens": "tokens = step_tokens", "totals[name] += x": "totals[name] = x"},
        (test_with_learning_rate_0_nothing_moves, "gpt2"),
        harmless(test_with_learning_rate_0_nothing_moves, "gpt2", settings=dict(num_mini_batches=1, num_ppo_epochs=1)),
    ),
}


@pytest.mark.parametrize("exhibit", MUSEUM)
def test_the_properties_reject_what_others_shipped(exhibit, monkeypatch):
    function, changes, *proofs, (control, its_arguments, case) = MUSEUM[exhibit]
    wrong = edited(function, *itertools.chain(*changes.items()))
    monkeypatch.setattr(f"ppo_llm.{function}", wrong)
    proofs = [proof if isinstance(proof, tuple) else (proof,) for proof in proofs]
    for proof in {control, *(proof for proof, *_ in proofs)}:
        if hasattr(proof, "hypothesis"):  # one failing example will do, it need not be the smallest
            name = "_hypothesis_internal_use_settings"
            quick = dict(phases=[Phase.generate], report_multiple_bugs=False, derandomize=True, database=None)
            monkeypatch.setattr(proof, name, settings(getattr(proof, name), **quick))
    for proof, *arguments in proofs:
        with pytest.raises(AssertionError):
            proof(*arguments)
    for name, x in case.items():
        monkeypatch.setitem(CASE, name, x)
    control(*its_arguments)


def test_errors_neither_cancel_nor_hide():
    """Vacuous tests shipped too: rtol = 1e6, signed errors that sum to 0. The measure used here sees ±1, and NaN."""
    assert error([1.0, -1.0], [0.0, 0.0]) == 1
    assert error([math.nan], [0.0]) == math.inf
    assert error([math.inf], [math.inf]) == math.inf


# Faults that `mutants.py` can plant and no test can see, since nothing follows from them, by its names:
#   [op] in a signature, `Tensor | None`: annotations are never evaluated here (`from __future__ import annotations`).
#   masked_mean, policy_loss, value_loss [const], `torch.where(mask, ..., 0.0)`: any finite number does in cells that
#   are left out of the sum, or multiplied by 0.
#   ppo_update [ops0], the target of the KL: another answer at equality only.
#   ppo_update [op], `sum(norms) + sum(step.values())`: a difference is as little finite.
#   entropy_from_logits [const], -1000: p is 0 below either bound.
#   Actor.critic, Actor.__init__ [op], `| None`: annotations too. left_pad [const]: any token may pad.
#   rollout_metrics [const], 1e-12: a floor that returns of equal value alone reach. ppo_update [attr], zeros_like: each
#   cell that is read is written first. draw_prompts [ops0]: a pass too many is cut off again.
#   decode [delete], `.to(device)`: it is there already, without a GPU.
#   Actor.logprobs [const], `use_reentrant`: chunks are recomputed by the older way, to the same numbers.


# -------------------------------------------------------------------------- what the tests of the program are made with

CPU = torch.device("cpu")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWARDS = """import numpy
def answers(prompts, completions, **columns):
    return [float(a) for a in columns['answer']]
def words(prompts, completions, **columns):
    return [len(text.split()) for text in completions]
def zero(prompts, completions, **columns):
    return [0.0] * len(prompts)
def short(prompts, completions, **columns):
    return [0.0]
def text(prompts, completions, **columns):
    return ['much'] * len(prompts)
def number(prompts, completions, **columns):
    return 1.0
def nan(prompts, completions, **columns):
    return [float('nan')] * len(prompts)
def pairs(prompts, completions, **columns):
    return numpy.zeros((len(prompts), 2))
def huge(prompts, completions, **columns):
    return [10 ** 400] * len(prompts)
def wide(prompts, completions, **columns):
    return [1e39] * len(prompts)
def large(prompts, completions, **columns):
    return [2e38] * len(prompts)
async def later(prompts, completions, **columns):
    return [1.0] * len(prompts)
"""
OWN_MODEL = """
from transformers import GPT2Config, GPT2LMHeadModel
class OwnConfig(GPT2Config):
    model_type = 'own'
class Own(GPT2LMHeadModel):
    config_class = OwnConfig
"""
FILES = {  # as a user has them, most of them wrong
    "prompts.txt": "t1 t3\nt4\n\nt5 t1 t1\n",
    "mixed.txt": "".join(f"t{i % 7} t1 t5"[: 2 + i % 3 * 3] + "\n" for i in range(30)),
    "prompts.jsonl": "".join(f'{{"prompt": "t{i % 6} t1", "answer": {i}}}\n' for i in range(20)),
    "bad.jsonl": '{"prompt": "t1"}\n{"prompt": \n',
    "lacks.jsonl": '{"prompt": "t1"}\n{"text": "t1"}\n',
    "empty.txt": "\n",
    "latin.txt": "t1\n\xff\n",
    "blank.jsonl": '{"prompt": "t1"}\n\n{"prompt": " "}\n',
    "list.jsonl": '["t1"]\n',
    "roles.jsonl": '{"prompt": [{"text": "t1"}]}\n',
    "null.jsonl": '{"prompt": [{"role": "assistant", "content": null}]}\n',
    "half.jsonl": '{"prompt": "t1"}\n{"prompt": "t1 \\ud83d"}\n',
    "column.jsonl": '{"prompt": "t1", "answer": "\\ud83d"}\n',
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "t1"}]}\n',
    "long.txt": "t1 " * 40 + "\n",
    "broken.py": "import nothing_of_this_name\n",
    "rewards.py": REWARDS,
}


def words_tokenizer(V=7):
    """One word a token, t0 t1 …; neither bos, eos nor pad."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0")


def letters_tokenizer(**special):
    """One character a token; bos, eos and pad as given, among the letters or beside them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = "?abcdefghijklmnopqrstuvwxyz 0123456789+=<>"
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", **special)


def letters_model(kind="Llama", head="ForCausalLM", labels=1, **changes):
    import transformers

    torch.manual_seed(0)
    shape = SHAPE | dict(vocab_size=48, max_position_embeddings=64, num_labels=labels) | changes
    config = getattr(transformers, f"{kind}Config")(**shape)
    return getattr(transformers, f"AutoModel{head}").from_config(config)


def mean_length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with models, prompts and rewards, sound ones and wrong ones."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text, "latin-1")
    models = {
        "model": tiny().float(),
        "other": tiny(seed=1).float(),
        "judge": model_of("Llama", 0, "ForSequenceClassification"),
        "mamba": letters_model("Mamba"),
        "layerless": letters_model("GPTNeoXJapanese"),
        "narrow": tiny(V=4).float(),
        "short": tiny(n_positions=8).float(),
        "single": letters_model("Llama", "ForSequenceClassification"),
        "strict": tiny().float(),
        "scorer": letters_model("Llama", "ForSequenceClassification", vocab_size=7),
    }
    for name, model in models.items():
        save(folder / name, model, words_tokenizer())
    (folder / "strict" / "chat_template.jinja").write_text("{{ raise_exception('only the system may speak') }}")
    save(folder / "letters", letters_model(), letters_tokenizer())
    for name in ("cut", "custom"):
        shutil.copytree(folder / "model", folder / name)
    cut(folder / "cut" / "model.safetensors")
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "custom" / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (folder / "custom" / "own.py").write_text("raise SystemExit('code of the model was run')\n")
    save(folder / "remote", tiny().float(), words_tokenizer())
    path = folder / "remote" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": classes}))
    (folder / "remote" / "own.py").write_text(OWN_MODEL)
    return folder


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def run_cli(*arguments, cwd, **env):
    words = [sys.executable, P.__file__, *map(str, arguments)]
    env = ENV | {"COLUMNS": "80"} | env
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(run):
    """A row an update, between the evaluations before and after."""
    return lines(run / "metrics.jsonl")


def the_line(capsys):
    """The only line on stderr beside the progress bar."""
    shown = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(shown) == 1, shown
    return shown[0]


def short_run(folder, **changes):
    """Settings of a run that takes less than a second."""
    quick = dict(num_updates=1, batch_size=8, response_length=4, name="x", runs_dir=str(folder))
    return Config(**quick | changes)


def made(model, **changes):
    """The actor that a run with these settings trains."""
    cfg = Config(**changes)
    critic = P.load_critic(cfg, model, words_tokenizer()) if cfg.critic_model else None
    return P.make_actors(cfg, model, critic, CPU, torch.float32)[0]


# --------------------------------------------------------------------------------------------- 7. the settings of a run

SOUND = "--model model --prompts prompts.txt --reward rewards.py:words --response-length 8 --name x"
BAD = {  # what is added to the sound command: what the one line says
    "--batch-size 4 --num-mini-batches 8": "--num-mini-batches 8: expected a divisor of --batch-size 4",
    "--batch-size 0": "--batch-size 0: expected 1 or more",
    "--samples-per-prompt 3": "--samples-per-prompt 3: expected a divisor of --batch-size 128",
    "--save-every 0": "--save-every 0: expected 1 or more",
    "--max-prompt-length 0": "--max-prompt-length 0: expected 1 or more",
    "--lam 1.5": "--lam 1.5: expected a number in [0, 1]",
    "--lam nan": "--lam nan: expected a number in [0, 1]",
    "--gamma -0.1": "--gamma -0.1: expected a number in [0, 1]",
    "--critic-lam 2": "--critic-lam 2.0: expected a number in [0, 1]",
    "--cliprange -0.2": "--cliprange -0.2: expected a number between 0 and 1",
    "--cliprange-high 0": "--cliprange-high 0.0: expected a number above 0",
    "--cliprange-value -1": "--cliprange-value -1.0: expected a number above 0",
    "--dual-clip 0.5": "--dual-clip 0.5: expected a number above 1",
    "--temperature 0": "--temperature 0.0: expected a number above 0",
    "--score-clip -1": "--score-clip -1.0: expected a number above 0",
    "--learning-rate inf": "--learning-rate inf: expected a number above 0",
    "--critic-lr 0": "--critic-lr 0.0: expected a number above 0",
    "--kl-coef -1": "--kl-coef -1.0: expected 0 or more",
    "--kl-coef 0 --kl-target 6": "--kl-coef 0.0: expected a number above 0 to start from",
    "--kl-target 6 --kl-horizon 100": "--kl-horizon 100.0: expected at least --batch-size 128",
    "--kl-in loss": "--kl-estimator k1: expected k2 or k3, with --kl-in loss",
    "--seed -1": "--seed -1: expected 0 or more",
    "--name a/b": "--name a/b: expected letters, digits and ._+- only",
    "--device warp": "--device warp: expected a device that torch has here",
    "--runs-dir rewards.py": "cannot create rewards.py/x, give another --runs-dir or --name",
    "--runs-dir /proc/x": "cannot create /proc/x/x",
    "--runs-dir . --name model": "model exists and is not overwritten: give another --name",
    "--resume .": "--resume .: expected the folder of a run",
    "--resume nowhere": "--resume nowhere: expected the folder of a run",
    # Models.
    "--model None": "prompts and rewards need a model: give --model too",
    "--model None --reward": "prompts and rewards need a model: give --model too",
    "--model None --prompts None": "prompts and rewards need a model: give --model too",
    "--model ./nowhere": "--model ./nowhere",
    "--model judge": "it holds no lm_head.weight, so it is no CausalLM model",
    "--model cut": "--model cut",
    "--model mamba": "MambaForCausalLM cannot be trained here",
    "--model custom": "--model custom: it comes with code of its own: give --trust-remote-code",
    "--model layerless --gradient-checkpointing": "GPTNeoXJapaneseForCausalLM has no layers",
    "--stop-token 't1 t2'": "--stop-token 't1 t2': expected one token of this tokenizer, got 2",
    "--response-length 30": "--response-length 30: the models take 32 tokens in all and prompts have up to 3",
    "--model narrow": "is none of the model's 4: take the model's tokenizer",
    "--critic-model judge": "--critic shared: expected separate, with --critic-model",
    "--critic separate --critic-model judge": "expected a decoder with a score head of one label",
    "--critic separate --critic-model letters": "its vocabulary is not the policy's",
    "--critic separate --critic-model mamba": "MambaForCausalLM cannot be trained here",
    "--critic separate --critic-model short": "--response-length 8: the models take 8 tokens in all",
    "--critic separate --critic-model narrow": "narrow: it embeds 4 tokens, and the policy samples from 7",
    # Prompts.
    "--prompts None": "give --prompts FILE and --reward FILE.py:FUNCTION",
    "--prompts nowhere.txt": "--prompts nowhere.txt: expected a file that exists",
    "--prompts rewards.py": "rewards.py: expected .txt, a prompt a line, or .jsonl",
    "--prompts bad.jsonl": "bad.jsonl, line 2",
    "--prompts lacks.jsonl": "lacks.jsonl, line 2",
    "--prompts empty.txt": "empty.txt holds no prompts",
    "--prompts latin.txt": "latin.txt, line 2",
    "--prompts blank.jsonl": 'blank.jsonl, line 3: expected a "prompt"',
    "--prompts list.jsonl": 'list.jsonl, line 1: expected a "prompt"',
    "--prompts roles.jsonl": 'roles.jsonl, line 1: expected a "prompt"',
    "--prompts null.jsonl": 'null.jsonl, line 1: expected a "prompt"',
    "--prompts half.jsonl": "half.jsonl, line 2: 'utf-8' codec can't encode",
    "--prompts column.jsonl": "column.jsonl, line 1: 'utf-8' codec can't encode",
    "--prompts chat.jsonl": "tokenizer has no chat template",
    "--model strict --prompts chat.jsonl": "'content': 't1'}]: TemplateError: only the system may speak",
    "--eval-prompts bad.jsonl": "bad.jsonl, line 2",
    "--model letters --prompts long.txt": "drop long prompts by --max-prompt-length",
    "--prompts long.txt --max-prompt-length 3": "leaves no prompt to train on",
    # Rewards.
    "--reward": "give --prompts FILE and --reward FILE.py:FUNCTION",
    "--reward rewards.py:missing": "rewards.py has no function missing",
    "--reward broken.py:f": "broken.py cannot be imported: ModuleNotFoundError",
    "--reward no_such_module:f": "no_such_module cannot be imported: ModuleNotFoundError",
    "--reward nowhere.py:f": "expected FILE.py:FUNCTION or MODULE:FUNCTION",
    "--reward f": "expected FILE.py:FUNCTION or MODULE:FUNCTION",
    "--reward-weights nan": "--reward-weights (nan,): expected finite numbers",
    "--reward-weights 1 2": "--reward-weights: expected 1 of them, one a reward, got 2",
    "--reward-model model": "it holds no score.weight, so it is no SequenceClassification model",
    "--reward-model ./nowhere": "--reward-model ./nowhere",
    "--reward-model judge": "--reward-label None: expected one of LABEL_0, LABEL_1",
    "--reward-model judge --reward-label x": "--reward-label x: expected one of LABEL_0, LABEL_1",
    "--reward-model single --reward-label x": "--reward-label x: expected one of LABEL_0, the labels of single",
    "--reward rewards.py:later": "the reward later is an async function",
}
BAD_REWARDS = {
    "text": "reward text gave 'much', expected a finite number or None, for the prompt 't",
    "number": "reward number failed at",
    "short": "reward short: expected 128 numbers, one a completion, got 1",
    "answers": "reward answers failed at rewards.py:3: KeyError: 'answer'",
    "nan": "reward nan gave nan, expected a finite number or None, for the prompt 't",
    "pairs": "reward pairs gave array([0., 0.]), expected a finite number or None, for the prompt 't",
    "huge": "reward huge gave 1000000",
    "wide": "reward wide gave 1e+39, expected a finite number or None, for the prompt 't",
    "large --reward-weights 2": "the weighted sum of the rewards overflows float32",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_refused_in_one_line(arguments, files, tmp_path, capsys, monkeypatch):
    """Exit status 2 before anything is written; one line that says what, and no traceback."""
    monkeypatch.chdir(files)
    assert P.main(shlex.split(f"{SOUND} --runs-dir {tmp_path}/runs {arguments}")) == 2
    line = the_line(capsys)
    assert line.startswith("ppo_llm.py: ")
    assert BAD[arguments] in line
    assert not (tmp_path / "runs").exists()


WRONG_TYPES = [
    (dict(reward="rewards.py:words"), "--reward 'rewards.py:words': expected tuple[str, ...]"),
    (dict(batch_size="8"), "--batch-size '8': expected int"),
    (dict(critic="own"), "--critic 'own': expected Literal"),
    (dict(reward_weights=(1, "2")), "--reward-weights (1, '2'): expected tuple[float, ...] | None"),
    (dict(model=object()), "the settings: TypeError: expected str, bytes or os.PathLike object, not object"),
]


@pytest.mark.parametrize("changes, message", WRONG_TYPES)
def test_a_setting_of_the_wrong_type_is_refused(changes, message, tmp_path):
    """From Python too, where no command line has looked at it."""
    with pytest.raises(P.UsageError, match=re.escape(message)):
        P.train(Config(runs_dir=str(tmp_path), **changes))
    assert list(tmp_path.iterdir()) == []


def test_settings_that_json_writes_otherwise_are_the_same_on_a_resume(tmp_path):
    """A list, a path, numbers of NumPy: the run trains, and goes on."""
    import numpy

    arguments = ["ab", "c"], [mean_length, mean_length], letters_model(), letters_tokenizer()
    changes = dict(reward_weights=[1, 0.5], learning_rate=numpy.float32(0.5), save_every=numpy.int64(1))
    cfg = short_run(tmp_path, runs_dir=tmp_path, **changes)
    run = P.train(cfg, *arguments)
    assert json.loads((run / "config.json").read_text())["config"]["learning_rate"] == 0.5
    more = dataclasses.replace(cfg, resume=run, num_updates=2)
    P.train(more, *arguments[:2], letters_model(), letters_tokenizer())
    assert [row["update"] for row in metrics_of(run)] == [0, 1, 2, 2]


@pytest.mark.parametrize("number", [0, 1])
def test_the_ends_of_a_range_belong_to_it(number):
    Config(gamma=number, lam=number, critic_lam=number).check()


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_reward_that_fails_at_once_ends_the_run_in_one_line(name, files, tmp_path, capsys, monkeypatch):
    """Exit status 1: the run has begun."""
    monkeypatch.chdir(files)
    assert P.main(f"{SOUND} --runs-dir {tmp_path} --reward rewards.py:{name}".split()) == 1
    line = the_line(capsys)
    assert line.startswith(f"ppo_llm.py: {BAD_REWARDS[name]}")
    assert f"there is no checkpoint yet (see --save-every): python ppo_llm.py --resume {tmp_path}/x begins anew" in line


@pytest.mark.parametrize("arguments", ["--batch-size x", "--kl-estimator k4", "--critic own", "--no-such-flag 1"])
def test_a_flag_or_a_value_that_does_not_exist_ends_with_status_2(arguments, capsys):
    """tyro prints it, and names the flag."""
    with pytest.raises(SystemExit) as end:
        P.main(arguments.split())
    assert end.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


def test_every_flag_is_explained():
    """--help begins with what every run needs and names each flag with the sentence that stands beside it in the
    source, which says what None means."""
    source = Path(P.__file__).read_text()
    done = run_cli("--help", cwd=HERE, COLUMNS="200")
    assert done.returncode == 0
    flags = re.findall(r"^│ --([\w-]+)", done.stdout, re.M)
    assert flags[:3] == ["model", "prompts", "reward"]
    words = " ".join(done.stdout.replace("│", " ").split())
    for field in dataclasses.fields(Config):
        explained = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.M).group(1)
        assert field.name.replace("_", "-") in flags
        assert explained in words
        assert "None" not in field.type or "None" in explained, field.name
    assert max(map(len, run_cli("--help", cwd=HERE).stdout.splitlines())) <= 80


EFFECTIVE = {  # each of these flags alone makes another run
    **dict(num_updates=3, batch_size=16, samples_per_prompt=2, response_length=5, temperature=0.7, seed=2, kl_coef=0.3),
    **dict(missing_eos_penalty=1, score_clip=0.5, kl_estimator="k3", kl_in="loss", kl_target=0.01, gamma=0.9, lam=0.5),
    **dict(critic_lam=0.5, whiten_rewards=True, whiten_advantages=False, bootstrap_truncated=True, num_ppo_epochs=1),
    **dict(num_mini_batches=2, learning_rate=3e-3, critic_lr=1e-3, lr_scheduler_type="cosine", warmup_updates=1),
    **dict(max_grad_norm=0.01, cliprange=0.01, cliprange_high=0.9, dual_clip=1.01, cliprange_value=1e-3, vf_coef=0.5),
    **dict(ent_coef=0.1, loss_aggregation="sequence", target_kl=1e-4, critic_warmup_updates=1),
    **dict(model="other", prompts="prompts.jsonl", reward=("rewards.py:zero",), reward_model=("scorer",)),
    **dict(reward_weights=(2.0,), eval_prompts="prompts.txt", max_prompt_length=2, stop_token="t3", dtype="bfloat16"),
    **dict(critic="separate", critic_target="action-value"),
}
INEFFECTIVE = dict(micro_batch_size=1, gradient_checkpointing=True, kl_horizon=100.0, save_every=1, device="cpu")
TOLD_ELSEWHERE = {"name", "runs_dir", "resume", "reward_label", "critic_model", "trust_remote_code", "matmul_precision"}


@pytest.fixture(scope="module")
def run_with(files, tmp_path_factory):
    """Two small updates with some settings changed: the metrics but for the times, and the final weights."""
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("flags")
    base = dict(model="model", prompts="mixed.txt", reward=("rewards.py:words",), kl_estimator="k2", learning_rate=0.01)
    base |= dict(num_updates=2, batch_size=8, response_length=6, cliprange=0.1, seed=3)
    counter = itertools.count()

    def run(**changes):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(files)
            run = P.train(Config(**base | changes, name=f"x{next(counter)}", runs_dir=str(folder)))
        metrics = [without_times(row) for row in metrics_of(run)]
        return metrics, load_file(run / "policy" / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def usual(run_with):
    return run_with()


def test_no_flag_is_forgotten():
    flags = {field.name for field in dataclasses.fields(Config)}
    assert flags == EFFECTIVE.keys() | INEFFECTIVE.keys() | TOLD_ELSEWHERE


@pytest.mark.parametrize("flag", EFFECTIVE)
def test_no_flag_is_without_effect(flag, run_with, usual):
    """On what is learned or on what is logged, from update to update. Each run ends as it should."""
    metrics, _ = run_with(**{flag: EFFECTIVE[flag]})
    assert all(math.isfinite(x) for row in metrics for x in row.values())
    assert metrics != usual[0]


def test_kl_in_the_loss_holds_a_run(run_with):
    """β is its weight in the loss, and no reward."""
    (_, *weak, _), _ = run_with(kl_in="loss", kl_coef=0.0)
    (_, *strong, _), _ = run_with(kl_in="loss", kl_coef=30.0)
    assert strong[0]["objective/rlhf_reward"] == weak[0]["objective/rlhf_reward"]
    assert strong[1]["objective/kl"] < 0.9 * weak[1]["objective/kl"]


@pytest.mark.parametrize("flag", INEFFECTIVE)
def test_what_saves_memory_changes_nothing_else(flag, run_with, usual):
    metrics, weights = run_with(**{flag: INEFFECTIVE[flag]})
    for row, expected in zip(metrics, usual[0], strict=True):  # in float32, where steps of 0.01 magnify each rounding
        assert row == pytest.approx(expected, abs=5e-3)
    for name, x in weights.items():
        assert error(x, usual[1][name]) < 5e-3


# ----------------------------------------------------------------------------------------------- 8. prompts and rewards


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4))
def test_left_pad_keeps_every_token_and_says_where(rows):
    """Token 0, which also pads, is content where a row has it: the mask comes from lengths."""
    ids, mask = P.left_pad(rows)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [x[m].tolist() for x, m in zip(ids, mask)] == rows
    assert (mask[:, 1:] >= mask[:, :-1]).all()  # the padding is on the left


@pytest.mark.parametrize(
    "special, eos",
    [
        ({}, None),
        (dict(pad_token="a", eos_token="a"), 1),
        (dict(pad_token="z"), [3, 4]),
        (dict(bos_token="<", eos_token=">", pad_token="?"), [42, 5]),
    ],
)
def test_tokenizers_with_and_without_pad_eos_and_bos(special, eos, tmp_path):
    """No pad token, pad equal to EOS, several end-of-turn tokens in the generation config: a reply ends at each of them
    and nowhere else, and the token that ends it belongs to the reply."""
    replies = []

    def reward(prompts, completion_ids, **columns):
        replies.extend(completion_ids)
        return [0.0] * len(prompts)

    lm = letters_model()
    lm.generation_config.eos_token_id = eos
    tokenizer = letters_tokenizer(**special)
    run = P.train(short_run(tmp_path, batch_size=64, response_length=12), ["ab", "c d"], reward, lm, tokenizer)
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    ended = [reply[-1] in stops for reply in replies]
    for reply, end in zip(replies, ended):
        assert not stops & set(reply[:-1])
        assert end or len(reply) == 12
    metrics = metrics_of(run)[1]
    assert len(replies) == 64
    assert any(ended) == (stops != {None})
    assert metrics["reply/ended"] == sum(ended) / 64
    assert metrics["reply/length"] == sum(map(len, replies)) / 64


def test_chat_prompts_and_columns_reach_rewards_as_in_trls_grpo(tmp_path):
    """Messages go through the chat template, without a second bos. The reward gets the messages, the reply as a
    message, the ids, and each column, None where a row lacks it."""
    seen = []

    def reward(prompts, completions, completion_ids, answer, level, **columns):
        seen.extend(zip(prompts, completions, completion_ids, answer, level))
        return answer

    user = {"role": "user", "content": "hi"}
    begun = {"role": "assistant", "content": "ab"}
    rows = [
        {"prompt": [user], "answer": 3, "level": "x"},
        {"prompt": [user, begun], "answer": None},
        {"prompt": "plain", "answer": 1, "level": "y"},
    ]
    tokenizer = letters_tokenizer(bos_token="<", chat_template=CHAT)
    texts = [tokenizer.decode(p.ids).replace(" ", "") for p in P.encode(tokenizer, rows, 48)]
    assert texts == ["<user>hi<assistant>", "<user>hi<assistant>ab", "plain"]
    cfg = short_run(tmp_path, batch_size=6, num_mini_batches=1)
    run = P.train(cfg, rows, reward, letters_model(), tokenizer)
    columns = {str(prompt): (answer, level) for prompt, _, _, answer, level in seen}
    assert columns == {str(row["prompt"]): (row["answer"], row.get("level")) for row in rows}
    for prompt, completion, ids, *_ in seen:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if prompt == "plain":
            assert completion.strip() == text
        else:
            assert completion == [{"role": "assistant", "content": text}]
    metrics = metrics_of(run)[1]
    assert metrics["rewards/reward"] == 2
    assert metrics["objective/scores"] == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    "prompt, ids, reply, text",
    [
        ("it was", [1, 2, 3], [4, 5], " goodly"),
        ("it was", [1, 2, 3], [5], "ly"),
        ("it was", [2, 3], [1], ""),
        ([{"role": "user", "content": "it was"}], [1, 2, 3], [4, 5, 1], "goodly"),
        ("it\xc3", [2, 6], [7, 4], "\ufffd good"),
    ],
)
def test_prompt_and_reply_are_the_whole_text(prompt, ids, reply, text):
    """A decoder of Llama 2's kind drops the space before the first word of what it is given, and a reward model would
    read "wasgood". What a reply adds to half a character cannot be told, and a chat's reply is a message of its own:
    both are decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "? <s> ▁it ▁was ▁good ly <0xC3> <0xA9>".split()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    assert P.reply_text(tokenizer, P.Prompt(ids, {"prompt": prompt}), reply) == text


def test_a_column_cannot_pass_for_what_happened(tmp_path, capsys):
    """Columns of the names that the log of samples uses reach the reward, and mislead no report."""
    rows = [{"prompt": letter, "held_out": True, "update": 99, "score": "x"} for letter in "abc"]
    run = P.train(short_run(tmp_path), rows, mean_length, letters_model(), letters_tokenizer())
    sample = lines(run / "samples.jsonl")[0]
    assert (sample["update"], sample["held_out"]) == (1, False)
    assert "Held-out" not in capsys.readouterr().out


def test_a_chat_in_parts_runs_to_its_end(tmp_path, capsys):
    """Content as a list of parts, as the templates of models that also see have it."""
    parts = [[{"type": "text", "text": letter}] for letter in "abcdefghij"]
    chats = [{"prompt": [{"role": "user", "content": content}]} for content in parts]
    P.train(short_run(tmp_path), chats, mean_length, letters_model(), letters_tokenizer(chat_template=CHAT))
    assert "[{'type': 'text', 'text': '" in capsys.readouterr().out


def test_held_out_prompts_are_not_trained_on(tmp_path):
    """One in ten, at most 64, drawn by the seed; with the others they are all prompts."""
    for n, share in ((9, 0), (30, 3), (1000, 64)):
        texts = [str(i) for i in range(n)]
        tasks = []
        for seed in (1, 1, 2):
            cfg = short_run(tmp_path, seed=seed)
            tasks.append(P.prepare(cfg, texts, mean_length, letters_model(), letters_tokenizer(), None))
        held_out, again, other = ([p.row["prompt"] for p in task.held_out] for task in tasks)
        assert len(held_out) == share
        assert held_out == again
        assert share == 0 or held_out != other
        assert sorted(held_out + [p.row["prompt"] for p in tasks[0].prompts]) == sorted(texts)


def test_rewards_of_one_file_share_it_and_each_has_a_name(files, tmp_path, monkeypatch, capsys):
    """The file is run once. Where two names are the same, each gets its number, so that none hides another."""
    monkeypatch.chdir(tmp_path)
    Path("r.py").write_text(
        "print('the file is run')\n"
        "def score(prompts, **columns): return [1.0] * len(prompts)\n"
        "def score_0(prompts, **columns): return [2.0] * len(prompts)\n"
    )
    more = "--reward r.py:score r.py:score r.py:score_0 --reward-weights 1 10 100 --num-updates 1 --name x"
    assert P.main(command(files, more)) == 0
    assert capsys.readouterr().out.count("the file is run") == 1
    first = metrics_of(Path("runs/x"))[1]
    assert first["objective/scores"] == 211
    names = {name: x for name, x in first.items() if name.startswith("rewards/")}
    assert names == {"rewards/score_0": 1, "rewards/score_1": 1, "rewards/score_0_2": 2}


def test_a_model_without_a_generation_config_trains(tmp_path):
    lm = letters_model()
    lm.generation_config = None
    P.train(short_run(tmp_path), ["ab"], mean_length, lm, letters_tokenizer())


def test_a_model_that_cannot_be_saved_is_refused_before_the_run(tmp_path):
    """transformers refuses to save what it would warn about; after training it would be too late."""
    lm = letters_model()
    lm.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(P.UsageError, match="the model cannot be saved, as it will have to be: .*temperature"):
        P.train(short_run(tmp_path), ["ab"], mean_length, lm, letters_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_long_prompts_are_dropped_and_counted(tmp_path, capsys):
    """--max-prompt-length keeps what is no longer than that, of both sets, and says how many it dropped."""
    cfg = short_run(tmp_path, max_prompt_length=3)
    prompts = ["abc", "abcd", "ab"]
    task = P.prepare(cfg, prompts, mean_length, letters_model(), letters_tokenizer(), ["a", "abcdef"])
    assert [p.row["prompt"] for p in task.prompts] == ["abc", "ab"]
    assert [p.row["prompt"] for p in task.held_out] == ["a"]
    assert "Dropped 2 of 5 prompts, longer than --max-prompt-length 3" in capsys.readouterr().out


JUDGES = [
    ("GPT2", dict(pad_token_id=None)),
    ("Llama", dict(pad_token_id=1)),
    ("Bert", {}),
    ("Llama", dict(pad_token_id=None)),
]


def judge(folder, chat, model, tokenizer, **changes):
    """The model as a reward function. Its config.json lists the labels from the last to the first."""
    name = save(folder / "judge", model.eval(), tokenizer)
    path = folder / "judge" / "config.json"
    about = json.loads(path.read_text())
    labels = {str(i): f"LABEL_{i}" for i in reversed(range(model.num_labels))}
    path.write_text(json.dumps(about | {"id2label": labels}))
    return P.load_reward_model(name, chat, CPU, torch.float32, Config(**changes))


@torch.no_grad()
def judged_alone(model, text):
    """The logits of the one text by the model's own forward. A text that is too long keeps its first token and its
    end."""
    ids = letters_tokenizer()(text)["input_ids"]
    if len(ids) > 64:
        ids = ids[:1] + ids[-63:]
    return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kind, changes", JUDGES)
@pytest.mark.parametrize("labels", [1, 3])
def test_a_reward_model_scores_each_text_as_if_alone(kind, changes, labels, tmp_path, capsys):
    """Batches of texts of mixed length, with pad equal to a letter of the text, without a pad token, bidirectional: the
    model's own logit of the one text. The label picks one of several."""
    model = letters_model(kind, "ForSequenceClassification", labels, **changes)
    label = None if labels == 1 else "LABEL_2"
    reward = judge(tmp_path, False, model, letters_tokenizer(), reward_label=label, batch_size=8)
    prompts = ["ab", "c", "what is ", "a", "abc", "x" * 40]
    completions = ["a", "aaa", "zb", "", "bca", "y" * 60]
    scores = reward(prompts, completions)
    own = [judged_alone(model, p + c)[-1] for p, c in zip(prompts, completions)]
    assert error(scores, torch.stack(own)) < 1e-5
    assert len(set(scores)) == 6
    assert error(reward(prompts[:2], completions[:2]), scores[:2]) < 1e-5
    assert "texts of more than its 64 tokens lose their beginning" in the_line(capsys)
    assert reward.__name__ == "judge"


def test_a_reward_model_reads_chats_by_its_own_template(tmp_path):
    model = letters_model(head="ForSequenceClassification")
    reward = judge(tmp_path, True, model, letters_tokenizer(chat_template=CHAT))
    ask = {"role": "user", "content": "hi"}
    begun = {"role": "assistant", "content": "oh "}
    reply = {"role": "assistant", "content": "yes"}
    scores = reward([[ask], [ask, begun]], [[reply], [reply]])
    texts = ["<user>hi<assistant>yes", "<user>hi<assistant>oh yes"]
    assert error(scores, torch.cat([judged_alone(model, text) for text in texts])) < 1e-5


# ------------------------------------------------------------------------------------------------------------ 9. models


def evaluated(actor, **changes):
    """Replies to prompts of several lengths, with what the actor says of each token."""
    cfg = settings_of(micro_batch_size=3, **changes)
    rollout = replies_to(actor, [1, 6, 3, 2, 2, 5, 1, 4], cfg)
    P.fill_logprobs_and_values(actor, actor, rollout, cfg)
    return rollout


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_is_itself_and_trains(kind, files, tmp_path):
    """For each kind that people use, in float32 as it is trained: sampler (cached, left-padded) and scorer agree with
    the model's own forward on each reply alone. Two updates run from a folder; what they save loads, with other
    weights."""
    from transformers import AutoModelForCausalLM

    lm = model_of(kind)
    rollout = evaluated(P.Actor(lm), temperature=0.7)
    for prompt, reply, said in each_reply_and_its_numbers(rollout):
        own = alone(lm, prompt, reply, 0.7)
        assert error(said.sampler_logprobs, own) < 1e-4
        assert error(said.logprobs, own) < 1e-4
    assert rollout.logprobs[rollout.mask].std() > 0.1

    model = save(tmp_path / "model", lm, words_tokenizer())
    task = f"--model {model} --prompts {files}/prompts.txt --reward {files}/rewards.py:words"
    numbers = "--num-updates 2 --batch-size 8 --response-length 5 --learning-rate 1e-4"
    assert P.main(f"{task} {numbers} --name x --runs-dir {tmp_path}".split()) == 0
    first = metrics_of(tmp_path / "x")[1]
    assert first["policy/ratio"] == pytest.approx(1, abs=0.3)
    assert first["policy/sampler_gap"] < 1e-5
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "policy")
    moved = [(new - old).abs().max() for new, old in zip(trained.parameters(), lm.parameters())]
    assert 1e-5 < max(moved) < 1e-2


def test_a_reward_models_head_becomes_the_value_head(tmp_path):
    """At first V of each state, and Q of each token there, is what the reward model says of the text so far."""
    rm = model_of("Llama", 3, "ForSequenceClassification")
    rm.config.num_labels = 1
    rm.score = torch.nn.Linear(16, 1, bias=False)
    folder = save(tmp_path, rm, words_tokenizer())
    for target in ("value", "action-value"):
        actor = made(model_of("Llama"), critic="separate", critic_model=folder, critic_target=target)
        for prompt, reply, said in each_reply_and_its_numbers(evaluated(actor)):
            for t in range(len(reply)):
                text = torch.tensor([prompt + reply[:t]])
                score = rm.score(rm.base_model(text).last_hidden_state[0, -1]).squeeze()
                assert error(said.values[t], score) < 1e-5
                assert error(said.predictions[t], score) < 1e-5


def test_a_critic_may_start_from_another_language_model(tmp_path):
    """Its trunk has the weights of that model, not of the policy, and the critic says 0 at first."""
    other = model_of("Llama", 3)
    actor = made(model_of("Llama"), critic="separate", critic_model=save(tmp_path, other, words_tokenizer()))
    assert torch.equal(weights_of(actor.critic_trunk), weights_of(other.base_model))
    assert not torch.equal(weights_of(actor.critic_trunk), weights_of(actor.lm.base_model))
    assert not weights_of(actor.value_head).any()


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_in_bfloat16(kind):
    """Sampler and scorer choose the same experts, and are near the model's own float32."""
    lm = model_of(kind)
    P.fit_to_device(lm, CPU, torch.bfloat16)
    rollout = evaluated(P.Actor(lm, torch.bfloat16), temperature=0.7)
    assert error(rollout.logprobs, rollout.sampler_logprobs) < 0.05
    gaps = [said.logprobs - alone(lm, *of, 0.7) for *of, said in each_reply_and_its_numbers(rollout)]
    assert 1e-4 < torch.cat(gaps).abs().mean() < 0.05


def test_gpt2s_gelu_in_one_operation_is_the_same_function():
    """Eight operations in transformers, one in torch: the activation and its gradient in float64. No slow one is
    left."""
    from transformers.activations import NewGELUActivation

    actor = made(tiny(), critic="separate")
    act = actor.lm.base_model.h[0].mlp.act
    slow = NewGELUActivation()
    x = torch.linspace(-6, 6, 101, dtype=REAL, requires_grad=True)
    assert error(act(x), slow(x)) < 1e-12
    assert error(gradient(act(x).sum(), x), gradient(slow(x).sum(), x)) < 1e-12
    assert not any(isinstance(module, NewGELUActivation) for module in actor.modules())


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_products_go_to_onednn_attention_is_plain(precision, dtype):
    """--matmul-precision reaches torch, for one run only. In bfloat16 or under medium, policy and separate critic leave
    the fused attention on the CPU; otherwise they keep it."""
    cfg = Config(device="cpu", dtype=dtype, matmul_precision=precision, critic="separate")
    device, kind = P.pick_device(cfg)
    assert torch.get_float32_matmul_precision() == precision
    assert kind == getattr(torch, dtype)
    actor, ref = P.make_actors(cfg, tiny().float(), None, device, kind)
    torch.set_float32_matmul_precision("highest")
    to_onednn = precision == "medium" or dtype == "bfloat16"
    for model in (actor.lm, actor.critic_trunk, ref.lm):
        assert model.config._attn_implementation == ("eager" if to_onednn else "sdpa")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and is about glibc")
def test_freed_tensors_stay_with_the_process():
    """Else every update pays for the page faults of its large tensors again."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    P.pick_device(Config(device="cpu"))
    x = torch.ones(25_000_000)  # 100 MB
    held = resident()
    del x
    assert resident() > held - 50e6


@pytest.mark.parametrize("kind", ["Mamba", "Bert", "Bart"])
def test_models_of_a_foreign_kind_are_refused(kind):
    """A recurrent state that left padding moves, encoders: a refusal, not a wrong gradient."""
    with pytest.raises(P.UsageError, match=f"{kind}.* cannot be trained here"):
        made(letters_model(kind))


@pytest.mark.parametrize("factor, shift", [(2, 0), (1, -3), (1.03, 0)])
def test_anything_unknown_behind_the_head_is_refused(factor, shift, monkeypatch):
    model = tiny()
    forward = model.forward

    def strange(**inputs):
        output = forward(**inputs)
        output.logits = factor * output.logits + shift
        return output

    monkeypatch.setattr(model, "forward", strange)
    with pytest.raises(P.UsageError, match="GPT2LMHeadModel cannot be trained here"):
        made(model)


def test_a_cache_that_cannot_drop_replies_is_refused(monkeypatch):
    """Or that keeps those of another row."""
    from transformers import DynamicCache

    right = DynamicCache.reorder_cache
    monkeypatch.setattr(DynamicCache, "reorder_cache", None)
    with pytest.raises(P.UsageError, match="cannot be trained here, .*: TypeError"):
        made(tiny())
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda cache, rows: right(cache, torch.zeros_like(rows)))
    with pytest.raises(P.UsageError, match="cannot be trained here, .*: left-padded, with a cache"):
        made(tiny())


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_model_that_decodes_single_tokens_in_another_way_is_refused(critic, monkeypatch):
    """As models with linear attention or convolutions do, in code of their own for that case."""
    forward = P.Actor.trunk

    def strange(actor, base, ids, attention, cache=None):
        states = forward(actor, base, ids, attention, cache)
        is_strange = ids.shape[1] == 1 and (base is not actor.lm.base_model or critic == "shared")
        return states * 1.5 if is_strange else states

    monkeypatch.setattr(P.Actor, "trunk", strange)
    with pytest.raises(P.UsageError, match="cannot be trained here"):
        made(tiny(), critic=critic)


def test_llama_4s_text_model_trains():
    """It names its trunk as the model that also sees does, so `base_model` is itself."""
    lm = model_of("Llama4Text")
    assert lm.base_model is lm
    actor = made(lm, critic="separate")
    assert "lm_head" not in dict(actor.critic_trunk.named_modules())
    for prompt, reply, said in each_reply_and_its_numbers(evaluated(actor, temperature=0.7)):
        own = alone(lm, prompt, reply, 0.7)
        assert error(said.sampler_logprobs, own) < 1e-4
        assert error(said.logprobs, own) < 1e-4


@pytest.mark.parametrize("emulated, dtype", [(False, "bfloat16"), (True, "float32")])
def test_bfloat16_by_itself_only_where_the_card_has_it(emulated, dtype, monkeypatch):
    def is_supported(including_emulation):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert P.pick_device(Config()) == (torch.device("cuda"), getattr(torch, dtype))


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "OPT", "Mixtral"])
def test_gradient_checkpointing_changes_no_gradient(kind, tmp_path):
    """Layers are recomputed in the backward pass, dropout stays off, and the weights after an update are the same."""
    weights = []
    calls = Counter()
    for on in (False, True):

        def count(*_):
            calls[on] += torch.is_grad_enabled()

        lm = model_of(kind)
        layer = next(m for m in lm.modules() if type(m).__name__.endswith(("Block", "DecoderLayer")))
        next(layer.children()).register_forward_hook(count)
        cfg = short_run(tmp_path, name=f"x{on}", learning_rate=1e-2, gradient_checkpointing=on, critic="separate")
        P.train(cfg, ["t1 t3", "t4"], mean_length, lm, words_tokenizer())
        weights.append(weights_of(lm))
    assert torch.equal(*weights)
    assert calls[True] == 2 * calls[False]
    P.train(dataclasses.replace(cfg, name="again"), ["t1 t3", "t4"], mean_length, lm, words_tokenizer())
    assert layer.forward.func is torch.utils.checkpoint.checkpoint
    assert layer.forward.args[0].func is type(layer).forward  # a second run does not wrap it once more


def test_every_gradient_is_dense():
    """What a tied embedding adds to the gradient of the head is made sparse. A critic copied from such a model has no
    head to add to."""
    lm = tiny()
    made(lm)
    actor = made(lm, critic="separate")
    _, _, rollout = experience()
    rollout.token_weights = rollout.mask.to(REAL)
    loss, _ = P.ppo_loss(actor, whole(rollout), 0.0, settings_of())
    loss.backward()
    assert lm.get_input_embeddings().sparse
    assert not any(p.grad.is_sparse for p in actor.parameters() if p.grad is not None)


# ----------------------------------------------------------------------------------------------- 10. several processes

SHARED_WORK = {  # name: the kind of model, its critic, settings, options of the update
    "GPT-2, clipped": ("gpt2", CRITICS[0], dict(), {}),
    "Llama, a reply at a time": ("llama", CRITICS[3], dict(micro_batch_size=1), {}),
    "layers computed again": ("gpt2", CRITICS[2], dict(micro_batch_size=2, gradient_checkpointing=True), {}),
    "fewer replies than processes": ("llama", CRITICS[0], dict(num_mini_batches=4, ent_coef=0.1, lam=0.9), {}),
    "stopped by the target KL": ("llama", CRITICS[0], dict(num_mini_batches=4, target_kl=0.01), {}),
    "the critic alone": ("gpt2", CRITICS[1], dict(kl_in="loss", kl_estimator="k2"), dict(critic_only=True)),
}


def shared_work(name, processes):
    """Two updates on the same replies, by all processes together; then a rollout of what was learnt. All that comes of
    it: the weights, Adam's moments, metrics, the rollout."""
    kind, critic, changes, options = SHARED_WORK[name]
    checkpointing = changes.get("gradient_checkpointing", False)
    cfg = settings_of(**{key: x for key, x in changes.items() if key != "gradient_checkpointing"})
    actor, ref, rollout = experience(kind, critic=critic)
    if checkpointing:
        learnt = actor.state_dict()
        actor = made(actor.lm, critic="separate", gradient_checkpointing=True)
        actor.load_state_dict(learnt)
    for p in [*actor.parameters(), *ref.parameters()]:
        p.data += processes.rank  # what the others begin with does not count
    size = len(weights_of(actor)) + len(weights_of(ref))
    P.shard(processes, actor, ref)
    if processes.count > 1:
        held = sum(p.to_local().numel() for p in [*actor.parameters(), *ref.parameters()])
        assert held < 1.3 * size / processes.count
        trunks = 2 if SHARED_WORK[name][1][0] == "separate" else 1
        assert len(P.sharded_modules(actor)) == 2 * trunks + 1  # two layers each, and the rest
    policy, critic = policy_and_critic(actor)
    optimizer = torch.optim.AdamW([{"params": policy}, {"params": critic}], lr=3e-3, eps=1e-5, fused=True)
    torch.manual_seed(0)
    metrics = [P.ppo_update(actor, optimizer, rollout, 0.1, cfg, **options) for _ in range(2)]
    after = replies_to(actor, (3, 1, 2, 5, 4), cfg, seed=1)
    P.fill_logprobs_and_values(actor, ref, after, cfg)
    outcome = {f"after/{key}": x for key, x in vars(after).items() if x is not None}
    for key in ("values", "predictions"):  # in the padding they are anything
        outcome[f"after/{key}"] = outcome[f"after/{key}"].where(after.mask, 0.0)
    outcome |= {f"{i}/{key}": real(x) for i, row in enumerate(metrics) for key, x in row.items()}
    everywhere = P.gather(processes, {key: x.tolist() for key, x in outcome.items()})
    assert all(same == everywhere[0] for same in everywhere)  # bit for bit
    outcome |= P.from_shards(processes, actor.state_dict())
    for i, moments in optimizer.state_dict()["state"].items():
        outcome |= {f"moments/{i}/{key}": x for key, x in P.from_shards(processes, moments).items()}
    return outcome


UNEVEN = """
import os, signal, torch
calls = 0
def answers(prompts, completions, **columns):
    torch.rand(1 + int(os.environ.get("RANK", 0)))  # other random numbers are left on each process
    return [float(a) for a in columns["answer"]]
def stop(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return [0.0] * len(prompts)
"""


def in_two_processes(files, folder):
    """What each of two processes does: the shared work, a run, the run once more from its fourth update, and one in
    whose second update one process is asked to stop."""
    shared_work_of_all(folder)
    processes = P.start_processes()
    assert P.main(command(files, f"--batch-size 2 --num-mini-batches 1 --name none --runs-dir {folder}")) == 2
    uneven = f"--runs-dir {folder} --reward {folder}/uneven.py"
    assert P.main(command(files, f"--num-updates 5 --name whole {uneven}:answers")) == 0
    if processes.rank == 0:
        stop_after_four(folder / "whole", folder / "again")
    P.gather(processes, None)  # so that all wait for the copy
    assert P.main(["--resume", str(folder / "again")]) == 0
    assert P.main(command(files, f"--num-updates 9 --name stopped {uneven}:stop")) == 143
    assert [path.name for path in P.checkpoints(folder / "stopped")] == ["000002"]


def in_three_processes(files, folder):
    """The shared work, and a run that one process began."""
    shared_work_of_all(folder)
    assert P.main(["--resume", str(folder / "begun alone")]) == 0


def shared_work_of_all(folder):
    torch.set_num_threads(1)
    processes = P.start_processes()
    outcomes = {name: shared_work(name, processes) for name in SHARED_WORK}
    if processes.rank == 0:
        torch.save(outcomes, folder / "outcomes.pt")


def stop_after_four(run, copy):
    """A copy of a run of five updates, as it was after the fourth."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "policy")
    shutil.rmtree(copy / "checkpoints" / "000005")


def start(count, *words, cwd):
    """A command under torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*torchrun, *words], cwd=cwd, env=ENV | {"PYTHONPATH": str(HERE)}, **pipes)


def end(process, seconds=100):
    """What it printed. Where processes wait for each other for ever, torchrun is told to end them all."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail(process.communicate()[1])


def launch(count, function, files, folder):
    """Call a function of this file in several processes."""
    code = f"import pathlib, test_ppo_llm as T; T.{function.__name__}(*map(pathlib.Path, {[str(files), str(folder)]}))"
    process = start(count, "--no-python", sys.executable, "-c", code, cwd=folder)
    _, err = end(process)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def two(files, tmp_path_factory):
    """The folder of what two processes did."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "uneven.py").write_text(UNEVEN)
    launch(2, in_two_processes, files, folder)
    return folder


@pytest.fixture(scope="module")
def three(files, finished, tmp_path_factory):
    """The folder of what three processes did."""
    folder = tmp_path_factory.mktemp("three")
    stop_after_four(finished, folder / "begun alone")
    launch(3, in_three_processes, files, folder)
    return folder


@functools.cache
def by_one_process(name):
    return shared_work(name, P.Processes())


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED_WORK)
@pytest.mark.parametrize("count", ["two", "three"])
def test_several_processes_compute_what_one_does(name, count, request):
    """Weights, moments, metrics and new replies; with ragged replies, unequal micro-batches and tied embeddings."""
    outcome = torch.load(request.getfixturevalue(count) / "outcomes.pt")[name]
    assert outcome.keys() == by_one_process(name).keys()
    differences = {key: error(x, by_one_process(name)[key]) for key, x in outcome.items()}
    assert max(differences.values()) < EXACT[SHARED_WORK[name][0]], differences
    steps = [by_one_process(name)[f"{i}/policy/steps"].item() for i in range(2)]
    assert (min(steps) < 2 * SHARED_WORK[name][2].get("num_mini_batches", 2)) == (name == "stopped by the target KL")


def assert_alike(run, other):
    """Two runs differ by rounding alone."""
    for row, expected in zip(metrics_of(run), metrics_of(other), strict=True):
        assert without_times(row) == pytest.approx(without_times(expected), abs=5e-3)
    models = [P.load("ModelForCausalLM", f"{folder}/policy", "model", Config()) for folder in (run, other)]
    assert error(*map(weights_of, models)) < 5e-3


@pytest.mark.slow
def test_a_run_of_several_processes_is_that_of_one(two, finished):
    """Its folder holds the same; a resume on as many processes goes on bit for bit."""
    assert_alike(two / "whole", finished)
    assert outcome(two / "again") == outcome(two / "whole")
    saved = [
        sorted(str(path.relative_to(run)) for path in run.glob("**/*") if "tfevents" not in path.name)
        for run in (two / "whole", finished)
    ]
    assert saved[0] == saved[1]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(two, three, finished, tmp_path):
    """One that two processes saved with one, and one that one process saved with three."""
    stop_after_four(two / "whole", tmp_path / "run")
    assert resume(tmp_path / "run") == 0
    assert_alike(tmp_path / "run", finished)
    assert_alike(three / "begun alone", finished)


def starve(files, folder):
    """Use the process group as a run does, and end while its threads, on a busy core, get no time. Last is a barrier:
    the thread that ran it lets go of it while Python ends."""
    from torch.distributed.fsdp import fully_shard

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    processes = P.start_processes()
    atexit.register(torch.distributed.barrier)
    model = torch.nn.Linear(1, 1)
    fully_shard(model)
    model(torch.ones(1, 1)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    threads = [path for path in Path("/proc/self/task").iterdir() if "gloo_runloop" in (path / "comm").read_text()]
    assert threads
    for path in threads:
        os.sched_setscheduler(int(path.name), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(20):
        P.gather(processes, 1)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets the scheduling of threads")
def test_processes_end_well_though_their_threads_lag(files, tmp_path):
    """Before Python 3.14 they abort unless the threads are given time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        os.sched_setaffinity(busy.pid, {min(os.sched_getaffinity(0))})
        try:
            launch(2, starve, files, tmp_path)
        finally:
            busy.kill()


FRAGILE_ON_ONE = """
import os
calls = 0
def answers(prompts, completions, **columns):
    global calls
    calls += len(prompts) > 1
    if calls == 3 and os.environ["RANK"] == "1":
        return [1 / (p != prompts[-1]) for p in prompts]
    return [float(a) for a in columns["answer"]]
"""


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_ends_all(files, tmp_path):
    """In the second update, within seconds, after the first is saved, and with one line beside what torchrun tells."""
    (tmp_path / "fragile.py").write_text(FRAGILE_ON_ONE)
    words = command(files, f"--num-updates 99 --name x --reward {tmp_path}/fragile.py:answers")
    process = start(2, P.__file__, *words, cwd=tmp_path)
    _, err = end(process)
    assert process.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("ppo_llm.py: ")]
    assert "reward answers failed at fragile.py:8: ZeroDivisionError" in line
    assert "to go on from runs/x/checkpoints/000001" in line
    assert err.count("Traceback") == 1  # torchrun's own
    assert [path.name for path in P.checkpoints(tmp_path / "runs" / "x")] == ["000001"]


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_once(files, tmp_path):
    """All processes finish the update in hand and leave together; the first tells of it."""
    words = command(files, "--num-updates 100000 --name x --save-every 99999")
    process = start(2, P.__file__, *words, cwd=tmp_path)
    log = tmp_path / "runs" / "x" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = end(process)
    assert process.returncode != 0
    assert err.count("SIGINT: finishing the update in hand") == 1
    done = lines(log)[-1]["update"]
    assert out.count(f"Stopped by SIGINT after update {done}; to go on from runs/x/checkpoints/{done:06}") == 1
    assert [path.name for path in P.checkpoints(tmp_path / "runs" / "x")] == [f"{done:06}"]


# ---------------------------------------------------------------------------------------------- 11. the folder of a run


def test_speeds_are_those_of_the_times(files, tmp_path, capsys):
    """Tokens over the seconds of their phase; the terminal shows their median."""
    assert P.main(command(files, f"--num-updates 1 --name x --runs-dir {tmp_path} --stop-token t3")) == 0
    row = metrics_of(tmp_path / "x")[1]
    tokens = 8 * row["reply/length"]
    prompt_tokens = 8 * 2
    epochs = row["policy/steps"] / 4
    seconds = [row[f"time/{name}"] for name in ("generate", "reward", "evaluate", "update")]
    rollout, update = row["perf/rollout_tokens_per_second"], row["perf/update_tokens_per_second"]
    assert row["perf/tokens_per_second"] == pytest.approx(tokens / sum(seconds))
    assert rollout == pytest.approx(tokens / seconds[0])
    assert update == pytest.approx(epochs * (tokens + prompt_tokens) / seconds[3])
    assert f"Rollout {rollout:.0f} tokens/s, update {update:.0f} tokens/s" in capsys.readouterr().out


# A run with everything that has a state: a critic of its own, an adaptive β, a decaying learning rate.
STATEFUL = (
    "--response-length 6 --batch-size 8 --learning-rate 1e-2 --critic separate --critic-target action-value "
    "--kl-target 0.1 --kl-horizon 50 --critic-lr 3e-2 --lr-scheduler-type linear --samples-per-prompt 2 --save-every 2 "
    "--temperature 0.7"
)


def command(files, more):
    task = f"--model {files}/model --prompts {files}/prompts.jsonl --reward {files}/rewards.py:answers"
    return f"{task} {STATEFUL} {more}".split()


def outcome(run):
    """What must be the same of two runs: every metric but the times, the samples, and the bits of the final policy."""
    metrics = [without_times(row) for row in metrics_of(run)]
    return metrics, lines(run / "samples.jsonl"), (run / "policy" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """An uninterrupted run of five updates with checkpoints at 2, 4 and 5, of which the last two are kept."""
    folder = tmp_path_factory.mktemp("finished")
    assert P.main(command(files, f"--num-updates 5 --name whole --runs-dir {folder}")) == 0
    return folder / "whole"


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def stopped(copied):
    """The run as a kill leaves it: no policy, one checkpoint, half of another, logs that go on and end in half a
    line."""
    shutil.rmtree(copied / "policy")
    (copied / "checkpoints" / "000005").rename(copied / "checkpoints" / "unfinished")
    with open(copied / "metrics.jsonl", "a") as f:
        f.write('{"update": 6, "obj')
    return copied


def resume(run, more=""):
    """Exit status of a resume of the run."""
    return P.main(["--resume", str(run), *more.split()])


def test_policy_and_critic_have_learning_rates_of_their_own(finished):
    """On one schedule: at the fourth of five updates a linear decay leaves two fifths, and each update before that
    target_kl stopped two thirds of it. All of a separate critic is in the second group."""
    assert max(row["policy/sampler_gap"] for row in metrics_of(finished)[1:-1]) < 1e-5  # at a temperature of 0.7
    state = torch.load(finished / "checkpoints" / "000004" / "state.pt", weights_only=True)
    policy, critic = state["optimizer"]["param_groups"]
    shares = [0.4 * (2 / 3) ** stops for stops in range(4)]
    assert min(error([policy["lr"], critic["lr"]], [share * 1e-2, share * 3e-2]) for share in shares) < 1e-9
    assert len(critic["params"]) > 2


@pytest.mark.parametrize("last", ["000004", "000005", "nothing"])
def test_resume_goes_on_as_if_never_stopped(finished, stopped, last):
    """2N steps = N + load + N, bit for bit: metrics, samples and final weights; also from after the last update, or
    before any checkpoint."""
    assert [path.name for path in P.checkpoints(finished)] == ["000004", "000005"]
    if last == "000005":
        (stopped / "checkpoints" / "unfinished").rename(stopped / "checkpoints" / "000005")
    if last == "nothing":
        shutil.rmtree(stopped / "checkpoints" / "000004")
    assert resume(stopped) == 0
    assert outcome(stopped) == outcome(finished)
    assert len({row.get("kl_coef") for row in metrics_of(stopped)}) > 3  # there was a state to keep


def test_a_resume_may_take_smaller_micro_batches(finished, stopped):
    """Then sums are rounded in another order, and no more."""
    assert resume(stopped, "--micro-batch-size 1") == 0
    assert outcome(stopped) != outcome(finished)
    for row, expected in zip(metrics_of(stopped), metrics_of(finished), strict=True):
        assert without_times(row) == pytest.approx(without_times(expected), abs=5e-3)


@pytest.mark.parametrize("done", [4, 0])
def test_tensorboard_shows_each_update_once(done, stopped):
    """Also after a resume, and one from the very beginning, what was logged before it counts no more."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if done == 0:
        shutil.rmtree(stopped / "checkpoints")
    assert resume(stopped) == 0
    events = EventAccumulator(str(stopped))
    events.Reload()
    rows = [row for row in metrics_of(stopped) if "objective/scores" in row]
    shown = [(event.step, event.value) for event in events.Scalars("objective/scores")]
    assert shown == [(row["update"], pytest.approx(row["objective/scores"])) for row in rows]


def test_a_checkpoint_of_a_gpu_is_read_without_one(finished, stopped, monkeypatch):
    """The optimizer's moments are saved with the name of their device, here that of one which no machine has."""
    path = stopped / "checkpoints" / "000004" / "state.pt"
    saved = torch.load(path, weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
        torch.save(saved, path)
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)
    assert resume(stopped) == 0
    assert outcome(stopped) == outcome(finished)


KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import torch, transformers, tyro, ppo_llm  # once: each life of the run is a fork of this process

kills, while_saving, rng = 0, 0, random.Random(0)
unfinished, config = "killed/checkpoints/unfinished", "killed/config.json"

def is_saving():
    try:
        return os.stat(unfinished).st_ctime > began  # else it is left of the life before
    except FileNotFoundError:
        return False

while True:
    arguments = ["--resume", "killed"] if os.path.exists(config) else sys.argv[1:]
    began = time.time()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("life.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os._exit(ppo_llm.main(arguments))
    patience = time.monotonic() + rng.uniform(0, 1.2)
    if kills % 2:  # every other time in the middle of a save
        patience += 5
        while not is_saving() and time.monotonic() < patience:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
        patience = time.monotonic() + rng.uniform(0, 0.01)
    while kills < 24 and time.monotonic() < patience:
        time.sleep(0.001)
    if kills < 24:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        print(kills, while_saving, os.WEXITSTATUS(status))
        break
    kills, while_saving = kills + 1, while_saving + is_saving()
"""


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_never_stopped(files, tmp_path):
    """SIGKILL 24 times, at random and in the middle of saves: the outcome equals that of a run left alone."""
    arguments = command(files, "--num-updates 150 --save-every 1 --runs-dir .")
    alone = run_cli(*arguments, "--name", "alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    words = [sys.executable, "-c", KILLER, P.__file__, *arguments, "--name", "killed"]
    done = subprocess.run(words, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, while_saving, status = map(int, done.stdout.split())
    assert status == 0, (tmp_path / "life.txt").read_text()
    assert kills >= 20
    assert while_saving >= 3
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "alone")


FORGETFUL = {  # what a resume loses: the code that keeps it, and what takes its place
    "optimizer": ('optimizer.load_state_dict(saved["optimizer"])', "pass"),
    "policy": ('saved["actor"]', 'saved["actor"] | {f"lm.{k}": x for k, x in task.ref.lm.state_dict().items()}'),
    "critic": ('saved["actor"]', '{k: x for k, x in saved["actor"].items() if k[:3] == "lm."}, strict=False'),
    "kl_coef": ('State(**saved["state"])', 'State(**saved["state"] | {"kl_coef": cfg.kl_coef})'),
    "logs": ("f.truncate(size)", "pass"),
}
ANEW = {
    "random numbers": ("seed_everything(cfg.seed, state.update)", "seed_everything(cfg.seed, 0)"),
    "place in the prompts": ("draw_prompts(prompts, state.update * count", "draw_prompts(prompts, 0 * count"),
}


@pytest.mark.parametrize("what", FORGETFUL)
def test_a_resume_that_loses_something_is_seen(what, finished, stopped, monkeypatch):
    """The museum's last room (trl#2657, trl#3293): what a resume forgets makes the outcome another one."""
    monkeypatch.setattr(P, "resume", edited("resume", *FORGETFUL[what]))
    if what == "logs":  # of all updates, without the half line, which could not be read
        whole = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
        (stopped / "metrics.jsonl").write_text("".join(whole[:-1]))
    assert resume(stopped) == 0
    assert outcome(stopped) != outcome(finished)


@pytest.mark.parametrize("what", ANEW)
def test_a_resume_that_begins_its_streams_anew_is_seen(what, finished, stopped, monkeypatch):
    """The same room: the random numbers and the prompts of the first update once more."""
    monkeypatch.setattr(P, "ppo", edited("ppo", *ANEW[what]))
    assert resume(stopped) == 0
    assert outcome(stopped) != outcome(finished)


def test_a_checkpoint_holds_the_policy_for_use(finished):
    """Beside what a resume needs, as at the end of the run: here the checkpoint of the last update."""
    last = finished / "checkpoints" / "000005" / "policy" / "model.safetensors"
    assert last.read_bytes() == outcome(finished)[2]


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("code of the checkpoint was run",)


def plant_a_bomb(path):
    torch.save(Bomb(), path)


def make_foreign(path):
    path.write_text('{"config": {"lr": 1}}')


def make_text(path):
    path.write_text('"config"')


def lose_the_hashes(path):
    path.write_text(path.read_text().replace('"sha256"', '"hashes"'))


def mistype(path):
    path.write_text(path.read_text().replace('"batch_size": 8', '"batch_size": "8"'))


def name_another_model(path):
    path.write_text(path.read_text().replace('/model"', '/other"'))


def name_other_prompts(path):
    path.write_text(path.read_text().replace("prompts.jsonl", "prompts.txt"))


def test_a_resume_does_not_trust_remote_code_by_itself(stopped, files, capsys):
    """The folder may be somebody else's: its config.json cannot switch it on, the command can."""
    path = stopped / "config.json"
    text = path.read_text().replace('"trust_remote_code": false', '"trust_remote_code": true')
    path.write_text(text.replace("/model\"", "/custom\""))
    assert_refused(stopped, "", "it comes with code of its own: give --trust-remote-code if you trust it", capsys)
    with pytest.raises(SystemExit, match="code of the model was run"):
        resume(stopped, "--trust-remote-code")


STATE = "checkpoints/000004/state.pt"
DAMAGE = [  # what is done to a file of the run, and what the one line says
    (cut, STATE, "000004 is damaged or of another program"),
    (Path.unlink, STATE, "000004 is damaged or of another program"),
    (plant_a_bomb, STATE, "remove it to go on from what is before it: UnpicklingError"),
    (cut, "metrics.jsonl", "metrics.jsonl is shorter than at the last checkpoint"),
    (cut, "config.json", "expected the folder of a run of this ppo_llm.py"),
    (Path.unlink, "config.json", "expected the folder of a run of this ppo_llm.py"),
    (make_foreign, "config.json", "expected the folder of a run of this ppo_llm.py"),
    (make_text, "config.json", "expected the folder of a run of this ppo_llm.py"),
    (lose_the_hashes, "config.json", "expected the folder of a run of this ppo_llm.py: KeyError"),
    (mistype, "config.json", "expected the folder of a run of this ppo_llm.py: --batch-size '8': expected int"),
    (name_another_model, "config.json", "initial model was"),
    (name_other_prompts, "config.json", "prompts was"),
]
OTHER = [  # settings of a resume that the run did not have
    ("--learning-rate 0.5", "learning_rate was 0.01 and is 0.5"),
    ("--critic shared", "critic was separate and is shared"),
]


def assert_refused(run, more, message, capsys):
    """One line that names what is wrong, exit status 2, nothing changed on the disk."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert resume(run, more) == 2
    assert message in the_line(capsys)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("do, name, message", DAMAGE)
def test_a_damaged_foreign_or_changed_run_is_refused(do, name, message, stopped, capsys):
    """No code of it is executed either. A changed model or changed prompts are told by their hash."""
    do(stopped / name)
    assert_refused(stopped, "", message, capsys)


@pytest.mark.parametrize("flags, message", OTHER)
def test_a_resume_with_other_settings_is_refused(flags, message, stopped, capsys):
    assert_refused(stopped, flags, message, capsys)


COMPLETE = "the run is complete; to go on, it needs a larger --num-updates and a checkpoint"


def test_a_complete_run_goes_on_with_more_updates_and_not_without(copied, capsys):
    assert_refused(copied, "", COMPLETE, capsys)
    assert resume(copied, "--num-updates 6") == 0
    assert [row["update"] for row in metrics_of(copied)] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_decay_that_jumps_on_a_resume_is_told(copied, capsys):
    assert resume(copied, "--num-updates 6") == 0
    told = "The linear decay of the learning rate now ends with update 6 instead of 5, so the rate jumps"
    assert told in capsys.readouterr().out


def test_a_run_that_has_checkpoints_gets_one_of_its_end(finished, tmp_path, capsys):
    """Else a resume of the complete run would go on from an older one, and cut back what came after."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "config.json"
    path.write_text(path.read_text().replace('"save_every": 2', '"save_every": null'))
    assert resume(run, "--num-updates 7") == 0
    assert [path.name for path in P.checkpoints(run)] == ["000005", "000007"]
    assert_refused(run, "--num-updates 7", COMPLETE, capsys)


def test_a_complete_run_without_a_checkpoint_is_not_begun_anew(copied, capsys):
    shutil.rmtree(copied / "checkpoints")
    assert_refused(copied, "--num-updates 6", COMPLETE, capsys)


@pytest.mark.parametrize("room", [3000, 20000])
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_whole(room, finished, stopped, capsys):
    """With files limited to `room` bytes, logs, state or weights cannot be written: exit status 1, and the run goes on
    once there is room."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status = resume(stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    line = the_line(capsys)
    assert "cannot write" in line
    assert f"to go on from {stopped}/checkpoints/00000" in line
    assert resume(stopped) == 0
    assert outcome(stopped) == outcome(finished)


# --------------------------------------------------------------------------------------------------------- 13. training


@pytest.mark.parametrize(
    "changes, rates",
    [
        (dict(), [1, 1, 1, 1]),
        (dict(lr_scheduler_type="linear"), [1, 0.75, 0.5, 0.25]),
        (dict(lr_scheduler_type="cosine"), [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
        (dict(warmup_updates=1), [0.5, 1, 1, 1]),
        (dict(warmup_updates=2, lr_scheduler_type="linear"), [1 / 3, 2 / 3, 1, 0.5]),
        (dict(warmup_updates=5, lr_scheduler_type="cosine"), [1 / 6, 2 / 6, 3 / 6, 4 / 6]),
    ],
)
def test_learning_rate_schedule(changes, rates):
    cfg = Config(num_updates=4, **changes)
    assert error([P.schedule(update, cfg) for update in range(4)], rates) < 1e-12


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=30)
def test_prompts_are_drawn_without_replacement_pass_by_pass(n, count, batches):
    prompts = list(range(n))
    stream = []
    for k in range(batches):
        stream += P.draw_prompts(prompts, k * count, count, seed=1)
    assert len(stream) == batches * count
    while len(stream) >= n:
        assert sorted(stream[:n]) == prompts
        stream = stream[n:]


def test_the_evaluation_is_of_all_held_out_prompts(tmp_path):
    """At least a batch of replies. Each metric is a mean over replies with the standard error of that mean; a reward of
    None counts for nothing. The same seed gives the same replies."""

    def level(prompts, completions, level, **columns):
        return level

    held_out = [{"prompt": "a", "level": x} for x in (1.0, 2.0, None, 6.0)]
    cfg = short_run(tmp_path)
    task = P.prepare(cfg, ["ab"], level, letters_model(), letters_tokenizer(), held_out)
    metrics, samples = P.evaluate_held_out(task, cfg, 3)
    for name, numbers in (("score", [1, 2, 0, 6]), ("rewards/level", [1, 2, 6])):
        x = real(numbers * 2)  # each prompt twice, to fill a batch
        assert error(metrics[f"eval/{name}"], x.mean()) < 1e-6
        assert error(metrics[f"eval/{name}_se"], x.std() / len(x) ** 0.5) < 1e-6
    assert metrics["eval/replies"] == 8
    assert [(sample["level"], sample["held_out"]) for sample in samples] == [(row["level"], True) for row in held_out]
    assert P.evaluate_held_out(task, cfg, 3) == (metrics, samples)
    small_batch, _ = P.evaluate_held_out(task, short_run(tmp_path, batch_size=1, num_mini_batches=1), 3)
    assert small_batch["eval/replies"] == 4


def test_half_precision_weights_become_float32(tmp_path):
    """A bfloat16 model object is trained in float32; bfloat16 is for products only."""
    model = letters_model().bfloat16()
    run = P.train(short_run(tmp_path, dtype="bfloat16"), ["ab", "c"], mean_length, model, letters_tokenizer())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    update = metrics_of(run)[1]
    assert update["policy/sampler_gap"] < 0.05
    assert update["policy/ratio"] == pytest.approx(1, abs=0.02)


def test_code_of_a_model_is_run_if_it_is_trusted(files, tmp_path):
    remote = command(files, f"--num-updates 1 --name x --runs-dir {tmp_path} --model {files}/remote")
    assert P.main(remote) == 2
    assert P.main([*remote, "--trust-remote-code"]) == 0


def test_without_a_model_only_the_demo_runs(tmp_path):
    """With its own settings, whoever calls it; those of any run would train it for 100 updates on its fluency too."""
    with pytest.raises(P.UsageError, match=r"a model is needed: give one; the demo is train\(Demo\(\)\)"):
        P.train(Config(runs_dir=str(tmp_path)))
    assert P.Demo().reward_weights == (1.0, 0.0)
    assert P.Demo(num_updates=3).missing_eos_penalty == 3.0


def test_a_model_without_its_tokenizer_is_refused():
    with pytest.raises(P.UsageError, match="a model needs its tokenizer"):
        P.train(Config(), ["ab"], mean_length, letters_model())


@pytest.mark.slow
def test_the_demo_improves_and_leaves_what_it_promises(tmp_path):
    """Half of the demo, as a user runs it: the held-out score rises by more than 1, and every file is there and
    loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run_cli("--name", "demo", "--num-updates", 10, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert words.startswith("The demo, with settings of its own where --help shows other defaults: --num-updates 10 ")
    assert " --kl-coef 0.3 " in words
    assert " --reward-weights 1.0 0.0 PPO on demo: 10 updates of 128 replies" in words
    for expected in ("Held-out evaluation", "before", "after", "score", "fluency", "▁", "█", "from_pretrained"):
        assert expected in done.stdout
    report = done.stdout.partition("Held-out prompts")[2]
    assert all(len(line) <= 80 for line in report.splitlines() if "runs/" not in line)

    run = tmp_path / "runs" / "demo"
    metrics = metrics_of(run)
    before, first, *_, after = metrics
    assert [row["update"] for row in metrics] == [*range(11), 10]
    assert after["eval/score"] > before["eval/score"] + 1
    assert before["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert before["eval/rewards/fluency"] > 0.9
    assert after["eval/rewards/fluency"] > 0.7
    assert first["policy/sampler_gap"] < 1e-5
    assert all(math.isfinite(x) for row in metrics for x in row.values())
    assert {"update", "prompt", "reply", "score", "kl"} <= set(lines(run / "samples.jsonl")[0])
    about = json.loads((run / "config.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    assert "--num-updates" in about["command"]
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    policy = AutoModelForCausalLM.from_pretrained(run / "policy")
    ids = policy.generate(**tokenizer("the plot was", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert set(P.GOOD) & set(tokenizer.decode(ids[0]).split())


@pytest.mark.slow
def test_any_text_goes_through_any_encoding(files, tmp_path):
    """Where the system's encoding is ASCII the logs are UTF-8 all the same, and what the terminal cannot show ends no
    run."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "déjà → 的", "answer": 1}\n' * 10, encoding="utf-8")
    arguments = command(files, "--num-updates 1 --name x --prompts prompts.jsonl")
    done = run_cli(*arguments, cwd=tmp_path, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="POSIX")
    assert done.returncode == 0, done.stderr
    assert "Learning curves" in done.stdout
    assert "déjà → 的" in (tmp_path / "runs" / "x" / "samples.jsonl").read_text(encoding="utf-8")


def test_columns_weights_and_the_adaptive_coefficient(files, tmp_path, monkeypatch):
    """A function of a module in the working folder and a reward model are weighted in one score, and each is logged.
    Columns reach the reward of their row. Warm-up holds the policy, and β with it; then β follows the KL."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    more = (
        f"--reward my_rewards:answers --reward-model {files}/judge --reward-label LABEL_1 --reward-weights 0.5 -2 "
        "--critic-warmup-updates 1 --kl-target 1e-9 --kl-horizon 100 --stop-token t3 --num-updates 3 --name x"
    )
    assert P.main(command(files, more)) == 0
    first, second, third = metrics_of(tmp_path / "runs" / "x")[1:4]
    answers, judged = first["rewards/answers"], first["rewards/judge"]
    assert judged != 0
    assert first["objective/scores"] == pytest.approx(0.5 * answers - 2 * judged, abs=1e-5)
    assert first["policy/grad_norm"] == 0
    assert second["policy/grad_norm"] > 0
    assert second["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert second["kl_coef"] == first["kl_coef"]
    assert third["kl_coef"] == pytest.approx(first["kl_coef"] * (1 - 0.2 * 8 / 100), abs=1e-9)
    for sample in lines(tmp_path / "runs" / "x" / "samples.jsonl"):
        assert sample["prompt"] == f"t{sample['answer'] % 6} t1"
        assert "t3" not in sample["reply"].split()[:-1]


FRAGILE = """
calls = 0
def answers(prompts, completions, **columns):
    global calls
    calls += len(prompts) > 1
    if calls == 3:
        return [1 / (p != prompts[-1]) for p in prompts]
    return [float(a) for a in columns['answer']]
"""


def test_a_failing_reward_names_the_reply_after_the_run_is_saved(files, tmp_path, capsys):
    """The reward fails on one reply in the second update: the first is kept, the message names reward, prompt and
    reply, and the run goes on once the reward is put right."""
    file = tmp_path / "fragile.py"
    file.write_text(FRAGILE)
    arguments = f"--num-updates 3 --runs-dir {tmp_path} --reward {file}:answers"
    assert P.main(command(files, f"{arguments} --name x")) == 1
    line = the_line(capsys)
    failure = r"reward answers failed at fragile.py:7: ZeroDivisionError: .*, for the prompt 't. t1' and the reply ' t"
    assert re.search(failure, line)
    assert f"; to go on from {tmp_path}/x/checkpoints/000001: python ppo_llm.py --resume {tmp_path}/x" in line
    file.write_text(FRAGILE.replace("calls == 3", "False"))
    assert P.main(["--resume", f"{tmp_path}/x"]) == 0
    assert P.main(command(files, f"{arguments} --name y")) == 0
    assert outcome(tmp_path / "x") == outcome(tmp_path / "y")


def test_steps_that_are_not_finite_are_left_out_and_then_end_the_run(tmp_path):
    """A score of 1e30 overflows the value loss. One update of such steps is survived; two in a row are four steps,
    which end the run with what was seen and where to go on."""
    updates = itertools.count(1)

    def reward(prompts, completions, **columns):
        huge = next(updates) in (2, 4, 5)
        return [1e30 if huge else 1.0 + len(text) for text in completions]

    cfg = short_run(tmp_path, num_updates=6, save_every=1, num_ppo_epochs=1, num_mini_batches=2)
    failure = r"not finite in 4 optimizer steps in a row, up to update 5.*1e\+30.*to go on from .*x/checkpoints/000004"
    with pytest.raises(P.RunError, match=failure):
        P.train(cfg, ["ab", "c"], reward, letters_model(), letters_tokenizer())
    rows = metrics_of(tmp_path / "x")[1:]
    assert [row["policy/skipped_steps"] for row in rows] == [0, 2, 0, 2, 2]
    assert [row["policy/steps"] for row in rows] == [2, 0, 2, 0, 0]


def test_out_of_memory_ends_in_one_line(tmp_path, monkeypatch):
    """With what helps against it. A run that Python called is told how Python goes on with it."""

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(P, "ppo_update", exhausted)
    told = (
        "out of memory: give a smaller --micro-batch-size, or --gradient-checkpointing; there is no checkpoint yet "
        f"(see --save-every): train(dataclasses.replace(cfg, resume='{tmp_path}/x'), ...) with the same "
        "other arguments begins anew"
    )
    with pytest.raises(P.RunError) as failure:
        P.train(short_run(tmp_path), ["ab", "c"], mean_length, letters_model(), letters_tokenizer())
    assert str(failure.value) == told


def test_a_policy_that_has_diverged_ends_the_run(tmp_path):
    """A learning rate of 1e30 makes weights whose probabilities are no numbers."""
    cfg = short_run(tmp_path, num_updates=4, learning_rate=1e30)
    with pytest.raises(P.RunError, match="probabilities are not finite: it has diverged; lower the learning rate"):
        P.train(cfg, ["ab", "c"], mean_length, letters_model(), letters_tokenizer())


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(number, status, files, tmp_path, capsys):
    """In the update that the first one came in, which is not finished. Then the signals do again what they did."""
    before = signal.getsignal(number)
    (tmp_path / "r.py").write_text(
        "import signal\n"
        "def twice(prompts, **columns):\n"
        f"    signal.raise_signal({int(number)})\n"
        f"    signal.raise_signal({int(number)})\n"
        "    return [1.0] * len(prompts)\n"
    )
    assert P.main(command(files, f"--reward {tmp_path}/r.py:twice --name x --runs-dir {tmp_path}")) == status
    assert f"{number.name}: finishing the update in hand; once more to stop at once" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_update_and_saves(number, status, files, tmp_path):
    """Ctrl-C or SIGTERM once: the update in hand is finished and logged, the run saved, and how to go on is told."""
    words = [sys.executable, P.__file__, *command(files, "--num-updates 100000 --name x --save-every 99999")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, cwd=tmp_path, env=ENV, **pipes)
    log = tmp_path / "runs" / "x" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"{number.name}: finishing the update in hand" in err
    assert "Traceback" not in err
    updates = [row["update"] for row in lines(log)]
    done = updates[-1]
    assert updates == list(range(done + 1))
    checkpoint = f"runs/x/checkpoints/{done:06}"
    told = f"Stopped by {number.name} after update {done}; to go on from {checkpoint}"
    assert f"{told}: python ppo_llm.py --resume runs/x" in out
    assert (tmp_path / checkpoint / "state.pt").exists()


# ---------------------------------------------------------------------------------------------- the README and the rest


def test_import_has_no_side_effects():
    """Importing takes no transformers (slow to start), writes nothing, prints nothing."""
    code = "import sys, ppo_llm; print([name for name in ('transformers', 'tyro') if name in sys.modules])"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=Path(P.__file__).parent, capture_output=True, text=True, env=ENV)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_requirements_and_inline_metadata_agree():
    """Every range of the PEP 723 block admits the version that requirements.txt pins; tests alone add pytest and
    hypothesis."""
    from packaging.version import parse

    pins = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().split())
    block = re.search(r"^# dependencies = (.*)$", Path(P.__file__).read_text(), re.M).group(1)
    needs = dict(re.findall(r'"(\w+)>=([\d.]+)"', block))
    assert set(pins) == set(needs) | {"pytest", "hypothesis"}
    assert block.count(">=") == len(needs)
    assert [name for name, least in needs.items() if parse(pins[name]) < parse(least)] == []


def readme_table(head):
    """The rows of a table, each a list of cells."""
    table = README.split(head)[1].split("\n\n")[0]
    return [row.split("|")[1:] for row in table.splitlines()[2:]]


def test_readme_names_only_what_exists():
    """The table function ↔ equation ↔ test: each name in it is one of the module's or of this file's."""
    rows = readme_table("| function | equation | tests |")
    functions = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows))
    tests = re.findall(r"`(\w+)`", " ".join(row[2] for row in rows))
    assert {"gae", "policy_loss", "value_loss", "ppo_loss"} <= set(functions)
    assert [name for name in functions if not hasattr(P, name)] == []
    assert [name for name in tests if name not in globals()] == []


def test_readme_counts_the_museum_and_lists_what_may_change():
    count = re.search(r"museum of (\d+)", README).group(1)
    assert int(count) == len(MUSEUM) + len(FORGETFUL) + len(ANEW)
    sentence = re.search(r"prompts is refused; only (.*?) may change", README, re.S).group(1)
    flags = {f"--{name.replace('_', '-')}" for name in P.MAY_CHANGE}
    assert set(re.findall(r"`(--[\w-]+)`", sentence)) == flags - {"--resume"}


@pytest.mark.slow
def test_readme_commands_and_code_run(tmp_path, monkeypatch):
    """Every code block and every command with a model, word for word but for tiny folders in place of the hub's names
    and fewer updates."""
    monkeypatch.chdir(tmp_path)
    long = dict(max_position_embeddings=256)
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    models = {
        "gpt2": letters_model("GPT2", **long),
        "Qwen/Qwen3-0.6B": letters_model("Qwen3", num_key_value_heads=2, head_dim=8, **long),
        "lvwerra/distilbert-imdb": letters_model("DistilBert", "ForSequenceClassification", 2, id2label=labels),
    }
    for name, model in models.items():
        save(tmp_path / name, model, letters_tokenizer(chat_template=CHAT))
    (tmp_path / "prompts.txt").write_text("the film was\nit is\n" * 10)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film was"}\n' * 20)
    blocks = re.findall(r"```python\n(?:# (\w+\.py))?(.*?)```", README, re.S)
    for file, code in blocks:
        if file:
            (tmp_path / file).write_text(f"# {code}")
    subprocess.run([sys.executable, "make_sums.py"], check=True)
    exact = P.load_rewards(["sums.py:exact"])[0]
    replies = [[{"role": "assistant", "content": text}] for text in ("3 + 4 = 7", "7 or 8", "")]
    assert exact(None, replies, ["7"] * 3) == [1, 0, 0]

    commands = re.findall(r"^    python ppo_llm.py (--model .*)$", README, re.M)
    for i, words in enumerate(commands):
        name = "NAME" if i == 0 else f"run{i}"  # a block loads runs/NAME/policy
        assert P.main([*words.split(), "--num-updates", "1", "--batch-size", "8", "--name", name]) == 0
    scripts = [code for file, code in blocks if not file]
    for code in scripts:
        exec(re.sub(r"num_updates=\d+", "num_updates=1", code), {})
    assert commands
    assert scripts


@pytest.mark.slow
@pytest.mark.parametrize("stops, full", [(0, True), (16, False)])
def test_the_benchmark_of_the_readme_runs(stops, full, tmp_path, monkeypatch):
    """Our side of runs/reference/bench/compare.py, on its smallest work: replies of full length, and ones that stop."""
    monkeypatch.syspath_prepend(HERE / "runs" / "reference" / "bench")
    import compare

    compare.ours(compare.make_folder(tmp_path, "tiny", stops), 16, 24, 2)
    path = next(tmp_path.glob("*/*/x/metrics.jsonl"))
    assert (lines(path)[1]["reply/length"] == 24) == full


@pytest.mark.slow
def test_learning_curves_are_drawn(copied):
    pytest.importorskip("matplotlib")
    from xml.etree import ElementTree

    subprocess.run([sys.executable, HERE / "runs" / "reference" / "plot.py", copied], check=True, env=ENV)
    picture = ElementTree.parse(copied / "curves.svg").getroot()
    assert picture.tag.endswith("svg")
    assert "score" in picture.itertext()


def test_every_metric_of_a_run_is_explained(finished):
    documented = re.findall(r"`([\w/*]+)`", " ".join(row[0] for row in readme_table("| metric | meaning |")))
    patterns = [name.replace("*", r"\w+").replace("NAME", r"\w+") for name in documented]
    names = {name for row in metrics_of(finished) for name in row} - {"update"}
    assert [name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)] == []
