"""LoRA: adapters of peft are trained on a frozen base, and the same model with its adapters off is the reference.

    pip install peft
    python runs/reference/recipes/lora.py FOLDER      # about a minute; the adapters and the merged policy go to FOLDER

What changes: the base may be bfloat16, as only what is trained must be float32; `ref` is a function, and no second
model is in memory; the policy is saved by peft. SmolLM2-135M then trains in 1.1 GB in place of 3.5 (16 replies of 16
tokens, 4 at a time). Adapters start at 0 and need a larger rate. Watch `policy/approxkl`: 0 if nothing is trained.
"""
import sys

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, ".")
from ppo_llm import Actor, PPOConfig, Progress, Prompt, ppo, seed_everything


def adapted(base, rank=8):
    """The base with adapters, and an actor on it. Layers and head of the base stay where they are."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    return model, Actor(model.get_base_model())


def reference(model, actor):
    """What `ppo` takes as ref: the actor while its adapters are off."""

    def ref(*arguments, **options):
        with model.disable_adapter():
            return actor(*arguments, **options)

    return ref


def score(prompts, replies):
    return torch.tensor([sum(token % 4 == 0 for token in reply) / len(reply) for reply in replies]), {}


if __name__ == "__main__":
    folder = sys.argv[1]
    seed_everything(0)
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=32, eos_token_id=None, initializer_range=0.1, **size)
    LlamaForCausalLM(config).save_pretrained(f"{folder}/base")
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)
    model, actor = adapted(base)
    optimizer = torch.optim.AdamW([p for p in actor.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    prompts = [Prompt(torch.randint(32, (8,)).tolist()) for _ in range(512)]
    cfg = PPOConfig(num_updates=15, batch_size=64, response_length=24, kl_coef=0.01)
    for metrics, _ in ppo(actor, reference(model, actor), optimizer, prompts, score, [], cfg, Progress(cfg.kl_coef)):
        shown = "score {objective/scores:.2f}, KL {objective/kl:.1f}, old to new {policy/approxkl:.1e}"
        print(shown.format_map(metrics))
    model.save_pretrained(f"{folder}/adapters")  # AutoPeftModelForCausalLM loads it
    merged = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapters", dtype=torch.float32).merge_and_unload()
    merged.save_pretrained(f"{folder}/policy")  # AutoModelForCausalLM loads it
