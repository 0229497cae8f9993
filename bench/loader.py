#!/usr/bin/env python3
"""Times the loader of train_gpt.py: within training, and alone, against a plain copy.

    python bench/loader.py                                  # both parts, about a minute
    python bench/loader.py --steps 50 --tokens 0 small      # training alone, with options of train_gpt.py

Within training (default: tiny): the share of the time in which training waits for the loader.

Alone: tokens a second of load_batches, over shards of random tokens in a temporary folder, against a plain copy that
writes the same tensors: each step's rows, known in advance, gathered from one memory-mapped file and converted. As a
bound, the last column reads as many tokens in the order of the file instead, which no shuffled order can reach: rows
from all over the text miss the caches. The three are timed in turn (A B C C B A); the figures are medians.
"""

import argparse
import copy
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from shards import HEADER_BYTES, ShardWriter  # noqa: E402

import train_gpt  # noqa: E402

CASES = [     # name, shards, row's tokens, tokens of a step, ranks
    ("tiny, 1 process", 1, 256, 1024, 1),
    ("small, 8 ranks", 25, 1024, 524_288, 8),
    ("small, 1 process", 25, 1024, 524_288, 1),
]


def write_shards(folder: Path, count: int, tokens: int) -> None:
    random = np.random.default_rng(0)
    for i in range(count):
        with ShardWriter(folder / f"train_{i:06d}.bin", 50257) as shard:
            shard.write(random.integers(0, 50257, size=tokens // count + 37 * i).astype("<u2"))     # unequal lengths


def compare_alone(tokens: int, blocks: int) -> None:
    torch.set_num_threads(1)
    print(f"M tokens/s, medians of {2 * blocks}   loader  plain copy  ratio  in file order")
    for name, count, seq_len, step_tokens, processes in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), count, tokens)
            c = SimpleNamespace(seq_len=seq_len, vocab_size=50257, prepare="")
            rows = train_gpt.Rows("train_files", f"{folder}/train_*.bin", c, 10**9)
            steps, share = tokens * processes // step_tokens, step_tokens // seq_len // processes
            positions = [share * processes * step for step in range(steps + 1)]
            order = train_gpt.training_order(rows.count, 0, range(positions[-1]))
            with ShardWriter(Path(folder) / "whole.bin", 50257) as shard:     # the same rows in one file
                shard.write(np.append(rows.read(range(rows.count))[:, :-1], 0).astype("<u2"))
            whole = np.memmap(f"{folder}/whole.bin", dtype="<u2", mode="c", offset=HEADER_BYTES)
            whole = np.lib.stride_tricks.sliding_window_view(whole, seq_len + 1, writeable=True)[::seq_len]     # rows
            batches = [order[position:position + share] for position in positions[:-1]]

            def copy(indices, whole=whole):
                return [torch.from_numpy(whole[index]).to(torch.int64).shape for index in indices]

            def load(rows=rows, positions=positions, processes=processes):
                with mock.patch.object(train_gpt, "ranks", lambda: (0, processes)):
                    return [batch.shape for batch in train_gpt.load_batches(rows, positions, 0, torch.device("cpu"))]

            runs = dict(loader=load, plain=lambda b=batches, c=copy: c(b),
                        in_order=lambda n=share, k=steps, c=copy: c(slice(i * n, i * n + n) for i in range(k)))
            times = {which: [] for which in runs}
            for block in range(blocks + 1):
                for which in (*runs, *reversed(runs)):
                    started = time.perf_counter()
                    shapes = runs[which]()
                    times[which] += [time.perf_counter() - started] if block else []     # the first warms up
                    assert shapes == [(share, seq_len + 1)] * steps
            speed = {which: steps * share * seq_len / statistics.median(t) / 1e6 for which, t in times.items()}
            ratio = speed["loader"] / speed["plain"]
            print(f"{name:24}  {speed['loader']:6.0f}  {speed['plain']:10.0f}  {ratio:5.2f}  {speed['in_order']:13.0f}",
                  flush=True)


def within_training(steps: int, options: list[str]) -> None:
    given = dict(track="tiny") | train_gpt.parse_command_line(options) | dict(num_steps=steps)
    c, device = train_gpt.make_config(given), train_gpt.join_ranks(600)
    run = train_gpt.set_up(c, device, {})
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a run would save and stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run.log = lambda text, console=True: None
    train_gpt.prime(run, copy.deepcopy(run.state.state_dict()))
    loader = train_gpt.load_batches(run.train_rows, run.starts, c.seed, device)
    waited, run.clock = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        asked = time.perf_counter()
        tokens = next(loader)
        waited += time.perf_counter() - asked
        train_gpt.train_step(run, tokens)
        if device.type == "cpu" or step % 10 == 0 or step == steps:
            train_gpt.read_steps(run)
    trained = run.state.seconds
    print(f"within training on {c.track}: {waited:.3f} s of {trained:.1f} s waiting for data, {waited / trained:.3%} "
          f"({steps} steps, {train_gpt.describe_hardware(device)}, torch {torch.__version__})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=50_000_000,
                        help="tokens of the shards (default: 50 million; 0: no part alone)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of A B B A (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="steps of training (default: 200)")
    args, options = parser.parse_known_args()
    try:
        within_training(args.steps, options)
    except train_gpt.RunError as error:
        sys.exit(f"loader.py: {error}")
    if args.tokens:
        compare_alone(args.tokens, args.blocks)


if __name__ == "__main__":
    main()
