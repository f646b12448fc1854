"""An action-value critic: it says of every next token a what it is worth, Q(s, a), and the baseline is
V(s) = Σ_a π(a|s)·Q(s, a).

    from q_critic import QActor

    actor = QActor(model)  # in place of Actor; all else of Part I stays as it is

The return after a token teaches Q(s, a) of that token alone, and V(s) changes with π at once. The head has a row for each
token of the vocabulary. `cliprange_value` must be None: the clip of Part I is around V.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[3]))
from ppo_llm import Actor, Rollout, entropy_from_logits, logprobs_from_logits


class QActor(Actor):
    def __init__(self, lm: nn.Module, dtype: torch.dtype = torch.float32, critic: nn.Module | None = None):
        super().__init__(lm, dtype, critic)
        old = self.value_head
        vocabulary = lm.get_output_embeddings().out_features
        self.value_head = nn.Linear(old.in_features, vocabulary, device=lm.device, dtype=old.weight.dtype)
        for weight in self.value_head.parameters():
            nn.init.zeros_(weight)

    def forward(self, batch: Rollout, temperature: float, with_entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """As Actor.forward, but for the values: V(s) before there are advantages, that is for the baseline, and then
        Q(s, a) of the tokens of the reply, which the value loss draws to the returns."""
        T = batch.responses.shape[1]
        ids = torch.cat([batch.queries, batch.responses], 1)
        attention = F.pad(batch.query_mask, (0, T), value=True)
        before = slice(-T - 1, -1)
        output = self.run(self.lm, ids, attention, logits_to_keep=T + 1, output_hidden_states=True, use_cache=False)
        logits, states = output.logits[:, before] / temperature, output.hidden_states[-1]  # [b, T, V], [b, P + T, width]
        if self.critic is not None:
            states = self.run(self.critic, ids, attention, use_cache=False).last_hidden_state
        features = states[:, before].to(self.value_head.weight.dtype)
        q = self.unit * self.value_head(features)  # [b, T, V]
        if batch.advantages is None:
            values = (logits.softmax(-1) * q).sum(-1)
        else:
            values = q.gather(-1, batch.responses.unsqueeze(-1)).squeeze(-1)
        logprobs = logprobs_from_logits(logits, batch.responses)
        entropy = entropy_from_logits(logits) if with_entropy else torch.zeros_like(logprobs)
        return logprobs, entropy, values
