#!/usr/bin/env python3
"""The shard format, written and read by every script in data/; shows, checks, joins and cuts shards.

    python data/shards.py inspect data/tiny/val_000000.bin                # header, tokens, documents, an excerpt
    python data/shards.py verify data/fineweb10B/*.bin                    # every check; exit code 1 if one is bad
    python data/shards.py merge a.bin b.bin --out both.bin                # the tokens of a, then those of b
    python data/shards.py split both.bin --tokens 1000000 --out pieces    # pieces/both_000000.bin, ...

A shard is 256 int32 of header and then the tokens as uint16, all little-endian. Header fields: 0 the magic number,
1 the version, 2 the number of tokens, 3 the vocabulary size (0: GPT-2's), 4 the CRC-32 of the token bytes (0: none).
Fields 0-2 are what llm.c and modded-nanogpt read and write; they leave the rest 0 and ignore it. The last id of the
vocabulary is the end-of-text token, which stands before each document.
train_gpt.py has its own short reader, since it imports nothing from the repository.
"""

import argparse
import base64
import hashlib
import os
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC, VERSION = 20240520, 1
MAX_TOKENS = 2**31 - 1                     # what an int32 of the header can count
MAX_VOCAB_SIZE = 2**16                     # what a uint16 can name
GPT2_VOCAB_SIZE, BYTES_VOCAB_SIZE = 50257, 257
CHUNK_TOKENS = 2**22                       # read at once, so that memory does not grow with the shard
EXCERPT_TOKENS = 200
REMEDY = "delete it and prepare the data again"


class ShardError(ValueError):
    """A file is not a good shard, or not what a shard needs; the message names the file and the remedy."""


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
        if self.num_tokens + tokens.size > MAX_TOKENS:
            raise ShardError(f"{self.path}: a shard counts up to {MAX_TOKENS:,} tokens; write several")
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


class SeriesWriter:
    """Writes tokens as folder/NAME_000000.bin, NAME_000001.bin, ...: `shard_tokens` in each, what is left in the last.

    Use as a context manager. No tokens make no shard. An exception inside the block removes all of them.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int, shard_tokens: int):
        self.folder, self.name, self.vocab_size, self.shard_tokens = folder, name, vocab_size, shard_tokens
        self.paths, self.num_tokens, self.shard = [], 0, None

    def __enter__(self):
        return self

    def write(self, tokens: np.ndarray) -> None:
        while tokens.size:
            if self.shard is None:
                self.paths.append(self.folder / f"{self.name}_{len(self.paths):06d}.bin")
                self.shard = ShardWriter(self.paths[-1], self.vocab_size).__enter__()
            room = self.shard_tokens - self.shard.num_tokens
            self.shard.write(tokens[:room])
            self.num_tokens += tokens[:room].size
            tokens = tokens[room:]
            if self.shard.num_tokens == self.shard_tokens:
                self.close_shard(None)

    def close_shard(self, error) -> None:
        shard, self.shard = self.shard, None
        if shard:
            shard.__exit__(error)

    def __exit__(self, error, *_):
        self.close_shard(error)
        if error:
            for path in self.paths:
                path.unlink(missing_ok=True)


def read_header(path: Path) -> tuple[int, int, int]:
    """Returns (tokens, vocabulary size, CRC-32 or 0), or raises ShardError where they cannot be a shard's."""
    size = Path(path).stat().st_size
    if size < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes is shorter than a shard's header of {HEADER_BYTES}; {REMEDY}")
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    magic, version, num_tokens, vocab_size = (int(field) for field in header[:4])
    if magic != MAGIC or version != VERSION:
        raise ShardError(f"{path}: magic {magic} version {version}, a shard has {MAGIC} and {VERSION}; {REMEDY}")
    if size != HEADER_BYTES + 2 * num_tokens:
        raise ShardError(f"{path}: the header states {num_tokens} tokens ({HEADER_BYTES + 2 * num_tokens} bytes), "
                         f"the file has {size} bytes; {REMEDY}")
    if not 0 <= vocab_size <= MAX_VOCAB_SIZE:
        raise ShardError(f"{path}: the header states a vocabulary of {vocab_size}, uint16 tokens have up to "
                         f"{MAX_VOCAB_SIZE}; {REMEDY}")
    return num_tokens, vocab_size or GPT2_VOCAB_SIZE, int(header[4:5].view("<u4")[0])


def read_chunks(path: Path) -> Iterator[np.ndarray]:
    """Yields the tokens of a shard (uint16), a bounded number at once."""
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        while (tokens := np.fromfile(file, dtype="<u2", count=CHUNK_TOKENS)).size:
            yield tokens


def read_shard(path: Path, checks: bool = True) -> tuple[np.ndarray, int]:
    """Returns (tokens as a read-only uint16 memory map, vocabulary size), or raises ShardError naming the file.

    `checks` also reads every token: their range, and the CRC-32 where the header states one.
    """
    num_tokens, vocab_size, stated = read_header(path)
    if checks:
        crc = 0
        for tokens in read_chunks(path):
            crc = zlib.crc32(tokens, crc)
            if (top := int(tokens.max())) >= vocab_size:
                raise ShardError(f"{path}: token {top} is outside the vocabulary of {vocab_size}; {REMEDY}")
        if stated and crc != stated:
            raise ShardError(f"{path}: the tokens do not match the checksum in the header; {REMEDY}")
    if num_tokens == 0:     # nothing that could be mapped
        return np.empty(0, dtype="<u2"), vocab_size
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES), vocab_size


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(2 * CHUNK_TOKENS):
            digest.update(data)
    return digest.hexdigest()


def load_bpe(file: Path | None = None):
    """Returns the tiktoken.Encoding of GPT-2's BPE, or of a file of ranks in tiktoken's format with GPT-2's split.

    The end-of-text token is the id after the last rank. Raises ShardError.
    """
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str
    if file is None:
        try:
            return tiktoken.get_encoding("r50k_base")
        except Exception as error:     # tiktoken passes on whatever its HTTP client raises
            raise ShardError(f"tiktoken could not load r50k_base ({error}); set TIKTOKEN_CACHE_DIR to a folder that "
                             "holds it") from error
    try:     # not by tiktoken's own reader: that one caches by name, and gives back the old file after a change
        pairs = [line.split() for line in Path(file).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (OSError, ValueError) as error:
        raise ShardError(f"{file}: not a file of BPE ranks ({error}); a line is a token in base64, a space, and its "
                         "rank") from error
    if sorted(ranks.values()) != list(range(len(pairs))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ShardError(f"{file}: the {len(pairs)} ranks must be 0, 1, 2, ... with a token each, all 256 single bytes "
                         "among them; train or export the tokenizer anew")
    if len(ranks) >= MAX_VOCAB_SIZE:
        raise ShardError(f"{file}: {len(ranks)} tokens and end-of-text do not fit a shard's uint16; use a "
                         f"vocabulary of at most {MAX_VOCAB_SIZE}")
    return tiktoken.Encoding(str(file), pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


def excerpt(path: Path, vocab_size: int, ranks: Path | None) -> str:
    tokens = next(read_chunks(path), np.empty(0, dtype="<u2"))[:EXCERPT_TOKENS].tolist()
    if vocab_size == BYTES_VOCAB_SIZE and not ranks:
        text = b"".join(b"<|endoftext|>" if token == 256 else bytes([token]) for token in tokens)
        return repr(text.decode("utf-8", "replace"))
    if vocab_size != GPT2_VOCAB_SIZE and not ranks:
        return f"{tokens} (no tokenizer for {vocab_size} is known; --tiktoken names one)"
    try:
        encoding = load_bpe(ranks)
    except ShardError as error:
        if ranks:
            raise
        return f"{tokens} ({error})"
    if encoding.n_vocab != vocab_size:
        raise ShardError(f"{ranks}: has a vocabulary of {encoding.n_vocab}, but {path} one of {vocab_size}; give "
                         "--tiktoken the tokenizer of this shard")
    return repr(encoding.decode(tokens))


def inspect(path: Path, ranks: Path | None) -> str:
    num_tokens, vocab_size, crc = read_header(path)
    read_shard(path)
    documents = sum(int(np.count_nonzero(tokens == vocab_size - 1)) for tokens in read_chunks(path))
    return "\n".join([f"{path}",
                      f"  header: magic {MAGIC}, version {VERSION}",
                      f"  tokens: {num_tokens:,}",
                      f"  vocabulary: {vocab_size:,}",
                      f"  documents: {documents:,} (end-of-text tokens, id {vocab_size - 1})",
                      f"  checksum: {f'yes, CRC-32 {crc:#010x}, matches' if crc else 'no'}",
                      f"  sha256: {sha256(path)}",
                      f"  excerpt: {excerpt(path, vocab_size, ranks)}"])


def verify(path: Path) -> str:
    num_tokens, vocab_size, crc = read_header(path)
    read_shard(path)
    return (f"{path}: good: {num_tokens:,} tokens, vocabulary {vocab_size:,}, " +
            ("checksum matches" if crc else "no checksum: a changed token inside the vocabulary cannot be told"))


def merge(paths: list[Path], out: Path) -> str:
    headers = {path: read_header(path) for path in paths}
    vocab_sizes = {path: vocab_size for path, (_, vocab_size, _) in headers.items()}
    if len(set(vocab_sizes.values())) > 1:
        raise ShardError("shards of several vocabularies cannot be merged: " +
                         ", ".join(f"{path}: {vocab_size}" for path, vocab_size in vocab_sizes.items()))
    if (total := sum(headers[path][0] for path in paths)) > MAX_TOKENS:
        raise ShardError(f"{out}: {total:,} tokens, but a shard counts up to {MAX_TOKENS:,}; merge fewer")
    if out.exists():
        raise ShardError(f"{out}: is there; give --out another name, or delete it")
    with ShardWriter(out, vocab_sizes[paths[0]]) as shard:
        for path in paths:
            read_shard(path)
            for tokens in read_chunks(path):
                shard.write(tokens)
    return f"{out}: {total:,} tokens of {len(paths)} shards, sha256 {sha256(out)}"


def split(path: Path, shard_tokens: int, folder: Path) -> str:
    num_tokens, vocab_size, _ = read_header(path)
    read_shard(path)
    for number in range(-(-num_tokens // shard_tokens)):
        if (piece := folder / f"{path.stem}_{number:06d}.bin").exists():
            raise ShardError(f"{piece}: is there; give --out another folder, or delete it")
    with SeriesWriter(folder, path.stem, vocab_size, shard_tokens) as series:
        for tokens in read_chunks(path):
            series.write(tokens)
    return f"{folder}: {num_tokens:,} tokens in {len(series.paths)} shards {path.stem}_*.bin"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("inspect", "header, tokens, documents, vocabulary, checksum, sha256, a decoded excerpt"),
                       ("verify", "every check, one line a file; exit code 1 if one is bad"),
                       ("merge", "several shards into one"), ("split", "one shard into several")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("files", nargs=1 if name == "split" else "+", type=Path, metavar="FILE", help="shard")
        if name == "inspect":
            command.add_argument("--tiktoken", type=Path, metavar="FILE", help="BPE ranks that decode the excerpt")
        if name == "merge":
            command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the shard to write")
        if name == "split":
            command.add_argument("--tokens", type=int, required=True, help="tokens in each piece")
            command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the pieces")
    args = parser.parse_args(arguments)
    if args.command == "split" and args.tokens < 1:
        parser.error(f"split: --tokens {args.tokens}: give at least 1")
    if args.command == "inspect":
        jobs = [partial(inspect, path, args.tiktoken) for path in args.files]
    elif args.command == "verify":
        jobs = [partial(verify, path) for path in args.files]
    elif args.command == "merge":
        jobs = [partial(merge, args.files, args.out)]
    else:
        jobs = [partial(split, args.files[0], args.tokens, args.out)]
    num_bad = 0
    for job in jobs:
        try:
            print(job())
        except (ShardError, OSError) as error:
            num_bad += 1
            if args.command == "verify":
                print(f"bad: {error}")
            else:
                print(f"shards.py: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            sys.exit("shards.py: interrupted; nothing was written")
    sys.exit(num_bad > 0)


if __name__ == "__main__":
    main()
