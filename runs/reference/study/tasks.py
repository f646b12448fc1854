"""Tasks for the studies in this folder, and how a run on one of them becomes rows of a CSV.

demo: the demo of ppo_llm.py. The score counts kind words, a KL penalty guards the grammar.
sums: chat prompts and a column with the answer. A small Llama has read sums of which three in five are wrong; the score
      is 1 for a right one. So the reward can be verified.
ends: a GPT-2 of random weights writes 48 tokens. The first and the last of them count, the others are noise, and the
      score comes at the end: sparse, and half of the credit belongs far back.
early-T, end-T, every-T: the same GPT-2 writes T tokens. A token counts if it is t0, t4, t8 ...: the first alone, or
      each by its share, paid at the end or at once. Two tasks alike but for where the score comes.

    python runs/reference/study/tasks.py sums FOLDER --seed 20

writes `sums` or `ends` as a folder with model and prompts, and prints the command that trains it: the run "defaults" of
study.py, from files.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import io
import itertools
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parents[3]
sys.path.insert(0, str(HERE))
import ppo_llm
from results import COLUMNS, read_rows

CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant{% endif %}"
FORMS = ("it is", "that makes", "the sum is", "the answer is")


@dataclass
class Task:
    """What ppo_llm.train takes."""
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast
    prompts: list
    held_out: list
    rewards: list
    settings: ppo_llm.Config


def word_tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0], **special)


def demo(seed: int) -> Task:
    ppo_llm.seed_everything(seed)
    model, tokenizer, prompts, held_out, rewards = ppo_llm.demo_task(seed)
    return Task(model, tokenizer, prompts, held_out, rewards, ppo_llm.DEMO)


def exact(prompts, completions, answer, **columns) -> list[float]:
    """1 if the reply says the answer and ends."""
    texts = [completion[0]["content"].split() for completion in completions]
    return [float(text[-2:] == [right, "."]) for text, right in zip(texts, answer)]


def sums(seed: int, steps: int = 240) -> Task:
    ppo_llm.seed_everything(seed)
    words = ["<pad>", "</s>", "user", "assistant", "+", "?", ".", *map(str, range(19))]
    words += sorted({word for form in FORMS for word in form.split()})
    tokenizer = word_tokenizer(words, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    special = dict(pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True, initializer_range=0.1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **size, **special))

    rows = []
    for a, b in itertools.product(range(10), repeat=2):
        rows.append({"prompt": [{"role": "user", "content": f"{a} + {b} ?"}], "answer": str(a + b)})
    rng = random.Random(seed)
    rng.shuffle(rows)
    held_out, trained = rows[:40], rows[40:]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        texts = []
        for row in rng.choices(rows, k=128):
            answer = row["answer"] if rng.random() < 0.4 else str(rng.randrange(19))
            question = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            texts.append(f"{question} {rng.choice(FORMS)} {answer} . </s>")
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        is_reply = (batch["input_ids"] == words.index("assistant")).cumsum(1).bool() & batch["attention_mask"].bool()
        labels = batch["input_ids"].where(is_reply, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    settings = ppo_llm.Config(
        num_updates=20, batch_size=128, response_length=12, learning_rate=5e-4, kl_coef=0.05, missing_eos_penalty=1.0
    )
    return Task(model, tokenizer, trained, held_out, [exact], settings)


def both_ends(prompts, completions, **columns) -> list[float]:
    """Half a point if the first token is one of t0, t4, t8 ..., and half a point if the last is."""
    replies = [[int(word[1:]) for word in completion.split()] for completion in completions]
    return [0.5 * (reply[0] % 4 == 0) + 0.5 * (reply[-1] % 4 == 0) for reply in replies]


def ends(seed: int) -> Task:
    ppo_llm.seed_everything(seed)
    size = dict(vocab_size=32, n_positions=64, n_layer=2, n_embd=64, n_head=4)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **size))
    tokenizer = word_tokenizer([f"t{i}" for i in range(32)])
    rng = random.Random(seed)
    prompts = [" ".join(f"t{rng.randrange(32)}" for _ in range(8)) for _ in range(640)]
    settings = ppo_llm.Config(num_updates=25, batch_size=64, response_length=48, learning_rate=3e-3, kl_coef=0.02)
    return Task(model, tokenizer, prompts[64:], prompts[:64], [both_ends], settings)


def early(completion_ids, **columns) -> list[float]:
    return [float(ids[0] % 4 == 0) for ids in completion_ids]


def every(completion_ids, **columns) -> list[list[float]]:
    return [[(token % 4 == 0) / len(ids) for token in ids] for ids in completion_ids]


def end(completion_ids, **columns) -> list[float]:
    return [sum(tokens) for tokens in every(completion_ids)]


def long(reward, length: int, seed: int) -> Task:
    """The penalty of a token is worth the same at any length: where each token counts, it is 0.3 of its share."""
    base = ends(seed)
    model = GPT2LMHeadModel(GPT2Config(**base.model.config.to_diff_dict() | {"n_positions": 8 + length}))
    kl_coef = 0.02 if reward is early else 0.3 / length
    settings = dataclasses.replace(base.settings, num_updates=30, response_length=length, kl_coef=kl_coef)
    return dataclasses.replace(base, model=model, rewards=[reward], settings=settings)


SMALL = {"demo": demo, "sums": sums, "ends": ends}
LONG = {
    f"{reward.__name__}-{length}": functools.partial(long, reward, length)
    for length in (16, 64, 128, 256)
    for reward in (early, end, every)
}
TASKS = SMALL | LONG


def centered(reward):
    """The reward less its mean over the replies to the same prompt; where each token is paid, place by place."""

    def center(prompts, **columns) -> list:
        scores = torch.tensor(reward(prompts=prompts, **columns), dtype=torch.float64)  # [B] or [B, T]
        for prompt in {*map(str, prompts)}:
            rows = [i for i, other in enumerate(prompts) if str(other) == prompt]
            scores[rows] -= scores[rows].mean(0)
        return scores.tolist()

    return center


def long_returns(actor, batch, cfg):
    """The loss with a critic whose own λ is 1, whatever that of the advantages is (VC-PPO, arXiv 2503.01491)."""
    returns, _ = ppo_llm.gae(batch.rewards, torch.zeros_like(batch.rewards), batch.mask, cfg.gamma)
    return ppo_llm.ppo_loss(actor, dataclasses.replace(batch, returns=returns), cfg)


@contextlib.contextmanager
def more_epochs(number: int):
    """After each update the critic alone is trained for this many epochs more."""
    update = ppo_llm.ppo_update

    def longer(actor, optimizer, rollout, cfg, critic_only=False, loss=ppo_llm.ppo_loss):
        stats = update(actor, optimizer, rollout, cfg, critic_only, loss)
        if number:
            update(actor, optimizer, rollout, dataclasses.replace(cfg, num_ppo_epochs=number), True, loss)
        return stats

    ppo_llm.ppo_update = longer
    yield
    ppo_llm.ppo_update = update


def train(
    task: Task, seed: int, center: bool = False, loss=ppo_llm.ppo_loss, critic_epochs: int = 0, **changes
) -> list[dict]:
    """Rows of one run as ppo_llm.train makes it: of each update, and of held-out prompts before and after.

    center: what is trained on is the first reward less the mean of its group; the rows have that reward as it is.
    """
    cfg = dataclasses.replace(task.settings, seed=seed, **changes)
    rewards, score = task.rewards, task.rewards[0].__name__
    if center:
        rewards = [centered(rewards[0]), *rewards]
        cfg = dataclasses.replace(cfg, reward_weights=(1.0, *[0.0] * len(task.rewards)))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cfg = dataclasses.replace(cfg, output_dir=f"{folder}/run")
        model = copy.deepcopy(task.model)
        ours = ppo_llm.prepare(cfg, task.prompts, rewards, model, task.tokenizer, task.held_out)
        rows = [as_row(ppo_llm.evaluate_held_out(ours)[0], score)]
        basics = ours.actor, ours.ref, ours.optimizer, ours.prompts, ours.score, ours.stop_ids, cfg, ours.progress
        with more_epochs(critic_epochs):
            rows += [as_row(metrics, score) for metrics, _ in ppo_llm.ppo(*basics, loss=loss)]
        return rows + [as_row(ppo_llm.evaluate_held_out(ours)[0], score)]


def as_row(metrics: dict, score: str) -> dict:
    """A row of the CSV. score: the name of the reward function."""
    trained = "objective/scores" in metrics
    prefix = "" if trained else "eval/"
    return {
        "part": "train" if trained else "held-out",
        "update": metrics["update"],
        "score": metrics[f"{prefix}rewards/{score}"],
        "kl": metrics["objective/kl" if trained else "eval/kl"],
        "fluency": metrics.get(f"{prefix}rewards/fluency", ""),
        "explained_variance": metrics.get("val/explained_variance", ""),
    }


def which_commit() -> str:
    """The commit that ppo_llm.py is of, with a + if it has been changed since."""
    git = ["git", "-C", HERE]
    found = subprocess.run([*git, "log", "-1", "--format=%h", "--", "ppo_llm.py"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "ppo_llm.py"]).returncode
    return found.stdout.strip() + "+" * (changed != 0)


COMMIT = which_commit()  # once: the file may change while its runs go on


def done(path: Path) -> set[tuple]:
    """The runs by this ppo_llm.py that the CSV holds: (task, change, seed)."""
    rows = read_rows(path).get(COMMIT, []) if path.exists() else []
    return {(row["task"], row["change"], int(row["seed"])) for row in rows}


def append(path: Path, task: str, change: str, seed: int, rows: list[dict]) -> None:
    """A run is written at once: one that was interrupted leaves no row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    run = {"task": task, "change": change, "seed": seed, "commit": COMMIT}
    for row in rows:
        row = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in row.items()}
        writer.writerow(run | row)
        run = {}  # only the first row names it
    with open(path, "a") as file:
        file.write(text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["sums", "ends"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[args.task](args.seed)
    task.model.save_pretrained(args.folder)
    task.tokenizer.save_pretrained(args.folder)
    for name, prompts in [("prompts", task.prompts), ("held_out", task.held_out)]:
        rows = [json.dumps({"prompt": x} if isinstance(x, str) else x) + "\n" for x in prompts]
        (args.folder / f"{name}.jsonl").write_text("".join(rows))
    files = f"--prompts {args.folder}/prompts.jsonl --eval-prompts {args.folder}/held_out.jsonl"
    print(f"python ppo_llm.py --model {args.folder} {files} --reward {__file__}:{task.rewards[0].__name__}", end="")
    for name, value in vars(task.settings).items():
        if value != getattr(ppo_llm.Config(), name):
            print(f" --{name.replace('_', '-')} {value}", end="")
    print(f" --seed {args.seed}")


if __name__ == "__main__":
    main()
