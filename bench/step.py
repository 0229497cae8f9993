#!/usr/bin/env python3
"""Times the parts of a training step, and the operations within them.

    python bench/step.py                            # tiny, on the device that training would take
    OMP_NUM_THREADS=1 python bench/step.py tiny --num_layers 3 --steps 50     # and any option of train_gpt.py

A part is timed by itself, so a GPU waits between two of them, as it does not in training. The operations are from
torch's profiler, by the time within each alone, over steps that are not timed.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402

WARM_UP, PROFILED = 3, 5    # steps


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


def train(run, steps: int) -> dict[str, list[float]]:
    """Makes the steps of one rank, and returns the seconds of each part. Several micro-batches count as one part."""
    loader, clock = train_gpt.load_batches(run.train_rows, run.starts, run.config.seed, run.device), Clock(run.device)
    for _ in range(steps):
        clock.start()
        tokens = next(loader)
        clock.stop("loader")
        train_gpt.accumulate_gradients(run.model, tokens, run.micro_batch)
        clock.stop("forward and backward")
        train_gpt.set_schedules(run.optimizers, run.config, run.step)
        for name, optimizer in run.optimizers.items():
            optimizer.step()
            clock.stop(name)
        run.step += 1
    return clock.seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="that are timed [30]")
    parser.add_argument("--operations", type=int, default=12, metavar="N", help="how many to list [12]")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        total = WARM_UP + args.steps + PROFILED
        given = train_gpt.parse_command_line(
            [*(options or ["tiny"]), "--num_steps", str(total), "--log_dir", folder])
        try:
            run = train_gpt.set_up(train_gpt.make_config(given), train_gpt.join_ranks(600), {})
        except train_gpt.RunError as error:
            sys.exit(f"step.py: {error}")
        train(run, WARM_UP)
        seconds = train(run, args.steps)
        with profile() as profiled:
            train(run, PROFILED)
    parts = {part: median(times) for part, times in seconds.items()}
    whole = sum(parts.values())
    print(f"{' '.join(options) or 'tiny'}: {train_gpt.describe_hardware(run.device)}, torch {torch.__version__}, "
          f"{run.config.dtype}, attention {run.attention}; medians of {args.steps} steps\n")
    print("| part | ms a step | share |\n|---|---|---|")
    for part, value in parts.items():
        print(f"| {part} | {1e3 * value:.2f} | {value / whole:.0%} |")
    print(f"| all | {1e3 * whole:.2f} | |\n")
    operations = [entry for entry in profiled.key_averages() if "::" in entry.key]
    on = "self_device_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
    all_time = sum(getattr(entry, on) for entry in operations)
    print("| operation | calls a step | ms a step | share |\n|---|---|---|---|")
    for entry in sorted(operations, key=lambda entry: -getattr(entry, on))[:args.operations]:
        spent = getattr(entry, on)
        print(f"| {entry.key} | {entry.count / PROFILED:.0f} | {spent / 1e3 / PROFILED:.2f} | {spent / all_time:.0%} |")


if __name__ == "__main__":
    main()
