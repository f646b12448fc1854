"""How much memory training needs on a GPU, worked out without one: tensors that have shapes and no numbers are counted.

    python runs/reference/bench/memory.py       # four minutes

A model of Qwen2-1.5B's shape, prompts of 128 tokens, replies of 448, products in bfloat16: the second step of AdamW, of
two micro-batches, and then the forward pass before the next update, which computes entropies too. Not in it: the keys
and values of sampling, what the allocator loses between tensors, and CUDA's own. Kernels are taken to keep what those
of a CPU keep.
"""
import argparse
import itertools
import multiprocessing
import os
import sys
import warnings
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
import ppo_llm as P
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import Qwen2Config, Qwen2ForCausalLM

SHAPE = dict(num_hidden_layers=28, hidden_size=1536, intermediate_size=8960, num_attention_heads=12)
SHAPE |= dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
PROMPT, REPLY = 128, 448


class Bytes(TorchDispatchMode):
    """Bytes of all tensors that were made inside and still are: now, and at most."""
    now = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **kwargs or {})
        for x in tree_iter(outputs):
            if isinstance(x, torch.Tensor) and not hasattr(x.untyped_storage(), "is_counted"):
                x.untyped_storage().is_counted = True
                size = x.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(x.untyped_storage(), self.forget, size)
        return outputs

    def forget(self, size: int) -> None:
        self.now -= size


def measure(micro_batch: int, checkpointing: bool) -> None:
    """Prints a row and ends the process: torch 2.13 crashes when it takes such tensors down."""
    warnings.simplefilter("ignore")  # torch's, of such tensors
    with FakeTensorMode(allow_non_fake_inputs=True), Bytes() as count:
        lm = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
        lm.to = lm.float = lambda *_: lm  # it is there already, and such tensors cannot move
        cfg = P.Config(gradient_checkpointing=checkpointing)
        actor, ref = P.make_actors(cfg, lm, torch.device("cpu"), torch.bfloat16)
        optimizer = P.make_optimizer(cfg, actor)
        weights = count.now
        ids = torch.randint(3, 200, (micro_batch, PROMPT + REPLY))
        full = torch.ones_like(ids, dtype=torch.bool)
        (queries, responses), (query_mask, mask) = (x.split([PROMPT, REPLY], 1) for x in (ids, full))
        batch = P.Rollout(queries, query_mask, responses, mask, mask, *[torch.zeros(mask.shape)] * 9)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(2):
                P.ppo_loss(actor, batch, cfg)[0].backward()
            held = count.now
            optimizer.step()
        training = count.peak
        optimizer.zero_grad()
        count.peak = 0
        with torch.no_grad():
            actor(batch, 1.0)
        sizes = (weights, held - weights, training - held, training, count.peak)
        cells = [micro_batch, "yes" if checkpointing else "no", *(f"{x / 1e9:.1f}" for x in sizes)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    os._exit(0)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    columns = "micro-batch, checkpointing, weights, gradients and moments, activations and logits, step, forward pass"
    print(f"| {' | '.join(columns.split(', '))} |\n|{'---|' * 7}", flush=True)
    spawn = multiprocessing.get_context("spawn")
    for case in itertools.product((1, 4, 16), (False, True)):
        process = spawn.Process(target=measure, args=case)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
