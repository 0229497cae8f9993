"""The shard format, written and read by every script in data/.

A shard is 256 int32 of header and then the tokens as uint16, all little-endian. Header fields: 0 the magic number,
1 the version, 2 the number of tokens, 3 the vocabulary size (0: GPT-2's), 4 the CRC-32 of the token bytes (0: none).
Fields 0-2 are what llm.c and modded-nanogpt read and write; they leave the rest 0 and ignore it.
train_gpt.py has its own short reader, since it imports nothing from the repository.
"""

import os
import zlib
from pathlib import Path

import numpy as np

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC, VERSION = 20240520, 1
GPT2_VOCAB_SIZE = 50257


class ShardError(ValueError):
    """A file is not a good shard; the message names the file and the remedy."""


def header_bytes(num_tokens: int, vocab_size: int, crc: int) -> bytes:
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:4] = MAGIC, VERSION, num_tokens, 0 if vocab_size == GPT2_VOCAB_SIZE else vocab_size
    header[4:5].view("<u4")[:] = crc
    return header.tobytes()


class ShardWriter:
    """Writes one shard under a temporary name beside `path`; the final name appears whole or not at all.

    Use as a context manager; `write` takes token ids (uint16). An exception inside the block removes the file.
    """

    def __init__(self, path: Path, vocab_size: int):
        self.path, self.vocab_size, self.num_tokens, self.crc = Path(path), vocab_size, 0, 0
        self.part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.part, "wb")
        self.file.write(bytes(HEADER_BYTES))
        return self

    def write(self, tokens: np.ndarray) -> None:
        if tokens.dtype != np.dtype("<u2"):
            raise ShardError(f"{self.path}: tokens are {tokens.dtype}, a shard holds uint16")
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise ShardError(f"{self.path}: token {int(tokens.max())} is outside the vocabulary of {self.vocab_size}")
        data = tokens.tobytes()
        self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.num_tokens += tokens.size

    def __exit__(self, error, *_):
        try:
            if error is None:
                self.file.seek(0)
                self.file.write(header_bytes(self.num_tokens, self.vocab_size, self.crc))
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.part, self.path)
        finally:
            self.file.close()
            self.part.unlink(missing_ok=True)


def read_shard(path: Path, checks: bool = True) -> tuple[np.ndarray, int]:
    """Returns (tokens as a read-only uint16 memory map, vocabulary size), or raises ShardError naming the file.

    `checks` also reads every token: their range, and the CRC-32 where the header states one.
    """
    path = Path(path)
    size = path.stat().st_size
    remedy = "delete it and prepare the data again"
    if size < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes is shorter than a shard's header of {HEADER_BYTES}; {remedy}")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    magic, version, num_tokens, vocab_size = (int(field) for field in header[:4])
    crc = int(header[4:5].view("<u4")[0])
    if magic != MAGIC or version != VERSION:
        raise ShardError(f"{path}: magic {magic} version {version}, a shard has {MAGIC} and {VERSION}; {remedy}")
    if size != HEADER_BYTES + 2 * num_tokens:
        raise ShardError(f"{path}: the header states {num_tokens} tokens ({HEADER_BYTES + 2 * num_tokens} bytes), "
                         f"the file has {size} bytes; {remedy}")
    vocab_size = vocab_size or GPT2_VOCAB_SIZE
    if num_tokens == 0:
        return np.empty(0, dtype="<u2"), vocab_size
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
    if checks:
        if int(tokens.max()) >= vocab_size:
            raise ShardError(f"{path}: token {int(tokens.max())} is outside the vocabulary of {vocab_size}; {remedy}")
        if crc and zlib.crc32(tokens) != crc:
            raise ShardError(f"{path}: the tokens do not match the checksum in the header; {remedy}")
    return tokens, vocab_size
