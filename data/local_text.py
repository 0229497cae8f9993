#!/usr/bin/env python3
"""Turns text into training and validation shards, with no network.

    python data/local_text.py                                 # the tiny track: Python sources of the installed torch
    python data/local_text.py ~/novels --out data/novels      # your own text, one token per byte
    python data/local_text.py ~/novels --out data/novels_gpt2 --encoding gpt2                # GPT-2's BPE, by tiktoken
    python data/local_text.py dump.jsonl.gz --text_field body --out data/dump                # a document per line
    python data/local_text.py 'sample/10BT/*.parquet' --encoding gpt2 --out data/fineweb     # a document per row
    python data/local_text.py book.txt --separator '\\n\\n' --out data/book                    # several documents

An input is a folder, which is read with all folders in it, a file, or a pattern in quotes. Files that end in .gz are
decompressed. .jsonl and .parquet hold a document per line or row, in the field --text_field. Any other file is one
document, or several with --separator. Text that spells <|endoftext|> is ordinary text.

A document is the end-of-text token and then its tokens; documents run on from one shard to the next. It is validation
where the sha1 of its name, modulo 20, is 0. The name is the file's path below the folder that was given (of a pattern:
below its last folder without a wildcard), and in files of several documents :0, :1, and so on. Files are read in the
order of the sha1 of their names. So the shards are the same on every machine and with any number of --workers, and no
document moves to the other split when files are added.
"""

import argparse
import collections
import glob
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
from filelock import FileLock, Timeout
from shards import BYTES_VOCAB_SIZE, SeriesWriter, ShardError, load_bpe, read_shard
from tqdm import tqdm

SPLITS = ("train", "val")
VAL_ONE_IN = 20
SUFFIXES = [".txt", ".md", ".py", ".jsonl", ".parquet"]
SHARD_TOKENS = 100_000_000
BATCH_BYTES = 2**20     # of text, for a worker at once
TINY_FOLDER = Path(__file__).parent / "tiny"
TINY_MAX_BYTES = 65536  # of each document
# Folders of the torch package that hold what its build made, and its version: they differ from build to build.
TINY_SKIPS = ("version.py", "bin/", "include/", "lib/", "share/", "test/")


class InputError(Exception):
    """The input cannot be taken as it is; the message names the file and the remedy."""


class Document(NamedTuple):
    place: str      # the file, and where in it
    is_val: bool
    text: bytes


def sha1(name: str) -> bytes:
    return hashlib.sha1(os.fsencode(name)).digest()


# Reading.

def find_files(inputs: list[str], suffixes: list[str]) -> list[tuple[str, str]]:
    """Returns (path, name) of the files that the inputs name, in the order of the sha1 of their names."""
    endings = tuple(suffix + compression for suffix in suffixes for compression in ("", ".gz"))
    found = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            base, paths = path, [file for file in path.rglob("*") if file.name.lower().endswith(endings)]
        elif path.is_file():
            base, paths = path.parent, [path]
        else:
            base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
            paths = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [(str(path), path.relative_to(base).as_posix()) for path in paths if path.is_file()]
        if not files:
            raise InputError(f"{given}: no such file, and no folder with files in {' '.join(suffixes)}; give what "
                             "exists, or other endings with --suffixes")
        found += files
    return sorted(found, key=lambda file: sha1(file[1]))     # stable: equal names stay as given


def parquet_rows(file, field: str) -> Iterator[dict]:
    # With pre_buffer a row group is read whole, and a row group can be the whole file.
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BATCH_BYTES)
    columns = [field] if field in table.schema_arrow.names else None
    for rows in table.iter_batches(batch_size=64, columns=columns, use_threads=False):
        yield from rows.to_pylist()


def text_of(record: bytes | dict, field: str, place: str) -> bytes:
    """Returns the text of a line of JSON, or of a row of parquet."""
    try:
        record = json.loads(record) if isinstance(record, bytes) else record
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}); repair or remove it") from error
    text = record.get(field) if isinstance(record, dict) else None
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")     # JSON can hold half a character, such as "\ud83d"
    if not isinstance(text, bytes):
        fields = ", ".join(record) if isinstance(record, dict) else "none"
        raise InputError(f"{place} has no text in the field {field!r} (its fields: {fields}); name the field with "
                         "--text_field, or remove it")
    return text


def read_texts(path: str, args) -> Iterator[tuple[str, bytes]]:
    """Yields (place, text) of the documents of a file; the place of an only one is the path."""
    kind = Path(path.lower().removesuffix(".gz")).suffix
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
        if kind == ".jsonl":
            unit, records = "line", file
        elif kind == ".parquet":
            unit, records = "row", parquet_rows(file, args.text_field)
        elif args.separator:
            unit, records = "document", file.read().split(args.separator)
        else:
            yield path, file.read()
            return
        for number, record in enumerate(records, 1):
            place = f"{path}: {unit} {number}"
            if isinstance(record, dict) or record.strip():
                yield place, record if unit == "document" else text_of(record, args.text_field, place)


def read_documents(files: list[tuple[str, str]], args) -> Iterator[Document]:
    for path, name in tqdm(files, unit=" files", disable=None):
        try:
            for index, (place, text) in enumerate(read_texts(path, args)):
                digest = sha1(name if place == path else f"{name}:{index}")
                is_val = int.from_bytes(digest, "big") % VAL_ONE_IN == 0
                yield Document(place, is_val, text[:args.max_bytes])
        except InputError:
            raise
        except Exception as error:      # the readers raise a dozen types
            raise InputError(f"{path}: {type(error).__name__}: {error}; repair the file, or leave it out") from error


# Encoding.

def encode(document: Document, bpe) -> tuple[np.ndarray, int]:
    """Returns (end-of-text and the document's tokens, how many of its characters were not UTF-8)."""
    if bpe is None:
        end_of_text, ids, num_replaced = BYTES_VOCAB_SIZE - 1, np.frombuffer(document.text, dtype=np.uint8), 0
    else:
        text = document.text.decode("utf-8", "replace")
        num_replaced = text.count("\ufffd") - document.text.count("\ufffd".encode())
        try:
            end_of_text, ids = bpe.eot_token, bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError as error:     # of a million spaces
            raise InputError(f"{document.place}: tiktoken cannot split it ({error}); leave it out") from error
    tokens = np.empty(len(ids) + 1, dtype="<u2")
    tokens[0], tokens[1:] = end_of_text, ids
    return tokens, num_replaced


def encode_all(documents: Iterator[Document], bpe, workers: int) -> Iterator[tuple[Document, np.ndarray, int]]:
    """Yields (document, and what `encode` returns) in order; few batches are on their way, which bounds the memory.

    Threads are as fast as processes: tiktoken does not hold Python's lock.
    """
    def encode_batch(batch):
        return [(document, *encode(document, bpe)) for document in batch]

    pool, waiting = ThreadPool(workers), collections.deque()
    try:
        for batch in batched(documents):
            waiting.append(pool.apply_async(encode_batch, (batch,)))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().get()
        while waiting:
            yield from waiting.popleft().get()
    finally:
        pool.terminate()
        pool.join()


def batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 100     # an empty document takes time, too
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


# Writing.

def shards_in(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"{split}_{6 * '[0-9]'}.bin"))


def good_tokens(folder: Path, split: str) -> int:
    """Returns the number of tokens in the shards of an earlier run; 0 where not all of them are there, and good."""
    paths = shards_in(folder, split)
    if [path.name for path in paths] != [f"{split}_{number:06d}.bin" for number in range(len(paths))]:
        return 0
    try:
        return sum(len(read_shard(path)[0]) for path in paths)
    except ShardError as error:
        print(f"{error}: this is done now")
        return 0


def publish(staging: Path, out: Path) -> None:
    """Puts the shards in the place of those in `out`.

    val_000000.bin goes first and comes last: wherever this is killed, it is missing, and the next run starts again.
    """
    for path in shards_in(out, "val") + shards_in(out, "train"):
        path.unlink()
    for path in shards_in(staging, "train") + shards_in(staging, "val")[::-1]:
        os.replace(path, out / path.name)


def write_shards(files: list[tuple[str, str]], args, staging: Path) -> None:
    bpe = None if args.encoding == "bytes" else load_bpe(args.encoding)
    vocab_size = bpe.n_vocab if bpe else BYTES_VOCAB_SIZE
    train, val = (SeriesWriter(staging, split, vocab_size, SHARD_TOKENS) for split in SPLITS)
    num_documents, num_bytes, num_replaced = [0, 0], [0, 0], 0
    with train, val:
        for document, tokens, replaced in encode_all(read_documents(files, args), bpe, args.workers):
            (val if document.is_val else train).write(tokens)
            num_documents[document.is_val] += 1
            num_bytes[document.is_val] += len(document.text)
            num_replaced += replaced
    if not all(num_documents):
        raise InputError(f"{num_documents[0]:,} documents fall to training and {num_documents[1]:,} to validation (one "
                         f"in {VAL_ONE_IN}, by their names), but both need one; give more files, or cut them into "
                         "documents, as with --separator '\\n\\n'")
    publish(staging, args.out)
    for series, documents, size in zip((train, val), num_documents, num_bytes, strict=True):
        print(f"{args.out}/{series.name}_*.bin: {series.num_tokens:,} tokens of {documents:,} documents, "
              f"{size / series.num_tokens:.2f} bytes per token, {len(series.paths):,} shards")
    if num_replaced:
        print(f"note: {num_replaced:,} characters were not UTF-8 and became U+FFFD", file=sys.stderr)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="*", metavar="INPUT", help="folder, file or pattern (default: torch's sources)")
    parser.add_argument("--out", type=Path, help="folder for the shards (with no INPUT: data/tiny)")
    parser.add_argument("--suffixes", nargs="+", default=SUFFIXES, metavar="SUFFIX",
                        help=f"endings of the files that are taken from folders (default: {' '.join(SUFFIXES)})")
    parser.add_argument("--separator", default="", help="what stands between documents in a text file; \\n: a new line")
    parser.add_argument("--text_field", default="text", help="of JSON lines and parquet (default: text)")
    parser.add_argument("--encoding", default="bytes",
                        help="bytes, gpt2, or a file of BPE ranks in tiktoken's format (default: bytes)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads (default: the number of cores)")
    parser.add_argument("--force", action="store_true", help="write the shards even where good ones are there")
    args = parser.parse_intermixed_args(arguments)      # inputs before and after options
    if args.input and not args.out:
        parser.error("--out: name a folder for the shards of your text, such as --out data/mine")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give at least 1")
    args.out = args.out or TINY_FOLDER
    args.max_bytes = None if args.input else TINY_MAX_BYTES
    args.separator = os.fsencode(args.separator.replace("\\n", "\n"))
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    there = [good_tokens(args.out, split) for split in SPLITS]
    if all(there) and not args.force:
        print(f"{args.out}: {there[0]:,} training and {there[1]:,} validation tokens are there (--force: write again)")
        return
    staging = args.out / ".local_text"
    try:
        if args.input:
            files = find_files(args.input, args.suffixes)
        else:
            folder = os.path.dirname(importlib.util.find_spec("torch").origin)
            files = [file for file in find_files([folder], [".py"]) if not file[1].startswith(TINY_SKIPS)]
        args.out.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{staging}.lock", timeout=0):
            shutil.rmtree(staging, ignore_errors=True)      # of a run that was killed
            write_shards(files, args, staging)
    except Timeout:
        sys.exit(f"local_text.py: {args.out}: another run is writing to it; wait for its end")
    except (InputError, ShardError) as error:
        sys.exit(f"local_text.py: {error}")
    except OSError as error:     # of a full disk names no file
        sys.exit(f"local_text.py: {args.out}: {error}")
    except KeyboardInterrupt:
        sys.exit("local_text.py: interrupted; run it again")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


if __name__ == "__main__":
    main()
