"""Several turns with a tool: the policy writes until a stop token, a function of yours answers, and so on.

    python runs/reference/recipes/tools.py      # about a minute: a tiny model learns to call a calculator

What changes: `sample`. What the tool wrote is `present`, so the model reads it, and not in `mask`: it has no gradient,
KL or value. A turn is at most `response_length` tokens, and costs a forward of all before it. For one process. Watch
`reply/length`, and how often the tool is called.
"""
import copy
import random
import sys
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, ".")
from ppo_llm import Actor, PPOConfig, Progress, Prompt, Rollout, left_pad, ppo, sample_replies, seed_everything

PLUS, IS, CALL, END = 19, 20, 21, 22  # token ids; those from 0 to 18 are numbers


def converse(answer, longest, actor, prompts, stop_ids, cfg):
    """answer(reply): what the policy reads after its turn, a list of token ids. An empty one ends the dialogue, and so
    does one that would make it longer than `longest`; a last turn may come on top of that."""
    dialogues = [[] for _ in prompts]  # of each token: id, whether the policy wrote it, its log π
    going = list(range(len(prompts)))
    while going:
        so_far = [Prompt(prompts[i].ids + [token for token, _, _ in dialogues[i]]) for i in going]
        rollout = sample_replies(actor, so_far, stop_ids, cfg)
        for i, reply, logprobs in zip([*going], rollout.replies(), rollout.sampler_logprobs.tolist()):
            dialogues[i] += zip(reply, [True] * len(reply), logprobs)
            told = answer(reply)
            if told and len(dialogues[i]) + len(told) <= longest:
                dialogues[i] += [(token, False, 0.0) for token in told]
            else:
                going.remove(i)
    columns = zip(*[zip(*dialogue) for dialogue in dialogues])
    responses, mask, logprobs = (pad_sequence([torch.tensor(x) for x in column], True) for column in columns)
    present = torch.arange(mask.shape[1]) < torch.tensor([[len(dialogue)] for dialogue in dialogues])
    return Rollout(*left_pad([prompt.ids for prompt in prompts]), responses, present, mask, logprobs)


def calculator(reply):
    """`a + b CALL` is answered with the sum; anything else ends the dialogue."""
    is_call = len(reply) == 4 and reply[1::2] == [PLUS, CALL] and reply[0] + reply[2] < PLUS
    return [reply[0] + reply[2]] if is_call else []


def score(prompts, replies):
    """1 if the policy's last turn, after the one call and its answer, a single token, is the sum."""
    turns = [reply[reply.index(CALL) + 2 :] if CALL in reply else reply for reply in replies]
    right = [float(turn == [prompt.ids[0] + prompt.ids[2], END]) for prompt, turn in zip(prompts, turns)]
    return torch.tensor(right), {"calls": sum(CALL in reply for reply in replies) / len(replies)}


if __name__ == "__main__":
    seed_everything(1)
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=23, initializer_range=0.1, **size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sums = [(a, b) for a in range(10) for b in range(10)]
    for _ in range(200):  # what it has read calls the tool in one reply of five, and guesses in the others
        called = [[a, PLUS, b, IS, a, PLUS, b, CALL, a + b, a + b, END] for a, b in random.choices(sums, k=13)]
        guessed = [[a, PLUS, b, IS, random.randrange(PLUS)] + [END] * 6 for a, b in random.choices(sums, k=51)]
        ids = torch.tensor(called + guessed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    actor, ref = Actor(model), Actor(copy.deepcopy(model)).requires_grad_(False)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=3e-4, weight_decay=0.0)
    cfg = PPOConfig(num_updates=20, batch_size=64, response_length=6, kl_coef=0.05)
    prompts = [Prompt([a, PLUS, b, IS]) for a, b in sums]
    sample = partial(converse, calculator, 5)
    for metrics, _ in ppo(actor, ref, optimizer, prompts, score, [CALL, END], cfg, Progress(cfg.kl_coef), sample):
        shown = "right {objective/scores:.2f}, calls {calls:.2f}, length {reply/length:.1f}, KL {objective/kl:.1f}"
        print(shown.format_map(metrics))
