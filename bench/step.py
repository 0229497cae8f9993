#!/usr/bin/env python3
"""Times the parts of a training step, and the operations within them; or whether one file's step is faster.

    python bench/step.py                            # tiny, on the device that training would take
    OMP_NUM_THREADS=1 python bench/step.py tiny --num_layers 3 --steps 50     # and any option of train_gpt.py
    python bench/step.py tiny --against before.py   # its whole step beside that of another train_gpt.py

A part is timed by itself, so a GPU waits between two of them, as it does not in training. The operations are from
torch's profiler, by the time within each alone, over steps that are not timed.

--against runs both in this one process, in turns of 5 steps, A B B A. The ratio has far less noise than that of two
runs, whose memory lies differently; whether the tweak trains as well is what tools/ab.py tells.
"""

import argparse
import importlib.machinery
import math
import sys
import tempfile
import time
import types
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from scipy import stats
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402

WARM_UP, TURN, PROFILED = 3, 5, 5    # steps
USED = "parse_command_line make_config set_up load_batches stage train_step".split()     # of a program


class Clock:
    """Collects {part: seconds of it in each step}."""

    def __init__(self, device: torch.device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.seconds, self.started = defaultdict(list), 0.0

    def start(self) -> None:
        self.wait()
        self.started = time.perf_counter()

    def stop(self, part: str) -> None:
        self.wait()
        self.seconds[part].append(time.perf_counter() - self.started)
        self.start()


def set_up(program, options: list[str], steps: int, folder: str, device: torch.device):
    """Returns a run of that module, of so many steps, with `loader` in it, compiled and warm at each stage."""
    given = program.parse_command_line([*options, "--num_steps", str(steps), "--log_dir", folder])
    run = program.set_up(program.make_config(given), device, {})
    firsts = {program.stage(run.config, step): step for step in reversed(range(steps))}

    def load(step: int):
        return program.load_batches(run.train_rows, run.starts, run.config.seed, device, step)

    for run.step in [*firsts.values()] * WARM_UP:
        program.train_step(run, next(load(run.step)))
    run.unread.clear()
    run.step, run.loader = 0, load(0)
    return run


def train(run, steps: int) -> dict[str, list[float]]:
    """Makes the steps of one rank, and returns the seconds of each part. Several micro-batches count as one part."""
    c, clock = run.config, Clock(run.device)
    for _ in range(steps):
        clock.start()
        tokens = next(run.loader)
        clock.stop("loader")
        at_once = run.at_once[train_gpt.batch_rows(c, run.step)]
        train_gpt.accumulate_gradients(run.model, tokens, at_once, train_gpt.stage(c, run.step)[1])
        clock.stop("forward and backward")
        train_gpt.set_schedules(run.optimizers, c, run.step)
        for name, optimizer in run.optimizers.items():
            optimizer.step()
            clock.stop(name)
        run.step += 1
    return clock.seconds


def compare(path: Path, options: list[str], steps: int, folder: str, device: torch.device) -> str:
    """Returns the table of the file at `path`, A, and of the repository's train_gpt.py, B."""
    loader = importlib.machinery.SourceFileLoader("against", str(path))
    other = sys.modules["against"] = types.ModuleType("against")
    other.__file__ = str(path)
    loader.exec_module(other)
    missing = [name for name in USED if not hasattr(other, name)]
    train_gpt.require(not missing, f"{path}: has no {', '.join(missing)}; give a file with today's functions")
    programs, rounds = dict(A=other, B=train_gpt), max(2, steps // (2 * TURN))
    steps, clock = rounds * 2 * TURN, Clock(device)
    runs = {name: set_up(program, options, steps, f"{folder}/{name}", device) for name, program in programs.items()}

    for name in "ABBA" * rounds:
        program, run = programs[name], runs[name]
        clock.start()
        for _ in range(TURN):
            program.train_step(run, next(run.loader))
        clock.stop(name)
        run.unread.clear()
    a, b = ([1e3 * (one + two) / (2 * TURN) for one, two in zip(times[::2], times[1::2], strict=True)]
            for times in (clock.seconds["A"], clock.seconds["B"]))     # ms a step in each round
    ratios = stats.ttest_1samp([math.log(y / x) for x, y in zip(a, b, strict=True)], 0)
    low, high = map(math.exp, ratios.confidence_interval())
    return (f"{header(runs['B'], options)}; {steps} steps of each\n\n"
            f"| program | ms a step, median of {rounds} rounds |\n|---|---|\n| A: {path} | {median(a):.2f} |\n"
            f"| B: train_gpt.py | {median(b):.2f} |\n\n"
            f"B's time / A's: {math.sqrt(low * high):.3f} "
            f"(95% confidence interval {low:.3f} to {high:.3f}, p = {ratios.pvalue:.2g})")


def header(run, options: list[str]) -> str:
    return (f"{' '.join(options)}: {train_gpt.describe_hardware(run.device)}, torch {torch.__version__}, "
            f"{run.config.dtype}, attention {run.attention}")


def show_parts(options: list[str], steps: int, operations: int, folder: str, device: torch.device) -> None:
    """Prints the table of the parts of a step, and that of its slowest operations."""
    run = set_up(train_gpt, options, steps + PROFILED, folder, device)
    print(f"{header(run, options)}; medians of {steps} steps\n")
    parts = {part: median(times) for part, times in train(run, steps).items()}
    with profile() as profiled:
        train(run, PROFILED)
    whole = sum(parts.values())
    print("| part | ms a step | share |\n|---|---|---|")
    for part, value in parts.items():
        print(f"| {part} | {1e3 * value:.2f} | {value / whole:.0%} |")
    print(f"| all | {1e3 * whole:.2f} | |\n")
    entries = [entry for entry in profiled.key_averages() if "::" in entry.key]
    on = "self_device_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
    all_time = sum(getattr(entry, on) for entry in entries)
    print("| operation | calls a step | ms a step | share |\n|---|---|---|---|")
    for entry in sorted(entries, key=lambda entry: -getattr(entry, on))[:operations]:
        spent = getattr(entry, on)
        print(f"| {entry.key} | {entry.count / PROFILED:.0f} | {spent / 1e3 / PROFILED:.2f} | {spent / all_time:.0%} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="that are timed, of each program [200]")
    parser.add_argument("--operations", type=int, default=12, metavar="N", help="how many to list [12]")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a train_gpt.py to compare with")
    args, options = parser.parse_known_args()
    options, device = options or ["tiny"], train_gpt.join_ranks(600)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if args.against:
                print(compare(args.against, options, args.steps, folder, device))
            else:
                show_parts(options, args.steps, args.operations, folder, device)
        except (train_gpt.RunError, OSError) as error:
            sys.exit(f"step.py: {error}")


if __name__ == "__main__":
    main()
