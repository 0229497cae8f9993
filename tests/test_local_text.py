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
import pyarrow
import pyarrow.parquet
import pytest
import regex
import shards
import torch
from conftest import ROOT

import train_gpt

# GPT-2's split, as its authors published it: \s is Unicode's White_Space, which Python sees otherwise.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+".replace(
    r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
GPT2_RANKS = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"     # as tiktoken names the file in its cache
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "data")}


def make(*arguments):
    local_text.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        make(*arguments)
    return f"{stop.value.code}\n{capsys.readouterr().err}"


def digest(name: str) -> int:
    return int(hashlib.sha1(name.encode()).hexdigest(), 16)


def files(folder: Path, pattern: str = "[!.]*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def texts(out: Path) -> list[bytes]:
    tokens = [shards.read_shard(path)[0].tolist() for path in sorted(out.glob("*.bin"))]
    return sorted(text.encode("latin-1") for text in "".join(map(chr, sum(tokens, []))).split(chr(256))[1:])


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
    """(what --encoding takes, its vocabulary size, the tokens of a text); a small file stands for missing GPT-2 ranks."""
    if request.param == "bytes":
        return "bytes", 257, list
    option = path = write_ranks(tmp_path / "ranks")
    for folder in (os.environ.get("TIKTOKEN_CACHE_DIR"), ROOT.parent / "shared/tiktoken"):
        if request.param == "gpt2" and folder and Path(folder, GPT2_RANKS).exists():
            monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
            option, path = "gpt2", Path(folder, GPT2_RANKS)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    return option, len(ranks) + 1, lambda text: plain_bpe(text.decode("utf-8", "replace"), ranks)


def odd_document(rng: random.Random) -> bytes:
    return rng.choice([
        b"", bytes([rng.randrange(256)]), rng.randbytes(rng.randrange(60)), b"\0" * rng.randrange(1, 9), b"<|endoftext|>",
        "🙂 naïve é\n\n".encode() * rng.randrange(1, 5), b"\xff in the \xf0\x9f end", b"the " * rng.randrange(40, 90),
        "\ufffd\ufeff \r\n\n\n".encode(), b" " * rng.randrange(30) + b"x"])


def write_corpus(folder: Path, rng: random.Random) -> dict[str, list[bytes]]:
    """Writes odd documents in every format; returns those of each split in order, by the rule in the program's help."""
    expected = {"train": [], "val": []}
    endings = [*(15 * [".txt", ".md.gz", ".PY", ".py.GZ"]), ".jsonl", ".jsonl.gz", ".parquet", ".parquet.gz"]
    for name in sorted((f"{rng.choice(['', 'a/', 'a/b c/'])}é{i}{endings[i]}" for i in range(len(endings))), key=digest):
        documents = [odd_document(rng) for _ in range(20)]
        names, buffer = [f"{name}:{i}" for i in range(20)], io.BytesIO()
        if ".jsonl" in name:
            documents = [document.decode("utf-8", "ignore").encode() for document in documents]
            buffer.write("\n \n".join(json.dumps(dict(id=1, text=text.decode())) for text in documents).encode())
        elif ".parquet" in name:
            table = pyarrow.table(dict(text=pyarrow.array(documents, pyarrow.binary())))
            pyarrow.parquet.write_table(table, buffer, row_group_size=5)
        else:
            names, documents = [name], documents[:1]
            buffer.write(documents[0])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        compress = gzip.compress if name.lower().endswith(".gz") else bytes
        (folder / name).write_bytes(compress(buffer.getvalue()))
        for document_name, document in zip(names, documents, strict=True):
            expected["train" if digest(document_name) % 20 else "val"].append(document)
    return expected


@pytest.mark.parametrize("seed", range(3))
def test_every_document_stands_in_the_shards_once_and_in_order(tmp_path, monkeypatch, encoding, seed):
    option, vocab_size, tokens_of = encoding
    expected = {split: [[vocab_size - 1, *tokens_of(document)] for document in documents]
                for split, documents in write_corpus(tmp_path / "text", random.Random(seed)).items()}
    # The first document, then the first two, end where a shard ends, and others are longer than a shard.
    size = max(10, len(sum(expected["train"][:1 + seed % 2], [])))
    monkeypatch.setattr(local_text, "SHARD_TOKENS", size)
    monkeypatch.setattr(local_text, "BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(os, "fsync", lambda file: None)     # of a hundred shards
    monkeypatch.chdir(tmp_path)
    for workers, given in ((1, tmp_path / "text"), (3, "./text/"), (2, "text/**/*.*")):
        make(given, "--out", f"{workers}", "--workers", workers, "--encoding", option)
        assert files(tmp_path / f"{workers}") == files(tmp_path / "1")
    for split, documents in expected.items():
        tokens = sum(documents, [])
        for number, start in enumerate(range(0, len(tokens), size)):
            found, stated_size = shards.read_shard(tmp_path / f"1/{split}_{number:06d}.bin")
            assert found.tolist() == tokens[start:start + size] and stated_size == vocab_size
        assert len(files(tmp_path / "1", f"{split}*")) == number + 1


def test_tiny_data_is_what_the_preset_names(tmp_path):
    if torch.__version__.split("+")[0] != "2.13.0":
        pytest.skip(f"the preset's sha256 are of torch 2.13.0's sources, here is {torch.__version__}")
    make("--out", tmp_path)
    c = train_gpt.make_config(dict(track="tiny"))
    for split, expected in (("train", c.train_sha256), ("val", c.val_sha256)):
        assert hashlib.sha256((tmp_path / f"{split}_000000.bin").read_bytes()).hexdigest() == expected


@pytest.fixture
def both(tmp_path) -> dict[str, Path]:
    """A folder tmp_path/text with a file for each split."""
    (tmp_path / "text").mkdir()
    paths = {"train": tmp_path / "text/0.txt", "val": tmp_path / "text/7.txt"}
    for split, path in paths.items():
        assert (digest(path.name) % 20 == 0) == (split == "val")
        path.write_text(f"the {split} text")
    return paths


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
    (tmp_path / "0.txt").write_text("second")
    make(tmp_path / "text", tmp_path / "0.txt", tmp_path / "a.md", tmp_path / "a.jsonl", r"--separator=--\n",
         "--text_field", "body", "--out", tmp_path / "out")
    half = b"a\xed\xa0\xbdb" + "🙂".encode()     # three bytes that are not UTF-8
    assert texts(tmp_path / "out") == sorted([*pieces, b"the train text", b"the val text", b"second", half])


def test_what_is_not_utf8_is_counted(tmp_path, both, capsys):
    both["train"].write_bytes("\ufffd".encode() + b" in \xff\xfe the \xf0\x9f")      # two bytes and a half character
    make(tmp_path / "text", "--out", tmp_path / "out", "--encoding", write_ranks(tmp_path / "ranks"))
    assert capsys.readouterr().err == "note: 3 characters were not UTF-8 and became U+FFFD\n"


@pytest.mark.parametrize("name, data, message", [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "a.jsonl: line 3 is not JSON"),
    ("a.jsonl", b'{"text": "a\xff"}\n', "a.jsonl: line 1 is not JSON"), ("a.jsonl", b"[" * 10**5, "line 1 is not JSON"),
    ("a.jsonl", b"[1]\n", "line 1 has no text in 'text': [1]"), ("a.jsonl", b'{"text": 1}', "name its --text_field"),
    ("a.parquet", dict(text=["a", None]), "row 2 has no text in 'text'"), ("a.parquet", dict(text=[1]), "row 1 has no"),
    ("a.parquet", dict(body=["a"], n=[1]), "row 1 has no text in 'text': {'body': 'a', 'n': 1}"),
    ("a.parquet", b"text", "a.parquet: ArrowInvalid"), ("a.gz", b"text", "a.gz: BadGzipFile"),
    ("a.txt.gz", gzip.compress(bytes(range(256)) * 9)[:-20], "a.txt.gz: EOFError"),
    ("a.txt", b"a" + b"\n" * 1_200_000 + b"b", "a.txt: tiktoken cannot split it")], ids=itertools.count())
def test_errors_of_files(tmp_path, both, capsys, name, data, message):
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else b"")
    if isinstance(data, dict):
        pyarrow.parquet.write_table(pyarrow.table(data), tmp_path / name)
    options = ["--out", tmp_path / "out", "--encoding", write_ranks(tmp_path / "ranks")]
    error = error_of(capsys, tmp_path / "text", tmp_path / name, *options)
    assert message in error and str(tmp_path / name) in error and not files(tmp_path / "out", "*[!k]")


@pytest.mark.parametrize("given, options, message", [
    ("no", [], "no: no such file"), ("text/0.txt", [], "1 documents fall to training and 0 to validation"),
    ("empty", [], "none in it ends in .txt .md .py .jsonl .parquet (--suffixes)"),
    ("text", ["--workers", "0"], "--workers 0: give at least 1"), ("text", ["--encoding", "none"], "none: not BPE ranks"),
    ("text", ["--out", "text/0.txt"], "File exists")], ids=itertools.count())
def test_errors_of_arguments(tmp_path, both, monkeypatch, capsys, given, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert message in error_of(capsys, given, "--out", "out", *options)


def test_good_shards_stay_and_others_are_written_again(tmp_path, both, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 5)
    make(tmp_path / "text", "--out", out)
    whole = files(out)
    assert len(whole) == 3 + 3
    both["val"].write_text("another text")
    make(tmp_path / "text", "--out", out)
    assert files(out) == whole
    both["val"].write_text("the val text")
    for name, end in (("train_000001.bin", None), ("train_000001.bin", b""), ("train_000002.bin", b"z\0")):
        (out / name).unlink()
        if end is not None:
            (out / name).write_bytes(whole[name][:-2] + end)
        make(tmp_path / "text", "--out", out)
        assert files(out) == whole


def test_a_kill_between_any_two_renames_leaves_the_old_set_the_new_one_or_none(tmp_path, both, monkeypatch):
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 8)
    make(tmp_path / "text", "--out", tmp_path / "old")
    both["val"].write_text("another val text")
    make(tmp_path / "text", "--out", tmp_path / "new")
    old, new, out = files(tmp_path / "old"), files(tmp_path / "new"), tmp_path / "out"
    assert len(old) == 2 + 2 and len(new) == 2 + 3
    for num_changes in range(len(old) + len(new)):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        left = iter(range(num_changes))

        def counted(change, left=left):
            def wrapper(*paths, **options):
                if Path(paths[-1]).parent == out and next(left, None) is None:
                    raise GeneratorExit     # which nothing catches, as a kill
                return change(*paths, **options)
            return wrapper
        with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            make(tmp_path / "text", "--out", out, "--force")
        assert (files(out) == old) == (num_changes == 0)
        make(tmp_path / "text", "--out", out)
        assert files(out) == (old if num_changes == 0 else new)


WAITS = """
import sys, time, local_text
local_text.SeriesWriter.write = lambda series, tokens: print("waiting", flush=True) or time.sleep(100)
local_text.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_stopped_leaves_what_was_there(tmp_path, both, capsys, number, code):
    options = [tmp_path / "text", "--out", tmp_path / "out", "--force"]
    make(*options)
    old = files(tmp_path / "out", "*.bin")
    with subprocess.Popen([sys.executable, "-c", WAITS, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=ENVIRONMENT) as process:
        assert process.stdout.readline() == "waiting\n"
        assert "another run is writing to" in error_of(capsys, *options)
        process.send_signal(number)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == code and files(tmp_path / "out", "*.bin") == old
    make(*options)
    assert files(tmp_path / "out", "*.bin") == old and len(os.listdir(tmp_path / "out")) == 3     # and a lock


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
