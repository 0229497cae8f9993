#!/usr/bin/env python3
"""Downloads pre-tokenized FineWeb-10B (GPT-2 BPE) shards from the Hugging Face hub, for the small track.

    python data/fineweb.py                   # the validation shard, and what the small preset's token budget needs
    python data/fineweb.py --num_shards 103  # all of it: 100M tokens and 200 MB a shard

Shards that are there and good are not fetched again. A shard is checked (header, size, tokens) before it gets its
name, so that whatever stands under a final name is whole. HF_ENDPOINT names another hub, HF_HOME its cache.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from shards import ShardError, read_shard

REPOSITORY = "kjj0/fineweb10B-gpt2"
SHARD_TOKENS = 100_000_000
MAX_SHARDS = 103


def shards_needed() -> int:
    """Returns the training shards that the small preset's token budget takes."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import train_gpt
    c = train_gpt.make_config(dict(track="small"))
    tokens = sum(train_gpt.batch_rows(c, step) for step in range(c.num_steps)) * c.seq_len
    return -(-tokens // SHARD_TOKENS)


def is_good(path: Path) -> bool:
    try:
        read_shard(path)
        return True
    except FileNotFoundError:
        return False
    except ShardError as error:
        print(f"{error}: fetching it again", file=sys.stderr)
        return False


def fetch(name: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    part = folder / ".part"
    try:
        fetched = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=part))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        sys.exit(f"fineweb.py: {name}: the download from {REPOSITORY} failed ({error}); run the same command again, it "
                 "goes on with the files that are missing")
    try:
        read_shard(fetched)
    except ShardError as error:
        fetched.unlink()
        sys.exit(f"fineweb.py: what the hub sent is no good shard: {error}; nothing was kept under its name")
    os.replace(fetched, folder / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_shards", type=int, help="training shards (default: what the small preset needs)")
    parser.add_argument("--data_dir", type=Path, default=Path(__file__).parent / "fineweb10B",
                        help="folder for the shards (default: data/fineweb10B)")
    args = parser.parse_args()
    num_shards = shards_needed() if args.num_shards is None else args.num_shards
    if not 0 < num_shards <= MAX_SHARDS:
        parser.error(f"--num_shards {num_shards}: there are 1 to {MAX_SHARDS}")
    args.data_dir.mkdir(parents=True, exist_ok=True)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, num_shards + 1))]
    missing = [name for name in names if not is_good(args.data_dir / name)]
    free, needed = shutil.disk_usage(args.data_dir).free, 2 * SHARD_TOKENS * len(missing)
    if free < needed:
        sys.exit(f"fineweb.py: {args.data_dir}: {len(missing)} shards need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                 "are free; name another folder with --data_dir, or fewer shards with --num_shards")
    for name in missing:
        fetch(name, args.data_dir)
    shutil.rmtree(args.data_dir / ".part", ignore_errors=True)
    print(f"{args.data_dir}: the validation shard and {num_shards} training shards are there")


if __name__ == "__main__":
    main()
