"""The shard format under damage, and the commands of data/shards.py."""

import base64
import hashlib
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import shards
from conftest import ROOT


def raw_shard(tokens, vocab_size=257, checksum=True) -> bytes:
    """The format written down again, with struct."""
    data = struct.pack(f"<{len(tokens)}H", *tokens)
    header = struct.pack("<iiiiI", 20240520, 1, len(tokens), 0 if vocab_size == 50257 else vocab_size,
                         zlib.crc32(data) if checksum else 0)
    return header.ljust(1024, b"\0") + data


def command(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        shards.main([str(argument) for argument in arguments])
    return int(stop.value.code or 0), *capsys.readouterr()


@pytest.fixture
def few_at_once(monkeypatch):
    """A chunk is smaller than the shards of these tests."""
    monkeypatch.setattr(shards, "CHUNK_TOKENS", 7)


def test_damage_is_a_shard_error_or_changes_nothing(tmp_path, few_at_once):
    rng = random.Random(0)
    tokens = [rng.randrange(257) for _ in range(40)]
    good, path = raw_shard(tokens), tmp_path / "a.bin"
    extremes = [-2**31, -1, 0, 1, 256, 65536, 65537, 2**30, 2**31 - 1]
    damaged = [good[:4 * field] + struct.pack("<i", value) + good[4 * field + 4:]
               for field in range(5) for value in extremes]
    damaged += [good[:rng.randrange(len(good))] for _ in range(50)] + [good + b"\0", good + b"\0\0"]
    for _ in range(400):
        at = rng.choice([rng.randrange(20), rng.randrange(1024, len(good))])
        damaged.append(good[:at] + bytes([rng.randrange(256)]) + good[at + 1:])
    num_refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            read = shards.read_shard(path)
            stated = struct.unpack("<iiiiI", data[:20])
            assert (read[0].tolist(), stated[3] or 50257) == (tokens, read[1])
            assert data[:20] == good[:20] or stated[3] != 257 or stated[4] == 0     # all that a reader cannot tell
        except shards.ShardError as error:
            num_refused += 1
            assert str(path) in str(error) and "delete it" in str(error)
    assert num_refused > 300
    for vocab_size, checksum, message in ((257, 5, "checksum"), (-1, 0, "vocabulary of -1")):     # without a token
        path.write_bytes(struct.pack("<iiiiI", 20240520, 1, 0, vocab_size, checksum).ljust(1024, b"\0"))
        with pytest.raises(shards.ShardError, match=message):
            shards.read_shard(path)


def test_series_ends_each_shard_at_its_size(tmp_path):
    for num_tokens in (0, 1, 9, 10, 11, 30, 34):
        folder, tokens = tmp_path / str(num_tokens), np.arange(num_tokens, dtype="<u2")
        with shards.SeriesWriter(folder, "part", 257, 10) as series:
            for start in range(0, num_tokens, 13):
                series.write(tokens[start:start + 13])
        assert series.num_tokens == num_tokens
        found = [path.read_bytes() for path in sorted(folder.glob("*"))]
        assert found == [raw_shard(range(start, min(start + 10, num_tokens))) for start in range(0, num_tokens, 10)]
    with pytest.raises(shards.ShardError, match="token 9"), shards.SeriesWriter(tmp_path / "no", "x", 9, 2) as series:
        series.write(np.array([1, 2, 3, 4, 9], dtype="<u2"))
    assert list((tmp_path / "no").iterdir()) == []


def test_merge_of_split_is_the_identity(tmp_path, capsys, few_at_once):
    path, original = tmp_path / "a.bin", raw_shard([i % 257 for i in range(100)])
    path.write_bytes(original)
    assert command(capsys, "split", path, "--tokens", 33, "--out", tmp_path / "pieces")[0] == 0
    pieces = sorted((tmp_path / "pieces").iterdir())
    assert [piece.name for piece in pieces] == [f"a_{i:06d}.bin" for i in range(4)]
    assert [len(shards.read_shard(piece)[0]) for piece in pieces] == [33, 33, 33, 1]
    code, out, _ = command(capsys, "merge", *pieces, "--out", tmp_path / "b.bin")
    assert code == 0 and (tmp_path / "b.bin").read_bytes() == original
    assert hashlib.sha256(original).hexdigest() in out
    for again, name in ((("split", path, "--tokens", 50, "--out", tmp_path / "pieces"), "a_000000.bin"),
                        (("merge", *pieces, "--out", tmp_path / "b.bin"), "b.bin")):
        code, _, err = command(capsys, *again)
        assert code == 1 and f"{name}: is there" in err
    assert (tmp_path / "b.bin").read_bytes() == original and sorted((tmp_path / "pieces").iterdir()) == pieces


def test_what_cannot_be_merged_or_split(tmp_path, capsys):
    for name, data in (("bytes", raw_shard([1])), ("gpt2", raw_shard([1], 50257)), ("bad", raw_shard([1, 2])[:-1])):
        (tmp_path / f"{name}.bin").write_bytes(data)
    with open(tmp_path / "huge.bin", "wb") as file:     # sparse: 2 GB of zeros that take no disk
        file.write(struct.pack("<iiii", 20240520, 1, 2**30, 257))
        file.truncate(1024 + 2 * 2**30)
    out = tmp_path / "out.bin"
    for files, message in ((("bytes", "gpt2"), "several vocabularies"), (("bytes", "bad"), "bad.bin: the header"),
                           (("huge", "huge"), "2,147,483,648 tokens"), (("bytes", "none"), "none.bin")):
        code, _, err = command(capsys, "merge", *(tmp_path / f"{name}.bin" for name in files), "--out", out)
        assert code == 1 and message in err and not out.exists()
    (tmp_path / "last.bin").write_bytes(raw_shard([1, 2, 3])[:-1] + b"\1")     # good to the header, bad to the checksum
    for arguments in (("merge", tmp_path / "bytes.bin", tmp_path / "last.bin", "--out", out),
                      ("split", tmp_path / "last.bin", "--tokens", 1, "--out", out)):
        code, _, err = command(capsys, *arguments)
        assert code == 1 and "last.bin: token 259 is outside" in err and not out.exists()
    assert command(capsys, "split", tmp_path / "bytes.bin", "--tokens", 0, "--out", out)[0] == 2


def test_verify_has_a_line_a_file_and_an_exit_code(tmp_path, capsys):
    files = {"good": raw_shard([1, 256]), "upstream": raw_shard([1, 50256], 50257, checksum=False),
             "range": raw_shard([1, 257]), "cut": raw_shard([1, 2, 3])[:-2], "empty": b"", "magic": b"PAR1" * 300}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code, out, _ = command(capsys, "verify", *(tmp_path / name for name in files), tmp_path / "none", tmp_path)
    lines = out.splitlines()
    assert code == 1 and len(lines) == len(files) + 2
    assert [line.startswith("bad: ") for line in lines] == [False, False, True, True, True, True, True, True]
    assert "2 tokens, vocabulary 257, checksum matches" in lines[0]
    assert "no checksum: a changed token inside the vocabulary cannot be told" in lines[1]
    assert all(name in line for name, line in zip([*files, "none", tmp_path.name], lines, strict=True))
    assert command(capsys, "verify", tmp_path / "good")[0] == 0
    result = subprocess.run([sys.executable, ROOT / "data/shards.py", "verify", tmp_path / "cut"], capture_output=True)
    assert result.returncode == 1 and not result.stderr


def test_inspect_shows_the_shard(tmp_path, capsys, monkeypatch, few_at_once):
    text = "naïve\n".encode()
    (tmp_path / "bytes").write_bytes(data := raw_shard([256, *text, 256, 256, *text]))
    code, out, _ = command(capsys, "inspect", tmp_path / "bytes")
    for line in ("tokens: 17\n", "vocabulary: 257\n", "documents: 3 ", "checksum: yes", r"'<|endoftext|>naïve",
                 hashlib.sha256(data).hexdigest()):
        assert code == 0 and line in out, line

    (tmp_path / "ranks").write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(
        [*(bytes([i]) for i in range(256)), b"na", b"\xc3\xaf"])))
    (tmp_path / "own").write_bytes(raw_shard([258, 256, 257, 118, 101], 259, checksum=False))
    code, out, _ = command(capsys, "inspect", tmp_path / "own")
    assert code == 0 and "[258, 256, 257, 118, 101] (no tokenizer for 259" in out and "checksum: no" in out
    code, out, _ = command(capsys, "inspect", tmp_path / "own", "--tiktoken", tmp_path / "ranks")
    assert code == 0 and "excerpt: '<|endoftext|>naïve'" in out and "documents: 1 " in out
    code, _, err = command(capsys, "inspect", tmp_path / "bytes", "--tiktoken", tmp_path / "ranks")
    assert code == 1 and "ranks: has a vocabulary of 259, but" in err
    code, _, err = command(capsys, "inspect", tmp_path / "none", tmp_path / "bytes")
    assert code == 1 and "none" in err


def test_inspect_without_gpt2s_ranks_gives_ids(tmp_path, capsys, monkeypatch):
    import tiktoken

    def no_network(name):
        raise ConnectionError("no network")
    (tmp_path / "gpt2").write_bytes(raw_shard([50256, 15496], 50257))
    with monkeypatch.context() as patch:
        patch.setattr(tiktoken, "get_encoding", no_network)
        code, out, _ = command(capsys, "inspect", tmp_path / "gpt2")
    assert code == 0 and "[50256, 15496] (tiktoken could not load r50k_base (no network)" in out
    cache = ROOT.parent / "shared/tiktoken"
    if not cache.is_dir():
        pytest.skip("no tiktoken cache with r50k_base at ../shared/tiktoken, and no network")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    code, out, _ = command(capsys, "inspect", tmp_path / "gpt2")
    assert code == 0 and "excerpt: '<|endoftext|>Hello'" in out


@pytest.mark.parametrize("lines, message", [
    (["not base64! 0"], "not a file of BPE ranks"), (["YQ=="], "not a file of BPE ranks"), ([], "the 0 ranks must be"),
    (["YQ== 0"], "the 1 ranks must be"), ([f"{base64.b64encode(bytes([i])).decode()} {i + 1}" for i in range(256)],
                                          "the 256 ranks must be"),
    ([f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)] +
     [f"{base64.b64encode(i.to_bytes(2, 'big')).decode()} {256 + i}" for i in range(65280)], "do not fit"),
], ids=["base64", "one column", "empty", "a byte missing", "from 1", "too many"])
def test_ranks_that_cannot_be_used(tmp_path, lines, message):
    (tmp_path / "ranks").write_text("\n".join(lines))
    with pytest.raises(shards.ShardError, match=message) as error:
        shards.load_bpe(tmp_path / "ranks")
    assert str(tmp_path / "ranks") in str(error.value)
