"""The whole of RLHF in a minute: preferences, a reward model learned from them, PPO against it, and too much of that.

    python runs/reference/recipes/reward_training.py FOLDER      # a new folder, for the reward model and the run

What changes: nothing in the loop. `--reward-model` takes the folder that `fit` writes. It costs labels: here which of
two film reviews is kinder, by a rule that PPO does not see. Watch `sentiment`, what the rule says, beside `reward`: the
policy soon finds replies that the model likes and the rule does not.
"""
import copy
import dataclasses
import json
import sys

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaForSequenceClassification

sys.path.insert(0, ".")
from ppo_llm import DEMO, demo_task, seed_everything, sentiment, train


def preferences(lm, tokenizer, prompts, count=512):
    """Pairs of texts from the same prompt, the better one first."""
    asked = [prompt for prompt in (prompts * count)[:count] for _ in range(2)]
    inputs = tokenizer(asked, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    how = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=DEMO.response_length)  # not the model's own
    pad, eos = tokenizer.pad_token_id, lm.generation_config.eos_token_id
    ids = lm.generate(**inputs, generation_config=how, pad_token_id=pad, eos_token_id=eos)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    pairs = [sorted(pair, key=lambda text: -sentiment(None, [text])[0]) for pair in zip(texts[::2], texts[1::2])]
    return [pair for pair in pairs if sentiment(None, pair)[0] != sentiment(None, pair)[1]]


def fit(lm, tokenizer, pairs, folder, epochs=3):
    """Bradley and Terry 1952: the log odds that one text is preferred to another are the difference of their scores."""
    config = copy.deepcopy(lm.config)
    config.update({"pad_token_id": tokenizer.pad_token_id, "num_labels": 1})  # the score stands at the last other token
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(lm.model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for i in [*range(0, len(pairs), 32)] * epochs:
        better, worse = zip(*pairs[i : i + 32])
        inputs = tokenizer([*better, *worse], padding=True, return_tensors="pt", return_token_type_ids=False)
        scores = model(**inputs).logits.view(2, -1)
        F.logsigmoid(scores[0] - scores[1]).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    seed_everything(1)
    model, reward = sys.argv[1] + "/run", sys.argv[1] + "/reward"
    lm, tokenizer, prompts, held_out, measured = demo_task(1)
    fit(lm, tokenizer, preferences(lm, tokenizer, prompts), reward)
    own = dict(num_updates=9, kl_coef=0.05, missing_eos_penalty=0.0, reward_weights=(0.0, 0.0, 1.0))
    cfg = dataclasses.replace(DEMO, output_dir=model, reward_model=(reward,), **own)
    for line in open(train(cfg, prompts, measured, lm, tokenizer, held_out) / "metrics.jsonl"):
        row = json.loads(line)
        if "lr" in row:  # of training, not of an evaluation
            print("update {update}: reward {rewards/reward:.2f}, sentiment {rewards/sentiment:.2f}".format_map(row))
