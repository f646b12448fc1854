"""What the CSVs of this folder say, as tables. It needs nothing but Python: ../audit.py prints them, ../plot.py draws.

A CSV may hold runs by several versions of ppo_llm.py: each is a table of its own, and its runs are only compared with
one another.
"""
import csv
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

FOLDER = Path(__file__).parent
LENGTHS = (16, 64, 128, 256)
# The price of a nat of KL on each task, kl_coef. What is trained on is J = score - price·KL, and what is compared, also
# where a change trains on another price.
PRICES = {"demo": 0.3, "sums": 0.05, "ends": 0.02}
PRICES |= {f"{kind}-{n}": 0.02 if kind == "early" else 0.3 / n for kind in ("early", "end", "every") for n in LENGTHS}
GOALS = {"early": 0.6, "end": 0.5, "every": 0.5}  # J of a trained policy
# What names a run stands in its first row only. The commit is that of ppo_llm.py.
RUN = "task change seed commit".split()
COLUMNS = [*RUN, *"part update score kl fluency explained_variance".split()]


def read_rows(path: Path) -> dict[str, list[dict]]:
    """{commit: the rows of its runs}, every row with the name of its run."""
    rows, run = defaultdict(list), {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["commit"]:
                run = {name: row[name] for name in RUN}
            rows[run["commit"]].append(row | run)
    return rows


def largest(path: Path) -> list[dict]:
    """The rows by the commit that has most of them, the last of equals: what figures show."""
    return max(reversed(read_rows(path).values()), key=len)


def read(rows: list[dict]) -> dict[tuple, dict]:
    """{(task, change, seed): what the table compares}."""
    runs = defaultdict(list)
    for row in rows:
        runs[row["task"], row["change"], int(row["seed"])].append(row)
    results = {}
    for key, rows in runs.items():
        trained = [row for row in rows if row["part"] == "train"]
        before, after = (row for row in rows if row["part"] == "held-out")
        price = PRICES[key[0]]
        results[key] = {
            "before": float(before["score"]),
            "score": float(after["score"]),
            "kl": float(after["kl"]),
            "J": float(after["score"]) - price * float(after["kl"]),
            "fluency": float(after["fluency"] or math.nan),
            "mean": fmean(float(row["score"]) for row in trained),
            "path": [float(row["score"]) - price * float(row["kl"]) for row in trained],
            "explained": [float(row["explained_variance"] or 0) for row in trained],
        }
    return results


def mean_and_error(xs: list[float]) -> tuple[float, float]:
    xs = [x for x in xs if not math.isnan(x)]
    if not xs:
        return math.nan, math.nan
    return fmean(xs), stdev(xs) / math.sqrt(len(xs)) if len(xs) > 1 else math.nan


def said(xs: list[float], digits: int) -> str:
    """The mean of several seeds with its standard error."""
    mean, error = mean_and_error(xs)
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def chance(t: float, df: int) -> float:
    """Two-sided p of Student's t: 1 less the integral of its density from -t to t, by Simpson's rule."""
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    n = 2000
    heights = [(1 + (abs(t) * i / n) ** 2 / df) ** (-(df + 1) / 2) for i in range(n + 1)]
    weights = [1, *[4, 2] * (n // 2 - 1), 4, 1]
    return max(0.0, 1 - 2 * scale * abs(t) / n / 3 * sum(map(math.prod, zip(weights, heights))))


def holm(ps: dict, level: float = 0.05) -> set:
    """The keys whose null hypothesis is rejected such that a false one is among them with at most this probability."""
    rejected = set()
    for i, (key, p) in enumerate(sorted(ps.items(), key=lambda pair: pair[1])):
        if p > level / (len(ps) - i):
            break
        rejected.add(key)
    return rejected


def worth(results: dict, task: str, change: str) -> dict[str, list[float]]:
    """Differences from the defaults, one a seed. Mean, score and J at the end: in percent of what the defaults gain
    over the run, or by the end. KL: in nats per reply."""
    seeds = [s for t, c, s in results if (t, c) == (task, change) and (t, "defaults", s) in results]
    pairs = [(results[task, change, seed], results[task, "defaults", seed]) for seed in seeds]
    defaults = [run for (t, c, _), run in results.items() if (t, c) == (task, "defaults")]
    gains = {what: fmean(run[what] - run["before"] for run in defaults) / 100 for what in ("mean", "score", "J")}
    gains["kl"] = 1.0
    return {what: [(run[what] - default[what]) / gain for run, default in pairs] for what, gain in gains.items()}


def ends(results: dict) -> None:
    """Markdown: where the demos of each change began and ended, means over seeds, and how many ended well."""
    print("| change | runs | score before | after | KL | fluency | score 2.5 or more, fluency 0.85 or more |")
    print("|---" * 7 + "|")
    for change in dict.fromkeys(change for _, change, _ in results):
        runs = [run for (_, c, _), run in results.items() if c == change]
        cells = [change, str(len(runs))]
        for what in ("before", "score"):
            cells.append("{:.2f} ± {:.2f}".format(*mean_and_error([run[what] for run in runs])))
        cells += [f"{fmean(run[what] for run in runs):.2f}" for what in ("kl", "fluency")]
        cells.append(f"{sum(run['score'] >= 2.5 and run['fluency'] >= 0.85 for run in runs)} of {len(runs)}")
        print(f"| {' | '.join(cells)} |")


def compare(results: dict) -> None:
    """Markdown, sorted by the mean over tasks of the difference over the run; with nothing to compare, the ends."""
    changes = dict.fromkeys(change for _, change, _ in results)
    if "defaults" not in changes or len({(task, change) for task, change, _ in results}) == 1:
        return ends(results)
    names = [task for task in PRICES if any(task == name for name, _, _ in results)]
    found = {(task, change): worth(results, task, change) for task in names for change in changes}
    ps = {}
    for (task, change), differences in found.items():
        for what, xs in differences.items():
            mean, error = mean_and_error(xs)
            if what != "kl" and error > 0:
                ps[task, change, what] = chance(mean / error, len(xs) - 1)
    certain = holm(ps)
    lines = []
    for change in changes:
        average = fmean(fmean(found[task, change]["mean"] or [math.nan]) for task in names)
        cells = [change]
        for task in names:
            for what, digits in (("mean", 0), ("score", 0), ("kl", 1), ("J", 0)):
                value, error = mean_and_error(found[task, change][what])
                mark = "*" * ((task, change, what) in certain)
                cells.append("" if math.isnan(value) else f"{value:+.{digits}f} ± {error:.{digits}f}{mark}")
        demos = [run for (task, c, _), run in results.items() if (task, c) == ("demo", change)]
        fluent = sum(run["fluency"] >= 0.85 for run in demos)
        cells += [f"{fluent} of {len(demos)}", f"{average:+.0f}"]
        lines.append((average, f"| {' | '.join(cells)} |"))
    if len(changes) > 1:
        columns = [f"{task}: {what}" for task in names for what in ("run", "end", "its KL", "J")]
        columns = ["change", *columns, "demos that end fluent", "mean"]
        print(f"| {' | '.join(columns)} |")
        print("|---" * len(columns) + "|")
        for _, line in sorted(lines, key=lambda pair: -pair[0]):
            print(line)
        gains = sum(fmean(found[task, change][what]) > 0 for task, change, what in certain)
        print("\n\\* More than chance (Holm, 5% for all): ", end="")
        print(f"{len(certain)} of {len(ps)} differences, {gains} of them gains.")
    for task in names:
        runs = [run for (t, c, _), run in results.items() if (t, c) == (task, "defaults")]
        means = {what: mean_and_error([run[what] for run in runs]) for what in ("before", "score", "kl", "J", "mean")}
        words = ["{} {:.2f} ± {:.2f}".format(what, *both) for what, both in means.items()]
        print(f"\n{task}, defaults, {len(runs)} seeds: {', '.join(words)}")


def reached(run: dict, goal: float) -> list[int]:
    """The updates after which the mean J of three was above the goal."""
    path = run["path"]
    return [n for n in range(3, len(path) + 1) if fmean(path[n - 3 : n]) > goal]


def replies_to_goal(run: dict, goal: float, batch: int = 64) -> int:
    """Replies until the goal; all replies of a run that never gets there."""
    return batch * min(reached(run, goal), default=len(run["path"]))


def levels(results: dict) -> None:
    """Markdown: each task and change, held-out replies at the end, and how many replies a goal took, if any."""
    has_goal = any(task.split("-")[0] in GOALS for task, _, _ in results)
    columns = ["task", "change", "runs", "score", "KL", "J", "J over the run"]
    columns += ["replies to the goal", "never", "explained variance"] if has_goal else ["fluency 0.85 or more"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for task in PRICES:
        for change in dict.fromkeys(c for t, c, _ in results if t == task):
            runs = [run for (t, c, _), run in results.items() if (t, c) == (task, change)]
            cells = [task, change, str(len(runs))]
            for what, digits in (("score", 2), ("kl", 1), ("J", 2)):
                cells.append(said([run[what] for run in runs], digits))
            cells.append(said([fmean(run["path"]) for run in runs], 2))
            if has_goal:
                goal = GOALS[task.split("-")[0]]
                cells.append(said([replies_to_goal(run, goal) for run in runs], 0))
                cells.append(str(sum(not reached(run, goal) for run in runs)))
                cells.append(f"{fmean(fmean(run['explained'][4:]) for run in runs):.2f}")
            else:
                cells.append(f"{sum(run['fluency'] >= 0.85 for run in runs)}" if task == "demo" else "")
            print(f"| {' | '.join(cells)} |")


def mistakes(rows: list[dict]) -> None:
    """Markdown: score, KL and fluency of each exhibit at the end, mean of five updates, less those of its control:
    mean and standard error over seeds. Then those of the right code itself."""
    updates = defaultdict(lambda: defaultdict(list))  # of a task and a trial: {seed: rows}
    for row in rows:
        of_run = updates[row["task"], row["change"]][row["seed"]]
        if row["part"] == "train":
            of_run.append(row)

    def at_end(rows: list[dict], what: str) -> float:
        return fmean(float(row[what]) for row in rows[-5:]) if rows else math.nan

    with open(FOLDER / "bias.csv", newline="") as file:
        biases = list(csv.DictReader(file))
    print("| mistake | demo: score | KL | fluency | sums: score | KL | angle | length | moved: angle | length |")
    print("|---" * 10 + "|")
    for bias in biases:
        cells = [bias["exhibit"]]
        for task, what in [("demo", "score"), ("demo", "kl"), ("demo", "fluency"), ("sums", "score"), ("sums", "kl")]:
            wrong, right = updates[task, bias["exhibit"]], updates[task, bias["control"]]
            differences = [at_end(wrong[seed], what) - at_end(right[seed], what) for seed in wrong if seed in right]
            cells.append("{:+.2f} ± {:.2f}".format(*mean_and_error(differences)) if differences else "")
        cells += [bias[name] for name in ("angle", "length", "angle_moved", "length_moved")]
        print(f"| {' | '.join(cells)} |")
    print()
    for (task, name), runs in updates.items():
        if name in ("right code", "right code (micro_batch_size=8)", "right code (dtype=bfloat16)"):
            whats = ("score", "kl", "fluency") if task == "demo" else ("score", "kl")
            means = (f"{what} {fmean(at_end(rows, what) for rows in runs.values()):.2f}" for what in whats)
            print(f"- {task}, {name}, {len(runs)} seeds: {', '.join(means)}")


def show(name: str) -> None:
    """The table of a CSV, for each commit whose rows it holds; of `trl` ours and TRL's, which are by several."""
    by_commit = read_rows(FOLDER / f"{name}.csv")
    if name == "trl":
        found = read([row for rows in by_commit.values() for row in rows])
        found = {key: found[key] for key in sorted(found, key=lambda key: key[1])}
        print(f"By ppo_llm.py of commits {', '.join(by_commit)}:\n")
        levels({key: run for key, run in found.items() if key[2] >= 55})
        print("\nThe seeds on which TRL's rate was chosen:\n")
        levels({key: run for key, run in found.items() if key[2] < 55})
        return
    for i, (commit, rows) in enumerate(by_commit.items()):
        print("\n" * (i > 0) + f"By ppo_llm.py of commit {commit}:\n")
        if name == "bugs":
            mistakes(rows)
        elif name.startswith("critic"):
            levels(read(rows))
        else:
            compare(read(rows))
