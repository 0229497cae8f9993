#!/usr/bin/env python3
"""Downloads pre-tokenized FineWeb-10B (GPT-2 BPE) shards from the Hugging Face hub, for the small track.

    python data/fineweb.py                      # validation, and what the small track's token budget needs
    python data/fineweb.py --num_shards 103     # all of it: 100M tokens and 200 MB per shard; FineWeb-Edu has 99

A file gets its final name when it is a good shard and has the sha256 that the hub states. Good ones that are there need
no network. The same command goes on after an error, Ctrl-C or a kill. HF_ENDPOINT names another hub, HF_TOKEN a token.
"""

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock
from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
from shards import ShardError, read_shard, sha256


def is_good(path: Path) -> bool:
    try:
        return path.exists() and bool(read_shard(path))
    except ShardError:
        return False


def fetch(missing: list[str], repository: str, folder: Path) -> None:
    """Tries once; takes the files that arrive whole from `missing`, and raises what keeps the others."""
    info, part = HfApi().dataset_info(repository, files_metadata=True), folder / ".part"
    wanted = [file for file in info.siblings if file.rfilename in missing]
    if len(wanted) < len(missing):
        sys.exit(f"fineweb.py: {repository} at {constants.ENDPOINT} has no {missing[-1]}; give a smaller --num_shards")
    if sum(file.size for file in wanted) > shutil.disk_usage(folder).free:
        sys.exit(f"fineweb.py: {folder}: has no space for {len(wanted)} files of 200 MB; give another --data_dir")
    try:
        snapshot_download(repository, repo_type="dataset", revision=info.sha, allow_patterns=missing, local_dir=part,
                          cache_dir=part / "cache", max_workers=8)
    finally:
        for file in wanted:
            fetched = part / file.rfilename
            if is_good(fetched) and (file.lfs is None or file.lfs.sha256 == sha256(fetched)):
                fetched.replace(folder / file.rfilename)
                missing.remove(file.rfilename)
            fetched.unlink(missing_ok=True)
    if missing:
        raise ValueError("files that came are not good shards, or have another sha256 than the hub states")


def fetch_all(missing: list[str], repository: str, folder: Path) -> None:
    waits = [1, 2, 4, 8, 16, 32, 60, 60, 60]    # seconds, on top of the client's own
    while missing:
        try:
            fetch(missing, repository, folder)
        except Exception as error:      # of the client's HTTP and Xet libraries, and of the disk: no list is complete
            cause = error.__cause__ or error
            status = getattr(getattr(cause, "response", None), "status_code", 0)
            problem = f"fineweb.py: {constants.ENDPOINT}: {str(cause).splitlines()[0]}; missing: {', '.join(missing)}"
            if not waits or is_offline_mode() or status in (401, 403, 404):
                sys.exit(f"{problem}; the same command goes on (--help tells of HF_TOKEN and HF_ENDPOINT)")
            print(f"{problem}; trying again in {waits[0]} s", file=sys.stderr)
            time.sleep(waits.pop(0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("fineweb", "finewebedu"), default="fineweb", help="default: fineweb")
    parser.add_argument("--num_shards", type=int, help="training shards (default: what the small track needs)")
    parser.add_argument("--data_dir", type=Path, help="folder for the shards (default: data/DATASET10B)")
    args = parser.parse_args()
    if args.num_shards is None:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        import train_gpt
        c = train_gpt.make_config(dict(track="small"))
        tokens = c.seq_len * sum(train_gpt.batch_rows(c, step) for step in range(c.num_steps))
        kept = 7 * 10**7 if c.document_tokens else 10**8    # at least, of a shard's 100M: long documents are cut
        args.num_shards = -(-tokens // kept)
    folder = args.data_dir or Path(__file__).parent / f"{args.dataset}10B"
    names = [f"{args.dataset}_train_{i:06d}.bin" for i in range(1, args.num_shards + 1)]
    missing = [name for name in [f"{args.dataset}_val_000000.bin", *names] if not is_good(folder / name)]
    try:
        if missing:
            with FileLock(folder / ".lock"):        # which makes the folder
                missing = [name for name in missing if not is_good(folder / name)]
                fetch_all(missing, f"kjj0/{args.dataset}10B-gpt2", folder)
                shutil.rmtree(folder / ".part", ignore_errors=True)
    except OSError as error:
        sys.exit(f"fineweb.py: --data_dir {folder}: {error}; name a folder that can be written to")
    print(f"{folder}: the validation shard and {args.num_shards} training shards are there")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # ends at once, without waiting for the threads
    main()
