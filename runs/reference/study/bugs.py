"""Bugs that still learn: each exhibit of the tests' museum is put into ppo_llm.py, then PPO trains with it.

    pip install pytest hypothesis
    python runs/reference/study/bugs.py            # about 2 hours of one core; rows go to bugs.csv, biases to bias.csv
    python runs/reference/study/bugs.py --table    # what they say

Two questions about each mistake. What score does it reach, beside the right code under the same settings and seeds? And
how wrong is its expected gradient: on the language of the tests, where every reply can be listed, the angle to the
gradient of the right code and the length relative to it, at the first step and after the policy has moved.
"""
import argparse
import contextlib
import csv
import itertools
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from unittest.mock import patch

import tasks
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
import ppo_llm
import test_ppo_llm as museum

CSV, BIAS = Path(__file__).with_name("bugs.csv"), Path(__file__).with_name("bias.csv")
SEEDS = range(30, 35)
# Settings without which a mistake does nothing, by a part of the exhibit's name.
NEEDS = {
    "sampled at one temperature": dict(temperature=0.7),
    "the entropy of logits without": dict(temperature=0.7, ent_coef=0.03),
    "logits that stay in the type": dict(dtype="bfloat16"),
    "a stop token of one's own": dict(stop_token="."),
    "k3 as e^d": dict(kl_estimator="k3"),
    "a KL loss with the wrong sign": dict(kl_in="loss", kl_estimator="k2"),
    "the score one past EOS": dict(lam=0.95),
    "whiten_rewards never read": dict(whiten_rewards=True),
    "the smaller of the two squares": dict(cliprange_value=0.2),
    "an entropy bonus with": dict(ent_coef=0.03),
    "each micro-batch by its own mean": dict(micro_batch_size=8),
    "early stop after the backward": dict(target_kl=0.05),
    "one norm for policy and critic": dict(critic="separate"),
}
# What nothing can follow from on these tasks: their models have rotary positions and no dropout, prompts without the
# padding token, one type of numbers; and metrics train nobody.
HARMLESS = (
    "attention where token",
    "left padding without",
    "dropout in the update",
    "log π_old in another type",
    "replies as text",
    "a made-up value for padding",
    "only the last minibatch in the metrics",
)
RIGHT = "right code"


@contextlib.contextmanager
def planted(exhibit: str | None):
    """ppo_llm with the mistake in the place of the right lines; None: as it is."""
    if exhibit is None:
        yield
        return
    function, changes, *_ = museum.MUSEUM[exhibit]
    wrong = museum.edited(function, *itertools.chain(*changes.items()))
    if function == "Actor.logits":  # what is rounded already goes on in the type that other functions expect

        def planted_function(actor, states):
            return wrong(actor, states).to(actor.value_head.weight.dtype)
    else:
        planted_function = wrong
    with patch(f"ppo_llm.{function}", planted_function):
        yield


def needs(exhibit: str) -> dict:
    return next((settings for part, settings in NEEDS.items() if part in exhibit), {})


def right_code_for(exhibit: str) -> str:
    """The name of its control: the right code under the settings that the mistake needs."""
    settings = ", ".join(f"{name}={x}" for name, x in needs(exhibit).items())
    return f"{RIGHT} ({settings})" if settings else RIGHT


def expected_gradients(exhibit: str | None, settings: dict) -> list[torch.Tensor]:
    """Of the PPO loss in the policy's weights, over all replies of the small language: on policy, and off policy."""
    changes = {name: x for name, x in settings.items() if name not in ("dtype", "stop_token", "critic")}
    cfg = museum.settings_of(**dict(lam=1.0, kl_coef=0.3, vf_coef=0.0, whiten_advantages=True) | changes)
    found = []
    for moved in (False, True):
        actor, ref = museum.tiny_actor("gpt2", 3), museum.tiny_actor("gpt2", 3, 9)
        rollout = museum.language(actor, ref, [1, 4, 2], cfg)  # by the right code: these probabilities are true
        probabilities = rollout.token_weights
        with planted(exhibit):
            rollout.mask = ppo_llm.response_mask(rollout.responses, [museum.STOP])
            ppo_llm.fill_logprobs_and_values(actor, ref, rollout, cfg)
            scores = torch.linspace(-1, 1, len(probabilities), dtype=museum.REAL)
            ppo_llm.compute_advantages(rollout, scores, ppo_llm.State(cfg.kl_coef), cfg)
            rollout.token_weights = probabilities * rollout.mask
            if moved:
                generator = torch.Generator().manual_seed(0)
                with torch.no_grad():
                    for p in actor.lm.parameters():
                        p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            loss, _ = ppo_llm.ppo_loss(actor, museum.whole(rollout), cfg.kl_coef, cfg)
            found.append(museum.gradients(loss, actor.lm))
    return found


def angle_and_length(wrong: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """Degrees between the gradients, and how many times as long the wrong one is."""
    cosine = float(wrong @ right / (wrong.norm() * right.norm()))
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine)))), float(wrong.norm() / right.norm())


def measure_biases() -> None:
    with open(BIAS, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("exhibit angle length angle_moved length_moved".split())
        for exhibit in museum.MUSEUM:
            pairs = zip(expected_gradients(exhibit, needs(exhibit)), expected_gradients(None, needs(exhibit)))
            numbers = [x for wrong, right in pairs for x in angle_and_length(wrong, right)]
            writer.writerow([exhibit, *(f"{x:.3g}" for x in numbers)])


def table() -> None:
    """Markdown: score, KL and fluency of each exhibit at the end, mean of five updates, less those of its control.

    Mean and standard error over seeds; how often the run failed, if it did.
    """
    updates = defaultdict(lambda: defaultdict(list))  # of a task and a trial: {seed: rows}
    with open(CSV, newline="") as file:
        for row in csv.DictReader(file):
            rows = updates[row["task"], row["change"]][row["seed"]]
            if row["part"] == "train":
                rows.append(row)

    def at_end(rows: list[dict], what: str) -> float:
        return fmean(float(row[what]) for row in rows[-5:]) if rows else math.nan

    with open(BIAS, newline="") as file:
        biases = {row["exhibit"]: row for row in csv.DictReader(file)}
    print("| mistake | demo: score | KL | fluency | sums: score | KL | angle | length | moved: angle | length |")
    print("|---" * 10 + "|")
    for exhibit, bias in biases.items():
        cells = [exhibit]
        for task, what in [("demo", "score"), ("demo", "kl"), ("demo", "fluency"), ("sums", "score"), ("sums", "kl")]:
            wrong, right = updates[task, exhibit], updates[task, right_code_for(exhibit)]
            differences = [at_end(wrong[seed], what) - at_end(right[seed], what) for seed in wrong if seed in right]
            ran = [x for x in differences if not math.isnan(x)]
            if len(ran) > 1:
                cells.append(f"{fmean(ran):+.2f} ± {stdev(ran) / math.sqrt(len(ran)):.2f}")
            else:
                cells.append("")
            if len(ran) < len(differences):
                cells[-1] += f" ({len(differences) - len(ran)} of {len(differences)} failed)"
        cells += [bias[name] for name in ("angle", "length", "angle_moved", "length_moved")]
        print(f"| {' | '.join(cells)} |")
    for (task, name), runs in updates.items():
        if name.startswith(RIGHT) and runs:
            print(f"{task}, {name}, {len(runs)} seeds:", end="")
            for what in ("score", "kl", "fluency") if task == "demo" else ("score", "kl"):
                print(f" {what} {fmean(at_end(rows, what) for rows in runs.values()):.2f}", end="")
            print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["demo", "sums"], choices=tasks.SMALL)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--biases", action="store_true", help="measure the gradients alone")
    parser.add_argument("--table", action="store_true", help="print what the CSVs say, run nothing")
    args = parser.parse_args()
    if args.table:
        return table()
    torch.set_num_threads(1)
    if args.biases:
        return measure_biases()
    exhibits = [exhibit for exhibit in museum.MUSEUM if not exhibit.startswith(HARMLESS)]
    trials = {right_code_for(exhibit): (None, needs(exhibit)) for exhibit in exhibits}
    trials |= {exhibit: (exhibit, needs(exhibit)) for exhibit in exhibits}
    for seed, name in itertools.product(args.seeds, args.tasks):
        missing = [trial for trial in trials if (name, trial, seed) not in tasks.done(CSV)]
        if not missing:
            continue
        task = tasks.TASKS[name](seed)
        for trial in missing:
            exhibit, settings = trials[trial]
            with planted(exhibit):
                try:
                    rows = tasks.train(task, seed, **settings)
                except RuntimeError as error:  # the run ended by itself, or the mistake does not even run
                    print(seed, name, trial, error, flush=True)
                    rows = [dict(part="held-out", update="failed", score="nan", kl="nan", fluency="nan")]
            tasks.append(CSV, name, trial, seed, rows)
            print(seed, name, trial, rows[-1]["score"], flush=True)


if __name__ == "__main__":
    main()
