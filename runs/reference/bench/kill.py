"""Kills a run by SIGKILL at random moments, goes on with it each time, and compares it with an undisturbed one.

    python runs/reference/bench/kill.py 100        # 6 minutes of one core

The run is a small one in which everything has a state: a critic of its own, an adaptive β, critic warm-up, a decaying
learning rate. It saves after every update. Every other kill waits for the middle of a save, if there is one soon. None
comes so late that a fast machine could end the run before the last. The exit status is 0 if metrics, samples and all
weights at the end are the same, bit for bit.
"""
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import tyro  # noqa: F401  each life of the run is a fork of this process, which has all modules
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[3]))
import ppo_llm

WORDS = "? . a b c d e f g h".split()
REWARD = "def words(completions, **columns): return [float(len(set(text.split()))) for text in completions]\n"
FLAGS = (
    "--model model --prompts prompts.txt --reward reward.py:words --device cpu --response-length 6 --batch-size 12 "
    "--num-mini-batches 2 --learning-rate 1e-2 --critic separate --critic-lr 3e-2 --kl-target 0.1 --kl-horizon 50 "
    "--critic-warmup-updates 2 --lr-scheduler-type linear --save-every 1 --num-updates"
).split()


def make_files() -> None:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=".").save_pretrained("model")
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained("model")
    Path("prompts.txt").write_text("".join(f"{x} {y}\n" for x in "abcdefgh" for y in "abc"))
    Path("reward.py").write_text(REWARD)


def live(arguments: list[str]) -> int:
    """Start a life of the run: the number of its process."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("life.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os._exit(ppo_llm.main(arguments))
    return pid


def logged() -> int:
    """Rows of the run's log: one an update, and one before the first."""
    path = Path("killed/metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def outcome(run: Path):
    metrics = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: x for name, x in row.items() if not name.startswith("time/")} for row in metrics]
    weights = torch.load(run / "checkpoint.pt")["actor"]
    return metrics, (run / "samples.jsonl").read_text(), {name: x.tolist() for name, x in weights.items()}


def main() -> None:
    kills = int(sys.argv[1])
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())
    make_files()
    flags = [*FLAGS, str(8 * kills)]
    draw, killed, in_a_save = random.Random(0), 0, 0
    while True:
        pid = live(["--resume", "killed"] if os.path.exists("killed/config.json") else [*flags, "--output-dir", "killed"])
        end = time.monotonic() + draw.uniform(0.2, 2.0)
        while killed < kills and time.monotonic() < end:
            time.sleep(0.001)
            if logged() > 8 * killed + 4:
                break
            if killed % 2 and end - time.monotonic() < 1 and os.path.exists("killed/unfinished"):
                break
        in_a_save += killed < kills and os.path.exists("killed/unfinished")
        if killed < kills:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            break
        killed += 1
    if killed < kills or os.WEXITSTATUS(status) != 0:
        sys.exit(f"life {killed} ended with status {os.WEXITSTATUS(status)}: {Path('life.txt').read_text()[-2000:]}")
    os.waitpid(live([*flags, "--output-dir", "alone"]), 0)
    same = outcome(Path("killed")) == outcome(Path("alone"))
    print(f"killed {killed} times, {in_a_save} of them in a save: {'the same' if same else 'NOT the same'} at the end")
    sys.exit(not same)


if __name__ == "__main__":
    main()
