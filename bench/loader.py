#!/usr/bin/env python3
"""Times the loader of train_gpt.py: the share of training that waits for it, and its tokens/s against a plain copy.

    python bench/loader.py small --num_steps 50     # options of train_gpt.py; default: tiny, 200 steps, about a minute

The plain copy makes the same tensors of random tokens from rows in memory, which are known in advance.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "data")]
from shards import ShardWriter  # noqa: E402

import train_gpt  # noqa: E402

CASES = [("tiny, 1 process", 128, 1024, 1), ("small, 1 of 8 ranks", 1024, 524_288, 8),
         ("small, 1 process", 1024, 524_288, 1)]     # tokens of a row, tokens of a step, ranks


def within_training(options: list[str]) -> None:
    waits, load_batches = [], train_gpt.load_batches
    def timed(*arguments):
        loader = load_batches(*arguments)
        while True:
            asked = time.perf_counter()
            tokens = next(loader)
            waits.append(time.perf_counter() - asked)
            yield tokens

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train_gpt, "load_batches", timed):
        if train_gpt.main([*options, "--log_dir", folder, "--run_id", "run"]):
            sys.exit(2)     # its message stands above
        seconds = float(Path(folder, "run/log.txt").read_text().rpartition("train_seconds: ")[2].split()[0])
    print(f"waiting for data in {' '.join(options)}: {sum(waits):.3f} of {seconds:.1f} s, {sum(waits) / seconds:.3%}")


def alone(folder: str, tokens: int, seq_len: int, step_tokens: int, num_ranks: int) -> np.ndarray:
    """Returns the M tokens/s of the loader and of the plain copy, medians of the rounds."""
    with ShardWriter(Path(folder, "train.bin"), 50257) as shard:
        shard.write(np.random.default_rng(0).integers(0, 50257, size=tokens).astype("<u2"))
    c = argparse.Namespace(folder=Path(folder), document_tokens=0, seq_len=seq_len, vocab_size=50257, prepare="")
    rows = train_gpt.Rows("train.bin", c, 10**9)
    known_rows = rows.read(range(rows.count)).numpy()
    share = step_tokens // seq_len // num_ranks
    starts = list(range(0, rows.count * num_ranks + 1, share * num_ranks))
    order = train_gpt.training_order(rows.count, 0, range(starts[-1]))
    seconds = []
    for _ in range(7):     # the first warms up
        started = time.perf_counter()
        num_rows = sum(map(len, train_gpt.load_batches(rows, starts, 0, torch.device("cpu"))))
        between = time.perf_counter()
        for start in starts[:-1]:
            torch.from_numpy(known_rows[order[start:start + share]]).to(torch.int64)
        seconds.append((between - started, time.perf_counter() - between))
    return num_rows * seq_len / 1e6 / np.median(seconds[1:], axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="of the plain copy (default: 50 million)")
    args, options = parser.parse_known_args()
    within_training(options or "tiny --num_steps 200 --val_every 0 --val_tokens 65536".split())
    torch.set_num_threads(1)
    print("M tokens/s                loader  plain copy  ratio")
    for name, *case in CASES:
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(train_gpt, "ranks", return_value=(0, case[-1])):
            loader, plain = alone(folder, args.tokens, *case)
        print(f"{name:24}  {loader:6.0f}  {plain:10.0f}  {loader / plain:5.2f}")


if __name__ == "__main__":
    main()
