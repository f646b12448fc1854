"""TRL's PPOTrainer on the task `even` of learning.py: the same model, prompts, score and goal, in the same rows.

    python -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    trl-venv/bin/python trl_even.py --seeds 10 11 12 13 14 --out trl.jsonl

Settings are TRL's defaults but for the KL penalty, which the task has not, and a constant learning rate, as ours.
"""
import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from compare import PROMPT, make_model, make_reward_model, make_tokenizer

BATCH, GOAL, UPDATES = 64, 0.9, 40


class Goal(TrainerCallback):
    """Stops once the mean score of three updates is above the goal."""

    def __init__(self):
        self.scores = []

    def on_log(self, args, state, control, logs, **_):
        if "objective/scores" in logs:
            self.scores.append(logs["objective/scores"])
            if len(self.scores) >= 3 and fmean(self.scores[-3:]) > GOAL:
                raise StopIteration


def run(seed: int, rate: float) -> dict:
    ids = torch.randint(0, 126, (1024, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        num_mini_batches=4,
        total_episodes=UPDATES * BATCH,
        response_length=32,
        temperature=1.0,
        learning_rate=rate,
        lr_scheduler_type="constant",
        kl_coef=0.0,
        seed=seed,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    goal = Goal()
    trainer = PPOTrainer(
        args=settings,
        processing_class=make_tokenizer("tiny", pad_token="<pad>", eos_token="<eos>"),  # the model has neither
        model=make_model("tiny"),
        ref_model=make_model("tiny"),
        reward_model=make_reward_model(),
        value_model=make_model("tiny", "GPT2ForSequenceClassification", num_labels=1),
        callbacks=[goal],
        train_dataset=Dataset.from_dict({"input_ids": ids}),
    )
    started = time.process_time()
    samples = None
    try:
        trainer.train()
    except StopIteration:
        samples = len(goal.scores) * BATCH
    return {"samples": samples, "seconds": time.process_time() - started, "explained": float("nan")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=(3e-4, 1e-3, 3e-3, 1e-2))
    parser.add_argument("--seeds", nargs="+", type=int, default=[10])
    parser.add_argument("--out", type=Path, default=Path("trl.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if args.out.exists():
        done = {(row["rate"], row["seed"]) for row in map(json.loads, args.out.read_text().splitlines())}
    for rate, seed in itertools.product(args.rates, args.seeds):
        if (rate, seed) not in done:
            row = {"change": "TRL", "task": "even", "rate": rate, "seed": seed} | run(seed, rate)
            with open(args.out, "a") as f:
                f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
