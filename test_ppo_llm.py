"""Facts about PPO that `ppo_llm.py` must keep, and about the program around it.

The sections mirror the source. The first, on the mathematics, can be read as its specification: it is tested in
float64, on ragged batches whose other cells hold NaN, inf and huge numbers, against brute force, theorems or values
worked out by hand. Errors are largest absolute differences. From the settings of a run on, models are tiny and
random, and one character is one token. `pytest -m "not slow"` leaves out whole runs in subprocesses.
"""

import ast
import asyncio
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tokenize
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from types import ModuleType, SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested bit for bit is the CPU's arithmetic

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ppo_llm as P
from ppo_llm import Config, PPOConfig, Progress, Prompt, Rollout

HERE = Path(__file__).parent
sys.path.append(f"{HERE}/runs/reference/recipes")
from q_critic import QActor
from tools import converse

settings.register_profile(
    "ppo",
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink what fails may take minutes
)
settings.load_profile("ppo")
# As in the subprocesses: sums of another number of threads are rounded in other ways.
torch.set_num_threads(1)

REAL = torch.float64
SOURCE = Path(P.__file__).read_text()
README = (HERE / "README.md").read_text()


def real(numbers):
    return torch.tensor(numbers, dtype=REAL)


def decimals(low, high):
    return st.floats(low, high).map(lambda x: round(x, 3))


number = decimals(-4, 4)
positive = decimals(0.05, 4)
fraction = decimals(0, 1)


def lists(elements, size):
    return st.lists(elements, min_size=size, max_size=size)


def vectors(size):
    return lists(number, size).map(real)


@st.composite
def masks(draw, shortest=0, holes=False):
    """[B, T] masks of ragged replies, with empty and full rows; on request any boolean pattern."""
    B = draw(st.integers(1, 3))
    T = draw(st.integers(1, 5))
    if holes:
        return torch.tensor(draw(lists(lists(st.booleans(), T), B)))
    lengths = draw(lists(st.integers(shortest, T), B))
    return torch.arange(T) < torch.tensor(lengths).unsqueeze(1)


def cells(draw, mask, elements=number, garbage=True):
    """A tensor for the mask: drawn numbers on its cells, at times all the same, and garbage on the others."""
    x = torch.zeros(mask.shape, dtype=REAL)
    if garbage:
        x += draw(st.sampled_from([math.nan, math.inf, -math.inf, -1e300]))
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


def test_errors_neither_cancel_nor_hide():
    """Vacuous tests shipped too: rtol = 1e6, signed errors that sum to 0. The measure used here sees ±1, and NaN."""
    assert error([1.0, -1.0], [0.0, 0.0]) == 1
    assert error([math.nan], [0.0]) == math.inf
    assert error([math.inf], [math.inf]) == math.inf


@pytest.mark.skipif(sys.version_info > (3, 12), reason="from then on an f-string is several tokens")
def test_the_size_is_kept():
    """Tokens of code, without comments and docstrings: that is what there is to read."""
    free = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    skip = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            skip |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    code = [x.start[0] for x in tokens if tokenize.tok_name[x.type] not in free and x.start[0] not in skip]
    lines = SOURCE.splitlines()
    (end,) = (i for i, line in enumerate(lines, 1) if line.startswith("#") and "Part I ends here" in line)
    part_one = sum(line <= end for line in code)
    assert part_one <= 5000
    assert len(code) / len(set(code)) <= 10.5
    assert max(map(len, lines)) <= 120
    assert len(code) - part_one <= 6600


# What ../shared/tools/mutants.py leaves alive in Part I and no test can kill, as nothing changes:
# - a number in torch.where(mask, x, 0.0) that a masked mean drops (value_loss, policy_loss);
# - the last `max(1, ...)` of `schedule` where the decay lasts one update, `while len(stream) <= ...` in draw_prompts;
# - `logits_to_keep=2`, `use_cache`, `ent_coef >= 0`, a detach of statistics: work that is not used;
# - `>` for `>=` between numbers that are never equal (target_kl), the first value of `too_far`, annotations.
# A deleted all_sum changes nothing in one process: the slow tests of several kill it.


# ------------------------------------------------------------------------------------------------------ the mathematics


@given(st.data(), st.integers(1, 3), st.integers(1, 6))
def test_response_mask_is_a_naive_loop(data, B, T):
    """True up to the first stop token, which is part of the reply; True everywhere if there is none."""
    ids = st.integers(0, 3)
    stop_ids = data.draw(st.lists(ids, max_size=2))
    responses = data.draw(lists(lists(ids, T), B))
    mask = P.response_mask(torch.tensor(responses), stop_ids)
    for response, kept in zip(responses, mask.tolist()):
        stopped = False
        for token, valid in zip(response, kept):
            assert valid == (not stopped)
            stopped = stopped or token in stop_ids


@given(st.data(), masks(holes=True), positive, number)
def test_masked_mean_and_whitening(data, mask, scale, shift):
    """The mean is over the cells of the mask, 0 if there are none. Whitened they are (x - mean) / deviation: mean 0,
    variance 1, the same for ax + b. One cell becomes 0, and cells that differ by a millionth of their size too."""
    x = cells(data.draw, mask)
    mean = average(x[mask])
    centered = x[mask] - mean
    deviation = average(centered**2).sqrt()
    assert error(P.masked_mean(x, mask), mean) < 1e-12
    white, affine = (P.masked_whiten(y, mask) for y in (x, scale * x + shift))
    assert not white[~mask].any()
    if deviation <= 1e-6 * average(x[mask].abs()):
        assert not white.any()
    else:
        assert error(white[mask], centered / deviation) < 1e-9
    if deviation > 1e-3:
        assert error(affine, white) < 1e-6


def test_whitening_in_float32():
    """Equal numbers have no spread, though their mean is not them: it has been rounded. Numbers of any size that differ
    are spread alike."""
    mask = torch.ones(1, 999, dtype=torch.bool)
    for number in (1000.1, -1000.1):
        assert P.masked_whiten(torch.full((1, 999), number), mask).abs().max() == 0
    x = torch.linspace(-1, 1, 999).unsqueeze(0)
    for scale in (1e-9, 1e9):
        assert error(P.masked_whiten(scale * x, mask), P.masked_whiten(x, mask)) < 1e-5


@given(st.lists(number, min_size=2, max_size=5), number)
def test_logprobs_and_entropy_from_logits(row, shift):
    """log softmax, whatever is added to all logits; its entropy."""
    V = len(row)
    tokens = torch.arange(V)
    logits = real(row).expand(V, V)  # the same logits for every token
    powers = [math.exp(x) for x in row]
    expected = [math.log(x / sum(powers)) for x in powers]
    entropy = -sum(math.exp(x) * x for x in expected)
    assert error(P.logprobs_from_logits(logits, tokens), expected) < 1e-10
    assert error(P.logprobs_from_logits(logits[0] + shift, tokens[1]), expected[1]) < 1e-10
    assert error(P.entropy_from_logits(logits), [entropy] * V) < 1e-10
    assert error(P.entropy_from_logits(real([shift] * V)), math.log(V)) < 1e-12


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

    One k1 may be negative; k3 never is.
    """
    policy, ref = (data.draw(vectors(V)).log_softmax(0) for _ in range(2))
    d = policy - ref
    p = policy.exp()
    k1, k2, k3 = (P.kl_estimate(policy, ref, kind) for kind in ("k1", "k2", "k3"))
    assert error(p @ k1, p @ d) < 1e-12
    assert error(p @ k2, p @ d**2 / 2) < 1e-12
    assert error(p @ k3, p @ d) < 1e-12
    assert (k3 >= -1e-15).all()
    assert error(P.kl_estimate(policy, ref), k1) == 0


def test_kl_estimate_worked_by_hand():
    """π = ½, ref = ¼: d = ln 2, k1 = d = 0.693147, k2 = d²/2 = 0.240227, k3 = ½ - 1 + d = 0.193147.

    π = ¼, ref = ½: d = -ln 2, k1 = -0.693147, k2 = 0.240227, k3 = 2 - 1 - 0.693147 = 0.306853.
    """
    policy = real([[0.5, 0.25]]).log()
    ref = policy.flip(1)
    assert error(P.kl_estimate(policy, ref, "k1"), [[0.693147, -0.693147]]) < 1e-6
    assert error(P.kl_estimate(policy, ref, "k2"), [[0.240227, 0.240227]]) < 1e-6
    assert error(P.kl_estimate(policy, ref, "k3"), [[0.193147, 0.306853]]) < 1e-6
    with pytest.raises(KeyError, match="k4"):
        P.kl_estimate(policy, ref, "k4")


def test_adaptive_kl_coef():
    """β rests at the target, here 6, follows the sign of the relative error, in proportion up to 20%, and no faster,
    not even in a batch that is larger than the horizon."""
    for kl, change in ((6.0, 0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (-1.0, -0.2)):
        for episodes, share in ((100, 0.1), (9000, 1.0)):
            after = P.adaptive_kl_coef(0.2, kl, target=6.0, horizon=1000, episodes=episodes)
            assert error(after / 0.2 - 1, change * share) < 1e-12


@given(st.data(), masks(holes=True), st.just(0.0) | positive, st.booleans())
def test_token_rewards_sum_to_score_less_kl(data, mask, kl_coef, each_token):
    """Each token of the mask pays β·KL. The score of a reply, or of a token, goes to the last token of the mask up to
    there; what comes before all of them is dropped."""
    kl = cells(data.draw, mask)
    scores = data.draw(vectors(mask.numel())).view(mask.shape)
    if not each_token:
        scores[:, :-1] = 0
    rewards = P.token_rewards(scores if each_token else scores[:, -1], kl, mask, kl_coef)
    expected = torch.where(mask, -kl_coef * kl, 0.0)
    for b, row in enumerate(mask.tolist()):
        for t, x in enumerate(scores[b]):
            written = [i for i in range(t + 1) if row[i]]
            if written:
                expected[b, written[-1]] += x
    assert error(rewards, expected) < 1e-12
    paid = torch.where(mask.cumsum(1) > 0, scores, 0.0)
    assert error(rewards.sum(), paid.sum() - kl_coef * kl[mask].sum()) < 1e-12


def td_errors(rewards, values, gamma):
    """δ_t = r_t + γ·V_{t+1} - V_t of one reply."""
    return [r + gamma * after - v for r, v, after in zip(rewards, values, values[1:] + [0.0])]


def discounted_sums(x, factor):
    """Σ_k factor^k x_{t+k} for every t, in O(T²)."""
    return [sum(factor**k * y for k, y in enumerate(x[t:])) for t in range(len(x))]


def gae_by_definition(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} of one reply, arXiv 1506.02438 eq. 16."""
    return discounted_sums(td_errors(rewards, values, gamma), gamma * lam)


@given(st.data(), masks(holes=True), fraction, fraction)
def test_gae_is_its_definition(data, mask, gamma, lam):
    """On the cells of the mask in each row, wherever they are; the others are 0. λ = 0 gives the TD error, λ = 1 the
    discounted return."""
    rewards, values = (cells(data.draw, mask) for _ in range(2))
    advantages, returns = P.gae(rewards, values, mask, gamma, lam)
    at_0, _ = P.gae(rewards, values, mask, gamma, lam=0.0)
    _, at_1 = P.gae(rewards, values, mask, gamma)
    _, plain = P.gae(rewards, values, mask)
    assert error(plain, P.gae(rewards, values, mask, 1.0)[1]) == 0
    for x in (advantages, returns, at_0, at_1):
        assert not x[~mask].any()
    for b, row in enumerate(mask):
        r = rewards[b, row].tolist()
        v = values[b, row].tolist()
        expected = real(gae_by_definition(r, v, gamma, lam))
        assert error(advantages[b, row], expected) < 1e-10
        assert error(returns[b, row], expected + values[b, row]) < 1e-10
        assert error(at_0[b, row], td_errors(r, v, gamma)) < 1e-12
        assert error(at_1[b, row], discounted_sums(r, gamma)) < 1e-10


def test_gae_worked_by_hand():
    """γ = λ = ½. Three tokens: δ = 1 + ½·1 - ½ = 1, 0 + ½·1 - 1 = -½, 2 - 1 = 1.

    So A = 1 - ¼·¼ = 0.9375, -½ + ¼·1 = -0.25, 1. Two tokens with a hole between: δ = 0 + ½·0 - 2 = -2, 1 - 0 = 1, so
    A = -2 + ¼·1 = -1.75, 1. The returns are A + V.
    """
    rewards = real([[1.0, 0.0, 2.0], [0.0, math.nan, 1.0]])
    values = real([[0.5, 1.0, 1.0], [2.0, math.inf, 0.0]])
    advantages, returns = P.gae(rewards, values, rewards.isfinite(), 0.5, 0.5)
    assert error(advantages, [[0.9375, -0.25, 1], [-1.75, 0, 1]]) < 1e-12
    assert error(returns, [[1.4375, 0.75, 2], [0.25, 0, 1]]) < 1e-12


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


@given(st.data(), masks(holes=True), st.floats(0.05, 0.5), st.none() | st.floats(0.05, 0.9))
def test_policy_loss_by_brute_force(data, mask, low, cliprange_high):
    """-ΣρA/N, where ρ counts at most as 1 + ε_high if A > 0, and at least as 1 - ε_low if A < 0.

    Where ρ is beyond its bound, the gradient is exactly 0; elsewhere it is -ρA/N. So the surrogate never promises more
    than the objective without a clip, PPO eq. 6.
    """
    old, log_ratio, advantages = (cells(data.draw, mask) for _ in range(3))
    new = (old + log_ratio / 4).requires_grad_()  # ratios from e^-1 to e
    loss, stats = P.policy_loss(new, old, advantages, mask, low, cliprange_high)

    high = cliprange_high or low
    ratio = (new - old)[mask].detach().exp()  # new - old is not the log ratio to the last bit
    A = advantages[mask]
    too_high = (ratio > 1 + high) & (A > 0)
    too_low = (ratio < 1 - low) & (A < 0)
    counted = ratio.clone()
    counted[too_high] = 1 + high
    counted[too_low] = 1 - low
    clipped = too_high | too_low
    assert error(loss, -average(counted * A)) < 1e-10
    assert error(stats["policy/ratio"], average(ratio)) < 1e-10
    assert error(stats["policy/approxkl"], average(ratio - 1 - ratio.log())) < 1e-10
    assert error(stats["policy/clipfrac"], average(clipped)) < 1e-12
    slope = gradient(loss, new)
    assert error(slope[mask], torch.where(clipped, 0.0, -ratio * A / len(A))) < 1e-10
    assert not slope[mask][clipped].any()
    assert not slope[~mask].any()


def test_policy_loss_worked_by_hand():
    """ε = 0.2: the four objectives are 2.4, -0.8, -3 and 1.1, their mean -0.075, the loss 0.075.

    ρ = 1.5, A = 2: min(3, 2.4) = 2.4. ρ = 0.5, A = -1: min(-0.5, -0.8) = -0.8. ρ = 1.5, A = -2: min(-3, -2.4) = -3.
    ρ = 1.1, A = 1: inside, 1.1. The gradient is -ρA/4 where no clip is active.
    """
    new = real([[1.5, 0.5, 1.5, 1.1]]).log().requires_grad_()
    arguments = new, torch.zeros(1, 4), real([[2.0, -1.0, -2.0, 1.0]]), new.isfinite()
    loss, stats = P.policy_loss(*arguments)
    assert error(loss, 0.075) < 1e-12
    assert error(stats["policy/clipfrac"], 0.5) < 1e-12
    assert error(gradient(loss, new), [[0, 0, 0.75, -0.275]]) < 1e-12
    loss, _ = P.policy_loss(*arguments, cliprange_high=0.3)
    assert error(loss, -(2.6 - 0.8 - 3 + 1.1) / 4) < 1e-12


@given(st.data(), masks(holes=True), st.none() | st.floats(0.05, 1))
def test_value_loss_by_brute_force(data, mask, cliprange_value):
    """½ mean of the larger square, so at least ½ MSE; the gradient is exactly 0 where the clipped error is larger."""
    new, old, returns = (cells(data.draw, mask) for _ in range(3))
    new.requires_grad_()
    loss, stats = P.value_loss(new, old, returns, mask, cliprange_value)

    bound = cliprange_value or math.inf
    v = new[mask].detach()
    o = old[mask]
    miss = v - returns[mask]
    clipped_miss = v.clamp(o - bound, o + bound) - returns[mask]
    gap = clipped_miss.abs() - miss.abs()
    clipped = gap > 0
    assert error(loss, average(torch.where(clipped, clipped_miss, miss) ** 2) / 2) < 1e-10

    distance = (v - o).abs()
    assume(
        not ((distance - bound).abs() < 1e-9).any()
    )  # there, and where the two squares are the same, is a kink
    assume(not ((distance > bound) & (gap.abs() < 1e-9)).any())
    assert error(stats["val/clipfrac"], average(clipped)) < 1e-12
    slope = gradient(loss, new)
    assert error(slope[mask], torch.where(clipped, 0.0, miss / len(v))) < 1e-10
    assert not slope[mask][clipped].any()
    assert not slope[~mask].any()


def test_value_loss_worked_by_hand():
    """ε = 0.2, V_old = 0, R = 1: the larger squares are 0.64, 0.81 and 4, half their mean 5.45 / 6.

    V = 1: the clipped 0.2 errs by 0.8, and 0.64 > 0. V = 0.1: inside, 0.81. V = -1: 4 > 1.44.
    """
    new = real([[1.0, 0.1, -1.0]]).requires_grad_()
    returns = real([[1.0, 1.0, 1.0]])
    loss, _ = P.value_loss(new, 0 * returns, returns, new.isfinite(), 0.2)
    assert error(loss, 5.45 / 6) < 1e-12
    assert error(gradient(loss, new), [[0, -0.3, -2 / 3]]) < 1e-12


def test_a_batch_without_a_token_is_0_everywhere():
    """Means, losses, rewards, advantages, and every gradient; what the cells hold is never looked at."""
    mask = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.full((2, 3), math.nan, dtype=REAL, requires_grad=True)
    losses = [P.policy_loss(x, x, x, mask)[0], P.value_loss(x, x, x, mask, 0.2)[0], P.masked_mean(x, mask)]
    for loss in losses:
        assert loss == 0
        assert not gradient(loss, x).any()
    for result in (
        P.masked_whiten(x, mask),
        P.token_rewards(real([1.0, 2.0]), x, mask, 0.1),
        *P.gae(x, x, mask),
    ):
        assert not result.any()


# ----------------------------------------------------------------------------------------- what the tests are made with

KINDS = ["gpt2", "llama"]
EXACT = {"gpt2": 1e-9, "llama": 2e-5}  # Llama's norms compute in float32 whatever the weights are
STOP = 2


def tiny(kind="gpt2", V=7, seed=0):
    """A random float64 language model with large weights, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    tokens = dict(vocab_size=V, bos_token_id=None, eos_token_id=STOP)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3, **tokens
        )
        return transformers.GPT2LMHeadModel(config).double()
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(max_position_embeddings=32, initializer_range=0.4, **sizes, **tokens)
    return transformers.LlamaForCausalLM(config).double()


def tiny_actor(kind="gpt2", V=7, seed=0, separate=False):
    """An actor whose value head is random too. separate: its critic is a model of its own, or "Q", a recipe."""
    if separate == "Q":
        actor = QActor(tiny(kind, V, seed))
    else:
        actor = P.Actor(tiny(kind, V, seed), critic=tiny(kind, V, seed + 5) if separate else None)
    for p in actor.value_head.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    return actor


def random_prompts(lengths, V=7):
    random = torch.Generator().manual_seed(0)
    return [Prompt(torch.randint(V, (n,), generator=random).tolist()) for n in lengths]


def settings_of(**changes):
    """Settings of a small update, some of them changed."""
    usual = dict(batch_size=8, num_mini_batches=2, num_ppo_epochs=2, response_length=6, micro_batch_size=3)
    return PPOConfig(**usual | dict(whiten_advantages=False, temperature=0.8, target_kl=None) | changes)


LENGTHS = (3, 1, 2, 5, 4, 2, 3, 1)


def replies_to(actor, lengths=LENGTHS, cfg=settings_of(), stop_ids=(STOP,), seed=0):
    """A rollout of sampled replies to random prompts of these lengths, not evaluated yet."""
    torch.manual_seed(seed)
    return P.sample_replies(actor, random_prompts(lengths), list(stop_ids), cfg)


def with_hole(rollout):
    """The same, but its second tokens were written by an environment."""
    second = torch.arange(rollout.present.shape[1]) == 1
    return dataclasses.replace(rollout, mask=rollout.present & ~second)


def experience(kind="gpt2", lengths=LENGTHS, cfg=settings_of(), separate=False, holes=False):
    """An actor, another model as the reference, and a complete rollout of sampled replies with random scores."""
    actor = tiny_actor(kind, separate=separate)
    ref = tiny_actor(kind, seed=1)
    rollout = replies_to(actor, lengths, cfg)
    scores = torch.randn(len(lengths), dtype=REAL)
    if holes:
        rollout = with_hole(rollout)
        scores = torch.randn(rollout.mask.shape, dtype=REAL) * rollout.present
    P.fill_logprobs_and_values(actor, ref, rollout, cfg)
    P.compute_advantages(actor, rollout, scores, cfg.kl_coef, cfg)
    return actor, ref, rollout


def whole(rollout):
    """All replies as one micro-batch."""
    return rollout.select(torch.arange(len(rollout.mask)))


def each_reply(rollout):
    """The tokens of each prompt and of the reply to it, without padding, and what the rollout says of each token."""
    names = [name for name, x in vars(rollout).items() if x is not None and not name.startswith("quer")]
    for b, reply in enumerate(rollout.replies()):
        said = SimpleNamespace(**{name: getattr(rollout, name)[b, : len(reply)] for name in names})
        yield rollout.queries[b, rollout.query_mask[b]].tolist(), reply, said


def distributions(lm, prompt, reply, temperature=0.8):
    """log π of every token in each state of the reply, by the model's own forward: [T + 1, V]"""
    logits = lm(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 :]
    return (logits / temperature).log_softmax(-1)


def alone(lm, prompt, reply, temperature=0.8):
    """log π of a reply by the model's own forward: no padding, no cache, no other replies in the batch: [T]"""
    index = torch.tensor(reply).unsqueeze(1)
    return distributions(lm, prompt, reply, temperature)[:-1].gather(1, index).squeeze(1)


def weights_of(module):
    """All its weights, copied into one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def gradients(loss, module):
    """The gradient of the loss in all weights of the module, as one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


def ppo_steps(actor, rollout, cfg, lr=0.0, **options):
    """One PPO update with plain gradient descent. Returns its metrics."""
    torch.manual_seed(0)
    return P.ppo_update(actor, torch.optim.SGD(actor.parameters(), lr=lr), rollout, cfg, **options)


def assert_same(outcome, other, tolerance=1e-9):
    """Two updates led to the same weights and reported the same metrics."""
    assert error(outcome[0], other[0]) < tolerance
    assert outcome[1] == pytest.approx(other[1], abs=tolerance)


def watched(patch, owner, name, note):
    """A list. Each call of the function `name` from now on adds to it what `note` says of the arguments."""
    notes = []
    function = getattr(owner, name)

    def watching(*arguments, **options):
        notes.append(note(*arguments))
        return function(*arguments, **options)

    patch.setattr(owner, name, watching)
    return notes


# ---------------------------------------------------------------------------------------------- the data, and the actor


@pytest.mark.parametrize("holes", [False, True])
def test_micro_batches_trim_and_lose_nothing(holes):
    """Each reply is in one of them, the shortest first. A micro-batch is cut to its longest prompt and reply; what is
    left of each reply is what it was."""
    _, _, rollout = experience(holes=holes)
    before = list(each_reply(rollout))
    parts = list(P.micro_batches(rollout, torch.tensor([6, 1, 7, 2, 0, 3, 5]), 3, "cpu"))
    assert [len(rows) for rows, _ in parts] == [3, 3, 1]
    order = torch.cat([rows for rows, _ in parts]).tolist()
    assert sorted(order) == [0, 1, 2, 3, 5, 6, 7]
    lengths = [len(before[i][0]) + len(before[i][1]) for i in order]
    assert lengths == sorted(lengths)
    for rows, part in parts:
        assert part.queries.shape[1] == part.query_mask.sum(1).max()
        assert part.mask.shape[1] == part.present.sum(1).max()
        for i, (prompt, reply, said) in zip(rows, each_reply(part)):
            assert (prompt, reply) == before[i][:2]
            for name, x in vars(said).items():
                assert torch.equal(x, getattr(before[i][2], name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_every_logprob_is_the_models_own(kind, temperature):
    """The sampler (cached, left-padded) and the scorer (one padded forward pass) say what the bare model says of one
    reply at a time. So left padding, other replies and the cache change nothing, and the temperature is in all."""
    cfg = settings_of(temperature=temperature, response_length=12)
    actor, ref, rollout = experience(kind, (1, 6, 3, 2, 2, 5, 1, 4) * 2, cfg)
    assert len(rollout.mask.sum(1).unique()) > 1
    for prompt, reply, said in each_reply(rollout):
        own = alone(actor.lm, prompt, reply, temperature)
        assert error(said.logprobs, own) < EXACT[kind]
        assert error(said.sampler_logprobs, own) < EXACT[kind]
        assert error(said.ref_logprobs, alone(ref.lm, prompt, reply, temperature)) < EXACT[kind]
    for x in (rollout.logprobs, rollout.ref_logprobs, rollout.entropy):
        assert not x[~rollout.mask].any()


@pytest.mark.parametrize("separate", [False, True])
def test_values_are_the_heads_of_the_models_own_states(separate):
    """Times the unit, of the state before each token, by the last hidden state of a bare forward pass."""
    actor, _, rollout = experience(separate=separate)
    actor.spread.fill_(2.5)
    P.fill_logprobs_and_values(actor, None, rollout, settings_of())
    trunk = actor.critic if separate else actor.lm.base_model
    for prompt, reply, said in each_reply(rollout):
        states = trunk(torch.tensor([prompt + reply])).last_hidden_state[0, len(prompt) - 1 : -1]
        assert error(said.values, 2.5 * actor.value_head(states).squeeze(1)) < 1e-9
        assert said.ref_logprobs.isnan().all()
    assert rollout.values[rollout.mask].std() > 0.1


def test_the_recipe_of_an_action_value_critic():
    """Before the update V(s) = Σ_a π(a|s)·Q(s, a). In it the value loss moves the Q(s, a) of the tokens that came, and
    of no others."""
    actor, _, rollout = experience(separate="Q")
    P.fill_logprobs_and_values(
        actor, None, before := dataclasses.replace(rollout, advantages=None), settings_of()
    )
    for prompt, reply, said in each_reply(before):
        states = actor.lm.base_model(torch.tensor([prompt + reply])).last_hidden_state[
            0, len(prompt) - 1 : -1
        ]
        Q = actor.unit * actor.value_head(states)
        pi = distributions(actor.lm, prompt, reply)[:-1].exp()
        assert error(said.values, (pi * Q).sum(1)) < 1e-9
    for i, reply in enumerate(rollout.replies()):
        _, stats = P.ppo_loss(actor, rollout.select(torch.tensor([i])), settings_of())
        moved = gradient(stats["loss/value"], actor.value_head.bias).nonzero().flatten()
        assert set(moved.tolist()) == set(reply)


def test_fit_returns_widens_without_a_change_of_v_and_then_moves_it():
    """A narrower spread leaves the unit as it is, which is 1 before there is any. V is 0 at the very start."""
    assert not weights_of(P.Actor(tiny()).value_head).any()
    actor = tiny_actor()
    rollout = replies_to(actor)
    before = torch.tensor(0)
    for spread, shift, unit in ((0.0, 0.0, 1), (0.5, 0.0, 0.5), (3.0, 0.0, 3), (1.0, 0.7, 3), (5.0, -2.0, 5)):
        actor.fit_returns(spread, shift)
        P.fill_logprobs_and_values(actor, None, rollout, settings_of())
        assert actor.unit == unit
        if spread:
            assert error(rollout.values[rollout.mask], before + shift) < 1e-12
        before = rollout.values[rollout.mask]


def test_logits_are_not_rounded_to_bfloat16():
    """Logits around -100, as GPT-2 has them, where bfloat16 numbers are 0.5 apart: log π would err by 0.1. Without
    autocast the logits are the model's own. What was tied stays tied."""
    lm = tiny().float().eval()
    ids = torch.tensor([[5, 3, 4]])
    own = lm(ids).logits
    plain = P.Actor(lm).lm(ids).logits
    actor = P.Actor(lm, torch.bfloat16)
    cast = actor.run(lm, ids, torch.ones(1, 3)).logits
    assert error(own, plain) < 1e-5
    assert 1e-3 < error(own, cast) < 0.1 * own.std()
    assert {cast.dtype, *(p.dtype for p in actor.parameters())} == {torch.float32}
    head = lm.get_output_embeddings()
    assert head.weight is lm.get_input_embeddings().weight
    head.weight.data[:, 0] = -1
    states = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    states[:, 0] = 100
    exact = (states.double() @ head.weight.double().T).log_softmax(1)
    with actor.autocast():
        assert error(head(states).log_softmax(1), exact) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused_if_trained(dtype):
    """Of the policy, and of a critic of its own. Frozen they may be: logits and values come in float32."""
    for arguments in ([tiny().to(dtype)], [tiny().float(), torch.float32, tiny().to(dtype)]):
        with pytest.raises(ValueError, match=f"is {dtype}: expected float32"):
            P.Actor(*arguments)
    frozen = P.Actor(tiny().to(dtype).requires_grad_(False))
    said = frozen(whole(replies_to(tiny_actor())), 1.0)
    assert {x.dtype for x in said} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------- the rollout


@pytest.mark.parametrize("stop_ids", [[STOP], [STOP, 4], []])
def test_replies_end_with_the_first_stop_token(stop_ids):
    cfg = settings_of(response_length=5, temperature=2.0, micro_batch_size=32)
    rollout = replies_to(tiny_actor(), [2] * 256, cfg, stop_ids, seed=3)
    lengths = set()
    for reply in rollout.replies():
        stops = [t for t, token in enumerate(reply, 1) if token in stop_ids]
        assert stops == [len(reply)] or (stops == [] and len(reply) == 5)
        lengths |= {len(reply)}
    assert lengths == ({1, 2, 3, 4, 5} if stop_ids else {5})
    assert torch.equal(rollout.mask, rollout.present)
    replies = rollout.replies()
    rollout.mask[:] = False  # who takes tokens out of it in place takes none out of the replies
    rollout.present = rollout.present.long()  # as masks of transformers are
    assert rollout.replies() == replies


def test_a_token_is_the_inverse_of_the_distribution_function(monkeypatch):
    """For a uniform u it is the first whose cumulative probability exceeds u, in float64: never one of probability
    0, at times the last, of 1e-9, and that one also for a u that rounding made 1."""
    logits = real([[[0.0, 0.25, 0.25, 0.125, 0.375 - 2e-9, 1e-9, 1e-9]]]).log()
    drawn = {
        0.0: 1,
        0.2: 1,
        0.26: 2,
        0.49: 2,
        0.51: 3,
        0.626: 4,
        1 - 3e-9: 4,
        1 - 1.5e-9: 5,
        1 - 5e-10: 6,
        1.0: 6,
    }
    output = SimpleNamespace(logits=logits, past_key_values=None)
    monkeypatch.setattr(P.Actor, "run", lambda *_, **options: output)
    query = torch.tensor([[5]])
    tokens, logprobs = P.decode(tiny_actor(), query, query > 0, real([[*drawn]]), [], 1.0)
    assert tokens.tolist() == [[*drawn.values()]]
    assert error(logprobs, logits[0, 0, tokens]) < 1e-9


def test_a_reply_is_made_by_its_own_random_numbers(monkeypatch):
    """The same seed gives the same replies whether the prompts are decoded together, in groups of eight, or each alone
    and without padding. A group decodes until all have stopped, which is looked up after every fourth token."""
    actor = tiny_actor()
    lengths = LENGTHS * 3
    sizes = watched(monkeypatch, P.Actor, "run", lambda actor, lm, ids, *_: len(ids))
    together, groups = (
        replies_to(actor, lengths, settings_of(response_length=12, temperature=1.0, micro_batch_size=size))
        for size in (3, 1)
    )
    assert {*sizes} == {24, 8}
    replies = together.replies()
    assert groups.replies() == replies
    assert len({*map(len, replies)}) > 3
    torch.manual_seed(0)
    uniform = torch.rand(24, 12, dtype=REAL)
    for prompt, reply, u in zip(random_prompts(lengths), replies, uniform):
        sizes.clear()
        query = torch.tensor([prompt.ids])
        tokens, _ = P.decode(actor, query, query >= 0, u.unsqueeze(0), [STOP], 1.0)
        assert tokens[0, : len(reply)].tolist() == reply
        assert len(sizes) == math.ceil(len(reply) / 4) * 4


@pytest.mark.parametrize("seed, holes", [(0, False), (1, True)])
def test_metrics_are_means_over_the_trained_tokens(seed, holes):
    """Against brute force: the entropy is that of the bare model, KL is summed over a reply and averaged over
    replies. Where there is no reference, its KL is left out."""
    actor, _, rollout = experience(cfg=settings_of(gamma=0.9), holes=holes)
    random = torch.Generator().manual_seed(seed)
    rollout.sampler_logprobs += torch.randn(
        rollout.mask.shape, dtype=REAL, generator=random
    )  # gaps of both signs
    entropies, kl, gaps, values, returns, rewards = ([] for _ in range(6))
    for prompt, reply, said in each_reply(rollout):
        log_pi = distributions(actor.lm, prompt, reply)[:-1][said.mask]
        entropies += (-log_pi.exp() * log_pi).sum(-1).tolist()
        kl += [float((said.logprobs - said.ref_logprobs)[said.mask].sum())]
        gaps += (said.logprobs - said.sampler_logprobs)[said.mask].abs().tolist()
        values += said.values[said.mask].tolist()
        earned = said.rewards[said.mask].tolist()
        returns += discounted_sums(earned, 0.9)
        rewards += [sum(earned)]
    residual = real(returns) - real(values)
    expected = {
        "objective/scores": 3.5,
        "objective/kl": fmean(kl),
        "objective/rlhf_reward": fmean(rewards),
        "reply/length": fmean(map(len, rollout.replies())),
        "policy/entropy": fmean(entropies),
        "policy/sampler_gap": fmean(gaps),
        "val/explained_variance": float(1 - residual.var() / real(returns).var()),
    }
    scores = torch.arange(8, dtype=REAL)
    assert P.rollout_metrics(rollout, scores) == pytest.approx(expected, abs=1e-9)
    rollout.ref_logprobs *= math.nan
    del expected["objective/kl"]
    assert P.rollout_metrics(rollout, scores) == pytest.approx(expected, abs=1e-9)


# ----------------------------------------------------------------------------------------------------------- the update

ENVIRONMENT = real([0.5, 0.3, 0.2])  # the probabilities of the tokens that it writes


def dialogues(actor, prompts, cfg):
    """Every dialogue that the recipe `tools.py` samples, once: turns of up to two tokens, of which the first, if it
    stops, is answered with two tokens that depend on it. Hot, so that none is rare."""

    def answer(reply):
        return [len(reply), reply[0]] if reply[-1] == STOP else []

    torch.manual_seed(0)
    cfg = dataclasses.replace(cfg, response_length=2, micro_batch_size=1000, temperature=100.0)
    rollout = converse(answer, 4, actor, 1500 * prompts, [STOP], cfg)
    distinct = {
        (str(prompt), str(reply), str(said.mask)): i
        for i, (prompt, reply, said) in enumerate(each_reply(rollout))
    }
    return rollout.select(torch.tensor([*distinct.values()]))


def language(actor, ref, lengths, cfg, each_token, holes):
    """A rollout that holds every reply to every prompt once, up to three tokens of three, cut at the stop token; the
    score of each, and what the environment's token in it was likely to be. The advantages are such that a mean over
    the rollout is an expectation. holes: True, or "tool" for the dialogues that a recipe samples."""
    tokens = torch.tensor(list(itertools.product(range(3), repeat=3)))
    present = P.response_mask(tokens, [STOP])
    replies, first = torch.unique(torch.where(present, tokens, -1), dim=0, return_inverse=True)
    n = len(replies)
    replies = replies.clamp(min=0).repeat(len(lengths), 1)
    prompts = random_prompts(lengths, V=3)
    queries, query_mask = (x.repeat_interleave(n, 0) for x in P.left_pad([prompt.ids for prompt in prompts]))
    present = torch.stack([present[first == i][0] for i in range(n)]).repeat(len(lengths), 1)
    rollout = Rollout(queries, query_mask, replies, present, present, torch.zeros(present.shape))
    environment = torch.ones(len(replies), dtype=REAL)
    if holes == "tool":
        rollout = dialogues(actor, prompts, cfg)
        environment = torch.ones(len(rollout.mask), dtype=REAL)
    elif holes:
        rollout = with_hole(rollout)
        environment = ENVIRONMENT[replies[:, 1]].where(present[:, 1], 1.0)
    P.fill_logprobs_and_values(actor, ref, rollout, cfg)
    history = (rollout.responses * 3 ** torch.arange(rollout.mask.shape[1])).cumsum(1)
    history = history + rollout.queries.sum(1, keepdim=True)
    scores = torch.where(
        rollout.present, history.double().sin(), 0.0
    )  # a score knows nothing of later tokens
    P.compute_advantages(actor, rollout, scores if each_token else scores.sum(1), cfg.kl_coef, cfg)
    probability = rollout.logprobs.sum(1).exp() * environment
    assert error(probability.sum(), len(lengths)) < 1e-10  # the list is complete
    rollout.advantages *= probability.unsqueeze(1) * actor.unit * rollout.mask.sum()
    return rollout, scores, environment


ON_POLICY = [  # kind, temperature, separate critic, a score for each token, holes
    ("gpt2", 0.5, False, False, False),
    ("gpt2", 2.0, False, True, False),
    ("gpt2", 0.5, False, False, True),
    ("gpt2", 1.0, True, True, True),
    ("llama", 1.0, False, False, False),
    ("llama", 0.5, False, True, True),
    ("gpt2", 0.5, "Q", True, True),
    ("gpt2", 1.0, False, True, "tool"),
    ("llama", 1.0, True, False, "tool"),
]


@pytest.mark.parametrize("kind, temperature, separate, each_token, holes", ON_POLICY)
def test_expected_ppo_gradient_is_the_policy_gradient(kind, temperature, separate, each_token, holes):
    """On a language small enough to list every reply (V = 3, T ≤ 3, with a stop token), with each reply weighted by
    its probability, the gradient of the PPO loss at ratio 1 (λ = γ = 1, no whitening) is that of -(E[score] - β·KL),
    for a random critic, left-padded prompts of mixed length, any temperature. This is the policy gradient theorem,
    ∇E[R] = E Σ_t ∇log π(a_t|s_t)·(Σ_{t' ≥ t} r_t' - V(s_t)): what came before a_t, and V, go out as E_a[∇log π(a|s)]
    = ∇1 = 0. It fails for a wrong shift, sign, mask or temperature, and for a baseline that sees the action. It holds
    too where an environment, which is not trained, writes the second token."""
    cfg = settings_of(temperature=temperature, kl_coef=0.3, vf_coef=0.0)
    actor = tiny_actor(kind, 3, 0, separate)
    ref = tiny_actor(kind, 3, 9)
    rollout, scores, environment = language(actor, ref, [1, 4, 2], cfg, each_token, holes)
    loss, _ = P.ppo_loss(actor, rollout.select(torch.randperm(len(scores))), cfg)
    got = gradients(loss, actor.lm)

    objective = 0.0
    for (prompt, reply, said), score, likely in zip(each_reply(rollout), scores.sum(1), environment):
        logprob = alone(actor.lm, prompt, reply, temperature)[said.mask].sum()
        ref_logprob = alone(ref.lm, prompt, reply, temperature)[said.mask].sum().detach()
        objective += likely * logprob.exp() * (score - 0.3 * (logprob - ref_logprob))
    expected = gradients(-objective, actor.lm)
    assert error(got, expected) < EXACT[kind]
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("kind, holes", [("gpt2", False), ("gpt2", True), ("llama", False)])
def test_expected_ppo_gradient_off_policy(kind, holes):
    """After the policy has moved from μ, inside the clip range, it is the gradient of the surrogate, PPO eq. 6: of
    Σ_y μ(y) Σ_t π/μ(y_t)·A_t, by the bare model. That is no longer the policy gradient: states still come from μ."""
    cfg = settings_of(lam=0.7, gamma=0.9, kl_coef=0.3, vf_coef=0.0, cliprange=0.9)
    actor = tiny_actor(kind, 3)
    rollout, scores, environment = language(actor, tiny_actor(kind, 3, 9), [1, 3], cfg, False, holes)
    random = torch.Generator().manual_seed(1)
    for p in actor.parameters():
        p.data += 0.005 * torch.randn(p.shape, dtype=REAL, generator=random)
    loss, stats = P.ppo_loss(actor, whole(rollout), cfg)
    got = gradients(loss, actor.lm)
    assert stats["policy/clipfrac"] == 0
    assert stats["policy/approxkl"] > 1e-3

    surrogate = 0.0
    for (prompt, reply, said), score, likely in zip(each_reply(rollout), scores.sum(1), environment):
        old = said.logprobs[said.mask]
        rewards = (-0.3 * (old - said.ref_logprobs[said.mask])).tolist()
        rewards[-1] += float(score)
        advantages = gae_by_definition(rewards, said.values[said.mask].tolist(), 0.9, 0.7)
        ratio = (alone(actor.lm, prompt, reply)[said.mask] - old).exp()
        surrogate += likely * old.sum().exp() * (ratio * real(advantages)).sum()
    expected = gradients(-surrogate, actor.lm)
    assert error(got, expected) < EXACT[kind]
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("kind, holes", [("gpt2", False), ("gpt2", True), ("llama", False)])
def test_with_learning_rate_0_nothing_moves(kind, holes):
    """In every epoch and minibatch the ratio of every token is 1, KL and clipped share are 0, and the loss is
    -mean(A)."""
    cfg = settings_of(num_mini_batches=4)
    actor, _, rollout = experience(kind, cfg=cfg, holes=holes)
    with pytest.MonkeyPatch.context() as patch:
        gaps = watched(
            patch, P, "policy_loss", lambda new, old, advantages, mask, *_: error(new[mask], old[mask])
        )
        metrics = ppo_steps(actor, rollout, cfg)
    assert len(gaps) >= 8
    assert max(gaps) < EXACT[kind]
    assert metrics["policy/ratio"] == pytest.approx(1, abs=EXACT[kind])
    assert metrics["policy/approxkl"] == pytest.approx(0, abs=EXACT[kind])
    assert metrics["policy/clipfrac"] == 0
    assert metrics["policy/steps"] == 8
    assert metrics["grad_norm"] > 0
    metrics, once = (
        ppo_steps(actor, rollout, settings_of(num_mini_batches=1, num_ppo_epochs=n)) for n in (2, 1)
    )
    assert metrics["grad_norm"] == pytest.approx(once["grad_norm"])  # nothing is left of the step before
    part = torch.optim.SGD(actor.lm.parameters(), lr=0.0)  # nor of what the optimizer has not
    of_part = P.ppo_update(actor, part, rollout, settings_of(num_mini_batches=1, num_ppo_epochs=2))
    assert of_part["grad_norm"] == pytest.approx(once["grad_norm"])
    assert metrics["loss/policy"] == pytest.approx(
        -float(rollout.advantages[rollout.mask].mean()), abs=EXACT[kind]
    )
    errors = (rollout.values - rollout.returns)[rollout.mask]  # their mean is taken off
    expected = float(errors.var(correction=0) / 2 / actor.unit**2)
    assert metrics["loss/value"] == pytest.approx(expected, abs=EXACT[kind])


def test_the_first_ratio_is_1_in_bfloat16_too():
    """Since π_old comes from the same forward: its error, against float32, is in both. On some processors that depends
    on how many replies are computed together, so here all are."""
    cfg = settings_of(num_mini_batches=1, micro_batch_size=8)
    actor = P.Actor(tiny("llama").float(), torch.bfloat16)
    rollout = replies_to(actor)
    P.fill_logprobs_and_values(actor, None, rollout, cfg)
    exact, _, _ = actor(whole(rollout), 0.8)
    actor.dtype = torch.float32
    assert error(actor(whole(rollout), 0.8)[0], exact) > 1e-3
    actor.dtype = torch.bfloat16
    rollout.advantages = rollout.returns = torch.ones_like(rollout.values)
    assert ppo_steps(actor, rollout, cfg)["policy/approxkl"] < 1e-7


def test_an_update_leaves_the_rollout_as_it_was():
    actor, _, rollout = experience()
    before = copy.deepcopy(vars(rollout))
    ppo_steps(actor, rollout, settings_of(ent_coef=0.1, cliprange_value=0.2), lr=0.05)
    assert all(torch.equal(x, before[name]) for name, x in vars(rollout).items())


def test_a_step_of_one_token_has_its_whole_weight():
    cfg = settings_of(response_length=1, num_mini_batches=8, num_ppo_epochs=1)
    actor, _, rollout = experience(cfg=cfg)
    metrics = ppo_steps(actor, rollout, cfg)
    assert metrics["loss/policy"] == pytest.approx(-float(rollout.advantages.mean()), abs=1e-9)


def test_a_move_of_all_values_is_no_reason_to_clip_them():
    """`fit_returns` moves every V before the update; the value clip is around what it left."""
    cfg = settings_of(cliprange_value=0.2)
    actor, _, rollout = experience(cfg=cfg)
    P.compute_advantages(actor, rollout, torch.full((8,), 1000.0), 0.0, cfg)
    assert ppo_steps(actor, rollout, cfg)["val/clipfrac"] == 0


@pytest.mark.parametrize("micro, holes", [(1, False), (2, True), (3, False), (3, True)])
def test_any_partition_into_micro_batches_is_the_same_update(micro, holes):
    """The weights after two epochs, and all metrics, equal those of whole minibatches; and there are never more
    replies in memory."""
    outcomes = []
    for size in (4, micro):
        cfg = settings_of(micro_batch_size=size, ent_coef=0.1, cliprange_value=0.2)
        actor, _, rollout = experience(holes=holes)
        sizes = []

        def loss(actor, batch, cfg):
            sizes.append(len(batch.mask))
            return P.ppo_loss(actor, batch, cfg)

        metrics = ppo_steps(actor, rollout, cfg, lr=0.05, loss=loss)
        assert max(sizes) == size
        outcomes.append((weights_of(actor), metrics))
    assert_same(*outcomes)


def test_target_kl_stops_before_the_step_and_leaves_no_gradient_behind():
    """A minibatch whose KL is above the target takes no step, and none after it is computed."""
    cfg = settings_of(target_kl=1e-6, num_ppo_epochs=3, micro_batch_size=4)
    actor, _, rollout = experience()
    optimizer = torch.optim.SGD(actor.lm.parameters(), lr=0.5)  # it lacks the value head
    taken = []
    computed = []
    optimizer.register_step_post_hook(lambda *_: taken.append(weights_of(actor)))

    def loss(actor, batch, cfg):
        computed.append(batch)
        return P.ppo_loss(actor, batch, cfg)

    metrics = P.ppo_update(actor, optimizer, rollout, cfg, loss=loss)
    assert metrics["policy/steps"] == len(taken) == len(computed) - 1
    assert 1 <= len(taken) < 5
    assert torch.equal(weights_of(actor), taken[-1])
    assert all(p.grad is None for p in actor.parameters())


def test_target_kl_is_in_nats_a_token():
    """Of two whole passes the first has KL 0 and the second twice the mean: with a target 1% above that both take a
    step, 1% below only one does. The one that stops counts in the means too."""
    cfg = settings_of(num_mini_batches=1)
    actor, _, rollout = experience()
    mean = ppo_steps(copy.deepcopy(actor), rollout, cfg, lr=0.1)["policy/approxkl"]
    for share, steps in ((1.01, 2), (0.99, 1)):
        limited = dataclasses.replace(cfg, target_kl=2 * mean * share)
        metrics = ppo_steps(copy.deepcopy(actor), rollout, limited, lr=0.1)
        assert metrics["policy/steps"] == steps
        assert metrics["policy/approxkl"] == pytest.approx(mean)


def test_a_step_that_is_not_finite_is_refused():
    """One return that is infinite: the step is not taken."""
    actor, _, rollout = experience()
    before = weights_of(actor)
    rollout.returns[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        ppo_steps(actor, rollout, settings_of(num_mini_batches=1), lr=0.05)
    assert torch.equal(weights_of(actor), before)


@pytest.mark.parametrize("separate", [False, True])
def test_critic_warmup_trains_the_critic_alone(separate):
    """Its head, and its trunk if that is its own. Its loss falls, the policy stays as it is, and so do all ratios."""
    cfg = settings_of(num_ppo_epochs=8, vf_coef=1.0)
    actor, _, rollout = experience(separate=separate)
    before = copy.deepcopy(actor.state_dict())
    metrics = ppo_steps(actor, rollout, cfg, lr=0.02, critic_only=True)
    moved = {name.split(".")[0] for name, x in actor.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == ({"value_head", "critic"} if separate else {"value_head"})
    assert ppo_steps(actor, rollout, cfg)["loss/value"] < metrics["loss/value"]
    assert metrics["policy/ratio"] == pytest.approx(1, abs=1e-9)
    optimizer = torch.optim.Adam(actor.parameters())
    P.ppo_update(actor, optimizer, rollout, cfg, critic_only=True)
    assert {len(optimizer.state[p]) for p in actor.lm.parameters()} == {
        0
    }  # no moments that would move it later


def test_each_term_of_the_loss_has_its_coefficient():
    """PPO eq. 9: the loss is linear in vf_coef and ent_coef. Each clip is read; that of V is in the critic's unit."""
    actor, _, rollout = experience(holes=True)
    batch = whole(rollout)
    P.fill_logprobs_and_values(actor, None, batch, settings_of())

    def loss(vf_coef=0.0, **changes):
        return P.ppo_loss(actor, batch, settings_of(vf_coef=vf_coef, **changes))

    plain, stats = loss()
    assert error(plain, stats["loss/policy"]) < 1e-12
    assert error(loss(vf_coef=0.5)[0] - plain, 0.5 * stats["loss/value"]) < 1e-12
    assert error(loss(ent_coef=0.5)[0] - plain, -0.5 * average(batch.entropy[batch.mask])) < 1e-9
    assert not actor(batch, 1.0, with_entropy=False)[1].any()
    new_logprobs = batch.logprobs
    new_values = batch.values / actor.unit
    returns = batch.returns / actor.unit
    batch.logprobs = new_logprobs - 0.5  # ratio e^½: every clip binds on one sign of the advantage
    batch.values = batch.values + 0.4 * actor.unit
    for changes in (dict(cliprange=0.1), dict(cliprange_high=0.4)):
        expected, _ = P.policy_loss(new_logprobs, batch.logprobs, batch.advantages, batch.mask, **changes)
        assert error(loss(**changes)[0], expected) < 1e-9
    for clip in (0.1, None):
        expected, _ = P.value_loss(new_values, new_values + 0.4, returns, batch.mask, clip)
        assert error(loss(cliprange_value=clip)[1]["loss/value"], expected) < 1e-9


@pytest.mark.parametrize("separate", [False, True])
def test_gradient_of_the_whole_loss_by_finite_differences(separate):
    """Off policy, with every term on (surrogate, value, entropy): the slope along random directions of all weights."""
    cfg = settings_of(ent_coef=0.3, vf_coef=0.7, cliprange=0.9)
    actor, _, rollout = experience(separate=separate, holes=True)
    batch = whole(rollout)
    random = torch.Generator().manual_seed(0)
    weights = weights_of(actor)
    weights += 0.01 * torch.randn(weights.shape, dtype=REAL, generator=random)

    def loss(weights):
        torch.nn.utils.vector_to_parameters(weights, actor.parameters())
        return P.ppo_loss(actor, batch, cfg)[0]

    slopes = gradients(loss(weights), actor)
    for _ in range(3):
        step = 1e-5 * torch.randn(weights.shape, dtype=REAL, generator=random)
        expected = (loss(weights + step) - loss(weights - step)).item() / 2
        slope = (slopes @ step).item()
        assert abs(slope - expected) < 1e-5 * max(1e-5, abs(slope))
        assert abs(slope) > 1e-8


@pytest.mark.parametrize("limit", [1e9, 1e-3])
def test_gradient_clipping(limit):
    """A step has the norm allowed, or its own if that is less. The metric is the mean of the norms before clipping."""
    cfg = settings_of(max_grad_norm=limit, num_ppo_epochs=1, num_mini_batches=1)
    actor, _, rollout = experience()
    before = weights_of(actor)
    norm = ppo_steps(actor, rollout, cfg, lr=1.0)["grad_norm"]
    assert norm > 0.1
    assert error((before - weights_of(actor)).norm(), min(limit, norm)) < 1e-6


NUMBERS = ["logprobs", "ref_logprobs", "sampler_logprobs", "values", "entropy", "advantages", "returns"]


@pytest.mark.parametrize("holes", [False, True])
def test_garbage_in_the_padding_changes_no_step_and_no_metric(holes):
    """NaN in every number of the rollout, but for rewards, that is no trained token's, and other tokens in the padding
    of prompts and replies: the weights after two epochs and every metric are the same."""
    cfg = settings_of(ent_coef=0.1, cliprange_value=0.2)
    outcomes = []
    for dirty in (False, True):
        actor, ref, rollout = experience(holes=holes)
        if dirty:
            rollout.queries = rollout.queries.masked_fill(~rollout.query_mask, 6)
            rollout.responses = rollout.responses.masked_fill(~rollout.present, 5)
        P.fill_logprobs_and_values(actor, ref, rollout, cfg)
        for name in NUMBERS if dirty else ():
            setattr(rollout, name, getattr(rollout, name).masked_fill(~rollout.mask, math.nan))
        metrics = P.rollout_metrics(rollout, torch.arange(8.0)) | ppo_steps(actor, rollout, cfg, lr=0.05)
        P.compute_advantages(actor, rollout, torch.arange(8.0), 0.1, cfg)
        outcomes.append((torch.cat([weights_of(actor), rollout.advantages.flatten()]), metrics))
    assert not rollout.present.all()
    assert_same(*outcomes, 1e-12)


def test_an_empty_reply_counts_for_nothing():
    """`sample_replies` makes none, a rollout of your own may hold one: the same step as without it."""
    cfg = settings_of(num_mini_batches=1, num_ppo_epochs=1)
    actor, _, rollout = experience()
    other = copy.deepcopy(actor)
    rollout.present = rollout.mask = rollout.mask & (torch.arange(8) != 2).unsqueeze(1)
    ppo_steps(actor, rollout, cfg, lr=0.05)
    ppo_steps(other, rollout.select(torch.tensor([0, 1, 3, 4, 5, 6, 7])), cfg, lr=0.05)
    assert error(weights_of(actor), weights_of(other)) < 1e-12


# ------------------------------------------------------------------------------------------------------------- the loop


def fours(prompts, replies):
    """The share of token 4 in each reply."""
    return real([reply.count(4) / len(reply) for reply in replies]), {"own": 7.0}


def learner(cfg):
    actor = P.Actor(tiny())
    return actor, torch.optim.Adam(actor.parameters(), lr=1e-2), Progress(cfg.kl_coef)


def updates(actor, optimizer, progress, cfg, score=fours, with_ref=True, **seams):
    """The loop on seven prompts, with another model as the reference."""
    prompts = [Prompt([i, 1, 2]) for i in range(7)]
    ref = tiny_actor(seed=1) if with_ref else None
    return P.ppo(actor, ref, optimizer, prompts, score, [STOP], cfg, progress, **seams)


def without_times(metrics):
    return {name: x for name, x in metrics.items() if not name.startswith("time/")}


def trained(cfg, *options, **seams):
    """The weights of the policy, and the metrics of each update."""
    actor, optimizer, progress = learner(cfg)
    rows = [
        without_times(metrics) for metrics, _ in updates(actor, optimizer, progress, cfg, *options, **seams)
    ]
    return weights_of(actor.lm), rows


def test_scores_a_hundred_times_as_large_change_no_policy_step():
    """With β = 0. The scores differ in the first batch, so that the unit is known from then on."""
    cfg = settings_of(num_updates=3, kl_coef=0.0)
    (small, _), (large, _) = (
        trained(cfg, lambda prompts, replies: (scale * real([*map(sum, replies)]), {})) for scale in (1, 100)
    )
    assert error(small, large) < 1e-6


@pytest.mark.parametrize("lam", [1.0, 0.9])
def test_scores_a_thousand_higher_change_no_step(lam):
    """Whatever λ is: V has moved by the thousand before the first advantages, so that no error of the critic has it."""
    cfg = settings_of(num_updates=2, kl_coef=0.0, lam=lam)
    low, high = (
        trained(cfg, lambda prompts, replies: (offset + fours(prompts, replies)[0], {}))
        for offset in (0, 1000)
    )
    assert error(low[0], high[0]) < 1e-6
    for row, other in zip(low[1], high[1]):
        assert row["loss/value"] == pytest.approx(other["loss/value"], abs=1e-6)


def test_rounding_is_no_spread():
    """Returns of 0.1 each, whose mean is not 0.1 in floating point: the unit stays 1. Values that miss returns of
    1000.1 by what float32 rounds are right: no token has an advantage, which whitening would make one of 1."""
    _, _, rollout = experience()
    actor = P.Actor(tiny())
    P.compute_advantages(actor, rollout, torch.full((8,), 0.1, dtype=REAL), 0.0, settings_of())
    assert actor.unit == 1
    scores = torch.full((8,), 1000.1)
    cfg = settings_of(whiten_advantages=True)
    rollout.logprobs = rollout.logprobs.float()
    rollout.ref_logprobs = rollout.ref_logprobs.float()
    for miss, any_advantage in ((1e-4, False), (1e-2, True)):
        rollout.values = scores.unsqueeze(1) + miss * torch.randn(rollout.mask.shape)
        P.compute_advantages(actor, rollout, scores, 0.0, cfg)
        assert rollout.advantages.any() == any_advantage
    rollout.values = torch.randn(rollout.mask.shape)  # A + V is 0.7 up to rounding alone, and has a variance
    P.compute_advantages(actor, rollout, torch.full((8,), 0.7), 0.0, cfg)
    assert "val/explained_variance" not in P.rollout_metrics(rollout, scores)


def test_the_unit_is_the_largest_spread_of_returns_so_far():
    """An outlier widens it for good."""
    actor, _, rollout = experience()
    spreads = [actor.unit]
    for size in (9, 100, 9):
        P.compute_advantages(actor, rollout, size * torch.arange(8.0), 0.0, settings_of())
        spreads.append(rollout.sampled_returns[rollout.mask].std(correction=0))
        assert error(actor.unit, max(spreads)) < 1e-12


def test_equal_scores_move_nothing():
    """Whole numbers are scores too. V is their mean at once, so that no token has an advantage."""
    cfg = settings_of(num_updates=2, kl_coef=0.0, whiten_advantages=True)
    weights, _ = trained(cfg, lambda prompts, replies: (torch.full((8,), 3), {}))
    assert torch.equal(weights, weights_of(tiny()))


def test_without_a_reference_it_trains_like_beta_0():
    cfg = settings_of(num_updates=2, kl_coef=0.0)
    with_ref, rows = trained(cfg)
    without, others = trained(cfg, fours, False)
    assert torch.equal(with_ref, without)
    assert others == [{name: x for name, x in row.items() if name != "objective/kl"} for row in rows]
    with pytest.raises(ValueError, match="ref is None"):
        trained(settings_of(), fours, False)


def test_sample_and_loss_can_be_replaced():
    """An environment that writes the second tokens, with a score for each token, and a loss that is 0."""
    asked = []

    def sample(actor, prompts, stop_ids, cfg):
        asked.append((len(prompts), stop_ids))
        rollout = with_hole(P.sample_replies(actor, prompts, stop_ids, cfg))
        rollout.sampler_logprobs = rollout.sampler_logprobs.half()  # an engine's
        return rollout

    def each_token(prompts, replies):
        return torch.arange(48.0, requires_grad=True).view(8, 6), {"own": 99.0, "lr": 99.0}

    def loss(actor, batch, cfg):
        assert not batch.mask[:, 1:2].any()
        assert batch.rewards.dtype == REAL
        return 0 * P.ppo_loss(actor, batch, cfg)[0], dict.fromkeys(
            ("loss/mine", "objective/kl"), torch.tensor(99.0)
        )

    _, (metrics, _) = trained(settings_of(num_updates=2), each_token, sample=sample, loss=loss)
    assert asked == 2 * [(8, [STOP])]
    assert (metrics["loss/mine"], metrics["grad_norm"]) == (pytest.approx(99), 0)
    assert metrics["objective/kl"] < metrics["own"] == 99 > metrics["lr"]


def test_settings_that_do_not_fit_together_are_refused():
    """By the loop too, not by the command line alone."""
    with pytest.raises(ValueError, match="expected a multiple of 3"):
        trained(settings_of(num_mini_batches=3))


@pytest.mark.parametrize(
    "scores",
    [torch.ones(7), torch.ones(8, 1), torch.ones(8, 5), real([1, math.nan] * 4), real([math.inf] * 8)],
)
def test_scores_that_cannot_train_are_refused(scores):
    with pytest.raises(ValueError, match="score: expected finite numbers of shape"):
        trained(settings_of(), lambda prompts, replies: (scores, {}))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rollout: {"mask": rollout.mask + True},
        lambda rollout: {"present": rollout.mask},
        lambda rollout: {"query_mask": rollout.query_mask.cumsum(1) < 2},
        lambda rollout: {"query_mask": rollout.query_mask.cumsum(1) != 2},
        lambda rollout: {"sampler_logprobs": math.nan * rollout.sampler_logprobs},
        lambda rollout: vars(rollout.select(torch.arange(6))),
    ],
)
def test_a_rollout_that_is_none_is_refused(wrong):
    """A mask beyond the reply; a hole in it, padding behind and inside a prompt, by which `select` would lose tokens;
    a sampler's NaN; fewer replies than prompts."""

    def sample(*arguments):
        rollout = with_hole(P.sample_replies(*arguments))
        changes = wrong(rollout)
        rollout.mask = rollout.mask.cumprod(1) > 0  # nothing behind the hole
        return dataclasses.replace(rollout, **changes)

    with pytest.raises((ValueError, FloatingPointError), match="holes, `mask` within it|are NaN"):
        trained(settings_of(), sample=sample)


def test_a_policy_that_has_diverged_is_seen():
    actor, optimizer, progress = learner(settings_of())
    actor.lm.get_output_embeddings().weight.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="probabilities or values are NaN"):
        next(updates(actor, optimizer, progress, settings_of()))


def test_each_update_draws_other_replies_and_each_seed_too():
    """To the same prompt, by a policy that does not move."""
    replies = set()
    for seed in (1, 2):
        actor = P.Actor(tiny())
        optimizer = torch.optim.SGD(actor.parameters(), lr=0.0)
        cfg = settings_of(num_updates=2, seed=seed)
        for _, samples in P.ppo(actor, actor, optimizer, [Prompt([1])], fours, [STOP], cfg, Progress(0.05)):
            replies.add(str([reply for _, reply, _, _ in samples]))
    assert len(replies) == 4


def test_the_metrics_of_an_update_fit_together():
    """What is maximised is the score less β·KL, for the β of that update, which moves. objective/kl is Σ log π/π_ref
    whatever the penalty is estimated by."""
    _, rows = trained(settings_of(num_updates=3, kl_target=0.1, kl_horizon=100))
    for row in rows:
        expected = row["objective/scores"] - row["kl_coef"] * row["objective/kl"]
        assert row["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-9)
    for row, after in zip(rows, rows[1:]):
        beta = P.adaptive_kl_coef(row["kl_coef"], row["objective/kl"], 0.1, 100, 8)
        assert after["kl_coef"] == beta != row["kl_coef"]
    for kind in ("k2", "k3"):
        _, others = trained(settings_of(num_updates=1, kl_estimator=kind))
        assert others[0]["objective/kl"] == pytest.approx(rows[0]["objective/kl"], abs=1e-9)
        assert others[0]["objective/rlhf_reward"] != pytest.approx(rows[0]["objective/rlhf_reward"], abs=1e-3)


def test_an_update_is_timed_and_scored_and_in_warm_up_moves_the_critic_alone(monkeypatch):
    """Each of the four phases of an update, by a clock that goes on by 1. The score of a reply is the sum of those of
    its tokens, whatever stands past its end. In the first of three updates neither the policy nor β moves."""
    ticks = itertools.count()
    monkeypatch.setattr(P.time, "perf_counter", lambda: next(ticks))
    sums = []

    def score(prompts, replies):
        scores = torch.rand(8, 6)
        sums.append(fmean(float(row[: len(reply)].sum()) for row, reply in zip(scores, replies)))
        return scores, {}

    cfg = settings_of(num_updates=3, critic_warmup_updates=1, kl_target=0.1, kl_horizon=100)
    actor, optimizer, progress = learner(cfg)
    rows = [metrics for metrics, _ in updates(actor, optimizer, progress, cfg, score)]
    assert [{x for name, x in row.items() if name.startswith("time/")} for row in rows] == 3 * [{1}]
    assert {f"time/{name}" for name in ("generate", "reward", "evaluate", "update")} <= rows[0].keys()
    assert error([row["objective/scores"] for row in rows], sums) < 1e-6
    assert [abs(row["policy/approxkl"]) > 1e-9 for row in rows] == [False, True, True]
    assert rows[0]["kl_coef"] == rows[1]["kl_coef"] != rows[2]["kl_coef"]


def test_schedule():
    """Warm-up of one update, then the decay over the other three."""
    half = (1 + math.cos(math.pi / 3)) / 2
    shares = dict(constant=[0.5, 1, 1, 1], linear=[0.5, 1, 2 / 3, 1 / 3], cosine=[0.5, 1, half, 1 - half])
    for kind, expected in shares.items():
        cfg = settings_of(num_updates=4, warmup_updates=1, lr_scheduler_type=kind)
        assert error([P.schedule(update, cfg) for update in range(1, 5)], expected) < 1e-12


def test_each_group_of_the_optimizer_keeps_its_own_rate():
    """Times the schedule, however many there are. What has a rate of 0 stays."""
    cfg = settings_of(num_updates=2, batch_size=4, lr_scheduler_type="linear")
    actor, _, progress = learner(cfg)
    parts = [actor.value_head, actor.lm.transformer.h[0], actor.lm.transformer.h[1]]
    rates = [1e-2, 0.0, 3e-2]
    before = [weights_of(part) for part in parts]
    optimizer = torch.optim.AdamW([{"params": part.parameters(), "lr": lr} for part, lr in zip(parts, rates)])
    for share, (metrics, samples) in zip((1, 0.5), updates(actor, optimizer, progress, cfg)):
        assert metrics["objective/kl"] == pytest.approx(
            fmean(kl for *_, kl in samples)
        )  # of all four replies
        assert error([group["lr"] for group in optimizer.param_groups], [share * lr for lr in rates]) < 1e-12
        assert metrics["lr"] == share * 1e-2
    assert [torch.equal(weights_of(part), x) for part, x in zip(parts, before)] == [False, True, False]


def test_the_progress_is_complete_at_each_yield():
    """Stopped at each yield and begun anew from copies of progress, weights and optimizer, the loop does the same, bit
    for bit: with a schedule, a moving β, critic warm-up and more updates than the prompts last."""
    cfg = settings_of(
        num_updates=4, lr_scheduler_type="linear", critic_warmup_updates=1, samples_per_prompt=2
    )
    cfg = dataclasses.replace(cfg, kl_target=0.1, kl_horizon=100)
    actor, optimizer, progress = learner(cfg)
    uninterrupted = list(updates(actor, optimizer, progress, cfg))
    old = learner(cfg)
    for metrics, samples in uninterrupted:
        torch.manual_seed(99)  # what is left of the generators is not needed
        new = learner(cfg)
        for thing, before in zip(new[:2], old):
            thing.load_state_dict(before.state_dict())
        old = *new[:2], Progress(**vars(old[2]))
        old[0].train()  # as something between two updates may leave it
        its_metrics, its_samples = next(updates(*old, cfg))
        assert without_times(its_metrics) == without_times(metrics)
        assert its_samples == samples
    assert torch.equal(weights_of(actor), weights_of(old[0]))
    assert progress == old[2]
    assert progress.update == 4
    assert progress.kl_coef != cfg.kl_coef
    assert list(updates(actor, optimizer, progress, cfg)) == []


def test_each_epoch_visits_every_reply_once_in_a_new_order(monkeypatch):
    visited = watched(monkeypatch, P, "micro_batches", lambda rollout, index, *_: index.tolist())
    trained(settings_of(num_updates=2))
    orders = set()
    for first in (1, 3, 6, 8):  # the first call of an update is for the log-probabilities
        epoch = visited[first] + visited[first + 1]
        assert sorted(epoch) == list(range(8))
        orders.add(tuple(epoch))
    assert len(visited) == 10
    assert len(orders) == 4
    trained(settings_of(num_updates=2), lambda *arguments: (torch.rand(8) * 0 + fours(*arguments)[0], {}))
    assert visited[10:] == visited[:10]  # whatever a score draws


def test_prompts_are_drawn_pass_by_pass_and_each_gets_its_replies():
    """`samples_per_prompt` replies stand side by side; the first four are the samples. Four of seven an update."""
    batches = []

    def score(prompts, replies):
        batches.append([*zip(prompts, replies)])
        return fours(prompts, replies)

    cfg = settings_of(num_updates=7, samples_per_prompt=2)
    drawn = [prompt for update in range(1, 8) for prompt in P.draw_prompts(range(7), update, cfg)]
    assert drawn[::2] == drawn[1::2]
    passes = [drawn[start : start + 14 : 2] for start in range(0, 56, 14)]
    assert all(sorted(x) == list(range(7)) for x in passes)
    assert passes[0] != passes[1]
    assert P.draw_prompts(range(7), 1, dataclasses.replace(cfg, seed=2)) != drawn[:8]
    for _, samples in updates(*learner(cfg), dataclasses.replace(cfg, num_updates=2), score):
        assert [sample[:3] for sample in samples] == [
            (prompt, reply, reply.count(4) / len(reply)) for prompt, reply in batches[-1][:4]
        ]
    assert [prompt.ids[0] for batch in batches for prompt, _ in batch] == drawn[:16]


PART_ONE_ALONE = """
import copy
from transformers import GPT2Config, GPT2LMHeadModel

def score(prompts, replies):  # the share of token 5 in each reply
    return torch.tensor([reply.count(5) / len(reply) for reply in replies]), {}

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
ref = Actor(copy.deepcopy(model)).requires_grad_(False)
actor = Actor(model)
optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-3)
prompts = [Prompt([1, 2, 3]), Prompt([4])]
cfg = PPOConfig(num_updates=12, batch_size=32, response_length=8)
scores = []
for metrics, samples in ppo(actor, ref, optimizer, prompts, score, [0], cfg, Progress(cfg.kl_coef)):
    scores.append(metrics["objective/scores"])
"""


def test_part_one_can_be_copied_alone(monkeypatch):
    """What stands above the line is a file of its own, without tyro too. With it a dozen lines train a model: the
    mean score, a tenth at first, more than triples."""
    part_one, _ = SOURCE.split("Part I ends here -")
    alone = ModuleType("ppo")
    monkeypatch.setitem(sys.modules, "ppo", alone)
    monkeypatch.setitem(sys.modules, "tyro", None)
    exec(part_one + PART_ONE_ALONE, vars(alone))
    assert not hasattr(alone, "train")
    assert alone.scores[0] < 0.2
    assert fmean(alone.scores[-3:]) > alone.scores[0] + 0.25


# ---------------------------------------------------------------------------------- what the tests are made with

ENV = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE)}
CPU = torch.device("cpu")
LETTERS = "?abcdefghijklmnopqrstuvwxyz <>"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

SHAPE = dict(
    vocab_size=len(LETTERS),
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=STOP,
)
HEADS = dict(num_key_value_heads=1, head_dim=8)
WINDOW = HEADS | dict(sliding_window=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
EYES = SHAPE | dict(num_hidden_layers=1, image_size=8, patch_size=4)
FAMILIES = {  # of models: what their settings have besides
    "GPT2": {},
    "Llama": {},
    "Qwen3": HEADS,
    "Mistral": WINDOW,
    "Gemma3Text": WINDOW | dict(layer_types=["sliding_attention", "full_attention"]),
    "Phi3": dict(num_key_value_heads=1),
    "OPT": dict(ffn_dim=16, word_embed_proj_dim=4, init_std=0.4),  # its states are narrower than its layers
    "GPTNeoX": {},
    "Gemma2": WINDOW | dict(final_logit_softcapping=0.5),
    "Cohere": dict(num_key_value_heads=1, logit_scale=0.3),
    "Granite": dict(logits_scaling=5.0),
    "Mixtral": dict(num_key_value_heads=1, num_local_experts=4),
    "Gemma3": dict(text_config=SHAPE | WINDOW, vision_config=EYES),  # it also sees
    "Qwen3Moe": HEADS | EXPERTS,
    "Llama4Text": HEADS | dict(intermediate_size_mlp=16, num_local_experts=2),
}


def model_of(kind="GPT2", seed=0, head="ForCausalLM", **changes):
    """A random model of this kind."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | FAMILIES.get(kind, {}) | changes)
    return getattr(transformers, f"AutoModel{head}").from_config(config)


def letters(**special):
    """A tokenizer of one character a token."""
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", **special)


def put(folder, model, **special):
    """Save the model with its tokenizer."""
    model.save_pretrained(folder)
    letters(**special).save_pretrained(folder)
    return str(folder)


def worth(prompts, completions, **columns):
    """Of replies of the same length, no two are worth the same for long."""
    return [float(sum(map(ord, str(text))) % 10) for text in completions]


def interlude():
    """Tests put something here that happens each time that `answers` is asked."""


def answers(prompts, completions, completion_ids, answer, **columns):
    """A number for some replies, a list with it at the last token for others. Both replies to a prompt are here."""
    assert prompts[1::2] == prompts[:-1:2]
    interlude()
    torch.rand(1 + int(os.environ.get("RANK", 0)))  # other random numbers are left on each process
    told = [x + text.count("a") for x, text in zip(answer, completions)]
    return [[0.0] * (len(ids) - 1) + [x] if x % 2 else x for x, ids in zip(told, completion_ids)]


def at_call(monkeypatch, number, do):
    """Let something happen when `answers` is asked: -1 is the rehearsal, 0 the evaluation before, 1 update 1."""
    calls = itertools.count(-1)
    monkeypatch.setattr(sys.modules[__name__], "interlude", lambda: next(calls) == number and do())


FILES = {
    "letters.txt": "".join(f"{c}{c} {c}\n" for c in LETTERS[1:27]),
    "prompts.jsonl": "".join(f'{{"prompt": "{c} a", "answer": {ord(c) - 100}}}\n' for c in LETTERS[1:21]),
    "others.jsonl": "".join(f'{{"prompt": "{c} a", "answer": {ord(c) - 99}}}\n' for c in LETTERS[1:21]),
    "held_out.jsonl": 13 * '{"prompt": "a b", "answer": 1}\n',
    "bad.jsonl": '{"prompt": "a"}\n{"prompt": \n',
    "lacks.jsonl": '{"prompt": "a"}\n{"text": "a"}\n',
    "void.jsonl": '{"prompt": "a"}\n{"prompt": ""}\n',
    "empty.txt": "\n",
    "latin.txt": "a\n\xff\n",
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "a"}]}\n',
    "taken.jsonl": '{"prompt": "a", "completions": "b"}\n',
    "number.jsonl": '{"prompt": "a"}\n7\n',
    "broken.py": "import nothing_of_this_name\n",
    "exits.py": "import sys\nsys.exit()\n",
    "rewards.py": "def worth(prompts, completions, **columns): return [sum(map(ord, x)) % 10 for x in completions]\n",
    "other.py": "def zero(prompts, completions, **columns): return [0.0] * len(prompts)\n",
    "answers.py": "from test_ppo_llm import answers\n",
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with models, prompts and rewards, sound ones and wrong ones."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text, "latin-1")
    found = {
        "model": model_of(),
        "other": model_of(seed=1),
        "judge": model_of("Llama", head="ForSequenceClassification", num_labels=2),
        "scorer": model_of("Llama", head="ForSequenceClassification", num_labels=1),
        "mamba": model_of("Mamba"),
        "small": model_of(vocab_size=9),
    }
    for name, model in found.items():
        put(folder / name, model, pad_token="?")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(run):
    """The rows of metrics.jsonl without the times."""
    return [
        {name: x for name, x in row.items() if "time/" not in name} for row in lines(run / "metrics.jsonl")
    ]


def updates_of(run):
    return [row["update"] for row in metrics_of(run)]


def the_line(capsys):
    """The only line on stderr beside the progress bar."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert line.startswith("ppo_llm.py: ")
    return line


def quick(folder, **changes):
    """Settings of a run that takes a moment."""
    usual = dict(num_updates=1, batch_size=8, response_length=4, output_dir=f"{folder}/x", device="cpu")
    return Config(**usual | changes)


# ------------------------------------------------------------------------------------------------ the settings of a run

SOUND = "--model model --prompts letters.txt --reward rewards.py:worth --response-length 8 --num-updates 1"
BAD = {  # what is added to the sound command: what the one line says
    "--batch-size 4 --num-mini-batches 8": "batch_size 4: expected a multiple of 8",
    "--samples-per-prompt 3": "batch_size 128: expected a multiple of 12",
    "--kl-coef 0 --kl-target 6": "kl_target: expected with it a kl_coef above 0",
    "--gamma nan": "--gamma nan: expected a number in [0, 1]",
    "--device warp": "--device warp",
    "--output-dir rewards.py/x": "rewards.py/x: expected a new folder, or with --resume",
    "--output-dir model --model nowhere": "model: it exists; expected a new folder",
    "--resume nowhere": "--resume nowhere: expected the folder of a run",
    "--resume model": "--resume model: expected the folder of a run",
    # Models.
    "--model None": "prompts and rewards need a model: give --model too",
    "--model ./nowhere": "./nowhere as ",
    "--model judge": "judge as ModelForCausalLM: it holds no lm_head.weight",
    "--model mamba": "MambaForCausalLM",
    "--model small": "it has no token, or one that the model does not know",
    "--stop-token ab": "--stop-token ('ab',): expected each to be the text of one token of this tokenizer",
    # Prompts.
    "--prompts None": "there is no prompt to train on: expected --prompts FILE",
    "--prompts nowhere.txt": "the prompts nowhere.txt",
    "--prompts rewards.py": "the prompts rewards.py: expected .txt, a prompt a line, or .jsonl",
    "--prompts bad.jsonl": "a row with a prompt a line: line 2: ",
    "--prompts latin.txt": "the prompts latin.txt",
    "--prompts lacks.jsonl": "the prompt {'text': 'a'}: expected a text, or chat messages, under prompt",
    "--prompts void.jsonl": "the prompt {'prompt': ''}: expected a text",
    "--prompts chat.jsonl": "chat_template is not set",
    "--prompts taken.jsonl": "dict() got multiple values for keyword argument 'completions'",
    "--prompts number.jsonl": "the prompt {'prompt': 7}: expected a text, or chat messages, under prompt",
    "--prompts empty.txt": "the prompts empty.txt",
    "--eval-prompts empty.txt": "there is no prompt in it",
    "--response-length 61": "all 26 prompts have more than the 3 tokens that --response-length",
    # Rewards.
    "--reward rewards.py:missing": "--reward rewards.py:missing: expected FILE.py:FUNCTION: AttributeError",
    "--reward nowhere.py:f": "--reward nowhere.py:f: expected FILE.py:FUNCTION",
    "--reward broken.py:f": "--reward broken.py:f: expected FILE.py:FUNCTION: ModuleNotFoundError",
    "--reward exits.py:f": "--reward exits.py:f: expected FILE.py:FUNCTION: it called sys.exit()",
    "--reward-weights 1 --reward-weights 2": "as many --reward-weights",
    "--reward-weights nan": "finite --reward-weights",
    "--reward-weights 0": "as many --reward-weights or none, not all 0",
    "--reward-label x": "--reward-label: expected with it a --reward-model",
    "--reward-model model": "model as ModelForSequenceClassification: it holds no score.weight",
    "--reward-model judge": "--reward-label: expected one of LABEL_0, LABEL_1",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_refused_in_one_line(arguments, files, tmp_path, capsys, monkeypatch):
    """Exit status 2 before anything is written, and one line that says what; the traceback is in a file."""
    monkeypatch.chdir(files)
    assert P.main(f"{SOUND} --output-dir {tmp_path}/x {arguments}".split()) == 2
    line = the_line(capsys)
    assert BAD[arguments] in line
    assert Path(line.split("(traceback: ")[1][:-1]).read_text().startswith("Traceback")
    assert not (tmp_path / "x").exists()


WRONG = [
    (dict(reward="rewards.py:worth"), "--reward 'rewards.py:worth'", "is not a tuple"),
    (dict(batch_size="8"), "--batch-size '8'", "is not an instance of int"),
    (dict(kl_estimator="k4"), "--kl-estimator 'k4'", "is not any of"),
    (dict(reward_weights=("2", 1)), "--reward-weights ('2', 1)", "item 0 of tuple is neither"),
    (dict(resume=""), "--resume ''", "expected a text that is not empty"),
    (dict(batch_size=0), "--batch-size 0", "expected 1 or more"),
    (dict(save_every=-1), "--save-every -1", "expected 1 or more"),
    (dict(warmup_updates=-1), "--warmup-updates -1", "expected 0 or more"),
    (dict(lam=1.5), "--lam 1.5", "expected a number in [0, 1]"),
    (dict(temperature=0.0), "--temperature 0.0", "expected a number above 0"),
    (dict(learning_rate=float("inf")), "--learning-rate inf", "expected a number above 0"),
    (dict(kl_coef=-1.0), "--kl-coef -1.0", "expected a number of 0 or more"),
]


@pytest.mark.parametrize("changes, note, message", WRONG)
def test_a_setting_of_the_wrong_type_or_size_is_refused(changes, note, message):
    """From Python too, where no command line has looked at it."""
    with pytest.raises(Exception, match=re.escape(message)) as refusal:
        Config(**changes)
    assert refusal.value.__notes__ == [note]


MISTAKEN = {  # an argument of `train`: what is wrong with it
    "prompts": ["prompts.txt", {"prompt": ["a"]}, []],
    "eval_prompts": [["x" * 80]],
    "reward": ["rewards.py:worth", ["rewards.py:worth"], lambda **_: 0.0],
    "model": ["model", transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1))],
    "cfg": [{}, None],
}


@pytest.mark.parametrize(
    "name, i", [(name, i) for name, wrong in MISTAKEN.items() for i in range(len(wrong))]
)
def test_a_mistaken_argument_is_refused_before_the_run_begins(name, i, tmp_path):
    given = dict(
        cfg=quick(tmp_path), prompts=["a", "ab"], reward=worth, model=model_of(), tokenizer=letters()
    )
    with pytest.raises(Exception):
        P.train(**given | {name: MISTAKEN[name][i]})
    with pytest.raises(RuntimeError), torch.no_grad():
        P.train(**given)
    assert not [*tmp_path.iterdir()]
    P.train(**given)


@pytest.mark.parametrize("arguments", ["--batch-size x", "--kl-estimator k4", "--no-such-flag 1"])
def test_a_flag_or_a_value_that_does_not_exist_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        P.main(arguments.split())
    assert end.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


def test_every_flag_is_explained(capsys, monkeypatch):
    """--help says which flags to look at first, then has three groups, and names each flag with the sentence that
    stands beside it in the source, which says what None means."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        P.main(["--help"])
    shown = capsys.readouterr().out
    assert re.findall(r"(\w+) options", shown) == ["task", "ppo", "run"], shown
    flags = re.findall(r"^\W*--([\w-]+)", shown, re.M)
    words = " ".join(shown.replace("│", " ").split())
    for field in dataclasses.fields(Config):
        explained = re.search(rf"^    {field.name}: .*?  # (.*)$", SOURCE, re.M).group(1)
        assert flags.count(field.name.replace("_", "-")) == 1
        assert explained in words
        assert "None" not in str(field.type) or "None" in explained, field.name


USUAL = dict(model="model", prompts="letters.txt", reward=("rewards.py:worth",), device="cpu", num_updates=2)
USUAL |= dict(batch_size=8, response_length=6, learning_rate=0.01, cliprange=0.1, seed=3, kl_target=100.0)
EFFECTIVE = dict(  # each of these flags alone makes another run
    num_updates=3,
    batch_size=16,
    samples_per_prompt=2,
    response_length=5,
    temperature=0.7,
    seed=2,
    kl_coef=0.3,
    missing_eos_penalty=1,
    kl_estimator="k3",
    kl_target=None,
    kl_horizon=100.0,
    gamma=0.9,
    lam=0.5,
    whiten_advantages=False,
    num_ppo_epochs=1,
    num_mini_batches=2,
    learning_rate=3e-3,
    critic_lr=1e-3,
    lr_scheduler_type="cosine",
    warmup_updates=1,
    max_grad_norm=0.01,
    cliprange=0.01,
    cliprange_high=0.9,
    cliprange_value=1e-3,
    vf_coef=0.5,
    ent_coef=0.1,
    target_kl=1e-4,
    critic_warmup_updates=1,
    model="other",
    prompts="prompts.jsonl",
    reward=("other.py:zero",),
    reward_model=("scorer",),
    reward_weights=(2.0,),
    eval_prompts="prompts.jsonl",
    stop_token=("c",),
    dtype="bfloat16",
    critic="separate",
    eval_every=1,
)
INEFFECTIVE = dict(micro_batch_size=1, gradient_checkpointing=True, save_every=1, device="auto")
TOLD_ELSEWHERE = {"output_dir", "resume", "reward_label"}


@pytest.fixture(scope="module")
def run_with(files, tmp_path_factory):
    """Two small updates with some settings changed, which are made once: the metrics and the final weights."""
    folder = tmp_path_factory.mktemp("flags")
    counter = itertools.count()

    @functools.cache
    def run(**changes):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(files)
            run = P.train(Config(**USUAL | changes, output_dir=f"{folder}/x{next(counter)}"))
        return metrics_of(run), AutoModelForCausalLM.from_pretrained(run / "policy")

    return run


def test_no_flag_is_forgotten():
    flags = {field.name for field in dataclasses.fields(Config)}
    assert flags == EFFECTIVE.keys() | INEFFECTIVE.keys() | TOLD_ELSEWHERE


@pytest.mark.parametrize("flag", EFFECTIVE)
def test_no_flag_is_without_effect(flag, run_with):
    """On what is learned or logged."""
    metrics, _ = run_with(**{flag: EFFECTIVE[flag]})
    assert metrics != run_with()[0]


@pytest.mark.parametrize("flag", INEFFECTIVE)
def test_what_saves_memory_or_a_checkpoint_changes_nothing_else(flag, run_with):
    """But the rounding of float32, which Adam's first steps of 0.01 magnify."""
    metrics, policy = run_with(**{flag: INEFFECTIVE[flag]})
    for row, expected in zip(metrics, run_with()[0], strict=True):
        assert row == pytest.approx(expected, abs=5e-3)
    assert error(weights_of(policy), weights_of(run_with()[1])) < 5e-3


# -------------------------------------------------------------------------------------------------- prompts and rewards


def test_chat_prompts_and_columns_reach_rewards_as_in_trls_grpo(tmp_path):
    """Messages go through the chat template, without a second bos, and a text that has one gets no other. The reward
    gets the messages, the reply as a message, its ids, the reply with its special tokens, and each column, None where a
    row lacks it. A reward of None counts for nothing. The template gets the columns that are its own. A reward model is
    given no second bos either."""
    seen = []

    def reward(prompts, completions, completion_ids, raw_completions, answer, level, **columns):
        seen.extend(zip(prompts, completions, completion_ids, raw_completions, zip(answer, level)))
        return [x or 0 for x in answer]

    user = {"role": "user", "content": "hi"}
    begun = {"role": "assistant", "content": "ab"}
    rows = [
        {"prompt": [user], "answer": 3, "tools": [{"x": "y"}]},
        {"prompt": [begun, user], "answer": None, "level": "x", "chat_template_kwargs": {"mood": " gay"}},
        {"prompt": "plain", "answer": 1, "level": "y"},
        {"prompt": "<plain", "answer": 1, "level": "y"},
    ]
    tokenizer = letters(
        bos_token="<", eos_token="q", chat_template="{{ mood }}{{ tools[0].x if tools }}" + CHAT
    )
    bos = ("<", LETTERS.index("<"))  # which it puts before each text
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("< $0", special_tokens=[bos])
    cfg = quick(tmp_path, batch_size=60)
    task = P.prepare(cfg, rows, reward, model_of(), tokenizer)
    texts = {tokenizer.decode(prompt.ids) for prompt in task.prompts}
    assert texts == {"y<user>hi<assistant>", " gay<assistant>ab<user>hi<assistant>", "<plain"}
    (metrics,) = metrics_of(P.run_task(task))
    columns = {str(prompt): row for prompt, _, _, _, row in seen}
    assert columns == {str(row["prompt"]): (row["answer"], row.get("level")) for row in rows}
    for prompt, completion, ids, raw, _ in seen:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert completion == (text if isinstance(prompt, str) else [{"role": "assistant", "content": text}])
        assert raw == "".join(LETTERS[i] for i in ids)
    assert any(raw != completion for _, completion, _, raw, _ in seen if isinstance(completion, str))
    assert metrics["objective/scores"] == pytest.approx(5 / 4)
    put(tmp_path / "judge", model_of("Llama", head="ForSequenceClassification", num_labels=1))
    tokenizer.save_pretrained(tmp_path / "judge")
    first, second = P.load_reward_model(f"{tmp_path}/judge", CPU, cfg)(["<a", "a"], ["b", "b"])
    assert first == second


def test_a_chat_may_need_no_chat_template_and_a_prompt_must_not_be_over():
    """Tokenizers of mistral-common have another way. BERT's end each text with [SEP], behind which nothing follows."""
    tokenizer = letters()
    tokenizer.apply_chat_template = lambda messages, **options: [3, len(messages)]
    row = {"prompt": [{"role": "user", "content": "a"}]}
    assert P.encode(tokenizer, [row, row["prompt"]], 30, 60) == 2 * [Prompt([3, 1], row)]
    end = processors.TemplateProcessing("$0 >", special_tokens=[(">", 29)])
    tokenizer.backend_tokenizer.post_processor = end
    for over in "a", [{"role": "assistant"}]:
        with pytest.raises(ValueError, match="it is over"):
            P.encode(tokenizer, [{"prompt": over}], 30, 60)


def test_lines_of_a_text_are_prompts_as_they_stand(tmp_path):
    """With the spaces at their ends and all but the line breaks of files; without a byte order mark, or empty lines."""
    (tmp_path / "x.txt").write_bytes("\ufeff a \r\n\n \nb\u2028c\x0cd\n".encode())
    assert P.load_prompts(f"{tmp_path}/x.txt") == [" a ", "b\u2028c\x0cd"]


def test_prompt_and_reply_are_the_whole_text():
    """A decoder of Llama 2's kind drops the space before the first word of what it is given, and a reward model would
    read "wasgood". What a reply adds to half a character cannot be told, and a chat's reply is a message of its own:
    both are decoded alone."""
    words = "? <s> ▁it ▁was ▁good ly <0xC3> <0xA9>".split()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    spaces = decoders.Replace("▁", " ")
    strip = decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    for prompt, ids, reply, text in (
        ("it was", [1, 2, 3], [4, 5], " goodly"),
        ("it was", [2, 3], [1], ""),
        ([{"role": "user", "content": "it was"}], [1, 2, 3], [4, 5, 1], "goodly"),
        ("it\xc3", [2, 6], [7, 4], "\ufffd good"),
    ):
        assert P.reply_text(tokenizer, P.Prompt(ids, {"prompt": prompt}), reply) == text


@pytest.mark.parametrize("special, eos", [({}, None), (dict(pad_token="a", eos_token="a"), 1), ({}, [3, 4])])
def test_a_reply_ends_at_each_stop_token_and_nowhere_else(special, eos, tmp_path):
    """No EOS, a pad token equal to it, several: the token that ends a reply belongs to it. Each --stop-token adds one,
    or all that are the same text: `y` decodes to `z`. With an EOS that is no number nothing begins."""
    replies = []

    def reward(prompts, completion_ids, **columns):
        replies.extend(completion_ids)
        return [0.0] * len(prompts)

    lm = model_of(eos_token_id=eos)
    cfg = quick(tmp_path, batch_size=64, response_length=12, stop_token=("z", "x"), missing_eos_penalty=2.0)
    tokenizer = letters(**special)
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("y", "z"), decoders.Fuse()])
    task = P.prepare(cfg, ["ab", "c d"], reward, lm, tokenizer)
    replies.clear()
    (row,) = metrics_of(P.run_task(task))
    stops = {24, 25, 26, *(eos if isinstance(eos, list) else [eos])}
    ended = [reply[-1] in stops for reply in replies]
    assert all(
        not stops & set(reply[:-1]) and (end or len(reply) == 12) for reply, end in zip(replies, ended)
    )
    assert 0 < sum(ended) < 64 == len(replies)
    assert row["reply/ended"] == sum(ended) / 64
    assert row["objective/scores"] == 2 * (sum(ended) / 64 - 1)
    lm = model_of()
    lm.generation_config.eos_token_id = "z"
    with pytest.raises(TypeError):
        P.prepare(quick(tmp_path, output_dir=f"{tmp_path}/y"), ["a"], worth, lm, letters(eos_token="z"))


def test_held_out_prompts_are_not_trained_on(tmp_path, capsys):
    """One in ten of those that fit beside a reply of 4 tokens of 64, at most 64, drawn by the seed; never one alone,
    which has no standard error. With the others they are all of them."""
    for n, share in ((20, 0), (30, 2), (1000, 64)):
        texts = list(map("".join, itertools.product(LETTERS[1:], repeat=3)))[: n - 2] + [60 * "x", 61 * "x"]
        tasks = [
            P.prepare(
                quick(tmp_path, seed=seed, output_dir=f"{tmp_path}/{n} {i}"),
                texts,
                worth,
                model_of(),
                letters(),
            )
            for i, seed in enumerate((1, 1, 2))
        ]
        held_out, again, other = ([p.row["prompt"] for p in task.held_out] for task in tasks)
        assert len(held_out) == share
        assert held_out == again
        assert share == 0 or held_out != other
        assert sorted(held_out + [p.row["prompt"] for p in tasks[0].prompts]) == sorted(texts[:-1])
        assert capsys.readouterr().out.count(f"Dropped 1 of {n} prompts") == 3


def test_equal_prompts_are_not_held_out_beside_themselves(tmp_path):
    """Two of twenty different ones are, with all their copies."""
    for name, texts, held_out, left in (
        ("one", 100 * ["a"], 0, 100),
        ("twenty", 10 * list(LETTERS[1:21]), 2, 180),
    ):
        cfg = quick(tmp_path, output_dir=f"{tmp_path}/{name}")
        task = P.prepare(cfg, texts, worth, model_of(), letters())
        assert (len(task.held_out), len(task.prompts)) == (held_out, left)
        assert not {p.row["prompt"] for p in task.held_out} & {p.row["prompt"] for p in task.prompts}


def test_the_evaluation_is_of_all_held_out_prompts(tmp_path):
    """At least a batch of replies. Each metric is a mean over prompts with the standard error of that mean, where
    several replies to one prompt count as one; a reward of None counts for nothing. The same seed gives the same
    replies at each update. All other prompts are trained on."""
    held_out = [{"prompt": "a", "level": x} for x in (1.0, 2.0, None, 6.0)]
    rewards = [lambda level, **columns: level, worth]
    rewards[0].__name__ = "worth"  # two of one name
    # One reward with a weight must speak of each reply; this weight adds nothing.
    cfg = quick(tmp_path, reward_weights=(1.0, 1e-99))
    task = P.prepare(
        cfg, [{"prompt": x, "level": 0.0} for x in ("ab", "b")], rewards, model_of(), letters(), held_out
    )
    assert [prompt.row["prompt"] for prompt in task.prompts] == ["ab", "b"]
    metrics, samples = P.evaluate_held_out(task)
    for name, numbers in (("score", [1, 2, 0, 6]), ("rewards/worth", [1, 2, 6])):
        x = real(numbers)
        assert metrics[f"eval/{name}"] == pytest.approx(x.mean())
        assert metrics[f"eval/{name}_se"] == pytest.approx(x.std() / len(x) ** 0.5)
    P.seed_everything(1)
    replies = P.sample_replies(task.actor, 2 * task.held_out, task.stop_ids, cfg).replies()
    each = real(worth(8 * ["a"], [letters().decode(ids, skip_special_tokens=True) for ids in replies]))
    each = each.view(2, 4).mean(0)
    assert metrics["eval/rewards/worth_2"] == pytest.approx(each.mean())
    assert metrics["eval/rewards/worth_2_se"] == pytest.approx(each.std() / 2)
    assert [(prompt.row, score) for prompt, _, score, _ in samples] == [
        (row, row["level"] or 0) for row in held_out
    ]
    task.progress.update = 5
    assert P.evaluate_held_out(task) == (metrics | {"update": 5}, samples)


@pytest.mark.parametrize("name", ["sample_replies", "ppo_loss"])
def test_a_function_that_is_put_into_the_module_is_used(name, tmp_path, monkeypatch):
    task = P.prepare(quick(tmp_path), ["a"], worth, model_of(), letters())
    monkeypatch.setattr(P, name, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        P.run_task(task)


def test_an_environment_may_take_the_place_of_the_sampler(tmp_path, monkeypatch):
    """In the rehearsal too. Its replies end where it likes, and outside the mask it knows no probability."""
    sample = P.sample_replies

    def converse(actor, prompts, _, cfg):
        rollout = with_hole(sample(actor, prompts, [*range(15)], cfg))
        rollout.sampler_logprobs[~rollout.mask] = math.nan
        return rollout

    monkeypatch.setattr(P, "sample_replies", converse)
    P.train(quick(tmp_path, response_length=9), ["a", "bcd"], worth, model_of(), letters())


JUDGES = [("GPT2", None), ("Llama", 1), ("Llama", -1), ("Bert", 0), ("Roberta", 1)]


@torch.no_grad()
def judged_alone(model, text):
    """The last logit of the one text by the model's own forward. A text that is too long keeps its end: RoBERTa counts
    positions from 2."""
    room = 62 if model.config.model_type == "roberta" else 64
    return model(torch.tensor([letters()(text)["input_ids"][-room:]])).logits[0, -1].item()


@pytest.mark.parametrize("kind, pad", JUDGES)
@pytest.mark.parametrize("labels", [1, 3])
def test_a_reward_model_scores_each_text_as_if_alone(kind, pad, labels, tmp_path):
    """Batches of texts of mixed length; decoders with pad equal to a letter of the texts, or without a pad token, an
    encoder. Its weights are bfloat16, scores are not. The label picks one logit of several. A chat is read by the
    judge's own template."""
    names = {i: f"LABEL_{i}" for i in reversed(range(labels))}
    judge = model_of(kind, head="ForSequenceClassification", pad_token_id=pad, id2label=names).bfloat16()
    special = dict(pad_token=LETTERS[pad]) if pad in (0, 1) else {}
    folder = tmp_path / "judge"
    put(folder, judge, chat_template=CHAT, model_max_length=64 - 2 * (kind == "Roberta"), **special)
    path = folder / "config.json"  # where the labels need not stand in their order
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": names}))
    judge = type(judge).from_pretrained(folder, dtype=torch.float32)
    cfg = quick(tmp_path, reward_model=("x",), reward_label=names[labels - 1] if labels > 1 else None)
    reward = P.load_reward_model(str(folder), CPU, cfg)
    prompts = ["ab", "c", "what is ", "a", "cab", 40 * "x"]
    completions = ["a", "aaa", "zb", "", "bca", 60 * "y"]
    scores = reward(prompts, completions)
    own = [judged_alone(judge, prompt + completion) for prompt, completion in zip(prompts, completions)]
    assert error(scores, own) < 1e-5
    assert len(set(scores)) == 6
    assert reward.__name__ == "judge"
    chat = reward([[{"role": "user", "content": "hi"}]], [[{"role": "assistant", "content": "yes"}]])
    assert error(chat, [judged_alone(judge, "<user>hi<assistant>yes")]) < 1e-5


def test_rewards_in_files_of_one_name_are_each_their_own(files, tmp_path):
    """Even where a module of this name is already imported, or one of Python's."""
    for folder, name in (("a", "rewards"), ("b", "rewards"), ("b", "random")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(f"def score(**columns): return '{folder} {name}'\n")
    for folder, name in (("a", "rewards"), ("b", "rewards"), ("b", "random")):
        assert P.load_reward(f"{tmp_path}/{folder}/{name}.py:score")() == f"{folder} {name}"


def test_a_reward_may_import_what_is_beside_it_and_be_pickled(tmp_path):
    """As a pool of processes does with it and with what it makes. Its name may hold a dash."""
    (tmp_path / "beside_it.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Job: x: int\n"
    )
    (tmp_path / "my-reward.py").write_text("import beside_it\ndef score(x): return beside_it.Job(x)\n")
    score = P.load_reward(f"{tmp_path}/my-reward.py:score")
    assert pickle.loads(pickle.dumps(score)) is score
    assert pickle.loads(pickle.dumps(score(3))).x == 3


def vandal(prompts, completions, completion_ids, **columns):
    """Says what `worth` says, and leaves nothing as it was."""
    scores = worth(prompts, completions)
    for x in (prompts, completions, completion_ids, *columns.values()):
        for y in x:
            if isinstance(y, list):
                y += y
        x.clear()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    random.seed(0)
    os.chdir("/")
    return scores


def test_what_a_reward_does_to_its_arguments_and_to_torch_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = []
    for i, reward in enumerate((worth, functools.wraps(worth)(vandal))):
        cfg = quick(tmp_path, num_updates=3, output_dir=str(i))
        rows = [{"prompt": [{"role": "user", "content": x}], "list": ["x"]} for x in "abcd"]
        run = P.train(cfg, rows, [reward, worth], model_of(), letters(chat_template=CHAT))
        runs.append((metrics_of(run), lines(run / "samples.jsonl")))
    assert runs[0] == runs[1]
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_a_reward_may_give_a_number_for_each_token(tmp_path):
    """Numbers, lists, tensors and None mix; weights apply to all. A number for the whole reply, and the penalty for one
    that does not end, stand at its last token; the sums over tokens are logged. Trained on are these numbers."""

    def whole(prompts, **columns):
        return [1.0, None, torch.tensor(2.0, requires_grad=True), 3]

    def each(completion_ids, **columns):
        return [None, torch.arange(2), [0.5, 0.25, 4], 5.0]

    cfg = quick(tmp_path, batch_size=4, response_length=5, missing_eos_penalty=100.0)
    task = P.prepare(cfg, ["a", "b"], worth, model_of(), letters())
    task.rewards = [(whole, 2.0), (each, 10.0)]
    task.stop_ids = [9]
    prompts = [P.Prompt([1], {"prompt": "a"})] * 4
    replies = [[1, 9], [3, 9], [2, 2, 9], [4, 4, 4, 4]]
    scores, said = task.judge(prompts, replies)
    assert not scores.requires_grad
    assert scores.tolist() == [[0, 2, 0, 0, 0], [0, 10, 0, 0, 0], [5, 2.5, 44, 0, 0], [0, 0, 0, -44, 0]]
    assert [x.nan_to_num(-1).tolist() for x in said.values()] == [
        [1, 1, 1, 0],
        [1, -1, 2, 3],
        [-1, 1, 4.75, 5],
    ]
    assert task.score(prompts, replies)[1] == {
        "reply/ended": 0.75,
        "rewards/whole": 2.0,
        "rewards/each": pytest.approx(10.75 / 3),
    }
    task.rewards = [(lambda **columns: dict(enumerate([0.0] * 4)), 1.0)]
    with pytest.raises((TypeError, KeyError)):  # of Python 3.11, and of later ones
        task.judge(prompts, replies)
    task.rewards = [(lambda **columns: [1.0, 1.0, 1.0, None], 1.0), (lambda **columns: [1.0] * 4, 0.0)]
    with pytest.raises(ValueError, match="expected for each reply a reward"):
        task.judge(prompts, replies)
    for wrong in (math.nan, None, "x", [1.0]):
        task.rewards = [(lambda **columns: [0.0, 0.0, [0.0, wrong, 1.0], 0.0], 1.0)]
        with pytest.raises(Exception) as refusal:
            task.judge(prompts, replies)
        assert "with the reply" in "".join(refusal.value.__notes__)


@given(text=st.text(st.sampled_from("ab é€😀\n"), min_size=1, max_size=12), data=st.data())
def test_a_span_of_the_text_is_paid_at_the_token_that_completes_it(text, data):
    """By tokens of a byte, so that a character is up to four of them, with and without a space that is lost where a
    reply is decoded alone. A span that ends behind the text goes to the last token. Another text is refused, and an end
    outside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    ids = tokenizer(text)["input_ids"]
    ends = data.draw(st.dictionaries(st.integers(1, len(text)), st.integers(1, 9)))
    expected = [0.0] * len(ids)
    for end, score in ends.items():
        expected[len(text[:end].encode()) - 1] += score
    ids += data.draw(st.sampled_from([[], tokenizer("😀")["input_ids"][:2]]))  # cut off within a character
    expected += [0.0] * (len(ids) - len(expected))
    text = tokenizer.decode(ids)
    assert P.token_scores(tokenizer, text, ids, ends) == expected
    shifted = {end + 1: score for end, score in ends.items()}
    assert P.token_scores(tokenizer, " " + text, ids, shifted) == expected
    behind = P.token_scores(tokenizer, text, ids, {len(text) + 1: 2.0})
    assert behind == [0.0] * (len(ids) - 1) + [2.0]
    for wrong, end in ((text, 0), (text, len(text) + 2), (text + "x", 1), ([{"content": text}], 1)):
        with pytest.raises((ValueError, AttributeError)):
            P.token_scores(tokenizer, wrong, ids, {end: 1.0})


def test_a_reward_gets_all_replies_to_a_prompt_together(tmp_path, monkeypatch, capsys):
    """In the rehearsal and in training. A column that the held-out prompts lack, or they alone have, is None elsewhere;
    the mean over one of them has no standard error. The rehearsal's second step needs memory as all others do: AdamW
    has its moments by then, and a minibatch has no more replies."""
    levels = []
    sizes = watched(monkeypatch, P, "ppo_update", lambda _, __, ___, cfg, *more: cfg.micro_batch_size)
    moments = watched(monkeypatch, torch.optim.AdamW, "step", lambda x: len(x.state))

    def reward(prompts, level, own, **columns):
        assert {*zip(level, own)} <= {(1.0, None), (None, 2)}
        levels.extend(level)
        groups = [prompts[i : i + 4] for i in range(0, len(prompts), 4)]
        assert None in level or all(group == 4 * group[:1] for group in groups)
        return [0.0] * len(prompts)

    rows = [{"prompt": x, "level": 1.0} for x in ("a", "b", "abc")]  # the rehearsal is of "a" and "abc"
    cfg = quick(tmp_path, samples_per_prompt=4, response_length=9)
    P.train(cfg, rows, reward, model_of(), letters(), [{"prompt": "ab", "own": 2}])
    assert {*levels} == {1.0, None}
    assert moments[1] > moments[0] == moments[2] == 0
    assert sizes[0] == 2
    assert "score 0.00 ± nan" in capsys.readouterr().out


class Judge:
    async def __call__(self, prompts, completions, **columns):
        return worth(prompts, completions)


def test_rewards_may_be_asynchronous_and_objects(tmp_path):
    """All calls have one event loop, for the connections that a reward keeps. Where one runs already, as in a
    notebook, `train` has a thread of its own."""
    loops = set()

    async def later(prompts, completions, **columns):
        loops.add(asyncio.get_running_loop())
        return worth(prompts, completions)

    rewards = [worth, later, Judge()]
    run = asyncio.run(
        asyncio.to_thread(P.train, quick(tmp_path), ["a", "bc"], rewards, model_of(), letters())
    )
    (row,) = metrics_of(run)
    assert row["rewards/worth"] == row["rewards/later"] == row["rewards/Judge"] != 0
    assert len(loops) == 1


def test_a_reward_may_end_the_processes_that_it_starts(tmp_path):
    """Our signal handlers are not theirs."""

    def reward(prompts, **columns):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.1)
        child.terminate()
        child.join(20)
        return [float(child.exitcode)] * len(prompts)

    row = metrics_of(P.train(quick(tmp_path), ["a", "bc"], reward, model_of(), letters()))[0]
    assert row["rewards/reward"] == -signal.SIGTERM


GIVEN = {  # what a reward gives for the replies in update 2, and what the line says
    "one number for all": (lambda n: 1.0, "an answer to each of 12 replies, got 1.0: TypeError"),
    "too few": (lambda n: [0.0] * (n - 1), "expected a list, an answer to each of 12 replies, got [0.0, 0.0"),
    "text": (lambda n: ["much"] * n, "it gives 'much'"),
    "too large": (lambda n: [1e39] * n, "it gives 1e+39: expected a finite number"),
    "nan": (lambda n: [float("nan")] * n, "it gives nan: expected a finite number"),
    "infinite": (lambda n: [0.0] * (n - 1) + [float("inf")], "it gives inf: expected"),
    "too many tokens": (lambda n: [[0.0] * 9] * n, "it gives [0.0, 0.0"),
    "one token": (lambda n: [[1.0]] * n, "it gives [1.0]: expected a finite number"),
    "an error": (lambda n: [1 / 0], "ZeroDivisionError: division by zero"),
    "an exit": (lambda n: sys.exit(), "it called sys.exit()"),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_reward_that_fails_saves_the_run(given, files, tmp_path, capsys, monkeypatch, command, finished):
    """Exit status 1, and one line that names the reward, and the prompt and the reply of a wrong answer. The update
    before is kept, and the run goes on as if nothing had been once the reward is put right."""
    give, message = GIVEN[given]
    calls = itertools.count()
    sound = answers

    def fragile(prompts, **columns):
        return give(len(prompts)) if next(calls) >= 3 else sound(prompts=prompts, **columns)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "answers", functools.update_wrapper(fragile, answers))
        assert P.main(command(f"--output-dir {tmp_path}/x")) == 1
    line = the_line(capsys)
    assert line.startswith(
        "ppo_llm.py: (saved after update 1, with any steps of the next one; to go on: python ppo_llm.py --resume "
        f"'{tmp_path}/x' "
    )
    assert message in line
    assert bool(re.search("to the prompt '. a' with the reply '", line)) == message.startswith("it gives")
    if given == "an error":
        with open(files / "answers.py", "a") as file:
            file.write("# put right\n")
        assert P.main(["--resume", f"{tmp_path}/x"]) == 0
        assert outcome(tmp_path / "x") == outcome(finished)


def test_a_policy_that_diverges_does_not_replace_an_older_one(command, tmp_path, monkeypatch):
    """In update 4 the loss becomes NaN. The checkpoint stays that of update 2."""
    diverge = functools.partial(monkeypatch.setattr, P, "masked_whiten", lambda x, mask: math.nan * x)
    at_call(monkeypatch, 4, diverge)
    assert P.main(command(f"--output-dir {tmp_path}/x --save-every 2")) == 1
    assert torch.load(tmp_path / "x/checkpoint.pt")["progress"]["update"] == 2


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_kind_of_model_is_itself_and_trains(kind, tmp_path):
    """For each kind that people use, in float32 as it is trained: sampler (cached, left-padded), scorer and reference
    agree with the bare model's own forward on each reply alone. What an update saves loads, with other weights."""
    lm = model_of(kind).bfloat16()  # as the hub has them
    bare = copy.deepcopy(lm).float().eval()
    cfg = quick(
        tmp_path,
        response_length=6,
        learning_rate=1e-4,
        temperature=0.7,
        micro_batch_size=3,
        critic="separate" if kind == "OPT" else "shared",
    )
    task = P.prepare(cfg, ["a", "bcdefg", "ab", "c", "de", "fgh", "ijkl", "z"], worth, lm, letters())
    torch.manual_seed(0)
    rollout = P.sample_replies(task.actor, task.prompts, task.stop_ids, cfg)
    P.fill_logprobs_and_values(task.actor, task.ref, rollout, cfg)
    for i, reply in enumerate(rollout.replies()):
        own = alone(bare, task.prompts[i].ids, reply, 0.7)
        for said in (rollout.sampler_logprobs, rollout.logprobs, rollout.ref_logprobs):
            assert error(said[i, : len(reply)], own) < 1e-4
    (row,) = metrics_of(P.run_task(task))
    assert row["policy/ratio"] == pytest.approx(1, abs=0.3)
    assert row["policy/sampler_gap"] < 1e-5
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "x/policy")
    assert torch.equal(weights_of(saved), weights_of(lm))
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    assert 1e-5 < error(weights_of(lm), weights_of(bare)) < 1e-2


@pytest.mark.parametrize("kind", ["Mamba", "Bert", "Bart", "Roberta"])
def test_models_of_a_foreign_kind_are_refused(kind, tmp_path):
    """A recurrent state that left padding moves, encoders, a decoder that counts positions from 2: a refusal, not a
    wrong gradient."""
    with pytest.raises(Exception) as refusal:
        lm = model_of(kind, is_decoder=kind == "Roberta")
        P.prepare(quick(tmp_path), ["ab", "abcdef"], worth, lm, letters())
    assert kind in str(refusal.value.__notes__)
    assert not (tmp_path / "x").exists()


def test_a_sampler_that_is_off_is_refused(tmp_path, monkeypatch):
    """By three tenths of a nat, as a wrong cache may be."""
    decode = P.decode

    def off(*arguments):
        tokens, logprobs = decode(*arguments)
        return tokens, logprobs + 0.3

    monkeypatch.setattr(P, "decode", off)
    with pytest.raises(ValueError, match="a reply is another when padded or cached"):
        P.prepare(quick(tmp_path), ["a"], worth, model_of(), letters())


def test_rotary_factors_that_change_with_the_length_are_refused_where_they_would(tmp_path):
    """Where prompt and reply may cross the 16 tokens from which on they are others; where they cannot, it trains."""
    ropes = dict(rope_type="longrope", rope_theta=1e4, short_factor=4 * [1.0], long_factor=4 * [4.0])
    for length, sound in ((11, True), (14, False)):
        lm = model_of("Phi3", rope_parameters=ropes, original_max_position_embeddings=16)
        cfg = quick(tmp_path, response_length=length, output_dir=f"{tmp_path}/{length}")
        with (
            contextlib.nullcontext()
            if sound
            else pytest.raises(ValueError, match="a reply is another when padded")
        ):
            P.prepare(cfg, ["a", "bcdef"], worth, lm, letters())


def test_a_router_that_rounds_to_another_expert_is_trained(tmp_path):
    """In bfloat16 it may do so with a cache and not without, at single tokens."""
    cfg = quick(tmp_path, response_length=48, dtype="bfloat16")
    P.prepare(cfg, ["a"], worth, model_of("Qwen3Moe", num_hidden_layers=16), letters())


def test_a_policy_that_cannot_move_or_be_loaded_again_is_refused(files, tmp_path):
    """Frozen; not finite; with adapters, which are saved without their base. Of a reward model they are saved without
    its head, which would be random."""

    def refusal(lm):
        with pytest.raises(Exception) as refused:
            P.prepare(quick(tmp_path), ["a"], worth, lm, letters())
        assert not (tmp_path / "x").exists()
        return f"{refused.value} {refused.value.__notes__}"

    lm = model_of().requires_grad_(False)
    assert "no weight of the policy would move" in refusal(lm)
    lm.get_output_embeddings().weight[3] = math.nan
    assert re.search(r"are NaN or infinite.* \['in the rehearsal of GPT2LMHeadModel'\]", refusal(lm))
    peft = pytest.importorskip("peft")
    adapted = model_of("Llama")
    adapted.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    assert "the policy must load as it is, without adapters" in refusal(adapted)
    judge = P.load("ModelForSequenceClassification", files / "scorer")
    judge.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    judge.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it holds adapters"):
        P.load("ModelForSequenceClassification", tmp_path)


def test_a_compiled_policy_is_trained_and_saved_under_its_own_names(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch._dynamo.config, "recompile_limit", 1
    )  # not each length of the cache anew: it is slow
    lm = model_of()
    before = weights_of(lm)
    run = P.train(quick(tmp_path), ["a", "bc"], worth, torch.compile(lm, backend="eager"), letters())
    saved = weights_of(AutoModelForCausalLM.from_pretrained(run / "policy"))
    assert torch.equal(saved, weights_of(lm)) and not torch.equal(saved, before)
    task = P.prepare(
        quick(tmp_path, resume=str(run), num_updates=2),
        ["a", "bc"],
        worth,
        torch.compile(model_of(), backend="eager"),
        letters(),
    )
    assert len(task.optimizer.state) == 30
    rollout = P.sample_replies(task.actor, task.prompts, task.stop_ids, task.cfg)
    P.fill_logprobs_and_values(task.actor, torch.compile(task.ref, backend="eager"), rollout, task.cfg)


def test_a_checkpointed_layer_is_computed_again(tmp_path):
    """Once forward, once in the backward pass."""
    cfg = quick(tmp_path, gradient_checkpointing=True)
    actor, _ = P.make_actors(cfg, model_of(), torch.device("cpu"), torch.float32)
    batch = whole(replies_to(actor))
    calls = []
    actor.lm.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    actor(batch, 1.0)[0].sum().backward()
    assert len(calls) == 2


def test_models_as_the_hub_has_them_train(tmp_path):
    """A generation config with a temperature that greedy decoding ignores; a head that is zero at the start; weights in
    bfloat16, in which Gemma would round the factor of its embeddings, but not the policy that is saved in float32. The
    tokenizer is that of the model's folder."""
    lm = model_of("Gemma3Text", hidden_size=24, tie_word_embeddings=False)
    lm.get_output_embeddings().weight.data.zero_()
    put(tmp_path / "lm", lm.bfloat16())
    path = tmp_path / "lm/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.6}))
    lm = P.load("ModelForCausalLM", tmp_path / "lm")
    run = P.train(quick(tmp_path, learning_rate=1e-2), ["a"], worth, lm)
    saved = AutoModelForCausalLM.from_pretrained(run / "policy")
    assert saved.get_output_embeddings().weight.any()
    ids = torch.tensor([[1, 2, 3]])
    assert error(saved(ids).logits, lm(ids).logits) < 1e-6


def test_every_weight_is_in_one_group_and_none_decays(tmp_path):
    actor, _ = P.make_actors(quick(tmp_path, critic="separate"), model_of(), CPU, torch.float32)
    groups = P.make_optimizer(quick(tmp_path, learning_rate=1.0, critic_lr=2.0), actor).param_groups
    own = [p for name, p in actor.named_parameters() if not name.startswith("lm.")]
    assert [{*map(id, group["params"])} for group in groups] == [
        {*map(id, x)} for x in ([*actor.lm.parameters()], own)
    ]
    assert [(group["initial_lr"], group["weight_decay"]) for group in groups] == [(1, 0), (2, 0)]


def test_the_device_is_the_one_asked_for(tmp_path, monkeypatch):
    """In bfloat16 where CUDA has it, with products of float32 by TF32. Of several GPUs each process takes the one that
    torchrun gives it, when its memory is set."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        assert P.pick_device(quick(tmp_path, device="cuda"))[1] == torch.bfloat16
    assert torch.get_float32_matmul_precision() == "high"
    found = [P.pick_device(quick(tmp_path, device=name))[0].type for name in ("auto", "cpu")]
    assert found == ["meta", "cpu"]
    assert torch.get_float32_matmul_precision() == "highest"
    taken = []
    for owner, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "set_device", lambda i: taken.append((i, os.environ["PYTORCH_ALLOC_CONF"]))),
        (P.dist, "init_process_group", taken.append),
        (P.dist, "get_rank", lambda: 0),
        (P.atexit, "register", lambda *_: None),
    ):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    P.start_processes()
    assert taken == [(3, "expandable_segments:True"), "cpu:gloo,cuda:nccl"]


# -------------------------------------------------------------------------------------------------- the folder of a run

# A run with everything that has a state: a critic of its own, an adaptive β, a warm-up, a decaying learning rate. At
# ten times these rates Adam makes 1e-2 of a rounding error in a few updates.
STATEFUL = (
    "--device cpu --num-updates 6 --response-length 6 --batch-size 12 "
    "--num-mini-batches 2 --samples-per-prompt 2 --learning-rate 1e-3 --critic separate --critic-lr 3e-3 "
    "--kl-target 0.1 --kl-horizon 50 --critic-warmup-updates 2 --lr-scheduler-type linear --temperature 0.7 "
)


@pytest.fixture(scope="module")
def command(files):
    """The arguments of such a run, and more."""
    paths = f"--model {files}/model --prompts {files}/prompts.jsonl --eval-prompts {files}/held_out.jsonl "
    paths += f"--reward {files}/answers.py:answers"
    return lambda more: f"{paths} {STATEFUL} {more}".split()


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """That run, undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    assert P.main(command(f"--output-dir {folder}/x")) == 0
    assert len({row.get("kl_coef") for row in metrics_of(folder / "x")}) > 4  # there was a state to keep
    return folder / "x"


def outcome(run):
    """What must be the same of two runs, bit for bit: metrics, samples, and all weights at the end."""
    weights = torch.load(run / "checkpoint.pt")["actor"]
    return metrics_of(run), lines(run / "samples.jsonl"), {name: x.tolist() for name, x in weights.items()}


def assert_alike(run, other):
    """Two runs differ by rounding alone."""
    for row, expected in zip(metrics_of(run), metrics_of(other), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-4)
    policies = [weights_of(AutoModelForCausalLM.from_pretrained(x / "policy")) for x in (run, other)]
    assert error(*policies) < 1e-4


STOPS = [(signal.SIGINT, 1, ""), (signal.SIGTERM, 3, ""), (signal.SIGHUP, 3, "--micro-batch-size 1")]


@pytest.mark.parametrize("number, update, more", STOPS)
def test_a_signal_ends_after_the_update_and_a_resume_goes_on(
    number, update, more, command, finished, tmp_path, capsys, monkeypatch
):
    """Once: the update in hand is finished and logged, and the run saved. A resume goes on as if it had never stopped,
    and cuts off what a life after the checkpoint left behind."""
    run = tmp_path / "x"
    with monkeypatch.context() as patch:
        at_call(patch, update, lambda: signal.raise_signal(number))
        patch.setattr(P.logging.root, "handlers", [])  # pytest's
        assert P.main(command(f"--output-dir {tmp_path}/x")) == 130
    assert updates_of(run) == list(range(update + 1))
    shown = capsys.readouterr()
    assert "finishing the update in hand" in shown.err
    assert f"update {update}, to go on: python ppo_llm.py --resume '{run}' --num-updates 6" in shown.err
    for name in P.LOGS:
        with open(run / name, "a") as f:
            f.write('{"update": 9}\n{"upd')
    (run / "unfinished").mkdir()
    assert P.main(["--resume", str(run), *more.split()]) == 0
    assert_alike(run, finished)
    assert more or outcome(run) == outcome(finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number, command, finished, tmp_path, monkeypatch):
    """In the update that the first one came in, which is not finished. Then signals do again what they did, and a run
    without a checkpoint begins anew."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_call(patch, 2, lambda: [signal.raise_signal(number) for _ in range(2)])
        assert P.main(command(f"--output-dir {tmp_path}/x")) == 130
    assert signal.getsignal(number) == before
    assert updates_of(tmp_path / "x") == [0, 1]
    assert P.main(["--resume", f"{tmp_path}/x"]) == 0
    assert outcome(tmp_path / "x") == outcome(finished)


def test_a_terminal_that_is_gone_disturbs_no_update(monkeypatch):
    """It sends SIGHUP twice, and what is said of it cannot be written."""

    def write(text):
        raise BrokenPipeError

    monkeypatch.setattr(P.logging.root, "handlers", [])
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=write))
    with pytest.raises(KeyboardInterrupt), P.finish_on_signal("") as asked:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGINT):
            signal.raise_signal(number)
    assert len(asked) == 2


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with P.finish_on_signal(tmp_path) as asked:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert asked == []


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def files_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


REFUSED = {  # what is changed of a finished run: what the line says of it
    "": "run is complete: to go on, give a larger --num-updates",
    "--num-updates 8 --gamma 0.5 --lam 0.5": "--resume: not what the run began with: gamma, lam; only num_updates",
    "config.json /model /other": "--resume: not what the run began with: the model",
    "config.json prompts.jsonl others.jsonl": "--resume: not what the run began with: the prompts",
    "config.json seed seeds": "expected the folder of a run of this ppo_llm.py: TypeError",
    "checkpoint.pt": "checkpoint.pt: expected a whole checkpoint of this program",
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_changed_or_damaged_run_is_refused(change, copied, capsys):
    """Exit status 2, and nothing is changed on the disk."""
    flags = change.split() if change.startswith("--") else ["--num-updates", "8"] if change else []
    if change.startswith("config"):
        path = copied / "config.json"
        path.write_text(path.read_text().replace(*change.split()[1:]))
    elif change == "checkpoint.pt":
        path = copied / change
        path.write_bytes(path.read_bytes()[:9999])
    before = files_of(copied)
    assert P.main(["--resume", str(copied), *flags]) == 2
    assert REFUSED[change] in the_line(capsys)
    assert files_of(copied) == before


def test_only_the_process_with_the_lock_cuts_the_logs(copied, monkeypatch):
    """Another may come here before that one has found the folder in use. And a log that is gone is not padded."""
    (copied / "metrics.jsonl").unlink()
    assert P.main(["--resume", str(copied), "--num-updates", "7"]) == 0
    assert {*updates_of(copied)} == {7}
    cfg, begun = P.read_config(copied)
    (copied / "checkpoint.pt").unlink()
    before = files_of(copied)
    with monkeypatch.context() as patch:
        patch.setattr(P, "world", lambda: (1, 2))
        P.resume(SimpleNamespace(cfg=cfg, run=copied, progress=Progress(0.1)), begun)
    assert files_of(copied) == before


def test_a_list_that_is_given_takes_the_place_of_the_one_known(finished):
    """Of the run's, when its command is repeated, and of the demo's."""
    assert P.parse(["--resume", str(finished), "--reward", "x.py:f"]).reward == ("x.py:f",)
    assert P.parse("--reward-weights 0 --reward-weights 1".split()).reward_weights == (0, 1)


def test_what_a_run_began_with_is_known_by_its_bytes():
    """Weights in another order; columns. Not by the tokens, as a chat template may write the date."""
    begun = []
    lm = torch.nn.Linear(2, 1)

    def look(answer=1):
        prompts = [Prompt([len(begun)], {"prompt": "a", "answer": answer})]
        begun.append(P.fingerprint(lm, prompts))

    look()
    look()
    lm.weight.data = lm.weight.data.flip(1)
    look()
    look(2)
    assert begun[0] == begun[1]
    changed = [{name for name in old if old[name] != new[name]} for old, new in zip(begun[1:], begun[2:])]
    assert changed == [{"the model"}, {"the prompts"}]


def test_two_processes_do_not_write_into_one_run(copied, capfd):
    """The second is refused, and nothing is changed. What a user has put beside the run's files stays."""
    (copied / "checkpoint-backup.pt").write_bytes(b"mine")
    arguments = ["--resume", str(copied), "--num-updates", "7"]
    before = files_of(copied)
    at_work = subprocess.Popen([sys.executable, "-c", HOLDER, copied / "lock"], stdout=subprocess.PIPE)
    assert at_work.stdout.readline() == b"locked\n"
    assert P.main(arguments) == 2
    assert (
        f"{copied}: expected a new folder, or with --resume one in which no other run writes"
        in capfd.readouterr().err
    )
    assert files_of(copied) == before
    at_work.kill()
    at_work.wait()
    assert P.main(arguments) == 0
    assert (copied / "checkpoint-backup.pt").read_bytes() == b"mine"


HOLDER = """
import fcntl, sys, time
held = open(sys.argv[1], "w")
fcntl.lockf(held, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(99)
"""


def test_a_run_says_how_it_goes(tmp_path, capsys, monkeypatch):
    """Replies to held-out prompts, what they are worth, the share that ended, and where the policy is. `~` is home. A
    column with half an emoji, as data that was cut has it, is logged as it was. A long prompt hides no reply."""
    monkeypatch.setenv("HOME", str(tmp_path))
    run = P.train(
        quick(Path("~")),
        ["a"],
        worth,
        model_of(max_position_embeddings=999),
        letters(),
        [{"prompt": "bc", "tag": "é\ud83d"}, 900 * "d"],
    )
    assert run == tmp_path / "x"
    shown = capsys.readouterr()
    for update in (0, 1):
        assert f"Held-out, update {update}: score " in shown.out
    for row in lines(run / "samples.jsonl"):
        assert (f"  {row['prompt'][-200:]} | {row['reply'].strip()}" in shown.out) == row["held_out"]
    assert lines(run / "samples.jsonl")[0]["tag"] == "é\ud83d"
    assert re.search(r"score -?\d+\.\d\d, KL -?\d+\.\d, ended \d+%", shown.err)
    assert f"from_pretrained('{run}/policy')" in shown.out


def test_where_no_prompt_is_held_out_replies_of_training_are_shown(tmp_path, capsys):
    """Four each time."""
    P.train(quick(tmp_path, num_updates=3, eval_every=2), ["a"], worth, model_of(), letters())
    assert re.findall("Training, update (.)|  a [|]", capsys.readouterr().out) == ["2", *[""] * 4, "3", *[""] * 4]


# -------------------------------------------------------------------------------------- a device that is not the CPU
# Its tensors say "far:0", hold real numbers and compute on the CPU. A tensor of the CPU among them is an error, as on a
# GPU, and what makes the host wait for the device is counted by the function that asked.

WAITS = Counter()


def waiting(what):
    """Note that the function of ppo_llm.py that asked, at times through one of transformers, waits."""
    frame = sys._getframe(2)
    through = ""
    while frame is not None and frame.f_code.co_filename != P.__file__:
        if "transformers" in frame.f_code.co_filename and not through:
            through = f" < {frame.f_code.co_name}"
        frame = frame.f_back
    if frame is not None:
        WAITS[f"{frame.f_code.co_name}{through}: {what}"] += 1


class Far(torch.Tensor):
    """A tensor of the device. near: its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near):
        how = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        x = torch.Tensor._make_wrapper_subclass(cls, near.shape, device="far:0", **how)
        x.near = near
        return x

    def tolist(self):
        waiting("tolist")
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, *call):
        return computed(*call)


def computed(op, types, args=(), kwargs=None):
    """Every operation of torch comes here."""
    kwargs = kwargs or {}
    leaves = torch.utils._pytree.tree_leaves
    tensors = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    is_far = any(isinstance(x, Far) for x in tensors)
    device = str(kwargs.get("device") or "")
    if not is_far and not device.startswith("far"):
        return op(*args, **kwargs)
    name = op._schema.name.removeprefix("aten::")
    near_args, near_kwargs = torch.utils._pytree.tree_map(
        lambda x: x.near if isinstance(x, Far) else x, (args, kwargs)
    )
    if device.startswith("far"):
        near_kwargs["device"] = CPU
    to_cpu = name == "_to_copy" and device == "cpu"
    if name == "_to_copy" and not is_far:
        waiting("copied to the device")  # from memory that is not pinned
    elif any(not isinstance(x, Far) and x.ndim > 0 for x in tensors):
        raise AssertionError(f"{op}: a tensor of the CPU among those of the device")
    indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
    by_mask = any(x is not None and x.dtype == torch.bool for x in indices)
    if to_cpu or by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"):
        waiting(name)
    if name == "_fused_sdp_choice":
        return 0  # attention in its mathematical form
    out = op(*near_args, **near_kwargs)
    if to_cpu:
        return out
    for x, argument in zip(args, op._schema.arguments):  # what an operation in place has written to
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(x, torch.Tensor):
            return x
    given = {id(x) for x in leaves((near_args, near_kwargs))}
    return torch.utils._pytree.tree_map(
        lambda x: Far(x.clone() if id(x) in given else x) if isinstance(x, torch.Tensor) else x, out
    )


def far_away(lm):
    """The model on the device. What was tied stays tied."""
    moved = {}
    for module in lm.modules():
        for name, x in module._parameters.items():
            if x is not None:
                if id(x) not in moved:  # x is kept too, or another would get its id
                    moved[id(x)] = x, torch.nn.Parameter(Far(x.data.clone()))
                module._parameters[name] = moved[id(x)][1]
        for name, x in module._buffers.items():
            module._buffers[name] = x if x is None else Far(x.clone())
    return lm


def two_updates(kind, place):
    """The metrics of two updates, with a critic of its own."""
    actor = P.Actor(place(model_of(kind)), critic=place(model_of(kind, 1)))
    ref = P.Actor(place(model_of(kind))).requires_grad_(False)
    cfg = settings_of(num_updates=2, response_length=8, micro_batch_size=2)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    prompts = [Prompt([3 + i] * (1 + i % 5)) for i in range(16)]

    def score(prompts, replies):
        return torch.tensor([float(sum(reply)) for reply in replies]), {}

    updates = P.ppo(actor, ref, optimizer, prompts, score, [2, 5, 7], cfg, Progress(cfg.kl_coef))
    return [metrics for metrics, _ in updates]


def train_far_away():
    """What two updates there say less what they say on the CPU, and all waits, as JSON."""
    backend = type("Far", (torch.utils.backend_registration._DummyBackendModule,), {"_initialized": False})
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("far", backend())
    torch.autocast = lambda *args, **options: contextlib.nullcontext()
    dispatch = {"__torch_dispatch__": lambda self, *call: computed(*call)}
    mode = type("Machine", (torch.utils._python_dispatch.TorchDispatchMode,), dispatch)
    found = {}
    for kind in ("GPT2", "Qwen3"):
        here = two_updates(kind, lambda lm: lm)
        torch._C._set_only_lift_cpu_tensors(True)
        WAITS.clear()
        with torch.autograd.set_multithreading_enabled(False), mode():
            there = two_updates(kind, far_away)
        torch._C._set_only_lift_cpu_tensors(False)
        gap = max(
            abs(there[i][name] - x) / max(1, abs(x))
            for i in (0, 1)
            for name, x in here[i].items()
            if "time/" not in name
        )
        found[kind] = gap, WAITS.copy()
    print(json.dumps(found))


# Times that the host waits in an update of 8 replies of up to 8 tokens, in micro-batches of 2: 4 in the fill, 8 in the
# 4 steps. Copies from memory that is not pinned count, though they are short beside a micro-batch.
WAITS_AN_UPDATE = {
    "decode: copied to the device": 4,
    "decode: _local_scalar_dense": 2,  # whether all have stopped: every fourth token
    "sample_replies: _to_copy": 2,
    "select: copied to the device": 6 * 4 + 14 * 8,  # each field of the rollout that is filled by then
    "fill_logprobs_and_values: _to_copy": 4,
    "fit_returns: _local_scalar_dense": 2,
    "compute_advantages: _local_scalar_dense": 1,
    "ppo_update: tolist": 4,  # the statistics of a step
    "ppo_update: _local_scalar_dense": 4,  # its gradient norm
}


@pytest.mark.slow
def test_all_is_on_the_device_and_the_host_seldom_waits():
    """In a process of its own, as a device cannot be unregistered. transformers asks once a forward whether anything is
    padded, so once a token too: that wait is its own."""
    words = [sys.executable, "-c", f"import {__name__} as T; T.train_far_away()"]
    done = subprocess.run(words, cwd=HERE, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for gap, waits in json.loads(done.stdout).values():
        assert gap < 1e-4
        own = {name: n / 2 for name, n in waits.items() if name in WAITS_AN_UPDATE or " < " not in name}
        assert own == WAITS_AN_UPDATE
        assert 20 < sum(n for name, n in waits.items() if "_ignore_causal_mask_sdpa" in name) / 2 < 70


# ---------------------------------------------------------------------------------------------------- several processes


def torchrun(count, function, *folders):
    """Call a function of this file in several processes: exit status and stderr."""
    code = f"import sys, {__name__} as T; sys.exit(T.{function.__name__}(*{[*map(str, folders)]}))"
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--no-python"]
    words = [sys.executable, *words, sys.executable, "-c", code]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def in_two_processes(arguments, folder):
    """A refused run, one that a signal to one process stops, resumes of it and of one that one process saved, and a run
    whose reward fails on one process. Where no folder is given all agree on one."""
    torch.set_num_threads(1)
    os.chdir(folder)
    arguments = arguments.split()
    places = [None, None]
    P.dist.all_gather_object(places, P.prepare(P.parse([*arguments, "--output-dir", "None"])).run)
    assert places[0] == places[1]
    assert P.main([*arguments, "--batch-size", "6"]) == 2
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, 3, lambda: rank and signal.raise_signal(signal.SIGTERM))
        assert P.main(arguments) == 130
    for run in ("x", "alone"):
        assert P.main(["--resume", f"{folder}/{run}"]) == 0
    at_call(pytest.MonkeyPatch(), 2, lambda: 1 / (1 - rank))
    return P.main([*arguments, "--output-dir", f"{folder}/failed"])


def in_three_processes(folder):
    torch.set_num_threads(1)
    return P.main(["--resume", f"{folder}/alone"])


@pytest.fixture
def half(command, tmp_path, monkeypatch):
    """A run that one process stopped after its third update."""
    with monkeypatch.context() as patch:
        at_call(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert P.main(command(f"--output-dir {tmp_path}/alone")) == 130
    return tmp_path


@pytest.mark.slow
def test_two_processes_do_what_one_does(command, finished, half, monkeypatch):
    """The same run up to rounding; one process goes on with what two saved, and two with what one saved. A reward that
    fails on one of them ends both with one line."""
    arguments = command(f"--output-dir {half}/x")
    status, err = torchrun(2, in_two_processes, " ".join(arguments), half)
    assert status == 1
    assert len(re.findall("ppo_llm.py: rewards/answers, .*: ZeroDivisionError: division by zero", err)) == 1
    assert updates_of(half / "failed") == [0, 1]
    for name in ("x", "alone"):
        assert_alike(half / name, finished)
    assert P.main(["--resume", f"{half}/x", "--num-updates", "7"]) == 0
    assert updates_of(half / "x")[-2:] == [7, 7]


@pytest.mark.slow
def test_three_processes_go_on_with_what_one_saved(finished, half):
    status, err = torchrun(3, in_three_processes, half)
    assert status == 0, err
    assert_alike(half / "alone", finished)


# ---------------------------------------------------------------------------------------- the demo, README and the rest


def test_the_demos_model_and_its_training_follow_the_seed():
    def weights(seed):
        P.seed_everything(1)  # of the initial weights
        return weights_of(P.demo_task(seed, steps=2)[0])

    first, again, other = map(weights, (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("given", ["prompts", "eval_prompts", "reward"])
def test_without_a_model_only_the_demo_runs(given, tmp_path):
    with pytest.raises(ValueError, match="need a model: give --model too"):
        P.train(quick(tmp_path), **{given: ["a"]})


def test_import_has_no_side_effects(tmp_path):
    """Importing takes no transformers (slow to start), writes nothing, prints nothing."""
    code = "import sys, ppo_llm; print([name for name in ('transformers', 'tyro') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert (done.stdout, done.stderr, [*tmp_path.iterdir()]) == ("[]\n", "", [])


def test_requirements_and_inline_metadata_agree():
    """The same ranges; the tests alone add pytest and hypothesis."""
    needs = re.search(r"^# dependencies = (.*)$", SOURCE, re.M).group(1)
    both = (HERE / "requirements.txt").read_text().split()
    assert both[:3] == json.loads(needs)
    assert [re.match(r"\w+", name).group() for name in both[3:]] == ["pytest", "hypothesis"]


def test_readme_names_only_what_exists():
    """Every flag and every test in it; and it is short enough to be read."""
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)}
    others = {"--nproc-per-node", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= flags | others
    assert set(re.findall(r"`(test_\w+)`", README)) <= set(re.findall(r"def (test_\w+)", tests))
    assert len(README.encode()) <= 16 * 1024


def test_readme_commands_and_code_run(tmp_path, monkeypatch):
    """Every block of Python and every command with a model, word for word but for tiny models in place of the hub's and
    fewer updates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    for name in set(re.findall(r"(?:--model |model=\"|from_pretrained\(\")(\w[\w./-]*)", README)):
        put(tmp_path / name, model_of("Llama", max_position_embeddings=512), pad_token="?")
    for name in set(re.findall(r"--(?:eval-)?prompts ([\w.]+)", README)):
        text = (
            '{"prompt": "it is", "answer": "7", "lines": ["a"]}\n' if name.endswith("l") else "the film was\n"
        )
        (tmp_path / name).write_text(20 * text)
    blocks = re.findall(r"```python\n(?:# (\w+\.py)[^\n]*\n)?(.*?)```", README, re.S)
    for file, code in blocks:
        if file:
            (tmp_path / file).write_text(code)
    for words in re.findall(r"^ *(?:torchrun .*?|python )ppo_llm.py (--model .*)$", README, re.M):
        shutil.rmtree("runs/NAME", ignore_errors=True)
        flags = f"{words.split('#')[0]} --num-updates 1 --batch-size 8 --output-dir runs/NAME"
        assert P.main(flags.split()) == 0
    for file, code in blocks:
        if not file:
            exec(re.sub(r"num_updates=\d+", "num_updates=1", code), {"__name__": "readme"})


def test_published_numbers_are_those_of_the_rows():
    """Tables and sentences of the README and the pages under runs/reference, computed again."""
    done = subprocess.run(
        [sys.executable, "runs/reference/audit.py"], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------- scripts that take long


@pytest.fixture(scope="session", autouse=True)
def printed(request, tmp_path_factory):
    """What a script prints. Those of all tests that were selected run two at a time, each with one thread, from the
    beginning of the session on, beside the other tests."""

    def run(script):
        words = [sys.executable, *script.replace("TMP", str(tmp)).split()]
        return subprocess.run(words, cwd=HERE, env=ENV | {"COLUMNS": "80"}, capture_output=True, text=True)

    def wait(script):
        done = runs[script].result()
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tmp = tmp_path_factory.mktemp("scripts")
    scripts = [x.callspec.params["script"] for x in request.session.items if "script" in x.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        runs = {script: pool.submit(run, script) for script in scripts}
        yield wait
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["ppo_llm.py --output-dir TMP/demo"])
def test_the_demo_improves_and_leaves_what_it_promises(script, printed):
    """As a user runs it: the held-out score rises by more than 2 and the reviews stay fluent."""
    out = printed(script)
    assert re.search("Held-out, update 20: score .*, fluency ", out)
    assert max(len(line) for line in out.splitlines() if " | " not in line) <= 120
    run = Path(re.search("from_pretrained\\('(.*)/policy'", out)[1])
    before, *_, after = metrics_of(run)
    assert after["eval/score"] > before["eval/score"] + 2
    assert after["eval/rewards/fluency"] > 0.8
    assert before["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert {"update", "prompt", "reply", "score", "kl"} <= set(lines(run / "samples.jsonl")[0])
    policy = AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()
    trained = torch.load(run / "checkpoint.pt")["actor"]
    assert all(torch.equal(x, trained[f"lm.{name}"]) for name, x in policy.items())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["runs/reference/bench/kill.py 10"])
def test_killed_at_random_moments_a_run_ends_as_if_never_disturbed(script, printed):
    """Ten times; runs/reference/bench/kill.py does it as often as one likes."""
    assert re.fullmatch(r"killed 10 times, \d+ of them in a save: the same at the end\n", printed(script))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["runs/reference/bench/gpu.py --tiny"])
def test_the_script_for_a_gpu_runs_on_a_cpu(script, printed):
    """What can be tried of it here: on a GPU each line is a figure."""
    rows = {row["what"]: row for row in map(json.loads, printed(script).splitlines())}
    for kind in ("124M", "1.5B"):
        assert rows[f"static_decode {kind}"]["sampler_gap"] < 0.02
        assert rows[f"bfloat16 {kind}"]["gradient_cosine_to_float32"] > 0.99
    assert rows["demo bfloat16"]["updates"] == 3


RECIPES = {  # what each prints; what must hold of the numbers in that
    "runs/reference/recipes/tools.py": (
        r"right ([\d.]+), calls ([\d.]+)",
        lambda x: x[-1][0] > 0.6 > 0.4 > x[0][0] and x[-1][1] > 0.7,
    ),
    "runs/reference/recipes/dense.py": (
        r"first ([\d.]+), mean ([\d.]+), last ([\d.]+)",
        lambda x: x[1][1] > x[0][1] > x[0][0] + 0.2,
    ),
    "runs/reference/recipes/grpo.py": (
        r"score ([\d.]+) to ([\d.]+), KL ([\d.]+)",
        lambda x: min(x[0][1], x[1][1]) > 0.7 and x[0][2] < x[1][2],
    ),
    "runs/reference/recipes/q_critic.py": (r"score ([\d.]+)", lambda x: x[-1][0] > 0.7 > 0.5 > x[0][0]),
    "runs/reference/recipes/lora.py TMP/lora": (r"score ([\d.]+)", lambda x: x[-1][0] > x[0][0] + 0.2),
    "runs/reference/recipes/engine.py": (
        r"score ([\d.]+), gap ([\d.e-]+)",
        lambda x: min(x[11][0], x[-1][0]) > x[0][0] + 0.2 and x[11][1] < 1e-5 and x[-1][1] > 0.1,
    ),
    "runs/reference/recipes/reward_training.py TMP/rewards": (
        r"reward (-?[\d.]+), sentiment (-?[\d.]+)\n",
        lambda x: x[-1][0] > x[0][0] + 0.5 and x[-1][1] + 0.2 < max(y for _, y in x) > x[0][1] + 0.5,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", RECIPES)
def test_a_recipe_learns(script, printed):
    """As its first lines say, from the top of the repository."""
    if "lora" in script:
        pytest.importorskip("peft")
    pattern, holds = RECIPES[script]
    out = printed(script)
    numbers = [[*map(float, found.groups())] for found in re.finditer(pattern, out)]
    assert holds(numbers), out


@pytest.mark.slow
def test_memory_is_counted_without_a_gpu():
    """Policy and reference are twice the parameters, gradients and Adam's moments three times, in float32."""
    code = "import memory; memory.SHAPE |= dict(num_hidden_layers=2); memory.measure(1, True)"
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, cwd=HERE / "runs/reference/bench", env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, trained, passing, _, before = map(float, done.stdout.split("|")[3:8])
    assert abs(weights - 2 * 4 * 0.3269) < 0.05 and abs(trained - 1.5 * weights) < 0.1
    logits = 3 * 448 * 151936 * 4 / 1e9
    assert logits < passing < logits + 2
    assert weights + trained * 2 / 3 + 2 * logits < before + 0.2


def test_the_reference_of_lora_is_the_base_and_all_that_is_saved_is_the_policy(tmp_path):
    """With adapters that are not 0 any more: the reference says what the bare base says, which has not moved and may be
    bfloat16. peft loads the adapters, and merged into the base they are the policy."""
    peft = pytest.importorskip("peft")
    from lora import adapted, reference

    base = model_of("Llama")
    put(tmp_path / "base", base)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, actor = adapted(loaded)
    cfg = settings_of()
    for name, weight in actor.lm.named_parameters():
        assert weight.requires_grad == ("lora_" in name)
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    rollout = P.sample_replies(actor, random_prompts(LENGTHS), [STOP], cfg)
    P.fill_logprobs_and_values(actor, reference(model, actor), rollout, cfg)
    model.save_pretrained(tmp_path / "adapters")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    merged = copy.deepcopy(again).merge_and_unload()
    for prompt, reply, said in each_reply(rollout):
        assert error(said.ref_logprobs, alone(base, prompt, reply)) < 1e-4
        for lm in (again, merged):
            assert error(said.logprobs, alone(lm, prompt, reply)) < 1e-4
    assert error(rollout.logprobs, rollout.ref_logprobs) > 0.1
    bfloat = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))[1]
    assert {weight.dtype for weight in bfloat.parameters() if weight.requires_grad} == {torch.float32}
    assert bfloat.lm.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_engine_is_corrected(kind):
    """Replies by an older policy μ, each weighted by μ's probability. With the correction the expected gradient is that
    of the surrogate, PPO eq. 6, for the policy that sampled: Σ_y μ(y) Σ_t π/μ(y_t)·A_t. Without it, it is another."""
    from engine import corrected_loss

    cfg = settings_of(lam=0.7, gamma=0.9, kl_coef=0.3, vf_coef=0.0)
    actor = tiny_actor(kind, 3)
    older = tiny_actor(kind, 3)
    for p in older.lm.parameters():
        p.data += 0.01 * torch.randn(p.shape, dtype=REAL, generator=torch.Generator().manual_seed(1))
    rollout, scores, _ = language(actor, tiny_actor(kind, 3, 9), [1, 3], cfg, False, False)
    rollout.advantages /= rollout.logprobs.sum(1, keepdim=True).exp()
    stale = dataclasses.replace(rollout, logprobs=None)
    P.fill_logprobs_and_values(older, None, stale, cfg)
    rollout.sampler_logprobs = stale.logprobs
    rollout.advantages *= stale.logprobs.sum(1, keepdim=True).exp()
    got, plain = (
        gradients(loss(actor, whole(rollout), cfg)[0], actor.lm) for loss in (corrected_loss, P.ppo_loss)
    )
    surrogate = 0.0
    for prompt, reply, said in each_reply(rollout):
        ratio = (alone(actor.lm, prompt, reply) - said.sampler_logprobs).exp()
        surrogate += (ratio * said.advantages).sum() / rollout.mask.sum()
    expected = gradients(-surrogate, actor.lm)
    assert error(got, expected) < EXACT[kind]
    assert error(plain, expected) > 1e-3


@pytest.mark.parametrize("divide", [False, True])
def test_scores_of_a_group_are_centered(divide):
    from grpo import in_groups

    replies = [[4 * (i % 3 > 0) + (i == 3)] for i in range(16)]
    scores, metrics = in_groups(None, replies, divide)
    plain = real([float(reply[0] % 4 == 0) for reply in replies]).view(2, 8)
    for got, group in zip(scores.view(2, 8), plain):
        expected = group - group.mean()
        assert error(got, expected / (group.std(correction=0) + 1e-4) if divide else expected) < 1e-6
    assert metrics == {"score": pytest.approx(float(plain.mean()))}


# --------------------------------------------------------------------------------------------------- the museum of bugs
# Mistakes that others shipped, most of them for years and under green tests, with the project or its issue in brackets,
# and slips of the kind, without. An exhibit is a function, the code that is right, the code that was shipped, and a
# property from above that must then fail.


def edited(name, old, new):
    """The function NAME of the module, or CLASS.NAME, with a part of its source replaced."""
    node = ast.parse(SOURCE)
    for part in name.split("."):
        (node,) = (x for x in node.body if getattr(x, "name", None) == part)
    start = min(x.lineno for x in [node, *node.decorator_list])
    source = textwrap.dedent("\n".join(SOURCE.splitlines()[start - 1 : node.end_lineno]))
    assert source.count(old) == 1, f"{name} has changed: {old!r}"
    defined = {}
    exec("from __future__ import annotations\n" + source.replace(old, new), vars(P), defined)
    return defined[node.name]


OWN = test_every_logprob_is_the_models_own, "gpt2", 0.5
STILL = test_with_learning_rate_0_nothing_moves, "gpt2", False
MUSEUM = {
    # Masks and log-probabilities
    "token != pad as the mask where pad is EOS: EOS is never trained on (trl#6357)": (
        "response_mask",
        "stops_before == 0",
        "(stops_before == 0) & (responses != (stop_ids + [-1])[0])",
        test_response_mask_is_a_naive_loop,
    ),
    "attention where token != pad: what holds the pad token is not seen whole (trl#6357)": (
        "Actor.forward",
        "F.pad(batch.query_mask, (0, T), value=True)",
        "ids != 0",
        *OWN,
    ),
    "left padding without position_ids: GPT-2 counts the padding, and every logit moves (OpenRLHF#217)": (
        "Actor.run",
        "position_ids=positions, ",
        "",
        *OWN,
    ),
    "sampled at one temperature, scored at another: no ratio is ever 1 (trlX; OpenRLHF#853)": (
        "decode",
        "[:, -1] / temperature",
        "[:, -1]",
        *OWN,
    ),
    "logits that stay in the type of matrix products: noise in ratio, KL and entropy (MiniMax-M1)": (
        "Head.forward",
        "torch.autocast(states.device.type, enabled=False)",
        "torch.enable_grad()",
        test_logits_are_not_rounded_to_bfloat16,
    ),
    "replies as text, encoded again: two spellings of a text are two token sequences": (
        "fill_logprobs_and_values",
        "outputs = [*",
        "batch.responses[batch.responses == 6] = 4; outputs = [*",
        *STILL,
    ),
    "dropout in the update: the ratio is not 1 before the first step, and never the same twice": (
        "Actor.run",
        "return model(",
        "return model.train()(",
        *STILL,
    ),
    # Rewards and KL
    'abs() against a "negative KL": what draws back to the reference is punished too (trl#486, trl#1161)': (
        "kl_estimate",
        '"k1": d',
        '"k1": d.abs()',
        test_kl_estimators_are_unbiased_by_enumeration,
    ),
    "k3 as e^d - 1 - d, from the inverted ratio: for the policy's own samples it is neither KL (rlhf-book)": (
        "kl_estimate",
        "torch.expm1(-d) + d",
        "torch.expm1(d) - d",
        test_kl_estimators_are_unbiased_by_enumeration,
    ),
    # Advantages, whitening and the critic
    "the score one past EOS, and GAE through that cell: EOS gets λR, a reply that was cut off R (TRL, torchtune)": (
        "compute_advantages",
        "mask = rollout.mask\n",
        "mask = F.pad(rollout.mask, (1, 0), value=True)[:, :-1]\n",
        test_garbage_in_the_padding_changes_no_step_and_no_metric,
        False,
    ),
    "what the critic says of padding bootstrapped into the last token (ROLL#447)": (
        "gae",
        "torch.where(mask[:, t], values[:, t], next_value)",
        "values[:, t].nan_to_num()",
        test_gae_is_its_definition,
    ),
    "V after a token as the baseline of that token: the gradient is biased, whatever the critic": (
        "Actor.forward",
        ".to(self.real)).squeeze(-1)",
        ".to(self.real)).squeeze(-1).roll(-1, 1)",
        test_expected_ppo_gradient_is_the_policy_gradient,
        *ON_POLICY[0],
    ),
    "whitening that adds the mean again: advantages are never centred (torchtune)": (
        "masked_whiten",
        "centered / std)",
        "x / std)",
        test_masked_mean_and_whitening,
    ),
    "whitening by the moments of padding too: the result depends on how far the batch is padded (minRLHF)": (
        "masked_whiten",
        "masked_mean(centered**2, mask)",
        "(centered**2).mean()",
        test_masked_mean_and_whitening,
    ),
    # Losses and steps
    "each micro-batch by its own mean: the gradient depends on how the step was cut (verl#5625, minRLHF)": (
        "ppo_update",
        "(share * mean).backward()",
        "mean.backward()",
        test_any_partition_into_micro_batches_is_the_same_update,
        1,
        False,
    ),
    "mini-batches that add no step (trl#5645)": (
        "ppo_update",
        ".chunk(cfg.num_mini_batches)",
        ".chunk(1)",
        *STILL,
    ),
    "early stop after the backward pass, its gradients left for the next step (minRLHF)": (
        "ppo_update",
        "    actor.zero_grad()  # gradients would take memory while the next replies are sampled\n    return",
        "    return",
        test_target_kl_stops_before_the_step_and_leaves_no_gradient_behind,
    ),
    "max_grad_norm never read (TRL)": (
        "ppo_update",
        "cfg.max_grad_norm",
        "1e9",
        test_gradient_clipping,
        1e-3,
    ),
    # Metrics and the loop
    "approx-KL over padding too, where it is 0: the longer the padding, the better the run looks (trl#6809)": (
        "policy_loss",
        'masked_mean(kl_estimate(logprobs, new_logprobs, "k3"), mask)',
        "torch.where(mask, torch.expm1(log_ratio) - log_ratio, 0.0).mean()",
        test_policy_loss_by_brute_force,
    ),
    "a made-up value for padding in the mean entropy (trl#2022)": (
        "rollout_metrics",
        "entropy[mask].mean()",
        "entropy.masked_fill(~mask, 1.0).mean()",
        test_metrics_are_means_over_the_trained_tokens,
        0,
        False,
    ),
    "the generator's state is in no checkpoint: a resumed run is another one (trl#2657)": (
        "ppo",
        "seed_everything(cfg.seed, update)",
        "pass",
        test_the_progress_is_complete_at_each_yield,
    ),
}


@pytest.mark.parametrize("exhibit", MUSEUM)
def test_the_properties_reject_what_others_shipped(exhibit, monkeypatch):
    function, right, shipped, proof, *arguments = MUSEUM[exhibit]
    monkeypatch.setattr(f"ppo_llm.{function}", edited(function, right, shipped))
    if hasattr(proof, "hypothesis"):  # one failing example will do, it need not be the smallest
        name = "_hypothesis_internal_use_settings"
        quick = dict(phases=[Phase.generate], report_multiple_bugs=False, derandomize=True, database=None)
        monkeypatch.setattr(proof, name, settings(getattr(proof, name), **quick))
    with pytest.raises(AssertionError):
        proof(*arguments)
