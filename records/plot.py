#!/usr/bin/env python3
"""Draws the loss of runs against steps and seconds of training, from their log.txt files.

    python records/plot.py logs/latest                      # writes logs/latest/loss.png
    python records/plot.py logs/A logs/B --out compare.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from logs import LogError, Run, read_log  # noqa: E402


def smooth(values: list[float], window: int) -> list[float]:
    """Returns the mean of each value and up to window - 1 before it."""
    return [sum(values[max(0, i + 1 - window):i + 1]) / min(window, i + 1) for i in range(len(values))]


def draw(runs: list[Run], out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for run, color in zip(runs, plt.cm.tab10.colors * len(runs), strict=False):
        train, val = run.losses["train"], run.losses["val"]
        steps, val_steps = sorted(train), sorted(val)
        losses = [train[step][1] for step in steps]
        for axis, x in ((axes[0], steps), (axes[1], [train[step][0] for step in steps])):
            axis.plot(x, losses, color=color, alpha=0.3 / len(runs), linewidth=0.8)
            axis.plot(x, smooth(losses, max(1, len(steps) // 40)), color=color, linewidth=1.6,
                      label=f"{run.name}: training")
        if val:
            for axis, x in ((axes[0], val_steps), (axes[1], [val[step][0] for step in val_steps])):
                axis.plot(x, [val[step][1] for step in val_steps], "o-", color=color, markersize=6,
                          markeredgecolor="black",
                          label=f"validation, {val[val_steps[-1]][1]:.4f} at step {val_steps[-1]}")
    targets = {run.config["target"] for run in runs}
    for axis, label in zip(axes, ("step", "training time (s)"), strict=True):
        for target in targets:
            axis.axhline(target, color="black", linestyle="--", linewidth=0.9, label=f"target {target:g}")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    # The first steps fall from ln(vocabulary) within a moment: the axis shows what comes after.
    smoothed = [smooth([run.losses["train"][step][1] for step in sorted(run.losses["train"])], 10) for run in runs]
    top = max(values[len(values) // 20] for values in smoothed)
    axes[0].set_ylim(min([*map(min, smoothed), *targets]) - 0.05, top + 0.1)
    axes[0].set_ylabel("loss (nats a token)")
    axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their log.txt")
    parser.add_argument("--out", type=Path, help="picture to write (default: loss.png beside the first log)")
    args = parser.parse_args()
    first = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    out = args.out or first / "loss.png"
    try:
        runs = [read_log(path) for path in args.runs]
    except LogError as error:
        sys.exit(f"plot.py: {error}")
    for run in runs:
        if not run.config or not run.losses["train"]:
            sys.exit(f"plot.py: {run.path} has no training loss of train_gpt.py; give the log of a run that trained")
    draw(runs, out)
    print(f"plot: {out}")


if __name__ == "__main__":
    main()
