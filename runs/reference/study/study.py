"""Results of many runs: what each detail of PPO is worth, over-optimisation, and the critic against a group's mean.

    python runs/reference/study/study.py details       # ../reproduce.py lists the studies, and how long each takes
    python runs/reference/study/study.py details --seeds 20 21 --tasks ends --changes lam=0.5       # some of it

demo: its defaults. details: from the defaults one change at a time, on three tasks, paired by seed: the same model,
prompts and first replies. rates: how large a learning rate the demo stands, by the target-KL stop. penalty: the demo
under several strengths of the KL penalty, and of the stop without a penalty. trl: ours beside TRL's PPO, whose runs
trl_tasks.py adds. critic: what a critic is worth by the length of replies and by where the score comes, beside the mean
score of eight replies to the same prompt; critic-rates: at which learning rate; critic-fit: what makes it predict well.

Rows go to NAME.csv, or to --out. A run by the same ppo_llm.py that it holds is not repeated, so what was interrupted
goes on; several may run at once on other seeds.
"""
import argparse
import itertools
from pathlib import Path

import tasks
import torch
from results import FOLDER

NO_CRITIC = dict(vf_coef=0.0)  # V is the mean of the batch's returns
EIGHT = dict(samples_per_prompt=8)
KL_TARGETS = {"demo": 3.0, "sums": 0.5, "ends": 3.0}  # below where the defaults end

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
    "no critic": NO_CRITIC,
    "8 replies per prompt": EIGHT,
    "8 replies per prompt, no critic": EIGHT | NO_CRITIC,
    "8 replies per prompt, no critic, group mean": EIGHT | NO_CRITIC | dict(center=True),
    "critic warm-up, 2 updates": dict(critic_warmup_updates=2),
    "advantages not whitened": dict(whiten_advantages=False),
    "1 epoch": dict(num_ppo_epochs=1),
    "2 epochs": dict(num_ppo_epochs=2),
    "8 epochs": dict(num_ppo_epochs=8),
    "1 minibatch": dict(num_mini_batches=1),
    "no KL penalty": dict(kl_coef=0.0),
    "adaptive KL": dict(kl_target=KL_TARGETS, kl_horizon=1000.0),
    "entropy bonus 0.01": dict(ent_coef=0.01),
    "target KL off": dict(target_kl=None),
    "target KL 0.1": dict(target_kl=0.1),
    "learning rate / 3": dict(learning_rate=1 / 3),  # times the task's
    "learning rate x 3": dict(learning_rate=3.0),
}


# Twice the demo's updates: without a penalty its reward is then hacked.
PENALTY = {f"beta={beta}": dict(num_updates=40, kl_coef=beta) for beta in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)}
PENALTY |= {f"target={kl}": dict(num_updates=40, kl_coef=0.0, target_kl=kl) for kl in (0.01, 0.03, 0.1)}
RATES = {}  # times the demo's
for times in (1.0, 3.0, 10.0):
    for kl in (None, 1.0, 0.1, 0.03):
        RATES[f"rate x {times}, target KL {kl}"] = dict(learning_rate=times, target_kl=kl)
    warmup = dict(learning_rate=times, target_kl=0.1, warmup_updates=2)
    RATES[f"rate x {times}, target KL 0.1, warm-up of 2"] = warmup
# TRL's, but for its value clip, which is in units of the score, and Adam's eps.
TRL = dict(critic="separate", lam=0.95, vf_coef=0.1, cliprange_value=0.2, target_kl=None, max_grad_norm=1e9)
BESIDE_TRL = {"defaults": {}, "TRL's settings": TRL, "TRL's settings, rate / 3": TRL | dict(learning_rate=1 / 3)}
CRITICS = {
    "critic": {},
    "separate critic": dict(critic="separate"),
    "critic, lam=0.95": dict(lam=0.95),
    "no critic": NO_CRITIC,
    "group mean": NO_CRITIC | EIGHT | dict(center=True),
}
CRITIC_RATES = {
    f"{name}, rate x {times}": change | dict(learning_rate=times)
    for name, change in CRITICS.items()
    for times in (0.33, 1, 3, 10, 30)
}
# Of these, by the mean J over the run, the best for: early, end, every.
BEST = {
    "critic": (1, 3, 3),
    "separate critic": (3, 10, 1),
    "critic, lam=0.95": (1, 1, 3),
    "no critic": (3, 10, 10),
    "group mean": (3, 10, 10),
}
CRITIC = {name: CRITICS[name] | dict(learning_rate=times) for name, times in BEST.items()}
SEPARATE = dict(critic="separate")
CRITIC_FIT = {
    "critic": {},
    "critic, vf_coef=1": dict(vf_coef=1.0),
    "critic, its head's rate x 3": dict(critic_lr=9e-3),
    "critic, 4 epochs more": dict(critic_epochs=4),
    "separate critic": SEPARATE,
    "separate critic, its rate x 3": SEPARATE | dict(critic_lr=9e-3),
    "separate critic, 4 epochs more": SEPARATE | dict(critic_epochs=4),
    "VC-PPO": SEPARATE | dict(loss=tasks.long_returns, lam=1 - 1 / (0.05 * 128), critic_warmup_updates=3),
    "VC-PPO, no warm-up": SEPARATE | dict(loss=tasks.long_returns, lam=1 - 1 / (0.05 * 128)),
}
# The tasks, the seeds and the changes of each study.
STUDIES = {
    "demo": (["demo"], [*range(1, 6), *range(100, 110)], {"defaults": {}}),
    "details": (tasks.SMALL, range(20, 30), DETAILS),
    "rates": (["demo"], range(40, 45), RATES),
    "penalty": (["demo"], range(60, 65), PENALTY),
    "trl": (tasks.SMALL, range(55, 60), BESIDE_TRL),
    "critic": (tasks.LONG, range(70, 78), CRITIC),
    "critic-rates": (["early-64", "end-64", "every-64"], range(90, 92), CRITIC_RATES),
    "critic-fit": (["early-128", "end-128", "every-128"], range(92, 94), CRITIC_FIT),
}


def settings(task: str, base, change: dict) -> dict:
    """The fields of Config that the change sets on this task."""
    changed = dict(change)
    if "kl_target" in changed:
        changed["kl_target"] = KL_TARGETS[task]
    if "learning_rate" in changed:
        times = changed["learning_rate"]
        if isinstance(times, tuple):
            times = times[["early", "end", "every"].index(task.split("-")[0])]
        changed["learning_rate"] = times * base.learning_rate
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--changes", nargs="+")
    parser.add_argument("--out", type=Path, help="by default NAME.csv, beside this file")
    args = parser.parse_args()
    path = args.out or FOLDER / f"{args.study}.csv"
    names, seeds, changes = STUDIES[args.study]
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
