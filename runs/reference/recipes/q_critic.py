"""An action-value critic: it says of every next token a what it is worth, Q(s, a). The baseline is Σ_a π(a|s)·Q(s, a).

    python runs/reference/recipes/q_critic.py      # a quarter of a minute: one early token of 24 counts

What changes: `QActor`. The return after a token teaches Q(s, a) of that token alone, and V(s) changes with π at once.
It costs a head with a row for each token of the vocabulary. `cliprange_value` must be None: the clip is around V.
Watch `val/explained_variance` beside that of `Actor`.
"""
import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, ".")
from ppo_llm import Actor, PPOConfig, Progress, Prompt, entropy_from_logits, logprobs_from_logits, ppo


class QActor(Actor):
    def __init__(self, lm, dtype=torch.float32):
        super().__init__(lm, dtype)
        head = lm.get_output_embeddings()
        self.value_head = nn.Linear(head.in_features, head.out_features, device=lm.device, dtype=self.real)
        for weight in self.value_head.parameters():
            nn.init.zeros_(weight)

    def forward(self, batch, temperature, with_entropy=True):
        """As Actor.forward, but the values are V(s) while there are no advantages, then Q(s, a) for the value loss."""
        T = batch.responses.shape[1]
        ids = torch.cat([batch.queries, batch.responses], 1)
        attention = F.pad(batch.query_mask, (0, T), value=True)
        before = slice(-T - 1, -1)
        output = self.run(self.lm, ids, attention, logits_to_keep=T + 1, output_hidden_states=True, use_cache=False)
        logits = output.logits[:, before] / temperature  # [b, T, V]
        q = self.unit * self.value_head(output.hidden_states[-1][:, before].to(self.real))  # [b, T, V]
        if batch.advantages is None:
            values = (logits.softmax(-1) * q).sum(-1)
        else:
            values = q.gather(-1, batch.responses.unsqueeze(-1)).squeeze(-1)
        logprobs = logprobs_from_logits(logits, batch.responses)
        entropy = entropy_from_logits(logits) if with_entropy else torch.zeros_like(logprobs)
        return logprobs, entropy, values


def score(prompts, replies):
    return torch.tensor([float(reply[0] % 4 == 0) for reply in replies]), {}


if __name__ == "__main__":
    torch.manual_seed(0)
    size = dict(vocab_size=32, n_layer=2, n_embd=64, n_head=4)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **size))
    actor, ref = QActor(model), Actor(copy.deepcopy(model)).requires_grad_(False)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-3, weight_decay=0.0)
    prompts = [Prompt(torch.randint(32, (8,)).tolist()) for _ in range(512)]
    cfg = PPOConfig(num_updates=15, batch_size=64, response_length=24, kl_coef=0.02)
    for metrics, _ in ppo(actor, ref, optimizer, prompts, score, [], cfg, Progress(cfg.kl_coef)):
        print("score {objective/scores:.2f}, explained variance {val/explained_variance:.2f}".format_map(metrics))
