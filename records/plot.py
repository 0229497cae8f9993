#!/usr/bin/env python3
"""Draws the loss of runs against steps, tokens and seconds of training, from their log.txt files.

    python records/plot.py logs/RUN                                     # writes logs/RUN/loss.png
    python records/plot.py runs/tweak --baseline runs/base --out compare.png
    python records/plot.py logs --html runs.html                        # one page, to open or send: plots and tables

A folder stands for all logs below it. Runs of the same source and config, but for seed and paths, make one group: one
line through their mean, in a band of their standard deviation. A run that stopped before the others of its group is a
thin line of its own, outside mean and band.

The metrics of runs with --metrics_every are drawn against steps: on the page, and in optimizer.png beside loss.png, or
with --out compare.png, in compare_optimizer.png. The lines are means over the layers, and over the runs of a group.
"""

import argparse
import base64
import html
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from compare import block_of, names, read_runs, setting  # noqa: E402
from logs import LogError, Run  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402

AXES = ("steps", "tokens", "seconds of training")
LONGEST_NAME = 60               # characters, up to which a group's name tells its config too
DASHES = {"-": "none", "--": "6 3", "-.": "6 2 2 2", ":": "2 2"}     # matplotlib's line styles: SVG's, for the page
DOT = dict(marker="o", markersize=5, markeredgecolor="black", markeredgewidth=0.7)
FIGURES = {                     # panels of what the optimizers' get_post_step_metrics gives: (label, scale) -> keys
    ("norm of the gradient", "log"): ["gradient"],
    ("norm of the weight", "log"): ["weight"],
    ("norm of the update", "log"): ["update"],
    ("norm of update / norm of weight", "log"): ["update_to_weight"],
    ("orthogonality error", "linear"): ["orthogonality_error"],
    ("least and largest singular value", "linear"): ["least_singular", "largest_singular"],
}


@dataclass(frozen=True)
class Group:
    """Runs of one setting, drawn as one line."""
    name: str
    runs: list[Run]
    baseline: bool
    color: str                  # such as #1f77b4
    line: str                   # matplotlib's line style

    @property
    def title(self) -> str:
        return ("baseline " if self.baseline else "") + self.name

    @property
    def whole(self) -> list[Run]:
        """The runs that went furthest, of which mean and spread are taken."""
        ends = [max(run.losses["train"]) for run in self.runs]
        return [run for run, end in zip(self.runs, ends, strict=True) if end == max(ends)]


@dataclass(frozen=True)
class Picture:
    """Panels that have their legend in common: a PNG, or a part of the page."""
    panels: list[tuple[str, Callable]]      # (words for it, what draws it on an Axes)
    legend: list[tuple[str, dict]]          # (text, keywords of its Line2D)
    reading: str                            # how to read it


# The groups and their names.

def differences(groups: list[list[Run]]) -> dict[str, list[str]]:
    """Returns {field, num_steps or source: its value in each group} of those that differ between the groups."""
    settings = [setting(runs[0]) for runs in groups]
    values = {name: [fields.get(name, "none").strip('"') for fields in settings]
              for name in dict.fromkeys(itertools.chain(*settings))}
    return {name: column for name, column in values.items() if len(set(column)) > 1}


def name_groups(groups: list[list[Run]]) -> list[str]:
    """Names each group by its run, its letter in an A/B folder, or the folder that holds all of it and no other.

    Where it stays short for all groups, the fields of Config that differ are added.
    """
    found, places = [], []
    for runs in groups:
        folder = Path(os.path.commonpath([run.folder for run in runs]))
        others = [run for other in groups if other is not runs for run in other]
        letters = {run.folder.name.split("_")[1] for run in runs if block_of(run)}
        place = folder
        if len(runs) == 1:
            name, place = runs[0].name, folder.parent
        elif len(letters) == 1 and all(map(block_of, runs)):
            name = letters.pop()
        elif not any(run.folder.is_relative_to(folder) for run in others):
            name, place = folder.name, folder.parent
        else:
            name = f"{runs[0].name} and {len(runs) - 1} more"
        found.append(name)
        places.append(place.name)
    if len(set(found)) < len(found):
        found = [f"{place}/{name}" for place, name in zip(places, found, strict=True)]
    if len(set(found)) < len(found):
        found = [f"{name} ({i})" for i, name in enumerate(found, 1)]
    columns = {field: column for field, column in differences(groups).items() if field != "source"}
    longer = [f"{name} ({', '.join(f'{field} {column[i]}' for field, column in columns.items())})"
              for i, name in enumerate(found)]
    return longer if columns and max(map(len, longer)) <= LONGEST_NAME else found


def palette(count: int) -> list[str]:
    """Returns `count` colors, of which none is grey."""
    colors = [color for i, color in enumerate(plt.cm.tab10.colors) if i != 7]
    return [matplotlib.colors.to_hex(color) for color in (
        colors[:count] if count <= len(colors) else plt.cm.turbo(np.linspace(0.05, 0.95, count)))]


def group_runs(runs: list[Run], baselines: list[Run]) -> list[Group]:
    """Groups runs by setting, in the order given, baselines last; a log given twice counts once, as a baseline."""
    given, found = [(False, run) for run in runs] + [(True, run) for run in baselines], {}
    for baseline, run in {run.path.resolve(): (baseline, run) for baseline, run in given}.values():
        found.setdefault((baseline, json.dumps(setting(run), sort_keys=True)), []).append(run)
    keys = sorted(found, key=lambda key: key[0])
    count = sum(not baseline for baseline, _ in keys)
    colors, lines, groups = palette(count), list(DASHES)[1:], []
    for i, ((baseline, key), name) in enumerate(zip(keys, name_groups([found[key] for key in keys]), strict=True)):
        color, line = ("#808080", lines[(i - count) % len(lines)]) if baseline else (colors[i], "-")
        groups.append(Group(name, found[baseline, key], baseline, color, line))
    return groups


# The curves: arrays of four rows, which are steps, tokens, seconds of training and loss, with a column a logged step.

def tokens_after(run: Run) -> np.ndarray:
    """Returns the tokens trained on after 0, 1, ... num_steps steps."""
    return np.concatenate([[0], np.cumsum(run.batch_tokens)])


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the mean of each value and up to window - 1 before it."""
    return np.convolve(values, np.ones(window))[:len(values)] / np.minimum(np.arange(1, len(values) + 1), window)


def window_of(run: Run) -> int:
    """Returns the number of steps over which the run's training loss is smoothed."""
    return max(1, run.num_steps // 40)


def curve(runs: list[Run], kind: str, smoothed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean, standard deviation) of the runs' curves, both (4, steps that all have); kind is train or val."""
    steps = sorted(set.intersection(*(set(run.losses[kind]) for run in runs)))
    curves = []
    for run in runs:
        seconds, losses = np.array([run.losses[kind][step] for step in steps]).reshape(-1, 2).T
        if kind == "train" and smoothed:
            losses = smooth(losses, window_of(run))
        curves.append([steps, tokens_after(run)[steps] if steps else [], seconds, losses])
    curves = np.array(curves, dtype=float)
    return curves.mean(axis=0), curves.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(curves[0])


def plus_minus(values, style: str) -> str:
    """Returns the mean of numbers, with the standard deviation where there are several."""
    values = np.array(values)
    return f"{values.mean():{style}}" + (f" ± {values.std(ddof=1):{style}}" if len(values) > 1 else "")


# The picture.

def targets(groups: list[Group]) -> list[float]:
    return sorted({run.config["target"] for group in groups for run in group.runs})


def loss_range(groups: list[Group]) -> tuple[float, float]:
    """Returns the limits of the loss axis: the first steps, which fall from ln(vocabulary) in a moment, lie above."""
    curves = [smooth(curve([run], "train", smoothed=False)[0][3], 10) for group in groups for run in group.runs]
    top = max(losses[len(losses) // 20] for losses in curves)
    bottom = min([*(losses.min() for losses in curves), *targets(groups)])
    return bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom)


def draw_panel(axis, groups: list[Group], row: int, limits: tuple[float, float]) -> None:
    """Draws the losses against row 0, 1 or 2 of the curves."""
    alone = len(groups) == 1 and len(groups[0].runs) == 1
    for group in reversed(groups):      # baselines lie below, the first group on top
        look = dict(color=group.color, linestyle=group.line)
        if alone:
            raw, _ = curve(group.runs, "train", smoothed=False)
            axis.plot(raw[row], raw[3], color=group.color, alpha=0.3, linewidth=0.6)
        for run in group.runs:
            if run not in group.whole:
                mean, _ = curve([run], "train")
                axis.plot(mean[row], mean[3], linewidth=0.6, alpha=0.7, **look)
        mean, spread = curve(group.whole, "train")
        if len(group.whole) > 1:
            axis.fill_between(mean[row], mean[3] - spread[3], mean[3] + spread[3], color=group.color, alpha=0.2,
                              linewidth=0)
        axis.plot(mean[row], mean[3], linewidth=1.6 if alone or len(group.whole) > 1 else 1, **look)
        mean, spread = curve(group.whole, "val")
        axis.errorbar(mean[row], mean[3], xerr=spread[row], yerr=spread[3], color=group.color, linestyle="none",
                      elinewidth=1, zorder=3, **DOT)
    for target in targets(groups):
        axis.axhline(target, color="black", linestyle=(0, (5, 4)), linewidth=0.9)
    axis.set_ylim(*limits)
    axis.set_xlabel(AXES[row])
    axis.set_ylabel("loss (nats a token)")
    axis.locator_params(axis="x", nbins=6)
    if AXES[row] == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)


def describe(group: Group) -> str:
    """Returns the legend's text for the group: its name and last validation loss."""
    mean, spread = curve(group.whole, "val")
    text = group.title
    if mean.shape[1]:
        several = f" ± {spread[3][-1]:.4f}" if len(group.whole) > 1 else ""
        text += f": {mean[3][-1]:.4f}{several} at step {mean[0][-1]:.0f}"
    if len(group.runs) > 1:
        text += f", {len(group.whole)} runs" if len(group.whole) > 1 else ", 1 run"
    stopped = len(group.runs) - len(group.whole)
    return text + (f" and {stopped} stopped before" if stopped else "")


def loss_picture(groups: list[Group]) -> Picture:
    limits, windows = loss_range(groups), sorted({window_of(group.runs[0]) for group in groups})
    window = f"mean of {windows[0]}" + (f" to {windows[-1]}" if len(windows) > 1 else "")
    several = any(len(group.whole) > 1 for group in groups)
    return Picture(
        [(f"Loss against {name}", partial(draw_panel, groups=groups, row=row, limits=limits))
         for row, name in enumerate(AXES)],
        [(describe(group), dict(color=group.color, linestyle=group.line, **DOT)) for group in groups],
        f"lines: training loss ({window} steps); dots: validation loss"
        f"{'; bands and bars: ± standard deviation over the runs' if several else ''}; broken line across: target "
        f"{' and '.join(f'{target:g}' for target in targets(groups))}")


def read_metrics(run: Run) -> dict[int, dict]:
    """Returns {step: {kind: {figure: mean over the parameters of that kind, or nan}}} of the log's lines of metrics.

    A kind has the parameters that differ in their layer alone. There is a line for each optimizer; of a step that a
    resumed run did again, the later lines count. A damaged line is left out, which is said.
    """
    found = {}
    for line in re.findall(r'^metrics: (\{"step".*)', run.path.read_text(encoding="utf-8"), re.MULTILINE):
        try:
            entry = json.loads(line)
            parameters = {name: {figure: float(value) for figure, value in figures.items()}
                          for name, figures in entry["parameters"].items()}
            found.setdefault(int(entry["step"]), {}).update(parameters)
        except (ValueError, KeyError, TypeError, AttributeError):
            print(f"plot.py: left out: {run.path} has a damaged line of metrics: {line[:40]}", file=sys.stderr)
    return {step: means_of_kinds(parameters) for step, parameters in found.items()}


def means_of_kinds(parameters: dict) -> dict:
    kinds = {}
    for name, figures in parameters.items():
        if {"update", "weight"} <= figures.keys() and figures["weight"]:
            figures["update_to_weight"] = figures["update"] / figures["weight"]
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(figures)
    return {kind: {figure: float(np.mean([figures.get(figure, np.nan) for figures in members]))
                   for figure in dict.fromkeys(itertools.chain(*members))} for kind, members in kinds.items()}


def draw_figures(axis, lines: list[tuple], label: str, scale: str) -> None:
    """Draws lines of (steps, values, look) of one figure, or two."""
    for steps, values, look in lines:
        axis.plot(steps, values, linewidth=1.2, marker="." if len(steps) < 10 else None, **look)
    axis.set_yscale(scale)
    axis.set_xlabel("steps")
    axis.set_ylabel(label)
    axis.locator_params(axis="x", nbins=6)
    axis.grid(alpha=0.3)


def optimizer_picture(groups: list[Group]) -> Picture | None:
    """Returns a panel a figure, with a color for each group of parameters and a line style for each group of runs.

    Groups beyond the line styles are left out, which the picture says. None where there are no metrics.
    """
    measured = [(group, runs) for group in groups if (runs := list(filter(None, map(read_metrics, group.whole))))]
    kinds = list(dict.fromkeys(kind for _, runs in measured for run in runs for step in run.values() for kind in step))
    colors, panels = dict(zip(kinds, palette(len(kinds)), strict=True)), []
    for (label, scale), keys in FIGURES.items():
        lines = []
        for ((_, runs), style), kind, key in itertools.product(zip(measured, DASHES, strict=False), kinds, keys):
            steps = sorted(set.intersection(*map(set, runs)))
            means = np.mean([[run[step].get(kind, {}).get(key, np.nan) for step in steps] for run in runs], axis=0)
            if scale == "log":
                means[means <= 0] = np.nan      # a gap, as where the log has NaN
            if not np.isnan(means).all():
                lines.append((steps, means, dict(color=colors[kind], linestyle=style)))
        if lines:
            panels.append((label, partial(draw_figures, lines=lines, label=label, scale=scale)))
    legend = [(kind, dict(color=color, linestyle="-")) for kind, color in colors.items()]
    reading = ("norms: Frobenius; of Muon's updates, after NorMuon, before rate and scale: orthogonality error (0: "
               "orthogonal) and singular values; lines: means over layers"
               + " and runs" * any(len(runs) > 1 for _, runs in measured))
    if len(measured) > 1:
        legend += [(group.title, dict(color="#000000", linestyle=style))
                   for (group, _), style in zip(measured, DASHES, strict=False)]
    if len(measured) > len(DASHES):
        reading += f"; only the first {len(DASHES)} of {len(measured)} groups: plot the others apart"
    return Picture(panels, legend, reading) if panels else None


def save(picture: Picture, out: Path) -> None:
    """Writes the panels, up to four in a row, with the legend below them."""
    texts = [text for text, _ in picture.legend]
    columns, keys = min(4, len(picture.panels)), max(1, min(4, len(texts), 180 // (max(map(len, texts)) + 8)))
    rows = -(-len(picture.panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.4 * rows + 1 - 0.2 * (-len(texts) // keys)),
                                layout="constrained", squeeze=False)
    for axis, (_, draw) in zip(axes.flat, picture.panels, strict=False):
        draw(axis)
    for axis in axes.flat[len(picture.panels):]:
        axis.remove()
    legend = figure.legend([Line2D([], [], **look) for _, look in picture.legend], texts, loc="outside lower center",
                           ncols=keys, fontsize=9, frameon=False, handlelength=3, title=picture.reading,
                           title_fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)      # a name may hold dollar signs
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw(groups: list[Group], out: Path) -> None:
    """Writes the picture of the losses."""
    save(loss_picture(groups), out)


# The page.

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --text: #1b1b1b; --faint: #5f5f5f; --rule: #d9d9d9; --back: #ffffff; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; font: 0.95rem/1.45 system-ui, sans-serif; color: var(--text);
  background: var(--back); }
h1 { font-size: 1.35rem; margin: 0.3rem 0 0.8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 0.5rem; }
p { margin: 0.4rem 0; color: var(--faint); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0.8rem;
  margin-top: 1rem; }
.plots img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
td { white-space: nowrap; }
td.words { white-space: normal; min-width: 10rem; }
thead th { color: var(--faint); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: clamp(7rem, 20vw, 18rem); overflow-wrap: anywhere; padding-left: 36px;
  position: relative; }
th svg { position: absolute; left: 0; top: calc(0.3rem + 0.7em - 5px); }
p span { display: inline-block; margin-right: 1.2rem; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --faint: #a3a3a3; --rule: #3a3a3a; --back: #161616; }
  img, svg { filter: invert(0.92) hue-rotate(180deg); }
}
</style>
</head>
<body>
<h1>$title</h1>
$groups
$plots
<p>Plots: $reading.</p>
<p>Groups are runs of the same source and config, but for seed and paths. Their figures: mean of the finished runs,
± standard deviation. A group reaches the target by its mean.</p>
$optimizers
<h2>Config differences between the groups</h2>
$differences
<h2>Runs</h2>
$runs
</body>
</html>
""")


def mark(color: str, line: str) -> str:
    """Returns a piece of that line, for a table or a legend."""
    return (f'<svg width="30" height="10" aria-hidden="true"><path d="M0 5H30" stroke="{color}" stroke-width="2.5" '
            f'stroke-dasharray="{DASHES[line]}"/></svg>')


def images(picture: Picture) -> str:
    """Returns the panels as HTML images that hold their data."""
    found = []
    for words, draw in picture.panels:
        figure, axis = plt.subplots(figsize=(5, 3.8), layout="constrained")
        draw(axis)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=160, transparent=True)
        plt.close(figure)
        found.append(f'<img width="800" height="608" alt="{html.escape(words)}" src="data:image/png;base64,'
                     f'{base64.b64encode(data.getvalue()).decode()}">')
    return '<div class="plots">\n' + "\n".join(found) + "\n</div>"


def section(picture: Picture) -> str:
    """Returns the part of the page on the optimizers."""
    legend = "\n".join(f"<span>{mark(look['color'], look['linestyle'])} {html.escape(text)}</span>"
                       for text, look in picture.legend)
    return f"<h2>Inside the optimizers</h2>\n<p>{legend}</p>\n{images(picture)}\n<p>{html.escape(picture.reading)}.</p>"


def table(label: str, head: list[str], rows: list[tuple], groups: list[Group]) -> str:
    """Returns an HTML table in a box that scrolls, a row with the mark of its group; the texts are escaped here."""
    lines = []
    for row, group in zip(rows, groups, strict=True):
        first, *others = (html.escape(str(text)) for text in row)
        cells = "".join(f"<td{' class=words' if len(text) > 20 else ''}>{text}</td>" for text in others)
        lines.append(f'<tr><th scope="row">{mark(group.color, group.line)}{first}</th>{cells}</tr>')
    titles = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in head)
    return (f'<div class="scroll" role="region" aria-label="{html.escape(label)}" tabindex="0">\n<table>\n'
            f"<thead><tr>{titles}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n</div>")


def speed(run: Run) -> tuple[int, float, float]:
    """Returns (steps done, seconds of training, tokens a second)."""
    steps = max(run.losses["train"])
    seconds = run.final[0] if run.finished else run.losses["train"][steps][0]
    return steps, seconds, tokens_after(run)[steps] / seconds


def measures(runs: list[Run]) -> list[str]:
    """Returns the cells on loss, target and speed of a run, or of a group's finished runs, whose mean loss counts."""
    if not runs:
        return ["-"] * 4
    losses, target = np.array([run.final[1] for run in runs if run.finished]), runs[0].config["target"]
    _, seconds, tokens_a_second = zip(*map(speed, runs), strict=True)
    several = f" ({(losses <= target).sum()} of {len(runs)} runs)" if len(runs) > 1 else ""
    final = [plus_minus(losses, ".4f"), ("yes" if losses.mean() <= target else "no") + several] if len(losses) else "--"
    return [*final, plus_minus(seconds, ",.1f"), plus_minus(tokens_a_second, ",.0f")]


def run_row(run: Run, group: Group) -> tuple:
    steps = f"{speed(run)[0]:,}" + ("" if run.finished else f" of {run.num_steps:,}")
    return (run.name, *measures([run]), steps, run.config.get("seed", "-"), group.title, run.hardware or "-",
            run.torch or "-")


def group_row(group: Group) -> tuple:
    finished = [run for run in group.runs if run.finished]
    hardware, torch = (" | ".join(sorted({fact or "-" for fact in facts})) for facts in zip(
        *((run.hardware, run.torch) for run in group.runs), strict=True))
    count = f"{len(finished)}" + (f" of {len(group.runs)}" if len(finished) < len(group.runs) else "")
    return group.title, *measures(finished), f"{group.runs[0].num_steps:,}", count, hardware, torch


def page(groups: list[Group], optimizers: Picture | None = None) -> str:
    """Returns the page, which refers to nothing outside itself."""
    losses = loss_picture(groups)
    columns = differences([group.runs for group in groups])
    members = [(run, group) for group in groups for run in group.runs]
    measures = ["final validation loss", "target reached", "seconds of training", "tokens a second", "steps"]
    return PAGE.substitute(
        title=html.escape(groups[0].name if len(groups) == 1 else f"{len(members)} runs in {len(groups)} groups"),
        groups=table("Groups", ["group", *measures, "finished runs", "hardware", "torch"], list(map(group_row, groups)),
                     groups),
        plots=images(losses), reading=html.escape(losses.reading),
        optimizers=section(optimizers) if optimizers else "",
        differences=table("Config differences", ["group", *columns], [
            (group.title, *(column[i] for column in columns.values())) for i, group in enumerate(groups)], groups)
        if columns else "<p>None: all runs have the same source and config, but for seed and paths.</p>",
        runs=table("Runs", ["run", *measures, "seed", "group", "hardware", "torch"],
                   [run_row(run, group) for run, group in members], [group for _, group in members]))


def read_trained(paths: list[Path]) -> list[Run]:
    """Returns the runs with a training loss, and says on stderr which have none."""
    trained, untrained = [], []
    for run in read_runs(paths):
        good = run.losses["train"] and {"batch_tokens", "target"} <= run.config.keys()
        (trained if good else untrained).append(run)
    if untrained:
        paths = names([run.path for run in untrained])
        print(f"plot.py: left out: {paths} has no training loss of train_gpt.py", file=sys.stderr)
    return trained


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, logs, or folders of these")
    parser.add_argument("--baseline", nargs="+", type=Path, default=[], metavar="RUN",
                        help="runs to draw in grey, dashed")
    parser.add_argument("--out", type=Path, help="picture to write (default, without --html: loss.png in the first "
                        "folder, or beside the first log)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="page to write: plots, runs and config differences")
    args = parser.parse_args()
    first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    out = args.out or (None if args.html else first / "loss.png")
    formats = matplotlib.backend_bases.FigureCanvasBase.filetypes
    if out and out.suffix[1:].lower() not in formats:
        parser.error(f"--out {out}: must end in one of .{', .'.join(formats)}")
    try:
        runs, baselines = read_trained(args.runs), read_trained(args.baseline)
        if not runs:
            sys.exit("plot.py: no run is left to draw; give the log of a run that trained")
        groups = group_runs(runs, baselines)
        optimizers = optimizer_picture(groups)
        if out:
            draw(groups, out)
            print(f"plot: {out}")
        if out and optimizers:
            beside = out.with_name(f"{out.stem}_optimizer{out.suffix}" if args.out else "optimizer.png")
            save(optimizers, beside)
            print(f"plot: {beside}")
        if args.html:
            args.html.write_text(page(groups, optimizers), encoding="utf-8")
            print(f"page: {args.html}")
    except LogError as error:
        sys.exit(f"plot.py: {error}")
    except OSError as error:
        sys.exit(f"plot.py: {error.filename} cannot be written ({error.strerror}); name another file")


if __name__ == "__main__":
    main()
