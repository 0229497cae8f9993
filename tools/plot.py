#!/usr/bin/env python3
"""Draws the losses of runs, from their logs or from a record.

    python tools/plot.py logs/RUN                                       # writes logs/RUN/loss.png
    python tools/plot.py logs/tweak --baseline logs/base --out compare.png
    python tools/plot.py records/tiny/2026-11-23_recipes --x seconds --out hero.png

The runs of one setting, such as the seeds of a variant, are drawn as the line of their mean in a band of their std. A
run that stopped before the others of its variant is a thin line of its own. Baselines are grey.

Runs with --metrics_every have a second picture, loss_metrics.png: the norms of gradients, weights and updates, and how
orthogonal the updates are.
"""

import argparse
import io
import json
import math
import re
import sys
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402
from PIL import Image  # noqa: E402
from runs import LogError, Run, changed, find_runs, group, printable, setting  # noqa: E402

AXES = ("steps", "tokens", "seconds")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")     # colour-blind safe: Okabe and Ito, 2008
GREY = "#808080"
LABELS = {"seconds": "seconds of training"}
READING = "line: training loss; dot: validation loss; band and bars: std"
DASHES = ("-", "--", ":", "-.")
MOST_NAMED = 12         # variants with a colour and a name; others are thin and grey
LONGEST_NAME = 60       # characters
SMOOTHED = 40           # a training loss is drawn as the mean over 1 / SMOOTHED of the run's steps
METRICS = {             # figure of Muon.get_post_step_metrics: (label of its panel, scale)
    "gradient": ("norm of the gradient", "log"),
    "weight": ("norm of the weight", "log"),
    "update": ("norm of the update", "log"),
    "orthogonality_error": ("orthogonality error", "linear"),
    "least_singular": ("least singular value", "linear"),
    "largest_singular": ("largest singular value", "linear"),
}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
         "legend.frameon": False, "legend.fontsize": 10, "text.parse_math": False}


@dataclass(frozen=True)
class Variant:
    """Runs of one setting, drawn as one line."""
    name: str
    whole: list[Run]        # those that went furthest, of which mean and std are taken
    stopped: list[Run]      # before the others
    look: dict              # keywords of matplotlib
    named: bool             # in the legend


# Curves: arrays with the rows of AXES and the loss, and a column for each logged step with a finite loss.

def curve(run: Run, kind: str) -> np.ndarray:
    """Returns the curve of a run's "val" or "train" losses, the latter smoothed."""
    columns = [(step, step * run.config["batch_tokens"], seconds, loss)
               for step, (seconds, loss) in sorted(run.losses[kind].items()) if math.isfinite(loss)]
    rows = np.array(columns, dtype=float).reshape(-1, 4).T
    if kind == "train":
        first = np.searchsorted(rows[0], rows[0] - max(1, run.num_steps // SMOOTHED), side="right")
        after = np.arange(len(first)) + 1
        sums = np.concatenate([[0], np.cumsum(rows[3])])
        rows[3] = (sums[after] - sums[first]) / (after - first)
    return rows


def mean_curve(runs: list[Run], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean, std) of the runs' curves, at the steps that all of them have."""
    curves = [curve(run, kind) for run in runs]
    steps = reduce(np.intersect1d, [rows[0] for rows in curves])
    curves = np.stack([rows[:, np.isin(rows[0], steps)] for rows in curves])
    return curves.mean(axis=0), curves.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(curves[0])


def last_steps(run: Run) -> tuple[float, float]:
    """Returns the last step with a loss of any kind, and that with a validation loss; 0 where there is none."""
    train, val = (max([0, *curve(run, kind)[0]]) for kind in ("train", "val"))
    return max(train, val), val


# Variants and their names.

def variants_of(runs: list[Run], baselines: list[Run]) -> list[Variant]:
    """Groups the runs into variants, the baselines last; raises LogError where none has a loss to draw."""
    kept = {run.path.resolve() for run in baselines}
    runs = [run for run in runs if run.path.resolve() not in kept]
    groups, grey = [group([run for run in part if last_steps(run)[0]]) for part in (runs, baselines)]
    if not groups and not grey:
        raise LogError("no run has a finite loss to draw; give the log of a run that trained")

    names = names_of(groups + grey)
    best = sorted(range(len(groups)), key=lambda i: lowest(groups[i]))[:MOST_NAMED]
    variants = []
    for i, members in enumerate(groups + grey):
        number = sum(variant.named for variant in variants)
        look = dict(color=COLORS[number % len(COLORS)], linestyle=DASHES[number // len(COLORS)])
        if i >= len(groups):
            names[i] = f"baseline {names[i]}"
            look = dict(color=GREY, linestyle=DASHES[1 + i % 3])
        elif i not in best:
            look = dict(color=GREY, linestyle="-", alpha=0.4)
        ends = [last_steps(run) for run in members]
        whole = [run for run, end in zip(members, ends, strict=True) if end == max(ends)]
        stopped = [run for run, end in zip(members, ends, strict=True) if end < max(ends)]
        variants.append(Variant(names[i], whole, stopped, look, named="alpha" not in look))
    return variants


def lowest(runs: list[Run]) -> float:
    """Returns the lowest validation loss of the runs, by which variants take the colours."""
    return min([math.inf, *(curve(run, "val")[3].min(initial=math.inf) for run in runs)])


def names_of(groups: list[list[Run]]) -> list[str]:
    names = []
    for runs in groups:
        run = runs[0]
        several = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        names.append(run.recipe or run.side or run.name + several)
        first = next(other[0] for other in groups if other[0].folder == run.folder)
        if run.side and not run.recipe and run is not first:
            names[-1] += ": " + changed([{**setting(other), "source": ""} for other in (first, run)])
    for i, name in enumerate(list(names)):
        if names.count(name) > 1:
            names[i] = f"{groups[i][0].folder.name}/{groups[i][0].name}"
    return [shorten(printable(name)) for name in names]


def shorten(name: str) -> str:
    name, half = " ".join(name.split()), LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def describe(variant: Variant, brief: bool) -> str:
    """Returns the text of the legend: the name, the last validation loss, when the target was reached, and how many
    runs there are; in brief, the name and the one that matters."""
    run, several, parts = variant.whole[0], len(variant.whole) > 1, []
    mean, std = mean_curve(variant.whole, "val")
    reached = np.flatnonzero(mean[3] <= run.config["target"])
    if mean.size and not (brief and reached.size):
        parts.append(f"{mean[3, -1]:.4f}" + f" ± {std[3, -1]:.4f}" * several)
    if reached.size:
        parts.append(f"target after {mean[2, reached[0]]:.0f} s")
    if several and not brief:
        parts.append(f"{len(variant.whole)} runs")
    if variant.stopped:
        parts.append(f"{len(variant.stopped)} more stopped")
    if not run.finished:
        parts.append(f"ends at step {last_steps(run)[0]:.0f} of {run.num_steps}")
    return f"{variant.name}: {', '.join(parts)}"


# Pictures.

def limits(variants: list[Variant]) -> tuple[float, float]:
    """Returns the limits of the loss axis. The first tenth of a run, which falls from afar, lies above."""
    curves = [curve(run, kind) for variant in variants for run in variant.whole for kind in ("train", "val")]
    curves = [rows for rows in curves if rows.size]
    tops = [rows[3, np.searchsorted(rows[0], rows[0, -1] / 10)] for rows in curves]
    bottom = min(rows[3].min() for rows in curves)
    # A run that diverged shall not flatten the others.
    top = min(max(tops), bottom + 3 * (np.median(tops) - bottom) + 0.1)
    target = max(run.config["target"] for variant in variants for run in variant.runs)
    if bottom - (top - bottom) / 4 < target < bottom:
        bottom = target
    margin = 0.05 * max(top - bottom, 0.01)
    return bottom - margin, top + margin


def draw_panel(axis, variants: list[Variant], x: str) -> None:
    row = AXES.index(x)
    for variant in reversed(variants):      # the first lies on top
        look, color = variant.look, variant.look["color"]
        for run in variant.stopped:
            rows = curve(run, "train")
            axis.plot(rows[row], rows[3], **{**look, "alpha": 0.6}, linewidth=0.7)
        mean, std = mean_curve(variant.whole, "train")
        axis.plot(mean[row], mean[3], **look, linewidth=1.8 if variant.named else 0.8)
        if variant.named:
            axis.fill_between(mean[row], mean[3] - std[3], mean[3] + std[3], color=color, alpha=0.15, linewidth=0)
        mean, std = mean_curve(variant.whole, "val")
        axis.errorbar(mean[row], mean[3], xerr=std[row], yerr=std[3], color=color, alpha=look.get("alpha"),
                      linestyle="none", elinewidth=1, marker="o", markersize=4.5 if variant.named else 3, zorder=3)
    axis.set_xlabel(LABELS.get(x, x))
    axis.set_xlim(left=0)
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_panels(axes: list, variants: list[Variant], xs: tuple[str, ...]) -> None:
    low, high = limits(variants)
    targets = {run.config["target"] for variant in variants for run in variant.whole}
    for axis, x in zip(axes, xs, strict=True):
        draw_panel(axis, variants, x)
        axis.set_ylim(low, high)
        for target in targets:
            axis.axhline(target, color="black", linestyle=(0, (5, 4)), linewidth=1)
            axis.annotate(f"target {target:g}", (0, target), (4, 3), axis.get_yaxis_transform(), annotation_clip=True,
                          textcoords="offset points", fontsize=9)
    axes[0].set_ylabel("loss (nats per token)")


def legend_of(variants: list[Variant], brief: bool) -> dict:
    """Returns handles and labels, as matplotlib's legend takes them."""
    shown = [variant for variant in variants if variant.named]
    handles = [Line2D([], [], **variant.look, linewidth=2, marker="o", markersize=4.5) for variant in shown]
    labels = [describe(variant, brief) for variant in shown]
    others = [variant for variant in variants if not variant.named]
    if others:
        handles.append(Line2D([], [], **others[0].look))
        labels.append(f"{len(others)} more variants, whose losses are higher")
    return dict(handles=handles, labels=labels)


@matplotlib.rc_context(STYLE)
def draw(runs: list[Run], out: Path, baselines: list[Run] = ()) -> None:
    """Writes the picture of the losses against steps, tokens and seconds."""
    variants = variants_of(runs, baselines)
    legend = legend_of(variants, brief=False)
    columns = 1 if max(map(len, legend["labels"])) > 60 or len(legend["labels"]) < 4 else 2
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6 + 0.22 * math.ceil(len(legend["labels"]) / columns)), sharey=True,
                                layout="constrained")
    draw_panels(axes, variants, AXES)
    figure.legend(**legend, loc="outside lower center", ncols=columns, title=READING)
    save(figure, out, dpi=100)


@matplotlib.rc_context(STYLE)
def draw_one(runs: list[Run], out: Path, baselines: list[Run], x: str) -> None:
    """Writes the picture of the losses against x, one of AXES."""
    variants = variants_of(runs, baselines)
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    draw_panels([axis], variants, (x,))
    axis.legend(**legend_of(variants, brief=True), loc="upper right", title=READING)
    save(figure, out, dpi=150)


def save(figure, out: Path, dpi: int) -> None:
    """Writes the figure as a PNG of few colours, which is a third of the size."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    plt.close(figure)
    Image.open(data).convert("RGB").quantize(128).save(out, format="PNG", optimize=True)


# What the runs logged of their optimizers.

def read_metrics(run: Run) -> dict[int, dict]:
    """Returns {step: {figure: {kind: mean over its parameters}}} of the log's lines of metrics; {} where it has none.

    A kind has the parameters that differ in their layer alone. Of a step that a resumed run did again, the later line
    counts. A damaged line is left out, which is said.
    """
    found = {}
    text = run.path.read_text(encoding="utf-8") if run.path.is_file() else ""
    for line in re.findall(r'^metrics: (\{"step".*)', text, re.MULTILINE):
        try:
            entry, table = json.loads(line), {figure: {} for figure in METRICS}
            for name, figures in entry["parameters"].items():
                kind = re.sub(r"\.\d+\.", ".*.", name)
                for figure in table.keys() & figures.keys():
                    table[figure].setdefault(kind, []).append(float(figures[figure]))
            found[int(entry["step"])] = {figure: {kind: np.mean(values) for kind, values in kinds.items()}
                                         for figure, kinds in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            print(f"plot.py: left out: {printable(str(run.path))} has a damaged line of metrics", file=sys.stderr)
    return found


@matplotlib.rc_context(STYLE)
def draw_metrics(runs: list[Run], out: Path) -> Path | None:
    """Writes the picture of the runs' metrics beside the picture `out`; returns its path, None where there are none."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, logs, records, or folders of these")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="RUN", help="runs to draw in grey")
    parser.add_argument("--x", choices=AXES, help="draw one panel, against this (default: three)")
    parser.add_argument("--out", type=Path, help="PNG to write (default: loss.png in the first folder, or beside the "
                        "first log)")
    args = parser.parse_args()
    first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    out = args.out or first / "loss.png"
    if out.suffix.lower() != ".png":
        parser.error(f"--out {printable(str(out))}: must end in .png")
    try:
        runs, bad = find_runs(args.runs)
        baselines, bad_baselines = find_runs(args.baseline) if args.baseline else ([], [])
        for text in bad + bad_baselines:
            print(f"plot.py: left out: {text}", file=sys.stderr)
        if args.x:
            draw_one(runs, out, baselines, args.x)
        else:
            draw(runs, out, baselines)
        metrics = draw_metrics(runs, out)
    except LogError as error:
        sys.exit(f"plot.py: {error}")
    except OSError as error:
        sys.exit(f"plot.py: {printable(str(error.filename))} cannot be written ({error.strerror}); name another file")
    for path in filter(None, (out, metrics)):
        print(f"plot: {printable(str(path))}")


if __name__ == "__main__":
    main()
