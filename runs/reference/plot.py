"""Draw the learning curves of a run, or the mean and the range of several. It needs one package: pip install matplotlib

    python runs/reference/plot.py runs/NAME
    python runs/reference/plot.py runs/SEED-1 runs/SEED-2 runs/SEED-3 -o curves.svg

One panel for the score, one for the KL to the reference, and one for each reward that is not the score itself. Of runs
of different length, only the updates that all of them have are drawn. The same runs give the same file.
"""
import argparse
import json
import math
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GREY, BLUE = "#7a7a7a", "#2478e8"  # both can be read on a white page and on a dark one
COLUMNS = 3
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
    """The metrics of each update. The first and the last line, evaluations on held-out prompts, are left out."""
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
    panels.append(("objective/kl", "KL to the reference", "nats a reply"))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder with a metrics.jsonl")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="default: curves.svg in the first RUN")
    args = parser.parse_args()
    output = args.output or args.runs[0] / "curves.svg"
    if not output.parent.is_dir():
        raise SystemExit(f"{output}: expected a file in a folder that exists")
    matplotlib.rcParams.update(STYLE)
    figure = draw([read_run(run) for run in args.runs])
    figure.savefig(output, format="svg", transparent=True, metadata={"Date": None})
    print(output)


if __name__ == "__main__":
    main()
