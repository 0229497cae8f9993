#!/usr/bin/env python3
"""Draws the losses of runs, from their logs or from a record.

    python tools/plot.py logs/RUN                                       # writes logs/RUN/loss.png
    python tools/plot.py logs/tweak --baseline logs/base --out compare.png
    python tools/plot.py records/tiny/2026-11-23_recipes --x seconds --out hero.png

The runs of one setting, such as the seeds of a variant, are drawn as the line of their mean in a band of their std. A
run that stopped before the others of its variant is a thin line of its own. Baselines are grey.

Runs with --metrics_every have a second picture, loss_metrics.png, of what the optimizer does.
"""

import argparse
import io
import json
import math
import re
import sys
from dataclasses import dataclass
from functools import reduce
from itertools import cycle, product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from PIL import Image
from runs import LogError, Run, changed, find_runs, group, printable, setting

AXES = dict(steps="steps", tokens="tokens", seconds="seconds of training")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")     # colour-blind safe: Okabe and Ito, 2008
DASHES = ("-", "--", ":", "-.")
GREY = "#808080"
MOST_NAMED = 12         # variants with a colour and a name; the others are thin and grey
LONGEST_NAME = 60       # characters
SMOOTHED = 20           # a training loss is drawn as the mean over the last 1 / SMOOTHED of the run's steps
METRICS = dict(gradient="log", weight="log", update="log", orthogonality_error="linear", least_singular="linear",
               largest_singular="linear")   # of Muon.get_post_step_metrics, with the scales of their panels
matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
                            "legend.edgecolor": "none", "text.parse_math": False})


@dataclass(frozen=True)
class Variant:
    """Runs of one setting, drawn as one line."""
    name: str               # "": not in the legend
    whole: list[Run]        # those that went furthest, of which mean and std are taken
    stopped: list[Run]      # before the others
    look: dict              # keywords of matplotlib


# Curves: arrays with rows for steps, tokens, seconds and loss, and a column for each logged step with a finite loss.

def curve(run: Run, kind: str) -> np.ndarray:
    """Returns the curve of the run's "val" or "train" losses, the latter smoothed."""
    columns = [(step, step * run.config["batch_tokens"], seconds, loss)
               for step, (seconds, loss) in sorted(run.losses[kind].items()) if math.isfinite(loss)]
    rows = np.array(columns, dtype=float).reshape(-1, 4).T
    if kind == "train":
        first = np.searchsorted(rows[0], rows[0] - max(1, run.num_steps // SMOOTHED), side="right")
        end = np.arange(len(first)) + 1
        sums = np.concatenate([[0], np.cumsum(rows[3])])
        rows[3] = (sums[end] - sums[first]) / (end - first)
    return rows


def mean_curve(runs: list[Run], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean, std) of the runs' curves, at the steps that all of them have."""
    curves = [curve(run, kind) for run in runs]
    steps = reduce(np.intersect1d, [rows[0] for rows in curves])
    curves = np.stack([rows[:, np.isin(rows[0], steps)] for rows in curves])
    return curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(runs) - 1))


def last_steps(run: Run) -> tuple[float, float]:
    """Returns the last step with a loss, and the last with a validation loss; 0 where there is none."""
    train, val = (max(curve(run, kind)[0], default=0) for kind in ("train", "val"))
    return max(train, val), val


# Variants and their names.

def variants_of(runs: list[Run], baselines: list[Run]) -> list[Variant]:
    """Groups the runs by setting, the baselines last; raises LogError where no run has a loss to draw."""
    apart = {run.path.resolve() for run in baselines}
    runs = [run for run in runs if run.path.resolve() not in apart]
    groups, grey = [group([run for run in part if last_steps(run)[0]]) for part in (runs, baselines)]
    if not groups + grey:
        raise LogError("no run has a finite loss to draw; give the log of a run that trained")

    best, variants = sorted(groups, key=lowest)[:MOST_NAMED], []
    looks = [dict(color=color, linestyle=dash) for dash, color in product(DASHES, COLORS)]
    for members, name in zip(groups + grey, names_of(groups + grey), strict=True):
        if members in grey:
            name, look = f"baseline {name}", dict(color=GREY, linestyle=DASHES[1 + grey.index(members) % 3])
        elif members in best:
            look = looks.pop(0)
        else:
            name, look = "", dict(color=GREY, alpha=0.4)
        ends = {run.path: last_steps(run) for run in members}
        whole = [run for run in members if ends[run.path] == max(ends.values())]
        variants.append(Variant(name, whole, [run for run in members if run not in whole], look))
    return variants


def lowest(runs: list[Run]) -> float:
    return min(curve(run, "val")[3].min(initial=math.inf) for run in runs)


def names_of(groups: list[list[Run]]) -> list[str]:
    names = []
    for run, *others in groups:
        first = next(other[0] for other in groups if other[0].folder == run.folder)
        differs = changed([{**setting(other), "source": ""} for other in (first, run)]).replace('"', "")
        variant = run.side and run.side + f": {differs}" * bool(differs)
        names.append(run.recipe or variant or run.name + f" and {len(others)} more" * bool(others))
    for i, name in enumerate(list(names)):
        if names.count(name) > 1:
            names[i] = f"{groups[i][0].folder.name}/{groups[i][0].name}"
    return [shorten(printable(name)) for name in names]


def shorten(name: str) -> str:
    name, half = " ".join(name.split()), LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[-half:]}"


def describe(variant: Variant, brief: bool) -> str:
    """Returns the text of the legend: the name, the last validation loss, when the target was reached, and how many
    runs there are; in brief, only the name and when the target was reached, where it was."""
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
    return f" {variant.name}: {', '.join(parts)}"      # the space, since matplotlib leaves out labels that begin with _


# The picture of the losses.

def limits(variants: list[Variant]) -> tuple[float, float]:
    """Returns the limits of the loss axis. The first tenth of a run, which falls from afar, lies above."""
    curves = [curve(run, kind) for variant in variants for run in variant.whole for kind in ("train", "val")]
    curves = [rows for rows in curves if rows.size]
    tops = [rows[3, np.searchsorted(rows[0], rows[0, -1] / 10)] for rows in curves]
    low = min(rows[3].min() for rows in curves)
    high = min(max(tops), low + 3 * (np.median(tops) - low) + 0.1)      # one that diverged does not flatten the others
    target = min(variant.whole[0].config["target"] for variant in variants)
    if target > low - (high - low) / 4:
        low = min(low, target)
    margin = 0.05 * max(high - low, 0.01)
    return low - margin, high + margin


def draw_panel(axis, variants: list[Variant], x: str) -> None:
    row, crowded = list(AXES).index(x), len(variants) > len(COLORS)
    for variant in reversed(variants):      # the first lies on top
        look, color = variant.look, variant.look["color"]
        for run in variant.stopped:
            rows = curve(run, "train")
            axis.plot(rows[row], rows[3], **{**look, "alpha": 0.6}, linewidth=0.7)
        mean, std = mean_curve(variant.whole, "train")
        axis.plot(mean[row], mean[3], **look, linewidth=1.2 if crowded else 1.8)
        if not crowded:
            axis.fill_between(mean[row], mean[3] - std[3], mean[3] + std[3], color=color, alpha=0.15, linewidth=0)
        mean, std = mean_curve(variant.whole, "val")
        axis.errorbar(mean[row], mean[3], xerr=std[row], yerr=std[3], color=color, alpha=look.get("alpha"),
                      linestyle="none", elinewidth=1, marker="o", markersize=3 if crowded else 4.5, zorder=3)
    axis.set_xlabel(AXES[x])
    axis.set_xlim(left=0)
    axis.locator_params(axis="x", nbins=6)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def picture(variants: list[Variant], out: Path, panels: tuple[str, ...], width: float, dpi: int) -> None:
    shown = [variant for variant in variants if variant.name]
    handles = [Line2D([], [], **variant.look, linewidth=2, marker="o", markersize=4.5) for variant in shown]
    labels = [describe(variant, brief=len(panels) == 1) for variant in shown]
    if len(shown) < len(variants):
        handles.append(Line2D([], [], color=GREY, alpha=0.4))
        labels.append(f"{len(variants) - len(shown)} more variants, whose losses are higher")
    longest = max(map(len, labels))
    inside = len(panels) == 1 and len(labels) <= 6 and longest <= 60
    columns = 2 if len(labels) > 3 and longest <= 60 else 1

    figure = Figure((width, 4.2 if inside else 3.6 + 0.22 * len(labels) / columns), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, x in zip(axes, panels, strict=True):
        draw_panel(axis, variants, x)
    low, high = limits(variants)
    axes[0].set(ylim=(low, high), ylabel="loss (nats per token)")
    for target in {variant.whole[0].config["target"] for variant in variants}:
        if low < target < high:
            for axis in axes:
                axis.axhline(target, color="black", linestyle=(0, (5, 4)), linewidth=1)
            axes[-1].annotate(f"target\n{target:g}", (1.01, target), xycoords=axes[-1].get_yaxis_transform(), va="center")
    owner, place = (axes[0], "upper right") if inside else (figure, "outside lower center")
    owner.legend(handles, labels, loc=place, ncols=1 if inside else columns, framealpha=0.8,
                 title="line: training loss; dot: validation loss; band and bars: std")
    save(figure, out, dpi)


def save(figure: Figure, out: Path, dpi: int) -> None:
    """Writes the figure as a PNG of 128 colours, which takes half the space."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    Image.open(data).convert("RGB").quantize(128).save(out, format="PNG", optimize=True)


def draw(runs: list[Run], out: Path, baselines: list[Run] = ()) -> None:
    """Writes the picture of the losses against steps, tokens and seconds."""
    picture(variants_of(runs, baselines), out, tuple(AXES), width=10, dpi=100)


def draw_one(runs: list[Run], out: Path, baselines: list[Run], x: str) -> None:
    """Writes the picture of the losses against one of AXES."""
    picture(variants_of(runs, baselines), out, (x,), width=8, dpi=150)


# The picture of what the optimizer does.

def read_metrics(run: Run) -> dict[int, dict]:
    """Returns {step: {(kind of parameter, figure): mean over its layers}} of the log's lines of metrics; {} where it
    has none. A damaged line is left out, which is said."""
    found = {}
    text = run.path.read_text(encoding="utf-8") if run.path.is_file() else ""
    for line in re.findall(r'^metrics: (\{"step".*)', text, re.MULTILINE):
        values = {}
        try:
            entry = json.loads(line)
            for name, figures in entry["parameters"].items():
                for figure in METRICS.keys() & figures.keys():
                    kind = printable(re.sub(r"\.\d+\.", ".*.", name))
                    values.setdefault((kind, figure), []).append(float(figures[figure]))
            found[int(entry["step"])] = {key: np.mean(layers) for key, layers in values.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            print(f"plot.py: left out: a damaged line of metrics in {printable(str(run.path))}", file=sys.stderr)
    return found


def draw_metrics(runs: list[Run], out: Path) -> Path | None:
    """Writes <stem>_metrics.png beside the picture `out`, of the first runs that have metrics, one for each of DASHES;
    returns its path, None where no run has metrics."""
    measured = [(run, metrics) for run in runs if (metrics := read_metrics(run))][:len(DASHES)]
    if not measured:
        return None
    kinds = sorted({kind for _, metrics in measured for values in metrics.values() for kind, _ in values})
    colors = dict(zip(kinds, cycle(COLORS), strict=False))
    figure = Figure((10, 6), layout="constrained")
    for axis, (name, scale) in zip(figure.subplots(2, 3, sharex=True).flat, METRICS.items(), strict=True):
        for (_, metrics), dash in zip(measured, DASHES, strict=False):
            for kind in kinds:
                points = [(step, values.get((kind, name), math.nan)) for step, values in sorted(metrics.items())]
                axis.plot(*zip(*points, strict=True), color=colors[kind], linestyle=dash, linewidth=1.2)
        axis.set(title=name.replace("_", " "), yscale=scale)
    handles = [Line2D([], [], color=color) for color in colors.values()]
    labels = [shorten(f" {kind}") for kind in kinds]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    path = out.with_name(f"{out.stem}_metrics.png")
    save(figure, path, dpi=100)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, log, record, or folder of these")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="RUN", help="runs to draw in grey")
    parser.add_argument("--x", choices=AXES, help="one panel, against this (default: three panels)")
    parser.add_argument("--out", type=Path, help="PNG to write (default: loss.png in the first folder)")
    args = parser.parse_args()
    first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    out = args.out or first / "loss.png"
    try:
        (runs, bad), (baselines, bad_too) = find_runs(args.runs), find_runs(args.baseline) if args.baseline else ([], [])
        for text in bad + bad_too:
            print(f"plot.py: left out: {text}", file=sys.stderr)
        if args.x:
            draw_one(runs, out, baselines, args.x)
        else:
            draw(runs, out, baselines)
        metrics = draw_metrics(runs + baselines, out)
    except LogError as error:
        sys.exit(f"plot.py: {error}")
    except OSError as error:
        sys.exit(f"plot.py: {printable(str(out))} cannot be written ({error.strerror}); give another --out")
    for path in filter(None, (out, metrics)):
        print(f"plot: {printable(str(path))}")


if __name__ == "__main__":
    main()
