"""Results of many runs: what each detail of PPO is worth, over-optimisation, and the critic against a group's mean.

    python runs/reference/study/study.py details       # about 6 hours of one core
    python runs/reference/study/study.py penalty       # half an hour
    python runs/reference/study/study.py baselines     # an hour
    python runs/reference/study/study.py details --seeds 20 21 --tasks ends --changes lam=0.5       # some of it
    python runs/reference/study/study.py details --table                                            # what was found

details: from the defaults one change at a time, on three tasks, paired by seed: the same model, prompts and first
replies. penalty: the demo with larger steps, under several strengths of the KL penalty, and of the target-KL stop
without a penalty. baselines: what a critic is worth beside the mean score of eight replies to the same prompt.

Rows go to NAME.csv. A run that it holds is not repeated, so what was interrupted goes on; several may run at once on
other seeds.
"""
import argparse
import csv
import itertools
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import tasks
import torch

FOLDER = Path(__file__).parent
KL_TARGETS = {"demo": 3.0, "sums": 0.5, "ends": 3.0}  # nats a reply; the fixed β of the task leads to about twice that
DETAILS = {
    "defaults": {},
    "policy clip off": dict(cliprange=0.9999, cliprange_high=1e6),
    "policy clip 0.05": dict(cliprange=0.05),
    "policy clip 0.4": dict(cliprange=0.4),
    "value clip 0.2": dict(cliprange_value=0.2),
    "lam=0": dict(lam=0.0),
    "lam=0.5": dict(lam=0.5),
    "lam=0.95": dict(lam=0.95),
    "critic separate": dict(critic="separate"),
    "critic action-value": dict(critic_target="action-value"),
    "critic none": dict(vf_coef=0.0),
    "critic warm-up, 2 updates": dict(critic_warmup_updates=2),
    "advantages not whitened": dict(whiten_advantages=False),
    "rewards whitened": dict(whiten_rewards=True),
    "loss per sequence": dict(loss_aggregation="sequence"),
    "loss by a constant": dict(loss_aggregation="constant"),
    "1 epoch": dict(num_ppo_epochs=1),
    "2 epochs": dict(num_ppo_epochs=2),
    "8 epochs": dict(num_ppo_epochs=8),
    "1 minibatch": dict(num_mini_batches=1),
    "KL in the loss, k2": dict(kl_in="loss", kl_estimator="k2"),
    "KL in the loss, k3": dict(kl_in="loss", kl_estimator="k3"),
    "no KL penalty": dict(kl_coef=0.0),
    "adaptive KL": dict(kl_target=KL_TARGETS, kl_horizon=1000.0),
    "entropy bonus 0.01": dict(ent_coef=0.01),
    "temperature 0.7": dict(temperature=0.7),
    "temperature 1.3": dict(temperature=1.3),
    "target KL off": dict(target_kl=None),
    "target KL 0.1": dict(target_kl=0.1),
    "truncated replies bootstrapped": dict(bootstrap_truncated=True),
    "learning rate / 3": dict(learning_rate=1 / 3),  # times the task's
    "learning rate x 3": dict(learning_rate=3.0),
}


LARGE_STEPS = dict(learning_rate=3.0)  # times the demo's: without a penalty it then hacks its reward
PENALTY = {f"beta={beta}": LARGE_STEPS | dict(kl_coef=beta) for beta in (0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)}
PENALTY |= {f"target={kl}": LARGE_STEPS | dict(kl_coef=0.0, target_kl=kl) for kl in (0.01, 0.03, 0.1, 0.3)}
NO_CRITIC = dict(vf_coef=0.0)  # V stays the running mean of the returns
EIGHT = dict(samples_per_prompt=8)
BASELINES = {
    "defaults": {},
    "critic, 8 replies a prompt": EIGHT,
    "no critic": NO_CRITIC,
    "no critic, 8 replies a prompt": NO_CRITIC | EIGHT,
    "group mean": NO_CRITIC | EIGHT | dict(center=True),
    "group mean, critic too": EIGHT | dict(center=True),
}
# The tasks, the seeds (no setting was chosen on them) and the changes of each study.
STUDIES = {
    "details": (list(tasks.TASKS), range(20, 30), DETAILS),
    "penalty": (["demo"], range(40, 45), PENALTY),
    "baselines": (list(tasks.TASKS), range(50, 60), BASELINES),
}


def settings(task: str, base, change: dict) -> dict:
    """The fields of Config that the change sets on this task."""
    changed = dict(change)
    if "kl_target" in changed:
        changed["kl_target"] = KL_TARGETS[task]
    if "learning_rate" in changed:
        changed["learning_rate"] *= base.learning_rate
    return changed


def read(path: Path) -> dict[tuple, dict]:
    """{(task, change, seed): what the table compares}."""
    runs = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            runs[row["task"], row["change"], int(row["seed"])].append(row)
    results = {}
    for key, rows in runs.items():
        trained = [row for row in rows if row["part"] == "train"]
        before, after = (row for row in rows if row["part"] == "held-out")
        results[key] = {
            "before": float(before["score"]),
            "score": float(after["score"]),
            "kl": float(after["kl"]),
            "fluency": float(after["fluency"] or math.nan),
            "mean": fmean(float(row["score"]) for row in trained),
            "path": [(float(row["kl"]), float(row["score"])) for row in trained],
        }
    return results


def score_at(path: list[tuple[float, float]], kl: float) -> float:
    """The score where the run first reaches this KL, between two updates by a line; NaN if it never does."""
    for (kl_0, score_0), (kl_1, score_1) in zip(path, path[1:]):
        if kl_0 < kl <= kl_1:
            return score_0 + (score_1 - score_0) * (kl - kl_0) / (kl_1 - kl_0)
    return math.nan


def mean_and_error(xs: list[float]) -> tuple[float, float]:
    xs = [x for x in xs if not math.isnan(x)]
    if len(xs) < 2:
        return math.nan, math.nan
    return fmean(xs), stdev(xs) / math.sqrt(len(xs))


def worth(results: dict, task: str, change: str) -> dict[str, tuple[float, float]]:
    """Differences from the defaults, with their standard errors, in percent of what the defaults gain in the task."""
    seeds = [s for t, c, s in results if (t, c) == (task, change) and (t, "defaults", s) in results]
    pairs = [(results[task, change, seed], results[task, "defaults", seed]) for seed in seeds]
    defaults = [run for (t, c, _), run in results.items() if (t, c) == (task, "defaults")]
    gain = fmean(run["score"] - run["before"] for run in defaults)
    kl = KL_TARGETS[task]
    return {
        "mean": mean_and_error([100 * (run["mean"] - default["mean"]) / gain for run, default in pairs]),
        "score": mean_and_error([100 * (run["score"] - default["score"]) / gain for run, default in pairs]),
        "at KL": mean_and_error(
            [100 * (score_at(run["path"], kl) - score_at(default["path"], kl)) / gain for run, default in pairs]
        ),
        "kl": mean_and_error([run["kl"] - default["kl"] for run, default in pairs]),
        "fluency": mean_and_error([100 * (run["fluency"] - default["fluency"]) for run, default in pairs]),
    }


def table(path: Path, changes: dict) -> None:
    """Markdown, sorted by the mean over tasks of the difference over the whole run."""
    results = read(path)
    names = [name for name in tasks.TASKS if any(task == name for task, _, _ in results)]
    lines = []
    for change in changes:
        found = {task: worth(results, task, change) for task in names}
        average = fmean(found[task]["mean"][0] for task in names)
        cells = [change]
        for task in names:
            for what in ("mean", "score", "at KL"):
                value, error = found[task][what]
                cells.append("" if math.isnan(value) else f"{value:+.0f} ± {error:.0f}")
        lines.append((average, f"| {' | '.join([*cells, f'{average:+.0f}'])} |"))
    print("| change |", " | ".join(f"{task}: {what}" for task in names for what in ("run", "end", "at KL")), "| mean |")
    print("|---" * (3 * len(names) + 2) + "|")
    for _, line in sorted(lines, key=lambda pair: -pair[0]):
        print(line)
    for task in names:
        runs = [run for (t, c, _), run in results.items() if (t, c) == (task, "defaults")]
        said = [f"{what} {fmean(run[what] for run in runs):.2f}" for what in ("before", "score", "kl", "mean")]
        print(f"\n{task}, defaults, {len(runs)} seeds: {', '.join(said)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--changes", nargs="+")
    parser.add_argument("--table", action="store_true", help="print what the CSV says, run nothing")
    args = parser.parse_args()
    path = FOLDER / f"{args.study}.csv"
    names, seeds, changes = STUDIES[args.study]
    if args.table:
        return table(path, changes)
    torch.set_num_threads(1)
    for seed, name in itertools.product(args.seeds or seeds, args.tasks or names):
        missing = [change for change in args.changes or changes if (name, change, seed) not in tasks.done(path)]
        if not missing:
            continue
        task = tasks.TASKS[name](seed)
        for change in missing:
            rows = tasks.train(task, seed, **settings(name, task.settings, changes[change]))
            tasks.append(path, name, change, seed, rows)
            print(seed, name, change, rows[-1]["score"], flush=True)


if __name__ == "__main__":
    main()
