#!/usr/bin/env python3
"""Turns any text into training and validation shards, with no network.

    python data/local_text.py                                  # the tiny track: Python sources of the installed torch
    python data/local_text.py ~/novels --out data/novels       # your own text, one token a byte
    python data/local_text.py ~/novels --out data/novels_gpt2 --encoding gpt2              # GPT-2 BPE, by tiktoken
    python data/local_text.py dump.jsonl.gz --text_field body --out data/dump              # a document a line
    python data/local_text.py book.txt --separator '\\n\\n\\n' --out data/book             # one file, several documents
    python data/local_text.py 'fineweb/sample/10BT/*.parquet' --encoding gpt2 --out data/fineweb     # a document a row
    zcat dump.gz | python data/local_text.py - --format jsonl --out data/dump              # standard input

An input is a folder (read recursively: --suffixes, each also with .gz or .zst), a glob in quotes, a file with any
ending, or - for standard input. .jsonl and .parquet hold a document a line or row, in the field --text_field. Any other
file is one document, or several with --separator.

A document is the end-of-text token and then its tokens; text that spells <|endoftext|> is ordinary text. Documents run
on over shards of exactly --shard_tokens: OUT/train_000000.bin, train_000001.bin, ..., val_000000.bin, ...

A document is validation where the sha1 of its name, mod 20, is 0. The name is the file's path below the folder given
(below a glob's last folder without a wildcard; of a file given, its name alone); for files that hold several documents
with :0, :1, ... for each. Files stand in the order of the sha1 of their names. So the split does not change when files
are added, and it is the same on every machine, with any number of --workers.

Shards appear under their names together, when all are whole. Text that is not UTF-8 keeps its bytes where tokens are
bytes; in BPE U+FFFD replaces what is wrong, which is counted and reported. Memory is bounded by the largest documents,
whatever the size of the input (and about 300 bytes for each file of a folder).
"""

import argparse
import codecs
import contextlib
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from shards import BYTES_VOCAB_SIZE, MAX_TOKENS, SeriesWriter, ShardError, load_bpe, read_shard, sha256
from tqdm import tqdm

TINY_FOLDER = Path(__file__).parent / "tiny"
TINY_MAX_BYTES = 65536
# Folders of the torch package that hold what its build made, and its version: they differ from build to build.
BUILD_PATHS = ("version.py", "bin/", "include/", "lib/", "share/", "test/")
SUFFIXES = [".txt", ".md", ".py", ".jsonl", ".parquet"]
COMPRESSIONS = ("", ".gz", ".zst")
SPLITS = ("train", "val")
VAL_ONE_IN = 20
STAGING = f".local_text.{socket.gethostname()}."     # and the process
BATCH_BYTES = 2**20             # of text, for a worker at once
DOCUMENT_COST = 100             # bytes of text that take a worker as long as an empty document
# What tiktoken's split pattern calls \s, which is not what Python does.
LONG_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")


class InputError(Exception):
    """The input cannot be taken as it is; the message names the file and the remedy."""


class Source(NamedTuple):
    digest: bytes       # sha1 of the name
    path: str           # "-" for standard input
    name_start: int     # the name is path[name_start:]
    size: int           # bytes on the disk


class Document(NamedTuple):
    path: str
    place: str          # in the file, such as "line 3"; "" where the document is the whole of it
    is_val: bool
    kind: str           # "file": the worker reads `path`; "json": `data` is a line of JSON; "text": it is the text
    start: int          # byte of the file where the text starts
    data: bytes


class Encoded(NamedTuple):
    """What became of a batch; of pairs the first is training, the second validation."""
    tokens: tuple[bytes, bytes]             # uint16
    num_documents: tuple[int, int]
    text_bytes: tuple[int, int]
    longest_val: tuple[int, str]            # tokens, document
    num_cut: int
    replaced: list[tuple[str, int]]         # path, characters that were not UTF-8


def name_of(document: Document) -> str:
    return f"{document.path}: {document.place}" if document.place else document.path


def is_validation(digest: bytes) -> bool:
    return int.from_bytes(digest, "big") % VAL_ONE_IN == 0


def sha1(name: str) -> bytes:
    return hashlib.sha1(os.fsencode(name)).digest()


@contextlib.contextmanager
def naming(place: str):
    """Whatever goes wrong inside becomes an InputError that names `place`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:     # readers and tokenizers raise a dozen types
        raise InputError(f"{place}: {type(error).__name__}: {error}; repair the file, or leave it out") from error


@contextlib.contextmanager
def no_interrupt():
    """Ctrl-C does nothing inside; processes that are started inside never see it."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


# Reading: what the inputs name, and documents out of them


def find_sources(inputs: list[str], suffixes: list[str], skip: tuple[str, ...] = ()) -> list[Source]:
    """Returns the files that `inputs` name in the order of their digests; raises InputError or OSError."""
    sources = []

    def add(path: str, root: str):
        start = len(os.path.join(root, ""))
        sources.append(Source(sha1(path[start:]), path, start, os.path.getsize(path)))

    def fail(error):
        raise error

    endings = tuple(suffix + compression for suffix in suffixes for compression in COMPRESSIONS)
    for given in inputs:
        path = str(Path(os.path.expanduser(given)))
        if given == "-":
            sources.append(Source(sha1("-"), "-", 0, 0))
        elif os.path.isdir(path):
            for folder, _, files in os.walk(path, onerror=fail):
                for file in (os.path.join(folder, name) for name in files if name.lower().endswith(endings)):
                    if os.path.isfile(file) and not file[len(os.path.join(path, "")):].startswith(skip):
                        add(file, path)
        elif os.path.isfile(path):
            add(path, os.path.dirname(path))
        else:
            matches = [match for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]
            if not matches:
                raise InputError(f"{given}: no such file or folder, and no file matches it as a glob; give what exists")
            fixed = os.path.join("", *itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts))
            for match in matches:
                add(match, fixed)
    return sorted(sources, key=lambda source: source.digest)     # stable: equal names stay as given


def form(path: str, other: str) -> tuple[str, str]:
    """Returns ("text", "jsonl" or "parquet"; compression) by the ending; `other` where that does not tell."""
    stem, ending = os.path.splitext(path.lower())
    compression = ending if ending in COMPRESSIONS else ""
    if compression:
        ending = os.path.splitext(stem)[1]
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(ending, other), compression


def decompressed(raw, compression: str):
    """Returns a buffered binary file of what `raw` holds."""
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BATCH_BYTES)
    if compression == ".zst":
        import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), BATCH_BYTES)
    return raw


def split_text(file, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (start, text) of the pieces of a file between separators; an empty piece is no document."""
    start, rest = 0, b""
    while block := file.read(max(BATCH_BYTES, len(rest))):     # growing blocks: linear in a long document's length
        *pieces, rest = (rest + block).split(separator)
        for piece in pieces:
            if piece:
                yield start, piece
            start += len(piece) + len(separator)
    if rest:
        yield start, rest


def read_parquet(path: str, field: str) -> Iterator[tuple[bytes, float]]:
    """Yields (text, part of the rows read) of each row; raises InputError."""
    import pyarrow
    import pyarrow.parquet
    # With pre_buffer a row group is read whole, and a row group can be the whole file.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BATCH_BYTES) as file:
        if field not in file.schema_arrow.names:
            raise InputError(f"{path}: has no column {field!r}; name one of {', '.join(file.schema_arrow.names)} with "
                             "--text_field")
        row = 0
        for batch in file.iter_batches(batch_size=64, columns=[field], use_threads=False):
            for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                row += 1
                if text is None:
                    raise InputError(f"{path}: row {row} has no text in the column {field!r}; leave such rows out, or "
                                     "name another column with --text_field")
                yield text, row / file.metadata.num_rows


def read_several(source: Source, args) -> Iterator[tuple[str, str, int, bytes, float]]:
    """Yields (place, kind, start, data, bytes of the file read) of the documents of a file that may hold several."""
    kind, compression = form(source.path, args.format)
    if kind == "parquet":
        if compression or source.path == "-":
            raise InputError(f"{source.path}: parquet is read from an uncompressed file; decompress it first")
        for row, (text, part) in enumerate(read_parquet(source.path, args.text_field), 1):
            yield f"row {row}", "text", 0, text, part * source.size
        return
    with contextlib.nullcontext(sys.stdin.buffer) if source.path == "-" else open(
            source.path, "rb", buffering=BATCH_BYTES) as raw:
        position = raw.tell if raw is not sys.stdin.buffer else lambda: 0
        file = decompressed(raw, compression)
        if kind == "jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", "json", 0, line, position()
        elif args.separator:
            for start, text in split_text(file, args.separator):
                yield f"document at byte {start}", "text", start, text, position()
        else:
            yield "", "text", 0, file.read(), position()


def read_documents(sources: list[Source], args) -> Iterator[tuple[Document, int, float]]:
    """Yields (document, its bytes, bytes of the input read so far) in order; raises InputError."""
    done = 0
    for source in sources:
        if is_one_document(source, args):
            document = Document(source.path, "", is_validation(source.digest), "file", 0, b"")
            yield document, source.size, done + source.size
        else:
            with naming(source.path):
                for index, (place, kind, start, data, position) in enumerate(read_several(source, args)):
                    is_val = is_validation(sha1(f"{source.path[source.name_start:]}:{index}"))
                    yield Document(source.path, place, is_val, kind, start, data), len(data), done + position
        done += source.size


def is_one_document(source: Source, args) -> bool:
    return source.path != "-" and not args.separator and form(source.path, args.format)[0] == "text"


def batched(documents: Iterable[tuple[Document, int, float]]) -> Iterator[tuple[list[Document], int, float]]:
    """Yields (documents, their bytes, bytes of the input read so far)."""
    batch, size, position = [], 0, 0
    for document, num_bytes, position in documents:
        batch.append(document)
        size += num_bytes + DOCUMENT_COST
        if size >= BATCH_BYTES:
            yield batch, size, position
            batch, size = [], 0
    if batch:
        yield batch, size, position


# Encoding: in worker processes


def json_text(document: Document, field: str) -> bytes:
    """Returns the text of a line of JSON as UTF-8; what is not UTF-8 in the line is not here, either."""
    where = name_of(document)
    try:
        record = json.loads(document.data.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); repair or remove the line") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else "none"
        raise InputError(f"{where} has no text in the field {field!r} (its fields: {fields}); name the field with "
                         "--text_field, or remove the line")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:     # an escape like "\ud83d" alone
        return text.encode("utf-8", "surrogatepass")


class Tokenizer:
    def __init__(self, args):
        self.args = args
        self.bpe = load_bpe(args.tiktoken) if args.tiktoken or args.encoding == "gpt2" else None
        self.vocab_size = self.bpe.n_vocab if self.bpe else BYTES_VOCAB_SIZE

    def read(self, document: Document) -> tuple[bytes, bool]:
        """Returns (the document's text, whether it was cut)."""
        limit = self.args.max_bytes
        if document.kind == "file":
            with open(document.path, "rb") as raw:
                file = decompressed(raw, form(document.path, "text")[1])
                data = file.read(limit + 1 if limit else -1)
        else:
            data = json_text(document, self.args.text_field) if document.kind == "json" else document.data
        return (data[:limit], True) if 0 < limit < len(data) else (data, False)

    def encode_bpe(self, text: str) -> np.ndarray:
        """Returns the tokens (uint32) of text, with nothing in it special."""
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        except ValueError:     # its pattern cannot go back over a million spaces; it splits before the last of them
            ends = [space.end() - 1 for space in LONG_SPACE.finditer(text) if space.end() < len(text)]
            if not ends:
                raise
            pieces = [text[start:end] for start, end in itertools.pairwise([0, *ends, len(text)])]
            return np.concatenate([self.bpe.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def encode(self, document: Document) -> tuple[np.ndarray, int, bool, int]:
        """Returns (tokens, bytes of text, whether it was cut, characters replaced)."""
        data, is_cut = self.read(document)
        num_replaced = 0
        if self.bpe or self.args.strict:
            try:     # a cut may go through a character: what is left of that is then left out
                text = codecs.getincrementaldecoder("utf-8")().decode(data, final=not is_cut)
            except UnicodeDecodeError as error:
                if self.args.strict:
                    raise InputError(f"{name_of(document)}: byte {document.start + error.start} is not UTF-8 "
                                     f"({error.reason}); convert it to UTF-8, or leave --strict out") from error
                text = codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=not is_cut)
                num_replaced = text.count("\ufffd") - data.count("\ufffd".encode())
        tokens = self.encode_bpe(text) if self.bpe else np.frombuffer(data, dtype=np.uint8)
        return tokens, len(data), is_cut, num_replaced

    def encode_batch(self, batch: list[Document]) -> Encoded:
        end_of_text = np.array([self.vocab_size - 1], dtype="<u2")
        tokens, num_documents, text_bytes, longest_val, num_cut, replaced = ([], []), [0, 0], [0, 0], (0, ""), 0, []
        for document in batch:
            with naming(name_of(document)):
                ids, num_bytes, is_cut, num_replaced = self.encode(document)
            tokens[document.is_val].extend((end_of_text, ids))
            num_documents[document.is_val] += 1
            text_bytes[document.is_val] += num_bytes
            num_cut += is_cut
            if num_replaced:
                replaced.append((document.path, num_replaced))
            if document.is_val:
                longest_val = max(longest_val, (len(ids) + 1, name_of(document)))
        joined = tuple(np.concatenate(ids, dtype="<u2").tobytes() if ids else b"" for ids in tokens)
        return Encoded(joined, tuple(num_documents), tuple(text_bytes), longest_val, num_cut, replaced)


def work(connection, args) -> None:
    """A worker: encodes batches from the connection until the parent closes it, or is gone."""
    with contextlib.suppress(EOFError, ConnectionError):
        tokenizer = Tokenizer(args)
        while True:
            batch = connection.recv()
            try:
                connection.send(tokenizer.encode_batch(batch))
            except InputError as error:
                connection.send(error)


def encode_all(batches: Iterator, tokenizer: Tokenizer, args) -> Iterator[tuple[Encoded, float]]:
    """Yields (encoded batch, bytes of the input read so far) in the order of the batches; raises InputError.

    Batches on their way are bounded by their bytes, so that memory is; but each worker may have one.
    Not a pool of concurrent.futures: when this process is killed, its workers stay for ever, while these see their
    connection close; and it hangs when they are ended within a task (Python 3.10), as Ctrl-C does here.
    """
    if args.workers == 1:
        for batch, _, position in batches:
            yield tokenizer.encode_batch(batch), position
        return
    context = multiprocessing.get_context("spawn")
    processes, idle = [], []
    running, waiting, encoded = {}, {}, {}     # connection: number; number: (bytes, position); number: Encoded
    num_sent = num_given = 0
    try:
        with no_interrupt():
            for _ in range(args.workers):
                mine, its = context.Pipe()
                processes.append(context.Process(target=work, args=(its, args)))
                processes[-1].start()
                its.close()
                idle.append(mine)
        while True:
            while idle and (len(waiting) < args.workers or
                            sum(size for size, _ in waiting.values()) < 2 * args.workers * BATCH_BYTES):
                batch, size, position = next(batches, (None, 0, 0))
                if batch is None:
                    break
                connection = idle.pop()
                connection.send(batch)
                running[connection], waiting[num_sent] = num_sent, (size, position)
                num_sent += 1
            if num_given in encoded:
                yield encoded.pop(num_given), waiting.pop(num_given)[1]
                num_given += 1
            elif running:
                for connection in multiprocessing.connection.wait(running):
                    result = connection.recv()
                    if isinstance(result, InputError):
                        raise result
                    encoded[running.pop(connection)] = result
                    idle.append(connection)
            else:
                return
    except (EOFError, ConnectionError) as error:
        raise InputError("a worker process ended (killed for want of memory?); try fewer with --workers") from error
    finally:
        for process in processes:
            process.terminate()
            process.join()


# Writing: a staging folder, and shards that appear together


def shard_paths(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"{split}_{'[0-9]' * 6}.bin"))


def good_shards(folder: Path) -> str:
    """Returns a line on the shards of a run that was finished; "" where there are none, or one is bad."""
    found = {split: shard_paths(folder, split) for split in SPLITS}
    if not any(found.values()):
        return ""
    counts = {}
    for split, paths in found.items():
        if not paths or [path.name for path in paths] != [f"{split}_{i:06d}.bin" for i in range(len(paths))]:
            print(f"{folder}: holds {split} shards in part; writing them again")
            return ""
        try:
            shards = [read_shard(path) for path in paths]
        except ShardError as error:
            print(f"{error}: writing it again")
            return ""
        counts[split] = f"{sum(len(tokens) for tokens, _ in shards):,}"
        vocab_size = shards[0][1]
    return (f"{folder}: {counts['train']} training and {counts['val']} validation tokens of a vocabulary of "
            f"{vocab_size:,} are there (--force rewrites)")


def staging_folders(out: Path) -> list[Path]:
    """Removes the staging folders of dead processes of this machine, and returns those that are left."""
    for folder in out.glob(f"{STAGING}*"):
        if not is_alive(int(folder.name.removeprefix(STAGING))):
            shutil.rmtree(folder, ignore_errors=True)
    return list(out.glob(".local_text.*"))


@contextlib.contextmanager
def staging_folder(out: Path):
    """Yields a hidden folder in `out` for this run alone, removed at the end."""
    staging = out / f"{STAGING}{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)     # of a dead process with this one's number
    staging.mkdir(parents=True)
    try:
        for other in staging_folders(out):
            if other != staging:
                raise InputError(f"{out}: another run is writing to it; wait for it, or, if it is dead, delete {other}")
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def publish(staging: Path, out: Path) -> None:
    """Puts the staged shards in the place of those in `out`.

    val_000000.bin goes first and comes last: wherever this is killed, it is missing, which the next run sees.
    """
    with no_interrupt():
        for split in ("val", "train"):
            for path in shard_paths(out, split):
                path.unlink()
        for split in SPLITS:
            for path in reversed(shard_paths(staging, split)):
                os.replace(path, out / path.name)


def check_splits(num_documents: tuple[int, int]) -> None:
    if not all(num_documents):
        raise InputError(f"the input has {sum(num_documents):,} document(s), of which {num_documents[1]:,} fall to "
                         f"validation (one in {VAL_ONE_IN}, by their names) and {num_documents[0]:,} to training; both "
                         "splits need one: give more files, or cut them into documents, as with --separator '\\n\\n'")


def write_shards(sources: list[Source], tokenizer: Tokenizer, args, staging: Path) -> None:
    """Encodes the sources into shards in `staging`, publishes them in args.out, and prints what they are."""
    total = sum(source.size for source in sources)
    num_documents, text_bytes, longest_val, num_cut, replaced = np.zeros(2, int), np.zeros(2, int), (0, ""), 0, {}
    started = time.monotonic()
    with (contextlib.ExitStack() as stack):
        series = [stack.enter_context(SeriesWriter(staging, split, tokenizer.vocab_size, args.shard_tokens))
                  for split in SPLITS]
        bar = stack.enter_context(tqdm(total=total or None, unit="B", unit_scale=True, disable=None))
        encoded = stack.enter_context(contextlib.closing(
            encode_all(batched(read_documents(sources, args)), tokenizer, args)))
        for batch, position in encoded:
            for writer, tokens in zip(series, batch.tokens, strict=True):
                writer.write(np.frombuffer(tokens, dtype="<u2"))
            num_documents += batch.num_documents
            text_bytes += batch.text_bytes
            longest_val = max(longest_val, batch.longest_val)
            num_cut += batch.num_cut
            for path, count in batch.replaced:
                replaced[path] = replaced.get(path, 0) + count
            bar.update(position - bar.n)
        check_splits(tuple(num_documents.tolist()))
    lines = []
    for writer, split, documents, num_bytes in zip(series, SPLITS, num_documents, text_bytes, strict=True):
        name, end = f"{split}_*.bin", f"{len(writer.paths):,} shards"
        if len(writer.paths) == 1:
            name, end = writer.paths[0].name, f"sha256 {sha256(writer.paths[0])}"
        lines.append(f"{args.out / name}: {writer.num_tokens:,} tokens of {documents:,} documents, "
                     f"{num_bytes / writer.num_tokens:.2f} bytes a token, {end}")
    publish(staging, args.out)
    seconds, megabytes = time.monotonic() - started, text_bytes.sum() / 1e6
    print(*lines, f"{megabytes:,.1f} MB of text in {seconds:.1f} s: {megabytes / seconds:.1f} MB/s with --workers "
          f"{args.workers}", sep="\n")
    report(num_cut, replaced, longest_val, series[1].num_tokens, args)


def report(num_cut: int, replaced: dict[str, int], longest_val: tuple[int, str], val_tokens: int, args) -> None:
    if num_cut:
        print(f"{num_cut:,} documents were cut to {args.max_bytes:,} bytes (--max_bytes)")
    if replaced:
        names = ", ".join(list(replaced)[:5]) + (", ..." if len(replaced) > 5 else "")
        print(f"note: {sum(replaced.values()):,} characters that were not UTF-8 became U+FFFD, in {len(replaced):,} "
              f"files: {names} (--strict stops at them)", file=sys.stderr)
    if 4 * longest_val[0] > val_tokens:
        print(f"note: {longest_val[1]} makes up {longest_val[0] / val_tokens:.0%} of the validation tokens; "
              "--max_bytes cuts long documents", file=sys.stderr)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="*", metavar="INPUT", help="folder, file, glob or - (default: torch's folder)")
    parser.add_argument("--out", type=Path, help="folder for the shards (with no INPUT: data/tiny)")
    parser.add_argument("--suffixes", nargs="+", metavar="SUFFIX",
                        help=f"file endings taken from folders (default: {' '.join(SUFFIXES)}; of torch's folder .py)")
    parser.add_argument("--format", choices=("text", "jsonl"), default="text",
                        help="of standard input, and of files that do not end in .jsonl or .parquet (default: text)")
    parser.add_argument("--separator",
                        help="what stands between documents in a text file; \\n: a line's end; dashes: --separator=---")
    parser.add_argument("--text_field", default="text", help="of JSON lines and parquet (default: text)")
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument("--encoding", choices=("bytes", "gpt2"), default="bytes", help="tokens (default: bytes)")
    tokens.add_argument("--tiktoken", type=Path, metavar="FILE",
                        help="BPE ranks in tiktoken's format, taken with GPT-2's split; end-of-text comes after them")
    parser.add_argument("--max_bytes", type=int,
                        help=f"bytes kept of each document, 0 = all (default: 0; of torch's files {TINY_MAX_BYTES})")
    parser.add_argument("--strict", action="store_true", help="text that is not UTF-8 is an error")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000, help="of each shard (default: 100,000,000)")
    parser.add_argument("--workers", type=int, help="processes that encode (default: the number of cores)")
    parser.add_argument("--force", action="store_true", help="write the shards even where good ones are there")
    args = parser.parse_intermixed_args(arguments)     # inputs before and after options
    if args.input and not args.out:
        parser.error("--out: name a folder for the shards of your text, such as --out data/mine")
    args.out = args.out or TINY_FOLDER
    if args.max_bytes is None:
        args.max_bytes = 0 if args.input else TINY_MAX_BYTES
    if args.workers is None:
        args.workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for option, lowest, highest in (("max_bytes", 0, sys.maxsize), ("shard_tokens", 1, MAX_TOKENS),
                                    ("workers", 1, 1024)):
        if not lowest <= getattr(args, option) <= highest:
            parser.error(f"--{option} {getattr(args, option)}: give {lowest} to {highest}")
    args.separator = os.fsencode(args.separator.replace("\\n", "\n")) if args.separator else b""
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        staging_folders(args.out)
        if not args.force and (line := good_shards(args.out)):
            print(line)
            return
        if args.input:
            suffixes, skip = [f".{suffix.lower().lstrip('.')}" for suffix in args.suffixes or SUFFIXES], ()
            sources = find_sources(args.input, suffixes, skip)
        else:
            suffixes, folder = args.suffixes or [".py"], Path(importlib.util.find_spec("torch").origin).parent
            sources = find_sources([str(folder)], suffixes, BUILD_PATHS)
        if not sources:
            raise InputError(f"no file in {' '.join(args.input)} ends in {' '.join(suffixes)}; name endings with "
                             "--suffixes")
        if all(is_one_document(source, args) for source in sources):     # seen before the work, not after it
            num_val = sum(is_validation(source.digest) for source in sources)
            check_splits((len(sources) - num_val, num_val))
        tokenizer = Tokenizer(args)
        with staging_folder(args.out) as staging:
            write_shards(sources, tokenizer, args, staging)
    except (InputError, ShardError) as error:
        sys.exit(f"local_text.py: {error}")
    except OSError as error:     # of a full disk names no file
        sys.exit(f"local_text.py: {args.out}: {error}")
    except KeyboardInterrupt:
        print("local_text.py: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
