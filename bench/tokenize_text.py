#!/usr/bin/env python3
"""Times data/local_text.py in GPT-2 BPE against as many single tiktoken processes as there are cores, on the same text.

    python bench/tokenize_text.py                    # 1 GB; about 6 minutes on 2 cores
    python bench/tokenize_text.py --size_mb 100

The text is the Python sources of this interpreter's site-packages, again and again under other names, in a temporary
folder. A single process reads its share of the files and calls encode_ordinary on each; its time leaves out its start,
that of local_text.py is the whole command. The two take turns, A B B A. The CPU seconds, of both with their starts,
say more than the speeds where other work runs on the machine. The peak memory (VmHWM of /proc, so on Linux alone) of
each process of local_text.py is taken on a quarter of the text as well: it should be the same.

TIKTOKEN_CACHE_DIR must name a folder with r50k_base where there is no network. (This file is not tokenize.py, which
would hide the standard library's module of that name from every script in this folder.)
"""

import argparse
import multiprocessing
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

LOCAL_TEXT = Path(__file__).parent.parent / "data" / "local_text.py"
ORDER = "ABBA"      # A single processes, B local_text.py


def make_text(folder: Path, size: int) -> int:
    """Writes `size` bytes or a little more, a quarter into folder/quarter, else into folder/rest; returns the bytes."""
    sources = sorted(path for path in Path(sysconfig.get_paths()["purelib"]).rglob("*.py") if path.is_file())
    written, copy = 0, 0
    while written < size:
        for number, path in enumerate(sources):
            target = folder / ("quarter" if written < size / 4 else "rest") / f"{copy}" / f"{number}.py"
            target.parent.mkdir(parents=True, exist_ok=True)
            written += target.write_bytes(path.read_bytes())
            if written >= size:
                break
        copy += 1
    return written


def encode_share(paths: list[Path], barrier, results) -> None:
    """One single process: sends (bytes, seconds) of its share."""
    import tiktoken
    encoding, num_bytes = tiktoken.get_encoding("r50k_base"), 0
    encoding.encode_ordinary("warm up")
    barrier.wait()
    started = time.monotonic()
    for path in paths:
        data = path.read_bytes()
        encoding.encode_ordinary(data.decode("utf-8", "replace"))
        num_bytes += len(data)
    results.put((num_bytes, time.monotonic() - started))


def single_processes(folder: Path, num_cores: int) -> list[float]:
    """Returns the MB/s of each single process, all at the same time."""
    paths = sorted(folder.rglob("*.py"))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_cores), context.SimpleQueue()
    processes = [context.Process(target=encode_share, args=(paths[i::num_cores], barrier, results))
                 for i in range(num_cores)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(f"tokenize_text.py: a single process ended with exit code {process.exitcode}")
    return [num_bytes / 1e6 / seconds for num_bytes, seconds in (results.get() for _ in processes)]


def peaks_of(parent: int, peaks: dict[str, float]) -> None:
    """Updates {process: peak memory in MB} of a process and its children, as far as they are there."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for process in [str(parent), *children]:
            status = Path(f"/proc/{process}/status").read_text()
            if "VmHWM:" in status and (process == str(parent) or
                                       b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()):
                peaks[process] = int(status.split("VmHWM:")[1].split()[0]) / 1e3 * 1.024
    except (FileNotFoundError, ProcessLookupError):
        pass


def local_text(inputs: list[Path], num_cores: int) -> tuple[float, list[float]]:
    """Returns (seconds of the whole command, peak memory in MB: of the parent, then of its workers)."""
    with tempfile.TemporaryDirectory(prefix="tokenize_text_") as out:
        command = [sys.executable, LOCAL_TEXT, *inputs, "--suffixes", ".py", "--encoding", "gpt2", "--out", out,
                   "--workers", str(num_cores)]
        started, peaks = time.monotonic(), {}
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                peaks_of(process.pid, peaks)
                time.sleep(0.2)
        seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"tokenize_text.py: local_text.py ended with exit code {process.returncode}")
    return seconds, list(peaks.values())


def cpu_seconds() -> float:
    """Returns those of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def show_memory(size_mb: float, peaks: list[float]) -> None:
    if peaks:
        print(f"peak memory on {size_mb:,.0f} MB: parent {peaks[0]:.0f} MB, workers "
              f"{', '.join(f'{peak:.0f}' for peak in peaks[1:])} MB", flush=True)
    else:
        print("peak memory: not measured, there is no /proc here", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size_mb", type=int, default=1000, help="text to encode, in MB (default: 1000)")
    args = parser.parse_args()
    if args.size_mb < 1:
        parser.error(f"--size_mb {args.size_mb}: give at least 1")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="tokenize_text_") as name:
        folder = Path(name)
        megabytes = make_text(folder, args.size_mb * 10**6) / 1e6
        quarter = sum(path.stat().st_size for path in (folder / "quarter").rglob("*.py")) / 1e6
        print(f"{megabytes:,.1f} MB in {sum(1 for _ in folder.rglob('*.py')):,} files, {num_cores} cores", flush=True)
        show_memory(quarter, local_text([folder / "quarter"], num_cores)[1])
        speeds = {"A": [], "B": []}
        for turn in ORDER:
            before = cpu_seconds()
            if turn == "A":
                singles = single_processes(folder, num_cores)
                speeds[turn].append(sum(singles))
                print(f"single processes: {' + '.join(f'{speed:.2f}' for speed in singles)} = {sum(singles):.2f} MB/s, "
                      f"{cpu_seconds() - before:.1f} CPU s", flush=True)
            else:
                seconds, peaks = local_text([folder / "quarter", folder / "rest"], num_cores)
                speeds[turn].append(megabytes / seconds)
                print(f"local_text.py: {seconds:.1f} s = {speeds[turn][-1]:.2f} MB/s, "
                      f"{cpu_seconds() - before:.1f} CPU s", flush=True)
                show_memory(megabytes, peaks)
        a, b = (sum(speeds[turn]) / len(speeds[turn]) for turn in "AB")
        print(f"mean: single processes {a:.2f} MB/s, local_text.py {b:.2f} MB/s, ratio {b / a:.3f}")


if __name__ == "__main__":
    main()
