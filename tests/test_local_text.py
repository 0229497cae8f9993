"""data/local_text.py: what stands in the shards is the text, against the rules written down again here."""

import base64
import collections
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import local_text
import pyarrow
import pyarrow.parquet
import pytest
import regex
import shards
import torch
from conftest import ROOT
from tiktoken._educational import SimpleBytePairEncoding

import train_gpt

# GPT-2's split, as its authors published it: \s is Unicode's White_Space, which Python sees otherwise.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+".replace(
    r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
GPT2_RANKS = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or ROOT.parent / "shared/tiktoken",
                  "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4")     # as tiktoken names r50k_base there
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "data")}


def make(*arguments):
    local_text.main([str(argument) for argument in arguments])


def error_of(*arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        make(*arguments)
    return str(stop.value)


def digest(name: str) -> int:
    return int(hashlib.sha1(name.encode()).hexdigest(), 16)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def texts(out: Path) -> list[bytes]:
    tokens = [shards.read_shard(path)[0].tolist() for path in sorted(out.glob("*.bin"))]
    return sorted(text.encode("latin-1") for text in "".join(map(chr, sum(tokens, []))).split(chr(256))[1:])


@pytest.fixture(params=["bytes", "small ranks", "gpt2"])
def encoding(request, tmp_path, monkeypatch):
    """(what --encoding takes, its vocabulary size, the tokens of a text); small ranks stand for missing GPT-2 ones."""
    if request.param == "bytes":
        return "bytes", 257, list
    option = path = write_small_ranks(tmp_path / "ranks")
    if request.param == "gpt2" and GPT2_RANKS.exists():
        option, path = "gpt2", GPT2_RANKS
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(path.parent))
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    plain = SimpleBytePairEncoding(pat_str=SPLIT, mergeable_ranks=ranks)
    return option, len(ranks) + 1, lambda text: plain.encode(text.decode("utf-8", "replace"), visualise=None)


def write_small_ranks(path: Path) -> Path:
    tokens = [bytes([i]) for i in range(255, -1, -1)]
    tokens += [b"th", b"the", b" the", b"in", b"\xc3\xa9", b"\xf0\x9f", b"\xf0\x9f\x99", b"\xf0\x9f\x99\x82", b"\n\n"]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def odd_document(rng: random.Random) -> bytes:
    return rng.choice([
        b"", bytes([rng.randrange(256)]), rng.randbytes(rng.randrange(60)), b"\0" * rng.randrange(9), b"<|endoftext|>",
        "🙂 naïve é\n\n".encode() * rng.randrange(1, 5), b"\xff in the \xf0\x9f end", b"the " * rng.randrange(40, 90),
        "\ufffd\ufeff \r\n\n\n".encode(), b" " * rng.randrange(30) + b"x"])


def write_corpus(folder: Path, rng: random.Random) -> dict[str, list[bytes]]:
    """Writes odd documents in every format; returns those of each split in order, by the rule in the program's help."""
    expected = {"train": [], "val": []}
    endings = [*(15 * [".txt", ".md.gz", ".PY", ".py.GZ"]), ".jsonl", ".jsonl.gz", ".parquet", ".parquet.gz"]
    for name in sorted([f"{rng.choice(['', 'a/', 'b c/d/'])}é{i}{end}" for i, end in enumerate(endings)], key=digest):
        documents = {f"{name}:{i}": odd_document(rng) for i in range(20)}
        if ".jsonl" in name:
            documents = {key: text.decode("utf-8", "ignore").encode() for key, text in documents.items()}
            data = "\n \n".join(json.dumps(dict(id=1, text=text.decode())) for text in documents.values()).encode()
        elif ".parquet" in name:
            table, buffer = pyarrow.table(dict(text=list(documents.values()))), io.BytesIO()
            pyarrow.parquet.write_table(table, buffer, row_group_size=5)
            data = buffer.getvalue()
        else:
            data = odd_document(rng)
            documents = {name: data}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
        for key, text in documents.items():
            expected["train" if digest(key) % 20 else "val"].append(text)
    return expected


@pytest.mark.parametrize("seed", range(3))
def test_every_document_stands_in_the_shards_once_and_in_order(tmp_path, monkeypatch, encoding, seed):
    option, vocab_size, tokens_of = encoding
    expected = {split: [[vocab_size - 1, *tokens_of(document)] for document in documents]
                for split, documents in write_corpus(tmp_path / "text", random.Random(seed)).items()}
    # The first document, then the first two, end where a shard ends, and others are longer than a shard.
    size = max(10, len(sum(expected["train"][:1 + seed % 2], [])))
    monkeypatch.setattr(local_text, "SHARD_TOKENS", size)
    monkeypatch.setattr(os, "fsync", lambda file: None)     # of a hundred shards
    monkeypatch.chdir(tmp_path)
    for workers, given in ((1, tmp_path / "text"), (3, "./text/"), (2, "text/**/*.*")):
        make(given, "--out", f"{workers}", "--workers", workers, "--encoding", option)
        assert files(tmp_path / f"{workers}") == files(tmp_path / "1")
    for split, documents in expected.items():
        tokens, found = sum(documents, []), map(shards.read_shard, sorted(tmp_path.glob(f"1/{split}*")))
        expected_shards = [(tokens[i:i + size], vocab_size) for i in range(0, len(tokens), size)]
        assert [(piece.tolist(), stated_size) for piece, stated_size in found] == expected_shards


def by_hand(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Joins the neighbours that make the token of the lowest rank, the leftmost first, until none do."""
    parts = [bytes([byte]) for byte in word]
    while found := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def words(text: bytes) -> list[bytes]:
    return [word.encode() for word in regex.findall(SPLIT, text.decode("utf-8", "replace"))]


@pytest.fixture(params=[(10**8, 1000), (3000, 7)])
def prose(request, tmp_path, monkeypatch) -> tuple[dict[str, list[bytes]], list[bytes]]:
    """(documents of each split, words that a BPE is trained on: all for training, or less); zq is validation's."""
    rng, documents = random.Random(1), {"train": [], "val": []}
    vocabulary = ["".join(rng.choices("aeinorstäß🙂", k=rng.randrange(1, 9))) for _ in range(200)]
    (tmp_path / "text").mkdir()
    for name in sorted([f"{i}.txt" for i in range(60)], key=digest):
        split = "train" if digest(name) % 20 else "val"
        text = b"".join((rng.choice([" ", "\n", "  ", ", "]) + rng.choice(vocabulary)).encode() for _ in range(30))
        documents[split].append(text + b"\xff <|endoftext|>" + b" zq" * 40 * (split == "val"))
        (tmp_path / "text" / name).write_bytes(documents[split][-1])
    left, length = request.param
    monkeypatch.setattr(local_text, "BPE_TRAINING_BYTES", left)
    monkeypatch.setattr(local_text, "BPE_WORD_BYTES", length)
    seen = []
    for document in documents["train"]:
        for word in words(document[:left]):
            seen += [word[i:i + length] for i in range(0, len(word), length)]
        left -= len(document[:left])
    return documents, seen


def test_a_trained_bpe_joins_the_commonest_pair_each_time_and_encodes_with_it(tmp_path, prose):
    documents, seen = prose
    size, results = 320, []
    for workers in (1, 2):
        make(tmp_path / "text", "--train_bpe", size, "--out", tmp_path / f"{workers}", "--workers", workers)
        results.append(files(tmp_path / f"{workers}"))
    assert results[0] == results[1] and len(results[0]) == 3
    lines = results[0]["bpe.tiktoken"].decode().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(size - 1))
    assert tokens[:256] == [bytes([byte]) for byte in range(256)] and not any(b"zq" in token for token in tokens)

    counts = collections.Counter(seen)
    for rank in range(256, size - 1):
        ranks, pairs = {token: i for i, token in enumerate(tokens[:rank])}, collections.Counter()
        for word, count in counts.items():
            parts = by_hand(word, ranks)
            for pair in itertools.pairwise(parts):
                pairs[pair] += count
        assert tokens[rank] in [a + b for (a, b), count in pairs.items() if count == max(pairs.values())], rank

    ranks = {token: rank for rank, token in enumerate(tokens)}
    for split in ("train", "val"):
        found, stated_size = shards.read_shard(tmp_path / f"1/{split}_000000.bin")
        expected, texts = [], []
        for document in documents[split]:
            expected += [size - 1, *(ranks[part] for word in words(document) for part in by_hand(word, ranks))]
            texts.append(document.decode("utf-8", "replace"))
        assert found.tolist() == expected and stated_size == size
        decoded = b"".join([*tokens, b"\0"][token] for token in found).decode()     # \0 before each document
        assert decoded.split("\0") == ["", *texts]


def test_a_set_of_a_trained_bpe_is_kept_and_written_again_without_its_bpe(tmp_path, folder, capsys):
    out, options = tmp_path / "out", ["--train_bpe", 260, "--out", tmp_path / "out"]
    make(folder, *options)
    whole = files(out)
    (folder / "0.txt").write_text("another train text")
    make(folder, *options)
    assert files(out) == whole and "are there" in capsys.readouterr().out
    (out / "bpe.tiktoken").unlink()
    make(folder, *options)
    assert files(out).keys() == whole.keys() and files(out) != whole
    make(folder, "--encoding", out / "bpe.tiktoken", "--out", tmp_path / "same")
    assert files(tmp_path / "same").items() < files(out).items()
    make(folder, "--train_bpe", 257, "--out", tmp_path / "bytes")
    make(folder, "--out", tmp_path / "same", "--force")
    assert files(tmp_path / "same").items() < files(tmp_path / "bytes").items()


def test_the_second_text_of_lab_is_in_the_bpe_of_the_first(tmp_path, folder, monkeypatch):
    for name in ("torch", "python"):
        (tmp_path / name).mkdir()
        for path in folder.iterdir():       # 7.py is not for validation, 28.py is
            number = path.stem.replace("7", "28")
            (tmp_path / name / f"{number}.py").write_text(path.read_text().replace("the", name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / name / "x")))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python"))
    make("--train_bpe", 265, "--out", tmp_path / "out")
    make(tmp_path / "torch", "--train_bpe", 265, "--out", tmp_path / "first")
    make(tmp_path / "python", "--encoding", tmp_path / "first/bpe.tiktoken", "--out", tmp_path / "second")
    first, second = files(tmp_path / "first"), files(tmp_path / "second")
    for _ in range(2):
        made = tmp_path / "out"
        assert files(made / "second") == second
        assert {path.name: path.read_bytes() for path in made.glob("[!.]*.*")} == first
        shutil.rmtree(made / "second")
        make("--train_bpe", 265, "--out", made)


@pytest.mark.parametrize("options, message", [
    (["256"], "--train_bpe 256: give 257 (the bytes and the end of text) to 65536 (what a shard can hold)"),
    (["65537"], "--train_bpe 65537: give 257"), (["0"], "--train_bpe 0: give 257"),
    (["many"], "argument --train_bpe: invalid int value: 'many'"),
    (["300", "--encoding", "gpt2"], "argument --encoding: not allowed with argument --train_bpe"),
    (["300"], "--train_bpe 300: the training documents hold pairs for 267 tokens; give at most so many, or more text")])
def test_errors_of_a_size_of_a_bpe(tmp_path, folder, capsys, options, message):
    error = error_of(folder, "--out", tmp_path / "out", "--train_bpe", *options)
    assert message in error + capsys.readouterr().err and not list((tmp_path / "out").glob("[!.]*"))


def test_tiny_data_is_what_the_preset_names(tmp_path):
    if torch.__version__.split("+")[0] != "2.13.0":
        pytest.skip(f"the preset's sha256 are of torch 2.13.0's sources, here is {torch.__version__}")
    make("--out", tmp_path)
    c, made = train_gpt.make_config(dict(track="tiny")), sorted(tmp_path.glob("*.bin"))
    assert [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in made] == c.sha256.split()
    assert any(b'"""Heap queue algorithm' in text for text in texts(tmp_path / "second"))     # of Python's heapq.py


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a file for training, 0.txt, and one for validation, 7.txt."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/0.txt").write_text("the train text")
    (tmp_path / "text/7.txt").write_text("the val text")
    return tmp_path / "text"


def test_what_a_folder_a_file_and_a_pattern_take(tmp_path, folder, monkeypatch):
    basic, upper = [b"the train text", b"the val text"], b"other sub/UPPER.TXT"
    (folder / "sub" / "folder.txt").mkdir(parents=True)
    for name in ("a.bin", "b.jpg", "noending", "sub/UPPER.TXT"):
        (folder / name).write_bytes(b"other " + name.encode())
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    for given, more in (([folder], [upper]), (["~/*.txt"], []), (["*.txt", "sub/.."], [*basic, upper]),
                        (["0.txt", "7.txt", "a.bin"], [b"other a.bin"]), ([f"{folder}/**/*.[tT]*"], [upper]),
                        ([folder, "--suffixes", ".txt", ".jpg"], [b"other b.jpg", upper])):
        make(*given, "--out", tmp_path / "out", "--force")
        assert texts(tmp_path / "out") == sorted(basic + more), given


def test_separators_equal_names_and_half_characters(tmp_path, folder):
    pieces = [f"document {i}".encode() for i in range(60)]
    (tmp_path / "a.md").write_bytes(b"--\n".join([*pieces, b"", b"\n"]))
    (tmp_path / "a.jsonl").write_text(r'{"body": "a\ud83db\ud83d\ude42"}')
    (tmp_path / "0.txt").write_text("second")
    given = [folder, *map(tmp_path.joinpath, ("0.txt", "a.md", "a.jsonl"))]
    make(*given, r"--separator=--\n", "--text_field", "body", "--out", tmp_path / "out")
    half = b"a\xed\xa0\xbdb" + "🙂".encode()     # three bytes that are not UTF-8
    assert texts(tmp_path / "out") == sorted([*pieces, b"the train text", b"the val text", b"second", half])


@pytest.mark.parametrize("name, data, message", [
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "a.jsonl: line 3 is not JSON"),
    ("a.jsonl", b'{"text": "a\xff"}\n', "a.jsonl: line 1 is not JSON"), ("a.jsonl", b"[" * 10**5, "line 1 is not JSON"),
    ("a.jsonl", b"[1]\n", "line 1 has no text in 'text': [1]"), ("a.jsonl", b'{"text": 1}', "name its --text_field"),
    ("a.parquet", dict(text=["a", None]), "row 2 has no text in 'text'"), ("a.parquet", dict(text=[1]), "row 1 has no"),
    ("a.parquet", dict(body=["a"], n=[1]), "row 1 has no text in 'text': {'body': 'a', 'n': 1}"),
    ("a.parquet", b"text", "a.parquet: ArrowInvalid"), ("a.parquet", b"PAR1" + bytes(99) + b"PAR1", "a.parquet: "),
    ("a.gz", b"text", "a.gz: BadGzipFile"),
    ("a.txt.gz", gzip.compress(bytes(range(256)) * 9)[:-20], "a.txt.gz: EOFError"),
    ("a.txt", b"a" + b"\n" * 1_200_000 + b"b", "a.txt: tiktoken cannot split it")], ids=range(13))
@pytest.mark.parametrize("trained", [False, True], ids=["ranks", "trained"])
def test_errors_of_files(tmp_path, folder, name, data, message, trained):
    if isinstance(data, dict):
        pyarrow.parquet.write_table(pyarrow.table(data), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(data)
    options = ["--train_bpe", 258] if trained else ["--encoding", write_small_ranks(tmp_path / "ranks")]
    error = error_of(folder, tmp_path / name, "--out", tmp_path / "out", *options)
    assert message in error and str(tmp_path / name) in error and "\n" not in error
    assert os.listdir(tmp_path / "out") == [".local_text.lock"]


@pytest.mark.parametrize("given, options, message", [
    ("no", [], "no: no such file"), ("text/0.txt", [], "1 documents fall to training and 0 to validation"),
    ("pipe", [], "pipe: a pipe or a device"),
    ("empty", [], "none in it ends in .txt .md .py .jsonl .parquet (--suffixes)"),
    ("text", ["--encoding", "none"], "none: not BPE ranks"), ("text", ["--out", "text/0.txt"], "File exists")])
def test_errors_of_arguments(tmp_path, folder, monkeypatch, given, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert message in error_of(given, "--out", "out", *options)


def test_shards_that_are_not_good_are_written_again(tmp_path, folder, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 5)
    make(folder, "--out", out)
    whole = files(out)
    assert len(whole) == 3 + 3
    for damage in (Path.unlink, lambda shard: shard.write_bytes(whole[shard.name][:-2]),
                   lambda shard: shard.write_bytes(whole[shard.name][:-2] + b"z\0")):
        damage(out / "train_000001.bin")
        make(folder, "--out", out)
        assert files(out) == whole


@pytest.mark.parametrize("options", [[], ["--train_bpe", "258"]], ids=["bytes", "bpe"])
def test_a_kill_between_any_two_renames_leaves_the_old_set_the_new_one_or_none(tmp_path, folder, monkeypatch, options):
    monkeypatch.setattr(local_text, "SHARD_TOKENS", 8)
    make(folder, "--out", tmp_path / "old", *options)
    (folder / "0.txt").write_text("the other text")
    (folder / "7.txt").write_text("another longer val text")
    make(folder, "--out", tmp_path / "new", *options)
    old, new = files(tmp_path / "old"), files(tmp_path / "new")
    num_bpes = len(options) // 2
    assert len(old) == 2 + 2 + num_bpes and len(new) == 2 + 3 + num_bpes
    for num_changes in range(len(old) + len(new) - num_bpes):   # a BPE takes the place of the old one at once
        out = shutil.copytree(tmp_path / "old", tmp_path / str(num_changes))
        left = iter(range(num_changes))

        def counted(change, out=out, left=left):
            def wrapper(*paths, **options):
                if Path(paths[-1]).parent == out and next(left, None) is None:
                    raise GeneratorExit     # which nothing catches, as a kill
                return change(*paths, **options)
            return wrapper
        with monkeypatch.context() as patch, pytest.raises(GeneratorExit):
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            make(folder, "--out", out, "--force", *options)
        assert (files(out) == old) == (num_changes == 0)
        make(folder, "--out", out, *options)
        assert files(out) == (old if num_changes == 0 else new)


WAITS = """
import sys, time, local_text
write = local_text.SeriesWriter.write
local_text.SeriesWriter.write = lambda *given: write(*given) or print("waiting", flush=True) or time.sleep(100)
local_text.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_stopped_leaves_what_was_there(tmp_path, folder, number, code):
    options, out = [folder, "--out", tmp_path / "out", "--force"], tmp_path / "out"
    make(*options)
    old = files(out)
    with subprocess.Popen([sys.executable, "-c", WAITS, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env=ENVIRONMENT) as process:
        assert process.stdout.readline() == "waiting\n"
        assert "another run is writing to" in error_of(*options)
        process.send_signal(number)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == code and files(out) == old
    make(*options)
    assert files(out) == old and len(os.listdir(out)) == 3     # with the lock


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_input(tmp_path, kind):
    """Of 20 and 80 MB that hardly compress, in one row group."""
    code = "import sys, local_text; local_text.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    peaks, path = [], tmp_path / f"a.{kind}"
    for megabytes in (20, 80):
        rows = [base64.b64encode(random.Random(i).randbytes(7500)).decode() for i in range(100 * megabytes)]
        if kind == "jsonl":
            path.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.table(dict(text=rows)), path, row_group_size=10**6)
        command = [sys.executable, "-c", code, path, "--out", tmp_path / "out", "--force"]
        peak = subprocess.check_output(command, env=ENVIRONMENT, text=True).split("VmHWM:")[1].split()[0]
        peaks.append(int(peak) / 1024)
    assert peaks[1] < peaks[0] + 24, f"peak memory in MB: {peaks}"
