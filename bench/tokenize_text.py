#!/usr/bin/env python3
"""Times data/local_text.py in GPT-2's BPE against a plain tiktoken process on each core, on the same text.

    python bench/tokenize_text.py --size_mb 100     # default: 1000, which takes about 6 minutes on 2 cores

The text is the Python sources of site-packages, again and again. The time of the plain processes leaves out their
starts, that of local_text.py is of the whole command. The CPU seconds, with all starts, say more on a busy machine.
"""

import argparse
import itertools
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.append(str(DATA))
from shards import load_bpe  # noqa: E402


def encode(encoding: str, paths: list[Path]) -> float:
    bpe, started = load_bpe(encoding), time.perf_counter()
    for path in paths:
        bpe.encode_ordinary(path.read_bytes().decode("utf-8", "replace"))
    return time.perf_counter() - started


def plain_processes(folder: str, encoding: str) -> tuple[float, str]:
    cores, paths = os.cpu_count(), sorted(Path(folder).iterdir())
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        seconds = pool.starmap(encode, [(encoding, paths[i::cores]) for i in range(cores)], chunksize=1)
    return sum(seconds) / cores, f"{cores} at once"


def local_text(folder: str, encoding: str) -> tuple[float, str]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, DATA / "local_text.py", folder, "--encoding", encoding, "--out", out]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("tokenize_text.py: local_text.py ended with an error")
    return time.perf_counter() - started, f"peak memory {usage.ru_maxrss / 1024:.0f} MB"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size_mb", type=float, default=1000, help="of the text (default: 1000)")
    parser.add_argument("--encoding", default="gpt2", help="as local_text.py takes it (default: gpt2)")
    args = parser.parse_args()
    sources, size = sorted(filter(Path.is_file, Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))), 0
    with tempfile.TemporaryDirectory() as folder:
        for number, source in enumerate(itertools.cycle(sources)):
            if size >= args.size_mb:
                break
            size += Path(folder, f"{number}.py").write_bytes(source.read_bytes()) / 1e6
        for run in (plain_processes, local_text, local_text, plain_processes):
            before = sum(os.times()[2:4])       # CPU seconds of the processes that have ended
            seconds, note = run(folder, args.encoding)
            cpu_seconds = sum(os.times()[2:4]) - before
            print(f"{run.__name__}: {size / seconds:.2f} MB/s, {cpu_seconds:.1f} CPU s, {note}", flush=True)


if __name__ == "__main__":
    main()
