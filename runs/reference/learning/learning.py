"""How many samples PPO needs on small tasks that differ in kind: what the defaults of ppo_llm.py were chosen by.

    python runs/reference/learning/learning.py --seeds 10 11 12 --out runs/reference/learning/defaults.jsonl
    python runs/reference/learning/learning.py --seeds 10 11 12 --lam 0.95 --out lam-0.95.jsonl
    python runs/reference/learning/learning.py --seeds 10 11 12 --critic separate --out separate.jsonl
    python runs/reference/learning/learning.py --table runs/reference/learning/*.jsonl      # what was measured

Each run trains a GPT-2 from random weights, with one thread, until the mean score of three updates is above the goal of
its task. A row of the output says after how many samples that was. Flags that are not below are fields of PPOConfig. Runs
that are in the output already are not repeated.
"""
import argparse
import copy
import json
import sys
from dataclasses import fields
from pathlib import Path
from statistics import fmean

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parents[3]))
from ppo_llm import Actor, PPOConfig, Prompt, State, ppo


def share(reply: list[int], divisor: int) -> float:
    return sum(token % divisor == 0 for token in reply) / len(reply)


# Each task: score of a prompt and a reply, the score to reach, updates at most, and what differs from the settings below.
TASKS = {
    # Dense: every token counts the same. The work of the speed benchmark.
    "even": (lambda prompt, reply: share(reply, 2), 0.9, 40, dict(response_length=32)),
    # Returns of scale 100, which no setting may feel.
    "even-100": (lambda prompt, reply: 100 * share(reply, 2), 90, 40, dict(response_length=32)),
    # Sparse: the last token alone, one in eight at first.
    "last": (lambda prompt, reply: float(reply[-1] % 8 == 0), 0.9, 60, dict(response_length=16)),
    # The credit of one early token: what follows is noise.
    "first": (lambda prompt, reply: float(reply[1] % 8 == 0), 0.9, 60, dict(response_length=24)),
    # A reply is to end after ten tokens.
    "length": (lambda prompt, reply: -abs(len(reply) - 10) / 10, -0.1, 60, dict(response_length=32)),
    # Against a KL penalty, with a mean score far from 0.
    "kl": (lambda prompt, reply: 10 + 5 * share(reply, 2), 14, 40, dict(response_length=16, kl_coef=0.1)),
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
STOP = 31  # of the task "length" alone


def run(task: str, seed: int, rate: float, critic: str, changes: dict) -> dict:
    """Samples until the goal was reached, None if it never was, and what the critic explained from update 5 on."""
    score_one, goal, updates, settings = TASKS[task]
    is_dense = task.startswith("even")
    vocabulary, prompt_length = (128, 16) if is_dense else (32, 8)
    size = dict(n_layer=4, n_embd=128, n_head=4) if is_dense else dict(n_layer=2, n_embd=64, n_head=4)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_positions=128, bos_token_id=None, eos_token_id=None, **size)
    model = GPT2LMHeadModel(config)
    ids = torch.randint(0, vocabulary - 2, (1024, prompt_length), generator=torch.Generator().manual_seed(0))
    prompts = [Prompt(row) for row in ids.tolist()]
    cfg = PPOConfig(
        **dict(num_updates=updates, batch_size=64, kl_coef=0.0, seed=seed, learning_rate=rate) | settings | changes
    )

    def score(prompts, replies):
        return torch.tensor([score_one(prompt, reply) for prompt, reply in zip(prompts, replies)]), {}

    trunk = copy.deepcopy(model) if critic == "separate" else None
    actor = Actor(model, critic=trunk, action_values=critic == "action-value")
    ref = Actor(copy.deepcopy(model)).requires_grad_(False)
    optimizer = torch.optim.AdamW(actor.parameters(), eps=1e-5, weight_decay=0.0, fused=True)
    stop_ids = [STOP] if task == "length" else []
    scores, explained = [], []
    samples = None
    for metrics, _ in ppo(actor, ref, optimizer, prompts, score, stop_ids, cfg, State(cfg.kl_coef)):
        scores.append(metrics["objective/scores"])
        explained.append(metrics["val/explained_variance"])
        if fmean(scores[-3:]) > goal and len(scores) >= 3:
            samples = len(scores) * cfg.batch_size
            break
    late = sorted(explained[4:]) or [float("nan")]
    return {"task": task, "rate": rate, "seed": seed, "samples": samples, "explained": late[len(late) // 2]}


def table(paths: list[str]) -> None:
    """A line a file and task: samples of each seed at each learning rate, and the explained variance, mean of seeds."""
    for path in paths:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        for task in dict.fromkeys(row["task"] for row in rows):
            cells = []
            for rate in sorted({row["rate"] for row in rows if row["task"] == task}):
                found = [row for row in rows if (row["task"], row["rate"]) == (task, rate)]
                samples = ", ".join(str(row["samples"] or "never") for row in found)
                cells.append(f"{rate:g}: {samples} ({fmean(row['explained'] for row in found):.2f})")
            print(f"{Path(path).stem:14} {task:9} {' | '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10])
    parser.add_argument("--critic", default="shared", choices=("shared", "separate", "action-value"))
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--table", nargs="+", help="print these outputs, run nothing")
    args, others = parser.parse_known_args()
    if args.table:
        return table(args.table)
    names = {field.name for field in fields(PPOConfig)}
    changes = {}
    for flag, text in zip(others[::2], others[1::2]):
        name = flag.lstrip("-").replace("-", "_")
        if name not in names:
            parser.error(f"{flag}: expected a field of PPOConfig")
        changes[name] = None if text == "None" else json.loads(text)
    torch.set_num_threads(1)
    done = set()
    if args.out.exists():
        done = {(row["task"], row["rate"], row["seed"]) for row in map(json.loads, args.out.read_text().splitlines())}
    for task in args.tasks:
        for rate in args.rates:
            for seed in args.seeds:
                if (task, rate, seed) in done:
                    continue
                row = run(task, seed, rate, args.critic, changes)
                print(row, flush=True)
                with open(args.out, "a") as f:
                    f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
