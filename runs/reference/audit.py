"""Computes again, from the rows, the tables of the pages of this folder and what the README says of results.

    python runs/reference/audit.py             # lists what differs, and numbers of the README's results it cannot make
    python runs/reference/audit.py --write     # puts the tables of the rows into the pages
    python runs/reference/audit.py details     # prints a table

A table stands in its page between <!-- rows: NAME --> and <!-- end -->. A sentence is written below as the README has
it, with its numbers computed. It needs nothing but Python; tests run it.
"""
import contextlib
import difflib
import io
import itertools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).parent
sys.path.append(str(HERE / "study"))
import results

README, INDEX, STUDY = HERE.parents[1] / "README.md", HERE / "README.md", HERE / "study" / "README.md"
SIGNS = str.maketrans("-", "−")
NEVER = 3840  # replies after which a run of learning.py that has not reached its goal ends


# ------------------------------------------------------------------------------------------------------------ the rows


def pm(xs, digits=2) -> str:
    return "{:z.{}f} ± {:.{}f}".format(*(x for y in results.mean_and_error([*xs]) for x in (y, digits)))


def runs(name: str, task: str, change: str, commit: str | None = None) -> list[dict]:
    """By this commit, or by that which has most rows."""
    path = HERE / "study" / f"{name}.csv"
    found = results.read(results.read_rows(path)[commit] if commit else results.largest(path))
    return [run for (t, c, _), run in found.items() if (t, c) == (task, change)]


def learning(name: str) -> dict[tuple, list[dict]]:
    """{(change, task, rate): rows} of learning/NAME.jsonl, each by the commit that measured it last."""
    groups = defaultdict(list)
    for row in read_lines(HERE / "learning" / f"{name}.jsonl"):
        rows = groups[row["change"], row["task"], row["rate"]]
        if rows and rows[-1].get("commit") != row.get("commit"):
            rows.clear()
        rows.append(row)
    return groups


def read_lines(path: Path) -> list[dict]:
    return [*map(json.loads, path.read_text().splitlines())]


def replies(rows: list[dict]) -> float:
    return fmean(row["samples"] or NEVER for row in rows)


def losses(change: str) -> str:
    """What a change of the study `details` loses of a run of demo, sums and ends, in percent."""
    found = results.read(results.largest(HERE / "study" / "details.csv"))
    xs = [pm((-x for x in results.worth(found, task, change)["mean"]), 0) for task in ("demo", "sums", "ends")]
    return "{}, {} and {}%".format(*xs)


# ---------------------------------------------------------------------------------------------------------- the tables


def study(name: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        results.show(name)
    return text.getvalue().strip()


def even() -> str:
    ours, theirs = learning("even"), learning("trl")
    lines = ["| learning rate | ours | TRL | ours, s | TRL, s |", "|---|---|---|---|---|"]
    for rate in (3e-4, 1e-3, 3e-3, 1e-2):
        both = ours["default", "even", rate], theirs["TRL", "even", rate]
        counts = [f"{replies(x):.0f} ({min(r['samples'] for r in x)}–{max(r['samples'] for r in x)})" for x in both]
        seconds = [f"{fmean(row['seconds'] for row in x):.0f}" for x in both]
        lines.append(f"| {rate} | {' | '.join(counts + seconds)} |")
    return "\n".join(lines)


EACH = {  # change of each.jsonl: the default, and what stands in its place
    "default": "all of them | ",
    "lam=0.95": "λ = 1 | 0.95",
    "vf_coef=0.1": "vf_coef 0.3 | 0.1",
    "vf_coef=1": " | 1",
    "cliprange_value=0.2": "no value clip | 0.2",
    "critic=separate": "critic shared | separate",
    "critic=action-value": " | action values",
    "critic=none": " | none (vf_coef 0)",
    "target_kl=null": "target_kl 1 | none",
    "target_kl=0.1": " | 0.1",
    "num_ppo_epochs=2": "4 epochs | 2",
    "num_ppo_epochs=8": " | 8",
    "num_mini_batches=2": "4 minibatches | 2",
    "num_mini_batches=8": " | 8",
    "beta2=0.95": "Adam's β₂ 0.999 | 0.95",
    "eps=1e-8": "Adam's ε 1e-5 | 1e-8",
    "max_grad_norm=0.3": "max_grad_norm 1 | 0.3",
    "max_grad_norm=null": " | none",
    "whiten_advantages=false": "advantages whitened | not",
    "warmup_updates=3": "no warm-up | 3 updates",
}


def each() -> str:
    found, tasks = learning("each"), "even last first length kl".split()
    lines = [f"| default | instead | {' | '.join(f'`{task}`' for task in tasks)} | |", "|---" * 8 + "|"]
    for change, words in EACH.items():
        groups = [found[change, task, 3e-3] for task in tasks]
        base = [replies(found["default", task, 3e-3]) for task in tasks]
        cells = [f"{replies(rows):.0f}" + "\\*" * (None in [row["samples"] for row in rows]) for rows in groups]
        ratio = fmean(replies(rows) / x for rows, x in zip(groups, base))
        lines.append(f"| {words} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


def sums() -> str:
    """The runs of smollm2/sums.py: of a line, the seeds in turn, and the largest standard error over sums."""
    lines = ["| pairs | paid for | seeds | right, % | training, % | KL |", "|---|---|---|---|---|---|"]
    for pairs, reward in itertools.product(("1-20", "2-59"), ("right", "digits")):
        paths = sorted((HERE / "smollm2").glob(f"sums-{pairs}-{reward}-*"))
        if not paths:
            continue
        found = [read_lines(path / "metrics.jsonl") for path in paths]
        held_out = [[row for row in rows if "eval/score" in row] for rows in found]
        courses = [" → ".join(f"{100 * row['eval/rewards/right']:.0f}" for row in rows) for rows in held_out]
        error = max(row["eval/rewards/right_se"] for rows in held_out for row in rows)
        ends = [[row for row in rows if "policy/ratio" in row][-3:] for rows in found]
        trained = [f"{100 * fmean(row['rewards/right'] for row in rows):.0f}" for rows in ends]
        kl = [f"{rows[-1]['eval/kl']:.1f}" for rows in held_out]
        cells = [pairs, f"`{reward}`", ", ".join(path.name[-2:] for path in paths)]
        cells.append(f"{'; '.join(courses)} (± {100 * error:.0f})")
        lines.append(f"| {' | '.join([*cells, ', '.join(trained), ', '.join(kl)])} |")
    return "\n".join(lines)


def credit() -> str:
    """Replies until the goal of the same task paid at its end and paid at once; what is saved is paired by seed."""
    found = results.read(results.largest(HERE / "study" / "critic.csv"))
    lines = ["| tokens | | paid at the end | at once | saved |", "|---|---|---|---|---|"]
    for length, change in itertools.product(results.LENGTHS, ("critic", "critic, lam=0.95", "no critic", "group mean")):
        both = [
            {seed: results.replies_to_goal(run, results.GOALS[task]) for (t, c, seed), run in found.items()
             if (t, c) == (f"{task}-{length}", change)}
            for task in ("end", "every")
        ]
        if both[0]:
            columns = [*both[0].values()], [*both[1].values()], [both[0][seed] - both[1][seed] for seed in both[0]]
            cells = [str(length), change, *(results.said(xs, 0) for xs in columns)]
            lines.append(f"| {' | '.join(cells)} |".translate(SIGNS))
    return "\n".join(lines)


def kind() -> str:
    """The runs of smollm2/smollm2.py, and of each the first held-out replies. Under the reference a token of the policy
    has a negative log-probability of entropy + KL on average."""
    lines = ["| seed | score | KL | reference, nats a token | before | after |", "|---|---|---|---|---|---|"]
    for folder in sorted((HERE / "smollm2").glob("kind-*")):
        rows = read_lines(folder / "metrics.jsonl")
        held_out = [row for row in rows if "eval/score" in row]
        score = (f"{row['eval/score']:.2f} ± {row['eval/score_se']:.2f}" for row in held_out)
        trained = [row for row in rows if "policy/ratio" in row]
        surprise = (f"{row['policy/entropy'] + row['objective/kl'] / row['reply/length']:.2f}" for row in trained)
        surprise = [*surprise]
        cells = [folder.name[5:], " → ".join(score), f"{held_out[-1]['eval/kl']:.1f}"]
        cells.append(f"{surprise[0]} → {surprise[-1]}")
        samples = [row for row in read_lines(folder / "samples.jsonl") if row["held_out"]]
        for update in (0, rows[-1]["update"]):
            texts = [row["prompt"] + row["reply"] for row in samples if row["update"] == update][:2]
            cells.append("<br>".join(" ".join(text.split()) for text in texts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- the sentences


def sentences():
    """Yields what the README says."""
    demos = runs("demo", "demo", "defaults")
    before, after, kl, fluency = ([run[name] for run in demos] for name in ("before", "score", "kl", "fluency"))
    yield (
        f"Over fifteen seeds, 1 to 5 and 100 to 109, the held-out sentiment rises from {pm(before)} to {pm(after)} "
        f"at a KL of {fmean(kl):.1f} nats and a fluency of {pm(fluency, 3)}."
    )
    others = [run for name in ("details", "trl") for run in runs(name, "demo", "defaults", "de3c292")]
    older = runs("details", "demo", "defaults", "f0e94a8")
    older += runs("rates", "demo", "rate x 1.0, target KL 1.0", "f0e94a8")
    assert [sum(run["fluency"] < 0.85 for run in part) for part in (others, older)] == [0, 1]
    yield f"None of {len(others)} other seeds ended in broken sentences, but one of {len(older)} by an older version."
    for row in read_lines(HERE / "demo" / "metrics.jsonl"):
        if "eval/score" in row:
            names = ["score", "reply/ended", "rewards/sentiment", "rewards/fluency", "kl"]
            means = (f"{n.split('/')[-1]} {row[f'eval/{n}']:z.2f} ± {row[f'eval/{n}_se']:.2f}" for n in names)
            yield f"Held-out, update {row['update']}: {', '.join(means)}"
    before, after, errors = {}, {}, []
    for pairs in ("1-20", "2-59"):
        paths = sorted((HERE / "smollm2").glob(f"sums-{pairs}-right-*"))
        held_out = [[row for row in read_lines(path / "metrics.jsonl") if "eval/score" in row] for path in paths]
        before[pairs], after[pairs] = (
            ", ".join(f"{100 * rows[i]['eval/score']:.0f}" for rows in held_out) for i in (0, -1)
        )
        errors += [100 * row["eval/score_se"] for rows in held_out for row in rows]
    yield (
        f"- SmolLM2-135M-Instruct (4-bit weights, three shots) learns sums of pairs from 1 to 20: of 120 held out "
        f"{before['1-20']}% are right before and {after['1-20']}% after {held_out[0][-1]['update'] * 128:,} replies, "
        f"of pairs from 2 to 59 {before['2-59']}% and {after['2-59']}% "
        f"(3 seeds, ± {max(errors):.0f} at most, over sums;"
    )
    count = len(runs("critic", "early-128", "critic"))
    scores = [fmean(run["mean"] for run in runs("critic", "early-128", change))
              for change in ("critic", "no critic", "group mean")]
    early, end = (
        [results.mean_and_error([fmean(run["path"]) for run in runs("critic", task, change)])
         for change in ("critic", "no critic", "group mean")]
        for task in ("early-128", "end-128")
    )
    yield (
        "- Replies of 128 tokens, J = score − β·KL over a run: where one early token is scored, {:.2f} ± {:.2f} with a "
        "critic, {:.2f} ± {:.2f} without, {:.2f} ± {:.2f} with a group's mean (score alone: {:.2f}, {:.2f}, {:.2f}); "
        .format(*itertools.chain(*early), *scores)
        + "where all are, but the sum is paid at the end, {:.2f}, {:.2f} and {:.2f}, ".format(*(x for x, _ in end))
        + f"± {max(error for _, error in end):.2f} ({count} seeds; each at the rate best for it at 64 tokens)."
    )
    to_goal = [
        fmean(results.replies_to_goal(run, results.GOALS[task]) for run in runs("critic", f"{task}-128", change))
        for change in ("critic", "group mean", "no critic") for task in ("every", "end")
    ]
    yield (
        "Each token paid at once: {:,.0f} replies to a goal, not {:,.0f}, with a critic; {:,.0f}, not {:,.0f}, with a "
        "group's mean; {:,.0f} or more, not {:,.0f}, without.".format(*to_goal)
    )
    found = results.read(results.largest(HERE / "study" / "details.csv"))
    tasks = ("demo", "sums", "ends")
    ends = [results.worth(found, task, "1 epoch")["J"] for task in tasks]
    errors = [results.mean_and_error(xs) for xs in ends]
    assert all(results.chance(mean / error, len(xs) - 1) > 0.05 for xs, (mean, error) in zip(ends, errors))
    yield (
        f"- One epoch, not four, at the same rate, gains {losses('1 epoch')} less training score over a run on "
        f"three small tasks ({min(map(len, ends))} to {max(map(len, ends))} seeds); "
        "held-out J at its end cannot be told apart."
    )
    short, full = (
        results.mean_and_error([fmean(run["path"]) for run in runs("critic", "early-64", change)])
        for change in ("critic, lam=0.95", "critic")
    )
    yield (
        f"- λ = 0.95, not 1, gains {losses('lam=0.95')} less: replies there have 48 tokens at most. Where one early "
        "token of 64 is scored, J over the run is {:.2f} ± {:.2f}, not {:.2f} ± {:.2f}.".format(*short, *full)
    )


# ----------------------------------------------------------------------------------------------------------- the audit


def main() -> int:
    wrong = []
    made = {table.__name__: table for table in (even, each, sums, kind, credit)}
    if sys.argv[1:] not in ([], ["--write"]):
        print(*(made[name]() if name in made else study(name) for name in sys.argv[1:]), sep="\n\n")
        return 0
    for page in (INDEX, STUDY):
        text = page.read_text()
        parts = re.split(r"(<!-- rows: \S+ -->\n).*?(\n<!-- end -->)", text, flags=re.S)
        for i in range(1, len(parts), 3):
            name = parts[i].split()[2]
            parts[i] += "\n" + (made[name]() if name in made else study(name)) + "\n"
        new = "".join(parts)
        if "--write" in sys.argv:
            page.write_text(new)
        elif new != text:
            wrong += difflib.unified_diff(text.splitlines(), new.splitlines(), str(page), "the rows", n=0, lineterm="")
    left = " ".join(README.read_text().split())
    for said in sentences():
        said = " ".join(said.split())
        if said not in left:
            wrong.append(f"{README}: the rows say\n    {said}")
        left = left.replace(said, "")
    claims = re.search(r"## Results(.*?)<details>", left).group(1)
    claims = re.sub(r"`[^`]*`|\([^()]*\.(md|csv|svg|py)[^()]*\)|commit \w+", "", claims)
    wrong += [f"{README}: no rows for the number {x}" for x in re.findall(r"\d[\d,.]*\d|\d", claims)]
    print("\n".join(wrong) or "all numbers are those of the rows")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
