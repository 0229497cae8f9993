#!/usr/bin/env python3
"""Times the loader of train_gpt.py: alone, against a plain copy, and within training on tiny.

    python bench/loader.py                 # both parts, about a minute
    python bench/loader.py --steps 1000    # the share of a whole run of tiny spent waiting for data

Alone: tokens a second of load_batches, over shards of random tokens in a temporary folder, against a plain copy that
writes the same tensors: each step's rows, known in advance, gathered from one memory-mapped file and converted. As a
bound, the last column reads as many tokens in the order of the file instead, which no shuffled order can reach: rows
from all over the text miss the caches. The three are timed in turn (A B C C B A); the figures are medians. Within
training: data_wait_seconds over train_seconds of the run's summary.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from shards import ShardWriter  # noqa: E402

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
    for name, count, seq_len, step_tokens, ranks in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), count, tokens)
            rows = train_gpt.Rows("train_files", f"{folder}/train_*.bin", 50257, seq_len, 10**9)
            steps, share = tokens * ranks // step_tokens, step_tokens // seq_len // ranks
            positions = list(accumulate([share * ranks] * steps, initial=0))
            world = train_gpt.World(0, ranks, torch.device("cpu"), 60.0)
            order = rows.shuffled(0, np.arange(positions[-1]))
            with ShardWriter(Path(folder) / "whole.bin", 50257) as shard:     # the same rows in one file
                shard.write(np.concatenate([rows.read(np.arange(rows.num_rows))[:, :-1].flatten(), [0]]).astype("<u2"))
            whole = train_gpt.Rows("train_files", f"{folder}/whole.bin", 50257, seq_len, 10**9).windows[0]
            batches = [order[position:position + share] for position in positions[:-1]]

            def copy(indices, whole=whole):
                return [torch.from_numpy(whole[index]).to(torch.int64).shape for index in indices]

            def load(rows=rows, positions=positions, world=world):
                return [batch.shape for batch in train_gpt.load_batches(rows, positions, 0, world)]

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


def train_tiny(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train_gpt.py", "tiny", "--num_steps", str(steps), "--val_every", "0",
                   "--val_tokens", "16384", "--log_dir", folder, "--run_id", "run"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        if result.returncode:
            sys.exit(f"loader.py: the run failed:\n{result.stderr}")
        summary = json.loads((Path(folder) / "run/summary.json").read_text())
    waited, trained = summary["data_wait_seconds"], summary["train_seconds"]
    print(f"within training on tiny: {waited:.3f} s of {trained:.1f} s waiting for data, {100 * waited / trained:.3f}% "
          f"({steps} steps, {summary['hardware']}, torch {summary['torch']})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="tokens of the shards (default: 50 million)")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of A B B A (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="steps of training on tiny (default: 200)")
    args = parser.parse_args()
    compare_alone(args.tokens, args.blocks)
    train_tiny(args.steps)


if __name__ == "__main__":
    main()
