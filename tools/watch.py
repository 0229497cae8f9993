#!/usr/bin/env python3
"""Shows the runs of a folder in the terminal, while they train and after.

    python tools/watch.py logs                        # until Ctrl-C; --once, or a pipe, gets one picture
    python tools/watch.py logs --tensorboard tb       # copies the lines of the logs, too: tensorboard --logdir tb
    python tools/watch.py logs/RUN --wandb PROJECT    # to Weights & Biases

It only reads the logs, so that it may start before, during or after a run. The training loss is the mean over the last
1/80 of the run's steps, and the curve shows it over all steps. The record is the fastest recipe of 5 or more runs whose
mean loss reached the track's target, of as many steps as the run if there is one. Below its training loss at the same
step (its validation loss, if it has one there, beside a finished run) stands how far the run is above it (+) or below
(-). tokens/s and the time left are of training, without validation. A run is stalled when its log is silent for a
minute and 20 steps, or for 20 minutes before the first, which compiles.
"""

import argparse
import contextlib
import functools
import importlib
import os
import re
import sys
import time
from datetime import timedelta
from math import isfinite, nan
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from runs import ROOT, STEP, LogError, Run, group, logs_of, parse_log, printable, read_record, tokens_until

BARS = "▁▂▃▄▅▆▇█"
COLORS = dict(running="green", finished="blue", stopped="yellow", stalled="red")
SOURCE = re.compile(r"^#!.*?^={100}\n", re.MULTILINE | re.DOTALL)     # the program in front of a log
NUMBER = re.compile(r"(\S+?):(nan|-?inf|-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?:ms)?(?!\S)")


class Log:
    """A log that grows. Its run is None as long as it does not say what it is."""

    def __init__(self, path: Path):
        self.path, self.text, self.size, self.run, self.problem = path, "", 0, None, ""

    def read(self) -> str:
        """Returns the lines that have come since the last call; raises OSError where the log is gone."""
        status = self.path.stat()
        if status.st_size < self.size:
            self.__init__(self.path)        # another run has its place
        self.changed = status.st_mtime
        with open(self.path, "rb") as file:
            file.seek(self.size)
            data = file.read()
        data = data[:data.rfind(b"\n") + 1]     # a line without its end comes whole with a later call
        new = data.decode("utf-8", "replace")
        self.text, self.size = self.text + new, self.size + len(data)
        if new:
            try:
                self.run, self.problem = parse_log(self.path, self.text), ""
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                self.run, self.problem = None, f"no log of a run, or damaged ({str(error)[:200]})"
        return new

    def state(self) -> str:
        step, seconds, _ = progress(self.run)
        patience = 60 + 20 * seconds / step if step else 1200
        if self.run.finished:
            return "finished"
        if self.text.splitlines()[-1].startswith("stopped at step "):
            return "stopped"
        return "stalled" if time.time() - self.changed > patience else "running"


def progress(run: Run) -> tuple[int, float, float]:
    """Returns the last step, the seconds of training, and the training loss as above; before the first (0, 0, nan)."""
    points = run.losses["train"] or run.losses["val"] or {0: (0.0, nan)}
    step = max(points)
    recent = [loss for at, (_, loss) in points.items() if at > step - max(1, run.num_steps // 80)]
    return step, points[step][0], fmean(recent)


def curve(run: Run, width: int) -> str:
    """Returns the training loss as `width` bars, which stand for all steps; the first eighth may rise above them."""
    parts = [[] for _ in range(width)]
    for step, (_, loss) in run.losses["train"].items():
        if isfinite(loss):
            parts[max(0, step - 1) * width // run.num_steps].append(loss)
    means = [fmean(part) for part in parts if part]
    low, high = min(means, default=0), max(means[len(means) // 8:], default=0)
    heights = [min(1, (fmean(part) - low) / max(high - low, 1e-9)) if part else nan for part in parts]
    return "".join(BARS[round(7 * height)] if isfinite(height) else " " for height in heights)


@functools.cache
def record_of(track: str, num_steps: int) -> list[Run]:
    """Returns the runs of the record, as above; [] where the track has none."""
    found = []
    for path in sorted((ROOT / "records" / track).glob("*/runs.json")):
        with contextlib.suppress(LogError):
            found += group(read_record(path.parent))
    found = [runs for runs in found if runs[0].recipe and len(runs) >= 5 and all(run.finished for run in runs)]
    found = [runs for runs in found if fmean(run.final[1] for run in runs) <= runs[0].config["target"]]
    return min(found, default=[], key=lambda runs: (
        runs[0].num_steps != num_steps, fmean(run.final[0] for run in runs)))


def loss_at(runs: list[Run], kind: str, step: int) -> float:
    """Returns the mean "train" or "val" loss of the runs, interpolated; nan where they have none."""
    losses = []
    for run in runs:
        points = sorted((at, loss) for at, (_, loss) in run.losses[kind].items())
        losses.append(np.interp(step, *np.transpose(points), nan, nan) if points else nan)
    return fmean(losses) if losses else nan


def row(name: str, log: Log, width: int) -> list[Text]:
    """Returns the cells of a run, of two lines."""
    run, state, (step, seconds, loss) = log.run, log.state(), progress(log.run)
    done, planned = (tokens_until(run.config, end) for end in (step, run.num_steps))
    speed = done / seconds if seconds else nan
    left = timedelta(seconds=round((planned - done) / speed)) if seconds and state == "running" else "-"
    val = run.losses["val"][max(run.losses["val"])][1] if run.losses["val"] else nan
    record = record_of(run.config["track"], run.num_steps)
    mine, theirs = val, loss_at(record, "val", step) if run.finished else nan
    if not isfinite(theirs):
        mine, theirs = loss, loss_at(record, "train", step)
    cells = [f"{step}/{run.num_steps}\n{step / max(1, run.num_steps):.0%}", f"{loss:.4f}", f"{val:.4f}",
             f"{theirs:.4f}\n{mine - theirs:+.4f}", curve(run, width), f"{speed:,.0f}", f"{left}"]
    cells = [Text(cell.replace("+nan", "").replace("nan", "-")) for cell in cells]
    return [Text(f"{name}\n").append(state, COLORS[state]).append(f", {run.config['track']}, {seconds:,.0f} s"), *cells]


def picture(logs: dict[str, Log], most: int, width: int) -> Group:
    """Returns a table of the runs whose logs changed last, for so many columns of a terminal, and notes."""
    table = Table("run", "step", "train", "val", "record", "curve", "tokens/s", "left", box=None, padding=(0, 1))
    for column in table.columns[1:]:
        column.no_wrap, column.justify = True, "left" if column.header == "curve" else "right"
    known = {name: log for name, log in logs.items() if log.run}
    newest = sorted(known, key=lambda name: known[name].changed, reverse=True)[:most]
    for name in newest:
        table.add_row(*row(name, known[name], min(40, max(8, width - 82))), end_section=True)
    records = [record_of(known[name].run.config["track"], known[name].run.num_steps) for name in newest]
    notes = [f"record: {runs[0].path.parent.name}, {runs[0].recipe}, mean of {len(runs)}" for runs in records if runs]
    notes += [f"{len(known) - most} older runs: --most"] * (len(known) > most)
    notes += [printable(f"left out: {log.path}: {log.problem}") for log in logs.values() if log.problem]
    return Group(table if known else "no run yet", *map(Text, dict.fromkeys(notes)))


class Mirror:
    """Copies the lines of a run's log to TensorBoard's folder and to a project of Weights & Biases ("": not)."""

    def __init__(self, name: str, run: Run, folder: str, project: str):
        self.board = self.wandb = None
        if folder:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(Path(folder, name)), purge_step=0, flush_secs=5)    # 0: hides earlier copies
        if project:
            import wandb
            try:
                self.wandb = wandb.init(
                    project=project, id=name.replace("/", "-"), name=name, config=run.config, resume="allow",
                    dir=str(run.path.parent), reinit="create_new", settings=dict(console="off"))
            except wandb.Error as error:
                raise LogError(f"--wandb {project}: {error}") from None

    def write(self, lines: str) -> None:
        """Copies every number of the lines of steps; times are in ms, as in the log."""
        for step, _, pairs in STEP.findall(SOURCE.sub("", lines)):
            numbers = {key: float(value) for key, value in NUMBER.findall(pairs)}
            for key in numbers if self.board else ():
                self.board.add_scalar(key, numbers[key], int(step))
            if self.wandb:
                self.wandb.log(numbers, int(step))

    def end(self) -> None:
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def look(folder: Path, logs: dict[str, Log]) -> dict[str, str]:
    """Brings `logs`, by the runs' paths below the folder, up to date; returns the new lines of each."""
    paths, new = [], {}
    with contextlib.suppress(LogError, OSError):    # there is no log, or a folder goes while it is searched
        paths = logs_of(folder)
    for path in paths:
        run = path.parent if path.name == "log.txt" else path.with_suffix("")
        name = os.path.relpath(run, folder)
        name = printable(run.resolve().name if name.startswith(".") else name)      # where the folder is the run
        with contextlib.suppress(OSError):
            new[name] = logs.setdefault(name, Log(path)).read()
    for name in logs.keys() - new.keys():
        del logs[name]
    return new


def watch(folder: Path, once: bool, most: int, board: str, project: str) -> None:
    terminal = sys.stdout.isatty()
    once = once or not (terminal or board or project)       # a mirror goes on without a terminal
    console, logs, mirrors = Console(width=None if terminal else 100), {}, {}
    live = Live(console=console, auto_refresh=False) if terminal and not once else None
    with live or contextlib.nullcontext(), contextlib.ExitStack() as at_end:
        while True:
            for name, new in look(folder, logs).items():
                if logs[name].run and (board or project):
                    if name not in mirrors:
                        mirrors[name] = Mirror(name, logs[name].run, board, project)
                        at_end.callback(mirrors[name].end)
                    mirrors[name].write(new)
            if once:
                return console.print(picture(logs, most, console.width))
            if live:
                live.update(picture(logs, min(most, (console.height - 6) // 2), console.width), refresh=True)
            time.sleep(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="logs", type=Path, help="of runs, or one run (default: logs)")
    parser.add_argument("--once", action="store_true", help="print one picture, copy what is there, and end")
    parser.add_argument("--most", type=int, default=12, help="runs to show (default: 12)")
    parser.add_argument("--tensorboard", default="", metavar="DIR", help="copy the logs' lines to event files in DIR")
    parser.add_argument("--wandb", default="", metavar="PROJECT", help="copy them to a project of Weights & Biases")
    args = parser.parse_args()
    problems = [f"--most {args.most}: give 1 or more"] * (args.most < 1)
    if args.once and not args.folder.exists():
        problems.append(f"{args.folder}: does not exist; give the folder of runs")
    for package, module in dict(tensorboard="torch.utils.tensorboard", wandb="wandb").items():
        try:
            importlib.import_module(module if getattr(args, package) else "sys")
        except ImportError:
            problems.append(f"--{package} {getattr(args, package)}: needs a package: pip install {package}")
    if problems:
        print(f"error: {printable(problems[0])}", file=sys.stderr)
        sys.exit(2)
    try:
        watch(args.folder, args.once, args.most, args.tensorboard, args.wandb)
    except LogError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
