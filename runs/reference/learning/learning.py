"""How many samples PPO needs on small tasks that differ in kind: what the defaults of ppo_llm.py were chosen by.

    cd runs/reference/learning
    python learning.py --seeds 10 11 12 13 14 15 16 17 18 19 --tasks even --out even.jsonl
    python learning.py --seeds 20 21 22 23 24 --rates 3e-3 --tasks even last first length kl --each --out each.jsonl
    python learning.py --seeds 20 21 22 --change lam=0.95 vf_coef=1 --out mine.jsonl

--each: every default, changed alone. ../audit.py makes tables of the rows. Each run trains a GPT-2 from random weights, with one thread, until the mean score of three updates is above the goal of
its task. A row of the output says after how many samples and CPU seconds that was. A change is a field of PPOConfig,
beta2 or eps of AdamW, or critic: separate or none. Runs by the same ppo_llm.py that the output holds are not repeated.
../study/trl_tasks.py adds TRL's rows.
"""
import argparse
import copy
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import fmean

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path += [str(Path(__file__).parents[1] / "study"), str(Path(__file__).parents[3])]
from ppo_llm import Actor, PPOConfig, Progress, Prompt, ppo
from tasks import COMMIT


def share(reply: list[int], divisor: int) -> float:
    return sum(token % divisor == 0 for token in reply) / len(reply)


# Each task: score of a prompt and a reply, the score to reach, updates at most, and settings of its own.
TASKS = {
    # Dense: every token counts the same. The work of the speed benchmark.
    "even": (lambda prompt, reply: share(reply, 2), 0.9, 40, dict(response_length=32)),
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
# Each default alone, against other values that are in use.
EACH = """
    lam=0.95 vf_coef=0.1 vf_coef=1 cliprange_value=0.2 critic=separate critic=none
    target_kl=null target_kl=0.1 num_ppo_epochs=2 num_ppo_epochs=8 num_mini_batches=2 num_mini_batches=8
    beta2=0.95 eps=1e-8 max_grad_norm=1e9 max_grad_norm=0.3 whiten_advantages=false warmup_updates=3
""".split()


def run(task: str, seed: int, rate: float, changes: dict) -> dict:
    """Samples until the goal was reached, None if it never was, and CPU seconds."""
    score_one, goal, updates, settings = TASKS[task]
    changes = dict(changes)
    critic = changes.pop("critic", "shared")
    betas, eps = (0.9, changes.pop("beta2", 0.999)), changes.pop("eps", 1e-5)
    if critic == "none":  # V stays the running mean of the returns
        changes["vf_coef"] = 0.0
    is_dense = task == "even"
    vocabulary, prompt_length = (128, 16) if is_dense else (32, 8)
    size = dict(n_layer=4, n_embd=128, n_head=4) if is_dense else dict(n_layer=2, n_embd=64, n_head=4)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=vocabulary, n_positions=128, bos_token_id=None, eos_token_id=None, **size)
    model = GPT2LMHeadModel(config)
    ids = torch.randint(0, vocabulary - 2, (1024, prompt_length), generator=torch.Generator().manual_seed(0))
    prompts = [Prompt(row) for row in ids.tolist()]
    cfg = PPOConfig(**dict(num_updates=updates, batch_size=64, kl_coef=0.0, seed=seed) | settings | changes)

    def score(prompts, replies):
        return torch.tensor([score_one(prompt, reply) for prompt, reply in zip(prompts, replies)]), {}

    ref = Actor(copy.deepcopy(model)).requires_grad_(False)
    actor = Actor(model, critic=copy.deepcopy(model) if critic == "separate" else None)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=rate, betas=betas, eps=eps, weight_decay=0.0, fused=True)
    stop_ids = [STOP] if task == "length" else []
    scores = []
    samples = None
    started = time.process_time()
    for metrics, _ in ppo(actor, ref, optimizer, prompts, score, stop_ids, cfg, Progress(cfg.kl_coef)):
        scores.append(metrics["objective/scores"])
        if fmean(scores[-3:]) > goal and len(scores) >= 3:
            samples = len(scores) * cfg.batch_size
            break
    return {"samples": samples, "seconds": time.process_time() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[10])
    parser.add_argument("--change", nargs="+", default=[], help="NAME=JSON ...: all of them at once")
    parser.add_argument("--each", action="store_true", help="the defaults, then every change of EACH by itself")
    parser.add_argument("--out", type=Path, default=Path("learning.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if args.out.exists():
        rows = map(json.loads, args.out.read_text().splitlines())
        done = {(row["change"], row["task"], row["rate"], row["seed"]) for row in rows if row["commit"] == COMMIT}
    trials = [[], *([change] for change in EACH)] if args.each else [args.change]
    for trial in trials:
        change = " ".join(trial) or "default"
        pairs = [text.split("=") for text in trial]
        changes = {name: value if name == "critic" else json.loads(value) for name, value in pairs}
        for task, rate, seed in itertools.product(args.tasks, args.rates, args.seeds):
            if (change, task, rate, seed) in done:
                continue
            row = {"commit": COMMIT, "change": change, "task": task, "rate": rate, "seed": seed}
            row |= run(task, seed, rate, changes)
            print(row, flush=True)
            with open(args.out, "a") as f:
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
