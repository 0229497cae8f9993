"""data/local_text.py: what stands in the shards is the text, against the rules written down again here."""

import base64
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import local_text
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import regex
import torch
from conftest import ROOT

import train_gpt

# GPT-2's split, as its authors published it; \s is Unicode's White_Space.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+".replace(
    r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "data")}
GPT2_RANKS = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"     # as tiktoken names the file in its cache


def make(*arguments):
    local_text.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        make(*arguments)
    assert stop.value.code not in (0, None)
    return f"{stop.value.code}\n{capsys.readouterr().err}"


def is_val(name: str) -> bool:
    return int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0


def in_order(names) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha1(name.encode()).hexdigest())


def name_in(split: str, form: str = "{}.txt") -> str:
    return next(name for i in range(10**6) if is_val(name := form.format(i)) == (split == "val"))


def read_split(out: Path, split: str, end_of_text: int = 256, shard_tokens: int | None = None) -> list[list[int]]:
    """The documents of a split, over its shards, read without data/shards.py."""
    paths = sorted(out.glob(f"{split}_*.bin"))
    assert [path.name for path in paths] == [f"{split}_{i:06d}.bin" for i in range(len(paths))]
    parts = [np.fromfile(path, dtype="<u2", offset=1024).tolist() for path in paths]
    assert not shard_tokens or all(len(part) == shard_tokens for part in parts[:-1])
    tokens = sum(parts, [])
    starts = [i for i, token in enumerate(tokens) if token == end_of_text]
    assert starts[0] == 0
    return [tokens[start + 1:end] for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def texts(out: Path) -> list[bytes]:
    return sorted(bytes(tokens) for split in ("train", "val") for tokens in read_split(out, split))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".local_text.lock"}


def write_ranks(path: Path) -> Path:
    tokens = [bytes([i]) for i in range(255, -1, -1)]
    tokens += [b"th", b"the", b" the", b"in", b"\xc3\xa9", b"\xf0\x9f", b"\xf0\x9f\x99", b"\xf0\x9f\x99\x82", b"\n\n"]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def plain_bpe(text: str, ranks: dict[bytes, int]) -> list[int]:
    """The definition: in each piece of the split, the adjacent pair of the lowest rank is merged until none is left."""
    ids = []
    for piece in regex.findall(GPT2_SPLIT, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while found := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            at = min(found)[1]
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(params=["bytes", "ranks", "gpt2"])
def encoding(request, tmp_path, monkeypatch):
    """(what --encoding takes, end-of-text, the tokens of a text); where GPT-2's ranks are not there, a small file is."""
    if request.param == "bytes":
        return "bytes", 256, list
    option = path = write_ranks(tmp_path / "ranks")
    for folder in (os.environ.get("TIKTOKEN_CACHE_DIR"), ROOT.parent / "shared/tiktoken"):
        if request.param == "gpt2" and folder and Path(folder, GPT2_RANKS).exists():
            monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
            option, path = "gpt2", Path(folder, GPT2_RANKS)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    return option, len(ranks), lambda text: plain_bpe(text.decode("utf-8", "replace"), ranks)


def odd_document(rng: random.Random) -> bytes:
    return rng.choice([
        b"", bytes([rng.randrange(256)]), rng.randbytes(rng.randrange(60)), b"\0" * rng.randrange(1, 9), b"<|endoftext|>",
        "🙂 naïve é\n\n".encode() * rng.randrange(1, 5), b"\xff\xfe in the \xf0\x9f end", b"the " * rng.randrange(40, 90),
        "\ufffd\ufeff \r\n\n\n".encode(), b" " * rng.randrange(30) + b"x"])


def write_corpus(folder: Path, rng: random.Random) -> dict[str, list[bytes]]:
    """Writes odd documents in every format; returns the documents of each split in order, by the rule of the docs."""
    documents, data = {}, {}
    for number in range(60):
        name = f"{rng.choice(['', 'a/', 'a/b c/'])}é{number}{rng.choice(['.txt', '.md.gz', '.PY', '.py.GZ'])}"
        documents[name] = [odd_document(rng)]
        data[name] = documents[name][0]
    for name in ("lines.jsonl", "lines.jsonl.gz"):
        documents[name] = [odd_document(rng).decode("utf-8", "ignore").encode() for _ in range(25)]
        data[name] = "\n \n".join(json.dumps(dict(id=1, text=text.decode())) for text in documents[name]).encode()
    for name in ("table.parquet", "table.parquet.gz"):
        documents[name] = [odd_document(rng) for _ in range(17)]
        table, buffer = pyarrow.table(dict(text=pyarrow.array(documents[name], pyarrow.binary()))), io.BytesIO()
        pyarrow.parquet.write_table(table, buffer, row_group_size=5)
        data[name] = buffer.getvalue()
    expected = {"train": [], "val": []}
    for name in in_order(documents):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(data[name]) if name.lower().endswith(".gz") else data[name])
        for i, document in enumerate(documents[name]):
            several = "lines" in name or "table" in name
            expected["val" if is_val(f"{name}:{i}" if several else name) else "train"].append(document)
    return expected


@pytest.mark.parametrize("seed", range(3))
def test_every_document_stands_in_the_shards_once_and_in_order(tmp_path, monkeypatch, encoding, seed):
    rng, (option, end_of_text, tokens_of) = random.Random(seed), encoding
    expected = {split: [tokens_of(document) for document in documents]
                for split, documents in write_corpus(tmp_path / "text", rng).items()}
    # The first document, then the first two, end where a shard ends, and others are longer than a shard.
    shard_tokens = max(10, sum(1 + len(tokens) for tokens in expected["train"][:1 + seed % 2]))
    monkeypatch.setattr(local_text, "SHARD_TOKENS", shard_tokens)
    monkeypatch.setattr(local_text, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(os, "fsync", lambda file: None)     # of a hundred shards
    monkeypatch.chdir(tmp_path)
    for workers, given in ((1, tmp_path / "text"), (3, "./text/"), (2, "text/**/*.*")):
        make(given, "--out", f"{workers}", "--workers", workers, "--encoding", option)
        assert files(tmp_path / f"{workers}") == files(tmp_path / "1")
    for split, documents in expected.items():
        assert read_split(tmp_path / "1", split, end_of_text, shard_tokens) == documents and documents


def test_tiny_data_is_what_the_preset_names(tmp_path):
    if torch.__version__.split("+")[0] != "2.13.0":
        pytest.skip(f"the preset's sha256 are of torch 2.13.0's sources, here is {torch.__version__}")
    make("--out", tmp_path)
    c = train_gpt.make_config(dict(track="tiny"))
    for split, expected in (("train", c.train_sha256), ("val", c.val_sha256)):
        assert hashlib.sha256((tmp_path / f"{split}_000000.bin").read_bytes()).hexdigest() == expected


@pytest.fixture
def both(tmp_path) -> dict[str, str]:
    """A folder tmp_path/text with a file for each split; {split: its name}."""
    names = {split: name_in(split) for split in ("train", "val")}
    (tmp_path / "text").mkdir()
    for split, name in names.items():
        (tmp_path / "text" / name).write_text(f"the {split} text")
    return names


def test_what_a_folder_a_file_and_a_pattern_take(tmp_path, both, monkeypatch):
    text, basic, upper = tmp_path / "text", [b"the train text", b"the val text"], b"other sub/UPPER.TXT"
    (text / "sub" / "folder.txt").mkdir(parents=True)
    for name in ("a.bin", "b.jpg", "noending", "sub/UPPER.TXT"):
        (text / name).write_bytes(b"other " + name.encode())
    monkeypatch.chdir(text)
    monkeypatch.setenv("HOME", str(text))
    for arguments, more in (((text,), [upper]), (("~/*.txt",), []), (("*.txt", "sub/.."), [*basic, upper]),
                            ((*both.values(), "a.bin"), [b"other a.bin"]), ((f"{text}/**/*.[tT]*",), [upper]),
                            ((text, "--suffixes", ".txt", ".jpg"), [b"other b.jpg", upper])):
        make(*arguments, "--out", tmp_path / "out", "--force")
        assert texts(tmp_path / "out") == sorted(basic + more), arguments


def test_separators_equal_names_and_half_characters(tmp_path, both):
    pieces = [f"document {i}".encode() for i in range(60)]
    (tmp_path / "a.md").write_bytes(b"--\n".join([*pieces, b"", b"\n"]))
    (tmp_path / "a.jsonl").write_text(r'{"body": "a\ud83db\ud83d\ude42"}')
    (tmp_path / both["train"]).write_text("second")
    make(tmp_path / "text", tmp_path / both["train"], tmp_path / "a.md", tmp_path / "a.jsonl", r"--separator=--\n",
         "--text_field", "body", "--out", tmp_path / "out")
    half = b"a\xed\xa0\xbdb" + "🙂".encode()     # three bytes that are not UTF-8
    assert texts(tmp_path / "out") == sorted([*pieces, b"the train text", b"the val text", b"second", half])


def test_what_is_not_utf8_is_replaced_and_counted(tmp_path, both, capsys):
    bad = "\ufffd".encode() + b" in \xff\xfe the \xf0\x9f"      # two bytes and a half character
    (tmp_path / "text" / name_in("train", "bad{}.txt")).write_bytes(bad)
    make(tmp_path / "text", "--out", tmp_path / "out", "--encoding", write_ranks(tmp_path / "ranks"))
    assert capsys.readouterr().err == "note: 3 characters were not UTF-8 and became U+FFFD\n"
    make(tmp_path / "text", "--out", tmp_path / "out", "--force")
    assert capsys.readouterr().err == "" and bad in texts(tmp_path / "out")


@pytest.mark.parametrize("name, data, message", [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "a.jsonl: line 3 is not JSON"),
    ("a.jsonl", b'{"text": "a\xff"}\n', "a.jsonl: line 1 is not JSON"), ("a.jsonl", b"[" * 10**5, "line 1 is not JSON"),
    ("a.jsonl", b"[1]\n", "line 1 has no text in 'text': [1]"), ("a.jsonl", b'{"text": 1}', "name its --text_field"),
    ("a.parquet", dict(text=["a", None]), "row 2 has no text in 'text'"), ("a.parquet", dict(text=[1]), "row 1 has no"),
    ("a.parquet", dict(body=["a"], n=[1]), "row 1 has no text in 'text': {'body': 'a', 'n': 1}"),
    ("a.parquet", b"text", "a.parquet: ArrowInvalid"), ("a.gz", b"text", "a.gz: BadGzipFile"),
    ("a.txt.gz", gzip.compress(bytes(range(256)) * 9)[:-20], "a.txt.gz: EOFError"),
    ("a.txt", b"a" + b"\n" * 1_200_000 + b"b", "a.txt: tiktoken cannot split it"),
])
def test_errors_of_files(tmp_path, both, capsys, name, data, message):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else b"")
    if isinstance(data, dict):
        pyarrow.parquet.write_table(pyarrow.table(data), tmp_path / name)
    options = ["--out", tmp_path / "out", "--encoding", write_ranks(tmp_path / "ranks")]
    error = error_of(capsys, tmp_path / "text", tmp_path / name, *options)
    assert message in error and str(tmp_path / name) in error and not files(tmp_path / "out")


def test_errors_of_arguments(tmp_path, both, capsys):
    text, out = tmp_path / "text", tmp_path / "out"
    (tmp_path / "empty").mkdir()
    for arguments, message in (
            ([text], "--out: name a folder"), (["no", "--out", out], "no: no such file"),
            ([tmp_path / "empty", "--out", out], "none in it ends in .txt .md .py .jsonl .parquet (--suffixes)"),
            ([text / both["train"], "--out", out], "1 documents fall to training and 0 to validation"),
            ([text, "--out", out, "--workers", "0"], "--workers 0: give at least 1"),
            ([text, "--out", out, "--encoding", "none"], "none: not BPE ranks"),
            ([text, "--out", text / both["val"]], "File exists")):
        assert message in error_of(capsys, *arguments)


def test_good_shards_stay_and_others_are_written_again(tmp_path, both, monkeypatch):
    options, out = [tmp_path / "text", "--out", tmp_path / "out"], tmp_path / "out"
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 5)
    make(*options)
    whole = files(out)
    assert len(whole) == 3 + 3
    (tmp_path / "text" / both["val"]).write_text("another text")
    make(*options)
    assert files(out) == whole
    (tmp_path / "text" / both["val"]).write_text("the val text")
    for name, change in (("train_000001.bin", b""), ("val_000000.bin", b""), ("train_000002.bin", b"z\0")):
        (out / name).write_bytes(whole[name][:-2] + change)
        make(*options)
        assert files(out) == whole
        (out / name).unlink()
        make(*options)
        assert (files(out) == whole) == (name != "train_000002.bin")


class Killed(BaseException):
    pass


def test_a_kill_between_any_two_renames_leaves_the_old_set_the_new_one_or_none(tmp_path, both, monkeypatch):
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 8)
    make(tmp_path / "text", "--out", tmp_path / "old")
    (tmp_path / "text" / both["val"]).write_text("another val text")
    make(tmp_path / "text", "--out", tmp_path / "new")
    old, new, out = files(tmp_path / "old"), files(tmp_path / "new"), tmp_path / "out"
    assert len(old) == 2 + 2 and len(new) == 2 + 3
    for most in range(len(old) + len(new)):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        left = iter(range(most))

        def counted(change, left=left):
            def wrapper(*paths, **options):
                if Path(paths[-1]).parent == out and next(left, None) is None:
                    raise Killed
                return change(*paths, **options)
            return wrapper

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            make(tmp_path / "text", "--out", out, "--force")
        assert (files(out) == old) == (most == 0)
        make(tmp_path / "text", "--out", out)
        assert files(out) == (old if most == 0 else new)


WAITS = """
import sys, time, local_text
def wait(series, tokens):
    print("waiting", flush=True)
    time.sleep(100)
local_text.SeriesWriter.write = wait
local_text.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_stopped_leaves_what_was_there(tmp_path, both, capsys, number, code):
    options = [tmp_path / "text", "--out", tmp_path / "out", "--force"]
    make(*options)
    old = files(tmp_path / "out")
    process = subprocess.Popen([sys.executable, "-c", WAITS, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=ENVIRONMENT)
    assert process.stdout.readline() == "waiting\n"
    assert "another run is writing to" in error_of(capsys, *options)
    process.send_signal(number)
    assert "Traceback" not in process.communicate()[1] and process.returncode == code
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.bin")} == old
    make(*options)
    assert files(tmp_path / "out") == old     # and what the killed run left is gone


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    """Of 20 and 80 MB that hardly compress, in one row group."""
    peaks = []
    for megabytes in (20, 80):
        rows = [base64.b64encode(random.Random(i).randbytes(7500)).decode() for i in range(100 * megabytes)]
        if kind == "jsonl":
            (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.table(dict(text=rows)), tmp_path / "a.parquet", row_group_size=10**6)
        code = "import sys, local_text; local_text.main(sys.argv[1:]); print(open('/proc/self/status').read())"
        command = [sys.executable, "-c", code, tmp_path / f"a.{kind}", "--out", tmp_path / "out", "--force"]
        printed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True).stdout
        peaks.append(int(regex.search(r"VmHWM:\s+(\d+) kB", printed)[1]) / 1024)
    assert peaks[1] < peaks[0] + 24, f"peak memory in MB: {peaks}"
