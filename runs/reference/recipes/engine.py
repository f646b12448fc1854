"""Another sampler: a serving engine writes the replies, here `transformers.generate` in place of vLLM or SGLang.

    python runs/reference/recipes/engine.py      # about a minute: with the newest weights, and older ones

What changes: `sample` asks the engine and keeps the log π by which it sampled; `loss` weights each token by how much
likelier it is to the trainer, at most CAP times (truncated importance sampling). Needed where the engine's weights are
old or it computes otherwise; clip and returns stay as they are, and so does the KL, which is then a mean over tokens of
the old weights and may be negative: do not steer β by it. For one process. Watch `policy/sampler_gap`: 0.1 is not
rounding.
"""
import copy
import dataclasses
import sys

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

sys.path.insert(0, ".")
import ppo_llm as P
from ppo_llm import ppo_loss  # P.ppo_loss may become the one below

CAP = 2.0


class Engine:
    def __init__(self, model, age=0):
        self.model, self.sent = copy.deepcopy(model), [copy.deepcopy(model.state_dict()) for _ in range(age)]
        self.model.generation_config = GenerationConfig()  # a model's own may have top-p, which no weight can correct

    def sample(self, actor, prompts, stop_ids, cfg):
        self.sent.append(copy.deepcopy(actor.lm.state_dict()))
        # Here weights are sent to the engine, old ones if it lags. In Part II an evaluation is such a call too.
        self.model.load_state_dict(self.sent.pop(0))
        queries, query_mask = P.left_pad([prompt.ids for prompt in prompts])
        inputs = {"input_ids": queries, "attention_mask": query_mask.long()}
        how = dict(do_sample=True, top_k=0, temperature=cfg.temperature, max_new_tokens=cfg.response_length)
        how |= dict(eos_token_id=stop_ids or None, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
        out = self.model.generate(**{name: x.to(self.model.device) for name, x in inputs.items()}, **how)
        responses = out.sequences[:, queries.shape[1] :].cpu()
        logprobs = P.logprobs_from_logits(torch.stack(out.scores, 1).cpu(), responses)  # scores: after all that is set
        responses, logprobs = (F.pad(x, (0, cfg.response_length - x.shape[1])) for x in (responses, logprobs))
        present = P.response_mask(responses, stop_ids)  # all replies had ended where the padding begins
        return P.Rollout(queries, query_mask, responses, present, present, logprobs)


def corrected_loss(actor, batch, cfg):
    weights = (batch.logprobs - batch.sampler_logprobs).exp().clamp(max=CAP)
    return ppo_loss(actor, dataclasses.replace(batch, advantages=weights * batch.advantages), cfg)


def score(prompts, replies):
    return torch.tensor([sum(token % 4 == 0 for token in reply) / len(reply) for reply in replies]), {}


if __name__ == "__main__":
    for age in (0, 2):
        torch.manual_seed(0)
        size = dict(vocab_size=32, n_layer=2, n_embd=64, n_head=4)
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **size))
        actor, ref, engine = P.Actor(model), P.Actor(copy.deepcopy(model)).requires_grad_(False), Engine(model, age)
        optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3, weight_decay=0.0)
        prompts = [P.Prompt(torch.randint(32, (8,)).tolist()) for _ in range(512)]
        cfg = P.PPOConfig(num_updates=12, batch_size=64, response_length=24, kl_coef=0.01)
        updates = P.ppo(actor, ref, optimizer, prompts, score, [], cfg, P.Progress(0.01), engine.sample, corrected_loss)
        for metrics, _ in updates:
            print("score {objective/scores:.2f}, gap {policy/sampler_gap:.1e}".format_map(metrics))
