#!/usr/bin/env python3
"""Draws the losses of runs, from their logs or from a record.

    python tools/plot.py logs/RUN                                       # writes logs/RUN/loss.png
    python tools/plot.py logs/tweak --baseline logs/base --out compare.png
    python tools/plot.py records/tiny/2026-11-23_recipes --x seconds --out hero.png
    python tools/plot.py records/tiny/2026-11-23_recipes --times --out times.png     # bars, the slowest first

The runs of one setting, such as the seeds of a variant, are the line of their mean, in a band of their std. One that
stopped before the others is a thin line.
"""

import argparse
import difflib
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image
from runs import LogError, Run, changed, find_runs, group, printable, setting, tokens_until

AXES = dict(steps="steps", tokens="tokens", seconds="seconds of training")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")     # colour-blind safe: Okabe and Ito, 2008
DASHES, GREY = ("-", "--", ":"), "#808080"
LOOKS = [dict(color=color, linestyle=dash) for dash in DASHES for color in COLORS]
MOST_NAMED = 12         # variants with a colour and a name; the others are grey
LONGEST_NAME = 60       # characters
SMOOTHED = 20           # a training loss is drawn as the mean over the last 1 / SMOOTHED of the run's steps
matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})


@dataclass(frozen=True)
class Variant:
    """Runs of one setting, drawn as one line."""
    name: str               # "": grey, as it is one too many
    whole: list[Run]        # those that went furthest, of which mean and std are taken
    stopped: list[Run]      # before the others
    look: dict              # keywords of matplotlib


def curve(run: Run, kind: str) -> np.ndarray:
    """Returns rows of steps, tokens, seconds and losses, without nan and inf; "train" losses are smoothed."""
    columns = [(step, tokens_until(run.config, step), *point) for step, point in sorted(run.losses[kind].items())]
    rows = np.array(columns, dtype=float).reshape(-1, 4).T
    rows = rows[:, np.isfinite(rows[3])]
    if kind == "train":
        first = np.searchsorted(rows[0], rows[0] - max(1, run.num_steps // SMOOTHED), side="right")
        end = np.arange(len(first)) + 1
        sums = np.concatenate([[0], np.cumsum(rows[3])])
        rows[3] = (sums[end] - sums[first]) / (end - first)
    return rows


def mean_curve(runs: list[Run], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean, std) of the runs' curves, at the steps that all of them have."""
    curves = [curve(run, kind) for run in runs]
    steps = set.intersection(*(set(rows[0]) for rows in curves))
    curves = np.stack([rows[:, np.isin(rows[0], list(steps))] for rows in curves])
    return curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(runs) - 1))


def last_steps(run: Run) -> tuple[float, float]:
    """Returns the last step with a loss, and the last with a validation loss; 0 where there is none."""
    train, val = (max(curve(run, kind)[0], default=0) for kind in ("train", "val"))
    return max(train, val), val


def variants_of(runs: list[Run], baselines: list[Run]) -> list[Variant]:
    """Groups the runs by setting, the baselines last; raises LogError where no run has a loss to draw."""
    groups = group([run for run in runs if run.path not in [other.path for other in baselines]])
    finals = [min(curve(run, "val")[3].min(initial=np.inf) for run in members) for members in groups]
    best = sorted(range(len(groups)), key=finals.__getitem__)[:MOST_NAMED]
    groups, variants, looks = groups + group(baselines), [], iter(LOOKS)
    for i, (members, name) in enumerate(zip(groups, names_of(groups), strict=True)):
        if i >= len(finals):
            name, look = f"baseline {name}", dict(color=GREY, linestyle=DASHES[1 - (i - len(finals)) % 3])
        elif i in best:
            look = next(looks)
        else:
            name, look = "", dict(color=GREY, alpha=0.4, zorder=1)
        ends = [last_steps(run) for run in members]
        whole = [run for run, end in zip(members, ends, strict=True) if end == max(ends)]
        if max(ends) > (0, 0):
            variants.append(Variant(name, whole, [run for run in members if run not in whole], look))
    if not variants:
        raise LogError("no run has a finite loss to draw; give the log of a run that trained")
    return variants


def names_of(groups: list[list[Run]]) -> list[str]:
    names, first = [], groups[0][0]
    for run, *others in groups:
        differs = changed([{**setting(other), "source": ""} for other in (first, run)]).replace('"', "")
        differs = differs or source_change(first, run)
        letter = run.side and run.side + f": {differs}" * bool(differs)
        names.append(run.recipe or letter or run.name + f" and {len(others)} more" * bool(others))
    return [shown(name if names.count(name) == 1 else f"{runs[0].folder.name}/{runs[0].name}")
            for name, runs in zip(names, groups, strict=True)]


def source_change(first: Run, run: Run) -> str:
    """Returns the first line that this run's source has and the other's lacks, or else one it lacks, and how many."""
    if first.source is None or run.source is None:
        return changed([{"source": setting(one)["source"]} for one in (first, run)])
    lines = list(difflib.unified_diff(first.source.split("\n"), run.source.split("\n"), n=0, lineterm=""))[2:]
    lines = [line for sign in "+-" for line in lines if line.startswith(sign) and line[1:].strip()]
    return " ".join(lines[0].split()) + f" and {len(lines) - 1} more lines" * (len(lines) > 2) if lines else ""


def shown(text: str) -> str:
    """Returns the text as a legend can show it: in one line that is not too long, and without formulas."""
    text = " ".join(printable(text).split()).replace("$", r"\$")
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME // 2]}…{text[-LONGEST_NAME // 2:]}"


def describe(variant: Variant, brief: bool) -> str:
    """Returns the legend's text; in brief, without the number of runs, and without the loss where the target counts."""
    total, run, parts = len(variant.whole + variant.stopped), variant.whole[0], []
    unfinished = len(variant.stopped) if last_steps(run)[1] == run.num_steps else total
    mean, std = mean_curve(variant.whole, "val")
    reached = np.flatnonzero(mean[3] <= run.config["target"])
    if mean.size and not (brief and reached.size):
        parts.append(f"{mean[3, -1]:.4f}" + f" ± {std[3, -1]:.4f}" * (len(variant.whole) > 1))
    if reached.size:
        parts.append(f"target after {mean[2, reached[0]]:.1f} s")
    if unfinished or (total > 1 and not brief):
        parts.append(f"{unfinished} of {total} unfinished" if unfinished else f"{total} runs")
    return f" {variant.name}: {', '.join(parts)}" * bool(variant.name)     # a legend leaves out what begins with _


def limits(variants: list[Variant]) -> tuple[float, float]:
    """Returns the limits of the loss axis. The first tenth of a run, which falls from afar, lies above."""
    runs = [run for variant in variants for run in variant.whole]
    curves = [np.hstack([curve(run, "train"), curve(run, "val")]) for run in runs]
    tops = [rows[3, rows[0] >= rows[0].max() / 10].max() for rows in curves]
    low = min(rows[3].min() for rows in curves)
    high = min(max(tops), low + 2 * (sorted(tops)[len(tops) // 4] - low) + 0.2)     # not all of one that diverges
    target = min(variant.whole[0].config["target"] for variant in variants)
    low = min(low, target) if target > low - (high - low) / 4 else low      # far below all losses, it is not shown
    margin = 0.05 * max(high - low, 0.5)
    return low - margin, high + margin


def draw_panel(axis, variants: list[Variant], x: str, brief: bool) -> None:
    row, crowded = list(AXES).index(x), len(variants) > len(COLORS)
    for variant in reversed(variants):      # the first lies on top
        for run in variant.stopped:
            axis.plot(*curve(run, "train")[[row, 3]], **{**variant.look, "alpha": 0.6}, linewidth=0.7)
        mean, std = mean_curve(variant.whole, "train")
        axis.plot(mean[row], mean[3], **variant.look, label=describe(variant, brief),
                  marker="." if mean.shape[1] < 5 else "")
        axis.fill_between(mean[row], mean[3] - std[3], mean[3] + std[3], color=variant.look["color"],
                          alpha=0 if crowded else 0.15, linewidth=0)
        look = {**variant.look, "linestyle": "none"} if mean.size else variant.look     # the dots are the line
        mean, std = mean_curve(variant.whole, "val")
        axis.errorbar(mean[row], mean[3], std[3], std[row], **look, marker="o", ms=4)
    axis.set(xlabel=AXES[x], xlim=(0, None), ylim=limits(variants))
    axis.locator_params(axis="x", nbins=6, integer=True)
    if x != "seconds":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw(runs: list[Run], out: Path, baselines: list[Run] = (), panels: tuple[str, ...] = tuple(AXES)) -> Figure:
    """Writes the picture of the losses, with a panel against each of AXES, and returns it as matplotlib's."""
    if not all("batch_tokens" in run.config for run in [*runs, *baselines]):
        panels = tuple(x for x in panels if x != "tokens")
    if not panels:
        raise LogError("--x tokens: a log does not say how many a step took; give --x steps")
    variants, one = variants_of(runs, baselines), len(panels) == 1
    figure = Figure(dpi=150 if one else 100, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, x in zip(axes, panels, strict=True):
        draw_panel(axis, variants, x, brief=one)
        for target in {variant.whole[0].config["target"] for variant in variants}:
            axis.axhline(target, color="black", linestyle=(0, (5, 4)), linewidth=1)
            if axis is axes[-1]:
                axis.annotate(f"target\n{target:g}", (0.99, target), (1.01, target), axis.get_yaxis_transform(),
                              va="center", annotation_clip=True)
    axes[0].set_ylabel("loss (nats per token)")

    handles, labels = axes[0].get_legend_handles_labels()
    inside = one and len(labels) <= 6 and max(map(len, labels)) <= 60
    figure.set_size_inches(8 if one else 10, 4.2 if inside else 3.6 + 0.22 * len(labels))
    title = "line: training loss; dot: validation loss" + "; band and bars: std" * any(v.whole[1:] for v in variants)
    title += f"; grey: {len(variants) - len(labels)} more variants, with higher losses" * (len(labels) < len(variants))
    figure.legend(handles[::-1], labels[::-1], loc="upper right" if inside else "outside lower center", title=title,
                  edgecolor="none", handlelength=3)
    write(figure, out)
    return figure


def draw_times(runs: list[Run], out: Path) -> Figure:
    """Writes a bar of each variant's mean seconds of training, the slowest on top, and returns the picture."""
    variants = [variant for variant in variants_of(runs, []) if all(run.finished for run in variant.whole)]
    if not variants:
        raise LogError("no run has finished; --times draws the times of whole runs")
    seconds = [[run.final[0] for run in variant.whole] for variant in variants]
    order = sorted(range(len(variants)), key=lambda i: fmean(seconds[i]))
    names, means = [variants[i].name for i in order], [fmean(seconds[i]) for i in order]
    spreads = [stdev(seconds[i]) if len(seconds[i]) > 1 else 0 for i in order]
    figure = Figure((8, 0.8 + 0.5 * len(order)), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(order)), means, xerr=spreads, color=COLORS[0], ecolor=GREY)
    for place, i in enumerate(order):
        losses, text = [run.final[1] for run in variants[i].whole], f"  {means[place]:.1f} s"
        if place < len(order) - 1:
            text += f", {means[place] / means[-1]:.2f} of the first"
        axis.text(means[place] + spreads[place], place, f"{text}; loss {fmean(losses):.4f}", va="center", fontsize=8)
    axis.set(xlabel=AXES["seconds"], xlim=(0, 1.45 * means[-1]), yticks=range(len(order)), yticklabels=names)
    axis.grid(visible=False, axis="y")
    write(figure, out)
    return figure


def write(figure: Figure, out: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight")     # wider where a legend is
    # 256 colours take half the space
    Image.open(data).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(out, format="PNG", optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, log, record, or folder of these")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="RUN", help="runs to draw in grey")
    parser.add_argument("--x", choices=AXES, help="draw one panel, against this")
    parser.add_argument("--times", action="store_true", help="draw bars of the training times instead")
    parser.add_argument("--out", type=Path, help="PNG to write (default: loss.png in the first folder)")
    args = parser.parse_args()
    folder = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    out = args.out or (folder if args.runs[0].exists() else Path()) / "loss.png"    # not for one run into its record
    try:
        runs, bad = find_runs(args.runs)
        baselines, more_bad = find_runs(args.baseline) if args.baseline else ([], [])
        for text in bad + more_bad:
            print(f"plot.py: left out: {text}", file=sys.stderr)
        if args.times:
            draw_times(runs, out)
        else:
            draw(runs, out, baselines, (args.x,) if args.x else tuple(AXES))
    except LogError as error:
        sys.exit(f"plot.py: {error}")
    except OSError as error:
        sys.exit(f"plot.py: {printable(str(out))} cannot be written ({error.strerror}); give another --out")
    print(f"plot: {printable(str(out))}")


if __name__ == "__main__":
    main()
