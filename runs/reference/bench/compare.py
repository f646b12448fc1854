"""An update of ppo_llm.py against one of TRL's PPOTrainer, on the same work and in turn: seconds, peak memory, ratios.

    python -m venv trl-venv
    trl-venv/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    python runs/reference/bench/compare.py --trl trl-venv/bin/python
    python runs/reference/bench/compare.py          # ours alone: short replies, batch sizes, micro-batches

Versions of ppo_llm.py against each other in turn, then the same under flags that all of them know:

    python runs/reference/bench/compare.py --ours old/ppo_llm.py --ours ppo_llm.py --rows tiny-64-32 small-64-32
    python runs/reference/bench/compare.py --ours old/ppo_llm.py --ours ppo_llm.py -- --dtype bfloat16

The work: a GPT-2 of random weights, prompts of 16 tokens, replies of full length (there is no EOS), the share of even
tokens as the score, 4 epochs of 4 minibatches; TRL in float32. The first update of a process is left out; the rest give
a median. Every repeat runs TRL, then ours with each of FLAGS; the ratios are medians over repeats.
"""
import argparse
import json
import os
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = Path(__file__).parents[3] / "ppo_llm.py"
# glibc keeps freed memory: without it each tensor costs its page faults again.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
SIZES = {
    "tiny": dict(n_layer=4, n_embd=128, n_head=4, vocab_size=128),
    "small": dict(n_layer=6, n_embd=384, n_head=6, vocab_size=5000),
    "gpt2": dict(n_layer=12, n_embd=768, n_head=12, vocab_size=50257),
}
ROWS = ["tiny-64-32", "tiny-64-64", "tiny-256-32", "tiny-256-64", "small-64-32", "gpt2-16-32"]
FLAGS = [(), ("--critic", "separate"), ("--dtype", "bfloat16")]
PROMPT, EPOCHS, MINI_BATCHES = 16, 4, 4
REWARD = """
def even(prompts, completions, **columns):
    return [sum(int(word[1:]) % 2 == 0 for word in text.split()) / max(1, len(text.split())) for text in completions]
"""


# The work, for TRL and for ours.


def make_model(size: str, kind: str = "GPT2LMHeadModel", **more):
    import torch
    import transformers

    torch.manual_seed(0)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    no_ends = dict(bos_token_id=None, eos_token_id=None)
    config = transformers.GPT2Config(**SIZES[size], n_positions=128, **no_dropout, **no_ends, **more)
    return getattr(transformers, kind)(config)


def make_reward_model():
    """What scores the share of even tokens after the prompt, as TRL reads it: out of a hidden state."""
    import torch

    class Even(torch.nn.Module):
        base_model_prefix = "trunk"

        def __init__(self):
            super().__init__()
            self.score = torch.nn.Identity()
            self.trunk = self.share

        @staticmethod
        def share(input_ids, **_):
            even = (input_ids[:, PROMPT:] % 2 == 0).float().mean(1)
            states = even.view(-1, 1, 1).expand(-1, input_ids.shape[1], 1)
            return type("Output", (), {"hidden_states": [states]})

    return Even()


def make_tokenizer(size: str, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(SIZES[size]["vocab_size"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0", padding_side="left", **special)


def make_prompts(size: str) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, SIZES[size]["vocab_size"], (1024, PROMPT), generator=generator).tolist()


def make_folder(work: Path, size: str, stops: int = 0) -> Path:
    """Model, prompts and reward as files. stops: how many of the first token ids end a reply.

    In a process of its own: the peak memory of a child is never below what its parent had when it started.
    """
    folder = work / f"{size}-{stops}"
    if not folder.exists():
        run(sys.executable, __file__, "folder", folder, size, stops)
    return folder


def write_folder(folder: Path, size: str, stops: int) -> None:
    model = make_model(size)
    model.generation_config.eos_token_id = list(range(stops)) or None
    model.save_pretrained(folder)
    make_tokenizer(size).save_pretrained(folder)
    with open(folder / "prompts.jsonl", "w") as file:
        for row in make_prompts(size):
            text = " ".join(f"t{i}" for i in row)
            file.write(json.dumps({"prompt": text}) + "\n")
    (folder / "even.py").write_text(REWARD)


# What runs in a child process, and how it is started.


def trl(size: str, batch: int, reply: int, updates: int) -> None:
    """Runs in TRL's environment; the last line printed is the seconds of each update."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    ticks = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            ticks.append(time.perf_counter())

        on_step_end = on_train_begin

    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_ppo_epochs=EPOCHS,
        num_mini_batches=MINI_BATCHES,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        total_episodes=updates * batch,
        response_length=reply,
        temperature=1.0,
        learning_rate=1e-5,
        kl_coef=0.05,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=settings,
        processing_class=make_tokenizer(size, pad_token="<pad>", eos_token="<eos>"),  # the model has neither
        model=make_model(size),
        ref_model=make_model(size),
        reward_model=make_reward_model(),
        value_model=make_model(size, "GPT2ForSequenceClassification", num_labels=1),
        callbacks=[Clock()],
        train_dataset=Dataset.from_dict({"input_ids": make_prompts(size)}),
    )
    trainer.train()
    print(json.dumps([end - start for start, end in zip(ticks, ticks[1:])]))


def matmul(tokens: int, width: int, dtype: str) -> None:
    """Prints the FLOP/s of a matrix product as in a layer's MLP: the median of 9 timings of at least 0.05 s each."""
    import torch

    states = torch.randn(tokens, width).to(getattr(torch, dtype))
    weights = torch.randn(width, 4 * width).to(states)
    product = states @ weights  # every timing writes here: the memory for it is not asked for anew
    repeats, rates = 1, []
    while len(rates) < 9:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(states, weights, out=product)
        seconds = time.perf_counter() - start
        if seconds < 0.05:
            repeats *= 2
        else:
            rates.append(2 * tokens * weights.numel() * repeats / seconds)
    print(statistics.median(rates))


def run(*command) -> tuple[str, float]:
    """What a command printed, and its peak memory in MB."""
    command = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=out, stderr=errors, env=os.environ | ALLOCATOR)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        printed, complaints = out.read(), errors.read()
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: ended with {child.returncode}\n{complaints.strip()[-2000:]}")
    return printed, usage.ru_maxrss / 1024


# One measurement.


def measure_trl(python: Path, size: str, batch: int, reply: int, updates: int) -> tuple[float, float]:
    """Seconds of an update of TRL, and its peak memory in MB."""
    printed, memory = run(python, __file__, "trl", size, batch, reply, updates)
    seconds = json.loads(printed.splitlines()[-1])
    return statistics.median(seconds[1:]), memory


def measure(script: Path, model: Path, batch: int, reply: int, updates: int, *flags) -> tuple[list[dict], float]:
    """The metrics of our updates, without the first, and the peak memory in MB."""
    folder = Path(tempfile.mkdtemp(dir=model))
    task = ["--model", model, "--prompts", model / "prompts.jsonl", "--reward", f"{model}/even.py:even"]
    task += ["--batch-size", batch, "--response-length", reply, "--num-updates", updates]
    _, memory = run(sys.executable, script, *task, "--output-dir", folder / "x", *flags)
    rows = [json.loads(line) for line in open(folder / "x" / "metrics.jsonl")]
    rows = [row for row in rows if "time/update" in row]
    return rows[1:], memory


def seconds_of(rows: list[dict]) -> float:
    """Seconds of an update, all its phases together: the median of the rows."""
    totals = []
    for row in rows:
        phases = [x for name, x in row.items() if name.startswith("time/")]
        totals.append(sum(phases))
    return statistics.median(totals)


def update_flops(shape: dict, batch: int, reply: float, trunks: int) -> float:
    """FLOPs that the PPO epochs of an update need: 2 a weight and token forward, 4 backward.

    Padding, recomputation and the optimizer are not counted. reply: mean tokens of a reply, all of the same length.
    """
    width, layers = shape["n_embd"], shape["n_layer"]
    length = PROMPT + reply - 1  # the last token predicts nothing
    weights = 12 * width**2  # of a layer: 4 width² in its attention, 8 width² in its MLP
    past = width * length  # a layer's attention to the past: two products, half of each, as it is causal
    trunk = layers * (weights + past) * length
    head = shape["vocab_size"] * width * reply  # logits only where a response token is predicted
    return 6 * EPOCHS * batch * (trunks * trunk + head)


def ours(model: Path, batch: int, reply: int, updates: int, *flags, script: Path = OURS) -> tuple[float, float, float]:
    """Seconds of an update, peak memory in MB, and the PPO epochs' speed in percent of a matrix product's.

    The product is of the shape of a layer's MLP, in the same mode, and is measured right after the run.
    """
    rows, memory = measure(script, model, batch, reply, updates, *flags)
    settings = {"--critic": "shared", "--dtype": "float32"} | dict(zip(flags[::2], flags[1::2]))

    shape = json.loads((model / "config.json").read_text())
    trunks = 2 if settings["--critic"] == "separate" else 1
    speeds = []
    for row in rows:
        speeds.append(update_flops(shape, batch, row["reply/length"], trunks) / row["time/update"])
    tokens = min(16, batch // MINI_BATCHES) * reply  # of a micro-batch of the default size
    printed, _ = run(sys.executable, __file__, "matmul", tokens, shape["n_embd"], settings["--dtype"])
    return seconds_of(rows), memory, 100 * statistics.median(speeds) / float(printed)


# The tables. A row of one is the medians of repeats; a repeat gives the row's numbers in the order of its columns.


def medians(args, repeat, *what) -> list[float]:
    """The medians of what repeat(args, *what) gives. Each repeat is shown as it comes."""
    found = []
    for _ in range(args.repeats):
        numbers = repeat(args, *what)
        found.append(numbers)
        print([round(x, 2) for x in numbers], file=sys.stderr, flush=True)
    return [statistics.median(column) for column in zip(*found)]


def print_row(*cells) -> None:
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def print_head(*cells) -> None:
    print_row(*cells)
    print("|---" * len(cells) + "|")


def form(pattern: str, numbers: list[float]) -> list[str]:
    return [format(x, pattern) for x in numbers]


def repeat_trl(args, model: Path, size: str, batch: int, reply: int) -> list[float]:
    """TRL, then ours with each of FLAGS: a row of the table of seconds, then one of the table of memory and speed."""
    trl_seconds, trl_memory = measure_trl(args.trl, size, batch, reply, args.updates)
    results = [ours(model, batch, reply, args.updates, *flags, script=args.ours[0]) for flags in FLAGS]
    seconds, memory, percent = zip(*results)
    time_row = [trl_seconds, seconds[0], *(trl_seconds / x for x in seconds)]
    memory_row = [trl_memory, memory[0], trl_memory / memory[0], trl_memory / memory[1]]
    speed = [percent[0] / 100, percent[2] / 100]
    return time_row + memory_row + speed


def against_trl(folder: Path, args) -> None:
    """A table of seconds, row by row, then one of memory and of the share of a matrix product's speed."""
    separate, bfloat16 = (f"`{' '.join(flags)}`" for flags in FLAGS[1:])
    first = "size, batch, reply"
    print_head(first, "TRL, s", "ours, s", "TRL ÷ ours", f"÷ {separate}", f"÷ {bfloat16}")
    second_table = []
    for size, batch, reply in args.rows:
        model = make_folder(folder, size)
        numbers = medians(args, repeat_trl, model, size, batch, reply)
        name = f"{size}, {batch}, {reply}"
        megabytes, memory_ratios, shares = numbers[5:7], numbers[7:9], numbers[9:]
        print_row(name, *form(".2f", numbers[:5]))
        second_table.append([name, *form(".0f", megabytes), *form(".2f", memory_ratios), *form(".0%", shares)])

    print()
    print_head(first, "TRL, MB", "ours, MB", "TRL ÷ ours", f"÷ {separate}", "of peak", bfloat16)
    for cells in second_table:
        print_row(*cells)


def repeat_stops(args, full: Path, short: Path, batch: int) -> list[float]:
    """Replies of full length, replies that stop, and the share of the time that these take."""
    full_rows, _ = measure(args.ours[0], full, batch, 64, args.updates)
    short_rows, _ = measure(args.ours[0], short, batch, 64, args.updates)
    return [seconds_of(full_rows), seconds_of(short_rows), seconds_of(short_rows) / seconds_of(full_rows)]


def repeat_micro(args, model: Path, batch: int, micro: int) -> list[float]:
    rows, memory = measure(args.ours[0], model, batch, 32, args.updates, "--micro-batch-size", micro)
    return [1000 * seconds_of(rows) / batch / 32, memory]


def alone(folder: Path, args) -> None:
    """A table of replies that stop early, then one of batch sizes and micro-batches."""
    print_head("size, batch", "replies of 64 tokens, s", "of geometric length, mean 8, s", "share")
    for size, batch in (("tiny", 64), ("tiny", 256), ("small", 64)):
        full = make_folder(folder, size)
        short = make_folder(folder, size, stops=SIZES[size]["vocab_size"] // 8)
        numbers = medians(args, repeat_stops, full, short, batch)
        print_row(f"{size}, {batch}", *form(".2f", numbers))

    print()
    print_head("tiny, replies of 32, batch", "micro-batch", "ms a response token", "peak memory, MB")
    model = make_folder(folder, "tiny")
    for batch, micro in ((16, 4), (64, 16), (256, 64), (1024, 256), (64, 8), (256, 8), (1024, 8)):
        milliseconds, memory = medians(args, repeat_micro, model, batch, micro)
        print_row(batch, micro, f"{milliseconds:.2f}", f"{memory:.0f}")


def repeat_versions(args, model: Path, batch: int, reply: int) -> list[float]:
    """Seconds of each version, those of the first over those of each other, and megabytes of each."""
    results = [measure(script, model, batch, reply, args.updates, *args.flags) for script in args.ours]
    seconds = [seconds_of(rows) for rows, _ in results]
    memory = [megabytes for _, megabytes in results]
    return seconds + [seconds[0] / x for x in seconds[1:]] + memory


def versions(folder: Path, args) -> None:
    """A table of several versions of ppo_llm.py that run in turn: the first is a, the others b, c, ..."""
    names = string.ascii_lowercase[:len(args.ours)]
    for name, script in zip(names, args.ours):
        print(f"{name}: {script}", *args.flags)
    print()
    seconds = [f"{name}, s" for name in names]
    ratios = [f"a ÷ {name}" for name in names[1:]]
    memory = [f"{name}, MB" for name in names]
    print_head("size, batch, reply", *seconds, *ratios, *memory)
    for size, batch, reply in args.rows:
        numbers = medians(args, repeat_versions, make_folder(folder, size), batch, reply)
        times, megabytes = numbers[:-len(names)], numbers[-len(names):]
        print_row(f"{size}, {batch}, {reply}", *form(".2f", times), *form(".0f", megabytes))


# The command line.


def parse_row(text: str) -> tuple[str, int, int]:
    size, *numbers = text.split("-")
    if size not in SIZES or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: expected SIZE-BATCH-REPLY, as in {', '.join(ROWS)}")
    return size, int(numbers[0]), int(numbers[1])


def parse_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: expected a file")
    return Path(text)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--trl PYTHON] [--ours FILE]... [--rows ROW ...] [--repeats N] [--updates N] [-- FLAG ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trl", metavar="PYTHON", type=parse_file, help="of an environment with TRL")
    parser.add_argument("--ours", metavar="FILE", type=parse_file, action="append",
                        help="a ppo_llm.py, by default this checkout's; if given again, these are compared")
    parser.add_argument("--rows", metavar="ROW", type=parse_row, nargs="+",
                        help=f"SIZE-BATCH-REPLY, by default {' '.join(ROWS)}")
    parser.add_argument("--repeats", metavar="N", type=int, default=3, help="by default 3")
    parser.add_argument("--updates", metavar="N", type=int, default=4, help="of each process, by default 4")
    parser.add_argument("flags", metavar="FLAG", nargs="*", help="given to each version that is compared")
    args = parser.parse_args()

    several = args.ours is not None and len(args.ours) > 1
    if args.trl and several:
        parser.error("--trl and several --ours: expected one of the two")
    if args.rows and not args.trl and not several:
        parser.error("--rows: expected --trl or several --ours beside it")
    if args.flags and not several:
        parser.error(f"{' '.join(args.flags)}: expected several --ours, which such flags are for")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected 1 or more")
    if args.updates < 2:
        parser.error(f"--updates {args.updates}: expected 2 or more, as the first is left out")
    args.ours = args.ours or [OURS]
    args.rows = args.rows or [parse_row(row) for row in ROWS]
    return args


def main() -> None:
    args = read_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if args.trl:
            against_trl(Path(folder), args)
        elif len(args.ours) > 1:
            versions(Path(folder), args)
        else:
            alone(Path(folder), args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["trl"]:
        trl(sys.argv[2], *map(int, sys.argv[3:]))
    elif sys.argv[1:2] == ["folder"]:
        write_folder(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["matmul"]:
        matmul(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()
