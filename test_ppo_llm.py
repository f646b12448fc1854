"""Facts about PPO that `ppo_llm.py` must keep: run `pytest`, or `pytest -m "not slow"` for the quick part.

The sections mirror the source. Mathematics is tested in float64, on ragged batches whose padding holds NaN, inf and huge
numbers, against brute force, theorems or values worked out by hand; errors are largest absolute differences.
"""
import dataclasses
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
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_llm as P
from ppo_llm import Config, Rollout

settings.register_profile("ppo", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ppo")
HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()
REAL = torch.float64
number = st.floats(-4, 4).map(lambda x: round(x, 3))
positive = st.floats(0.05, 4).map(lambda x: round(x, 3))
fraction = st.floats(0, 1).map(lambda x: round(x, 3))


@st.composite
def masks(draw, shortest=0, holes=False):
    """[B, T] response masks of ragged replies, with empty and full rows; on request any boolean pattern."""
    T = draw(st.integers(1, 5))
    if holes:
        mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=3)))
        event("no valid cell" if not mask.any() else "all valid" if mask.all() else "some valid cells")
        return mask
    lengths = draw(st.lists(st.integers(min(shortest, T), T), min_size=1, max_size=3))
    event("an empty row" if 0 in lengths else "a one-token reply" if 1 in lengths else "longer replies")
    return torch.arange(T) < torch.tensor(lengths).unsqueeze(1)


def cells(draw, mask, elements=number, garbage=True):
    """A tensor for the mask: drawn numbers on valid cells, all of them the same at times, and garbage on the others."""
    n = int(mask.sum())
    x = torch.full(mask.shape, draw(st.sampled_from([math.nan, math.inf, -math.inf, -1e300])) if garbage else 0.0, dtype=REAL)
    x[mask] = torch.tensor(draw(st.lists(elements, min_size=n, max_size=n) | elements.map(lambda c: [c] * n)), dtype=REAL)
    return x


def far(x, y):
    """Largest absolute difference; NaN anywhere is infinitely far."""
    x, y = (torch.as_tensor(z, dtype=REAL) for z in (x, y))
    assert x.shape == y.shape
    return (x - y).abs().nan_to_num(math.inf).max().item() if x.numel() else 0.0


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# --------------------------------------------------------------------------------------------------- 1. the mathematics


@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.lists(st.integers(0, 3), max_size=2))
def test_response_mask_is_a_naive_loop(data, B, T, stop_ids):
    responses = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 3), min_size=T, max_size=T), min_size=B, max_size=B)))
    mask = P.response_mask(responses, stop_ids)
    for row, kept in zip(responses.tolist(), mask.tolist()):
        stop = next((t for t, token in enumerate(row) if token in stop_ids), T - 1)
        assert kept == [t <= stop for t in range(T)]


@given(st.data(), masks(holes=True))
def test_masked_mean_is_over_valid_cells_only(data, mask):
    x, weights = cells(data.draw, mask), cells(data.draw, mask, positive)
    valid = x[mask].tolist()
    assert far(P.masked_mean(x, mask), sum(valid) / len(valid) if valid else 0.0) < 1e-12
    assert far(P.masked_mean(x, mask, weights), sum(a * b for a, b in zip(valid, weights[mask].tolist()))) < 1e-12


@given(st.data(), masks(holes=True), positive, number)
def test_whitening_is_standard_and_affine_invariant(data, mask, scale, shift):
    """(x - mean) / √(variance + 1e-8), so mean 0 and variance 1 but for that floor, and what ax + b gives but for it. 0, 1 or equal
    cells become 0, or stay what they are when the mean is kept."""
    x = cells(data.draw, mask)
    white, kept = P.masked_whiten(x, mask), P.masked_whiten(x, mask, shift_mean=False)
    assert white.isfinite().all() and kept.isfinite().all() and not white[~mask].any() and not kept[~mask].any()
    mean, spread = (x[mask].mean(), x[mask].var(correction=0)) if mask.any() else (torch.tensor(0.0), torch.tensor(0.0))
    event(f"{'0' if not mask.any() else '1' if mask.sum() == 1 else 'equal' if spread == 0 else 'differing'} cells")
    assert far(white[mask], (x[mask] - mean) / (spread + 1e-8) ** 0.5) < 1e-10
    assert far(kept[mask], white[mask] + mean) < 1e-10
    assert far(white[mask].sum(), 0) < 1e-9 and far((white[mask] ** 2).sum(), mask.sum() * spread / (spread + 1e-8)) < 1e-9
    affine = P.masked_whiten(scale * x + shift, mask)
    assert far(affine[mask], scale * (x[mask] - mean) / (scale**2 * spread + 1e-8) ** 0.5) < 1e-9


def test_masked_whiten_worked_by_hand():
    """1, 3 and 8: mean 4, variance (9 + 1 + 16) / 3 = 26/3, deviation 2.943920. -3, -1 and 4 over it; and that plus 4."""
    x, mask = torch.tensor([[1.0, math.nan], [3.0, 8.0]], dtype=REAL), torch.tensor([[True, False], [True, True]])
    assert far(P.masked_whiten(x, mask), [[-1.0190493, 0], [-0.3396831, 1.3587324]]) < 1e-7
    assert far(P.masked_whiten(x, mask, shift_mean=False), [[2.9809507, 0], [3.6603169, 5.3587324]]) < 1e-7


@given(st.lists(number, min_size=2, max_size=5), positive, number)
def test_logprobs_and_entropy_from_logits(row, temperature, shift):
    logits, tokens = torch.tensor(row, dtype=REAL), torch.arange(len(row))
    logprobs = P.logprobs_from_logits(logits.expand(len(row), -1), tokens, temperature)
    exps = [math.exp(x / temperature) for x in row]
    assert far(logprobs, [math.log(e / sum(exps)) for e in exps]) < 1e-10
    assert far(P.logprobs_from_logits((logits + shift).expand(len(row), -1), tokens, temperature), logprobs) < 1e-10
    entropy = P.entropy_from_logits(logits, temperature)
    assert far(entropy, -(logprobs.exp() * logprobs).sum()) < 1e-10
    assert -1e-12 <= entropy <= math.log(len(row)) + 1e-12
    assert far(P.entropy_from_logits(torch.full((len(row),), shift, dtype=REAL)), math.log(len(row))) < 1e-12
    one = P.logprobs_from_logits(logits, torch.tensor(0))
    assert far(one, math.log(math.exp(row[0]) / sum(map(math.exp, row)))) < 1e-10  # temperature 1 is the default
    assert far(P.entropy_from_logits(logits), P.entropy_from_logits(logits, 1.0)) == 0


@given(st.integers(2, 5), st.data())
def test_kl_estimators_are_unbiased_by_enumeration(V, data):
    """E over tokens from π: k1 and k3 give KL(π ‖ ref) exactly, k2 half the second moment; k2 and k3 are never negative."""
    p, q = (torch.tensor(data.draw(st.lists(number, min_size=V, max_size=V)), dtype=REAL).log_softmax(0) for _ in range(2))
    kl = sum(p[i].exp() * (p[i] - q[i]) for i in range(V))
    expected = {kind: (p.exp() * P.kl_estimate(p, q, kind)).sum() for kind in ("k1", "k2", "k3")}
    assert far(expected["k1"], kl) < 1e-12 and far(expected["k3"], kl) < 1e-12 and kl > -1e-12
    assert far(expected["k2"], (p.exp() * (p - q) ** 2).sum() / 2) < 1e-12
    assert (P.kl_estimate(p, q, "k2") >= 0).all() and (P.kl_estimate(p, q, "k3") >= -1e-15).all()
    assert torch.equal(P.kl_estimate(p, q), P.kl_estimate(p, q, "k1"))


def test_kl_estimate_worked_by_hand():
    """π = ½ against ¼: d = ln 2, k1 = 0.693147, k2 = d²/2 = 0.240227, k3 = ½ - 1 + d = 0.193147. ¼ against ½: -d, the same, 2 - 1 - d."""
    half, quarter = torch.tensor([[0.5, 0.25]], dtype=REAL).log(), torch.tensor([[0.25, 0.5]], dtype=REAL).log()
    for kind, expected in (("k1", [0.693147, -0.693147]), ("k2", [0.240227, 0.240227]), ("k3", [0.193147, 0.306853])):
        assert far(P.kl_estimate(half, quarter, kind), [expected]) < 1e-6


def test_extreme_values_stay_finite():
    """Logits of ±1000, ratios of e^±50 with either sign of the advantage, a value 1e6 off, whitening of numbers around 1e6."""
    logits = torch.tensor([1000.0, 0.0, -1000.0], dtype=REAL)
    assert far(P.logprobs_from_logits(logits.expand(3, -1), torch.arange(3)), [0, -1000, -2000]) < 1e-9
    assert far(P.entropy_from_logits(logits), 0) < 1e-12
    log_ratio, full = torch.tensor([[50.0, -50.0, -50.0]], dtype=REAL, requires_grad=True), torch.ones(1, 3, dtype=torch.bool)
    loss, _ = P.policy_loss(log_ratio, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 1.0]]), full)  # 1.2 and -0.8 by the clip, e^-50
    assert far(loss.detach(), -0.4 / 3) < 1e-9 and far(gradient(loss, log_ratio), torch.zeros(1, 3)) < 1e-20
    assert far(P.value_loss(torch.tensor([[1e6]], dtype=REAL), torch.zeros(1, 1), torch.ones(1, 1), full[:, :1])[0], (1e6 - 1) ** 2 / 2) < 1e-3
    assert far(P.masked_whiten(torch.tensor([[1e6, 1e6 + 1, 1e6 + 2]], dtype=REAL), full), [[-1.5**0.5, 0, 1.5**0.5]]) < 1e-6


def test_kl_gradients_as_the_docstring_says():
    """As loss terms, on policy: k2 has the gradient of KL(π ‖ ref), k1 has expected gradient 0, k3 that of KL(ref ‖ π)."""
    theta = torch.tensor([0.3, -0.7, 1.1], dtype=REAL, requires_grad=True)
    ref = torch.tensor([-0.2, 0.5, 0.4], dtype=REAL).log_softmax(0)
    p = theta.log_softmax(0)
    reverse, forward = gradient((p.exp() * (p - ref)).sum(), theta), gradient((ref.exp() * (ref - theta.log_softmax(0))).sum(), theta)
    of = {kind: gradient((theta.log_softmax(0).exp().detach() * P.kl_estimate(theta.log_softmax(0), ref, kind)).sum(), theta)
          for kind in ("k1", "k2", "k3")}
    assert far(of["k1"], torch.zeros(3)) < 1e-12 and far(of["k2"], reverse) < 1e-12 and far(of["k3"], forward) < 1e-12
    with pytest.raises(ValueError, match="k4"):
        P.kl_estimate(p, ref, "k4")


def test_adaptive_kl_coef():
    """β rests at the target, follows the sign of the error, in proportion up to 20%, and no faster."""
    assert P.adaptive_kl_coef(0.2, 6.0, 6.0, 1000, 100) == 0.2
    assert P.adaptive_kl_coef(0.2, 6.6, 6.0, 1000, 100) == pytest.approx(0.2 * (1 + 0.1 * 0.1), abs=1e-12)
    assert P.adaptive_kl_coef(0.2, 60.0, 6.0, 1000, 100) == pytest.approx(0.2 * (1 + 0.2 * 0.1), abs=1e-12)
    assert P.adaptive_kl_coef(0.2, -1.0, 6.0, 1000, 100) == pytest.approx(0.2 * (1 - 0.2 * 0.1), abs=1e-12)


@given(st.data(), masks(holes=True), positive)
def test_token_rewards_sum_to_score_less_kl(data, mask, kl_coef):
    kl = cells(data.draw, mask)
    scores = torch.tensor(data.draw(st.lists(number, min_size=len(mask), max_size=len(mask))), dtype=REAL)
    rewards = P.token_rewards(scores, kl, mask, kl_coef)
    for b, row in enumerate(mask):
        where = row.nonzero().flatten().tolist()
        expected = [-kl_coef * kl[b, t].item() if t in where else 0.0 for t in range(len(row))]
        if where:
            expected[where[-1]] += scores[b].item()
        assert far(rewards[b], expected) < 1e-12
        assert far(rewards[b].sum(), (scores[b] if where else 0) - kl_coef * kl[b, row].sum()) < 1e-12


def gae_by_definition(rewards, values, gamma, lam, bootstrap):
    """A_t = Σ_l (γλ)^l δ_{t+l} of one reply, arXiv 1506.02438 eq. 16, in O(T²)."""
    after = values[1:] + [bootstrap]
    delta = [r + gamma * v1 - v for r, v, v1 in zip(rewards, values, after)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


@given(st.data(), masks(holes=True), fraction, fraction, st.booleans())
def test_gae_is_its_definition(data, mask, gamma, lam, truncated):
    """On the valid cells of each row, wherever they are; masked cells of the results are 0."""
    rewards, values = cells(data.draw, mask), cells(data.draw, mask)
    bootstrap = torch.tensor(data.draw(st.lists(number, min_size=len(mask), max_size=len(mask))), dtype=REAL) if truncated else None
    advantages, returns = P.gae(rewards, values, mask, gamma, lam, bootstrap)
    for b, row in enumerate(mask):
        last = bootstrap[b].item() if truncated else 0.0
        expected = gae_by_definition(rewards[b, row].tolist(), values[b, row].tolist(), gamma, lam, last)
        assert far(advantages[b, row], expected) < 1e-10 and far(returns[b, row], torch.tensor(expected, dtype=REAL) + values[b, row]) < 1e-10
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_gae_worked_by_hand():
    """γ = λ = ½. δ = 1 + ½·1 - ½, 0 + ½·1 - 1, 2 - 1 = 1, -½, 1, so A = 1 + ¼·-¼, -½ + ¼·1, 1 = 0.9375, -0.25, 1. A reply of two tokens,
    cut off in a state worth 4: δ = 0 + 0 - 2, 1 + ½·4 - 0 = -2, 3, so A = -2 + ¼·3, 3 = -1.25, 3. The returns are A + V."""
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, math.nan]], dtype=REAL)
    values = torch.tensor([[0.5, 1.0, 1.0], [2.0, 0.0, math.inf]], dtype=REAL)
    mask, bootstrap = torch.tensor([[True, True, True], [True, True, False]]), torch.tensor([0.0, 4.0], dtype=REAL)
    advantages, returns = P.gae(rewards, values, mask, 0.5, 0.5, bootstrap)
    assert far(advantages, [[0.9375, -0.25, 1], [-1.25, 3, 0]]) < 1e-12 and far(returns, [[1.4375, 0.75, 2], [0.75, 3, 0]]) < 1e-12


@given(st.data(), masks(shortest=1), fraction)
def test_gae_at_its_ends(data, mask, gamma):
    """λ = 0: the TD error. λ = 1: the discounted return less V. The defaults are γ = 1, λ = 0.95, nothing after the reply."""
    rewards, values = cells(data.draw, mask), cells(data.draw, mask)
    td, one = P.gae(rewards, values, mask, gamma, 0.0), P.gae(rewards, values, mask, gamma, 1.0)
    for b, row in enumerate(mask):
        r, v = rewards[b, row].tolist(), values[b, row].tolist()
        assert far(td[0][b, row], [x + gamma * y - z for x, y, z in zip(r, v[1:] + [0], v)]) < 1e-12
        assert far(one[1][b, row], [sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]) < 1e-10
    assert far(P.gae(rewards, values, mask)[0], P.gae(rewards, values, mask, 1.0, 0.95, torch.zeros(len(mask)))[0]) == 0


@given(st.data(), masks(), fraction, fraction, number)
def test_gae_is_linear_and_blind_to_potential_shaping(data, mask, gamma, lam, scale):
    """gae(ar + r', av + v') = a·gae(r, v) + gae(r', v'). Adding γΦ(s_{t+1}) - Φ(s_t) to the rewards and taking Φ from the
    values leaves advantages as they are (Ng et al. 1999)."""
    r, v, r2, v2, phi = (cells(data.draw, mask, garbage=False) for _ in range(5))
    a, b = P.gae(r, v, mask, gamma, lam)[0], P.gae(r2, v2, mask, gamma, lam)[0]
    assert far(P.gae(scale * r + r2, scale * v + v2, mask, gamma, lam)[0], scale * a + b) < 1e-9
    after = torch.cat([phi[:, 1:], torch.zeros(len(phi), 1)], 1)
    assert far(P.gae(r + gamma * after - phi, v - phi, mask, gamma, lam)[0], a) < 1e-9


def surrogate(ratio, advantage, low, high, dual):
    """PPO's objective for one token, in plain Python."""
    x = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return max(x, dual * advantage) if dual is not None and advantage < 0 else x


@given(st.data(), masks(holes=True), st.floats(0.05, 0.5), st.none() | st.floats(0.05, 0.9), st.none() | st.floats(1.1, 3))
def test_policy_loss_by_brute_force(data, mask, low, high, dual):
    """Loss, statistics and gradient token by token: the gradient is -ρA/N inside, exactly 0 where the clip is active."""
    new, old, advantages = (cells(data.draw, mask) for _ in range(3))
    old[mask] = new[mask] + old[mask] / 4  # ratios from e^-1 to e
    new.requires_grad_()
    loss, stats = P.policy_loss(new, old, advantages, mask, low, high, dual)
    top, n = low if high is None else high, max(1, int(mask.sum()))
    ratio, adv = (new - old)[mask].exp().tolist(), advantages[mask].tolist()
    assert far(loss.detach(), -sum(surrogate(r, a, low, top, dual) for r, a in zip(ratio, adv)) / n) < 1e-10
    assert far(stats["policy/ratio"], sum(ratio) / n) < 1e-10
    assert far(stats["policy/approxkl"], sum(r - 1 - math.log(r) for r in ratio) / n) < 1e-10
    clipped = [(r > 1 + top and a > 0) or (r < 1 - low and a < 0) for r, a in zip(ratio, adv)]
    assert far(stats["policy/clipfrac"], sum(clipped) / n) < 1e-12
    event("clipped" if any(clipped) else "not clipped")
    flat = [c or (dual is not None and a < 0 and r > dual) for c, r, a in zip(clipped, ratio, adv)]
    got = gradient(loss, new)
    assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))
    assert far(got[mask], [0.0 if f else -r * a / n for f, r, a in zip(flat, ratio, adv)]) < 1e-10
    assert all(g == 0 for g, f in zip(got[mask].tolist(), flat) if f)


@given(st.floats(-1, 1).filter(bool), number.filter(lambda a: abs(a) > 0.01))
def test_policy_loss_at_a_tie(log_ratio, advantage):
    """ρ on the very edge of its range: both arguments of the minimum are ρA, nothing is clipped, and the whole gradient flows."""
    new = torch.tensor([[log_ratio]], dtype=REAL, requires_grad=True)
    ratio = new.detach().exp().item()
    low, high = (1 - ratio, 1.0) if ratio < 1 else (0.5, ratio - 1)
    assume(ratio in (1 - low, 1 + high))  # in floating point too
    loss, stats = P.policy_loss(new, torch.zeros(1, 1, dtype=REAL), torch.tensor([[advantage]], dtype=REAL), torch.tensor([[True]]), low, high)
    assert far(loss.detach(), -ratio * advantage) < 1e-12 and stats["policy/clipfrac"] == 0
    assert far(gradient(loss, new), [[-ratio * advantage]]) < 1e-12


def test_policy_loss_worked_by_hand():
    """ε = 0.2. ρ = 1.5, A = 2: min(3, 2.4) = 2.4. ρ = 0.5, A = -1: min(-0.5, -0.8) = -0.8. ρ = 1.5, A = -2: min(-3, -2.4) = -3.
    ρ = 1.1, A = 1: inside, 1.1. Sum -0.3, mean -0.075, loss 0.075; the gradient is -ρA/4 where no clip is active."""
    ratio, advantages = torch.tensor([[1.5, 0.5, 1.5, 1.1]], dtype=REAL), torch.tensor([[2.0, -1.0, -2.0, 1.0]], dtype=REAL)
    new, mask = ratio.log().requires_grad_(), torch.ones(1, 4, dtype=torch.bool)
    loss, stats = P.policy_loss(new, torch.zeros(1, 4, dtype=REAL), advantages, mask)
    assert far(loss.detach(), 0.075) < 1e-12 and far(stats["policy/clipfrac"], 0.5) < 1e-12
    assert far(gradient(loss, new), [[0, 0, 0.75, -0.275]]) < 1e-12
    assert far(P.policy_loss(new, torch.zeros(1, 4), advantages, mask, dual_clip=1.25)[0].detach(), -(2.4 - 0.8 - 2.5 + 1.1) / 4) < 1e-12
    assert far(P.policy_loss(new, torch.zeros(1, 4), advantages, mask, cliprange_high=0.3)[0].detach(), -(2.6 - 0.8 - 3 + 1.1) / 4) < 1e-12
    weights = torch.tensor([[1.0, 0.0, 0.0, 2.0]], dtype=REAL)
    assert far(P.policy_loss(new, torch.zeros(1, 4), advantages, mask, weights=weights)[0].detach(), -(2.4 + 2.2)) < 1e-12


@given(st.data(), masks(holes=True), st.none() | st.floats(0.05, 1))
def test_value_loss_by_brute_force(data, mask, clip):
    """½ max of the two squares; at least ½ MSE, equal to it without the clip; gradient 0 just where the clipped error is larger."""
    new, old, returns = (cells(data.draw, mask) for _ in range(3))
    new.requires_grad_()
    loss, stats = P.value_loss(new, old, returns, mask, clip)
    n, rows = max(1, int(mask.sum())), list(zip(new[mask].tolist(), old[mask].tolist(), returns[mask].tolist()))
    plain = [(v - r) ** 2 for v, _, r in rows]
    other = plain if clip is None else [(min(max(v, o - clip), o + clip) - r) ** 2 for v, o, r in rows]
    if clip is not None:  # kinks: the ends of the clip range, and ties of the two squares outside of it
        assume(all(abs(v - o) < clip - 1e-9 or (abs(v - o) > clip + 1e-9 and abs(a - b) > 1e-9) for a, b, (v, o, _) in zip(plain, other, rows)))
    assert far(loss.detach(), 0.5 * sum(map(max, plain, other)) / n) < 1e-10 and loss >= 0.5 * sum(plain) / n - 1e-12
    assert far(stats["val/clipfrac"], sum(b > a for a, b in zip(plain, other)) / n) < 1e-12
    event("clipped" if any(b > a for a, b in zip(plain, other)) else "not clipped")
    got = gradient(loss, new)
    assert torch.equal(got[~mask], torch.zeros_like(got[~mask]))
    assert far(got[mask], [0.0 if b > a else (v - r) / n for a, b, (v, _, r) in zip(plain, other, rows)]) < 1e-10


@given(st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([-1, 1]), st.integers(-8, 8).map(lambda x: x / 4), number)
def test_value_loss_at_a_tie(clip, sign, old, target):
    """V on the very edge of its range (in floating point too: all are quarters): nothing is clipped, and the whole gradient flows."""
    new, cell = torch.tensor([[old + sign * clip]], dtype=REAL, requires_grad=True), torch.tensor([[True]])
    loss, stats = P.value_loss(new, torch.tensor([[old]], dtype=REAL), torch.tensor([[target]], dtype=REAL), cell, clip)
    assert far(loss.detach(), (old + sign * clip - target) ** 2 / 2) < 1e-12 and stats["val/clipfrac"] == 0
    assert far(gradient(loss, new), [[old + sign * clip - target]]) < 1e-12


def test_value_loss_worked_by_hand():
    """ε = 0.2, V_old = 0. V = 1, R = 1: the clipped 0.2 errs by 0.8: 0.64. V = 0.1, R = 1: inside, 0.81. V = -1, R = 1: 4 > 1.44.
    Half the mean: (0.64 + 0.81 + 4) / 6."""
    new, mask = torch.tensor([[1.0, 0.1, -1.0]], dtype=REAL, requires_grad=True), torch.ones(1, 3, dtype=torch.bool)
    loss, _ = P.value_loss(new, torch.zeros(1, 3, dtype=REAL), torch.ones(1, 3, dtype=REAL), mask)
    assert far(loss.detach(), 5.45 / 6) < 1e-12
    assert far(gradient(loss, new), [[0, -0.3, -2 / 3]]) < 1e-12
    inside = P.value_loss(torch.tensor([[0.04]]), torch.tensor([[-0.09]]), torch.tensor([[1.0]]), torch.tensor([[True]]))
    assert inside[1]["val/clipfrac"] == 0  # in float32 too, where -0.09 + (0.04 + 0.09) is not 0.04
    weights = torch.tensor([[0.0, 1.0, 0.0]], dtype=REAL)
    assert far(P.value_loss(new, torch.zeros(1, 3), torch.ones(1, 3), mask, weights=weights)[0].detach(), 0.405) < 1e-12


# ----------------------------------------------------------------------------------------- what the tests are made with

KINDS = ["gpt2", "llama"]
EXACT = {"gpt2": 1e-9, "llama": 2e-5}  # Llama's norms compute in float32 whatever the weights are
STOP = 2


def tiny(kind="gpt2", V=7, seed=0, **settings):
    """A random float64 language model, wide enough in its weights that its distributions are far from uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3,
                                          bos_token_id=None, eos_token_id=STOP, **settings)).double()
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                                        max_position_embeddings=32, initializer_range=0.4, bos_token_id=None, eos_token_id=STOP,
                                        **settings)).double()


CRITICS = [("shared", "value"), ("shared", "action-value"), ("separate", "value"), ("separate", "action-value")]


def tiny_actor(kind="gpt2", V=7, seed=0, critic=("shared", "value")):
    own = tiny(kind, V, seed + 5) if critic[0] == "separate" else None
    actor = P.Actor(tiny(kind, V, seed), critic=own, action_values=critic[1] == "action-value")
    torch.nn.init.normal_(actor.value_head.weight, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(actor.value_head.bias, generator=torch.Generator().manual_seed(seed))
    return actor


def prompts_of(lengths, V=7, seed=0):
    """Left-padded prompts of these lengths; the padding is content too (token 3), only the mask tells."""
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(0, V, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(~mask, 3 % V), mask


def settings_of(**changes):
    return Config(**dict(batch_size=8, num_mini_batches=2, num_ppo_epochs=2, whiten_advantages=False, temperature=0.8) | changes)


def experience(kind="gpt2", lengths=(3, 1, 2, 5, 4, 2, 3, 1), T=6, cfg=None, seed=0, stop=(STOP,), critic=("shared", "value")):
    """An actor, another model as the reference, and a complete rollout of sampled replies with random scores."""
    cfg, actor, ref = cfg or settings_of(), tiny_actor(kind, seed=seed, critic=critic), tiny_actor(kind, seed=seed + 1)
    torch.manual_seed(seed)
    rollout = P.generate(actor, *prompts_of(lengths, seed=seed), T, cfg.temperature, list(stop))
    P.evaluate(actor, ref, rollout, cfg.temperature, 3)
    P.credit(rollout, torch.randn(len(lengths), dtype=REAL), cfg.kl_coef, cfg)
    return actor, ref, rollout


def alone(lm, prompt, reply, temperature):
    """log π of a reply by the model's own forward on prompt and reply, no padding, no cache, no batch-mates: [T]"""
    logits = lm(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1:-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(reply).unsqueeze(1)).squeeze(1)


def each_reply(rollout):
    for query, query_mask, response, mask in zip(rollout.queries, rollout.query_mask, rollout.responses, rollout.mask):
        yield query[query_mask].tolist(), response[mask].tolist()


def ppo_steps(actor, rollout, cfg, lr=0.0, seed=0, **options):
    optimizer = torch.optim.SGD(actor.parameters(), lr=lr)
    torch.manual_seed(seed)
    return P.ppo_update(actor, optimizer, rollout, cfg.kl_coef, cfg, **options)


def weights_of(actor):
    return torch.cat([p.detach().flatten().clone() for p in actor.parameters()])


SHAPE = dict(vocab_size=7, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
             pad_token_id=0, bos_token_id=1, eos_token_id=STOP, initializer_range=0.4)
GROUPED = SHAPE | dict(num_key_value_heads=1)
MODELS = {  # kind: settings of its config
    "GPT2": dict(vocab_size=7, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=STOP, initializer_range=0.4),
    "Llama": GROUPED, "Qwen3": GROUPED | dict(head_dim=8), "Mistral": GROUPED | dict(sliding_window=4),
    "Gemma3Text": GROUPED | dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "Phi3": GROUPED, "OPT": {k: v for k, v in SHAPE.items() if k not in ("intermediate_size", "initializer_range")} | dict(
        ffn_dim=16, word_embed_proj_dim=8, init_std=0.4), "GPTNeoX": SHAPE,
    "Gemma2": GROUPED | dict(head_dim=8, sliding_window=4, final_logit_softcapping=0.5), "Cohere": GROUPED | dict(logit_scale=0.3),
    "Granite": GROUPED | dict(logits_scaling=5.0), "Mixtral": GROUPED | dict(num_local_experts=4),
    "Gemma3": dict(text_config=GROUPED | dict(head_dim=8, sliding_window=4), vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)),  # also sees
    "Qwen3Moe": GROUPED | dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


def model_of(kind, seed=0, head="ForCausalLM"):
    import transformers

    torch.manual_seed(seed)
    auto = getattr(transformers, "AutoModel" + head)
    return auto.from_config(getattr(transformers, kind + "Config")(**MODELS[kind])).float()


ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def words_tokenizer(V=7):
    """One word a token, t0 t1 …; neither bos, eos nor pad."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0")


def share_of_t5(prompts, completions, **columns):
    return [text.split().count("t5") / max(1, len(text.split())) for text in completions]


def mean_number(prompts, completions, **columns):
    """The mean of the numbers in t3 t0 …"""
    return [sum(int(word[1:]) for word in text.split()) / max(1, len(text.split())) for text in completions]


def mean_length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


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
    config = getattr(transformers, kind + "Config")(**SHAPE | dict(vocab_size=48, max_position_embeddings=64, num_labels=labels) | changes)
    return getattr(transformers, "AutoModel" + head).from_config(config)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A model folder, prompts and rewards as a user has them."""
    folder = tmp_path_factory.mktemp("files")
    tiny("gpt2").float().save_pretrained(folder / "model")
    words_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("t1 t3\nt4\n\nt5 t1 t1\n")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"t{i % 6} t1", "answer": i}) + "\n" for i in range(20)))
    (folder / "bad.jsonl").write_text('{"prompt": "t1"}\n{"prompt": \n')
    (folder / "lacks.jsonl").write_text('{"prompt": "t1"}\n{"text": "t1"}\n')
    (folder / "empty.txt").write_text("\n")
    (folder / "latin.txt").write_bytes(b"t1\n\xff\n")
    (folder / "blank.jsonl").write_text('{"prompt": "t1"}\n\n{"prompt": " "}\n')
    (folder / "list.jsonl").write_text('["t1"]\n')
    (folder / "roles.jsonl").write_text('{"prompt": [{"text": "t1"}]}\n')
    (folder / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "t1"}]}\n')
    (folder / "long.txt").write_text("t1 " * 40 + "\n")
    letters_model().save_pretrained(folder / "long")
    letters_tokenizer().save_pretrained(folder / "long")
    model_of("Llama", 0, "ForSequenceClassification").save_pretrained(folder / "judge")
    shutil.copytree(folder / "model", folder / "cut")
    (folder / "cut" / "model.safetensors").write_bytes((folder / "cut" / "model.safetensors").read_bytes()[:-50])
    from transformers import GPTNeoXJapaneseConfig, GPTNeoXJapaneseForCausalLM, MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, state_size=4)).save_pretrained(folder / "mamba")
    GPTNeoXJapaneseForCausalLM(GPTNeoXJapaneseConfig(**SHAPE)).save_pretrained(folder / "layerless")
    for name in ("judge", "mamba", "layerless"):
        words_tokenizer().save_pretrained(folder / name)
    shutil.copytree(folder / "model", folder / "custom")
    (folder / "custom" / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {
        "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}))
    (folder / "custom" / "own.py").write_text("raise SystemExit('code of the model was run')\n")
    (folder / "broken.py").write_text("import nothing_of_this_name\n")
    (folder / "rewards.py").write_text("def answers(prompts, completions, **columns):\n    return [float(a) for a in columns['answer']]\n"
                                       "def short(prompts, completions, **columns):\n    return [0.0]\n"
                                       "def text(prompts, completions, **columns):\n    return ['much'] * len(prompts)\n"
                                       "def number(prompts, completions, **columns):\n    return 1.0\n"
                                       "def nan(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n")
    return folder


def run_cli(*arguments, cwd, columns=80):
    return subprocess.run([sys.executable, str(HERE / "ppo_llm.py"), *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env=ENV | {"COLUMNS": str(columns)}, timeout=280)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


quick_demo = P.demo_task


# ---------------------------------------------------------------------------------------------------------- 2. the data


def test_rows_trim_and_lose_nothing():
    """A micro-batch is cut to its longest prompt and reply; what is left of each reply is what it was."""
    _, _, rollout = experience()
    assert sorted(torch.cat(rollout.micro_batches(torch.tensor([5, 1, 2, 7, 0]), 2)).tolist()) == [0, 1, 2, 5, 7]
    for index in rollout.micro_batches(torch.arange(8), 3):
        assert len(index) <= 3
        part = rollout.rows(index)
        assert part.queries.shape[1] == rollout.query_mask[index].sum(1).max() and part.mask.shape[1] == rollout.mask[index].sum(1).max()
        assert list(each_reply(part)) == [list(each_reply(rollout))[i] for i in index]
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
            assert far(getattr(part, name)[part.mask], getattr(rollout, name)[index][rollout.mask[index]]) == 0
        assert torch.equal(part.valid, part.mask.flatten().nonzero().squeeze(1))
        assert torch.equal(part.final_values, rollout.final_values[index])


def test_micro_batches_follow_the_tokens_and_not_the_padding():
    """Geometric lengths, mean 8 of 64: padding is at most an eighth and 128 tokens a group, in no more groups than that needs."""
    lengths = torch.empty(256).geometric_(1 / 8, generator=torch.Generator().manual_seed(0)).clamp(max=64)
    rollout = dataclasses.replace(experience()[2], query_mask=torch.ones(256, 3) > 0, mask=torch.arange(64) < lengths.unsqueeze(1))
    for size in (256, 20):
        groups = rollout.micro_batches(torch.arange(256), size)
        widths = [lengths[group] + 3 for group in groups]
        assert all(len(x) <= size and len(x) * x.max() <= 1.125 * x.sum() + 128 for x in widths)
        assert size < 256 or all(len(x) * y.min() > 1.125 * x.sum() + 128 for x, y in itertools.pairwise(widths))
        assert all(x.max() <= y.min() for x, y in itertools.pairwise(widths))
    for device, free in (("cpu", 128), ("cuda", 8192)):  # beside 8 tokens an eighth of them is free too, and not a token more
        for longest, count in ((9 + free, 1), (10 + free, 2)):
            pair = dataclasses.replace(rollout, query_mask=torch.ones(2, 3) > 0, mask=torch.arange(longest) < torch.tensor([[5], [longest - 3]]))
            assert len(pair.micro_batches(torch.arange(2), 2, device)) == count


# ------------------------------------------------------------------------------------- 3. the actor with its value head


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_every_logprob_is_the_models_own(kind, temperature):
    """Sampler (cached, left-padded, stopped rows dropped) = scorer (one padded forward) = the bare model, one reply at a time.
    So left padding, batch-mates and the cache change nothing, and the temperature is in all of them."""
    actor, ref, rollout = experience(kind, lengths=(1, 6, 3, 2, 2, 5, 1, 4) * 3, T=12, cfg=settings_of(temperature=temperature))
    assert len(set(rollout.mask.sum(1).tolist())) > 1 and rollout.ended.any() and not rollout.ended.all()
    for b, (prompt, reply) in enumerate(each_reply(rollout)):
        own = alone(actor.lm, prompt, reply, temperature).detach()
        assert far(rollout.logprobs[b, rollout.mask[b]], own) < EXACT[kind]
        assert far(rollout.sampler_logprobs[b, rollout.mask[b]], own) < EXACT[kind]
        assert far(rollout.ref_logprobs[b, rollout.mask[b]], alone(ref.lm, prompt, reply, temperature).detach()) < EXACT[kind]
        hidden = actor.lm.base_model(torch.tensor([prompt + reply])).last_hidden_state[0]
        values = (hidden @ actor.value_head.weight[0] + actor.value_head.bias).detach()
        assert far(rollout.values[b, rollout.mask[b]], values[len(prompt) - 1:-1]) < EXACT[kind]  # V of the state before each token
        assert far(rollout.final_values[b], values[-1]) < EXACT[kind]
    assert not any(x[~rollout.mask].any() for x in (rollout.logprobs, rollout.ref_logprobs, rollout.sampler_logprobs))


def watched_logits(monkeypatch):
    """A list that the number of tokens is put on whose logits are computed at once."""
    sizes, logits = [], P.Actor.logits
    monkeypatch.setattr(P.Actor, "logits", lambda self, states: (sizes.append(states.shape[:-1].numel()), logits(self, states))[1])
    return sizes


def test_logits_in_chunks_are_the_same_with_the_same_gradient(monkeypatch):
    """All tokens at once, three at a time or one: log-probabilities, entropies (0 unless asked for), and the gradient of both."""
    actor, _, rollout = experience()
    batch, sizes, results = rollout.rows(torch.arange(8)), watched_logits(monkeypatch), []
    assert not actor.logprobs(actor.states(batch), batch, 0.8)[1].any()
    n = int(batch.mask.sum())
    for budget, tokens in ((2**26, n), (7 * n, n), (7 * 3, 3), (1, 1)):
        monkeypatch.setattr(P, "LOGITS_AT_ONCE", budget)
        sizes.clear()
        actor.zero_grad()
        logprobs, entropy = actor.logprobs(actor.states(batch), batch, 0.8, entropy=True)
        assert max(sizes) == tokens and entropy[batch.mask].min() > 0
        (logprobs.sum() + (entropy**2).sum()).backward()
        assert sum(sizes) == (n if tokens == n else 2 * n)  # one chunk is not recomputed in the backward pass
        results.append((logprobs.detach(), entropy.detach(), torch.cat([p.grad.flatten() for p in actor.lm.parameters()])))
    for other in results[1:]:
        assert max(map(far, results[0], other)) < 1e-9


@pytest.mark.parametrize("critic", CRITICS)
def test_what_the_critic_says(critic, monkeypatch):
    """By the bare model, reply by reply: the baseline is V(s), or Σ_a π(a|s) Q(s, a) at the temperature; what is regressed is V(s_t),
    or Q(s_t, a_t). Also with the vocabulary in chunks, and for the state after the reply."""
    monkeypatch.setattr(P, "LOGITS_AT_ONCE", 7 * 4)
    actor, _, rollout = experience(critic=critic)
    trunk = actor.lm.base_model if critic[0] == "shared" else actor.critic_trunk
    for b, (prompt, reply) in enumerate(each_reply(rollout)):
        ids, n = torch.tensor([prompt + reply]), len(reply)
        out = actor.value_head(trunk(ids).last_hidden_state[0, len(prompt) - 1:]).detach()  # [n + 1, 1 or V]
        pi = (actor.lm(ids).logits[0, len(prompt) - 1:] / 0.8).softmax(-1).detach()
        values = out[:, 0] if critic[1] == "value" else (pi * out).sum(1)
        assert far(rollout.values[b, :n], values[:-1]) < 1e-9 and far(rollout.final_values[b], values[-1]) < 1e-9
        said = values[:-1] if critic[1] == "value" else torch.stack([out[t, token] for t, token in enumerate(reply)])
        assert far(rollout.predictions[b, :n], said) < 1e-9
    assert rollout.values[rollout.mask].std() > 0.1
    sizes = watched_logits(monkeypatch)
    P.evaluate(actor, actor, rollout, 0.8, 8)
    assert max(sizes) == 4


def test_a_reward_models_head_becomes_the_value_head(tmp_path):
    """At first V of each state, and Q of each token there, is what the reward model says of the text so far."""
    rm = model_of("Llama", 3, "ForSequenceClassification")
    rm.config.num_labels, rm.score = 1, torch.nn.Linear(16, 1, bias=False)
    for action_values in (False, True):
        actor = P.Actor(model_of("Llama"), critic=rm, action_values=action_values)
        rollout = P.generate(actor, *prompts_of([3, 1, 2]), 6, 1.0, [STOP])
        P.evaluate(actor, actor, rollout, 1.0, 2)
        for b, (prompt, reply) in enumerate(each_reply(rollout)):
            for t in range(len(reply)):
                said = rm.score(rm.base_model(torch.tensor([prompt + reply[:t]])).last_hidden_state[0, -1]).item()
                assert far(rollout.values[b, t], said) < 1e-5 and far(rollout.predictions[b, t], said) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_is_itself_and_trains(kind, files, tmp_path):
    """For each kind that people use, in float32 as it is trained: logits, sampler (cached, left-padded) and scorer agree with the
    model's own forward on each reply alone; two updates run from a folder and what they save loads, with other weights."""
    from transformers import AutoModelForCausalLM

    lm = model_of(kind)
    torch.manual_seed(0)
    rollout = P.generate(P.Actor(lm), *prompts_of([1, 6, 3, 2, 2, 5, 1, 4]), 8, 0.7, [STOP])
    P.evaluate(P.Actor(lm), P.Actor(lm), rollout, 0.7, 3)
    for b, (prompt, reply) in enumerate(each_reply(rollout)):
        own = alone(lm, prompt, reply, 0.7).detach()
        assert far(rollout.sampler_logprobs[b, rollout.mask[b]], own) < 1e-4 and far(rollout.logprobs[b, rollout.mask[b]], own) < 1e-4
    assert rollout.logprobs[rollout.mask].std() > 0.1

    lm.save_pretrained(tmp_path / "model")
    words_tokenizer().save_pretrained(tmp_path / "model")
    run = P.train(Config(model=str(tmp_path / "model"), prompts=str(files / "prompts.jsonl"), num_updates=2, batch_size=8, response_length=5,
                         learning_rate=1e-4, name="x", runs_dir=str(tmp_path)), reward=mean_number)
    metrics = lines(run / "metrics.jsonl")
    assert metrics[1]["policy/ratio"] == pytest.approx(1, abs=0.3) and metrics[1]["policy/sampler_gap"] < 1e-5
    saved, ids = AutoModelForCausalLM.from_pretrained(run / "policy"), torch.tensor([[3, 5, 6, 1]])
    with torch.no_grad():
        moved = far(saved(ids).logits, lm(ids).logits)
    assert 1e-4 < moved < 1


def test_gpt2s_gelu_in_one_operation_is_the_same_function():
    """Eight operations in transformers, one in torch: the activation and its gradient, float64, and none of the slow ones is left."""
    from transformers.activations import NewGELUActivation

    actor, x = tiny_actor(critic=("separate", "value")), torch.linspace(-6, 6, 101, dtype=REAL, requires_grad=True)
    act = actor.lm.base_model.h[0].mlp.act
    assert far(act(x).detach(), NewGELUActivation()(x).detach()) < 1e-12
    assert far(gradient(act(x).sum(), x), gradient(NewGELUActivation()(x).sum(), x)) < 1e-12
    assert not any(isinstance(module, NewGELUActivation) for module in actor.modules())


def test_bfloat16_is_for_matrix_products_only():
    """Under autocast logits differ by rounding from the model's own and come as float32, over float32 weights. Without, they are its own.
    A critic is a single number V unless asked for Q."""
    lm, ids, everything = tiny().float(), prompts_of([6, 6])[0], torch.ones(2, 6, dtype=torch.bool)
    exact, rounded = P.Actor(lm), P.Actor(tiny().float(), torch.bfloat16)
    with torch.no_grad():
        own, plain, cast = lm(ids).logits, *(actor.logits(actor.trunk(ids, everything)) for actor in (exact, rounded))
    assert far(own, plain) < 1e-5 and 1e-3 < far(own, cast) < 0.1 * own.std()
    assert cast.dtype == torch.float32 and all(p.dtype == torch.float32 for p in rounded.parameters())
    assert exact.value_head.out_features == 1


def test_where_products_go_to_onednn_attention_is_plain():
    """--matmul-precision reaches torch, for one run only. In bfloat16 or under medium the policy and a separate critic leave the fused
    attention, on the CPU; otherwise they keep it."""
    for precision, dtype, attention in (("medium", "float32", "eager"), ("highest", "bfloat16", "eager"), ("high", "float32", "sdpa"),
                                        ("highest", "float32", "sdpa")):
        _, kind = P.pick_device(Config(device="cpu", dtype=dtype, matmul_precision=precision))
        assert torch.get_float32_matmul_precision() == precision and kind == getattr(torch, dtype)
        actor = P.Actor(tiny().float(), kind, tiny().float())
        assert actor.lm.config._attn_implementation == actor.critic_trunk.config._attn_implementation == attention


def test_a_rollout_rounds_each_weight_once(monkeypatch):
    """In bfloat16, decoding one token after the other from float32 weights would spend most of its time on rounding them."""
    lm, casts = tiny().float(), Counter()
    weights = {p.data_ptr(): name for name, p in lm.named_parameters()}

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype):
                casts[weights.get(args[0].data_ptr())] += 1
            return func(*args, **(kwargs or {}))

    actor = P.Actor(lm, torch.bfloat16)
    task = P.Task(actor, None, SimpleNamespace(batch_decode=lambda ids, **_: [""] * len(ids)), [], [], {}, (), [])
    monkeypatch.setattr(P, "evaluate", lambda *_: None)
    with Casts():  # two groups of prompts
        P.collect(task, [P.Prompt({"prompt": ""}, [3, 4])] * 16, Config(micro_batch_size=1, response_length=8), Counter())
    del casts[None]
    assert len(casts) > 4 and set(casts.values()) == {1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and is about glibc")
def test_freed_tensors_stay_with_the_process():
    """Else every update pays for the page faults of its large tensors again."""
    P.pick_device(Config(device="cpu"))
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    x = torch.ones(25_000_000)  # 100 MB
    held = resident()
    del x
    assert resident() > held - 50e6


def test_models_that_cannot_work_are_refused(monkeypatch):
    """Anything unknown behind the head, a recurrent state that left padding moves, an encoder, or a cache that cannot drop replies: a
    refusal, not a wrong gradient."""
    from transformers import AutoModelForCausalLM, BartConfig, BertConfig, DynamicCache, MambaConfig

    def strange(change):
        model = tiny()
        forward = model.forward
        model.forward = lambda *args, **kwargs: (out := forward(*args, **kwargs), setattr(out, "logits", change(out.logits)))[0]
        return model

    others = [AutoModelForCausalLM.from_config(config) for config in (
        MambaConfig(vocab_size=7, hidden_size=16, num_hidden_layers=2, state_size=4),
        BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16),
        BartConfig(vocab_size=7, d_model=16, encoder_layers=1, decoder_layers=1, decoder_attention_heads=2, encoder_attention_heads=2))]
    for model in (strange(lambda logits: 2 * logits), strange(lambda logits: logits - 3), strange(lambda logits: logits + 0.03 * logits.std()),
                  *others):
        with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be trained here"):
            P.Actor(model)
    monkeypatch.setattr(DynamicCache, "reorder_cache", lambda self, rows: 1 / 0)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        tiny_actor()


@pytest.mark.parametrize("kind", ["GPT2", "Llama", "OPT", "Mixtral"])
def test_gradient_checkpointing_changes_no_gradient(kind, tmp_path):
    """Layers are recomputed in the backward pass, dropout stays off, and the weights after an update are the same."""
    after, calls = [], {}
    for on in (False, True):
        lm = model_of(kind)
        layer = next(m for m in lm.modules() if type(m).__name__.endswith(("Block", "DecoderLayer")))
        next(layer.children()).register_forward_hook(lambda *_, on=on: calls.update({on: calls.get(on, 0) + torch.is_grad_enabled()}))
        cfg = Config(num_updates=1, batch_size=8, response_length=5, learning_rate=1e-2, name=f"x{on}", runs_dir=str(tmp_path),
                     gradient_checkpointing=on, critic="separate")
        P.train(cfg, prompts=["t1 t3", "t4"], reward=mean_number, model=lm, tokenizer=words_tokenizer())
        after.append(torch.cat([p.detach().flatten() for p in lm.parameters()]))
    assert torch.equal(*after) and calls[True] == 2 * calls[False]


def test_every_gradient_is_dense():
    """What the embedding adds to the gradient of a tied head is made sparse; a critic copied from such a model has no head to add to."""
    import copy

    lm = tiny()
    P.Actor(lm)
    actor, (_, _, rollout) = P.Actor(lm, critic=copy.deepcopy(lm)), experience()
    rollout.weights = rollout.mask.to(REAL) / rollout.mask.sum()
    P.ppo_loss(actor, rollout.rows(torch.arange(8)), 0.0, settings_of())[0].backward()
    assert lm.get_input_embeddings().sparse and not any(p.grad.is_sparse for p in actor.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------------- 4. the rollout


def test_replies_stop_where_the_first_stop_token_is():
    """Every reply is cut after its first stop token, `ended` tells which have one (on the very last token too), the rest is padding."""
    torch.manual_seed(3)
    actor = tiny_actor()
    rollout = P.generate(actor, *prompts_of([2] * 256), 5, 2.0, [STOP, 4])
    seen_last = False
    for (_, reply), response, ended in zip(each_reply(rollout), rollout.responses.tolist(), rollout.ended.tolist()):
        stops = [t for t, token in enumerate(reply) if token in (STOP, 4)]
        assert stops == ([len(reply) - 1] if ended else []) and (ended or len(reply) == 5)
        assert response[len(reply):] == [0] * (5 - len(reply))
        seen_last |= ended and len(reply) == 5
    assert seen_last and not P.generate(actor, *prompts_of([2] * 4), 5, 2.0, []).ended.any()


def test_sampling_follows_the_policy():
    """4096 first tokens at temperature 2 come with the frequencies of π, within 4 standard errors, and again with the same seed."""
    actor, (ids, mask) = tiny_actor(), prompts_of([3])
    rollouts = []
    for _ in range(2):
        torch.manual_seed(0)
        rollouts.append(P.generate(actor, ids.expand(4096, -1), mask.expand(4096, -1), 1, 2.0, [STOP]))
    assert torch.equal(rollouts[0].responses, rollouts[1].responses)
    p = (actor.lm(ids).logits[0, -1] / 2).softmax(-1).detach()
    share = torch.bincount(rollouts[0].responses.flatten(), minlength=7) / 4096
    assert ((share - p).abs() < 4 * (p * (1 - p) / 4096) ** 0.5).all()


def test_a_token_is_the_inverse_of_the_distribution_function(monkeypatch):
    """For a uniform u the token is the first whose cumulative probability exceeds u, in float64: never one of probability 0, at times the
    last, which has 1e-9, and that one also for a u that rounding made 1."""
    actor, (ids, mask) = tiny_actor(), prompts_of([3])
    p = torch.tensor([0.0, 0.25, 0.25, 0.125, 0.375 - 2e-9, 1e-9, 1e-9], dtype=REAL)
    monkeypatch.setattr(P.Actor, "logits", lambda self, states: p.log().expand(len(states), -1))
    for u, token in ((0.0, 1), (0.2, 1), (0.26, 2), (0.49, 2), (0.51, 3), (0.626, 4), (1 - 3e-9, 4), (1 - 1.5e-9, 5), (1 - 5e-10, 6), (1.0, 6)):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=u, **kind: torch.full(shape, u, **kind))
        rollout = P.generate(actor, ids, mask, 2, 1.0, [])
        assert rollout.responses.tolist() == [[token, token]] and far(rollout.sampler_logprobs[0, 0], p[token].log()) < 1e-9


def test_replies_that_have_stopped_leave_the_batch(monkeypatch):
    """After every fourth token: all of them once fewer than three quarters are going on, and decoding ends when none is."""
    actor, (ids, mask), sizes, trunk = tiny_actor(), prompts_of([2] * 40), [], P.Actor.trunk
    monkeypatch.setattr(P.Actor, "trunk", lambda self, ids, *more: (sizes.append(len(ids)), trunk(self, ids, *more))[1])
    for seed in range(4):
        sizes.clear()
        torch.manual_seed(seed)
        rollout = P.generate(actor, ids, mask, 24, 1.0, [STOP, 4] if seed % 2 else [STOP])
        going, expected = 40, []
        for t in range(1, 25):
            expected.append(going)
            left = int((rollout.mask.sum(1) > t).sum() + (~rollout.ended & (rollout.mask.sum(1) == t)).sum())
            if t % 4 == 0 and left == 0:
                break
            going = left if t % 4 == 0 and left < 0.75 * going else going
        assert sizes == expected and min(sizes) < 20
    assert len(sizes) < 24


def test_a_reply_is_made_by_its_own_random_numbers():
    """The same seed gives the same replies whether the prompts are decoded together or in groups, and whichever rows stop first."""
    actor, (ids, mask) = tiny_actor(), prompts_of((3, 1, 2, 5, 4, 2, 3, 1) * 3)
    torch.manual_seed(0)
    together = P.generate(actor, ids, mask, 12, 1.0, [STOP])
    torch.manual_seed(0)
    groups = [P.generate(actor, *rows, 12, 1.0, [STOP]) for rows in zip(ids.split(5), mask.split(5))]
    assert torch.equal(together.responses, torch.cat([group.responses for group in groups]))
    assert together.ended.any() and not together.ended.all() and len(together.mask.sum(1).unique()) > 3


@given(st.data(), masks(shortest=1), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.none() | fraction,
       st.sampled_from(["k1", "k2", "k3"]))
@settings(max_examples=50)
def test_credit_is_its_parts_in_order(data, mask, whiten_rewards, whiten_advantages, bootstrap, in_loss, critic_lam, estimator):
    """Penalty for a missing stop, KL in the reward, whitening of rewards, GAE, the critic's own λ, whitening of advantages."""
    cfg = Config(missing_eos_penalty=0.7, gamma=0.9, lam=0.8, kl_estimator=estimator, critic_lam=critic_lam,
                 whiten_rewards=whiten_rewards, whiten_advantages=whiten_advantages, bootstrap_truncated=bootstrap, kl_in="loss" if in_loss else "reward")
    logprobs, ref, values = (cells(data.draw, mask) for _ in range(3))
    ended = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(mask), max_size=len(mask))))
    scores, final = (torch.tensor(data.draw(st.lists(number, min_size=len(mask), max_size=len(mask))), dtype=REAL) for _ in range(2))
    rollout = Rollout(mask, mask, mask.long(), mask, ended, mask, logprobs=logprobs, ref_logprobs=ref, values=values, final_values=final)
    P.credit(rollout, scores, 0.3, cfg)
    penalised = torch.stack([s if e else s - 0.7 for s, e in zip(scores, ended)])
    rewards = P.token_rewards(penalised, P.kl_estimate(logprobs, ref, estimator), mask, 0.0 if in_loss else 0.3)
    if whiten_rewards:
        rewards = P.masked_whiten(rewards, mask, shift_mean=False)
    after = torch.stack([v * (not e) for v, e in zip(final, ended)]) if bootstrap else torch.zeros(len(mask))
    advantages, returns = P.gae(rewards, values, mask, 0.9, 0.8, after)
    if critic_lam is not None:
        returns = P.gae(rewards, values, mask, 0.9, critic_lam, after)[1]
    assert far(rollout.returns, returns) < 1e-12
    assert far(rollout.advantages, P.masked_whiten(advantages, mask) if whiten_advantages else advantages) < 1e-12


def test_metrics_are_means_over_the_valid_tokens():
    """Against brute force: the entropy is that of the bare model, KL is summed over a reply and averaged over replies, and so on."""
    for seed in range(2):
        cfg = settings_of()
        actor, _, rollout = experience(cfg=cfg, seed=seed)
        entropies = []
        for prompt, reply in each_reply(rollout):
            p = (actor.lm(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1:-1] / cfg.temperature).softmax(-1)
            entropies += (-(p * p.log()).sum(-1)).tolist()
        scores, judged = torch.arange(8.0), {"length": torch.ones(8)}
        metrics = P.rollout_metrics(rollout, scores, judged, 0.5)
        assert metrics["policy/entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-10)
        kl = [float((rollout.logprobs - rollout.ref_logprobs)[b, rollout.mask[b]].sum()) for b in range(8)]
        assert metrics["objective/kl"] == pytest.approx(sum(kl) / 8, abs=1e-10)
        assert metrics["objective/scores"] == 3.5 and metrics["objective/scores_std"] == pytest.approx(5.25**0.5)
        assert metrics["objective/non_score_reward"] == pytest.approx(-sum(kl) / 16, abs=1e-10)
        assert metrics["objective/rlhf_reward"] == pytest.approx(3.5 - sum(kl) / 16, abs=1e-6)
        assert metrics["reply/length"] == pytest.approx(float(rollout.mask.sum() / 8))
        assert metrics["reply/ended"] == pytest.approx(float(rollout.ended.float().mean())) and metrics["policy/sampler_gap"] < 1e-10
        returns, error = rollout.returns[rollout.mask], (rollout.returns - rollout.values)[rollout.mask]
        assert metrics["val/explained_variance"] == pytest.approx(float(1 - error.var(correction=0) / returns.var(correction=0)), abs=1e-9)
        assert metrics["val/mean"] == pytest.approx(float(rollout.values[rollout.mask].mean()), abs=1e-10)
        assert metrics["rewards/length"] == 1


# -------------------------------------------------------------------------------------------------------- 5. the update


def enumerated(V=3, T=3):
    """Every reply of the language: up to T tokens, cut at the stop token."""
    replies = set()
    for tokens in itertools.product(range(V), repeat=T):
        stop = tokens.index(STOP) + 1 if STOP in tokens else T
        replies.add(tokens[:stop])
    return sorted(replies)


def language(actor, ref, lengths, cfg, score):
    """A rollout that holds every reply to every prompt once, evaluated and credited; (rollout, prompts, replies)."""
    replies, (ids, mask) = enumerated(), prompts_of(lengths, V=3)
    B, R = len(lengths), len(replies)
    responses = torch.tensor([list(r) + [0] * (3 - len(r)) for r in replies]).repeat(B, 1)
    response_mask = torch.arange(3) < torch.tensor([len(r) for r in replies]).repeat(B).unsqueeze(1)
    ended = torch.tensor([r[-1] == STOP for r in replies]).repeat(B)
    rollout = Rollout(ids.repeat_interleave(R, 0), mask.repeat_interleave(R, 0), responses, response_mask, ended, response_mask)
    P.evaluate(actor, ref, rollout, cfg.temperature, 7)
    P.credit(rollout, score, cfg.kl_coef, cfg)
    return rollout


@pytest.mark.parametrize("kind, temperature, critic", [*itertools.product(KINDS, [0.5, 1.0, 2.0], CRITICS[:1]),
                                                       *itertools.product(["gpt2"], [0.5], CRITICS[1:])])
@pytest.mark.parametrize("seed", [0, 1])
def test_expected_ppo_gradient_is_the_policy_gradient(kind, temperature, critic, seed):
    """On a language small enough to list every reply (V = 3, T ≤ 3, with a stop token), with each reply weighted by its
    probability, the gradient of the PPO loss at ratio 1 (λ = γ = 1, no whitening) is that of -(E[score] - β·KL), for a random
    critic of any kind, left-padded prompts of mixed length, any temperature. This is the policy gradient theorem,
    ∇E[R] = E Σ_t ∇log π(a_t|s_t)·(Σ_{t' ≥ t} r_t' - V(s_t)): what came before a_t, and V, go out as E_a[∇log π(a|s)] = ∇1 = 0. It fails
    for a wrong shift, sign, mask or temperature, and for a baseline that sees the action."""
    cfg = settings_of(temperature=temperature, lam=1.0, gamma=1.0, kl_coef=0.3, vf_coef=0.0)
    actor, ref, lengths = tiny_actor(kind, 3, seed, critic), tiny_actor(kind, 3, seed + 9), [1, 4, 2]
    torch.manual_seed(seed)
    score = torch.randn(len(lengths) * len(enumerated()), dtype=REAL)
    rollout = language(actor, ref, lengths, cfg, score)
    probability = (rollout.logprobs * rollout.mask).sum(1).exp()
    assert far(probability.sum(), len(lengths)) < 1e-10  # the list is complete
    rollout.weights = probability.unsqueeze(1) * rollout.mask
    index = torch.randperm(len(score))
    parameters = list(actor.lm.parameters())
    got = torch.autograd.grad(P.ppo_loss(actor, rollout.rows(index), cfg.kl_coef, cfg)[0], parameters)

    objective = 0.0
    for (prompt, reply), s in zip(each_reply(rollout), score):
        logp, ref_logp = alone(actor.lm, prompt, reply, temperature).sum(), alone(ref.lm, prompt, reply, temperature).sum().detach()
        objective = objective + logp.exp() * (s - cfg.kl_coef * (logp - ref_logp))
    expected = torch.autograd.grad(-objective, parameters)
    assert max(map(far, got, expected)) < EXACT[kind] < 1e-2 < max(g.abs().max().item() for g in expected)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_is_that_of_the_states_met(estimator):
    """By enumeration, with no other term: k2 as a loss has the gradient of Σ KL(π ‖ ref) over the states met, k3 that of Σ KL(ref ‖ π),
    the states taken as given. Neither is the gradient of the KL of whole replies, in which a token also answers for later states."""
    cfg = settings_of(kl_in="loss", kl_estimator=estimator, kl_coef=1.0, vf_coef=0.0)
    actor, ref, lengths = tiny_actor("gpt2", 3), tiny_actor("gpt2", 3, 9), [1, 4, 2]
    rollout = language(actor, ref, lengths, cfg, torch.zeros(len(lengths) * len(enumerated()), dtype=REAL))
    rollout.advantages = torch.zeros_like(rollout.advantages)
    rollout.weights = (rollout.logprobs * rollout.mask).sum(1).exp().unsqueeze(1) * rollout.mask
    parameters = list(actor.lm.parameters())
    got = torch.autograd.grad(P.ppo_loss(actor, rollout.rows(torch.arange(len(rollout.mask))), 1.0, cfg)[0], parameters)
    states_met = whole = 0.0
    for b, (prompt, reply) in enumerate(each_reply(rollout)):
        p, q = ((a.lm(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1:-1] / 0.8).log_softmax(-1) for a in (actor, ref))
        p, q = (p, q.detach()) if estimator == "k2" else (q.detach(), p)
        weight = rollout.logprobs[b, :len(reply)].sum().exp()
        states_met = states_met + weight * (p.exp() * (p - q)).sum()
        logp, ref_logp = alone(actor.lm, prompt, reply, 0.8).sum(), rollout.ref_logprobs[b, :len(reply)].sum()
        whole = whole + logp.exp() * (logp - ref_logp)
    expected, other = (torch.autograd.grad(x, parameters) for x in (states_met, whole))
    assert max(map(far, got, expected)) < 1e-9 and max(map(far, got, other)) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_expected_ppo_gradient_off_policy(kind):
    """After the policy has moved from μ, inside the clip range, it is the gradient of the surrogate, PPO eq. 6: of
    Σ_y μ(y) Σ_t π/μ(y_t)·A_t, by the bare model. That is no longer the policy gradient: states still come from μ."""
    cfg = settings_of(lam=0.7, gamma=0.9, kl_coef=0.3, vf_coef=0.0, cliprange=0.9)
    actor, ref, lengths = tiny_actor(kind, 3), tiny_actor(kind, 3, 9), [1, 3]
    score = torch.linspace(-1, 1, len(lengths) * len(enumerated()), dtype=REAL)
    rollout = language(actor, ref, lengths, cfg, score)
    rollout.weights = (rollout.logprobs * rollout.mask).sum(1).exp().unsqueeze(1) * rollout.mask
    with torch.no_grad():
        for p in actor.parameters():
            p += 0.005 * torch.randn(p.shape, dtype=REAL, generator=torch.Generator().manual_seed(1))
    parameters = list(actor.lm.parameters())
    loss, stats = P.ppo_loss(actor, rollout.rows(torch.arange(len(score))), cfg.kl_coef, cfg)
    assert stats["policy/clipfrac"] == 0 and stats["policy/approxkl"] > 1e-5
    got = torch.autograd.grad(loss, parameters)
    surrogate = 0.0
    for b, (prompt, reply) in enumerate(each_reply(rollout)):
        old, values = rollout.logprobs[b, :len(reply)], rollout.values[b, :len(reply)].tolist()
        rewards = (-cfg.kl_coef * (old - rollout.ref_logprobs[b, :len(reply)])).tolist()
        rewards[-1] += score[b].item()
        advantages = torch.tensor(gae_by_definition(rewards, values, 0.9, 0.7, 0.0), dtype=REAL)
        surrogate = surrogate + old.sum().exp() * ((alone(actor.lm, prompt, reply, 0.8) - old).exp() * advantages).sum()
    expected = torch.autograd.grad(-surrogate, parameters)
    assert max(map(far, got, expected)) < EXACT[kind] < 1e-2 < max(g.abs().max().item() for g in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_with_learning_rate_0_nothing_moves(kind):
    """In every epoch and minibatch the ratio of every token is 1, the KL and the clipped share are 0, and the loss is -mean(A)."""
    cfg = settings_of()
    actor, _, rollout = experience(kind, cfg=cfg)
    before, gaps, policy_loss = weights_of(actor), [], P.policy_loss

    def watched(new, old, advantages, mask, *more):
        gaps.append(far(new[mask].detach(), old[mask]))
        return policy_loss(new, old, advantages, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "policy_loss", watched)
        metrics = ppo_steps(actor, rollout, cfg)
    assert len(gaps) == 4 and max(gaps) < EXACT[kind]
    assert abs(metrics["policy/ratio"] - 1) < EXACT[kind] and abs(metrics["policy/approxkl"]) < EXACT[kind] and metrics["policy/clipfrac"] == 0
    assert metrics["val/clipfrac"] == 0 and metrics["policy/steps"] == 4 and metrics["policy/grad_norm"] > 0
    assert metrics["loss/policy"] == pytest.approx(-float(rollout.advantages[rollout.mask].mean()), abs=1e-9)
    error = (rollout.values - rollout.returns)[rollout.mask]
    assert metrics["loss/value"] == pytest.approx(float((error**2).mean() / 2), abs=1e-9)
    assert torch.equal(weights_of(actor), before)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_any_partition_into_micro_batches_is_the_same_update(aggregation, micro):
    """Weights after two epochs of steps, and all metrics, equal those of whole minibatches; and there are never more replies in memory."""
    outcomes, sizes, ppo_loss = [], [], P.ppo_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(P, "ppo_loss", lambda actor, batch, *more: (sizes.append(len(batch.mask)), ppo_loss(actor, batch, *more))[1])
        for size in (None, micro):
            cfg = settings_of(micro_batch_size=size, loss_aggregation=aggregation, ent_coef=0.1, kl_in="loss", max_grad_norm=None)
            actor, _, rollout = experience(cfg=cfg)
            metrics = ppo_steps(actor, rollout, cfg, lr=0.05)
            outcomes.append((weights_of(actor), metrics))
    assert max(sizes[:4]) == 4 and len(sizes) > 8 and max(sizes[4:]) == micro
    assert far(outcomes[0][0], outcomes[1][0]) < 1e-10
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], abs=1e-9)


def test_aggregation_over_tokens_or_sequences():
    """The gradient of one step is that of the mean over tokens, or of the mean over replies of the mean over their tokens."""
    for aggregation in ("token", "sequence"):
        cfg = settings_of(loss_aggregation=aggregation, num_mini_batches=1, num_ppo_epochs=1, vf_coef=0.0, max_grad_norm=None)
        actor, _, rollout = experience(cfg=cfg)
        expected, n = 0.0, int(rollout.mask.sum())
        for b, (prompt, reply) in enumerate(each_reply(rollout)):
            per_token = (alone(actor.lm, prompt, reply, cfg.temperature) - rollout.logprobs[b, :len(reply)]).exp() * rollout.advantages[b, :len(reply)]
            expected = expected - (per_token.sum() / n if aggregation == "token" else per_token.mean() / 8)
        parameters = list(actor.lm.parameters())
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
        before = torch.cat([p.detach().flatten() for p in parameters])
        ppo_steps(actor, rollout, cfg, lr=1.0)
        assert far(before - torch.cat([p.detach().flatten() for p in parameters]), expected) < 1e-9


def test_order_of_replies_does_not_matter():
    cfg = settings_of(num_mini_batches=1, ent_coef=0.1)
    outcomes = []
    for order in (torch.arange(8), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])):
        actor, _, rollout = experience(cfg=cfg)
        shuffled = Rollout(**{name: x[order] for name, x in vars(rollout).items() if x is not None})
        metrics = ppo_steps(actor, shuffled, cfg, lr=0.05)
        outcomes.append((weights_of(actor), metrics))
    assert far(outcomes[0][0], outcomes[1][0]) < 1e-10 and outcomes[0][1] == pytest.approx(outcomes[1][1], abs=1e-9)


def test_target_kl_stops_before_the_step_and_leaves_no_gradient_behind():
    """A minibatch whose KL is above the target takes no step. The next update starts from clean gradients: it equals one
    from an actor with the same weights and none."""
    cfg = settings_of(target_kl=1e-6, num_ppo_epochs=3)
    actor, _, rollout = experience(cfg=cfg)
    optimizer, taken = torch.optim.SGD(actor.parameters(), lr=0.5), []
    optimizer.register_step_post_hook(lambda *_: taken.append(weights_of(actor)))
    torch.manual_seed(0)
    metrics = P.ppo_update(actor, optimizer, rollout, cfg.kl_coef, cfg)
    assert 1 <= len(taken) == metrics["policy/steps"] < 6 and torch.equal(weights_of(actor), taken[-1])
    fresh, _, _ = experience(cfg=cfg)
    fresh.load_state_dict(actor.state_dict())
    free = dataclasses.replace(cfg, target_kl=None)
    for a in (actor, fresh):
        P.evaluate(a, a, rollout, cfg.temperature, 8)
        ppo_steps(a, rollout, free, lr=0.1)
    assert far(weights_of(actor), weights_of(fresh)) == 0
    assert ppo_steps(actor, rollout, dataclasses.replace(cfg, target_kl=1e6), lr=0.0)["policy/steps"] == 6


def test_target_kl_is_in_nats_a_token():
    """Of two whole passes the first has KL 0 and the second twice the mean: a target 1% above that lets both step, 1% below only one."""
    cfg = settings_of(num_ppo_epochs=2, num_mini_batches=1)
    actor, _, rollout = experience(cfg=cfg)
    kl = 2 * ppo_steps(actor, rollout, cfg, lr=0.1)["policy/approxkl"]
    for target, steps in ((1.01 * kl, 2), (0.99 * kl, 1)):
        actor, _, rollout = experience(cfg=cfg)
        assert ppo_steps(actor, rollout, dataclasses.replace(cfg, target_kl=target), lr=0.1)["policy/steps"] == steps


@pytest.mark.parametrize("critic", CRITICS)
def test_critic_warmup_trains_the_critic_alone(critic):
    """Its head, and its trunk if that is its own; its loss falls and the policy stays as it is."""
    cfg = settings_of(num_ppo_epochs=20, vf_coef=1.0, cliprange_value=None, max_grad_norm=None)
    actor, _, rollout = experience(cfg=cfg, critic=critic)
    before = {name: p.detach().clone() for name, p in actor.named_parameters()}
    metrics = ppo_steps(actor, rollout, cfg, lr=0.02, critic_only=True)
    moved = {name.split(".")[0] for name, p in actor.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"value_head"} | ({"critic_trunk"} if critic[0] == "separate" else set())
    assert ppo_steps(actor, rollout, cfg, critic_only=True)["loss/value"] < metrics["loss/value"] and "loss/policy" not in metrics


@pytest.mark.parametrize("critic", CRITICS)
def test_the_critic_learns_and_never_moves_the_policy_unless_shared(critic):
    """The value loss has no gradient in a policy with a separate critic, and falls when it is followed."""
    cfg = settings_of(vf_coef=1.0, cliprange_value=None, max_grad_norm=None, num_ppo_epochs=10)
    actor, _, rollout = experience(cfg=cfg, critic=critic)
    rollout.advantages = torch.zeros_like(rollout.advantages)
    before = torch.cat([p.detach().flatten().clone() for p in actor.lm.parameters()])
    first = ppo_steps(actor, rollout, cfg, lr=0.0)["loss/value"]
    ppo_steps(actor, rollout, cfg, lr=0.02)
    assert ppo_steps(actor, rollout, cfg, lr=0.0)["loss/value"] < 0.9 * first
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in actor.lm.parameters()])) == (critic[0] == "separate")


def test_each_term_of_the_loss_has_its_coefficient():
    """PPO eq. 9 with the KL of eq. 8: the loss is linear in vf_coef and ent_coef, and β·KL enters with kl_in = loss alone."""
    actor, _, rollout = experience()
    batch = rollout.rows(torch.arange(8))
    batch.weights = batch.mask.to(REAL) / batch.mask.sum()
    whole, stats = P.ppo_loss(actor, batch, 0.3, settings_of())
    assert whole.requires_grad and not any(x.requires_grad for x in stats.values())  # metrics would keep the graph alive
    with torch.no_grad():
        loss = lambda **changes: P.ppo_loss(actor, batch, 0.3, settings_of(**dict(vf_coef=0.0, ent_coef=0.0) | changes))
        plain, stats = loss()
        assert far(loss(vf_coef=0.5)[0] - plain, 0.5 * stats["loss/value"]) < 1e-12
        for ent_coef in (0.5, 1):
            assert far(loss(ent_coef=ent_coef)[0] - plain, -ent_coef * batch.entropy[batch.mask].mean()) < 1e-10
        kl = (batch.logprobs - batch.ref_logprobs)[batch.mask]
        assert far(loss(kl_in="loss")[0] - plain, 0.3 * kl.mean()) < 1e-10
        assert far(loss(kl_in="loss", kl_estimator="k2")[0] - plain, 0.3 * (kl**2 / 2).mean()) < 1e-10
        batch.logprobs = batch.logprobs - 0.5  # ratio e^½: every clip binds on one sign of the advantage
        for changes, arguments in ((dict(cliprange=0.1), (0.1, None, None)), (dict(cliprange_high=0.4), (0.2, 0.4, None)),
                                   (dict(dual_clip=1.2), (0.2, None, 1.2))):
            expected = P.policy_loss(batch.logprobs + 0.5, batch.logprobs, batch.advantages, batch.mask, *arguments)[0]
            assert far(loss(**changes)[0], expected) < 1e-9
        batch.predictions = batch.predictions + 0.4
        for clip in (0.1, None):
            expected = P.value_loss(batch.predictions - 0.4, batch.predictions, batch.returns, batch.mask, clip)[0]
            assert far(loss(cliprange_value=clip)[1]["loss/value"], expected) < 1e-9


@pytest.mark.parametrize("critic", CRITICS)
def test_gradient_of_the_whole_loss_by_finite_differences(critic):
    """Off policy, with every term on (surrogate, value, entropy, KL): the derivative in random directions of all weights, to 1e-5."""
    cfg = settings_of(ent_coef=0.3, kl_in="loss", kl_estimator="k3", vf_coef=0.7, cliprange=0.9, cliprange_value=None)
    actor, _, rollout = experience(cfg=cfg, critic=critic)
    rollout.weights = rollout.mask.to(REAL) / rollout.mask.sum()
    batch, parameters = rollout.rows(torch.arange(8)), list(actor.parameters())
    loss = lambda: P.ppo_loss(actor, batch, 0.4, cfg)[0]
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parameters:
            p += 0.01 * torch.randn(p.shape, dtype=REAL, generator=noise)
    gradients = torch.autograd.grad(loss(), parameters)
    for _ in range(3):
        directions, values, h = [torch.randn(p.shape, dtype=REAL, generator=noise) for p in parameters], [], 1e-5
        for step in (h, -2 * h, h):  # to +h, to -h, and back
            with torch.no_grad():
                for p, d in zip(parameters, directions):
                    p += step * d
                values.append(loss().item())
        slope = sum((g * d).sum().item() for g, d in zip(gradients, directions))
        assert abs((values[0] - values[1]) / (2 * h) - slope) < 1e-5 * max(1, abs(slope)) and abs(slope) > 1e-3


def test_gradient_clipping():
    for limit in (None, 1e-3):
        cfg = settings_of(max_grad_norm=limit, num_ppo_epochs=1, num_mini_batches=1)
        actor, _, rollout = experience(cfg=cfg)
        before = weights_of(actor)
        norm = ppo_steps(actor, rollout, cfg, lr=1.0)["policy/grad_norm"]
        assert norm > 0.1 and far((before - weights_of(actor)).norm(), limit or norm) < 1e-6
        thrice = experience(cfg=cfg)
        assert ppo_steps(thrice[0], thrice[2], dataclasses.replace(cfg, num_ppo_epochs=3))["policy/grad_norm"] == pytest.approx(norm)  # the mean


def test_policy_and_critic_are_clipped_apart():
    """Returns a thousand times as large leave the step of a policy with a separate critic as it is; each group's step has the norm allowed."""
    cfg, steps = settings_of(max_grad_norm=1e-3, num_ppo_epochs=1, num_mini_batches=1, cliprange_value=None), []
    for scale in (1, 1000):
        actor, _, rollout = experience(cfg=cfg, critic=("separate", "value"))
        rollout.returns *= scale
        policy = list(actor.lm.parameters())
        critic = [p for p in actor.parameters() if not any(p is q for q in policy)]
        groups = [[p.detach().clone() for p in group] for group in (policy, critic)]
        P.ppo_update(actor, torch.optim.SGD([{"params": policy}, {"params": critic}], lr=1.0), rollout, 0.1, cfg)
        steps.append([torch.cat([(p - q).detach().flatten() for p, q in zip(*x)]) for x in zip((policy, critic), groups)])
        assert all(far(step.norm(), 1e-3) < 1e-8 for step in steps[-1])
    assert far(steps[0][0], steps[1][0]) < 1e-12


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e300])
@pytest.mark.parametrize("micro", [None, 3])
def test_garbage_in_the_padding_changes_no_step_and_no_metric(garbage, micro):
    """In every number of the rollout that is no token's, and other tokens in the padding of prompts and replies: all terms of the loss on,
    the weights after two epochs and every metric are the same."""
    cfg, outcomes = settings_of(kl_in="loss", kl_estimator="k2", ent_coef=0.1, micro_batch_size=micro), []
    for dirty in (False, True):
        actor, _, rollout = experience(cfg=cfg)
        if dirty:
            for name in ("logprobs", "ref_logprobs", "sampler_logprobs", "values", "predictions", "entropy", "advantages", "returns"):
                setattr(rollout, name, getattr(rollout, name).masked_fill(~rollout.mask, garbage))
            rollout.queries = rollout.queries.masked_fill(~rollout.query_mask, 6)
            rollout.responses = rollout.responses.masked_fill(~rollout.mask, 5)
        before = P.rollout_metrics(rollout, torch.arange(8.0), {}, 0.5)
        outcomes.append((before | ppo_steps(actor, rollout, cfg, lr=0.05), weights_of(actor)))
    assert (~rollout.mask).any() and (~rollout.query_mask).any()
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], abs=1e-12) and far(outcomes[0][1], outcomes[1][1]) < 1e-12


def test_an_empty_reply_counts_for_nothing():
    """`generate` makes none, a rollout of one's own may hold one: no NaN, and by tokens the same step as without it."""
    for aggregation in ("token", "sequence"):
        cfg = settings_of(loss_aggregation=aggregation, num_mini_batches=1, num_ppo_epochs=1)
        actor, _, rollout = experience(cfg=cfg)
        rollout.mask = rollout.mask & (torch.arange(8) != 2).unsqueeze(1)
        metrics = ppo_steps(actor, rollout, cfg, lr=0.05)
        assert metrics["policy/steps"] == 1 and all(map(math.isfinite, metrics.values()))
        other = experience(cfg=cfg)[0]
        ppo_steps(other, rollout.rows(torch.tensor([0, 1, 3, 4, 5, 6, 7])), cfg, lr=0.05)
        assert (far(weights_of(actor), weights_of(other)) < 1e-12) == (aggregation == "token")


# --------------------------------------------------------------------------------------------------- the museum of bugs
# Mistakes that others shipped, most of them for years and under green tests, with the project or its issue in brackets, and slips of the
# same kind, without. Each stands here as its smallest form, a wrong function that takes the place of the right one or a function with a
# line changed, and beside it in MUSEUM are properties from above that must then fail.


def phantom_step(scores, kl, mask, kl_coef):
    """The score one past EOS (TRL's PPOTrainer, torchtune): where GAE runs through padding the last token of a finished reply gets λR, and
    here, where it does not, nothing; that of a cut-off reply gets R."""
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    after = (mask * torch.arange(1, mask.shape[1] + 1)).amax(1)
    rewards[torch.arange(len(mask)), after.clamp(max=mask.shape[1] - 1)] += scores
    return rewards


def score_on_every_token(scores, kl, mask, kl_coef):
    """The score of the reply given to each of its tokens: long replies are paid by the token."""
    return torch.where(mask, scores.unsqueeze(1) - kl_coef * kl, 0.0)


def whitening_upside_down(x, mask, shift_mean=True):
    """The mean re-added in the case where it should not be (torchtune): advantages are never centred."""
    mean = P.masked_mean(x, mask)
    centered = torch.where(mask, x - mean, 0.0)
    whitened = centered * torch.rsqrt(P.masked_mean(centered**2, mask) + 1e-8)
    return torch.where(mask, whitened + mean, 0.0) if shift_mean else whitened


def whitening_of_padding(x, mask, shift_mean=True):
    """Moments over padding too: the result depends on how far the batch is padded."""
    x = torch.where(mask, x, 0.0)
    whitened = (x - x.mean()) * torch.rsqrt(x.var(correction=0) + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + x.mean(), 0.0)


def whitening_without_a_floor(x, mask, shift_mean=True):
    """Nothing below the root: 0, 1 or equal elements give NaN, and the next step destroys the weights."""
    mean = P.masked_mean(x, mask)
    whitened = torch.where(mask, x - mean, 0.0) / P.masked_mean(torch.where(mask, x - mean, 0.0) ** 2, mask).sqrt()
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def mask_from_pad(responses, stop_ids):
    """`token != pad` where pad equals EOS (trl#5303): EOS is never trained on."""
    mask = right["response_mask"](responses, stop_ids)
    return mask & (responses != stop_ids[0]) if stop_ids else mask


def mask_without_eos(responses, stop_ids):
    """Tokens strictly before EOS: the policy is never paid for ending."""
    stop = torch.isin(responses, torch.tensor(stop_ids, dtype=responses.dtype))
    return stop.cumsum(1) == 0


def no_temperature(logits, tokens, temperature=1.0):
    """Sampled at one temperature, scored at another (trlX; OpenRLHF#853): no ratio is ever 1."""
    return logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def kl_without_sign(logprobs, ref_logprobs, kind="k1"):
    """abs() against "negative KL" (trl#256, verl#179): what draws the policy back to the reference becomes a penalty too."""
    return (logprobs - ref_logprobs).abs() if kind == "k1" else right["kl_estimate"](logprobs, ref_logprobs, kind)


def k3_the_wrong_way_round(logprobs, ref_logprobs, kind="k1"):
    """e^d - 1 - d with d = log π - log π_ref: for samples of the reference that is KL(ref ‖ π), for the policy's it is neither KL."""
    d = logprobs - ref_logprobs
    return torch.expm1(d) - d if kind == "k3" else right["kl_estimate"](logprobs, ref_logprobs, kind)


def mean_of_micro_batches(new_logprobs, logprobs, advantages, mask, cliprange=0.2, cliprange_high=None, dual_clip=None, weights=None):
    """Each micro-batch by its own mean (verl#7110, verl#5625, minRLHF): the gradient depends on how the step was cut."""
    return right["policy_loss"](new_logprobs, logprobs, advantages, mask, cliprange, cliprange_high, dual_clip)


def metrics_of_padding(new_logprobs, logprobs, advantages, mask, cliprange=0.2, cliprange_high=None, dual_clip=None, weights=None):
    """approx-KL over padding too (trl#6809), where it is 0: the longer the padding, the better the run looks."""
    loss, stats = right["policy_loss"](new_logprobs, logprobs, advantages, mask, cliprange, cliprange_high, dual_clip, weights)
    return loss, stats | {"policy/approxkl": stats["policy/approxkl"] * mask.sum() / mask.numel()}


def no_positions(self, ids, attention, cache=None, base=None):
    """Left padding without position_ids (OpenRLHF#217): GPT-2 counts the padding, and every logit moves."""
    return (base or self.lm.base_model)(input_ids=ids, attention_mask=attention.long(), past_key_values=cache,
                                        use_cache=cache is not None).last_hidden_state


def critic_sees_the_action(self, critic_states, states, temperature):
    """V of the state after the token as the baseline of that token (minRLHF): the gradient is biased, whatever the critic."""
    values = right["Actor.values"](self, critic_states, states, temperature)
    return torch.cat([values[:, 1:], values[:, -1:]], 1)


def dropout(self, batch, base=None, after=False):
    """Training mode in the update: the ratio is not 1 before the first step, and is never the same twice."""
    (base or self.lm).train()
    return right["Actor.states"](self, batch, base, after)


def attention_from_pad(self, batch, base=None, after=False):
    """Attention wherever `token != pad` (trl#5303): prompts and replies that hold the pad token are not seen whole."""
    ids = torch.cat([batch.queries, batch.responses if after else batch.responses[:, :-1]], 1)
    return self.trunk(ids, ids != 0, base=base)[:, batch.queries.shape[1] - 1:]


def edited(name, *changes):
    """The function of the module with lines of it changed: old, new, old, new, ..."""
    source = next(part for part in Path(P.__file__).read_text().split("\n\n\n") if f"\ndef {name}(" in f"\n{part}")
    for old, new in zip(changes[::2], changes[1::2]):
        assert source.count(old) == 1, f"{name} has changed: {old!r}"
        source = source.replace(old, new)
    space = dict(vars(P))
    exec("from __future__ import annotations\n" + source, space)
    return space[name]


right = {"response_mask": P.response_mask, "policy_loss": P.policy_loss, "kl_estimate": P.kl_estimate, "Actor.values": P.Actor.values, "Actor.states": P.Actor.states}
MUSEUM = {  # what takes the place of what, and the properties that must fail
    phantom_step: ("token_rewards", test_token_rewards_sum_to_score_less_kl, (test_expected_ppo_gradient_is_the_policy_gradient, "gpt2", 1.0, CRITICS[0], 0)),
    score_on_every_token: ("token_rewards", test_token_rewards_sum_to_score_less_kl),
    whitening_upside_down: ("masked_whiten", test_whitening_is_standard_and_affine_invariant),
    whitening_of_padding: ("masked_whiten", test_whitening_is_standard_and_affine_invariant),
    whitening_without_a_floor: ("masked_whiten", test_whitening_is_standard_and_affine_invariant),
    mask_from_pad: ("response_mask", test_response_mask_is_a_naive_loop, test_replies_stop_where_the_first_stop_token_is),
    mask_without_eos: ("response_mask", test_response_mask_is_a_naive_loop, test_replies_stop_where_the_first_stop_token_is),
    no_temperature: ("logprobs_from_logits", test_logprobs_and_entropy_from_logits, (test_every_logprob_is_the_models_own, "gpt2", 0.5)),
    kl_without_sign: ("kl_estimate", test_kl_estimators_are_unbiased_by_enumeration),
    k3_the_wrong_way_round: ("kl_estimate", test_kl_estimators_are_unbiased_by_enumeration, test_kl_gradients_as_the_docstring_says),
    mean_of_micro_batches: ("policy_loss", (test_any_partition_into_micro_batches_is_the_same_update, "token", 1)),
    metrics_of_padding: ("policy_loss", test_policy_loss_by_brute_force),
    no_positions: ("Actor.trunk", (test_every_logprob_is_the_models_own, "gpt2", 1.0)),
    critic_sees_the_action: ("Actor.values", (test_expected_ppo_gradient_is_the_policy_gradient, "gpt2", 1.0, ("shared", "value"), 0)),
    dropout: ("Actor.states", (test_with_learning_rate_0_nothing_moves, "gpt2")),
    attention_from_pad: ("Actor.states", (test_every_logprob_is_the_models_own, "gpt2", 1.0)),
    # Whole functions, with a line or two changed.
    "what the critic says of padding bootstrapped into the last token (ROLL#447)": (
        ("gae", "next_value = torch.where(mask[:, t], values[:, t], next_value)", "next_value = values[:, t].nan_to_num()"), test_gae_is_its_definition),
    "reference less policy as the KL: the penalty pays for leaving": (
        ("kl_estimate", "d = logprobs - ref_logprobs", "d = ref_logprobs - logprobs"), test_kl_estimators_are_unbiased_by_enumeration),
    "the larger of the two objectives: the clip frees just what it should hold": (
        ("policy_loss", "torch.minimum", "torch.maximum"), test_policy_loss_by_brute_force, test_policy_loss_worked_by_hand),
    "the smaller of the two squares: below ½ MSE, no gradient for what is far off": (
        ("value_loss", "torch.maximum", "torch.minimum"), test_value_loss_by_brute_force, test_value_loss_worked_by_hand),
    "replies as text, encoded again: two spellings of a text are two token sequences (trlX#108)": (
        ("evaluate", "batch = rollout.rows(rows, actor.device)",
         "batch = rollout.rows(rows, actor.device); batch.responses = batch.responses.where(batch.responses != 5, 4)"),
        (test_with_learning_rate_0_nothing_moves, "gpt2")),
    "log π_old in another type than the update computes in": (
        ("evaluate", "states = actor.states(batch, after=True)", "states = actor.states(batch, after=True).float().double()"),
        (test_with_learning_rate_0_nothing_moves, "gpt2")),
    "a made-up value for padding in the mean entropy (trl#2022)": (
        ("rollout_metrics", "masked_mean(rollout.entropy, mask)", "rollout.entropy.masked_fill(~mask, 1.0).mean()"),
        test_metrics_are_means_over_the_valid_tokens),
    "early stop after the backward pass, its gradients left for the next step (minRLHF)": (
        ("ppo_update", "        optimizer.zero_grad()  #", "        #", "        optimizer.step()\n", "        optimizer.step(); optimizer.zero_grad()\n"),
        test_target_kl_stops_before_the_step_and_leaves_no_gradient_behind),
    "only the last minibatch in the metrics": (
        ("ppo_update", "totals[name] += float(x)", "totals[name] = float(x) / float(mask.sum()) * tokens"),
        (test_with_learning_rate_0_nothing_moves, "gpt2")),
    "one norm for policy and critic: large returns shrink the policy's step": (
        ("ppo_update", 'group["params"]', "list(actor.parameters())"), test_policy_and_critic_are_clipped_apart),
    "max_grad_norm never read (TRL)": (("ppo_update", "cfg.max_grad_norm or math.inf", "math.inf"), test_gradient_clipping),
    "whiten_rewards never read (torchtune)": (("credit", "if cfg.whiten_rewards:", "if False:"), test_credit_is_its_parts_in_order),
    "mini-batches that add no step (trl#5645)": (("ppo_update", ".chunk(cfg.num_mini_batches)", ".chunk(1)"), (test_with_learning_rate_0_nothing_moves, "gpt2")),
    "a penalty for a reply whose EOS is exactly the last token (torchtune)": (
        ("generate", "ended = (torch.isin(written, stop.cpu()) & mask).any(1)", "ended = mask.sum(1) < response_length"),
        test_replies_stop_where_the_first_stop_token_is),
    "a stop token of one's own that does not count as an end (trl#3750)": (
        ("generate", "torch.isin(written, stop.cpu())", "torch.isin(written, stop[:1].cpu())"), test_replies_stop_where_the_first_stop_token_is),
    "returns from whitened advantages": (
        ("credit", "rollout.advantages = masked_whiten(rollout.advantages, mask)",
         "rollout.advantages = masked_whiten(rollout.advantages, mask); rollout.returns = rollout.advantages + rollout.values"),
        test_credit_is_its_parts_in_order),
    "an entropy bonus with the wrong sign": (("ppo_loss", "- cfg.ent_coef", "+ cfg.ent_coef"), test_each_term_of_the_loss_has_its_coefficient),
}


@pytest.mark.parametrize("bug", MUSEUM, ids=lambda bug: getattr(bug, "__name__", bug))
def test_the_properties_reject_what_others_shipped(bug, monkeypatch):
    place, *properties = MUSEUM[bug]
    owner, name, wrong = (P, place[0], edited(*place)) if isinstance(place, tuple) else (P, place, bug)
    if name.startswith("Actor."):
        owner, name = P.Actor, name.removeprefix("Actor.")
    for proof in properties:
        proof, *arguments = proof if isinstance(proof, tuple) else (proof,)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            patch.setattr(P.Actor, "check", lambda self, model: None)  # which would refuse some of them before any test
            if hasattr(proof, "hypothesis"):  # one failing example will do, it need not be the smallest
                quick = settings(proof._hypothesis_internal_use_settings, phases=[Phase.generate], report_multiple_bugs=False,
                                 derandomize=True, database=None)
                patch.setattr(proof, "_hypothesis_internal_use_settings", quick)
            with pytest.raises(AssertionError):
                proof(*arguments)


def test_errors_neither_cancel_nor_hide():
    """Vacuous tests shipped too: rtol = 1e6, signed errors that sum to 0. The measure used here sees ±1, and NaN."""
    assert far([1.0, -1.0], [0.0, 0.0]) == 1 and far([math.nan], [0.0]) == math.inf and far([math.inf], [math.inf]) == math.inf


# Faults that `mutants.py` can plant and no test can see, since nothing follows from them, by its names:
#   [op] in a signature, `Tensor | None`: annotations are never evaluated here (`from __future__ import annotations`).
#   masked_mean, policy_loss, value_loss [const], `torch.where(mask, ..., 0.0)`: any finite number does in cells that are left out of the sum,
#   or multiplied by 0.
#   Actor.check [ops0], `< 0.02 * own.std()`: another answer at equality only. ppo_update [ops0], the target of the KL: likewise.
#   Actor.logprobs [const], `use_reentrant`: chunks are recomputed by the older way, to the same numbers.
#   generate [op], `uniform * total`: the total is 1 but for rounding.


# ----------------------------------------------------------------------------------------------- 6. prompts and rewards


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=4))
def test_left_pad_keeps_every_token_and_says_where(rows):
    """Token 0, which also pads, is content where a row has it: the mask comes from lengths."""
    ids, mask = P.left_pad(rows)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, x, m in zip(rows, ids.tolist(), mask.tolist()):
        assert m == [False] * (len(m) - len(row)) + [True] * len(row) and x[len(x) - len(row):] == row


@pytest.mark.parametrize("special, eos", [({}, None), (dict(pad_token="a", eos_token="a"), 1), (dict(pad_token="z"), [3, 4]),
                                          (dict(bos_token="<", eos_token=">", pad_token="?"), [42, 5])])
def test_tokenizers_with_and_without_pad_eos_and_bos(special, eos, tmp_path):
    """No pad token, pad equal to EOS, several end-of-turn tokens in the generation config: a reply ends at each of them and nowhere
    else, the token that ends it is trained on, and the run goes through."""
    lm, tokenizer = letters_model(), letters_tokenizer(**special)
    lm.generation_config.eos_token_id = eos
    cfg = Config(num_updates=1, batch_size=64, response_length=12, name="x", runs_dir=str(tmp_path))
    task = P.prepare(cfg, ["ab", "c d"], mean_length, lm, tokenizer, None)
    assert set(task.stop_ids) == {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    torch.manual_seed(0)
    rollout, *_ = P.collect(task, task.prompts * 64, cfg, dict.fromkeys(("generate", "reward", "evaluate"), 0.0))
    for (_, reply), ended in zip(each_reply(rollout), rollout.ended.tolist()):
        assert [token in task.stop_ids for token in reply] == [False] * (len(reply) - 1) + [ended] and (ended or len(reply) == 12)
    assert rollout.ended.any() == bool(task.stop_ids) and (rollout.logprobs[rollout.mask] < 0).all()
    P.train(cfg, prompts=["ab", "c d"], reward=mean_length, model=lm, tokenizer=tokenizer)


def test_chat_prompts_and_columns_reach_rewards_as_in_trls_grpo(tmp_path):
    """Messages go through the chat template, without a second bos. The reward gets the messages, the reply as a message, the ids, and
    each column, None where a row lacks it."""
    seen = []

    def reward(prompts, completions, completion_ids, answer, level, **kwargs):
        seen.append((prompts, completions, completion_ids, answer, level))
        return [None if a is None else float(a) for a in answer]

    ask, go_on = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}]
    tokenizer = letters_tokenizer(bos_token="<", chat_template=CHAT)
    rows = [{"prompt": ask, "answer": 3, "level": "x"}, {"prompt": go_on, "answer": None}, {"prompt": "plain", "answer": 1, "level": "y"}]
    prompts = P.encode(tokenizer, rows)
    assert [tokenizer.decode(p.ids).replace(" ", "") for p in prompts] == ["<user>hi<assistant>", "<user>hi<assistant>ab", "plain"]
    run = P.train(Config(num_updates=1, batch_size=6, num_mini_batches=1, response_length=4, name="x", runs_dir=str(tmp_path),
                         samples_per_prompt=2), prompts=rows, reward=reward, model=letters_model(), tokenizer=tokenizer)
    prompts, completions, ids, answers, levels = seen[-1]
    assert prompts[::2] == prompts[1::2] and sorted(map(str, prompts[::2])) == sorted(str(row["prompt"]) for row in rows)
    for prompt, completion, reply_ids, answer, level in zip(*seen[-1]):
        row = next(row for row in rows if row["prompt"] == prompt)
        assert (answer, level) == (row["answer"], row.get("level")) and 1 <= len(reply_ids) <= 4
        text = completion if isinstance(prompt, str) else completion[0].pop("content")
        assert isinstance(text, str) and (isinstance(prompt, str) or completion == [{"role": "assistant"}])
    assert lines(run / "metrics.jsonl")[1]["rewards/reward"] == 2 and lines(run / "metrics.jsonl")[1]["objective/scores"] == pytest.approx(4 / 3)


def test_prompt_and_reply_are_the_whole_text():
    """A decoder of Llama 2's kind drops the space before the first word of what it is given, and a reward model would read "wasgood".
    What a reply adds to half a character cannot be told, and a chat's reply is a message of its own: both are decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["?", "<s>", "▁it", "▁was", "▁good", "ly", "<0xC3>", "<0xA9>"])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    chat = [{"role": "user", "content": "it was"}]
    for prompt, ids, reply, text in (("it was", [1, 2, 3], [4, 5], " goodly"), ("it was", [1, 2, 3], [5], "ly"), ("it was", [2, 3], [1], ""),
                                     (chat, [1, 2, 3], [4, 5, 1], "goodly"), ("it\xc3", [2, 6], [7, 4], "\ufffd good")):
        assert P.reply_text(tokenizer, P.Prompt({"prompt": prompt}, ids), reply) == text


def test_a_chat_in_parts_runs_to_its_end(tmp_path, capsys):
    """Content as a list of parts, as the templates of models that also see have it."""
    chats = [{"prompt": [{"role": "user", "content": [{"type": "text", "text": letter}]}]} for letter in "abcdefghij"]
    P.train(Config(num_updates=1, batch_size=4, response_length=4, name="x", runs_dir=str(tmp_path)), prompts=chats, reward=lambda completions, **_: [
        float(len(chat[0]["content"])) for chat in completions], model=letters_model(), tokenizer=letters_tokenizer(chat_template=CHAT))
    assert "[{'type': 'text', 'text': '" in capsys.readouterr().out


def test_long_prompts_are_dropped_and_counted(tmp_path, capsys):
    """--max-prompt-length keeps what is no longer than that, of both sets, and says how many it dropped."""
    cfg = Config(response_length=4, max_prompt_length=3, runs_dir=str(tmp_path))
    task = P.prepare(cfg, ["abc", "abcd", "ab"], mean_length, letters_model(), letters_tokenizer(), ["a", "abcdef"])
    assert [p.row["prompt"] for p in task.prompts] == ["abc", "ab"] and [p.row["prompt"] for p in task.held_out] == ["a"]
    assert "Dropped 2 of 5 prompts, longer than --max-prompt-length 3" in capsys.readouterr().out


@pytest.mark.parametrize("kind, changes", [("GPT2", dict(n_embd=16, n_layer=2, n_head=2, pad_token_id=None)), ("Llama", dict(pad_token_id=1)),
                                           ("Bert", {}), ("Llama", dict(pad_token_id=None))])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_reward_model_scores_each_text_as_if_alone(kind, changes, labels, tmp_path, capsys):
    """Batches of texts of mixed length, with pad equal to a letter of the text, without a pad token, bidirectional: the model's own
    logit of the one text. The label picks one of several. What is too long keeps its first token and its end."""
    rm, tokenizer = letters_model(kind, "ForSequenceClassification", labels, **changes).eval(), letters_tokenizer()
    rm.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    label = None if labels == 1 else "LABEL_2"
    reward = P.load_reward_model(str(tmp_path / "judge"), False, torch.device("cpu"), torch.float32, Config(reward_label=label, batch_size=8))
    prompts, completions = ["ab", "c", "what is ", "a", "abc", "x" * 40], ["a", "aaa", "zb", "", "bca", "y" * 60]
    scores = reward(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores):
        ids = tokenizer(prompt + completion)["input_ids"]
        ids = ids if len(ids) <= 64 else ids[:1] + ids[-63:]
        with torch.no_grad():
            assert far(score, rm(input_ids=torch.tensor([ids])).logits[0, labels - 1]) < 1e-5
    assert len(set(scores)) == 6 and reward(prompts[:2], completions[:2]) == pytest.approx(scores[:2], abs=1e-5)
    assert "1 of 6 texts are longer than its 64 tokens" in capsys.readouterr().err and reward.__name__ == "judge"


def test_a_reward_model_reads_chats_by_its_own_template(tmp_path):
    rm, tokenizer = letters_model(head="ForSequenceClassification").eval(), letters_tokenizer(chat_template=CHAT)
    rm.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    reward = P.load_reward_model(str(tmp_path / "judge"), True, torch.device("cpu"), torch.float32, Config())
    ask, begun, reply = ({"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "oh "), ("assistant", "yes")))
    scores = reward([[ask], [ask, begun]], [[reply], [reply]])
    with torch.no_grad():
        for score, text in zip(scores, ("<user>hi<assistant>yes", "<user>hi<assistant>oh yes")):
            assert far(score, rm(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0]) < 1e-5


def test_functions_and_reward_models_are_weighted_and_logged_each(files, tmp_path, monkeypatch):
    """A function of a module in the working folder, and a reward model, in one score; each has its own metric."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("def count(prompts, completions, **columns):\n    return [len(c.split()) for c in completions]\n")
    assert P.main(shlex.split(f"--model {files}/model --prompts {files}/prompts.txt --reward my_rewards:count --reward-model {files}/judge "
                              "--reward-label LABEL_1 --reward-weights 0.5 -2 --num-updates 1 --batch-size 8 --response-length 5 --name x")) == 0
    row = lines(tmp_path / "runs" / "x" / "metrics.jsonl")[1]
    assert row["rewards/count"] > 0 != row["rewards/judge"]
    assert row["objective/scores"] == pytest.approx(0.5 * row["rewards/count"] - 2 * row["rewards/judge"], abs=1e-5)


@given(st.lists(st.lists(number, min_size=1, max_size=5), min_size=1, max_size=4))
@settings(max_examples=30)
def test_running_moments_are_those_of_all_numbers(batches):
    moments = (0, 0.0, 0.0)
    for batch in batches:
        moments = P.update_moments(moments, torch.tensor(batch, dtype=REAL))
    every = torch.tensor(sum(batches, []), dtype=REAL)
    assert moments[0] == len(every) and far(moments[1], every.mean()) < 1e-9 and far(moments[2], ((every - every.mean()) ** 2).sum()) < 1e-8


# ------------------------------------------------------------------------------------------------- 7. the configuration


BAD = [  # arguments with {f} for the files; exit status; what the one line says
    ("--batch-size 4 --num-mini-batches 8", 2, "--num-mini-batches 8: expected a divisor of --batch-size 4"),
    ("--batch-size 0", 2, "--batch-size 0: expected 1 or more"),
    ("--batch-size x", 2, "--batch-size"),
    ("--lam 1.5", 2, "--lam 1.5: expected a number in [0, 1]"),
    ("--lam nan", 2, "--lam nan: expected a number in [0, 1]"),
    ("--gamma -0.1", 2, "--gamma -0.1"),
    ("--critic-lam 2", 2, "--critic-lam 2.0"),
    ("--cliprange -0.2", 2, "--cliprange -0.2: expected a number between 0 and 1"),
    ("--cliprange-high 0", 2, "--cliprange-high 0.0"),
    ("--cliprange-value -1", 2, "--cliprange-value -1.0"),
    ("--dual-clip 0.5", 2, "--dual-clip 0.5: expected a number above 1"),
    ("--temperature 0", 2, "--temperature 0.0: expected a number above 0"),
    ("--learning-rate inf", 2, "--learning-rate inf"),
    ("--kl-coef -1", 2, "--kl-coef -1.0: expected 0 or more"),
    ("--kl-coef 0 --kl-target 6", 2, "--kl-coef 0.0: expected a number above 0 to start from"),
    ("--kl-estimator k4", 2, "k4"),
    ("--seed -1", 2, "--seed -1"),
    ("--no-such-flag 1", 2, "--no-such-flag"),
    ("--name a/b", 2, "--name a/b"),
    ("--device warp", 2, "--device warp"),
    ("--runs-dir {f}/rewards.py", 2, "rewards.py"),
    ("--prompts nowhere.txt", 2, "--prompts nowhere.txt: expected a file that exists"),
    ("--prompts {f}/prompts.txt", 2, "give --model too"),
    ("--reward-weights 1", 2, "--reward-weights: expected 2 of them, one a reward, got 1"),
    ("--response-length 500", 2, "--response-length 500: the model takes 128 tokens"),
    ("--model {f}/nowhere --prompts {f}/prompts.txt --reward {f}/rewards.py:short", 2, "nowhere"),
    ("--model {f}/model", 2, "give --prompts FILE and --reward FILE.py:FUNCTION"),
    ("--model {f}/model --prompts {f}/bad.jsonl --reward {f}/rewards.py:short", 2, "bad.jsonl, line 2"),
    ("--model {f}/model --prompts {f}/lacks.jsonl --reward {f}/rewards.py:short", 2, "lacks.jsonl, line 2"),
    ("--model {f}/model --prompts {f}/empty.txt --reward {f}/rewards.py:short", 2, "empty.txt holds no prompts"),
    ("--model {f}/model --prompts {f}/latin.txt --reward {f}/rewards.py:short", 2, "latin.txt, line 2"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/rewards.py:missing", 2, "has no function missing"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/broken.py:f", 2, "cannot be imported: ModuleNotFoundError"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/nowhere.py:f", 2, "expected FILE.py:FUNCTION or MODULE:FUNCTION"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/rewards.py:short --response-length 8 --stop-token 't1 t2'", 2, "--stop-token"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward no_such_module:f", 2, "no_such_module cannot be imported: ModuleNotFoundError"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward f", 2, "expected FILE.py:FUNCTION or MODULE:FUNCTION"),
    ("--model {f}/model --prompts {f}/blank.jsonl --reward {f}/rewards.py:short", 2, "blank.jsonl, line 3: expected a \"prompt\""),
    ("--model {f}/model --prompts {f}/list.jsonl --reward {f}/rewards.py:short", 2, "list.jsonl, line 1: expected a \"prompt\""),
    ("--model {f}/model --prompts {f}/roles.jsonl --reward {f}/rewards.py:short", 2, "roles.jsonl, line 1: expected a \"prompt\""),
    ("--model {f}/model --prompts {f}/chat.jsonl --reward {f}/rewards.py:short", 2, "tokenizer has no chat template"),
    ("--model {f}/model --prompts {f}/prompts.txt --eval-prompts {f}/bad.jsonl --reward {f}/rewards.py:short", 2, "bad.jsonl, line 2"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/rewards.py:short --response-length 30", 2, "the model takes 32 tokens in all and prompts have up to 3"),
    ("--model {f}/long --prompts {f}/long.txt --reward {f}/rewards.py:short --response-length 8", 2, "drop long prompts by --max-prompt-length"),
    ("--model {f}/model --prompts {f}/long.txt --reward {f}/rewards.py:short --response-length 8 --max-prompt-length 3", 2, "leaves no prompt to train on"),
    ("--model {f}/judge --prompts {f}/prompts.txt --reward {f}/rewards.py:short", 2, "it holds no lm_head.weight, so it is no CausalLM model"),
    ("--model {f}/custom --prompts {f}/prompts.txt --reward {f}/rewards.py:short", 2, "it comes with code of its own: give --trust-remote-code"),
    ("--model {f}/cut --prompts {f}/prompts.txt --reward {f}/rewards.py:short", 2, "--model {f}/cut"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward-model {f}/model --response-length 8", 2, "it holds no score.weight, so it is no SequenceClassification model"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward-model {f}/nowhere --response-length 8", 2, "--reward-model {f}/nowhere"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward-model {f}/judge --response-length 8", 2, "--reward-label None: expected one of LABEL_0, LABEL_1"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward-model {f}/judge --reward-label x --response-length 8", 2, "--reward-label x"),
    ("--reward-model {f}/judge", 2, "give --model too"),
    ("--critic-model {f}/judge", 2, "--critic shared: expected separate, with --critic-model"),
    ("--critic separate --critic-model {f}/judge", 2, "expected a decoder with a score head of one label"),
    ("--critic separate --critic-model {f}/long", 2, "its vocabulary is not the policy's"),
    ("--kl-in loss", 2, "--kl-estimator k1: expected k2 or k3, with --kl-in loss"),
    ("--kl-horizon 100", 2, "--kl-horizon 100.0: expected at least --batch-size 128"), ("--eval-prompts {f}/prompts.txt", 2, "give --model too"),
    ("--model {f}/model --prompts {f}/rewards.py --reward {f}/rewards.py:short", 2, "rewards.py: expected .txt, a prompt a line, or .jsonl"),
    ("--model {f}/layerless --prompts {f}/prompts.txt --reward {f}/rewards.py:short --response-length 8 --gradient-checkpointing", 2,
     "--gradient-checkpointing: GPTNeoXJapaneseForCausalLM has no layers to recompute"),
    ("--critic own", 2, "own"), ("--critic-lr 0", 2, "--critic-lr 0.0"), ("--score-clip -1", 2, "--score-clip -1.0"),
    ("--samples-per-prompt 3", 2, "--samples-per-prompt 3: expected a divisor of --batch-size 128"),
    ("--save-every 0", 2, "--save-every 0: expected 1 or more"), ("--max-prompt-length 0", 2, "--max-prompt-length 0"),
    ("--resume {f}", 2, "expected the folder of a run"), ("--resume nowhere", 2, "expected the folder of a run"), ("--runs-dir /proc/x", 2, "cannot create /proc/x"),
    ("--model {f}/mamba --prompts {f}/prompts.txt --reward {f}/rewards.py:short --response-length 8", 2, "MambaForCausalLM cannot be trained here"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/rewards.py:text --response-length 8", 1, "reward text gave 'much' for the prompt 't"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/rewards.py:number --response-length 8", 1, "reward number failed at"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/rewards.py:short --response-length 8", 1, "reward short: expected 128 numbers, one a completion, got 1"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/rewards.py:answers --response-length 8", 1, "reward answers failed at rewards.py:2: KeyError: 'answer'"),
    ("--model {f}/model --prompts {f}/prompts.txt --reward {f}/rewards.py:nan --response-length 8", 1, "reward nan gave nan for the prompt 't"),
]


@pytest.mark.parametrize("arguments, status, message", BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_refused_in_one_line(arguments, status, message, files, tmp_path, capsys, monkeypatch):
    """Exit status 2 before anything is written, 1 once the run has begun; one line that says what, and no traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(P, "demo_task", lambda seed: quick_demo(seed, 1))
    assert P.main(shlex.split(arguments.format(f=files))) == status
    err = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in err if "%|" not in line]) == 1 and err[-1].startswith("ppo_llm.py: ") and message.format(f=files) in err[-1]
    assert status == 1 or not (tmp_path / "runs").exists()


def test_every_flag_is_read_and_explained():
    """No flag without effect: the code reads each as cfg.NAME, outside of validation. `--help` names each with the sentence that stands beside
    it in the source, which says what None means."""
    import ast

    source = (HERE / "ppo_llm.py").read_text()
    read = {node.attr for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cfg"}
    done = run_cli("--help", cwd=HERE, columns=200)
    assert done.returncode == 0
    words = " ".join(done.stdout.replace("│", " ").split())
    for f in dataclasses.fields(Config):
        explained = re.search(rf"^    {f.name}: .*?  # (.*)$", source, re.M).group(1)
        assert f.name in read and re.search(rf"--{f.name.replace('_', '-')}(?![\w-])", words) and explained in words, f.name
        assert "None" not in f.type or "None" in explained, f.name
    assert all(len(line) <= 80 for line in run_cli("--help", cwd=HERE).stdout.splitlines())


# ---------------------------------------------------------------------------------------------------------- 8. training


def test_learning_rate_schedule():
    rates = lambda **changes: [P.schedule(u, Config(num_updates=4, **changes)) for u in range(4)]
    assert rates() == [1, 1, 1, 1] and rates(lr_scheduler_type="linear") == [1, 0.75, 0.5, 0.25]
    assert rates(lr_scheduler_type="cosine") == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2], abs=1e-12)
    assert rates(warmup_updates=1) == [0.5, 1, 1, 1]


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=30)
def test_prompts_are_drawn_without_replacement_pass_by_pass(n, count, batches):
    rows = [{"prompt": str(i)} for i in range(n)]
    stream = [row["prompt"] for k in range(batches) for row in P.draw(rows, k * count, count, seed=1)]
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start:start + n]) == sorted(str(i) for i in range(n))


def test_scores_are_scaled_by_all_so_far_then_clipped(tmp_path, monkeypatch):
    """What `credit` gets: the score over the standard deviation of all scores to this update, clipped; the metrics are of the raw."""
    got, given_scores = [], [torch.tensor([1.0, 5.0]), torch.tensor([-9.0, 2.0])]
    real = P.credit
    monkeypatch.setattr(P, "credit", lambda rollout, scores, *rest: (got.append(scores.clone()), real(rollout, scores, *rest)))
    calls = iter(given_scores)
    run = P.train(Config(num_updates=2, batch_size=2, num_mini_batches=1, response_length=4, name="x", runs_dir=str(tmp_path),
                         use_score_scaling=True, score_clip=1.2),
                  prompts=["ab", "c"], reward=lambda prompts, completions, **columns: next(calls), model=letters_model(), tokenizer=letters_tokenizer())
    deviations = [2.0, torch.tensor([1.0, 5.0, -9.0, 2.0]).std(correction=0)]
    for shaped, raw, deviation in zip(got, given_scores, deviations):
        assert far(shaped, (raw / deviation).clamp(-1.2, 1.2)) < 1e-6
    assert [row["objective/scores"] for row in lines(run / "metrics.jsonl")[1:3]] == [3.0, -3.5]


def test_half_precision_weights_become_float32_and_held_out_prompts_come_in_batches(tmp_path):
    """A bfloat16 model object is trained in float32. More held-out prompts than a batch are all evaluated. bfloat16 is for products only."""
    model = letters_model().bfloat16()
    run = P.train(Config(num_updates=1, batch_size=8, response_length=4, name="x", runs_dir=str(tmp_path), dtype="bfloat16"), prompts=["ab", "c"],
                  reward=[mean_length, share_of_t5], model=model, tokenizer=letters_tokenizer(), eval_prompts=["a", "b c"] * 10)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    first, update, last = lines(run / "metrics.jsonl")
    assert first["eval/score"] == pytest.approx(first["eval/rewards/mean_length"]) and first["eval/rewards/share_of_t5"] == 0
    assert update["policy/sampler_gap"] < 0.05 and update["policy/ratio"] == pytest.approx(1, abs=0.02)
    with pytest.raises(P.UsageError, match="a model needs its tokenizer"):
        P.train(Config(), prompts=["ab"], reward=mean_length, model=model)


@pytest.mark.slow
def test_the_demo_improves_and_leaves_what_it_promises(tmp_path):
    """A third of the demo, as a user runs it: the held-out score rises by more than 1, and every file is there and loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run_cli("--name", "demo", "--num-updates", 10, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "demo"
    metrics, samples = lines(run / "metrics.jsonl"), lines(run / "samples.jsonl")
    assert [row["update"] for row in metrics] == [*range(11), 10]
    assert metrics[-1]["eval/score"] - metrics[0]["eval/score"] > 1 and metrics[0]["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert metrics[0]["eval/rewards/fluency"] > 0.9 and metrics[-1]["eval/rewards/fluency"] > 0.7
    assert all(math.isfinite(x) for row in metrics for x in row.values()) and metrics[1]["policy/sampler_gap"] < 1e-5
    assert {"update", "prompt", "reply", "score", "kl"} <= set(samples[0])
    about = json.loads((run / "config.json").read_text())
    assert about["config"]["num_updates"] == 10 and about["versions"]["torch"] == torch.__version__ and "--num-updates" in about["command"]
    assert (run / "curves.svg").read_text().startswith("<svg")
    for expected in ("Held-out evaluation", "before", "after", "score", "fluency", "▁", "█", "from_pretrained", "curves.svg"):
        assert expected in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "runs/" not in line)
    tokenizer = AutoTokenizer.from_pretrained(run / "policy")
    policy = AutoModelForCausalLM.from_pretrained(run / "policy")
    out = policy.generate(**tokenizer("the plot was", return_tensors="pt"), max_new_tokens=20, do_sample=False)
    assert set(P.GOOD) & set(tokenizer.decode(out[0]).split())

    again = run_cli("--name", "demo", cwd=tmp_path)
    assert again.returncode == 2 and "runs/demo exists" in again.stderr and lines(run / "metrics.jsonl") == metrics


@pytest.mark.slow
def test_any_text_goes_through_any_encoding(files, tmp_path):
    """Where the system's encoding is ASCII the logs are UTF-8 all the same, and what the terminal cannot show ends no run."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "déjà → 的", "answer": 1}\n' * 10, encoding="utf-8")
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    done = subprocess.run([sys.executable, HERE / "ppo_llm.py", *shlex.split(f"--model {files}/model --prompts prompts.jsonl --num-updates 1 --name x "
                           f"--reward {files}/rewards.py:answers --batch-size 8 --response-length 5")], cwd=tmp_path, env=ENV | plain, capture_output=True)
    assert done.returncode == 0, done.stderr
    samples = (tmp_path / "runs" / "x" / "samples.jsonl").read_text(encoding="utf-8")
    assert "déjà → 的" in samples and b"Learning curves" in done.stdout


@pytest.mark.slow
def test_as_a_library_twice_the_same(tmp_path):
    """`train` with a model, a list of prompts and a callable: the score rises; the same seed gives the same metrics and weights."""
    results = []
    for name in ("a", "b"):
        cfg = Config(num_updates=12, batch_size=32, response_length=4, learning_rate=0.02, kl_coef=0.0, name=name, runs_dir=str(tmp_path), seed=3)
        run = P.train(cfg, prompts=["t1 t3", "t4"] * 8, reward=share_of_t5, model=tiny().float(), tokenizer=words_tokenizer())
        rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in lines(run / "metrics.jsonl")]
        results.append((rows, (run / "policy" / "model.safetensors").read_bytes()))
    assert results[0] == results[1]
    rows = results[0][0]
    assert rows[-2]["objective/scores"] > rows[1]["objective/scores"] + 0.2 and rows[-2]["rewards/share_of_t5"] == rows[-2]["objective/scores"]


def test_columns_weights_and_the_adaptive_coefficient(files, tmp_path):
    """Columns reach the reward of their row, weights mix rewards, warm-up holds the policy, β follows the KL."""
    run = P.main(["--model", str(files / "model"), "--prompts", str(files / "prompts.jsonl"), "--reward", f"{files}/rewards.py:answers",
                  f"{HERE}/test_ppo_llm.py:share_of_t5", "--reward-weights", "0.5", "2", "--num-updates", "2", "--batch-size", "8",
                  "--response-length", "5", "--kl-target", "1e-9", "--learning-rate", "1e-2", "--critic-warmup-updates", "1", "--name", "x",
                  "--runs-dir", str(tmp_path), "--kl-horizon", "100", "--stop-token", "t3"])
    assert run == 0
    first, second = lines(tmp_path / "x" / "metrics.jsonl")[1:3]
    assert first["objective/scores"] == pytest.approx(0.5 * first["rewards/answers"] + 2 * first["rewards/share_of_t5"], abs=1e-6)
    assert "policy/ratio" not in first and "policy/ratio" in second
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5) and second["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert second["kl_coef"] == pytest.approx(first["kl_coef"] * (1 - 0.2 * 8 / 100), abs=1e-9)
    for sample in lines(tmp_path / "x" / "samples.jsonl"):
        assert isinstance(sample["answer"], int) and sample["prompt"] == f"t{sample['answer'] % 6} t1"
        assert "t3" not in sample["reply"].split()[:-1]


def test_a_failing_reward_names_the_reply_after_the_run_is_saved(files, tmp_path, capsys):
    """The reward fails on one reply in the second update: the first is kept, the message names reward, prompt and reply, and the run
    goes on once the reward is put right."""
    (tmp_path / "fragile.py").write_text("calls = 0\ndef answers(prompts, completions, **columns):\n    global calls\n"
        "    calls += len(prompts) > 1\n    if calls == 3:\n        return [1 / (p != prompts[-1]) for p in prompts]\n"
        "    return [float(a) for a in columns['answer']]\n")
    arguments = command(files, f"--num-updates 3 --name x --runs-dir {tmp_path}")
    arguments[arguments.index("--reward") + 1] = f"{tmp_path}/fragile.py:answers"
    assert P.main(arguments) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"reward answers failed at fragile.py:6: ZeroDivisionError: .*, for the prompt 't. t1' and the reply ' t.*'; to go on from "
                     r".*/x/checkpoints/000001: python ppo_llm.py --resume", err), err
    text = (tmp_path / "fragile.py").read_text()
    (tmp_path / "fragile.py").write_text(text.replace("calls == 3", "False"))
    assert P.main(["--resume", str(tmp_path / "x")]) == 0
    assert P.main(command(files, "--num-updates 3 --name y --runs-dir " + str(tmp_path))) == 0
    assert outcome(tmp_path / "x") == outcome(tmp_path / "y")


def test_steps_that_are_not_finite_are_left_out_and_then_end_the_run(tmp_path):
    """A score of 1e30 overflows the value loss: those steps change no weight and are counted. One update of them is survived, a run of
    them ends with what was seen."""
    def reward(prompts, completions, **columns):
        reward.calls += 1
        return [1e30 if reward.calls in reward.bad else 1.0 + len(text) for text in completions]

    def go(name, bad):
        reward.calls, reward.bad, model = 0, bad, letters_model()
        cfg = Config(num_updates=4, batch_size=8, response_length=4, name=name, runs_dir=str(tmp_path), save_every=1, num_ppo_epochs=1,
                     num_mini_batches=2, missing_eos_penalty=1.0)
        P.train(cfg, prompts=["ab", "c"], reward=reward, model=model, tokenizer=letters_tokenizer())
        return model

    model = go("one", [2])
    rows = lines(tmp_path / "one" / "metrics.jsonl")
    assert [(row["policy/skipped_steps"], row["policy/steps"]) for row in rows[1:5]] == [(0, 2), (2, 0), (0, 2), (0, 2)]
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(P.RunError, match=r"not finite in 4 optimizer steps in a row, up to update 3.*1e\+30.*to go on from .*many/checkpoints/000002"):
        go("many", [2, 3, 4])


def test_a_policy_that_has_diverged_ends_the_run(tmp_path):
    """A learning rate of 1e30 makes weights whose probabilities are no numbers: one line, and no checkpoint of it is kept as the last."""
    with pytest.raises(P.RunError, match=r"probabilities are not finite: it has diverged; lower --learning-rate"):
        P.train(Config(num_updates=4, batch_size=8, response_length=4, name="x", runs_dir=str(tmp_path), learning_rate=1e30),
                prompts=["ab", "c"], reward=mean_length, model=letters_model(), tokenizer=letters_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_update_and_saves(number, status, files, tmp_path):
    """Ctrl-C or SIGTERM once: the update in hand is finished and logged, the run saved, and the way to go on told; it is true."""
    process = subprocess.Popen([sys.executable, str(HERE / "ppo_llm.py"), *command(files, "--num-updates 100000 --name x --save-every 99999")],
                               cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "x" / "metrics.jsonl"
    for _ in range(600):
        time.sleep(0.1)
        if metrics.exists() and len(metrics.read_text().splitlines()) > 3:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err and f"{number.name}: finishing the update in hand" in err, err
    rows = lines(metrics)
    assert [row["update"] for row in rows] == list(range(len(rows))) and len(rows) > 3
    way = re.search(rf"Stopped by {number.name} after update {rows[-1]['update']}; to go on from runs/x/checkpoints/\d+: python ppo_llm.py (--resume .*)\n", out)
    more = run_cli(*way.group(1).split(), "--num-updates", rows[-1]["update"] + 1, cwd=tmp_path)
    assert more.returncode == 0 and [row["update"] for row in lines(metrics)] == [*range(len(rows) + 1), len(rows)], more.stderr


# ------------------------------------------------------------------------------------------------- 9. what a run leaves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("critic_only", [False, True])
def test_flops_are_those_of_the_matrix_products(kind, critic, critic_only):
    """Without padding torch counts the same products, to the last one, plus those of a head for V and less attention, which it does not
    count on the CPU: for a trunk forward and backward 6 FLOPs x 2 epochs x 8 replies x 2 layers x 16 hidden x 8² tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = settings_of()
    actor, _, rollout = experience(kind, lengths=(3,) * 8, stop=(), critic=critic)
    with FlopCounterMode(display=False) as counter:
        P.ppo_update(actor, torch.optim.AdamW(actor.parameters()), rollout, 0.1, cfg, critic_only)
    shared = critic[0] == "shared"
    head = (4 if shared and critic_only else 6) * 2 * 8 * 6 * 16 if critic[1] == "value" else 0  # frozen states need no gradient
    policy = 6 if not critic_only else 2 if shared else 0  # a critic with a trunk of its own needs no states of the policy's
    attention = (policy + (0 if shared else 6)) * 2 * 8 * 2 * 16 * 8**2
    assert counter.get_total_flops() == 2 * P.flops(actor, rollout, critic_only) + head - attention


def test_flops_of_a_model_that_also_sees_are_those_of_its_language_part():
    _, _, rollout = experience()
    assert P.flops(P.Actor(model_of("Gemma3")), rollout) == P.flops(P.Actor(model_of("Gemma3Text")), rollout)


def test_curves_are_a_picture_whatever_a_reward_is_called(tmp_path):
    from xml.etree import ElementTree

    rows = [{"update": i, "objective/scores": 0.0, "objective/kl": 0.5, "rewards/<lambda>_0": i} for i in (1, 2)]
    P.write_curves(tmp_path / "curves.svg", rows)
    assert "rewards/<lambda>_0" in ElementTree.parse(tmp_path / "curves.svg").getroot().itertext()


def test_speeds_are_those_of_the_times(files, tmp_path, capsys):
    """Tokens over the seconds of their phase; --profile sets the FLOP/s of the PPO epochs beside those of a matrix product."""
    assert P.main(command(files, f"--num-updates 2 --name x --runs-dir {tmp_path} --profile --stop-token t3")) == 0
    for row in lines(tmp_path / "x" / "metrics.jsonl")[1:3]:
        tokens, times = 8 * row["reply/length"], [row[f"time/{name}"] for name in ("generate", "reward", "evaluate", "update")]
        assert row["perf/tokens_per_second"] * sum(times) == pytest.approx(tokens)
        assert row["perf/rollout_tokens_per_second"] * times[0] == pytest.approx(tokens)
        assert row["perf/update_tokens_per_second"] * times[3] == pytest.approx(row["policy/steps"] / 4 * (tokens + 8 * 2))
    words = " ".join(capsys.readouterr().out.split())
    found = re.search(r"Rollout (\S+) tokens/s, update (\S+) tokens/s at (\S+) TFLOP/s "
                      r"\((\d+)% of the (\S+) that a matrix product reaches\), memory (\S+) GB", words)
    rollout, update, done, share, reached, memory = map(float, found.groups())
    assert rollout > 0 and update > 0 and abs(share - 100 * done / reached) < 2 and reached > 1e-4 and 0.1 < memory < 24


# What a run with everything that has a state needs: a critic of its own, an adaptive β, scaled scores, a decaying learning rate.
STATEFUL = ("--response-length 6 --batch-size 8 --learning-rate 1e-2 --critic separate --critic-target action-value --kl-target 0.1 "
            "--kl-horizon 50 --critic-lr 3e-2 --use-score-scaling --lr-scheduler-type linear --samples-per-prompt 2 --save-every 2")


def command(files, more):
    return shlex.split(f"--model {files}/model --prompts {files}/prompts.jsonl --reward {files}/rewards.py:answers {STATEFUL} {more}")


def outcome(run):
    """What must be the same of two runs: every metric but the times, the samples, and the bits of the final policy."""
    metrics = [{k: x for k, x in row.items() if not k.startswith(("time/", "perf/"))} for row in lines(run / "metrics.jsonl")]
    return metrics, lines(run / "samples.jsonl"), (run / "policy" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """An uninterrupted run of five updates with checkpoints at 2, 4 and 5, of which the last two are kept."""
    folder = tmp_path_factory.mktemp("finished")
    assert P.main(command(files, f"--num-updates 5 --name whole --runs-dir {folder}")) == 0
    return folder / "whole"


def test_policy_and_critic_have_learning_rates_of_their_own(finished):
    """On one schedule: at the fourth of five updates a linear decay leaves two fifths. All of a separate critic is in the second group."""
    groups = torch.load(finished / "checkpoints" / "000004" / "state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.4 * 1e-2, 0.4 * 3e-2])
    assert lines(finished / "metrics.jsonl")[4]["lr"] == pytest.approx(0.4 * 1e-2)
    assert len(groups[1]["params"]) > 2


def stopped(finished, folder, keep="000004"):
    """A copy of the run as a kill leaves it: no policy, one checkpoint, logs that have gone on and end in half a line."""
    run = folder / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "policy")
    for path in (run / "checkpoints").iterdir():
        if path.name != keep:
            shutil.rmtree(path)
    (run / "checkpoints" / "unfinished").mkdir(exist_ok=True)
    (run / "checkpoints" / "unfinished" / "state.pt").write_bytes(b"half")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"update": 6, "obj')
    return run


@pytest.mark.parametrize("keep", ["000004", "000005", "nothing"])
def test_resume_goes_on_as_if_never_stopped(finished, tmp_path, keep):
    """2N steps = N + load + N, bit for bit: metrics, samples and final weights; also from after the last update, or before any checkpoint."""
    assert [path.name for path in P.checkpoints(finished)] == ["000004", "000005"]
    run = stopped(finished, tmp_path, keep)
    assert P.main(["--resume", str(run)]) == 0
    assert outcome(run) == outcome(finished)
    assert len({row["kl_coef"] for row in outcome(run)[0] if "kl_coef" in row}) > 2  # there was a state to keep


def test_a_checkpoint_of_a_gpu_is_read_without_one(finished, tmp_path):
    """The optimizer's moments are saved with the name of their device, here that of one which no machine has."""
    run = stopped(finished, tmp_path)
    path = run / "checkpoints" / "000004" / "state.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
        torch.save(torch.load(path, weights_only=True), path)
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)
    assert P.main(["--resume", str(run)]) == 0 and outcome(run) == outcome(finished)


KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, {here!r})
import torch, transformers, tyro, ppo_llm  # once: each life of the run is a fork of this process

kills, while_saving, lives, rng = 0, 0, 0, random.Random(0)
unfinished, config = "killed/checkpoints/unfinished", "killed/config.json"
while True:
    arguments = ["--resume", "killed"] if os.path.exists(config) else sys.argv[1:]
    pid, lives = os.fork(), lives + 1
    if pid == 0:
        os.dup2(os.open("life.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os._exit(ppo_llm.main(arguments))
    patience = time.monotonic() + rng.uniform(0, 1.2)
    if kills % 2:  # every other time in the middle of a save
        patience += 5
        while not os.path.exists(unfinished) and time.monotonic() < patience and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            pass
        patience = time.monotonic() + rng.uniform(0, 0.03)
    while kills < 24 and time.monotonic() < patience:
        time.sleep(0.001)
    if kills < 24:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        print(kills, while_saving, lives, os.WEXITSTATUS(status))
        break
    kills, while_saving = kills + 1, while_saving + os.path.exists(unfinished)
"""


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_never_stopped(files, tmp_path):
    """SIGKILL 24 times, at random and in the middle of saves: metrics, samples and weights equal those of a run left alone."""
    arguments = command(files, "--num-updates 150 --save-every 1 --runs-dir .")
    for name in ("alone", "killed"):
        script = KILLER.format(here=str(HERE)) if name == "killed" else f"import sys; sys.path.insert(0, {str(HERE)!r}); import ppo_llm; ppo_llm.main()"
        done = subprocess.run([sys.executable, "-c", script, *arguments, "--name", name], cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    kills, while_saving, lives, status = map(int, done.stdout.split())
    assert status == 0, (tmp_path / "life.txt").read_text()
    assert kills >= 20 and while_saving >= 3 and lives == kills + 1
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "alone")


FORGETFUL = [
    ("optimizer.load_state_dict(saved[\"optimizer\"])", "pass"),
    ("task.actor.load_state_dict(weights)", "task.actor.lm.load_state_dict(policy.state_dict())"),
    ("State(**saved[\"state\"])", "State(**saved[\"state\"] | {'kl_coef': cfg.kl_coef})"),
    ("State(**saved[\"state\"])", "State(**saved[\"state\"] | {'moments': (0, 0.0, 0.0)})"),
    ("f.truncate(size)", "pass")]


@pytest.mark.parametrize("old, new", FORGETFUL, ids=["optimizer", "critic", "kl_coef", "score scaling", "logs"])
def test_a_resume_that_loses_something_is_seen(old, new, finished, tmp_path, monkeypatch):
    """The museum's last room (trl#2657, trl#3293): what a resume forgets makes the outcome another one."""
    monkeypatch.setattr(P, "resume", edited("resume", old, new))
    run = stopped(finished, tmp_path)
    if old == "f.truncate(size)":
        (run / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text())
    assert P.main(["--resume", str(run)]) == 0 and outcome(run) != outcome(finished)


ANEW = [("reseed(cfg.seed, state.update)", "reseed(cfg.seed, 0)"), ("draw(task.prompts, state.update * count", "draw(task.prompts, 0 * count")]


@pytest.mark.parametrize("old, new", ANEW, ids=["random numbers", "place in the prompts"])
def test_a_resume_that_begins_its_streams_anew_is_seen(old, new, finished, tmp_path, monkeypatch):
    """The same room: the random numbers and the prompts of the first update once more."""
    monkeypatch.setattr(P, "one_update", edited("one_update", old, new))
    run = stopped(finished, tmp_path)
    assert P.main(["--resume", str(run)]) == 0 and outcome(run) != outcome(finished)


def test_a_complete_run_goes_on_with_more_updates_and_not_without(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert P.main(["--resume", str(run)]) == 2 and "the run is complete; to go on, give a larger --num-updates" in capsys.readouterr().err
    assert outcome(run) == outcome(finished)
    assert P.main(["--resume", str(run), "--num-updates", "6"]) == 0
    assert [row["update"] for row in lines(run / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6, 6]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


def move_model(run):
    """The run's model is now another, in the folder that its settings name."""
    about = json.loads((run / "config.json").read_text())
    shutil.copytree(about["config"]["model"], run / "model")
    flip(run / "model" / "model.safetensors")
    about["config"]["model"] = str(run / "model")
    (run / "config.json").write_text(json.dumps(about))


class Bomb:
    def __reduce__(self):
        return (Path("/tmp").joinpath, ("never",))


DAMAGE = {  # what is done to the checkpoint; extra arguments; what the one line says
    "a truncated optimizer": (lambda last: (last / "state.pt").write_bytes((last / "state.pt").read_bytes()[:-100]), "", "000004 is damaged"),
    "a flipped bit in the policy": (lambda last: flip(last / "policy" / "model.safetensors"), "", "000004 is damaged"),
    "a flipped bit in the critic": (lambda last: flip(last / "critic.safetensors"), "", "000004 is damaged"),
    "no critic": (lambda last: (last / "critic.safetensors").unlink(), "", "000004 is damaged"),
    "a pickle": (lambda last: torch.save(Bomb(), last / "state.pt"), "", "000004 is damaged or of another program (UnpicklingError"),
    "an empty folder": (lambda last: (shutil.rmtree(last), last.mkdir()), "", "000004 is damaged"),
    "logs cut off": (lambda last: (last.parents[1] / "metrics.jsonl").write_text(""), "", "metrics.jsonl is shorter than at the last checkpoint"),
    "another model": (lambda last: move_model(last.parents[1]), "", "initial model was"),
    "another learning rate": (lambda last: None, "--learning-rate 0.5", "learning_rate was 0.01 and is 0.5"),
    "another critic": (lambda last: None, "--critic shared", "critic was separate and is shared"),
    "a foreign config": (lambda last: (last.parents[1] / "config.json").write_text('{"config": {"lr": 1}}'), "", "expected the folder of a run of this ppo_llm.py"),
    "no config": (lambda last: (last.parents[1] / "config.json").unlink(), "", "expected the folder of a run of this ppo_llm.py"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_foreign_or_changed_checkpoint_is_refused(damage, finished, files, tmp_path, capsys):
    """One line that names what is wrong, exit status 2, no code executed, nothing changed on the disk."""
    do, more, message = DAMAGE[damage]
    run = stopped(finished, tmp_path)
    do(P.checkpoints(run)[-1])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert P.main(["--resume", str(run), *more.split()]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and message in err[0], err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("room", [100, 3000, 20000])
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_whole(room, finished, tmp_path, capsys):
    """With files limited to `room` bytes, logs, state or weights cannot be written: exit status 1, and the run goes on once there is room."""
    import resource

    run = stopped(finished, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status = P.main(["--resume", str(run)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = [line for line in capsys.readouterr().err.strip().splitlines() if "%|" not in line]
    assert status == 1 and len(err) == 1 and "cannot write" in err[0] and f"to go on from {run}/checkpoints/00000" in err[0], err
    assert P.main(["--resume", str(run)]) == 0 and outcome(run) == outcome(finished)


# ---------------------------------------------------------------------------------------------- the README and the rest


def test_import_has_no_side_effects():
    """Importing takes no transformers (slow to start), writes nothing, prints nothing."""
    code = "import sys, ppo_llm; print([m for m in ('transformers', 'tyro') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, env=ENV)
    assert done.stdout.strip() == "[]" and done.stderr == ""


def test_requirements_and_inline_metadata_agree():
    """Every range of the PEP 723 block admits the version that requirements.txt pins; tests alone add pytest and hypothesis."""
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().split())
    block = re.search(r"^# /// script\n(.*?)^# ///$", (HERE / "ppo_llm.py").read_text(), re.S | re.M).group(1)
    ranges = {r.name: r for r in map(Requirement, re.findall(r'"([^"]+)"', block.split("dependencies")[1]))}
    assert set(pins) == set(ranges) | {"pytest", "hypothesis"}
    assert all(ranges[name].specifier.contains(pins[name]) for name in ranges)


def test_readme_names_only_what_exists():
    """The table function ↔ equation ↔ test: each name in it is one of the module's or of this file's."""
    table = re.search(r"\| function \| equation \| tests \|\n(.*?)\n\n", README, re.S).group(1)
    rows = [row.split("|") for row in table.splitlines()[1:]]
    functions, tests = (re.findall(r"`(\w+)`", " ".join(row[i] for row in rows)) for i in (1, 3))
    assert {"gae", "policy_loss", "value_loss", "ppo_loss"} <= set(functions)
    assert all(callable(getattr(P, name)) for name in functions) and all(callable(globals()[name]) for name in tests)
    assert int(re.search(r"museum of (\d+)", README).group(1)) == len(MUSEUM) + len(FORGETFUL) + len(ANEW)
    may_change = re.search(r"prompts is refused; only (.*?) may change", README, re.S).group(1)
    assert {f"--{name.replace('_', '-')}" for name in P.MAY_CHANGE} - {"--resume"} == set(re.findall(r"`(--[\w-]+)`", may_change))


def test_readme_commands_and_code_run(files, tmp_path, monkeypatch, capsys):
    """Every code block and every command with a model, word for word but for tiny folders in place of the hub's names and fewer updates."""
    monkeypatch.chdir(tmp_path)
    for name, lm in (("Qwen/Qwen3-0.6B", letters_model("Qwen3", head_dim=8, num_key_value_heads=1, max_position_embeddings=256)),
                     ("gpt2", letters_model("GPT2", n_embd=16, n_layer=2, n_head=2, max_position_embeddings=256)),
                     ("lvwerra/distilbert-imdb", letters_model("DistilBert", "ForSequenceClassification", 2, dim=16, n_layers=1, n_heads=2,
                                                               hidden_dim=16, id2label={0: "NEGATIVE", 1: "POSITIVE"}))):
        lm.save_pretrained(name)
        letters_tokenizer(chat_template=CHAT).save_pretrained(name)
    (tmp_path / "prompts.txt").write_text("the film was\nit is\n" * 10)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film was"}\n' * 20)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    for code in blocks:
        name = re.match(r"# (\w+\.py)", code)
        if name:
            (tmp_path / name.group(1)).write_text(code)
    subprocess.run([sys.executable, "make_sums.py"], check=True)
    assert len(lines(tmp_path / "sums.jsonl")) == 2000
    commands = re.findall(r"^    python ppo_llm.py (--model .*)$", README, re.M)
    for i, words in enumerate(commands):
        assert P.main([*words.split(), "--num-updates", "1", "--batch-size", "8", "--name", "NAME" if i == 0 else f"run{i}"]) == 0
    exact = P.load_reward("sums.py:exact")
    assert exact(None, [[{"role": "assistant", "content": text}] for text in ("3 + 4 = 7", "7 or 8", "")], ["7"] * 3) == [1, 0, 0]
    for code in blocks:
        if not code.startswith("# "):
            exec(code.replace("num_updates=200", "num_updates=1, batch_size=8"), {})
    assert len(commands) == 3 and len(blocks) == 5


@pytest.mark.slow
def test_the_benchmark_of_the_readme_runs(tmp_path, monkeypatch):
    """Our side of runs/reference/bench/compare.py, on its smallest work: replies of full length, and ones that stop."""
    monkeypatch.syspath_prepend(HERE / "runs" / "reference" / "bench")
    import compare

    for stops, longest in ((0, True), (16, False)):
        seconds, memory, share = compare.ours(compare.make_folder(tmp_path, "tiny", stops), 16, 24, 2)
        rows = [json.loads(line) for line in open(next(tmp_path.glob(f"tiny-{stops}/*/x/metrics.jsonl")))]
        assert seconds > 0 and memory > 100 and 0 < share < 200 and (rows[1]["reply/length"] == 24) == longest


def test_every_metric_of_a_run_is_explained(finished):
    documented = re.findall(r"`([\w/*]+)`", re.search(r"\| metric \| meaning \|\n(.*?)\n\n", README, re.S).group(1))
    patterns = [name.replace("*", r"\w+").replace("NAME", r"\w+") for name in documented]
    names = {name for row in lines(finished / "metrics.jsonl") for name in row} - {"update"}
    assert [name for name in names if not any(re.fullmatch(p, name) for p in patterns)] == []
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in names)] == []
