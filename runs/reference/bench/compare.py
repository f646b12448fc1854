"""An update of ppo_llm.py against one of TRL's PPOTrainer: seconds and peak memory on the same work, in turn, as ratios.

    python -m venv trl-venv
    trl-venv/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    python runs/reference/bench/compare.py --trl trl-venv/bin/python
    python runs/reference/bench/compare.py          # ours alone: short replies, batch sizes, micro-batches

The work: a GPT-2 of random weights, prompts of 16 tokens, replies of full length (there is no EOS), the share of even
tokens as the score, 4 epochs of 4 minibatches; TRL in float32. The first update of a process is left out; the rest give
a median. Every repeat runs TRL, then ours with each of FLAGS; the ratios are medians over repeats.
"""
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {"tiny": dict(n_layer=4, n_embd=128, n_head=4, vocab_size=128), "small": dict(n_layer=6, n_embd=384, n_head=6, vocab_size=5000),
         "gpt2": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257)}
WORK = [("tiny", 64, 32), ("tiny", 64, 64), ("tiny", 256, 32), ("tiny", 256, 64), ("small", 64, 32), ("gpt2", 16, 32)]
FLAGS = [(), ("--critic", "separate"), ("--matmul-precision", "medium"), ("--dtype", "bfloat16")]
REWARD = """
def even(prompts, completions, **columns):
    return [sum(int(word[1:]) % 2 == 0 for word in text.split()) / max(1, len(text.split())) for text in completions]
"""


def make_model(size: str, kind="GPT2LMHeadModel", **more):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES[size], n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                     bos_token_id=None, eos_token_id=None, **more)
    return getattr(transformers, kind)(config)


def make_tokenizer(size: str, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(SIZES[size]["vocab_size"])}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0", padding_side="left", **special)


def make_prompts(size: str):
    import torch

    return torch.randint(0, SIZES[size]["vocab_size"], (1024, 16), generator=torch.Generator().manual_seed(0)).tolist()


def trl(size: str, batch: int, reply: int, updates: int) -> None:
    """Runs in TRL's environment; the last line printed is the seconds of each update."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Even(torch.nn.Module):
        """A reward model to TRL: its hidden state is the share of even tokens in what follows the prompt."""
        base_model_prefix = "trunk"

        def __init__(self):
            super().__init__()
            self.score, self.trunk = torch.nn.Identity(), self.share

        @staticmethod
        def share(input_ids, **_):
            even = (input_ids[:, 16:] % 2 == 0).float().mean(1)
            return type("Output", (), {"hidden_states": [even.view(-1, 1, 1).expand(-1, input_ids.shape[1], 1)]})

    class Clock(TrainerCallback):
        ticks = []

        def on_train_begin(self, *_, **__):
            self.ticks.append(time.perf_counter())

        on_step_end = on_train_begin

    tokenizer = make_tokenizer(size, pad_token="<pad>", eos_token="<eos>")  # beyond the model's vocabulary: never sampled
    settings = PPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, num_ppo_epochs=4,
                         num_mini_batches=4, per_device_train_batch_size=batch, gradient_accumulation_steps=1,
                         total_episodes=updates * batch, response_length=reply, temperature=1.0, learning_rate=1e-5, kl_coef=0.05,
                         num_sample_generations=0, report_to="none", save_strategy="no", disable_tqdm=True)
    PPOTrainer(args=settings, processing_class=tokenizer, model=make_model(size), ref_model=make_model(size), reward_model=Even(),
               value_model=make_model(size, "GPT2ForSequenceClassification", num_labels=1), callbacks=[Clock()],
               train_dataset=Dataset.from_dict({"input_ids": make_prompts(size)})).train()
    print(json.dumps([b - a for a, b in zip(Clock.ticks, Clock.ticks[1:])]))


def run(command: list) -> tuple[str, float]:
    """What a command printed, and its peak memory in MB."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    assert child.returncode == 0, f"{command} ended with {child.returncode}: run it by hand"
    return text, usage.ru_maxrss / 1024


def make_folder(work: Path, size: str, stops: int = 0) -> Path:
    """Model and prompts as files. stops: how many of the first token ids end a reply."""
    folder = work / f"{size}-{stops}"
    if not folder.exists():
        model = make_model(size)
        model.generation_config.eos_token_id = list(range(stops)) or None
        model.save_pretrained(folder)
        make_tokenizer(size).save_pretrained(folder)
        (folder / "prompts.jsonl").write_text("".join(
            json.dumps({"prompt": " ".join(f"t{i}" for i in row)}) + "\n" for row in make_prompts(size)))
        (folder / "even.py").write_text(REWARD)
    return folder


def ours(model: Path, batch: int, reply: int, updates: int, *flags) -> tuple[float, float, float]:
    """Seconds of an update, peak memory in MB, and the PPO epochs' share of what a matrix product reaches."""
    folder = Path(tempfile.mkdtemp(dir=model))
    text, memory = run([sys.executable, Path(__file__).parents[3] / "ppo_llm.py", "--model", model, "--prompts", model / "prompts.jsonl",
                        "--reward", f"{model}/even.py:even", "--batch-size", batch, "--response-length", reply, "--num-updates",
                        updates, "--runs-dir", folder, "--name", "x", "--profile", *flags])
    rows = [json.loads(line) for line in open(folder / "x" / "metrics.jsonl")]
    seconds = [sum(x for name, x in row.items() if name.startswith("time/")) for row in rows if "time/update" in row]
    return statistics.median(seconds[1:]), memory, float(re.search(r"\((\d+)%", text)[1])


def against_trl(work: Path, python: str, repeats: int, updates: int) -> None:
    """A table of seconds, row by row, then one of memory, and of the share of a matrix product's speed."""
    modes = [f"`{' '.join(flags)}`" for flags in FLAGS[1:]]
    print("| size, batch, reply | TRL, s | ours, s | TRL ÷ ours | " + " | ".join(f"÷ {mode}" for mode in modes) + " |\n" + "|---" * 7 + "|")
    second = [f"| size, batch, reply | TRL, MB | ours, MB | TRL ÷ ours | ÷ {modes[0]} | of peak | {modes[1]} | {modes[2]} |", "|---" * 8 + "|"]
    for size, batch, reply in WORK:
        found, model = [], make_folder(work, size)
        for _ in range(repeats):
            text, memory = run([python, __file__, "trl", size, batch, reply, updates])
            theirs = statistics.median(json.loads(text.splitlines()[-1])[1:])
            seconds, megabytes, share = zip(*(ours(model, batch, reply, updates, *flags) for flags in FLAGS))
            found.append((theirs, seconds[0], *(theirs / x for x in seconds), memory, megabytes[0], memory / megabytes[0],
                          memory / megabytes[1], *(x / 100 for x in (share[0], *share[2:]))))
            print([round(x, 2) for x in found[-1]], file=sys.stderr, flush=True)
        m = list(map(statistics.median, zip(*found)))
        print(f"| {size}, {batch}, {reply} | " + " | ".join(f"{x:.2f}" for x in m[:6]) + " |", flush=True)
        second.append(f"| {size}, {batch}, {reply} | " + " | ".join(f"{x:{form}}" for x, form in zip(
            m[6:], (".0f", ".0f", ".2f", ".2f", ".0%", ".0%", ".0%"))) + " |")
    print("", *second, sep="\n")


def alone(work: Path, repeats: int, updates: int) -> None:
    print("| size, batch | replies of 64 tokens, s | of geometric length, mean 8, s | share |\n|---|---|---|---|")
    for size, batch in (("tiny", 64), ("tiny", 256), ("small", 64)):
        full, short = make_folder(work, size), make_folder(work, size, SIZES[size]["vocab_size"] // 8)
        found = [(ours(full, batch, 64, updates)[0], ours(short, batch, 64, updates)[0]) for _ in range(repeats)]
        a, b = map(statistics.median, zip(*found))
        print(f"| {size}, {batch} | {a:.2f} | {b:.2f} | {statistics.median(y / x for x, y in found):.2f} |", flush=True)
    print("\n| tiny, replies of 32, batch | micro-batch | ms a response token | peak memory, MB |\n|---|---|---|---|")
    for batch, micro in ((16, 4), (64, 16), (256, 64), (1024, 256), (64, 8), (256, 8), (1024, 8)):
        found = [ours(make_folder(work, "tiny"), batch, 32, updates, "--micro-batch-size", micro)[:2] for _ in range(repeats)]
        seconds, memory = map(statistics.median, zip(*found))
        print(f"| {batch} | {micro} | {1000 * seconds / batch / 32:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "trl":
        trl(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        import argparse

        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--trl", help="Python of an environment with TRL")
        parser.add_argument("--repeats", type=int, default=3)
        parser.add_argument("--updates", type=int, default=4, help="of each process, the first is left out")
        args = parser.parse_args()
        with tempfile.TemporaryDirectory() as folder:
            if args.trl:
                against_trl(Path(folder), args.trl, args.repeats, args.updates)
            else:
                alone(Path(folder), args.repeats, args.updates)
