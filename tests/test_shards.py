"""The shard format, against one written down again with struct, under damage, and against the trainer's reader."""

import contextlib
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

import train_gpt


def raw_shard(tokens, vocab_size=257, checksum=True) -> bytes:
    data = struct.pack(f"<{len(tokens)}H", *tokens)
    fields = 20240520, 1, len(tokens), 0 if vocab_size == 50257 else vocab_size, zlib.crc32(data) if checksum else 0
    return struct.pack("<iiiiI", *fields).ljust(1024, b"\0") + data


def command(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        shards.main([str(argument) for argument in arguments])
    return int(stop.value.code), capsys.readouterr().out


@pytest.mark.parametrize("vocab_size", [257, 50257])
@pytest.mark.parametrize("num_tokens", [0, 1, 9, 10, 11, 30, 34])
def test_what_is_written_is_read_again_here_and_by_the_trainer(tmp_path, num_tokens, vocab_size):
    tokens = np.random.default_rng(num_tokens).integers(0, vocab_size, size=num_tokens).astype("<u2")
    with shards.SeriesWriter(tmp_path, "part", vocab_size, 10) as series:
        for start in range(0, num_tokens, 13):
            series.write(tokens[start:start + 13])
    assert series.num_tokens == num_tokens and len(series.paths) == -(-num_tokens // 10)
    for number, path in enumerate(series.paths):
        piece = tokens[10 * number:10 * number + 10].tolist()
        assert path.read_bytes() == raw_shard(piece, vocab_size)
        assert shards.read_shard(path)[0].tolist() == train_gpt.open_shard(path, vocab_size).tolist() == piece
    with pytest.raises(shards.ShardError, match="token 9"), shards.SeriesWriter(tmp_path / "no", "x", 9, 2) as series:
        series.write(np.array([1, 2, 9], dtype="<u2"))
    assert [path.name for path in (tmp_path / "no").iterdir()] == ["x_000000.bin"]      # and no part of another


def test_damage_is_an_error_or_changes_nothing(tmp_path):
    """The trainer refuses the same files, but for a token that changed within the vocabulary: it reads no checksum."""
    rng = random.Random(0)
    tokens = [rng.randrange(257) for _ in range(40)]
    good, path = raw_shard(tokens), tmp_path / "a.bin"
    damaged = [good[:4 * field] + struct.pack("<i", value) + good[4 * field + 4:] for field in range(5)
               for value in (-2**31, -1, 0, 1, 256, 65536, 65537, 2**30, 2**31 - 1)]
    damaged += [good[:rng.randrange(len(good))] for _ in range(50)] + [good + b"\0", good + b"\0\0"]
    places = [rng.choice([rng.randrange(20), rng.randrange(1024, len(good))]) for _ in range(400)]
    damaged += [good[:at] + bytes([rng.randrange(256)]) + good[at + 1:] for at in places]
    num_refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            read, vocab_size = shards.read_shard(path)
            stated = struct.unpack("<iiiiI", data[:20])
            assert (read.tolist(), stated[3] or 50257) == (tokens, vocab_size)
            assert data[:20] == good[:20] or stated[3] != 257 or stated[4] == 0     # all that a reader cannot tell
            assert train_gpt.open_shard(path, vocab_size).tolist() == tokens
        except shards.ShardError as error:
            num_refused += 1
            ours = data[:4] == good[:4]     # a file that is none of ours is not to be deleted
            assert str(path) in str(error) and ("delete it" in str(error)) == ours
            with contextlib.nullcontext() if "checksum" in str(error) else pytest.raises(train_gpt.RunError):
                train_gpt.open_shard(path, 257)
    assert num_refused > 300


def test_verify_and_info(tmp_path, capsys):
    files = {"a": raw_shard([1, 256]), "b_upstream": raw_shard([1, 50256], 50257, checksum=False), "c": b"PAR1" * 300,
             "d_range": raw_shard([1, 257]), "e_cut": raw_shard([1, 2, 3])[:-2], "f_empty": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    code, out = command(capsys, "verify", tmp_path / "[a-f]*", tmp_path / "none*", tmp_path)
    lines = out.splitlines()
    assert code == 1 and [line.startswith("bad: ") for line in lines] == [False, False] + 6 * [True]
    assert all(name in line for name, line in zip([*files, "none*", tmp_path.name], lines, strict=True))
    assert ["not a shard" in line for line in lines] == [name in ("c", "f_empty") for name in [*files, "none", "dir"]]
    assert lines[0] == f"{tmp_path / 'a'}: good: 2 tokens, vocabulary 257, checksum matches"
    assert "no checksum: a changed token inside the vocabulary cannot be told" in lines[1]
    subprocess.run([sys.executable, ROOT / "data/shards.py", "verify", tmp_path / "a"], check=True)
    (tmp_path / "a").write_bytes(data := raw_shard([256, *"naïve".encode(), 256]))
    code, out = command(capsys, "info", tmp_path / "a")
    assert code == 0 and "documents: 2\n" in out and f"sha256: {hashlib.sha256(data).hexdigest()}\n" in out
    assert f"starts with: {b'<|endoftext|>na' + 'ïve'.encode() + b'<|endoftext|>'}" in out
