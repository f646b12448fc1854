"""A real language model learns to be right: SmolLM2-135M adds numbers, after three examples in the prompt.

    python runs/reference/smollm2/smollm2.py SmolLM2     # the model, and what it needs: see there
    python runs/reference/smollm2/sums.py SmolLM2 1 20   # prompts of pairs from 1 to 20, and others held out
    python ppo_llm.py --model SmolLM2 --prompts SmolLM2/sums.jsonl --eval-prompts SmolLM2/held_out.jsonl \\
        --reward runs/reference/smollm2/sums.py:right --response-length 4 --batch-size 128 --kl-coef 0 \\
        --learning-rate 3e-5 --critic-lr 1e-3 --warmup-updates 2 --lr-scheduler-type linear --target-kl 0.1 \\
        --num-updates 40 --eval-every 8 --seed 21 --dtype bfloat16 --stop-token $'\\n'

`right` pays 1 for a sum that is right to the end of its line. `digits` pays as much for it, in equal parts: one for
each character that is right and has only right ones before it, at once. With `--reward ...:right --reward ...:digits
--reward-weights 0 --reward-weights 1` the first is measured and the second paid. No pair that is held out is trained
on, in neither order, nor is it an example. A processor that has no products of bfloat16 is faster without --dtype.
"""
import functools
import itertools
import json
import os
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

load = functools.cache(AutoTokenizer.from_pretrained)


def right(completions, answer, **columns) -> list[float]:
    return [float(text == line) for text, line in zip(completions, answer)]


def digits(completions, completion_ids, answer, **columns) -> list[list[float]]:
    from ppo_llm import token_scores

    scores = []
    for text, ids, line in zip(completions, completion_ids, answer):
        ends = range(1, 1 + len(os.path.commonprefix([text, line])))
        scores.append(token_scores(load("SmolLM2"), text, ids, dict.fromkeys(ends, 1 / len(line))))
    return scores


def main(folder: Path, low: int, high: int) -> None:
    rng = random.Random(0)
    pairs = [*itertools.combinations(range(low, high + 1), 2)]
    rng.shuffle(pairs)
    both = [[(a, b), (b, a)] for a, b in pairs]
    held_out, trained = sum(both[:60], []), sum(both[60:], []) + [(a, a) for a in range(low, high + 1)]
    for name, sums in (("sums", 8 * trained), ("held_out", held_out)):  # a sum eight times, with other examples
        with open(folder / f"{name}.jsonl", "w") as file:
            for a, b in sums:
                examples = [f"{x}+{y}={x + y}\n" for x, y in rng.sample(trained, 3)]
                row = {"prompt": "".join(examples) + f"{a}+{b}=", "answer": f"{a + b}\n"}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
