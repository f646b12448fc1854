"""What only a GPU can say of ppo_llm.py: whether it is right there, and how far it is from what the hardware can do.

    python runs/reference/bench/gpu.py                          # all parts; each is meant to take under 3 minutes
    python runs/reference/bench/gpu.py correctness rollout      # some of: correctness rollout update demo
    python runs/reference/bench/gpu.py --tiny                   # small shapes, on the CPU where there is no GPU

Prints a line of JSON for each figure. What fails says so in its line and does not end the rest; the exit status is then
1. Models have random weights: 124M is GPT-2's shape, 1.5B Qwen2-1.5B's. It needs typeguard, but no tyro.

bound_ms: if weights, keys and values were read once, at the speed of a copy. fixed_s: what a rollout takes besides its
tokens. sampler_gap: the mean difference of log-probabilities, in nats, to the forward pass that trains.
"""
import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
import ppo_llm as P
import torch
import torch.nn.functional as F
import transformers

PARTS = ("correctness", "rollout", "update", "demo")
SMALL = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(vocab_size=211, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=0)
QWEN = dict(num_hidden_layers=28, hidden_size=1536, intermediate_size=8960, num_attention_heads=12)
QWEN |= dict(num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
GPT2 = dict(n_layer=2, n_embd=64, n_head=4, n_positions=512, vocab_size=211, initializer_range=0.1)
MODELS = {
    "gpt2": (transformers.GPT2Config, GPT2 | dict(bos_token_id=1, eos_token_id=2)),
    "llama": (transformers.LlamaConfig, SMALL),
    "qwen3": (transformers.Qwen3Config, SMALL | dict(head_dim=16, tie_word_embeddings=True)),
    "124M": (transformers.GPT2Config, {}),
    "1.5B": (transformers.Qwen2Config, QWEN),
}
TINY = {"124M": "gpt2", "1.5B": "qwen3"}
HALF = torch.bfloat16


def say(what: str, **figures) -> None:
    rounded = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in figures.items()}
    print(json.dumps({"what": what, **({"tiny": True} if TINY_SHAPES else {}), **rounded}), flush=True)


failed = []


@contextlib.contextmanager
def part(name: str):
    """What goes wrong inside is said, and what follows goes on, such as a smaller model after one that did not fit."""
    try:
        yield
    except Exception as e:
        failed.append(name)
        say(f"{name}: FAILED", error=f"{type(e).__name__}: {e}"[:500], where=traceback.format_exc(limit=-3)[-600:])
    gc.collect()  # layers that are checkpointed refer to themselves
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(f, repeats: int = 3) -> float:
    """The median time of f, after a call that is not counted. The peak of memory is counted anew."""
    times = []
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + repeats):
        start = time.perf_counter()
        f()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def memory() -> dict:
    if not GPU:
        return {}
    return {"peak_GB": torch.cuda.max_memory_allocated() / 1e9, "reserved_GB": torch.cuda.max_memory_reserved() / 1e9}


def model_of(kind: str):
    torch.manual_seed(0)
    make, shape = MODELS[TINY.get(kind, kind) if TINY_SHAPES else kind]
    with DEVICE:
        return transformers.AutoModelForCausalLM.from_config(make(**shape), dtype=torch.float32).eval()


def actors_of(kind: str, dtype: torch.dtype, device=None, **settings):
    return P.make_actors(P.Config(**settings), model_of(kind), device or DEVICE, dtype)


def prompts_of(number: int, longest: int) -> list:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (number,), generator=draw).tolist()
    return [P.Prompt(torch.randint(3, 200, (n,), generator=draw).tolist()) for n in lengths]


def count_fives(prompts, replies):
    return torch.tensor([float(sum(token % 5 == 0 for token in reply)) for reply in replies]), {}


def difference(x, y) -> float:
    return float((x.double().cpu() - y.double().cpu()).abs().max())


# Is it right?


@contextlib.contextmanager
def exact_products():
    """No TF32, which `pick_device` allows."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def correctness() -> None:
    for kind in ("gpt2", "llama", "qwen3"):
        for critic in ("shared", "separate"):
            with part(f"float32 {kind} {critic}"), exact_products():
                against_the_cpu(kind, critic)
        with part(f"static_decode {kind}"), exact_products():
            queries, mask = P.left_pad([prompt.ids for prompt in prompts_of(8, 9)])
            arguments = P.Actor(model_of(kind)), queries, mask, torch.rand(8, 24, dtype=torch.float64), [], 1.0
            (ids, logprobs), (same_ids, same_logprobs) = P.decode(*arguments), static_decode(*arguments)
            same = float((ids == same_ids).float().mean())
            say(f"static_decode {kind}", same_tokens=same, logprobs=difference(logprobs, same_logprobs))
    with part("rotary angles"):
        rotary()
    for kind in ("gpt2", "llama", "qwen3", "124M", "1.5B"):
        with part(f"bfloat16 {kind}"):
            in_bfloat16(kind)
    with part("waits"):
        waits()


def against_the_cpu(kind: str, critic: str) -> None:
    """Two updates in float32, here and on the CPU, from the replies that the CPU sampled. The optimizer is plain
    gradient descent, so that weights differ as gradients do."""
    settings = dict(batch_size=32, response_length=24, num_mini_batches=2, num_ppo_epochs=2, micro_batch_size=8)
    cfg = P.PPOConfig(**settings, num_updates=2)
    sampled, runs = [], []
    for device in (torch.device("cpu"), DEVICE):
        actor, ref = actors_of(kind, torch.float32, device, critic=critic)
        first = [weight.detach().cpu().clone() for weight in actor.parameters()]
        optimizer = torch.optim.SGD(actor.parameters(), lr=0.1)
        rollouts = []

        def sample(*arguments):
            rollouts.append(P.sample_replies(*arguments))
            if len(runs) == 0:
                sampled.append(dataclasses.replace(rollouts[-1]))
            return dataclasses.replace(sampled[len(rollouts) - 1])

        basics = actor, ref, optimizer, prompts_of(64, 9), count_fives, [7, 8, 9], cfg, P.Progress(cfg.kl_coef)
        metrics = [row for row, _ in P.ppo(*basics, sample=sample)]
        moves = [weight.detach().cpu() - before for weight, before in zip(actor.parameters(), first)]
        runs.append((rollouts, metrics, torch.cat([move.flatten() for move in moves])))
    (theirs, on_cpu, right), (ours, here, moved) = runs
    names = [name for name in here[0] if not name.startswith("time/")]
    say(
        f"float32 {kind} {critic}, against the CPU",
        same_tokens=statistics.fmean(float((x.responses == y.responses).float().mean()) for x, y in zip(ours, theirs)),
        first_token_logprob=difference(ours[0].sampler_logprobs[:, 0], theirs[0].sampler_logprobs[:, 0]),
        weights_moved=float((moved - right).norm() / right.norm()),  # a share of how far they moved
        metrics=max(abs(x[name] - y[name]) / (abs(y[name]) + 1e-3) for x, y in zip(here, on_cpu) for name in names),
    )


def in_bfloat16(kind: str) -> None:
    """An update at a learning rate of 0: the sampler and the trainer should agree, and every ratio be 1."""
    cfg = P.PPOConfig(batch_size=32, response_length=32, num_mini_batches=2, num_ppo_epochs=1, num_updates=1)
    actor, ref = actors_of(kind, HALF)
    optimizer = torch.optim.SGD(actor.parameters(), lr=0.0)
    kept = []

    def sample(*arguments):
        kept.append(P.sample_replies(*arguments))
        return kept[0]

    basics = actor, ref, optimizer, prompts_of(32, 20), count_fives, [7, 8, 9], cfg, P.Progress(cfg.kl_coef)
    [(metrics, _)] = P.ppo(*basics, sample=sample)
    batch = kept[0].select(torch.arange(8), DEVICE)
    gradients = []
    for actor.dtype, products in ((HALF, contextlib.nullcontext), (torch.float32, exact_products)):
        actor.zero_grad()
        with products():
            P.ppo_loss(actor, batch, cfg)[0].backward()
        gradients.append(torch.cat([w.grad.flatten() for w in actor.lm.parameters() if w.grad is not None]))
    names = ("policy/sampler_gap", "policy/ratio", "policy/approxkl", "policy/clipfrac", "objective/kl")
    cosine = float(F.cosine_similarity(*gradients, dim=0))
    say(f"bfloat16 {kind}", **{name: metrics[name] for name in names}, gradient_cosine_to_float32=cosine, **memory())


def rotary() -> None:
    """Angles of positions up to 4096 must not be TF32 products, which they may have been before transformers 5.19."""
    model = model_of("qwen3")
    positions = torch.arange(4096, device=DEVICE).expand(2, -1)
    x = torch.zeros(2, 1, 1, device=DEVICE)
    as_in_a_run, _ = model.model.rotary_emb(x, positions)
    with exact_products():
        exact, _ = model.model.rotary_emb(x, positions)
    say("rotary angles", cosines=difference(as_in_a_run, exact))


def waits() -> None:
    """The lines of an update that make the host wait for the GPU, as far as torch notices."""
    if not GPU:
        return say("waits: no GPU")
    settings = dict(batch_size=16, response_length=16, num_mini_batches=2, num_ppo_epochs=1, micro_batch_size=4)
    cfg = P.PPOConfig(**settings, num_updates=1)
    actor, ref = actors_of("qwen3", HALF)
    basics = actor, ref, P.make_optimizer(P.Config(), actor), prompts_of(16, 9), count_fives, [], cfg, P.Progress(0.05)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            list(P.ppo(*basics))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    noted = [w for w in seen if "called a synchronizing" in str(w.message)]
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in noted)
    say("waits: 16 tokens, 4 + 4 micro-batches, 2 steps", lines=dict(lines.most_common(25)))


# How fast is it?


def peaks() -> tuple:
    """Bytes per second of a copy, read and written, and FLOP/s of products in bfloat16 and, on a GPU, TF32."""
    x = torch.empty(2**20 if TINY_SHAPES else 2**30, device=DEVICE).normal_()
    y = torch.empty_like(x)
    copied = 8 * x.numel() / seconds(lambda: y.copy_(x), 5)
    size = 256 if TINY_SHAPES else 8192
    flops = {}
    for name, dtype in (("bfloat16", HALF), ("tf32", torch.float32)):
        a = torch.randn(size, size, device=DEVICE).to(dtype)
        flops[name] = 2 * size**3 / seconds(lambda: a @ a, 5)
    device = torch.cuda.get_device_name() if GPU else "cpu"
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    rates = {f"{name}_TFLOPs": x / 1e12 for name, x in flops.items()}
    say("peaks", device=device, **versions, copy_TBs=copied / 1e12, **rates)
    return copied, flops


@torch.no_grad()
def static_decode(actor, queries, query_mask, uniform, stop_ids, temperature, room=None):
    """`decode` with a cache of a fixed size, for `room` tokens, or as many as there are. Every token is then the same
    launches, and the host waits for none of them: a GPU records them once, as a graph, and replays it."""
    length, (b, T) = queries.shape[1], uniform.shape
    room = room or T
    queries, uniform = queries.to(DEVICE), uniform.to(DEVICE)
    attention = F.pad(query_mask, (0, room), value=True).to(DEVICE)
    stop = queries.new_tensor(stop_ids)
    tokens = queries.new_zeros(b, T)
    logprobs = torch.zeros(b, T, device=DEVICE)
    now = queries.new_zeros(1)  # the place of the token that comes next
    cache = transformers.StaticCache(config=actor.lm.config, max_cache_len=length + room)
    update = cache.update  # Llama's and Qwen's keys are float32 under autocast, their values bfloat16

    def update_alike(keys, values, *rest, **more):
        return update(keys.to(values.dtype), values, *rest, **more)

    cache.update = update_alike

    def sample(ids, attention, positions):
        options = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
        output = actor.lm(input_ids=ids, attention_mask=attention, position_ids=positions, **options)
        logits = output.logits[:, -1] / temperature
        cumulative = logits.double().softmax(-1).cumsum(-1)
        ids = (cumulative <= uniform.index_select(1, now)).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
        tokens.index_copy_(1, now, ids)
        logprobs.index_copy_(1, now, P.logprobs_from_logits(logits.unsqueeze(1), ids))
        now.add_(1)
        return ids

    whole = attention.long()
    positions = (whole.cumsum(1) - 1).clamp(min=0)
    place = positions[:, length : length + 1].clone()

    def step():
        ids.copy_(sample(ids, whole, place))
        place.add_(1)

    with actor.autocast():  # keeps the rounded weights
        ids = sample(queries, whole[:, :length], positions[:, :length])
        replay = step
        if GPU:
            side = torch.cuda.Stream()  # what is recorded must have run once before, on a stream of its own
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay
        for t in range(2 if GPU else 1, T):
            replay()
            if t % 16 == 15 and torch.isin(tokens, stop).any(1).all():
                break
    return tokens, logprobs


def rollout() -> None:
    copied, _ = peaks()
    for kind, b, length, T in (("124M", 128, 32, 96), ("1.5B", 64, 64, 64)):
        with part(f"decode {kind}"):
            time_decoding(kind, *((4, 8, 12) if TINY_SHAPES else (b, length, T)), copied)


def time_decoding(kind: str, b: int, length: int, T: int, copied: float) -> None:
    """A token's time is that of the second half of the tokens; what the first half takes more is fixed: the prompt,
    rounding the weights, recording. The gap is to log-probabilities by the forward pass that trains."""
    model = model_of(kind)
    actor = P.Actor(model, HALF)  # with gradients switched on, as in a run: else autocast keeps no rounded weights
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    trunk = sum(weight.numel() for weight in model.parameters()) - head
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    kv_width = kv_heads * config.hidden_size // config.num_attention_heads
    queries, query_mask = P.left_pad([prompt.ids for prompt in prompts_of(b, length)])
    cached = 2 * 2 * config.num_hidden_layers * kv_width * b * (queries.shape[1] + 3 * T / 4)
    bound = (2 * trunk + 4 * head + cached) / copied  # seconds a token, if all that must be read is read once
    model_and_prompts, uniform = (actor, queries, query_mask), torch.rand(b, T, dtype=torch.float64)
    # Half of the tokens with a cache for all: attention reads the whole of it.
    for name, decode in (("decode", P.decode), ("static_decode", functools.partial(static_decode, room=T))):
        with part(f"{name} {kind}"):
            half, whole = (seconds(lambda: decode(*model_and_prompts, uniform[:, :t], [], 1.0)) for t in (T // 2, T))
            s = (whole - half) / (T - T // 2)
            rate = dict(ms_per_token=1e3 * s, bound_ms=1e3 * bound, share_of_bound=bound / s, tokens_per_s=b / s)
            used = memory()
            tokens, said = decode(*model_and_prompts, uniform, [], 1.0)
            full = torch.ones(b, T, dtype=torch.bool)
            batch = P.Rollout(queries, query_mask, tokens.cpu(), full, full, said.cpu()).select(torch.arange(b), DEVICE)
            with torch.no_grad():
                gap = (actor(batch, 1.0, with_entropy=False)[0] - said).abs().mean()
            fixed = half - s * (T // 2)
            say(f"{name} {kind}", b=b, T=T, **rate, fixed_s=fixed, sampler_gap=float(gap), **used)
    for t in (8, 40):
        profile(f"decode {kind}, prompt and {t} tokens", lambda: P.decode(*model_and_prompts, uniform[:, :t], [], 1.0))


def profile(name: str, f) -> None:
    """Launches, the time that the GPU computes, and the kernels that take most of it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    if not GPU:
        return
    s = seconds(f)  # without the profiler, which slows the host
    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        f()
        torch.cuda.synchronize()
    rows = seen.key_averages()
    kernels = sorted((r for r in rows if "CUDA" in str(r.device_type)), key=lambda r: -r.self_device_time_total)
    busy = sum(r.self_device_time_total for r in kernels) / 1e6
    launches = sum(r.count for r in rows if "LaunchKernel" in r.key)
    top = {r.key[:60]: round(r.self_device_time_total / 1e3, 3) for r in kernels[:8]}
    say(f"profile of {name}", launches=launches, seconds=s, gpu_computes_s=busy, top_ms=top)


def update() -> None:
    copied, flops = peaks()
    plans = [("124M", 32, 32, 96, False), ("1.5B", 16, 128, 448, True), ("1.5B", 16, 128, 448, False)]
    for kind, b, length, T, checkpointing in plans:
        name = f"{kind}, {b} × {length + T}" + ", checkpointing" * checkpointing
        with part(f"update {name}"):
            sizes = (4, 8, 12) if TINY_SHAPES else (b, length, T)
            time_update(name, kind, *sizes, checkpointing, copied, flops)


def time_update(name: str, kind: str, b: int, length: int, T: int, checkpointing: bool, copied: float, flops: float):
    """A micro-batch forward and backward with AdamW's moments in memory, a step of AdamW, and the forward pass before
    an update, which computes entropies too."""
    actor, ref = actors_of(kind, HALF, gradient_checkpointing=checkpointing)
    ids = torch.randint(3, 200, (b, length + T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(b, length + T, dtype=torch.bool)
    mask[::2, 0] = False  # some prompts are padded, as in any rollout
    parts = ids[:, :length], mask[:, :length], ids[:, length:], mask[:, length:], mask[:, length:]
    rollout = P.Rollout(*parts, torch.zeros(b, T))
    cfg = P.PPOConfig(batch_size=b, response_length=T, num_mini_batches=1, micro_batch_size=b)
    P.fill_logprobs_and_values(actor, ref, rollout, cfg)
    P.compute_advantages(actor, rollout, torch.randn(b), 0.05, cfg)
    batch = rollout.select(torch.arange(b), DEVICE)
    optimizer = P.make_optimizer(P.Config(), actor)

    def step():
        P.ppo_loss(actor, batch, cfg)[0].backward()

    step()
    s = seconds(optimizer.step)
    parameters = sum(weight.numel() for weight in actor.parameters())
    say(f"AdamW {name}", seconds=s, bound_seconds=28 * parameters / copied, **memory())  # reads 16, writes 12
    config = actor.lm.config
    head = actor.lm.get_output_embeddings().weight.numel()
    trunk = sum(weight.numel() for weight in actor.lm.parameters()) - head
    attention = 12 * config.num_hidden_layers * config.hidden_size * b * (length + T) ** 2 / 2
    body, vocabulary = 6 * trunk * b * (length + T) + attention, 6 * head * b * T  # without what checkpointing repeats
    ideal = body / flops["bfloat16"] + vocabulary / flops["tf32"]
    s = seconds(step)
    shares = dict(TFLOPs=(body + vocabulary) / s / 1e12, share_of_peak=ideal / s)
    say(f"loss and backward {name}", seconds=s, tokens_per_s=b * (length + T) / s, **shares, **memory())
    profile(f"loss and backward {name}", step)
    optimizer.zero_grad()
    s = seconds(lambda: P.fill_logprobs_and_values(actor, ref, rollout, cfg))
    say(f"log-probabilities and values {name}", seconds=s, **memory())


def demo() -> None:
    """The demo in both types, and resumed: it should end as on a CPU, up to chance."""
    if TINY_SHAPES:
        P.demo_task = functools.partial(P.demo_task, steps=8)
    for dtype in ("float32", "bfloat16"):
        with part(f"demo {dtype}"), tempfile.TemporaryDirectory() as folder:
            run = f"{folder}/run"
            small = dict(num_updates=2, batch_size=16, response_length=8, num_ppo_epochs=1) if TINY_SHAPES else {}
            cfg = dataclasses.replace(P.DEMO, device=str(DEVICE), dtype=dtype, output_dir=run, **small)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                start = time.perf_counter()
                P.train(cfg)
                s = time.perf_counter() - start
                P.train(dataclasses.replace(cfg, num_updates=cfg.num_updates + 1, resume=run))
            rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
            held_out = [row for row in rows if "eval/score" in row]
            trained = [row for row in rows if "policy/ratio" in row]
            say(
                f"demo {dtype}", seconds=s, scores=[round(row["eval/score"], 2) for row in held_out],
                kl=held_out[-1]["eval/kl"], fluency=held_out[-1]["eval/rewards/fluency"], updates=len(trained),
                sampler_gap=max(row["policy/sampler_gap"] for row in trained), **memory()
            )


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("parts", nargs="*", help="of: " + " ".join(PARTS))
parser.add_argument("--tiny", action="store_true", help="small shapes, whose times mean nothing")
args = parser.parse_args()
if not {*args.parts} <= {*PARTS}:
    parser.error(f"{' '.join(args.parts)}: expected parts of {' '.join(PARTS)}")
TINY_SHAPES = args.tiny
GPU = torch.cuda.is_available()
if not GPU and not TINY_SHAPES:
    parser.error("no GPU: expected one, or --tiny to try the script on the CPU")
P.start_processes()  # as in a run: memory in segments that grow
DEVICE, _ = P.pick_device(P.Config(device="cuda" if GPU else "cpu"))  # and TF32
for name in args.parts or PARTS:
    with part(name):
        globals()[name]()
sys.exit(len(failed) > 0)
