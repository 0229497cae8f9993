#!/usr/bin/env python3
"""Turns a folder of text files into training and validation shards, with no network.

    python data/local_text.py                                  # the tiny track: Python sources of the installed torch
    python data/local_text.py ~/novels --out data/novels       # your own .txt and .md files, one token a byte
    python data/local_text.py ~/novels --out data/novels_gpt2 --encoding gpt2     # GPT-2 BPE, through tiktoken

Each file is a document: the end-of-text token, then its first 65,536 bytes (--max_bytes), so that no file dominates.
A document is validation where sha1(path) mod 20 is 0, with the path relative to the folder; documents stand in the
order of that hash. So the split does not change when files are added, and it is the same on every machine.
"""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
from shards import GPT2_VOCAB_SIZE, ShardError, ShardWriter, read_shard

TINY_FOLDER = Path(__file__).parent / "tiny"
VAL_ONE_IN = 20
# Folders of the torch package that hold what its build made, and its version: they differ from build to build.
BUILD_PATHS = ("version.py", "bin/", "include/", "lib/", "share/", "test/")


def find_documents(folder: Path, suffixes: list[str], skip: tuple[str, ...] = ()) -> list[tuple[bytes, Path]]:
    """Returns [(sha1 of the path relative to `folder`, path)] in the order of the hash."""
    documents = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder).as_posix()
        if path.suffix in suffixes and path.is_file() and not relative.startswith(skip):
            documents.append((hashlib.sha1(relative.encode()).digest(), path))
    return sorted(documents)


def byte_encoder():
    """Returns (function from bytes to uint16 tokens, vocabulary size): a byte a token, and the end-of-text token."""
    return lambda data: np.frombuffer(data, dtype=np.uint8).astype("<u2"), 257


def gpt2_encoder():
    """Returns (function from bytes to uint16 tokens, vocabulary size) for GPT-2's BPE (tiktoken's r50k_base)."""
    import tiktoken
    try:
        encoding = tiktoken.get_encoding("r50k_base")
    except Exception as error:     # tiktoken passes on whatever its HTTP client raises
        sys.exit(f"local_text.py: tiktoken could not load r50k_base ({error}); set TIKTOKEN_CACHE_DIR to a folder that "
                 "holds it, or use --encoding bytes")
    def encode(data):
        return np.array(encoding.encode_ordinary(data.decode("utf-8", "replace")), dtype="<u2")
    return encode, GPT2_VOCAB_SIZE


def write_split(path: Path, documents: list[Path], encode, vocab_size: int, max_bytes: int) -> int:
    end_of_text = np.array([vocab_size - 1], dtype="<u2")
    with ShardWriter(path, vocab_size) as shard:
        for document in documents:
            with open(document, "rb") as file:
                data = file.read(max_bytes)
            shard.write(np.concatenate([end_of_text, encode(data)]))
    return shard.num_tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder of text, read recursively (default: torch's)")
    parser.add_argument("--out", type=Path, help="folder for the shards (with no folder of text: data/tiny)")
    parser.add_argument("--suffixes", nargs="+", help="file endings taken (default: .txt .md; of torch's folder .py)")
    parser.add_argument("--encoding", choices=("bytes", "gpt2"), default="bytes", help="tokens (default: bytes)")
    parser.add_argument("--max_bytes", type=int, default=65536, help="bytes kept of each file (default: 65536)")
    parser.add_argument("--force", action="store_true", help="write the shards even where good ones are there")
    args = parser.parse_args()
    if args.folder and not args.out:
        parser.error("--out: name a folder for the shards of your text, such as --out data/mine")
    args.out = args.out or TINY_FOLDER
    train, val = args.out / "train_000000.bin", args.out / "val_000000.bin"

    if not args.force and train.exists() and val.exists():
        try:
            sizes = [len(read_shard(path)[0]) for path in (train, val)]
            print(f"{args.out}: {sizes[0]:,} training and {sizes[1]:,} validation tokens are there (--force rewrites)")
            return
        except ShardError as error:
            print(f"{error}: writing it again")

    if args.folder is None:
        folder, suffixes, skip = Path(importlib.util.find_spec("torch").origin).parent, [".py"], BUILD_PATHS
    else:
        folder, suffixes, skip = args.folder, [".txt", ".md"], ()
        if not folder.is_dir():
            sys.exit(f"local_text.py: {folder} is not a folder; give one that holds text files")
    suffixes = args.suffixes or suffixes
    documents = find_documents(folder, suffixes, skip)
    splits = {path: [document for digest, document in documents
                     if (int.from_bytes(digest, "big") % VAL_ONE_IN == 0) == (path == val)] for path in (train, val)}
    if not all(splits.values()):
        sys.exit(f"local_text.py: {folder} holds {len(documents)} files ending in {' '.join(suffixes)}, of which "
                 f"{len(splits[val])} fall to validation; both splits need one: give more files, or --suffixes")
    encode, vocab_size = byte_encoder() if args.encoding == "bytes" else gpt2_encoder()
    for path, paths in splits.items():
        num_tokens = write_split(path, paths, encode, vocab_size, args.max_bytes)
        print(f"{path}: {num_tokens:,} tokens of {len(paths):,} files, sha256 "
              f"{hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
