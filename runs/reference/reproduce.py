"""Makes figures and tables of this folder again.

    python runs/reference/reproduce.py                       # lists them: time of one core to measure, and commands
    python runs/reference/reproduce.py details               # prints its table and draws its figure, from the rows
    python runs/reference/reproduce.py details --measure     # before that, makes the rows which this ppo_llm.py lacks

The commands run in this folder. Figures need matplotlib; TRL needs an environment of its own: see study/trl_tasks.py.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

TRL = "../../trl-venv/bin/python"
DEMOS = "for i in 2 3 4 5; do python ../../ppo_llm.py --seed $i --output-dir demo-seed$i || exit 1; done"
GONE = "echo its mistakes are those of commit 0574b0b: measure there && false"
STUDY, TABLE, LEARN = "python study/study.py", "python audit.py", "python learning/learning.py"
EVEN = "--seeds 10 11 12 13 14 15 16 17 18 19 --tasks even"
EACH = "--seeds 20 21 22 23 24 --rates 3e-3 --tasks even last first length kl --each"
SMOL = "cd ../.. && for i in 21 22 23; do python ppo_llm.py --model SmolLM2 --seed $i"  # see smollm2/smollm2.py
KIND = (f"{SMOL} --output-dir runs/reference/smollm2/kind-$i --prompts SmolLM2/openings.txt "
        "--eval-prompts SmolLM2/held_out.txt --reward runs/reference/smollm2/smollm2.py:sentiment --response-length 16 "
        "--batch-size 64 --kl-coef 0.02 --learning-rate 1e-4 --target-kl 0.1 --num-updates 20 || exit 1; done")
RESULTS = {  # name: (time to measure, what shows the rows, what measures them)
    "demo": ("10 min", f"{TABLE} demo && python plot.py demo demo-seed[2-5] -o demo.svg",
             f"{STUDY} demo && python ../../ppo_llm.py --output-dir demo && {DEMOS}"),  # into folders that are not there
    "details": ("7 h", f"{TABLE} details && python plot.py study/details.csv", f"{STUDY} details"),
    "penalty": ("45 min", f"{TABLE} penalty && python plot.py study/penalty.csv", f"{STUDY} penalty"),
    "trl": ("100 min", f"{TABLE} trl", f"{STUDY} trl && {TRL} study/trl_tasks.py --times 0.33333 1 3"),
    "critic": ("18 h", f"{TABLE} critic && python plot.py study/critic.csv", f"{STUDY} critic"),
    "critic-rates": ("110 min", f"{TABLE} critic-rates", f"{STUDY} critic-rates"),
    "critic-fit": ("80 min", f"{TABLE} critic-fit", f"{STUDY} critic-fit"),
    "rates": ("30 min", f"{TABLE} rates", f"{STUDY} rates"),
    "kind": ("40 min", f"{TABLE} kind && python plot.py smollm2/kind-2[1-3] -o smollm2/kind.svg", KIND),
    "bugs": ("gone", f"{TABLE} bugs", GONE),
    "even": ("10 min", f"{TABLE} even", f"{LEARN} {EVEN} --out learning/even.jsonl"),
    "even-trl": ("15 min", f"{TABLE} even",
                 f"{TRL} study/trl_tasks.py --tasks even --rates 3e-4 1e-3 3e-3 1e-2 --seeds 10 11 12"),
    "each": ("50 min", f"{TABLE} each", f"{LEARN} {EACH} --out learning/each.jsonl"),
    "killed": ("6 min", "", "python bench/kill.py 100"),
    "speed": ("15 min", "", "python bench/compare.py --updates 3"),
    "speed-trl": ("1 h", "", f"python bench/compare.py --trl {TRL} --updates 3"),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("name", nargs="?", choices=RESULTS)
parser.add_argument("--measure", action="store_true")
args = parser.parse_args()
if args.name is None:
    for name, (takes, show, measure) in RESULTS.items():
        print(f"{name:14} {takes:7} {show or '(it prints what it measures)'}\n{'':22} {measure}")
    sys.exit()
_, show, measure = RESULTS[args.name]
if not show and not args.measure:
    sys.exit(f"{args.name}: no rows are kept, it prints what it measures: --measure")
path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` is the one that runs this
for command in [measure] * args.measure + [show]:
    if subprocess.run(command, shell=True, cwd=Path(__file__).parent, env=os.environ | {"PATH": path}).returncode:
        sys.exit(f"{args.name}: this failed: {command}")
