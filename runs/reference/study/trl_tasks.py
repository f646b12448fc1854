"""TRL's PPOTrainer on the tasks of this folder and on `even` of ../learning: the same model, prompts and rewards.

    python -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 tyro
    trl-venv/bin/python runs/reference/study/trl_tasks.py --times 0.33333 1 3       # 90 minutes of one core: trl.csv
    trl-venv/bin/python runs/reference/study/trl_tasks.py --tasks even --rates 3e-4 1e-3 3e-3 1e-2 --seeds 10 11 12

Model, prompts, rewards, learning rate, KL penalty and batch are the task's. All else is as TRL has it: a critic of its
own, here from the policy's weights, λ = 0.95 and a value clip. Rewards and held-out evaluations are by ppo_llm.

The token that pads is none that the policy can sample. To TRL a reply ends where it begins, so that a sampled one would
leave words behind that earn a score and cost no KL.
"""
import argparse
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import tasks
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

import ppo_llm

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from compare import make_model

GOAL, UPDATES = 0.9, 40  # of `even`, as in ../learning/learning.py


def share_of_even(prompts, completions, **columns) -> list[float]:
    replies = [[int(word[1:]) for word in completion.split()] for completion in completions]
    return [sum(token % 2 == 0 for token in reply) / len(reply) for reply in replies]


def even(seed: int) -> tasks.Task:
    ids = torch.randint(0, 126, (1024, 16), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [" ".join(f"t{i}" for i in row) for row in ids]
    tokenizer = tasks.word_tokenizer([f"t{i}" for i in range(128)])
    settings = ppo_llm.Config(num_updates=UPDATES, batch_size=64, response_length=32, kl_coef=0.0)
    return tasks.Task(make_model("tiny"), tokenizer, prompts, prompts[:64], [share_of_even], settings)


class Reward(torch.nn.Module):
    """The score of ppo_llm, penalty for no end included, where TRL reads it: in a hidden state."""
    base_model_prefix = "trunk"

    def __init__(self, task: ppo_llm.Task, longest: int):
        super().__init__()
        self.score = torch.nn.Identity()
        self.prompts = {tuple(prompt.ids): prompt for prompt in task.prompts}
        self.judge, self.longest = task.judge, longest
        self.name = f"rewards/{task.rewards[0][0].__name__}"
        self.said = []  # what the first reward said since the last metrics

    def trunk(self, input_ids, attention_mask, **_):
        prompts, replies = [], []
        for ids, valid in zip(input_ids, attention_mask):
            prompts.append(self.prompts[tuple(ids[: self.longest][valid[: self.longest]].tolist())])
            replies.append(ids[self.longest :][valid[self.longest :]].tolist())
        scores, said = self.judge(prompts, replies)
        self.said += said[self.name].tolist()
        states = scores.sum(1).view(-1, 1, 1).expand(-1, input_ids.shape[1], 1)
        return type("Output", (), {"hidden_states": [states]})


class Rows(TrainerCallback):
    """Rows as those of tasks.train, of each update. Ends the run once the mean score of three is above the goal."""

    def __init__(self, reward: Reward, goal: float):
        self.reward, self.goal, self.rows = reward, goal, []

    def on_log(self, args, state, control, logs, **_):
        if "objective/kl" not in logs:
            return
        score = fmean(self.reward.said)
        self.reward.said = []
        self.rows.append({"part": "train", "update": len(self.rows) + 1, "score": score, "kl": logs["objective/kl"]})
        if len(self.rows) >= 3 and fmean(row["score"] for row in self.rows[-3:]) > self.goal:
            raise StopIteration


def train(task: tasks.Task, seed: int, goal: float = float("inf"), **changes) -> list[dict]:
    """The rows of a run; if it reached the goal, without the held-out ones after it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cfg = dataclasses.replace(task.settings, seed=seed, output_dir=f"{folder}/ours", **changes)
        ours = ppo_llm.prepare(cfg, task.prompts, task.rewards, task.model, task.tokenizer, task.held_out)
        tokenizer = copy.deepcopy(task.tokenizer)
        tokenizer.padding_side = "left"
        new = {"pad_token": "<outside>"} | ({} if ours.stop_ids else {"eos_token": "<never>"})
        tokenizer.add_special_tokens(new)  # ids that the model does not have: TRL masks them away
        longest = max(len(prompt.ids) for prompt in ours.prompts)
        ids = [[tokenizer.pad_token_id] * (longest - len(prompt.ids)) + prompt.ids for prompt in ours.prompts]
        ids *= 1 + cfg.batch_size // len(ids)  # TRL waits for ever if they do not fill a batch
        config = copy.deepcopy(task.model.config)
        config.num_labels = 1
        critic = AutoModelForSequenceClassification.from_config(config)
        trunk = getattr(task.model, task.model.base_model_prefix)
        getattr(critic, critic.base_model_prefix).load_state_dict(trunk.state_dict())
        settings = PPOConfig(
            output_dir=f"{folder}/trl",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=cfg.batch_size,
            local_rollout_forward_batch_size=cfg.batch_size,  # else shorter ones are padded, by an id that no logit has
            gradient_accumulation_steps=1,
            num_mini_batches=4,
            total_episodes=cfg.num_updates * cfg.batch_size,
            response_length=cfg.response_length,
            stop_token="eos" if ours.stop_ids else None,
            temperature=1.0,
            learning_rate=cfg.learning_rate,
            lr_scheduler_type=cfg.lr_scheduler_type,
            kl_coef=cfg.kl_coef,
            seed=seed,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        reward = Reward(ours, longest)
        rows = Rows(reward, goal)
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=task.model,
            ref_model=copy.deepcopy(task.model),
            reward_model=reward,
            value_model=critic,
            callbacks=[rows],
            train_dataset=Dataset.from_dict({"input_ids": ids}),
        )
        found = [held_out(ours)]
        try:
            trainer.train()
        except StopIteration:
            return found + rows.rows
        ours.progress.update = cfg.num_updates
        return found + rows.rows + [held_out(ours)]


def held_out(ours: ppo_llm.Task) -> dict:
    m, _ = ppo_llm.evaluate_held_out(ours)
    score, fluency = m[f"eval/rewards/{ours.rewards[0][0].__name__}"], m.get("eval/rewards/fluency", "")
    return {"part": "held-out", "update": m["update"], "score": score, "kl": m["eval/kl"], "fluency": fluency}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(tasks.SMALL), choices=[*tasks.SMALL, "even"])
    parser.add_argument("--seeds", nargs="+", type=int, default=range(50, 60))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3], help="of `even`")
    parser.add_argument("--times", nargs="+", type=float, default=[1.0], help="the learning rate of the other tasks")
    parser.add_argument("--out", type=Path, help="by default trl.csv, and trl.jsonl of ../learning for `even`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed, name in itertools.product(args.seeds, args.tasks):
        if name == "even":
            path = args.out or Path(__file__).parents[1] / "learning" / "trl.jsonl"
            rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
            done = {(row["commit"], row["rate"], row["seed"]) for row in rows}
            for rate in args.rates:
                if (tasks.COMMIT, rate, seed) in done:
                    continue
                began = time.process_time()
                rows = train(even(seed), seed, GOAL, learning_rate=rate)
                reached = [row["update"] * 64 for row in rows[-1:] if row["part"] == "train"]
                row = {"commit": tasks.COMMIT, "change": "TRL", "task": name, "rate": rate, "seed": seed}
                row |= {"samples": reached[0] if reached else None, "seconds": time.process_time() - began}
                with open(path, "a") as f:
                    f.write(json.dumps(row) + "\n")
                print(seed, name, rate, rows[-1]["score"], flush=True)
        else:
            path = args.out or Path(__file__).with_name("trl.csv")
            for times in args.times:
                change = "TRL" if times == 1 else f"TRL, rate x {times:g}"
                if (name, change, seed) in tasks.done(path):
                    continue
                task = tasks.TASKS[name](seed)
                rate = times * task.settings.learning_rate
                rows = train(task, seed, learning_rate=rate)
                tasks.append(path, name, change, seed, rows)
                print(seed, name, change, rows[-1]["score"], flush=True)


if __name__ == "__main__":
    main()
