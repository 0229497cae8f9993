#!/usr/bin/env python3
"""Downloads pre-tokenized FineWeb-10B (GPT-2 BPE) shards from the Hugging Face hub, for the small track.

    python data/fineweb.py                          # validation, and what the small preset's token budget needs
    python data/fineweb.py --num_shards 103         # all of it: 100M tokens and 200 MB a shard
    python data/fineweb.py --dataset finewebedu     # FineWeb-Edu, into data/finewebedu10B: train_gpt.py's --train_files

A shard gets its final name only when it is whole: its size, header and range of tokens are checked, and its sha256
where the hub states one (it does for large files). Files that are there are checked the same way, but without the hub
and so without the sha256: nothing is fetched twice, and a machine with no network can start again. A bad file is kept
as NAME.corrupt and fetched again. Dropped connections, HTTP 429 and 5xx and bad files are tried again after growing
waits. Interrupted or killed: run the same command again. Several processes may run it at once, on several machines too
where they share a file system with locks (flock): each file is fetched once.

HF_ENDPOINT names another hub, HF_TOKEN a token; HF_HUB_DISABLE_XET=1 takes plain HTTP instead of the hub's Xet storage.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from filelock import FileLock
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, is_offline_mode
from huggingface_hub.utils import disable_progress_bars, logging
from shards import HEADER_BYTES, ShardError, read_shard
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

MAX_SHARDS = {"fineweb": 103, "finewebedu": 99}
SHARD_TOKENS = 100_000_000
SHARD_BYTES = HEADER_BYTES + 2 * SHARD_TOKENS
# On top of the client's own, which resume a dropped connection and wait after 429, but give up on a reset or a 5xx.
ATTEMPTS, LONGEST_WAIT = 10, 60     # the waits are 1, 2, 4 ... seconds: four minutes in all


def shards_needed() -> int:
    """Returns the training shards that the small preset's token budget takes."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import train_gpt
    c = train_gpt.make_config(dict(track="small"))
    tokens = sum(train_gpt.batch_rows(c, step) for step in range(c.num_steps)) * c.seq_len
    return -(-tokens // SHARD_TOKENS)


def say(message: str) -> None:
    tqdm.write(f"fineweb.py: {message}", file=sys.stderr)


def explain(error: BaseException) -> tuple[str, int, str]:
    """Returns (what happened in one line, HTTP status or 0, Retry-After or "")."""
    while error.__cause__:      # the client's own errors say little, their causes more
        error = error.__cause__
    if isinstance(error, ShardError):
        return f"no good shard: {error}".partition(";")[0], 0, ""
    response = getattr(error, "response", None)
    if response is None:
        return f"{type(error).__name__}: {error}".partition("\n")[0], 0, ""
    reason = response.headers.get("X-Error-Message") or response.reason_phrase
    return f"HTTP {response.status_code} {reason}", response.status_code, response.headers.get("Retry-After", "")


def problem(path: Path) -> str:
    """Returns "" for a good shard, and otherwise what is wrong."""
    try:
        read_shard(path)
        return ""
    except FileNotFoundError:
        return f"{path}: missing"
    except ShardError as error:
        return explain(error)[0]


def fetch(name: str, repository: str, folder: Path, sizes: dict[str, int]) -> None:
    """Puts a good shard under its final name, or raises; `sizes[name]` becomes its size in bytes.

    A lock for each file makes other processes wait; whoever gets it looks first whether the file has come meanwhile.
    """
    final, part, lock = folder / name, folder / ".part" / name, folder / ".part" / f"{name}.lock"
    with FileLock(lock):
        try:
            if what := problem(final):
                if final.exists():
                    os.replace(final, f"{final}.corrupt")
                    say(f"{what}; kept as {name}.corrupt, fetching it again")
                metadata = get_hf_file_metadata(hf_hub_url(repository, name, repo_type="dataset"))
                sizes[name] = metadata.size or SHARD_BYTES
                # Its own folder and cache, which a failure removes: the client shall not reuse what has gone wrong.
                path = Path(hf_hub_download(repository, name, repo_type="dataset", revision=metadata.commit_hash,
                                            local_dir=part, cache_dir=part / "cache"))
                read_shard(path)
                sha256 = hashlib.sha256(np.memmap(path, mode="r")).hexdigest()
                # The ETag of a large file is its sha256, that of a small one a git hash, which is shorter.
                if re.fullmatch("[0-9a-f]{64}", metadata.etag) and sha256 != metadata.etag:
                    raise ShardError(f"{path}: its sha256 is {sha256}, the hub states {metadata.etag}")
                with open(path, "rb") as file:
                    os.fsync(file.fileno())     # after a power cut, zeros under the final name would pass for tokens
                os.replace(path, final)
        finally:
            shutil.rmtree(part, ignore_errors=True)     # and what a killed process left there: the lock is ours
        sizes[name] = final.stat().st_size
        lock.unlink(missing_ok=True)    # safe: whoever still waits for this lock file finds a good shard


def fetch_with_retries(name: str, repository: str, folder: Path, sizes: dict[str, int]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return fetch(name, repository, folder, sizes)
        except Exception as error:      # of the client's HTTP and Xet libraries and the file system: no list is closed
            what, status, retry_after = explain(error)
            if attempt == ATTEMPTS or 400 <= status < 500 and status not in (408, 429):
                raise
            seconds = int(retry_after) if retry_after.isdigit() else min(2 ** (attempt - 1), LONGEST_WAIT)
            say(f"{name}: {what}; attempt {attempt + 1} of {ATTEMPTS} in {seconds} s")
            time.sleep(seconds)


def unfinished_bytes(folder: Path) -> int:
    """Returns the disk space under `folder`, where this process and others make and delete files meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(path, name)).st_blocks * 512      # Xet may write a file with holes
    return total


def fetch_all(names: list[str], repository: str, folder: Path, workers: int) -> dict[str, BaseException]:
    """Fetches `workers` files at a time, with a bar on a terminal, else a line a file; returns {name: error}.

    A file that the hub lacks, or has no good copy of, leaves the rest to go on. After any other error, which the rest
    would meet too, no further file is begun.
    """
    disable_progress_bars()     # the client's, one a file
    sizes, errors, fetched = dict.fromkeys(names, SHARD_BYTES), {}, 0
    with (ThreadPoolExecutor(workers) as pool, logging_redirect_tqdm([logging.get_logger()]),
          tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=None, desc=repository) as bar):
        waiting, pending = list(names), {}
        while waiting or pending:
            while waiting and len(pending) < workers:
                name = waiting.pop(0)
                pending[pool.submit(fetch_with_retries, name, repository, folder, sizes)] = name
            for future in wait(pending, timeout=0.5, return_when=FIRST_COMPLETED).done:
                name = pending.pop(future)
                if error := future.exception():
                    errors[name] = error
                    if not isinstance(error, ShardError) and explain(error)[1] != 404:
                        waiting.clear()
                else:
                    fetched += 1
                    if bar.disable:
                        print(f"{name}: {sizes[name] / 1e6:.1f} MB ({fetched} of {len(names)})", flush=True)
            bar.total = sum(sizes.values())
            there = sum(sizes[name] for name in names if (folder / name).exists())
            bar.n = min(bar.total, there + unfinished_bytes(folder / ".part"))
            bar.refresh()
    return errors


def complete(missing: list[str], repository: str, folder: Path, workers: int) -> None:
    """Fetches what is missing, or exits with a message."""
    part = folder / ".part"
    part.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder).free + unfinished_bytes(part), SHARD_BYTES * len(missing)
    if free < needed:
        sys.exit(f"fineweb.py: {folder}: {len(missing)} missing shards need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                 "are free; name another folder with --data_dir, or fewer shards with --num_shards")
    if is_offline_mode():
        sys.exit(f"fineweb.py: {folder}: {len(missing)} shards are missing, {missing[0]} is the first, and "
                 "HF_HUB_OFFLINE forbids to fetch them; unset it, or copy them there from another machine")
    print(f"{folder}: fetching {len(missing)} missing files of {repository}", flush=True)
    errors = fetch_all(missing, repository, folder, workers)
    with contextlib.suppress(OSError):      # it is not empty while another process, or an error, needs it
        part.rmdir()
    if errors:
        lines = "".join(f"\n  {name}: {explain(error)[0]}" for name, error in sorted(errors.items()))
        left = sum(not (folder / name).exists() for name in missing)
        sys.exit(f"fineweb.py: the hub {constants.ENDPOINT} (HF_ENDPOINT names another) did not give these files of "
                 f"{repository}:{lines}\n{left} of {len(missing)} files are still missing; run the same command again "
                 "to fetch only those; where a 401 or 403 says that a token is wanted, HF_TOKEN names it")


def stop(number, frame):
    """Ends at once, without waiting for the threads, at any moment: what they leave is hidden and the next run's."""
    os.write(2, b"\nfineweb.py: stopped; run the same command again, it goes on with the files that are missing\n")
    os._exit(128 + number)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=MAX_SHARDS, default="fineweb", help="default: fineweb")
    parser.add_argument("--num_shards", type=int, help="training shards (default: what the small preset needs)")
    parser.add_argument("--data_dir", type=Path, help="folder for the shards (default: data/fineweb10B or, for "
                        "finewebedu, data/finewebedu10B)")
    parser.add_argument("--workers", type=int, default=4, help="files at a time (default: 4)")
    args = parser.parse_args()
    num_shards = shards_needed() if args.num_shards is None else args.num_shards
    if not 0 < num_shards <= MAX_SHARDS[args.dataset]:
        parser.error(f"--num_shards {num_shards}: there are 1 to {MAX_SHARDS[args.dataset]}")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least 1 file at a time")
    folder = args.data_dir or Path(__file__).parent / f"{args.dataset}10B"
    repository = f"kjj0/{args.dataset}10B-gpt2"
    names = [f"{args.dataset}_val_000000.bin",
             *(f"{args.dataset}_train_{i:06d}.bin" for i in range(1, num_shards + 1))]
    try:
        missing = [name for name in names if problem(folder / name)]
        if missing:
            complete(missing, repository, folder, args.workers)
    except OSError as error:
        sys.exit(f"fineweb.py: {error}; name a folder that can be read and written with --data_dir")
    print(f"{folder}: the validation shard and {num_shards} training shards are there")


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    main()
