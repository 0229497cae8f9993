#!/usr/bin/env python3
"""The shard format: written and read by every program in data/, and checked and shown from the command line.

    python data/shards.py verify 'data/fineweb10B/*.bin'     # every check, a line for each file
    python data/shards.py info data/tiny/val_000000.bin      # also its documents, its sha256 and how it starts

A shard is 256 int32 of header and then the tokens as uint16, all little-endian. Header fields: 0 the magic number,
1 the version, 2 the number of tokens, 3 the size of the vocabulary (0: GPT-2's), 4 the CRC-32 of the token bytes
(0: none). llm.c and modded-nanogpt read and write fields 0 to 2; they leave the rest 0 and ignore it. The last id of
the vocabulary is the end-of-text token, which stands before each document. train_gpt.py has its own short reader.
"""

import argparse
import base64
import contextlib
import glob
import hashlib
import os
import sys
import zlib
from pathlib import Path

import numpy as np

HEADER_BYTES = 1024
MAGIC, VERSION = 20240520, 1
MAX_VOCAB_SIZE = 2**16      # what a uint16 can name
GPT2_VOCAB_SIZE = 50257
BYTES_VOCAB_SIZE = 257
REMEDY = "delete it and prepare the data again"


class ShardError(ValueError):
    """A file is not a good shard, or cannot be made into one; the message names the file and the remedy."""


class ShardWriter:
    """Writes a shard under a temporary name, which becomes `path` at the end of the `with` block unless that raised."""

    def __init__(self, path: Path, vocab_size: int):
        self.path, self.vocab_size = Path(path), vocab_size
        self.num_tokens, self.checksum = 0, 0
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.part, "wb")
        self.file.write(bytes(HEADER_BYTES))
        return self

    def write(self, tokens: np.ndarray) -> None:
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            raise ShardError(f"{self.path}: token {largest} is outside the vocabulary of {self.vocab_size}")
        data = tokens.astype("<u2", casting="safe").tobytes()
        self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.num_tokens += tokens.size

    def __exit__(self, error, *_):
        try:
            if error is None:
                header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
                stated_size = 0 if self.vocab_size == GPT2_VOCAB_SIZE else self.vocab_size
                header[:4] = MAGIC, VERSION, self.num_tokens, stated_size
                header.view("<u4")[4] = self.checksum
                self.file.seek(0)
                self.file.write(header.tobytes())
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.part, self.path)
        finally:
            self.file.close()
            self.part.unlink(missing_ok=True)


class SeriesWriter(contextlib.ExitStack):
    """Writes folder/NAME_000000.bin, NAME_000001.bin, ... of `shard_tokens` tokens each, the last one of what is left.

    Also for a `with` block; where that raises, the shards that were full stay.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int, shard_tokens: int):
        super().__init__()
        self.folder, self.name, self.vocab_size, self.shard_tokens = folder, name, vocab_size, shard_tokens
        self.paths, self.num_tokens, self.shard = [], 0, None

    def write(self, tokens: np.ndarray) -> None:
        while tokens.size:
            if self.shard is None:
                self.paths.append(self.folder / f"{self.name}_{len(self.paths):06d}.bin")
                self.shard = self.enter_context(ShardWriter(self.paths[-1], self.vocab_size))
            room = self.shard_tokens - self.shard.num_tokens
            self.shard.write(tokens[:room])
            self.num_tokens += tokens[:room].size
            tokens = tokens[room:]
            if self.shard.num_tokens == self.shard_tokens:
                self.close()
                self.shard = None


def read_header(path: Path) -> tuple[int, int, int]:
    """Returns (number of tokens, vocabulary size, CRC-32 or 0); raises ShardError where no shard has such a header."""
    size = Path(path).stat().st_size
    header = np.fromfile(path, dtype="<i4", count=HEADER_BYTES // 4)
    if header[:1].tolist() != [MAGIC]:      # perhaps a file of another program, which nobody should delete
        raise ShardError(f"{path}: not a shard, as it does not begin with {MAGIC}; name shards only, or prepare the "
                         "data again")
    if size < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes are less than a shard's header of {HEADER_BYTES}; {REMEDY}")
    version, num_tokens, vocab_size = header[1:4].tolist()
    whole = (version, size) == (VERSION, HEADER_BYTES + 2 * num_tokens)
    if not whole or not 0 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ShardError(f"{path}: damaged: version {version}, {num_tokens} tokens and vocabulary {vocab_size} in a "
                         f"file of {size} bytes; {REMEDY}")
    return num_tokens, vocab_size or GPT2_VOCAB_SIZE, int(header.view("<u4")[4])


def read_shard(path: Path) -> tuple[np.ndarray, int]:
    """Returns (tokens as a read-only memory map of uint16, vocabulary size) after every check; raises ShardError."""
    _, vocab_size, checksum = read_header(path)
    tokens = np.memmap(path, dtype="<u2", mode="r")[HEADER_BYTES // 2:]
    largest = int(tokens.max(initial=0))
    if largest >= vocab_size:
        raise ShardError(f"{path}: token {largest} is outside the vocabulary of {vocab_size}; {REMEDY}")
    if checksum and zlib.crc32(tokens) != checksum:
        raise ShardError(f"{path}: the tokens do not match the checksum in the header; {REMEDY}")
    return tokens, vocab_size


def sha256(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


def load_bpe(encoding: str):
    """Returns the tiktoken.Encoding of "gpt2", or of a file of ranks in tiktoken's format, with GPT-2's split."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    if encoding == "gpt2":
        try:
            return tiktoken.get_encoding("r50k_base")
        except Exception as error:      # tiktoken passes on whatever its HTTP client raises
            raise ShardError(f"cannot load r50k_base ({error}); TIKTOKEN_CACHE_DIR may name its folder") from error
    try:
        pairs = [line.split() for line in Path(encoding).read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
        if not has_all_bytes or sorted(ranks.values()) != list(range(len(pairs))) or len(pairs) >= MAX_VOCAB_SIZE:
            raise ValueError(f"{len(pairs)} tokens")
    except (OSError, ValueError) as error:
        raise ShardError(f"{encoding}: not BPE ranks ({error}); each line is a token in base64 and its rank, from 0 to "
                         "at most 65,534, and all 256 single bytes are tokens") from error
    return tiktoken.Encoding(encoding, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def verify(path: str) -> str:
    tokens, vocab_size = read_shard(path)
    checksum = read_header(path)[2]
    checked = "checksum matches" if checksum else "no checksum: a changed token inside the vocabulary cannot be told"
    return f"{path}: good: {len(tokens):,} tokens, vocabulary {vocab_size:,}, {checked}"


def info(path: str) -> str:
    tokens, vocab_size = read_shard(path)
    start = tokens[:100].tolist()
    if vocab_size == BYTES_VOCAB_SIZE:
        start = b"".join(b"<|endoftext|>" if token == 256 else bytes([token]) for token in start)
    elif vocab_size == GPT2_VOCAB_SIZE:
        start = load_bpe("gpt2").decode(start)
    return (f"{verify(path)}\n  documents: {np.count_nonzero(tokens == vocab_size - 1):,}\n"
            f"  sha256: {sha256(path)}\n  starts with: {start}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("verify", "info"))
    parser.add_argument("files", nargs="+", metavar="FILE", help="a shard, or a pattern in quotes")
    args = parser.parse_args(arguments)
    show = dict(verify=verify, info=info)[args.command]
    num_bad = 0
    for pattern in args.files:
        for path in sorted(glob.glob(pattern)) or [pattern]:
            try:
                print(show(path))
            except (ShardError, OSError) as error:
                num_bad += 1
                print(f"bad: {error}")
    sys.exit(num_bad > 0)


if __name__ == "__main__":
    main()
