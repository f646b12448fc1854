"""TRL's PPOTrainer on the tasks of this folder: rows "TRL" of baselines.csv, beside those of study.py.

    python -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 tyro
    trl-venv/bin/python runs/reference/study/trl_tasks.py        # half an hour of one core

Model, prompts, rewards, learning rate, KL penalty and batch are the task's. All else is as TRL has it: a critic of its
own, here from the policy's weights, λ = 0.95 and a value clip. Rewards and held-out evaluations are by ppo_llm.
"""
import argparse
import contextlib
import copy
import dataclasses
import io
import itertools
import os
import tempfile
import time
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import tasks
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

import ppo_llm

CSV = Path(__file__).with_name("baselines.csv")


class Reward(torch.nn.Module):
    """The score of ppo_llm where TRL reads it: in a hidden state."""
    base_model_prefix = "trunk"

    def __init__(self, task: ppo_llm.Task, longest: int):
        super().__init__()
        self.score = torch.nn.Identity()
        self.prompts = {tuple(prompt.ids): prompt for prompt in task.prompts}
        self.judge, self.longest = task.score, longest
        self.said = []  # scores since the last metrics

    def trunk(self, input_ids, attention_mask, **_):
        prompts, replies = [], []
        for ids, valid in zip(input_ids, attention_mask):
            prompts.append(self.prompts[tuple(ids[: self.longest][valid[: self.longest]].tolist())])
            replies.append(ids[self.longest :][valid[self.longest :]].tolist())
        scores, _ = self.judge(prompts, replies)
        self.said += scores.tolist()
        states = scores.view(-1, 1, 1).expand(-1, input_ids.shape[1], 1)
        return type("Output", (), {"hidden_states": [states]})


class Rows(TrainerCallback):
    """Rows as those of tasks.train, of each update."""

    def __init__(self, reward: Reward):
        self.reward, self.rows, self.began = reward, [], time.process_time()

    def on_log(self, args, state, control, logs, **_):
        if "objective/kl" not in logs:
            return
        now = time.process_time()
        self.rows.append({
            "part": "train",
            "update": len(self.rows) + 1,
            "samples": int(logs["episode"]),
            "seconds": now - self.began,
            "score": sum(self.reward.said) / len(self.reward.said),
            "kl": logs["objective/kl"],
            "clipfrac": logs["policy/clipfrac_avg"],
        })
        self.reward.said, self.began = [], now


def train(name: str, seed: int) -> list[dict]:
    task = tasks.TASKS[name](seed)
    cfg = dataclasses.replace(task.settings, seed=seed)
    ours = ppo_llm.prepare(cfg, task.prompts, task.rewards, task.model, task.tokenizer, task.held_out)
    tokenizer = copy.deepcopy(task.tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>"})  # the model has neither
    longest = max(len(prompt.ids) for prompt in ours.prompts)
    ids = [[tokenizer.pad_token_id] * (longest - len(prompt.ids)) + prompt.ids for prompt in ours.prompts]
    ids *= 1 + cfg.batch_size // len(ids)  # TRL waits for ever if they do not fill a batch
    config = copy.deepcopy(task.model.config)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config)
    trunk = getattr(task.model, task.model.base_model_prefix)
    getattr(critic, critic.base_model_prefix).load_state_dict(trunk.state_dict())
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=cfg.batch_size,
        gradient_accumulation_steps=1,
        num_mini_batches=4,
        total_episodes=cfg.num_updates * cfg.batch_size,
        response_length=cfg.response_length,
        stop_token="eos" if ours.stop_ids else None,
        missing_eos_penalty=cfg.missing_eos_penalty,
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
    rows = Rows(reward)
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
    before, _ = ppo_llm.evaluate_held_out(ours, cfg, 0)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    after, _ = ppo_llm.evaluate_held_out(ours, cfg, cfg.num_updates)
    found = []
    for m in (before, after):
        found.append({
            "part": "held-out",
            "update": m["update"],
            "samples": m["update"] * cfg.batch_size,
            "score": m[f"eval/rewards/{task.rewards[0].__name__}"],
            "kl": m["eval/kl"],
            "fluency": m.get("eval/rewards/fluency", ""),
        })
    return [found[0], *rows.rows, found[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(tasks.SMALL), choices=tasks.SMALL)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(50, 60))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed, name in itertools.product(args.seeds, args.tasks):
        if (name, "TRL", seed) not in tasks.done(CSV):
            rows = train(name, seed)
            tasks.append(CSV, name, "TRL", seed, rows)
            print(seed, name, rows[-1]["score"], flush=True)


if __name__ == "__main__":
    main()
