"""data/local_text.py: what stands in the shards is the text, against the rules written down again here."""

import base64
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import local_text
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import shards
import torch
from conftest import ROOT

import train_gpt

SCRIPT = ROOT / "data/local_text.py"
MERGES = [b"th", b"the", b" the", b"in", b"\xc3\xa9", b"\xf0\x9f", b"\xf0\x9f\x99", b"\xf0\x9f\x99\x82", b"\n\n"]


def tokenize(*arguments, **options):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=100,
                          **options)


def make(*arguments):
    """In this process, which costs no start."""
    local_text.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        make(*arguments)
    assert stop.value.code not in (0, None)
    return f"{stop.value.code}\n{capsys.readouterr().err}"


def is_val(name: str) -> bool:
    return int(hashlib.sha1(name.encode()).hexdigest(), 16) % 20 == 0


def in_order(names):
    return sorted(names, key=lambda name: hashlib.sha1(name.encode()).hexdigest())


def name_in(split: str, form: str = "{}.txt", start: int = 0) -> str:
    """A name that falls to the split."""
    return next(name for i in range(start, 10**6) if is_val(name := form.format(i)) == (split == "val"))


def read_split(out: Path, split: str, end_of_text: int, shard_tokens: int | None = None) -> list[list[int]]:
    """The documents of a split, over its shards, read without data/shards.py."""
    paths = sorted(out.glob(f"{split}_*.bin"))
    assert [path.name for path in paths] == [f"{split}_{i:06d}.bin" for i in range(len(paths))]
    parts = [np.fromfile(path, dtype="<u2", offset=1024).tolist() for path in paths]
    if shard_tokens:
        assert all(len(part) == shard_tokens for part in parts[:-1]) and 0 < len(parts[-1]) <= shard_tokens
    tokens = sum(parts, [])
    starts = [i for i, token in enumerate(tokens) if token == end_of_text]
    assert starts[0] == 0
    return [tokens[start + 1:end] for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]


def texts(out: Path, split: str) -> list[bytes]:
    return [bytes(tokens) for tokens in read_split(out, split, 256)]


def write_ranks(path: Path) -> list[bytes]:
    """A small BPE; its tokens, which decode its ids."""
    tokens = [*(bytes([i]) for i in range(255, -1, -1)), *MERGES]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return tokens


@pytest.fixture
def gpt2(monkeypatch):
    cache = ROOT.parent / "shared/tiktoken"
    if not cache.is_dir():
        pytest.skip("no tiktoken cache with r50k_base at ../shared/tiktoken, and no network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    import tiktoken
    return tiktoken.get_encoding("r50k_base")


def odd_document(rng: random.Random) -> bytes:
    return rng.choice([
        lambda: b"", lambda: bytes([rng.randrange(256)]), lambda: rng.randbytes(rng.randrange(60)),
        lambda: "🙂 naïve é".encode() * rng.randrange(1, 5), lambda: b"\0" * rng.randrange(1, 9),
        lambda: b"\xff\xfe in the \xf0\x9f end", lambda: b"<|endoftext|>", lambda: b"the " * rng.randrange(40, 90),
        lambda: "\ufffd\ufeff \r\n\n\n".encode(), lambda: b" " * rng.randrange(30) + b"x"])()


def write_corpus(folder: Path, rng: random.Random) -> dict[str, list[bytes]]:
    """Writes odd documents in every format; returns the documents of each split in order, by the rule of the docs."""
    def compress(data, ending):
        return {"": lambda: data, ".gz": lambda: gzip.compress(data), ".zst": lambda: pyarrow.compress(
            data, codec="zstd", asbytes=True)}[ending]()

    files = {}
    for number in range(40):
        name = f"{rng.choice(['', 'a/', 'a/b c/'])}é{number}{rng.choice(['.txt', '.md', '.PY'])}"
        ending = rng.choice(["", "", ".gz", ".zst"])
        files[name + ending] = [odd_document(rng)], lambda documents: documents[0], ending
    for number in range(4):
        def lines(documents):
            return "\n \n".join(
                json.dumps(dict(id=1, text=document.decode("utf-8", "surrogateescape")), ensure_ascii=False)
                for document in documents).encode("utf-8", "surrogateescape")
        ending = ["", ".gz", ".zst", ""][number]
        files[f"lines{number}.jsonl{ending}"] = [odd_document(rng) for _ in range(15 * (number > 0))], lines, ending
    for number in range(2):
        def table(documents):
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table(dict(text=pyarrow.array(documents, pyarrow.binary()))), buffer,
                                        row_group_size=5)
            return buffer.getvalue()
        files[f"table{number}.parquet"] = [odd_document(rng) for _ in range(17)], table, ""
    expected = {"train": [], "val": []}
    for name in in_order(files):
        documents, write, ending = files[name]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(compress(write(documents), ending))
        for i, document in enumerate(documents):
            several = ".jsonl" in name or ".parquet" in name
            expected["val" if is_val(f"{name}:{i}" if several else name) else "train"].append(document)
    assert all(expected.values())
    return expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tokens", ["bytes", "ranks", "gpt2"])
def test_every_document_stands_in_the_shards_once_and_in_order(tmp_path, monkeypatch, request, tokens, seed):
    """By decoding them back. Of seed 0 with 3 processes as well, which must give the same files."""
    rng = random.Random(seed)
    expected = write_corpus(tmp_path / "text", rng)
    if tokens == "bytes":
        options, end_of_text, decode = [], 256, bytes
        # The first document, then the first two, end on a shard's boundary, and others are longer than a shard.
        shard_tokens = max(10, sum(1 + len(document) for document in expected["train"][:1 + seed % 2]))
    else:
        if tokens == "ranks":
            table, options = write_ranks(tmp_path / "ranks"), ["--tiktoken", tmp_path / "ranks"]
        else:
            encoding, options = request.getfixturevalue("gpt2"), ["--encoding", "gpt2"]
            table = [encoding.decode_single_token_bytes(i) for i in range(50256)]
        end_of_text, shard_tokens = len(table), rng.randrange(20, 60)

        def decode(ids):
            return b"".join(table[i] for i in ids)
        expected = {split: [document.decode("utf-8", "replace").encode() for document in documents]
                    for split, documents in expected.items()}
    monkeypatch.setattr(local_text, "BATCH_BYTES", 300)     # many batches of little text
    monkeypatch.setattr(shards.os, "fsync", lambda file: None)     # of a hundred shards
    for workers in (1, 3) if seed == 0 else (1,):
        out = tmp_path / f"out{workers}"
        make(tmp_path / "text", "--out", out, "--shard_tokens", shard_tokens, "--workers", workers, *options)
        for split, documents in expected.items():
            assert [decode(ids) for ids in read_split(out, split, end_of_text, shard_tokens)] == documents
        for path in out.iterdir():
            assert shards.read_shard(path)[1] == end_of_text + 1
    if seed == 0:
        assert {path.name: path.read_bytes() for path in (tmp_path / "out1").iterdir()} == {
            path.name: path.read_bytes() for path in (tmp_path / "out3").iterdir()}


def test_local_text_follows_its_rule(tmp_path):
    """Against the rule written out again here: end-of-text, the first 65,536 bytes, sha1(path) mod 20, its order."""
    source, rng = tmp_path / "source", random.Random(0)
    content = {f"sub{i % 3}/file{i}.py": rng.randbytes(rng.choice([0, 1, 100, 70_000])) for i in range(120)}
    for name, data in {**content, "skipped.bin": b"x"}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    result = tokenize(source, "--out", tmp_path / "out", "--suffixes", ".py", "--max_bytes", 65536)
    assert result.returncode == 0, result.stderr
    expected = {"train": [], "val": []}
    for name in in_order(content):
        expected["val" if is_val(name) else "train"] += [256, *content[name][:65536]]
    for split, tokens in expected.items():
        assert tokens and shards.read_shard(tmp_path / f"out/{split}_000000.bin")[0].tolist() == tokens
        digest = hashlib.sha256((tmp_path / f"out/{split}_000000.bin").read_bytes()).hexdigest()
        assert f"{split}_000000.bin: {len(tokens):,} tokens of" in result.stdout and digest in result.stdout
    num_cut = sum(len(data) > 65536 for data in content.values())
    assert f"{num_cut} documents were cut to 65,536 bytes" in result.stdout
    make(source, "--out", tmp_path / "whole", "--suffixes", "py")     # by default nothing of one's own text is cut
    assert sorted(texts(tmp_path / "whole", "train") + texts(tmp_path / "whole", "val")) == sorted(content.values())


def test_tiny_data_is_what_the_preset_names(tmp_path):
    if torch.__version__.split("+")[0] != "2.13.0":
        pytest.skip(f"the preset's sha256 are of torch 2.13.0's sources, here is {torch.__version__}")
    assert tokenize("--out", tmp_path).returncode == 0
    c = train_gpt.make_config(dict(track="tiny"))
    for split, expected in (("train", c.train_sha256), ("val", c.val_sha256)):
        assert hashlib.sha256((tmp_path / f"{split}_000000.bin").read_bytes()).hexdigest() == expected
    tokens = shards.read_shard(tmp_path / "val_000000.bin")[0]
    folder = Path(importlib.util.find_spec("torch").origin).parent
    first = bytes(tokens[1:1 + int(np.argmax(tokens[1:] == 256))].astype(np.uint8))
    assert any(path.read_bytes()[:65536] == first for path in folder.rglob("*.py"))


# What is read


@pytest.fixture
def both(tmp_path) -> dict[str, str]:
    """A folder tmp_path/text with a file for each split; {split: its name}."""
    names = {split: name_in(split) for split in ("train", "val")}
    (tmp_path / "text").mkdir()
    for split, name in names.items():
        (tmp_path / "text" / name).write_text(f"the {split} text")
    return names


def test_what_a_folder_a_file_and_a_glob_take(tmp_path, both, monkeypatch):
    text = tmp_path / "text"
    for name in ("a.bin", "b.jpg", "noending"):
        (text / name).write_bytes(b"other " + name.encode())
    (text / "sub").mkdir()
    (text / "sub" / "UPPER.TXT").write_text("upper")
    (text / "sub" / "folder.txt").mkdir()
    expected = {"train": b"the train text", "val": b"the val text"}

    def everything(*arguments):
        make(*arguments, "--out", tmp_path / "out", "--force", "--workers", 1)
        found = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
        return sorted(found)
    assert everything(text) == sorted([*expected.values(), b"upper"])
    assert everything(text, text / "a.bin") == sorted([*expected.values(), b"upper", b"other a.bin"])
    assert everything(f"{text}/**/*.[tT]*") == sorted([*expected.values(), b"upper"])
    assert everything(text, "--suffixes", ".txt", ".jpg") == sorted([*expected.values(), b"upper", b"other b.jpg"])
    monkeypatch.chdir(text)
    assert everything("*.txt", ".") == sorted(2 * [*expected.values()] + [b"upper"])
    monkeypatch.setenv("HOME", str(text))
    assert everything("~/*.txt") == sorted(expected.values())


def test_names_are_below_the_folder_however_it_is_given(tmp_path, monkeypatch):
    """One set of documents by four ways of naming it: the same shards."""
    rng = random.Random(0)
    for i in range(80):
        path = tmp_path / f"x/corpus/{i % 3}/{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(30)))
    monkeypatch.chdir(tmp_path / "x")
    found = []
    for number, given in enumerate((tmp_path / "x/corpus", "corpus", "./corpus/", "corpus/**/*.txt", "corpus/*/*")):
        make(given, "--out", tmp_path / f"out{number}", "--workers", 1)
        found.append([(tmp_path / f"out{number}/{split}_000000.bin").read_bytes() for split in ("train", "val")])
    assert all(one == found[0] for one in found)


def test_equal_names_of_two_folders_are_both_kept(tmp_path, both):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / both["train"]).write_text("second")
    make(tmp_path / "text", tmp_path / "more", "--out", tmp_path / "out", "--workers", 1)
    assert texts(tmp_path / "out", "train") == [b"the train text", b"second"]


def test_standard_input(tmp_path):
    lines = [f"document {i}" for i in range(60)]
    expected = [[line.encode() for i, line in enumerate(lines) if is_val(f"-:{i}") == val] for val in (False, True)]
    for data, options in (("\n".join(json.dumps(dict(body=line)) for line in lines),
                           ["--format", "jsonl", "--text_field", "body"]),
                          ("--\n".join(lines), [r"--separator=--\n"])):
        result = tokenize("-", *options, "--out", tmp_path, "--force", input=data)
        assert result.returncode == 0, result.stderr
        assert [texts(tmp_path, split) for split in ("train", "val")] == expected


@pytest.mark.parametrize("separator", [b"\n\n", b"<|endoftext|>", b"aab"])
def test_separators_are_found_wherever_a_block_ends(monkeypatch, separator):
    rng = random.Random(0)
    for _ in range(300):
        data = b"".join(rng.choices([separator, separator[:2], b"a", b"\n", b"text"], k=rng.randrange(20)))
        monkeypatch.setattr(local_text, "BATCH_BYTES", rng.randrange(1, 9))
        found = list(local_text.split_text(io.BytesIO(data), separator))
        assert [piece for _, piece in found] == [piece for piece in data.split(separator) if piece]
        assert all(data[start:start + len(piece)] == piece for start, piece in found)


def test_json_that_holds_half_a_character(tmp_path):
    """An escaped half of a surrogate pair is no text: three bytes that are not UTF-8."""
    lines = [json.dumps(dict(text=f"{i}")) for i in range(60)]
    lines[0] = r'{"text": "a\ud83db\ud83d\ude42"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    make(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--workers", 1)
    assert texts(tmp_path / "out", "val" if is_val("a.jsonl:0") else "train")[0] == b"a\xed\xa0\xbdb" + "🙂".encode()


def test_the_file_of_ranks_is_read_anew(tmp_path, both, monkeypatch):
    """tiktoken's own reader would give back what a path held before."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for ending in (b" text", b"zz"):
        tokens = [*(bytes([i]) for i in range(256)), b"te", b"xt", b"text", ending]
        (tmp_path / "ranks").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
        make(tmp_path / "text", "--out", tmp_path / "out", "--force", "--workers", 1, "--tiktoken", tmp_path / "ranks")
        found = read_split(tmp_path / "out", "val", 260)[0]
        assert b"".join(tokens[i] for i in found) == b"the val text"
        assert found[-1] == (259 if ending == b" text" else 258)


# Text that is not UTF-8, and text that is hard


def test_gpt2_tokens(tmp_path, gpt2):
    text = "Hello, world! naïve café 🙂\n"
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(text * (i + 1))
    assert tokenize(tmp_path, "--out", tmp_path / "out", "--encoding", "gpt2").returncode == 0
    tokens, vocab_size = shards.read_shard(tmp_path / "out/val_000000.bin")
    assert vocab_size == 50257
    documents = gpt2.decode(tokens.tolist()).split("<|endoftext|>")[1:]
    expected = [text * (int(name[:-4]) + 1) for name in in_order(f"{i}.txt" for i in range(40)) if is_val(name)]
    assert documents == expected and documents
    ids = read_split(tmp_path / "out", "val", 50256)
    assert ids == [gpt2.encode_ordinary(document) for document in documents]


def test_what_is_not_utf8_is_replaced_counted_and_named(tmp_path, both, capsys):
    write_ranks(tmp_path / "ranks")
    bad = name_in("train", "bad{}.txt")
    (tmp_path / "text" / bad).write_bytes("\ufffd".encode() + b" in \xff\xfe the \xf0\x9f")     # two bytes and a half
    options = [tmp_path / "text", "--out", tmp_path / "out", "--workers", 1, "--force"]
    make(*options, "--tiktoken", tmp_path / "ranks")
    err = capsys.readouterr().err
    assert "3 characters that were not UTF-8 became U+FFFD, in 1 files" in err and bad in err
    make(*options)
    assert "UTF-8" not in capsys.readouterr().err
    assert (tmp_path / "text" / bad).read_bytes() in texts(tmp_path / "out", "train")
    before = (tmp_path / "out/train_000000.bin").read_bytes()
    for encoding in ([], ["--tiktoken", tmp_path / "ranks"]):
        assert f"{bad}: byte 7 is not UTF-8" in error_of(capsys, *options, "--strict", *encoding)
    assert (tmp_path / "out/train_000000.bin").read_bytes() == before

    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one|two|th\xffree|four"))
    (tmp_path / "b.jsonl").write_bytes(b'\n{"text": "a"}\n{"text": "ab\xff"}\n')
    for name, message in (("a.gz", "a.gz: document at byte 8: byte 10 is not"),
                          ("b.jsonl", "b.jsonl: line 3: byte 2 is not")):
        assert message in error_of(capsys, *options, tmp_path / name, "--separator", "|", "--strict")


def test_max_bytes_cuts_no_character_into_replacements(tmp_path, both, capsys):
    write_ranks(tmp_path / "ranks")
    for split in both:
        (tmp_path / "text" / both[split]).write_bytes("éé".encode())
    for limit, bpe_text in ((1, b""), (2, "é".encode()), (3, "é".encode()), (4, "éé".encode())):
        options = [tmp_path / "text", "--out", tmp_path / "out", "--force", "--workers", 1, "--max_bytes", limit]
        make(*options)
        assert texts(tmp_path / "out", "val") == ["éé".encode()[:limit]]
        make(*options, "--tiktoken", tmp_path / "ranks", "--strict")
        tokens = write_ranks(tmp_path / "ranks")
        assert b"".join(tokens[i] for i in read_split(tmp_path / "out", "val", len(tokens))[0]) == bpe_text
        assert "UTF-8" not in capsys.readouterr().err


def test_a_million_spaces(tmp_path, both, gpt2, monkeypatch):
    """tiktoken gives up inside them; the way around gives the tokens that it gives for fewer."""
    long = "a" + "\n" * 1_200_000 + "b \u2003\x1c c"
    with pytest.raises(ValueError):
        gpt2.encode_to_numpy(long, disallowed_special=())
    (tmp_path / "text" / both["val"]).write_text(long, newline="")
    make(tmp_path / "text", "--out", tmp_path / "out", "--encoding", "gpt2", "--workers", 1)
    assert gpt2.decode(read_split(tmp_path / "out", "val", 50256)[0]) == long

    class GivesUp:
        def __init__(self):
            self.calls = 0

        def encode_to_numpy(self, text, **options):
            self.calls += 1
            if self.calls == 1:
                raise ValueError
            return gpt2.encode_to_numpy(text, **options)
    tokenizer, rng = local_text.Tokenizer.__new__(local_text.Tokenizer), random.Random(0)
    for _ in range(20):
        spaces = ("".join(rng.choices(" \n\t\r\u2003\x85\xa0\v", k=rng.choice([1, 999, 1000, 1500]))) for _ in range(3))
        text = rng.choice(["", "x"]) + "".join(space + rng.choice(["word", "\x1c", "1", "'s"]) for space in spaces)
        text += "\n" * rng.choice([0, 1200])
        tokenizer.bpe = GivesUp()
        try:
            found = tokenizer.encode_bpe(text).tolist()
        except ValueError:     # no run that is long enough
            continue
        assert found == gpt2.encode_ordinary(text) and tokenizer.bpe.calls > 2


# Errors


def test_errors_name_what_is_wrong_and_the_remedy(tmp_path, both, capsys):
    out, text = tmp_path / "out", tmp_path / "text"
    write = {"one.txt": b"x", "lines.jsonl": b'{"text": "a"}\n{"text": "b"\n', "list.jsonl": b"[1]\n",
             "field.jsonl": b'\n{"body": "a", "id": 1}', "number.jsonl": b'{"text": 1}', "deep.jsonl": b"[" * 10**5,
             "cut.txt.gz": gzip.compress(bytes(range(256)) * 9)[:-20], "not.gz": b"text", "not.zst": b"text",
             "cut.zst": pyarrow.compress(bytes(10**6), codec="zstd", asbytes=True)[:-9], "not.parquet": b"text",
             "a.parquet.gz": b""}
    for name, data in write.items():
        (tmp_path / name).write_bytes(data)
    for name, column in (("null", dict(text=["a", None])), ("body", dict(body=["a"], n=[1])), ("int", dict(text=[1]))):
        pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / f"{name}.parquet")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
            ([text], "--out: name a folder"), (["no", "--out", out], "no: no such file or folder"),
            ([tmp_path / "empty", "--out", out], "ends in .txt .md .py .jsonl .parquet; name endings with --suffixes"),
            ([tmp_path / "one.txt", "--out", out], "the input has 1 document(s), of which 0 fall to validation"),
            ([tmp_path / "one.txt", "--separator", "|", "--out", out], "both splits need one: give more files"),
            ([text, "--out", out, "--workers", "0"], "--workers 0: give 1 to"),
            ([text, "--out", out, "--shard_tokens", 2**31], "--shard_tokens 2147483648: give 1 to 2147483647"),
            ([text, "--out", out, "--max_bytes", "-1"], "--max_bytes -1"),
            ([text, "--out", out, "--encoding", "gpt2", "--tiktoken", "x"], "not allowed with argument"),
            ([text, "--out", out, "--tiktoken", tmp_path / "none"], "none: not a file of BPE ranks"),
            ([text, "--out", tmp_path / "one.txt"], "one.txt")):
        assert message in error_of(capsys, *arguments)
    for name, message in (("lines.jsonl", "line 2 is not JSON"), ("list.jsonl", "line 1 has no text in the field"),
                          ("field.jsonl", "line 2 has no text in the field 'text' (its fields: body, id)"),
                          ("number.jsonl", "line 1 has no text"), ("deep.jsonl", "line 1 is not JSON"),
                          ("cut.txt.gz", "ended before"), ("not.gz", "Not a gzipped file"), ("not.zst", "ZSTD"),
                          ("cut.zst", "Truncated"), ("not.parquet", "Parquet"), ("a.parquet.gz", "decompress it first"),
                          ("null.parquet", "row 2 has no text in the column 'text'"), ("int.parquet", "int64"),
                          ("body.parquet", "has no column 'text'; name one of body, n with --text_field")):
        error = error_of(capsys, text, tmp_path / name, "--out", out, "--workers", 1)
        assert message in error and str(tmp_path / name) in error and "Traceback" not in error
    assert list(out.iterdir()) == []


def test_an_error_of_a_worker_process_names_the_file(tmp_path, both):
    (tmp_path / "text" / "cut.md.gz").write_bytes(gzip.compress(b"text" * 100)[:-5])
    result = tokenize(tmp_path / "text", "--out", tmp_path / "out", "--workers", 2)
    assert result.returncode == 1 and "cut.md.gz: EOFError" in result.stderr and "Traceback" not in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_document_that_dominates_validation_is_named(tmp_path, capsys):
    names = [name_in("val", "a{}.txt"), name_in("val", "b{}.txt"), name_in("train")]
    for name, size in zip(names, (100, 200, 1000), strict=True):
        (tmp_path / name).write_bytes(b"x" * size)
    make(tmp_path, "--out", tmp_path / "out", "--workers", 1)
    assert f"{names[1]} makes up 67% of the validation tokens" in capsys.readouterr().err
    for i in range(5):
        (tmp_path / name_in("val", f"{i}c{{}}.txt")).write_bytes(b"x" * 200)
    make(tmp_path, "--out", tmp_path / "out", "--workers", 1, "--force")
    assert capsys.readouterr().err == ""


# Runs that end in between, and what was there before


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_good_shards_stay_and_a_new_set_replaces_the_old_one_whole(tmp_path, both, capsys):
    options = [tmp_path / "text", "--out", tmp_path / "out", "--workers", 1]
    make(*options, "--shard_tokens", 2)
    assert len(files(tmp_path / "out")) == 8 + 7
    capsys.readouterr()
    make(*options)
    assert capsys.readouterr().out == (f"{tmp_path}/out: 15 training and 13 validation tokens of a vocabulary of 257 "
                                       "are there (--force rewrites)\n")
    for name in ("train_notes.bin", "notes.txt", "val_1.bin"):
        (tmp_path / "out" / name).write_bytes(b"mine")
    make(*options, "--force")
    mine = {"train_notes.bin", "notes.txt", "val_1.bin"}
    assert set(files(tmp_path / "out")) == {"train_000000.bin", "val_000000.bin", *mine}
    make(*options, "--shard_tokens", 5, "--force")
    whole = files(tmp_path / "out")
    for name, message in (("train_000001.bin", "train shards in part"), ("val_000000.bin", "val shards in part")):
        (tmp_path / "out" / name).unlink()
        make(*options, "--shard_tokens", 5)
        assert message in capsys.readouterr().out and files(tmp_path / "out") == whole
    (tmp_path / "out/train_000002.bin").write_bytes(whole["train_000002.bin"][:-2] + b"z\0")
    make(*options, "--shard_tokens", 5)
    assert "train_000002.bin: the tokens do not match" in capsys.readouterr().out and files(tmp_path / "out") == whole


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import local_text
left = int(sys.argv[2])
def counted(change):
    def wrapper(path, *rest, **options):
        global left
        if os.path.basename(os.path.dirname(rest[0] if rest else path)) == "out":
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        return change(path, *rest, **options)
    return wrapper
os.replace, local_text.Path.unlink = counted(os.replace), counted(local_text.Path.unlink)
local_text.main(sys.argv[3:])
"""


def test_a_kill_between_any_two_renames_leaves_the_old_set_the_new_one_or_none(tmp_path, both, capsys):
    (tmp_path / "killed.py").write_text(KILLED)
    options = [str(tmp_path / "text"), "--workers", "1", "--shard_tokens", "8"]
    make(*options, "--out", tmp_path / "old")
    (tmp_path / "text" / both["val"]).write_text("another val text")
    make(*options, "--out", tmp_path / "new")
    old, new = files(tmp_path / "old"), files(tmp_path / "new")
    assert len(old) == 2 + 2 and len(new) == 2 + 3
    seen = []
    for left in range(len(old) + len(new)):
        out = tmp_path / str(left) / "out"
        out.mkdir(parents=True)
        for name, data in old.items():
            (out / name).write_bytes(data)
        result = subprocess.run([sys.executable, tmp_path / "killed.py", ROOT / "data", str(left), *options, "--out",
                                 out, "--force"], capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr
        found = {path.name: path.read_bytes() for path in out.glob("*.bin")}
        state = "old" if found == old else "new" if found == new else "part"
        assert bool(local_text.good_shards(out)) == (state != "part") == (out / "val_000000.bin").exists()
        seen.append(state)
        make(*options, "--out", out)
        assert files(out) == (old if state == "old" else new)
    assert seen == ["old"] + ["part"] * (len(old) + len(new) - 1)


@pytest.fixture
def waiting_run(tmp_path):
    """A real run that has written a part and waits for more on its standard input, in a session of its own.

    Yields (process, its children). Nothing here depends on how fast it is: it never ends by itself.
    """
    old = tmp_path / "out"
    rng = random.Random(0)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(text=str(rng.random()))) + "\n" for _ in range(100)))
    make(tmp_path / "a.jsonl", "--out", old, "--workers", 1)
    process = subprocess.Popen([sys.executable, SCRIPT, "-", "--format", "jsonl", "--out", old, "--workers", "2",
                                "--force"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    line = json.dumps(dict(text="x" * 10_000)) + "\n"
    for _ in range(1000):     # 10 MB: ten batches, of which those on their way to the workers are a part
        process.stdin.write(line)
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size > 1024 for part in old.glob(".local_text.*/.train*.part")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    children = [pid for pid, (parent, _) in processes().items() if parent == process.pid]
    assert len(children) >= 2
    yield process, children
    process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    with contextlib.suppress(BrokenPipeError):     # what was not read any more
        process.stdin.close()


def processes() -> dict[int, tuple[int, str]]:
    """{number: (its parent's, state)} of every process."""
    if sys.platform == "linux":
        lines = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                number, _, rest = path.read_text().partition(" (")
                state, parent = rest.rpartition(") ")[2].split()[:2]
                lines.append(f"{number} {parent} {state}")
    else:
        lines = subprocess.run(["ps", "-Ao", "pid=,ppid=,stat="], capture_output=True, text=True).stdout.splitlines()
    return {int(number): (int(parent), state) for number, parent, state in map(str.split, lines)}


def assert_gone(pids: list[int]) -> None:
    """Of those that nobody waited for, a zombie is gone, too."""
    deadline = time.monotonic() + 30
    while left := [pid for pid, (_, state) in processes().items() if pid in pids and not state.startswith("Z")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


def test_ctrl_c_leaves_what_was_there_and_no_process(tmp_path, waiting_run):
    process, children = waiting_run
    old = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.bin")}
    os.killpg(process.pid, signal.SIGINT)     # as a terminal does: to the workers, too
    assert process.wait(timeout=30) == 130
    assert process.stderr.read() == "local_text.py: interrupted; nothing was written\n"
    assert files(tmp_path / "out") == old
    assert_gone(children)


def test_a_killed_run_leaves_what_was_there_and_the_next_one_cleans_up(tmp_path, waiting_run, capsys):
    process, children = waiting_run
    error = error_of(capsys, tmp_path / "a.jsonl", "--out", tmp_path / "out", "--force")
    assert "another run is writing to it" in error and f".{process.pid}" in error
    old = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.bin")}
    process.kill()
    process.wait()
    assert_gone(children)     # nobody told them
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.bin")} == old and len(old) == 2
    assert len(files_and_folders := list((tmp_path / "out").iterdir())) == 3, files_and_folders
    make(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--force", "--workers", 1)
    assert files(tmp_path / "out") == old


def test_a_worker_that_is_killed_is_an_error(tmp_path, waiting_run):
    process, children = waiting_run
    for child in children:
        os.kill(child, signal.SIGKILL)
    process.stdin.close()
    assert process.wait(timeout=30) == 1
    err = process.stderr.read()
    assert "a worker process ended" in err and "--workers" in err and "Traceback" not in err
    assert all(path.suffix == ".bin" for path in (tmp_path / "out").iterdir())


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_input(tmp_path, form):
    """Of 20 and 80 MB that hardly compress, in one row group."""
    peaks = []
    for megabytes in (20, 80):
        rows = [base64.b64encode(random.Random(i).randbytes(7500)).decode() for i in range(100 * megabytes)]
        if form == "jsonl":
            (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.table(dict(text=rows)), tmp_path / "a.parquet", row_group_size=10**6)
        code = "import sys, local_text; local_text.main(sys.argv[1:]); print(open('/proc/self/status').read())"
        result = subprocess.run([sys.executable, "-c", code, tmp_path / f"a.{form}", "--out", tmp_path / "out",
                                 "--force", "--workers", "1"], env={**os.environ, "PYTHONPATH": str(ROOT / "data")},
                                capture_output=True, text=True)
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", result.stdout)[1]) / 1024)
    assert peaks[1] < peaks[0] + 24, f"peak memory in MB: {peaks}"
