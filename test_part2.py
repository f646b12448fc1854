"""Tests of the program around PPO, Part II of `ppo_llm.py`: `pytest -m "not slow"` leaves out whole runs in subprocesses.

All models are tiny and random, and one character is one token.
"""
import copy
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import ppo_llm as P
from ppo_llm import Config

# ---------------------------------------------------------------------------------- what the tests are made with

HERE = Path(__file__).parent
SOURCE = Path(P.__file__).read_text()
README = (HERE / "README.md").read_text()
ENV = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE)}
CPU = torch.device("cpu")
LETTERS = "?abcdefghijklmnopqrstuvwxyz <>"
STOP = 2  # the letter b
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

SHAPE = dict(
    vocab_size=len(LETTERS),
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    initializer_range=0.4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=STOP,
)
HEADS = dict(num_key_value_heads=1, head_dim=8)
WINDOW = HEADS | dict(sliding_window=4)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
EYES = SHAPE | dict(num_hidden_layers=1, image_size=8, patch_size=4)
KINDS = {  # of models: what their settings have besides
    "GPT2": {},
    "Llama": {},
    "Qwen3": HEADS,
    "Mistral": WINDOW,
    "Gemma3Text": WINDOW | dict(layer_types=["sliding_attention", "full_attention"]),
    "Phi3": dict(num_key_value_heads=1),
    "OPT": dict(ffn_dim=16, word_embed_proj_dim=8, init_std=0.4),
    "GPTNeoX": {},
    "Gemma2": WINDOW | dict(final_logit_softcapping=0.5),
    "Cohere": dict(num_key_value_heads=1, logit_scale=0.3),
    "Granite": dict(logits_scaling=5.0),
    "Mixtral": dict(num_key_value_heads=1, num_local_experts=4),
    "Gemma3": dict(text_config=SHAPE | WINDOW, vision_config=EYES),  # it also sees
    "Qwen3Moe": HEADS | EXPERTS,
    "Llama4Text": HEADS | dict(intermediate_size_mlp=16, num_local_experts=2),
}


def model_of(kind="GPT2", seed=0, head="ForCausalLM", **changes):
    """A random model of this kind."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**SHAPE | KINDS.get(kind, {}) | changes)
    return getattr(transformers, f"AutoModel{head}").from_config(config)


def letters(**special):
    """A tokenizer of one character a token."""
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", **special)


def put(folder, model, **special):
    """Save the model with its tokenizer."""
    model.save_pretrained(folder)
    letters(**special).save_pretrained(folder)
    return str(folder)


def worth(prompts, completions, **columns):
    """Of replies of the same length, no two are worth the same for long."""
    return [float(sum(map(ord, text)) % 10) for text in completions]


def interlude():
    """Tests put something here that happens each time that `answers` is asked."""


def answers(prompts, completions, answer, **columns):
    interlude()
    torch.rand(1 + int(os.environ.get("RANK", 0)))  # other random numbers are left on each process
    return [x + text.count("a") for x, text in zip(answer, completions)]


def at_call(monkeypatch, number, do):
    """Let something happen when `answers` is asked for the number-th time: 0 is the evaluation before, 1 update 1."""
    calls = itertools.count()
    monkeypatch.setattr(sys.modules[__name__], "interlude", lambda: next(calls) == number and do())


FILES = {
    "letters.txt": "".join(f"{c}{c} {c}\n" for c in LETTERS[1:27]),
    "prompts.jsonl": "".join(f'{{"prompt": "{c} a", "answer": {ord(c) - 100}}}\n' for c in LETTERS[1:21]),
    "bad.jsonl": '{"prompt": "a"}\n{"prompt": \n',
    "lacks.jsonl": '{"prompt": "a"}\n{"text": "a"}\n',
    "void.jsonl": '{"prompt": "a"}\n{"prompt": ""}\n',
    "empty.txt": "\n",
    "latin.txt": "a\n\xff\n",
    "chat.jsonl": '{"prompt": [{"role": "user", "content": "a"}]}\n',
    "broken.py": "import nothing_of_this_name\n",
    "rewards.py": "def worth(prompts, completions, **columns): return [sum(map(ord, x)) % 10 for x in completions]\n",
    "other.py": "def zero(prompts, completions, **columns): return [0.0] * len(prompts)\n",
    "own.py": (
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class OwnConfig(GPT2Config): model_type = 'own'\n"
        "class Own(GPT2LMHeadModel): config_class = OwnConfig\n"
    ),
}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with models, prompts and rewards, sound ones and wrong ones."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in FILES.items():
        (folder / name).write_text(text, "latin-1")
    found = {
        "model": model_of(),
        "other": model_of(seed=1),
        "judge": model_of("Llama", head="ForSequenceClassification", num_labels=2),
        "scorer": model_of("Llama", head="ForSequenceClassification", num_labels=1),
        "mamba": model_of("Mamba"),
        "short": model_of(max_position_embeddings=8),
        "small": model_of(vocab_size=9),
        "own": model_of(),
    }
    for name, model in found.items():
        put(folder / name, model, pad_token="?")
    (folder / "words").mkdir()
    put(folder / "words", model_of(), additional_special_tokens=["<x>"])
    (folder / "own.py").rename(folder / "own" / "own.py")
    path = folder / "own" / "config.json"
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": classes}))
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics_of(run):
    """The rows of metrics.jsonl without the times."""
    return [{name: x for name, x in row.items() if "time/" not in name} for row in lines(run / "metrics.jsonl")]


def updates_of(run):
    return [row["update"] for row in metrics_of(run)]


def the_line(capsys):
    """The only line on stderr beside the progress bar."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert line.startswith("ppo_llm.py: ")
    return line


def quick(folder, **changes):
    """Settings of a run that takes a moment."""
    usual = dict(num_updates=1, batch_size=8, response_length=4, name="x", runs_dir=str(folder), device="cpu")
    return Config(**usual | changes)


def error(x, y):
    return (torch.as_tensor(x) - torch.as_tensor(y)).abs().max().item()


def weights_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@torch.no_grad()
def alone(lm, prompt, reply, temperature=1.0):
    """log π of the tokens of a reply by the model's own forward: no padding, no cache, no other replies."""
    logits = lm(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)[range(len(reply)), reply]


def replies_of(task):
    """Prompt and reply of a new rollout, as token ids, with all that actor and reference say of it."""
    rollout = P.sample_replies(task.actor, task.prompts, task.stop_ids, task.cfg)
    P.fill_logprobs_and_values(task.actor, task.ref, rollout, task.cfg)
    for i, (prompt, reply) in enumerate(zip(task.prompts, rollout.replies())):
        yield prompt.ids, reply, {name: x[i, : len(reply)] for name, x in vars(rollout).items() if x is not None}


# ------------------------------------------------------------------------------------------ 7. the settings of a run

SOUND = "--model model --prompts letters.txt --reward rewards.py:worth --response-length 8 --name x --num-updates 1"
BAD = {  # what is added to the sound command: what the one line says
    "--batch-size 4 --num-mini-batches 8": "batch_size 4: expected a multiple of 8",
    "--samples-per-prompt 3": "batch_size 128: expected a multiple of 12",
    "--gamma nan": "--gamma nan: expected a number in [0, 1]",
    "--device warp": "--device warp",
    "--runs-dir rewards.py": "cannot create rewards.py/x, give another --runs-dir or --name",
    "--runs-dir . --name model": "model exists and is not overwritten: give another --name",
    "--resume nowhere": "--resume nowhere: expected the folder of a run",
    "--resume model": "--resume model: expected the folder of a run",
    # Models.
    "--model None": "prompts and rewards need a model: give --model too",
    "--model ./nowhere": "./nowhere as ",
    "--model judge": "judge as ModelForCausalLM: it holds no lm_head.weight",
    "--model mamba": "MambaForCausalLM cannot be trained here",
    "--model small": "it has no token, or one that the model does not know",
    "--stop-token ab": "--stop-token 'ab': expected one token of this tokenizer",
    "--critic-model words": "--critic-model words: its vocabulary is not the policy's",
    "--critic-model mamba": "MambaModel cannot be trained here",
    "--critic-model short": "none is left, of at most 0 tokens",
    # Prompts.
    "--prompts None": "a model needs prompts and a reward: expected --prompts FILE",
    "--prompts nowhere.txt": "the prompts nowhere.txt",
    "--prompts rewards.py": "the prompts rewards.py: expected .txt, a prompt a line, or .jsonl",
    "--prompts bad.jsonl": "the prompts bad.jsonl",
    "--prompts latin.txt": "the prompts latin.txt",
    "--prompts lacks.jsonl": "the prompt {'text': 'a'}: expected a text, or chat messages, under prompt",
    "--prompts void.jsonl": "the prompt {'prompt': ''}: expected a text",
    "--prompts chat.jsonl": "chat_template is not set",
    "--prompts empty.txt": "of 0 prompts to train on none is left",
    "--eval-prompts bad.jsonl": "the prompts bad.jsonl",
    "--response-length 61": "none is left, of at most 3 tokens",
    "--max-prompt-length 3": "none is left, of at most 3 tokens",
    # Rewards.
    "--reward": "a model needs prompts and a reward: expected --prompts FILE",
    "--reward rewards.py:missing": "--reward rewards.py:missing: expected FILE.py:FUNCTION or MODULE:FUNCTION",
    "--reward nowhere.py:f": "--reward nowhere.py:f: expected FILE.py:FUNCTION",
    "--reward broken.py:f": "--reward broken.py:f: expected FILE.py:FUNCTION or MODULE:FUNCTION: ModuleNotFoundError",
    "--reward-weights 1 2": "as many --reward-weights",
    "--reward-model model": "model as ModelForSequenceClassification: it holds no score.weight",
    "--reward-model judge": "--reward-label None: expected one of LABEL_0, LABEL_1",
    "--reward-model judge --reward-label x": "--reward-label x: expected one of LABEL_0, LABEL_1",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_refused_in_one_line(arguments, files, tmp_path, capsys, monkeypatch):
    """Exit status 2 before anything is written, and one line that says what; the traceback is in a file."""
    monkeypatch.chdir(files)
    assert P.main(f"{SOUND} --runs-dir {tmp_path}/runs {arguments}".split()) == 2
    line = the_line(capsys)
    assert BAD[arguments] in line
    assert Path(line.split("(traceback: ")[1][:-1]).read_text().startswith("Traceback")
    assert not (tmp_path / "runs").exists()


WRONG = [
    (dict(reward="rewards.py:worth"), "--reward 'rewards.py:worth'", "is not a tuple"),
    (dict(batch_size="8"), "--batch-size '8'", "is not an instance of int"),
    (dict(critic="own"), "--critic 'own'", "is not any of"),
    (dict(reward_weights=(1, "2")), "--reward-weights (1, '2')", ""),
    (dict(batch_size=0), "--batch-size 0", "expected 1 or more"),
    (dict(save_every=-1), "--save-every -1", "expected 1 or more"),
    (dict(warmup_updates=-1), "--warmup-updates -1", "expected "),
    (dict(critic_warmup_updates=-1), "--critic-warmup-updates -1", "expected "),
    (dict(lam=1.5), "--lam 1.5", "expected a number in [0, 1]"),
    (dict(temperature=0.0), "--temperature 0.0", "expected a number above 0"),
    (dict(learning_rate=float("inf")), "--learning-rate inf", "expected a number above 0"),
    (dict(kl_coef=-1.0), "--kl-coef -1.0", "expected a number of 0 or more"),
    (dict(kl_coef=0.0, kl_target=6.0), None, "--kl-target: expected with it a --kl-coef above 0"),
    (dict(kl_target=6.0, kl_horizon=100.0), None, "--kl-target: expected with it a --kl-coef above 0"),
]


@pytest.mark.parametrize("changes, note, message", WRONG)
def test_a_setting_of_the_wrong_type_or_size_is_refused(changes, note, message):
    """From Python too, where no command line has looked at it."""
    with pytest.raises(Exception, match=re.escape(message)) as refusal:
        Config(**changes)
    assert getattr(refusal.value, "__notes__", [None]) == [note]


@pytest.mark.parametrize("arguments", ["--batch-size x", "--kl-estimator k4", "--no-such-flag 1"])
def test_a_flag_or_a_value_that_does_not_exist_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        P.main(arguments.split())
    assert end.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


def test_every_flag_is_explained(capsys, monkeypatch):
    """--help has three groups, and names each flag with the sentence that stands beside it in the source, which says
    what None means."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        P.main(["--help"])
    shown = capsys.readouterr().out
    assert re.findall(r"(\w+) options", shown) == ["task", "ppo", "run"], shown
    flags = re.findall(r"^\W*--([\w-]+)", shown, re.M)
    words = " ".join(shown.replace("│", " ").split())
    for field in dataclasses.fields(Config):
        explained = re.search(rf"^    {field.name}: .*?  # (.*)$", SOURCE, re.M).group(1)
        assert flags.count(field.name.replace("_", "-")) == 1
        assert explained in words
        assert "None" not in str(field.type) or "None" in explained, field.name


USUAL = dict(model="model", prompts="letters.txt", reward=("rewards.py:worth",), device="cpu", num_updates=2)
USUAL |= dict(batch_size=8, response_length=6, learning_rate=0.01, cliprange=0.1, seed=3, kl_target=100.0)
EFFECTIVE = {  # each of these flags alone makes another run
    **dict(num_updates=3, batch_size=16, samples_per_prompt=2, response_length=5, temperature=0.7, seed=2, kl_coef=0.3),
    **dict(missing_eos_penalty=1, kl_estimator="k3", kl_target=None, kl_horizon=100.0, gamma=0.9, lam=0.5),
    **dict(whiten_advantages=False, num_ppo_epochs=1, num_mini_batches=2, learning_rate=3e-3, critic_lr=1e-3),
    **dict(lr_scheduler_type="cosine", warmup_updates=1, max_grad_norm=0.01, cliprange=0.01, cliprange_high=0.9),
    **dict(cliprange_value=1e-3, vf_coef=0.5, ent_coef=0.1, target_kl=1e-4, critic_warmup_updates=1, model="other"),
    **dict(prompts="prompts.jsonl", reward=("other.py:zero",), reward_model=("scorer",), reward_weights=(2.0,)),
    **dict(eval_prompts="prompts.jsonl", max_prompt_length=4, stop_token="c", dtype="bfloat16", critic="separate"),
    **dict(critic_model="other", eval_every=1),
}
INEFFECTIVE = dict(micro_batch_size=1, gradient_checkpointing=True, save_every=1, device="auto")
TOLD_ELSEWHERE = {"name", "runs_dir", "resume", "reward_label", "trust_remote_code"}


@pytest.fixture(scope="module")
def run_with(files, tmp_path_factory):
    """Two small updates with some settings changed, which are made once: the metrics and the final weights."""
    folder = tmp_path_factory.mktemp("flags")
    (files / "letters.txt").write_text(FILES["letters.txt"] + "abcdef\n")  # one that --max-prompt-length drops
    counter = itertools.count()

    @functools.cache
    def run(**changes):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(files)
            run = P.train(Config(**USUAL | changes, name=f"x{next(counter)}", runs_dir=str(folder)))
        return metrics_of(run), AutoModelForCausalLM.from_pretrained(run / "policy")

    return run


def test_no_flag_is_forgotten():
    flags = {field.name for field in dataclasses.fields(Config)}
    assert flags == EFFECTIVE.keys() | INEFFECTIVE.keys() | TOLD_ELSEWHERE


@pytest.mark.parametrize("flag", EFFECTIVE)
def test_no_flag_is_without_effect(flag, run_with):
    """On what is learned or logged. Each run ends as it should, with numbers."""
    metrics, _ = run_with(**{flag: EFFECTIVE[flag]})
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in metrics)
    assert metrics != run_with()[0]


@pytest.mark.parametrize("flag", INEFFECTIVE)
def test_what_saves_memory_or_a_checkpoint_changes_nothing_else(flag, run_with):
    """But the rounding of float32, which Adam's first steps of 0.01 magnify."""
    metrics, policy = run_with(**{flag: INEFFECTIVE[flag]})
    for row, expected in zip(metrics, run_with()[0], strict=True):
        assert row == pytest.approx(expected, abs=5e-3)
    assert error(weights_of(policy), weights_of(run_with()[1])) < 5e-3


# --------------------------------------------------------------------------------------------- 8. prompts and rewards


def test_chat_prompts_and_columns_reach_rewards_as_in_trls_grpo(tmp_path):
    """Messages go through the chat template, without a second bos. The reward gets the messages, the reply as a
    message, its ids, and each column, None where a row lacks it. A reward of None counts for nothing."""
    seen = []

    def reward(prompts, completions, completion_ids, answer, level, **columns):
        seen.extend(zip(prompts, completions, completion_ids, zip(answer, level)))
        return answer

    user, begun = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}
    rows = [
        {"prompt": [user], "answer": 3, "level": "x"},
        {"prompt": [user, begun], "answer": None},
        {"prompt": "plain", "answer": 1, "level": "y"},
    ]
    tokenizer = letters(bos_token="<", chat_template=CHAT)
    cfg = quick(tmp_path, batch_size=6, num_mini_batches=1)
    task = P.prepare(cfg, rows, reward, model_of(), tokenizer)
    texts = {tokenizer.decode(prompt.ids) for prompt in task.prompts}
    assert texts == {"<user>hi<assistant>", "<user>hi<assistant>ab<assistant>", "plain"}
    metrics = metrics_of(P.run_task(task))[1]
    columns = {str(prompt): row for prompt, _, _, row in seen}
    assert columns == {str(row["prompt"]): (row["answer"], row.get("level")) for row in rows}
    for prompt, completion, ids, _ in seen:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert completion == (text if prompt == "plain" else [{"role": "assistant", "content": text}])
    assert metrics["rewards/reward"] == 2
    assert metrics["objective/scores"] == pytest.approx(4 / 3)


def test_prompt_and_reply_are_the_whole_text():
    """A decoder of Llama 2's kind drops the space before the first word of what it is given, and a reward model would
    read "wasgood". What a reply adds to half a character cannot be told, and a chat's reply is a message of its own:
    both are decoded alone."""
    words = "? <s> ▁it ▁was ▁good ly <0xC3> <0xA9>".split()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    for prompt, ids, reply, text in (
        ("it was", [1, 2, 3], [4, 5], " goodly"),
        ("it was", [2, 3], [1], ""),
        ([{"role": "user", "content": "it was"}], [1, 2, 3], [4, 5, 1], "goodly"),
        ("it\xc3", [2, 6], [7, 4], "\ufffd good"),
    ):
        assert P.reply_text(tokenizer, P.Prompt(ids, {"prompt": prompt}), reply) == text


@pytest.mark.parametrize("special, eos", [({}, None), (dict(pad_token="a", eos_token="a"), 1), ({}, [3, 4])])
def test_a_reply_ends_at_each_stop_token_and_nowhere_else(special, eos, tmp_path):
    """No EOS, a pad token equal to it, several: the token that ends a reply belongs to it. --stop-token adds one."""
    replies = []

    def reward(prompts, completion_ids, **columns):
        replies.extend(completion_ids)
        return [0.0] * len(prompts)

    lm = model_of(eos_token_id=eos)
    cfg = quick(tmp_path, batch_size=64, response_length=12, stop_token="z", missing_eos_penalty=2.0)
    row = metrics_of(P.train(cfg, ["ab", "c d"], reward, lm, letters(**special)))[1]
    stops = {26, *(eos if isinstance(eos, list) else [eos])}
    ended = [reply[-1] in stops for reply in replies]
    assert all(not stops & set(reply[:-1]) and (end or len(reply) == 12) for reply, end in zip(replies, ended))
    assert 0 < sum(ended) < 64 == len(replies)
    assert row["reply/ended"] == sum(ended) / 64
    assert row["objective/scores"] == 2 * (sum(ended) / 64 - 1)


def test_held_out_prompts_are_not_trained_on(tmp_path, capsys):
    """One in ten, at most 64, drawn by the seed; with the others they are all prompts that fit."""
    names = map(str, itertools.count())
    for n, share in ((9, 0), (30, 3), (1000, 64)):
        texts = [3 * (a + b) for a, b in itertools.product(LETTERS, 34 * "x")][: n - 1] + [80 * "x"]
        texts = [f"{text}{i}" for i, text in enumerate(texts)]
        tasks = [
            P.prepare(quick(tmp_path, seed=seed, name=next(names)), texts, worth, model_of(), letters())
            for seed in (1, 1, 2)
        ]
        held_out, again, other = ([p.row["prompt"] for p in task.held_out] for task in tasks)
        assert share - 1 <= len(held_out) <= share
        assert held_out == again
        assert share == 0 or held_out != other
        assert sorted(held_out + [p.row["prompt"] for p in tasks[0].prompts]) == sorted(texts[:-1])
        assert f"Dropped 1 of {share} prompts" in (shown := capsys.readouterr().out) or "Dropped 1 of" in shown


def test_the_evaluation_is_of_all_held_out_prompts(tmp_path):
    """At least a batch of replies. Each metric is a mean over replies with the standard error of that mean; a reward of
    None counts for nothing. The same seed gives the same replies."""
    held_out = [{"prompt": "a", "level": x} for x in (1.0, 2.0, None, 6.0)]
    rewards = [lambda level, **columns: level, worth]
    rewards[0].__name__ = "worth"  # two of one name
    cfg = quick(tmp_path, reward_weights=(1.0, 0.0))
    task = P.prepare(cfg, ["ab"], rewards, model_of(), letters(), held_out)
    metrics, samples = P.evaluate_held_out(task)
    for name, numbers in (("score", [1, 2, 0, 6]), ("rewards/worth", [1, 2, 6])):
        x = torch.tensor(numbers * 2.0 if isinstance(numbers, float) else [*numbers, *numbers], dtype=torch.float64)
        assert metrics[f"eval/{name}"] == pytest.approx(x.mean())
        assert metrics[f"eval/{name}_se"] == pytest.approx(x.std() / len(x) ** 0.5)
    assert "eval/rewards/worth_3" in metrics
    assert [(sample["level"], sample["held_out"]) for sample in samples] == [(row["level"], True) for row in held_out]
    assert P.evaluate_held_out(task) == (metrics, samples)


JUDGES = [("GPT2", None), ("Llama", 1), ("Llama", None), ("Bert", 0)]


@torch.no_grad()
def judged_alone(model, text):
    """The last logit of the one text by the model's own forward. A text that is too long keeps its end."""
    return model(torch.tensor([letters()(text)["input_ids"][-64:]])).logits[0, -1].item()


@pytest.mark.parametrize("kind, pad", JUDGES)
@pytest.mark.parametrize("labels", [1, 3])
def test_a_reward_model_scores_each_text_as_if_alone(kind, pad, labels, tmp_path):
    """Batches of texts of mixed length; decoders with pad equal to a letter of the texts, or without a pad token, an
    encoder. The label picks one logit of several. A chat is read by the judge's own template."""
    names = {i: f"LABEL_{i}" for i in reversed(range(labels))}
    judge = model_of(kind, head="ForSequenceClassification", pad_token_id=pad, id2label=names).eval()
    put(tmp_path / "judge", judge, chat_template=CHAT, pad_token=None if pad is None else LETTERS[pad])
    label = None if labels == 1 else f"LABEL_{labels - 1}"
    reward = P.load_reward_model(str(tmp_path / "judge"), CPU, quick(tmp_path, reward_label=label))
    prompts = ["ab", "c", "what is ", "a", "cab", 40 * "x"]
    completions = ["a", "aaa", "zb", "", "bca", 60 * "y"]
    scores = reward(prompts, completions)
    own = [judged_alone(judge, prompt + completion) for prompt, completion in zip(prompts, completions)]
    assert error(scores, own) < 1e-5
    assert len(set(scores)) == 6
    assert reward.__name__ == "judge"
    ask, reply = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    assert error(reward([[ask]], [[reply]]), [judged_alone(judge, "<user>hi<assistant>yes")]) < 1e-5


def test_rewards_in_files_of_one_name_are_each_their_own(files, tmp_path):
    """Even where a module of this name is already imported, or one of Python's."""
    for folder, name in (("a", "rewards"), ("b", "rewards"), ("b", "random")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(f"def score(**columns): return '{folder} {name}'\n")
    for folder, name in (("a", "rewards"), ("b", "rewards"), ("b", "random")):
        assert P.load_reward(f"{tmp_path}/{folder}/{name}.py:score")() == f"{folder} {name}"


GIVEN = {  # what a reward gives for the replies in update 2, and what the line says
    "one number for all": (lambda n: 1.0, "TypeError"),
    "too few": (lambda n: [0.0] * (n - 1), "expected 1 finite numbers or None, got []"),
    "text": (lambda n: ["much"] * n, "TypeError"),
    "nan": (lambda n: [float("nan")] * n, "expected 1 finite numbers or None, got [nan]"),
    "infinite": (lambda n: [0.0] * (n - 1) + [1e39], "1e+39"),
    "an error": (lambda n: [1 / 0], "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_reward_that_fails_saves_the_run(given, files, tmp_path, capsys, monkeypatch, command, finished):
    """Exit status 1, and one line that names the reward, the prompt and the reply. The update before is kept, and the run goes on as if nothing had been once the reward is put right."""
    give, message = GIVEN[given]
    calls, sound = itertools.count(), answers

    def fragile(prompts, **columns):
        return give(len(prompts)) if next(calls) >= 2 else sound(prompts=prompts, **columns)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "answers", functools.update_wrapper(fragile, answers))
        assert P.main(command(f"--runs-dir {tmp_path}")) == 1
    line = the_line(capsys)
    assert line.startswith(f"ppo_llm.py: to go on from checkpoint-000001: --resume {tmp_path}/x: reward answers: ")
    assert message in line
    assert re.search("the prompt '. a' with the reply '", line)
    if given == "an error":
        assert P.main(["--resume", f"{tmp_path}/x"]) == 0
        assert outcome(tmp_path / "x") == outcome(finished)


# ---------------------------------------------------------------------------------------------------------- 9. models


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_itself_and_trains(kind, tmp_path):
    """For each kind that people use, in float32 as it is trained: sampler (cached, left-padded), scorer and reference
    agree with the bare model's own forward on each reply alone. What an update saves loads, with other weights."""
    lm = model_of(kind).bfloat16()  # as the hub has them
    bare = copy.deepcopy(lm).float().eval()
    cfg = quick(tmp_path, response_length=6, learning_rate=1e-4, temperature=0.7, micro_batch_size=3)
    task = P.prepare(cfg, ["a", "bcdefg", "ab", "c", "de", "fgh", "ijkl", "z"], worth, lm, letters())
    torch.manual_seed(0)
    for prompt, reply, said in replies_of(task):
        own = alone(bare, prompt, reply, 0.7)
        assert max(error(said[name], own) for name in ("sampler_logprobs", "logprobs", "ref_logprobs")) < 1e-4
    row = metrics_of(P.run_task(task))[1]
    assert row["policy/ratio"] == pytest.approx(1, abs=0.3)
    assert row["policy/sampler_gap"] < 1e-5
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "policy")
    assert torch.equal(weights_of(saved), weights_of(lm))
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    assert 1e-5 < error(weights_of(lm), weights_of(bare)) < 1e-2


@pytest.mark.parametrize("kind", ["Mamba", "Bert", "Bart"])
def test_models_of_a_foreign_kind_are_refused(kind, tmp_path):
    """A recurrent state that left padding moves, encoders: a refusal, not a wrong gradient."""
    with pytest.raises(Exception) as refusal:
        P.prepare(quick(tmp_path), ["ab"], worth, model_of(kind), letters())
    assert re.search(f"{kind}.* cannot be trained here", str(refusal.value.__notes__))


ROPES = {  # factors that change after 16 tokens
    "Llama": dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0), max_position_embeddings=16),
    "Phi3": dict(
        rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=4 * [1.0], long_factor=4 * [4.0]),
        original_max_position_embeddings=16,
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_factors_that_change_with_the_length_are_refused_where_they_would(kind, tmp_path):
    """Where prompt and reply may cross the length from which on they change; where they cannot, the model trains."""
    lm = model_of(kind, **ROPES[kind])
    actor, _ = P.make_actors(quick(tmp_path), lm, None, CPU, torch.float32)
    P.check_padding(actor, lm, 16)
    with pytest.raises(ValueError, match="beside 20 tokens, left-padded or with a cache, it says other than alone"):
        P.check_padding(actor, lm, 20)


def test_a_reward_models_head_becomes_the_value_head(tmp_path):
    """V of each state is at first what the reward model says of the text so far, whatever its kind."""
    judge = model_of("Llama", 3, "ForSequenceClassification", num_labels=1).eval()
    cfg = quick(tmp_path, critic_model=put(tmp_path / "judge", judge))
    for prompt, reply, said in replies_of(P.prepare(cfg, ["a", "bcd", "ef"], worth, model_of(), letters())):
        for t in range(len(reply)):
            states = judge.base_model(torch.tensor([prompt + reply[:t]])).last_hidden_state
            assert error(said["values"][t], judge.score(states)[0, -1, 0].detach()) < 1e-5


def test_code_of_a_model_is_run_only_if_the_command_says_so(files, tmp_path, command):
    """Not if the folder of a run says it."""
    own = command(f"--runs-dir {tmp_path} --model {files}/own --num-updates 1")
    again = ["--resume", f"{tmp_path}/x", "--num-updates", "2"]
    assert [P.main(own), P.main([*own, "--trust-remote-code"])] == [2, 0]
    assert [P.main(again), P.main([*again, "--trust-remote-code"])] == [2, 0]


# ------------------------------------------------------------------------------------------- 11. the folder of a run

# A run with everything that has a state: a critic of its own, an adaptive β, a warm-up, a decaying learning rate.
STATEFUL = (
    f"--reward {__name__}:answers --name x --device cpu --num-updates 6 --response-length 6 --batch-size 12 "
    "--num-mini-batches 2 --samples-per-prompt 2 --learning-rate 1e-2 --critic separate --critic-lr 3e-2 "
    "--kl-target 0.1 --kl-horizon 50 --critic-warmup-updates 2 --lr-scheduler-type linear --temperature 0.7 "
)


@pytest.fixture(scope="module")
def command(files):
    """The arguments of such a run, and more."""
    return lambda more: f"--model {files}/model --prompts {files}/prompts.jsonl {STATEFUL} {more}".split()


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """That run, undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    assert P.main(command(f"--runs-dir {folder}")) == 0
    assert len({row.get("kl_coef") for row in metrics_of(folder / "x")}) > 4  # there was a state to keep
    return folder / "x"


def outcome(run):
    """What must be the same of two runs, bit for bit: metrics, samples, and all weights at the end."""
    (checkpoint,) = P.checkpoints(run)
    weights = torch.load(checkpoint / "state.pt")["actor"]
    return metrics_of(run), lines(run / "samples.jsonl"), {name: x.tolist() for name, x in weights.items()}


def assert_alike(run, other):
    """Two runs differ by rounding alone."""
    for row, expected in zip(metrics_of(run), metrics_of(other), strict=True):
        assert row == pytest.approx(expected, abs=5e-3)
    policies = [weights_of(AutoModelForCausalLM.from_pretrained(x / "policy")) for x in (run, other)]
    assert error(*policies) < 5e-3


STOPS = [(signal.SIGINT, 1, ""), (signal.SIGTERM, 3, ""), (signal.SIGINT, 3, "--micro-batch-size 1")]


@pytest.mark.parametrize("number, update, more", STOPS)
def test_a_signal_ends_after_the_update_and_a_resume_goes_on(
    number, update, more, command, finished, tmp_path, capsys, monkeypatch
):
    """Once: the update in hand is finished and logged, and the run saved. A resume goes on as if it had never stopped,
    and cuts off what a life after the checkpoint left behind."""
    run = tmp_path / "x"
    with monkeypatch.context() as patch:
        at_call(patch, update, lambda: signal.raise_signal(number))
        assert P.main(command(f"--runs-dir {tmp_path}")) == 128 + number
    assert updates_of(run) == list(range(update + 1))
    shown = capsys.readouterr()
    assert f"{number.name}: finishing the update in hand" in shown.err
    assert f"Stopped after update {update}; to go on: python ppo_llm.py --resume {run}" in shown.out
    for name in P.LOGS:
        with open(run / name, "a") as f:
            f.write('{"update": 9}\n{"upd')
    (run / "unfinished").mkdir()
    assert P.main(["--resume", str(run), *more.split()]) == 0
    assert_alike(run, finished)
    assert more or outcome(run) == outcome(finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number, command, finished, tmp_path, monkeypatch):
    """In the update that the first one came in, which is not finished. Then signals do again what they did, and a run
    without a checkpoint begins anew."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_call(patch, 2, lambda: [signal.raise_signal(number) for _ in range(2)])
        assert P.main(command(f"--runs-dir {tmp_path}")) == 128 + number
    assert signal.getsignal(number) == before
    assert updates_of(tmp_path / "x") == [0, 1]
    assert P.main(["--resume", f"{tmp_path}/x"]) == 0
    assert outcome(tmp_path / "x") == outcome(finished)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


REFUSED = {  # what is changed of a finished run: what the line says of it
    "": "run is complete: to go on, give a larger --num-updates",
    "--num-updates 8 --learning-rate 0.5": "learning_rate was 0.01 and is 0.5; only num_updates, ",
    "config.json /model /other": "initial_model was ",
    "config.json prompts.jsonl letters.txt": "prompt_tokens was ",
    "config.json seed seeds": "expected the folder of a run of this ppo_llm.py",
    "state.pt": "checkpoint-000006 is damaged or of another program",
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_changed_or_damaged_run_is_refused(change, copied, capsys):
    """Exit status 2, and nothing is changed on the disk."""
    flags = change.split() if change.startswith("--") else ["--num-updates", "8"] if change else []
    if change.startswith("config"):
        path = copied / "config.json"
        path.write_text(path.read_text().replace(*change.split()[1:]))
    elif change == "state.pt":
        (path,) = copied.glob("*/state.pt")
        path.write_bytes(path.read_bytes()[:9999])
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert P.main(["--resume", str(copied), *flags]) == 2
    assert REFUSED[change] in the_line(capsys)
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def test_a_finished_run_goes_on_with_more_updates(copied):
    """And evaluates after each if it is asked to. TensorBoard, where it is installed, shows each update once."""
    assert P.main(["--resume", str(copied), *"--num-updates 8 --eval-every 1".split()]) == 0
    assert updates_of(copied) == [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8]
    assert [path.name for path in P.checkpoints(copied)] == ["checkpoint-000008"]
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(copied))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("objective/scores")]
    rows = [row for row in metrics_of(copied) if "objective/scores" in row]
    assert shown == [(row["update"], pytest.approx(row["objective/scores"])) for row in rows]


KILLER = """
import os, random, signal, sys, time
import torch, transformers, tyro, ppo_llm, MODULE  # once: each life of the run is a fork of this process
rng = random.Random(0)
for life in range(99):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("life.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os._exit(ppo_llm.main(["--resume", "x"] if os.path.exists("x/config.json") else sys.argv[1:]))
    end = time.monotonic() + rng.uniform(0.2, 1.5)
    while life < 16 and time.monotonic() < end and not (life % 2 and end - time.monotonic() < 1
                                                         and os.path.exists("x/unfinished")):
        time.sleep(0.001)
    if life < 16:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        sys.exit(f"{life} lives, status {os.WEXITSTATUS(status)}")
"""


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_never_disturbed(command, tmp_path, capsys):
    """SIGKILL 16 times, every other time in the middle of a save, if there is one soon."""
    arguments = command("--num-updates 40 --save-every 1 --runs-dir .")
    words = [sys.executable, "-c", KILLER.replace("MODULE", __name__), *arguments]
    done = subprocess.run(words, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.stderr.strip() == "16 lives, status 0", (tmp_path / "life.txt").read_text()
    assert P.main([*arguments, "--runs-dir", str(tmp_path), "--name", "alone"]) == 0
    assert outcome(tmp_path / "x") == outcome(tmp_path / "alone")


# ------------------------------------------------------------------------------------------- 10. several processes


def torchrun(count, function, *folders):
    """Call a function of this file in several processes: exit status and stderr."""
    code = f"import sys, {__name__} as T; sys.exit(T.{function.__name__}(*{[*map(str, folders)]}))"
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--no-python"]
    words = [sys.executable, *words, sys.executable, "-c", code]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr


def in_two_processes(arguments, folder):
    """A run, a resume of one that one process saved, a refused run, and one whose reward fails on one process."""
    torch.set_num_threads(1)
    arguments = arguments.split()
    assert P.main([*arguments, "--batch-size", "6"]) == 2
    assert P.main(arguments) == 0
    assert P.main(["--resume", f"{folder}/alone"]) == 0
    rank = int(os.environ["RANK"])
    at_call(pytest.MonkeyPatch(), 2, lambda: 1 / (1 - rank))
    return P.main([*arguments, "--name", "failed"])


def in_three_processes(folder):
    torch.set_num_threads(1)
    return P.main(["--resume", f"{folder}/alone"])


@pytest.fixture
def half(command, tmp_path, monkeypatch):
    """A run that one process stopped after its third update."""
    with monkeypatch.context() as patch:
        at_call(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        assert P.main(command(f"--runs-dir {tmp_path} --name alone")) == 130
    return tmp_path


@pytest.mark.slow
def test_two_processes_do_what_one_does(command, finished, half, monkeypatch):
    """The same run up to rounding; one process goes on with what two saved, and two with what one saved. A reward that
    fails on one of them ends both with one line."""
    arguments = command(f"--runs-dir {half} --save-every 4")
    status, err = torchrun(2, in_two_processes, " ".join(arguments), half)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("ppo_llm.py: ") and "failed" in line]
    assert "reward answers: the prompt '" in line and "ZeroDivisionError" in line
    assert updates_of(half / "failed") == [0, 1]
    for name in ("x", "alone"):
        assert_alike(half / name, finished)
    assert P.main(["--resume", f"{half}/x", "--num-updates", "7"]) == 0
    assert updates_of(half / "x")[-2:] == [7, 7]


@pytest.mark.slow
def test_three_processes_go_on_with_what_one_saved(finished, half):
    status, err = torchrun(3, in_three_processes, half)
    assert status == 0, err
    assert_alike(half / "alone", finished)


# ----------------------------------------------------------------------------------------- the demo, README and the rest


@pytest.mark.slow
def test_the_demo_improves_and_leaves_what_it_promises(tmp_path):
    """As a user runs it: the held-out score rises by more than 2 and the reviews stay fluent."""
    words = [sys.executable, P.__file__, "--name", "demo"]
    done = subprocess.run(words, cwd=tmp_path, env=ENV | {"COLUMNS": "80"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expected in ("before", "after", "Held-out prompts", "fluency", "from_pretrained('runs/demo/policy')"):
        assert expected in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    run = tmp_path / "runs" / "demo"
    before, *_, after = metrics_of(run)
    assert after["eval/score"] > before["eval/score"] + 2
    assert after["eval/rewards/fluency"] > 0.8
    assert before["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert {"update", "prompt", "reply", "score", "kl"} <= set(lines(run / "samples.jsonl")[0])
    assert json.loads((run / "config.json").read_text())["torch"] == torch.__version__
    policy = AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()
    trained = torch.load(*run.glob("*/state.pt"))["actor"]
    assert all(torch.equal(x, trained[f"lm.{name}"]) for name, x in policy.items())


def test_without_a_model_only_the_demo_runs(tmp_path):
    with pytest.raises(ValueError, match=r"need a model: give --model too; the demo is train\(Demo\(\)\)"):
        P.train(quick(tmp_path))


def test_import_has_no_side_effects(tmp_path):
    """Importing takes no transformers (slow to start), writes nothing, prints nothing."""
    code = "import sys, ppo_llm; print([name for name in ('transformers', 'tyro') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENV)
    assert (done.stdout, done.stderr, [*tmp_path.iterdir()]) == ("[]\n", "", [])


def test_requirements_and_inline_metadata_agree():
    """The same ranges; the tests alone add pytest and hypothesis."""
    needs = re.search(r"^# dependencies = (.*)$", SOURCE, re.M).group(1)
    assert json.loads(needs) == ["torch>=2.11,<2.14", "transformers>=5.17,<5.24", "tyro>=1.0,<2"]
    both = (HERE / "requirements.txt").read_text().split()
    assert both[:3] == json.loads(needs)
    assert [re.match(r"\w+", name).group() for name in both[3:]] == ["pytest", "hypothesis"]


def test_readme_names_only_what_exists():
    """Every flag and every test in it; and it is short enough to be read."""
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    foreign = {"--nproc-per-node", "--nnodes", "--shutdown-timeout", "--standalone"}
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)} | foreign | {"--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= flags
    assert set(re.findall(r"`(test_\w+)`", README)) <= set(re.findall(r"def (test_\w+)", tests))
    assert len(README.encode()) <= 16 * 1024


def test_readme_commands_and_code_run(tmp_path, monkeypatch):
    """Every block of Python and every command with a model, word for word but for tiny models in place of the hub's and
    fewer updates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    judges = set(re.findall(r"--reward-model (\w[\w./-]*)", README))
    for name in judges | set(re.findall(r"(?:--model |model=\"|from_pretrained\(\")(\w[\w./-]*)", README)):
        labels = {0: "NEGATIVE", 1: "POSITIVE"}
        head = dict(head="ForSequenceClassification", id2label=labels) if name in judges else {}
        put(tmp_path / name, model_of("Llama", max_position_embeddings=512, **head), pad_token="?", chat_template=CHAT)
    for name in set(re.findall(r"--(?:eval-)?prompts ([\w.]+)", README)):
        text = '{"prompt": "it is", "answer": "7"}\n' if name.endswith("l") else "the film was\n"
        (tmp_path / name).write_text(20 * text)
    blocks = re.findall(r"```python\n(?:# (\w+\.py)[^\n]*\n)?(.*?)```", README, re.S)
    for file, code in blocks:
        if file:
            (tmp_path / file).write_text(code)
    for words in re.findall(r"^ *(?:torchrun .*?|python )ppo_llm.py (--model .*)$", README, re.M):
        shutil.rmtree("runs/NAME", ignore_errors=True)
        assert P.main([*words.split("#")[0].split(), *"--num-updates 1 --batch-size 8 --name NAME".split()]) == 0
    for file, code in blocks:
        if not file:
            exec(re.sub(r"num_updates=\d+", "num_updates=1", code), {"__name__": "readme"})
