"""A reward on every token: what a token earned is paid at it, and it is credited with nothing that came before.

    python runs/reference/recipes/dense.py      # about a minute: one task, paid at the end of a reply and at each token

What changes: `score` returns [B, T] in place of [B], with the number of the t-th token of a reply in column t. It costs
nothing. The same sum is maximised either way, if γ is 1 and each number is settled by its token: not if it depends on
later ones, on the length of a reply, say. Watch `val/explained_variance`: if the critic fits, credit has less noise.
"""
import copy
import sys
from statistics import fmean

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, ".")
from ppo_llm import Actor, PPOConfig, Progress, Prompt, ppo, seed_everything

T = 48  # the longest reply


def at_each_token(prompts, replies):
    """The tokens that 4 divides, as a share of T, each token's part at it."""
    scores = torch.zeros(len(replies), T)
    for row, reply in zip(scores, replies):
        row[: len(reply)] = torch.tensor([(token % 4 == 0) / T for token in reply])
    return scores, {}


def at_the_end(prompts, replies):
    return at_each_token(prompts, replies)[0].sum(1), {}


def train(score):
    """The mean score of each update, and the explained variance of the last."""
    seed_everything(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_layer=2, n_embd=64, n_head=4, bos_token_id=None, eos_token_id=None)
    )
    actor, ref = Actor(model), Actor(copy.deepcopy(model)).requires_grad_(False)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-3, weight_decay=0.0)
    prompts = [Prompt(torch.randint(32, (8,)).tolist()) for _ in range(512)]
    cfg = PPOConfig(num_updates=15, batch_size=64, response_length=T, kl_coef=0.005)
    updates = [metrics for metrics, _ in ppo(actor, ref, optimizer, prompts, score, [], cfg, Progress(cfg.kl_coef))]
    return [metrics["objective/scores"] for metrics in updates], updates[-1]["val/explained_variance"]


if __name__ == "__main__":
    for score in (at_the_end, at_each_token):
        scores, fit = train(score)
        said = f"first {scores[0]:.2f}, mean {fmean(scores):.2f}, last {scores[-1]:.2f}, explained variance {fit:.2f}"
        print(f"{score.__name__}: {said}")
