"""GRPO in place of the critic: the baseline of a reply is the mean score of its group, the replies to the same prompt.

    python runs/reference/recipes/grpo.py      # about a minute: beside the default, at equal replies

What changes: `score` takes the group's mean away (and, as an option, divides by its deviation, as DeepSeekMath does,
arXiv 2402.03300); `loss` has the KL in it, by k3, and in place of the advantages the returns: with β 0, γ and λ 1 they
are these scores, whatever V is. It costs several replies to each prompt, and all tokens of a reply get one credit. The
mean is over tokens, as in DAPO. Watch `objective/kl`: k3's gradient is not that of the KL. `score` is what `ppo` takes,
not a --reward: held-out replies come in no groups.
"""
import copy
import dataclasses
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, ".")
from ppo_llm import Actor, PPOConfig, Progress, Prompt, kl_estimate, masked_mean, policy_loss, ppo

GROUP, BETA = 8, 0.02  # samples_per_prompt must be GROUP


def early(prompts, replies):
    """1 if 4 divides the first token: what comes after it is noise."""
    scores = torch.tensor([float(reply[0] % 4 == 0) for reply in replies])
    return scores, {"score": float(scores.mean())}


def in_groups(prompts, replies, divide=True):
    scores, metrics = early(prompts, replies)
    groups = scores.view(-1, GROUP)
    deviation = groups.std(1, correction=0, keepdim=True) + 1e-4 if divide else 1.0
    return ((groups - groups.mean(1, keepdim=True)) / deviation).flatten(), metrics


def grpo_loss(actor, batch, cfg):
    new_logprobs, _, _ = actor(batch, cfg.temperature, with_entropy=False)
    old, clip = (batch.logprobs, batch.returns, batch.mask), (cfg.cliprange, cfg.cliprange_high)
    loss, stats = policy_loss(new_logprobs, *old, *clip)
    kl = masked_mean(kl_estimate(new_logprobs, batch.ref_logprobs, "k3"), batch.mask)
    return loss + BETA * kl, stats | {"loss/kl": kl}


def train(cfg, score, **options):
    torch.manual_seed(0)
    size = dict(vocab_size=32, n_layer=2, n_embd=64, n_head=4)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **size))
    actor, ref = Actor(model), Actor(copy.deepcopy(model)).requires_grad_(False)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-3, weight_decay=0.0)
    prompts = [Prompt(torch.randint(32, (8,)).tolist()) for _ in range(512)]
    updates = ppo(actor, ref, optimizer, prompts, score, [], cfg, Progress(cfg.kl_coef), **options)
    return [metrics for metrics, _ in updates]


if __name__ == "__main__":
    cfg = PPOConfig(num_updates=20, batch_size=64, response_length=32, kl_coef=BETA)
    groups = dataclasses.replace(cfg, samples_per_prompt=GROUP, kl_coef=0.0)
    for name, updates in (("PPO", train(cfg, early)), ("GRPO", train(groups, in_groups, loss=grpo_loss))):
        first, last = updates[0], updates[-1]
        print(f"{name}: score {first['score']:.2f} to {last['score']:.2f}, KL {last['objective/kl']:.1f}")
