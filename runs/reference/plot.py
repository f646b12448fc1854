"""Draw the learning curves of a run, or the mean and the range of several. It needs one package: pip install matplotlib

    python runs/reference/plot.py runs/NAME
    python runs/reference/plot.py runs/SEED-1 runs/SEED-2 runs/SEED-3 -o curves.svg
    python runs/reference/plot.py runs/reference/study/details.csv      # or penalty.csv, critic.csv: a study

One panel for the score, one for the KL to the reference, and one for each reward that is not the score itself. Of runs
of different length, only the updates that all of them have are drawn. The same runs give the same file.
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.append(str(Path(__file__).parent / "study"))
import results

GREY, BLUE = "#7a7a7a", "#2478e8"  # both can be read on a white page and on a dark one
PALETTE = (BLUE, "#d1495b", "#2a9d6f", "#b07d12", "#8a63d2")
COLUMNS = 3
LOWEST, HIGHEST = -80, 30  # percent, the ends of the axis of draw_details
STYLE = {
    "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib; a browser without it takes its own sans-serif
    "font.size": 10,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",  # letters stay letters: a small file
    "svg.hashsalt": "ppo",  # names inside the file that are not random
}


def read_run(run: Path) -> dict[int, dict]:
    """The metrics of each update, without the evaluations on held-out prompts."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file, expected the folder of a run")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise SystemExit(f"{path}: expected a JSON object on each line: {error}")
    return {row["update"]: row for row in rows if "objective/scores" in row}


def is_the_score(row: dict, name: str) -> bool:
    return math.isclose(row[name], row["objective/scores"], rel_tol=1e-6, abs_tol=1e-6)


def other_rewards(rows: list[dict]) -> list[str]:
    """The rewards that every row has, without those that equal the score in every row."""
    names = [name for name in rows[0] if name.startswith("rewards/")]
    names = [name for name in names if all(name in row for row in rows)]
    return [name for name in names if not all(is_the_score(row, name) for row in rows)]


def draw_panel(axes, updates: list[int], curves: list[list[float]], title: str, unit: str) -> None:
    """The mean of the curves and, if there are several, the range between the lowest and the highest."""
    at_each_update = list(zip(*curves))
    mean = [statistics.fmean(values) for values in at_each_update]
    axes.plot(updates, mean, color=BLUE, linewidth=2)
    if len(curves) > 1:
        lowest = [min(values) for values in at_each_update]
        highest = [max(values) for values in at_each_update]
        axes.fill_between(updates, lowest, highest, color=BLUE, alpha=0.25, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(title=title, xlabel="update", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid(True)


def draw(runs: list[dict[int, dict]]) -> Figure:
    """A figure as wide as a README on GitHub."""
    updates = sorted(set.intersection(*(set(run) for run in runs)))
    if len(updates) < 2:
        raise SystemExit(f"{len(updates)} updates that all runs have: expected 2 or more")
    panels = [("objective/scores", "score", "mean over replies")]
    panels.append(("objective/kl", "KL to the reference", "nats per reply"))
    for name in other_rewards([run[update] for run in runs for update in updates]):
        panels.append((name, name.removeprefix("rewards/"), "mean over replies"))

    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(8.6, 2.7 * rows), layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    grid = figure.subplots(rows, min(COLUMNS, len(panels)), squeeze=False).flat
    for axes, (name, title, unit) in zip(grid, panels):
        curves = [[run[update][name] for update in updates] for run in runs]
        draw_panel(axes, updates, curves, title, unit)
    for axes in grid[len(panels):]:
        axes.set_axis_off()
    if len(runs) > 1:
        figure.supxlabel(f"line: mean of {len(runs)} runs; band: from the lowest run to the highest", fontsize=10)
    return figure


def draw_details(path: Path) -> Figure:
    """A panel a task, a row a change: its score over the run less that of the defaults, and two standard errors."""
    found = results.read(results.largest(path))
    tasks = [task for task in results.PRICES if any(task == name for name, _, _ in found)]
    changes = dict.fromkeys(change for _, change, _ in found if change != "defaults")
    differences = {
        change: [results.mean_and_error(results.worth(found, task, change)["mean"]) for task in tasks]
        for change in changes
    }
    order = sorted(changes, key=lambda change: statistics.fmean(mean for mean, _ in differences[change]))
    figure = Figure(figsize=(8.6, 0.8 + 0.2 * len(order)), layout="constrained")
    for i, (axes, task) in enumerate(zip(figure.subplots(1, len(tasks), sharey=True), tasks)):
        means, errors = zip(*(differences[change][i] for change in order))
        inside = [LOWEST <= mean <= HIGHEST for mean in means]
        shown = [mean if is_in else math.nan for mean, is_in in zip(means, inside)]
        bars = [2 * error for error in errors]
        axes.errorbar(shown, order, xerr=bars, fmt="o", color=BLUE, markersize=4, linewidth=1)
        for y, (mean, is_in) in enumerate(zip(means, inside)):
            if not is_in:
                text, x, side = (f"← {mean:.0f}", LOWEST, "left") if mean < 0 else (f"{mean:.0f} →", HIGHEST, "right")
                axes.text(x, y, text, color=BLUE, fontsize=8, ha=side, va="center")
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set(title=task, xlim=(LOWEST - 5, HIGHEST + 5), ylim=(-0.7, len(order) - 0.3))
        axes.grid(True)
    label = "score over the run less that of the defaults, % of what they gain; bars: two standard errors"
    figure.supxlabel(label, fontsize=10)
    return figure


def draw_penalty(path: Path) -> Figure:
    """Score and fluency over KL: above for each β, below for each target KL without a penalty.

    Small dots: the updates of all seeds. Large ones: held-out replies at the end, mean and range of the seeds.
    """
    rows = results.largest(path)
    figure = Figure(figsize=(8.6, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="col")
    for line, (kind, symbol) in zip(panels, [("beta", "β"), ("target", "target")]):
        changes = {row["change"] for row in rows if row["change"].startswith(kind)}
        changes = sorted(changes, key=lambda change: float(change.split("=")[1]))
        for i, change in enumerate(changes):
            color = matplotlib.colormaps["viridis"](0.25 + 0.6 * i / (len(changes) - 1))
            of_change = [row for row in rows if row["change"] == change]
            updates = [row for row in of_change if row["part"] == "train"]
            ends = [row for row in of_change if row["part"] == "held-out" and row["update"] != "0"]
            kl = [float(row["kl"]) for row in ends]
            for axes, what in zip(line, ("score", "fluency")):
                dots = [float(row["kl"]) for row in updates], [float(row[what]) for row in updates]
                # Thousands of dots: as an image, of the figure's dpi, they keep the file small.
                axes.plot(*dots, ".", color=color, alpha=0.5, markersize=4.5, markeredgewidth=0, rasterized=True)
                end = [float(row[what]) for row in ends]
                x, y = statistics.fmean(kl), statistics.fmean(end)
                xerr, yerr = [[x - min(kl)], [max(kl) - x]], [[y - min(end)], [max(end) - y]]
                label = f"{symbol} = {change.split('=')[1]}"
                axes.errorbar(x, y, yerr, xerr, "o", color=color, markersize=7, linewidth=1.5, label=label)
                axes.set(ylabel=what, xscale="symlog")
                axes.grid(True)
        line[1].legend(fontsize=8, frameon=False, loc="lower left")
    panels[0, 0].set_title("score, mean over replies")
    panels[0, 1].set_title("fluency, share of replies")
    label = "KL to the reference, nats per reply; small: an update; large: the end, mean and range of the seeds"
    figure.supxlabel(label, fontsize=10)
    return figure


def draw_critic(path: Path) -> Figure:
    """What a critic is worth over the length of replies: a column a task, a line a kind of credit, over seeds."""
    found = results.read(results.largest(path))
    kinds = {"early": "one early token counts", "end": "all count, paid at the end", "every": "all count, paid at once"}
    panels = {
        "J": lambda run, task: run["J"],
        "score": lambda run, task: run["score"],
        "β·KL": lambda run, task: run["score"] - run["J"],
        "replies to the goal": lambda run, task: results.replies_to_goal(run, results.GOALS[task.split("-")[0]]),
    }
    changes = [*dict.fromkeys(change for _, change, _ in found)]
    figure = Figure(figsize=(8.6, 9.0), layout="constrained")
    for line, (name, value) in zip(figure.subplots(len(panels), 3, sharex=True, sharey="row"), panels.items()):
        for axes, (kind, title) in zip(line, kinds.items()):
            for i, change in enumerate(changes):
                points = []
                for length in results.LENGTHS:
                    task = f"{kind}-{length}"
                    runs = [value(run, task) for (t, c, _), run in found.items() if (t, c) == (task, change)]
                    if runs:  # moved aside a little, so that bars do not cover one another
                        points.append((length * 1.04 ** (i - len(changes) / 2), *results.mean_and_error(runs)))
                if points:
                    x, y, error = zip(*points)
                    axes.errorbar(x, y, error, fmt="o-", color=PALETTE[i], markersize=4, linewidth=1.5, label=change)
            axes.set(xscale="log", title=title if name == "J" else None)
            axes.set_xticks(results.LENGTHS, map(str, results.LENGTHS))
            axes.minorticks_off()
            axes.grid(True)
        line[0].set_ylabel(name)
        if name == "J":
            figure.legend(*line[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    label = "tokens of a reply; held-out replies after 1,920 trained on; bars: standard errors over seeds"
    figure.supxlabel(label, fontsize=10)
    return figure


STUDIES = {"critic": draw_critic, "details": draw_details, "penalty": draw_penalty}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, or the CSV of a study")
    told = "such as x.svg or x.png; default: curves.svg in the first RUN"
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help=told)
    args = parser.parse_args()
    study = STUDIES.get(args.runs[0].stem) if args.runs[0].suffix == ".csv" else None
    output = args.output or (args.runs[0].with_suffix(".svg") if study else args.runs[0] / "curves.svg")
    matplotlib.rcParams.update(STYLE)
    figure = study(args.runs[0]) if study else draw([read_run(run) for run in args.runs])
    if not output.parent.is_dir():
        raise SystemExit(f"{output}: expected a file in a folder that exists")
    fixed = {"metadata": {"Date": None}} if output.suffix == ".svg" else {}  # the same runs give the same file
    figure.savefig(output, dpi=200, transparent=True, bbox_inches="tight", **fixed)
    print(output)


if __name__ == "__main__":
    main()
