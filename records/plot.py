#!/usr/bin/env python3
"""Draws the loss of runs against steps and seconds of training, from their log.txt files.

    python records/plot.py logs/latest                      # writes logs/latest/loss.png
    python records/plot.py logs/A logs/B --out compare.png
"""

import argparse
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LINE = re.compile(r"^step:(\d+)/\d+ (train|val)_loss:(\S+) train_time:(\d+)ms", re.MULTILINE)


def read_log(path: Path) -> dict:
    """Returns the losses {"train" or "val": {step: (seconds, loss)}} and the Config of a log or run folder.

    After a resume some steps stand in the log twice: the later line counts.
    """
    path = path / "log.txt" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8").split("\n" + "=" * 100 + "\n", 1)[-1]     # what follows the source
    except FileNotFoundError:
        sys.exit(f"plot.py: {path} does not exist; give the folder or log.txt of a run")
    run = {"train": {}, "val": {}, "name": path.parent.name}
    for step, kind, loss, milliseconds in LINE.findall(text):
        run[kind][int(step)] = (int(milliseconds) / 1e3, float(loss))
    config = re.search(r"^config: (.*)$", text, re.MULTILINE)
    if not run["train"] or not config:
        sys.exit(f"plot.py: {path} has no step of a run; give the log of one that trained")
    run["config"] = json.loads(config[1])
    return run


def smooth(values: list[float], window: int) -> list[float]:
    """Returns the mean of each value and up to window - 1 before it."""
    return [sum(values[max(0, i + 1 - window):i + 1]) / min(window, i + 1) for i in range(len(values))]


def draw(runs: list[dict], out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for run, color in zip(runs, plt.cm.tab10.colors * len(runs), strict=False):
        steps = sorted(run["train"])
        losses = [run["train"][step][1] for step in steps]
        for axis, x in ((axes[0], steps), (axes[1], [run["train"][step][0] for step in steps])):
            axis.plot(x, losses, color=color, alpha=0.3 / len(runs), linewidth=0.8)
            axis.plot(x, smooth(losses, max(1, len(steps) // 40)), color=color, linewidth=1.6,
                      label=f"{run['name']}: training")
        if run["val"]:
            last = max(run["val"])
            for axis, column in ((axes[0], None), (axes[1], 0)):
                axis.plot([step if column is None else run["val"][step][0] for step in sorted(run["val"])],
                          [run["val"][step][1] for step in sorted(run["val"])], "o-", color=color, markersize=6,
                          markeredgecolor="black", label=f"validation, {run['val'][last][1]:.4f} at step {last}")
    targets = {run["config"]["target"] for run in runs}
    for axis, label in zip(axes, ("step", "training time (s)"), strict=True):
        for target in targets:
            axis.axhline(target, color="black", linestyle="--", linewidth=0.9, label=f"target {target:g}")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    # The first steps fall from ln(vocabulary) within a moment: the axis shows what comes after.
    smoothed = [smooth([run["train"][step][1] for step in sorted(run["train"])], 10) for run in runs]
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
    draw([read_log(path) for path in args.runs], out)
    print(f"plot: {out}")


if __name__ == "__main__":
    main()
