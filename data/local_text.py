#!/usr/bin/env python3
"""Turns text into training and validation shards, with no network.

    python data/local_text.py      # the tiny track: Python sources of the installed torch; in second/, Python's own
    python data/local_text.py ~/novels --out data/novels     # your own text, one token per byte
    python data/local_text.py book.txt --separator '\\n\\n' --out data/book                      # several documents
    python data/local_text.py dump.jsonl.gz --text_field body --encoding gpt2 --out data/dump    # in GPT-2's BPE
    python data/local_text.py 'sample/10BT/*.parquet' --encoding gpt2 --out data/fineweb         # a document per row
    python data/local_text.py --train_bpe 4096      # the lab track: tiny's text in a BPE of 4,096 tokens, trained on it

An input is a folder, which is read with all folders in it, a file, or a pattern in quotes. Files that end in .gz are
decompressed. .jsonl and .parquet hold a document per line or row, in the field --text_field. Any other file is one
document, or several with --separator. Text that spells <|endoftext|> is ordinary text.

A document is the end-of-text token and then its tokens; documents run on from one shard to the next. It is validation
where the sha1 of its name, modulo 20, is 0. The name is the file's path below the folder that was given (of a pattern:
below its last folder without a wildcard), and in files of several documents :0, :1, and so on. Files are read in the
order of the sha1 of their names. So the shards are the same on every machine and with any number of --workers, and no
document moves to the other split when files are added.

With --train_bpe N the N tokens are the 256 bytes, N - 257 merges with GPT-2's split into words, and last the
end-of-text token. They are trained on the first BPE_TRAINING_BYTES of the training documents, in their order, and stand
beside the shards in bpe.tiktoken, which --encoding takes for other text. A set for which that file is missing is
written again.
"""

import argparse
import base64
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
import sysconfig
import tempfile
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow.parquet
from filelock import FileLock, Timeout
from shards import BYTES_VOCAB_SIZE, MAX_VOCAB_SIZE, SeriesWriter, ShardError, load_bpe, read_shard
from tqdm import tqdm

SPLITS = ("train", "val")
VAL_ONE_IN = 20
SUFFIXES = [".txt", ".md", ".py", ".jsonl", ".parquet"]
SHARD_TOKENS = 100_000_000
BATCH_DOCUMENTS = 32    # for a thread at once
RANKS = "bpe.tiktoken"  # beside the shards, of --train_bpe
BPE_TRAINING_BYTES = 100_000_000
BPE_WORD_BYTES = 1000   # longer words are cut for training, whose time is quadratic in them
TINY_MAX_BYTES = 65536  # of each document
# Folders of the torch package that hold what its build made, and its version: they differ from build to build.
TINY_SKIPS = ("version.py", "bin/", "include/", "lib/", "share/", "test/")


def find_files(args) -> list[tuple[str, str]]:
    """Returns (path, name) of the files that the inputs name, in the order of the sha1 of their names."""
    endings = tuple(suffix + compression for suffix in args.suffixes for compression in ("", ".gz"))
    found = []
    for given in args.input:
        path = Path(given).expanduser()
        if path.is_dir():
            base, paths = path, [file for file in path.rglob("*") if file.name.lower().endswith(endings)]
        else:
            base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parent.parts))
            paths = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [(str(path), path.relative_to(base).as_posix()) for path in paths if path.is_file()]
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ShardError(f"{given}: a pipe or a device; write what it gives into a file")
        if not files:
            raise ShardError(f"{given}: no such file, or none in it ends in {' '.join(args.suffixes)} (--suffixes)")
        found += [file for file in files if not file[1].startswith(args.skips)]
    return sorted(found, key=lambda file: hashlib.sha1(os.fsencode(file[1])).digest())     # equal names stay as given


def parquet_rows(file, field: str) -> Iterator[dict]:
    # With pre_buffer a row group is read whole, and a row group can be the whole file.
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
    columns = [field] if field in table.schema_arrow.names else None
    for rows in table.iter_batches(batch_size=BATCH_DOCUMENTS, columns=columns, use_threads=False):
        yield from rows.to_pylist()


def text_of(record: bytes | dict, field: str, place: str) -> bytes:
    """Returns the text of a line of JSON, or of a row of parquet."""
    try:
        record = json.loads(record) if isinstance(record, bytes) else record
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{place} is not JSON ({error}); repair or remove it") from error
    text = record.get(field) if isinstance(record, dict) else None
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")     # JSON can hold half a character, such as "\ud83d"
    if not isinstance(text, bytes):
        raise ShardError(f"{place} has no text in {field!r}: {str(record)[:80]}; name its --text_field, or remove it")
    return text


def read_texts(path: str, args) -> Iterator[tuple[str, bytes]]:
    """Yields (place, text) of the documents of a file; the place of an only one is the path."""
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
        kind = Path(path.lower().removesuffix(".gz")).suffix
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


def read_documents(files: list[tuple[str, str]], args) -> Iterator[tuple[str, bool, bytes]]:
    """Yields (place, whether it is validation, text) of each document."""
    for path, name in tqdm(files, unit=" files", disable=None):
        try:
            for index, (place, text) in enumerate(read_texts(path, args)):
                document_name = name if place == path else f"{name}:{index}"
                digest = hashlib.sha1(os.fsencode(document_name)).digest()
                yield place, int.from_bytes(digest, "big") % VAL_ONE_IN == 0, text[:args.max_bytes]
        except ShardError:
            raise
        except Exception as error:      # the readers raise a dozen types
            first = str(error).partition("\n")[0]
            raise ShardError(f"{path}: {type(error).__name__}: {first}; repair the file, or leave it out") from error


def bpe_training_texts(documents: Iterator[tuple[str, bool, bytes]]) -> Iterator[str]:
    left = BPE_TRAINING_BYTES
    for _, is_val, data in documents:
        if not is_val:
            yield data[:left].decode("utf-8", "replace")
            left -= len(data[:left])
        if not left:
            return


def train_bpe(texts: Iterator[str], num_tokens: int) -> list[bytes]:
    """Returns the tokens of a BPE in the order of their ranks: the single bytes, and then the merges as they were
    learned. The end-of-text token, one of the `num_tokens`, is not among them."""
    import tokenizers
    from tokenizers.pre_tokenizers import ByteLevel, FixedLength, Sequence
    alphabet = sorted(ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=num_tokens - 1, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    gpt2_split = ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = Sequence([gpt2_split, FixedLength(BPE_WORD_BYTES)])
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    if len(ids) < num_tokens - 1:
        raise ShardError(f"--train_bpe {num_tokens}: the training documents hold pairs for {len(ids) + 1} tokens; give "
                         "at most so many, or more text")
    # There a character stands for a byte: itself where it can be printed, otherwise the next one from chr(256) on.
    byte_values = sorted(range(256), key=lambda byte: chr(byte) not in alphabet)
    byte_of = dict(zip(alphabet, byte_values, strict=True))
    merges = [bytes(map(byte_of.get, token)) for token in sorted(ids, key=ids.get) if len(token) > 1]
    return [bytes([byte]) for byte in range(256)] + merges


def encode(batch: list[tuple[str, bool, bytes]], bpe) -> list[tuple[bool, np.ndarray, int]]:
    """Returns (whether it is validation, its tokens, characters of it that were not UTF-8) of each document."""
    encoded = []
    for place, is_val, data in batch:
        end_of_text, ids, num_replaced = BYTES_VOCAB_SIZE - 1, np.frombuffer(data, dtype=np.uint8), 0
        if bpe:
            text = data.decode("utf-8", "replace")
            num_replaced = text.count("\ufffd") - data.count("\ufffd".encode())
            try:
                end_of_text, ids = bpe.eot_token, bpe.encode_to_numpy(text, disallowed_special=())
            except ValueError as error:     # of a million spaces
                raise ShardError(f"{place}: tiktoken cannot split it ({error}); leave it out") from error
        tokens = np.concatenate([[end_of_text], ids], dtype="<u2", casting="unsafe")
        encoded.append((is_val, tokens, num_replaced))
    return encoded


def encode_all(documents: Iterator[tuple[str, bool, bytes]], bpe, workers: int) -> Iterator[tuple]:
    """Yields what `encode` returns, in order. Threads are as fast as processes: tiktoken frees Python's lock."""
    pool, waiting = ThreadPool(workers), collections.deque()
    try:
        while batch := list(itertools.islice(documents, BATCH_DOCUMENTS)):
            waiting.append(pool.apply_async(encode, (batch, bpe)))
            if len(waiting) > 2 * workers:      # so memory is bounded
                yield from waiting.popleft().get()
        for result in waiting:
            yield from result.get()
    finally:
        pool.terminate()
        pool.join()


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
    """Puts the shards in the place of those in `out`; val_000000.bin, which a next run looks for, goes first and comes
    last, so that a run that was killed here counts as none."""
    for path in shards_in(out, "val") + shards_in(out, "train"):
        path.unlink()
    for path in [*staging.glob(RANKS), *shards_in(staging, "train"), *shards_in(staging, "val")[::-1]]:
        os.replace(path, out / path.name)


def write_shards(files: list[tuple[str, str]], args, staging: Path) -> None:
    if args.train_bpe:
        tokens = train_bpe(bpe_training_texts(read_documents(files, args)), args.train_bpe)
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
        args.encoding = str(staging / RANKS)
        Path(args.encoding).write_text("".join(lines), newline="\n")
    bpe = None if args.encoding == "bytes" else load_bpe(args.encoding)
    vocab_size = bpe.n_vocab if bpe else BYTES_VOCAB_SIZE
    series = [SeriesWriter(staging, split, vocab_size, SHARD_TOKENS) for split in SPLITS]
    num_documents, replaced = [0, 0], 0
    with series[0], series[1]:
        for is_val, tokens, num_replaced in encode_all(read_documents(files, args), bpe, args.workers):
            series[is_val].write(tokens)
            num_documents[is_val] += 1
            replaced += num_replaced
    if not all(num_documents):
        raise ShardError(f"{num_documents[0]:,} documents fall to training and {num_documents[1]:,} to validation (one "
                         f"in {VAL_ONE_IN}, by name), but both need one; give more files, or cut them by --separator")
    publish(staging, args.out)
    for split, writer, count in zip(SPLITS, series, num_documents, strict=True):
        print(f"{args.out}/{split}_*.bin: {writer.num_tokens:,} tokens of {count:,} documents")
    if replaced:
        print(f"note: {replaced:,} characters were not UTF-8 and became U+FFFD", file=sys.stderr)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="*", metavar="INPUT", help="folder, file or pattern (default: torch's sources)")
    parser.add_argument("--out", type=Path, help="folder for the shards (with no INPUT: data/tiny, or data/lab)")
    parser.add_argument("--suffixes", nargs="+", default=SUFFIXES, help=f"in folders (default: {' '.join(SUFFIXES)})")
    parser.add_argument("--separator", default="", help="what stands between documents in a text file; \\n: a new line")
    parser.add_argument("--text_field", default="text", help="of JSON lines and parquet (default: text)")
    encoding = parser.add_mutually_exclusive_group()
    encoding.add_argument("--encoding", default="bytes", help="bytes, gpt2, or a file of BPE ranks (default: bytes)")
    encoding.add_argument("--train_bpe", type=int, metavar="N", help=f"train a BPE of N tokens; also writes {RANKS}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads (default: the number of cores)")
    parser.add_argument("--force", action="store_true", help="write the shards even where good ones are there")
    args = parser.parse_intermixed_args(arguments)      # inputs before and after options
    if args.input and not args.out:
        parser.error("--out: name a folder for the shards of your text, such as --out data/mine")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give at least 1")
    if args.train_bpe is not None and not BYTES_VOCAB_SIZE <= args.train_bpe <= MAX_VOCAB_SIZE:
        parser.error(f"--train_bpe {args.train_bpe}: give {BYTES_VOCAB_SIZE} (the bytes and the end of text) to "
                     f"{MAX_VOCAB_SIZE} (what a shard can hold)")
    args.separator = os.fsencode(args.separator.replace("\\n", "\n"))
    args.skips, args.max_bytes = (), None
    if not args.input:
        args.input, args.suffixes = [os.path.dirname(importlib.util.find_spec("torch").origin)], [".py"]
        args.skips, args.max_bytes = TINY_SKIPS, TINY_MAX_BYTES
        args.out = args.out or Path(__file__).parent / ("lab" if args.train_bpe else "tiny")
    return args


def make(args: argparse.Namespace) -> None:
    try:
        incomplete = args.train_bpe and not (args.out / RANKS).exists()
        there = [0 if args.force or incomplete else good_tokens(args.out, split) for split in SPLITS]
        if all(there):
            print(f"{args.out}: {there[0]:,} training and {there[1]:,} validation tokens are there (--force rewrites)")
            return
        files = find_files(args)
        args.out.mkdir(parents=True, exist_ok=True)
        with FileLock(args.out / ".local_text.lock", timeout=0):
            for killed in args.out.glob(".local_text_*"):
                shutil.rmtree(killed)
            with tempfile.TemporaryDirectory(prefix=".local_text_", dir=args.out) as staging:
                write_shards(files, args, Path(staging))
    except Timeout:
        sys.exit(f"local_text.py: another run is writing to {args.out}; wait for its end")
    except (ShardError, OSError) as error:      # an error of a full disk names no file
        sys.exit(f"local_text.py: nothing was written to {args.out}: {error}")
    except KeyboardInterrupt:
        sys.exit("local_text.py: interrupted; run it again")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    make(args)
    if args.skips:     # of tiny and lab: and a second text, on which a trained model is tried, the modules of Python
        if args.train_bpe:
            args.train_bpe, args.encoding = None, str(args.out / RANKS)
        args.input, args.skips, args.out = [f"{sysconfig.get_path('stdlib')}/*.py"], (), args.out / "second"
        make(args)


if __name__ == "__main__":
    main()
