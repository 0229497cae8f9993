"""Shards, and the order in which rows are read."""

import hashlib
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shards
import torch
from conftest import SMALL, train

import train_gpt

CPU = torch.device("cpu")


def make_shard_rows(pattern, vocab_size, seq_len, max_rows=10**9):
    c = SimpleNamespace(vocab_size=vocab_size, seq_len=seq_len, prepare="data/local_text.py")
    return train_gpt.Rows("train_files", str(pattern), c, max_rows)


def write_shard(path: Path, tokens, vocab_size: int = 257) -> Path:
    with shards.ShardWriter(path, vocab_size) as shard:
        shard.write(np.asarray(tokens, dtype="<u2"))
    return path


def test_round_trip_and_header(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 257, size=1000).astype("<u2")
    path = write_shard(tmp_path / "a.bin", tokens)
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert list(header[:4]) == [20240520, 1, 1000, 257] and not header[5:].any()
    assert raw[1024:] == tokens.tobytes()     # what upstream tools read: the header, then the tokens alone
    assert np.array_equal(shards.read_shard(path)[0], tokens)
    assert train_gpt.open_shard(str(path), 257).tolist() == tokens.tolist()
    assert make_shard_rows(path, 257, 32).sha256 == hashlib.sha256(raw).hexdigest()
    gpt2 = write_shard(tmp_path / "b.bin", [50256], 50257).read_bytes()
    assert np.frombuffer(gpt2[:1024], dtype="<i4")[3] == 0


def test_an_upstream_shard_without_vocabulary_and_checksum_is_read(tmp_path):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 5
    (tmp_path / "up.bin").write_bytes(header.tobytes() + np.array([1, 2, 3, 50256, 0], dtype="<u2").tobytes())
    assert train_gpt.open_shard(str(tmp_path / "up.bin"), 50257).tolist() == [1, 2, 3, 50256, 0]


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(shards.ShardError, match="token 300 is outside the vocabulary of 257"):
        write_shard(tmp_path / "a.bin", [1, 300])
    with pytest.raises(KeyboardInterrupt), shards.ShardWriter(tmp_path / "a.bin", 257) as shard:
        shard.write(np.array([1], dtype="<u2"))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def corrupt(text: list[str], folder: Path, change) -> list[str]:
    """Options that name a copy of the shards, whose first training shard `change` has edited as bytes."""
    for path in Path(text[1]).parent.glob("*.bin"):
        data = bytearray(path.read_bytes())
        (folder / path.name).write_bytes(change(data) or data if path.name == "train_000000.bin" else data)
    return ["--train_files", f"{folder}/train_*.bin", "--val_files", f"{folder}/val_*.bin"]


def set_bytes(start: int, value: bytes):
    def change(data):
        data[start:start + len(value)] = value
    return change


@pytest.mark.parametrize("change, words", [
    (set_bytes(0, b"\1\2\3\4"), ["67305985"]),
    (lambda data: data[:-100], ["damaged", "./run.sh"]),
    (lambda data: data[:500], ["damaged", "500"]),
    (lambda data: data[:3], ["damaged", "3"]),
    (set_bytes(8, b"\1\0\0\0"), ["damaged"]),
    (set_bytes(8, b"\xff\xff\xff\xff"), ["damaged", "-1"]),
    (set_bytes(2000, b"\1\1"), ["token", "257"]),
    (set_bytes(2000, b"\xff\xff"), ["token", "257"]),
    (set_bytes(12, b"\0\2\0\0"), ["512", "--vocab_size"]),
], ids=["magic", "truncated", "short", "tiny", "tokens", "negative", "range", "uint16", "vocabulary"])
def test_bad_shards_are_named(text, tmp_path, change, words):
    train_files = corrupt(text, tmp_path, change)[1]
    with pytest.raises(train_gpt.RunError) as error:
        make_shard_rows(train_files, 257, 32)
    assert all(word in str(error.value) for word in ["train_000000.bin", *words])


def test_a_bad_shard_ends_a_run_before_anything_trains(text, tmp_path, capsys):
    options = corrupt(text, tmp_path, set_bytes(2000, b"\1\1"))
    assert train("tiny", *SMALL, *options, "--log_dir", tmp_path / "logs") == 2
    assert "train_000000.bin" in capsys.readouterr().err and not (tmp_path / "logs").exists()


def test_empty_pattern(tmp_path, capsys):
    pattern = tmp_path / "no_*.bin"
    assert train("tiny", *SMALL, "--train_files", pattern, "--log_dir", tmp_path / "logs") == 2
    message = capsys.readouterr().err
    assert f"--train_files {pattern}" in message and "data/local_text.py" in message


def make_rows(tmp_path, lengths, seq_len=8, max_rows=10**9):
    """Rows over shards of these lengths, whose tokens count up from 0 through all of them."""
    start = 0
    for i, length in enumerate(lengths):
        write_shard(tmp_path / f"s_{i:03d}.bin", np.arange(start, start + length), 65535)
        start += length
    return make_shard_rows(f"{tmp_path}/s_*.bin", 65535, seq_len, max_rows)


AWKWARD = [3, 9, 17, 0, 8, 100, 1, 64]     # too short for a row, exactly one, one token over, empty, a large one


def windows(lengths, seq_len=8) -> list[list[int]]:
    """The rows of `make_rows`, by the definition: from each shard's start, as long as a row and a next token fit."""
    expected, start = [], 0
    for length in lengths:
        expected += [list(range(start + i, start + i + seq_len + 1)) for i in range(0, length - seq_len, seq_len)]
        start += length
    return expected


def test_rows_are_the_windows_of_each_shard(tmp_path):
    rows, expected = make_rows(tmp_path, AWKWARD), windows(AWKWARD)
    assert rows.count == len(expected) == 22
    assert rows.read(np.arange(rows.count)).tolist() == expected
    picked = [21, 0, 3, 3, 20, 1]
    assert rows.read(np.array(picked)).tolist() == [expected[i] for i in picked]


def test_order_is_a_permutation_an_epoch_and_a_function_of_the_seed(tmp_path):
    rows = make_rows(tmp_path, [500, 300])
    n = rows.count
    first, second = (train_gpt.training_order(n, 1, range(i * n, i * n + n)) for i in range(2))
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    assert train_gpt.training_order(n, 2, range(n)) != first
    assert train_gpt.training_order(n, 1, range(n - 5, n + 5)) == first[-5:] + second[:5]     # over an epoch's end
    moved = sum(abs(a - b) > 1 for a, b in zip(first, first[1:], strict=False))
    assert moved > 0.9 * n     # neighbours in the text are not neighbours in the order


def test_a_run_reads_only_the_shards_that_its_budget_needs(tmp_path):
    rows = make_rows(tmp_path, [81, 81, 81], max_rows=11)
    assert rows.count == 20 and len(rows.shards) == 2


def load(rows, starts, rank=0, size=1, step=0) -> list[list]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "ranks", lambda: (rank, size))
        return [batch.tolist() for batch in train_gpt.load_batches(rows, starts, 5, CPU, step)]


@pytest.mark.parametrize("lengths", [AWKWARD, [64 * 8 + 1], [7, 200, 9, 500]], ids=["awkward", "one shard", "unequal"])
def test_ranks_read_the_same_global_batches_and_resume_anywhere(tmp_path, lengths):
    """Over two epochs and with a growing batch: the global batches of 2, 4 and 8 ranks are those of one, which are the
    training order cut into steps; a loader that starts at any of 50 steps gives what the first gave from there on."""
    rows, expected = make_rows(tmp_path, lengths), windows(lengths)
    stages = [8, 16, 24]
    steps = 3 * max(20, -(-2 * rows.count // 48))     # more than two epochs, and at least 60 steps
    positions = [0]
    for step in range(steps):
        positions.append(positions[-1] + stages[step * len(stages) // steps])
    assert positions[-1] > 2 * rows.count
    one = load(rows, positions)
    order = [row for epoch in range(-(-positions[-1] // rows.count))
             for row in train_gpt.training_order(rows.count, 5, range(epoch * rows.count, (epoch + 1) * rows.count))]
    assert one == [[expected[i] for i in order[a:b]] for a, b in zip(positions, positions[1:], strict=False)]
    for size in (2, 4, 8):
        ranks = [load(rows, positions, rank, size) for rank in range(size)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one
    for step in random.Random(0).sample(range(steps), 50):
        size = random.Random(step).choice([1, 2, 4])
        ranks = [load(rows, positions, rank, size, step) for rank in range(size)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one[step:]


def test_an_error_of_the_disk_reaches_the_caller(tmp_path):
    rows = make_rows(tmp_path, [2000])
    loader = train_gpt.load_batches(rows, list(range(0, 100, 10)), 0, CPU)
    next(loader)

    def fail(indices):
        raise OSError("disk gone")
    rows.read = fail
    with pytest.raises(OSError, match="disk gone"):
        list(loader)


def test_200_random_corruptions(tmp_path):
    """A changed header, size or token outside the vocabulary is an error that names the file, in the trainer as in
    data/shards.py, which alone tells a changed token inside it, by the checksum."""
    random_bytes = random.Random(0)
    tokens = np.random.default_rng(0).integers(0, 257, size=3000).astype("<u2")
    good = write_shard(tmp_path / "good.bin", tokens).read_bytes()
    refused = {train_gpt.RunError: 0, shards.ShardError: 0}
    for i in range(200):
        data = bytearray(good)
        kind = random_bytes.choice(["flip", "flip", "header", "truncate", "extend", "zero", "noise"])
        at = random_bytes.randrange(20 if kind == "header" else len(data))
        if kind in ("flip", "header"):
            data[at] ^= 1 << random_bytes.randrange(8)
        elif kind == "truncate":
            del data[at:]
        elif kind == "extend":
            data += random_bytes.randbytes(random_bytes.randrange(1, 5000))
        else:
            length = len(data[at:at + random_bytes.randrange(1, 3000)])
            data[at:at + length] = bytes(length) if kind == "zero" else random_bytes.randbytes(length)
        path = tmp_path / f"corrupt_{i}.bin"
        path.write_bytes(data)
        header, rest = np.frombuffer(bytes(data[:1024]).ljust(1024, b"\0"), dtype="<i4"), bytes(data[1024:])
        fits = (tuple(header[:2]) == (20240520, 1) and len(rest) == 2 * header[2] and header[3] == 257
                and (np.frombuffer(rest, dtype="<u2") < 257).all())
        for kind, check in ((train_gpt.RunError, lambda path=path: train_gpt.open_shard(str(path), 257)),
                            (shards.ShardError, lambda path=path: shards.read_shard(path))):
            try:
                check()
                assert (fits or (header[3] != 257 and kind is shards.ShardError)) and (
                    rest == good[1024:] or kind is train_gpt.RunError or not header[4]), (i, at)
            except kind as error:
                assert str(path) in str(error) and (not fits or kind is shards.ShardError), (i, at)
                refused[kind] += 1
        path.unlink()
    assert refused[shards.ShardError] > refused[train_gpt.RunError] > 50
