"""Shards, and the order in which rows are read."""

import hashlib
import random
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import shards
import torch
from conftest import SMALL, run

import train_gpt


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
    assert train_gpt.check_shard(str(path), 257) == hashlib.sha256(raw).hexdigest()
    gpt2 = write_shard(tmp_path / "b.bin", [50256], 50257).read_bytes()
    assert np.frombuffer(gpt2[:1024], dtype="<i4")[3] == 0


def test_an_upstream_shard_without_vocabulary_and_checksum_is_read(tmp_path):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 5
    (tmp_path / "up.bin").write_bytes(header.tobytes() + np.array([1, 2, 3, 50256, 0], dtype="<u2").tobytes())
    assert train_gpt.open_shard(str(tmp_path / "up.bin"), 50257).tolist() == [1, 2, 3, 50256, 0]
    assert train_gpt.check_shard(str(tmp_path / "up.bin"), 50257)


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


@pytest.mark.parametrize("change, message", [
    (set_bytes(0, b"\1\2\3\4"), "magic 67305985, version 1, but a shard has 20240520 and 1"),
    (lambda data: data[:-100], "truncated"),
    (lambda data: data[:500], "500 bytes are less than a shard's header"),
    (set_bytes(8, b"\1\0\0\0"), "the header's 1 tokens make 1026 bytes"),
    (set_bytes(8, b"\xff\xff\xff\xff"), "the header's -1 tokens"),
    (set_bytes(2000, b"\1\1"), "token 257 is outside the vocabulary of 257"),
    (set_bytes(2000, b"\xff\xff"), "token 65535 is outside the vocabulary of 257"),
    (set_bytes(2000, b"\7\0"), "do not match the checksum"),
    (set_bytes(12, b"\0\2\0\0"), "has a vocabulary of 512; give --vocab_size that"),
], ids=["magic", "truncated", "short", "tokens", "negative", "range", "uint16", "checksum", "vocabulary"])
def test_bad_shards_are_named(text, tmp_path, change, message):
    train_files = corrupt(text, tmp_path, change)[1]
    world = train_gpt.World(0, 1, torch.device("cpu"), 60.0)
    with pytest.raises(train_gpt.RunError) as error:
        train_gpt.Rows("train_files", train_files, 257, 32, 10**9).check(world)
    assert "train_000000.bin" in str(error.value) and message in str(error.value)


def test_a_bad_shard_ends_a_run_before_anything_trains(text, tmp_path):
    options = corrupt(text, tmp_path, set_bytes(2000, b"\7\0"))
    result = run("tiny", *SMALL, *options, "--log_dir", tmp_path / "logs")
    assert result.returncode == 2 and not (tmp_path / "logs").exists()
    assert "train_000000.bin: the tokens do not match" in result.stderr and "Traceback" not in result.stderr


def test_empty_pattern(tmp_path):
    result = run("tiny", *SMALL, "--train_files", tmp_path / "no_*.bin", "--log_dir", tmp_path / "logs")
    assert result.returncode == 2 and "no file matches" in result.stderr and "--train_files" in result.stderr


def make_rows(tmp_path, lengths, seq_len=8, max_rows=10**9):
    """Rows over shards of these lengths, whose tokens count up from 0 through all of them."""
    start = 0
    for i, length in enumerate(lengths):
        write_shard(tmp_path / f"s_{i:03d}.bin", np.arange(start, start + length), 65535)
        start += length
    return train_gpt.Rows("train_files", f"{tmp_path}/s_*.bin", 65535, seq_len, max_rows)


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
    assert rows.num_rows == len(expected) == 22 and rows.num_tokens == sum(AWKWARD)
    assert rows.read(np.arange(rows.num_rows)).tolist() == expected
    picked = [21, 0, 3, 3, 20, 1]
    assert rows.read(np.array(picked)).tolist() == [expected[i] for i in picked]


def test_order_is_a_permutation_an_epoch_and_a_function_of_the_seed(tmp_path):
    rows = make_rows(tmp_path, [500, 300])
    n = rows.num_rows
    first, second = (rows.shuffled(1, np.arange(n) + i * n).tolist() for i in range(2))
    assert sorted(first) == sorted(second) == list(range(n)) and first != second
    assert rows.shuffled(2, np.arange(n)).tolist() != first
    fresh = make_rows(tmp_path, [500, 300])
    assert fresh.shuffled(1, np.arange(n - 5, n + 5)).tolist() == first[-5:] + second[:5]     # over an epoch's end
    moved = sum(abs(a - b) > 1 for a, b in zip(first, first[1:], strict=False))
    assert moved > 0.9 * n     # neighbours in the text are not neighbours in the order


def test_a_run_reads_only_the_shards_that_its_budget_needs(tmp_path):
    rows = make_rows(tmp_path, [81, 81, 81], max_rows=11)
    assert rows.num_rows == 20 and len(rows.paths) == 2 and rows.num_found == 3


def load(rows, positions, rank=0, size=1, step=0, ahead=2**20) -> list[list]:
    world = train_gpt.World(rank, size, torch.device("cpu"), 60.0)
    return [batch.tolist() for batch in train_gpt.load_batches(rows, positions, 5, world, step, ahead)]


@pytest.mark.parametrize("lengths", [AWKWARD, [64 * 8 + 1], [7, 200, 9, 500]], ids=["awkward", "one shard", "unequal"])
def test_ranks_read_the_same_global_batches_and_resume_anywhere(tmp_path, lengths):
    """Over two epochs and with a growing batch: the global batches of 2, 4 and 8 ranks are those of one, which are the
    training order cut into steps; a loader that starts at any of 50 steps gives what the first gave from there on."""
    rows, expected = make_rows(tmp_path, lengths), windows(lengths)
    stages = [8, 16, 24]
    steps = 3 * max(20, -(-2 * rows.num_rows // 48))     # more than two epochs, and at least 60 steps
    positions = [0]
    for step in range(steps):
        positions.append(positions[-1] + stages[step * len(stages) // steps])
    assert positions[-1] > 2 * rows.num_rows
    one = load(rows, positions)
    order = [row for epoch in range(-(-positions[-1] // rows.num_rows))
             for row in rows.shuffled(5, np.arange(rows.num_rows) + epoch * rows.num_rows).tolist()]
    assert one == [[expected[i] for i in order[a:b]] for a, b in zip(positions, positions[1:], strict=False)]
    for size in (2, 4, 8):
        ranks = [load(rows, positions, rank, size, ahead=100 * size) for rank in range(size)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one
    for step in random.Random(0).sample(range(steps), 50):
        size = random.Random(step).choice([1, 2, 4])
        ranks = [load(rows, positions, rank, size, step, ahead=300) for rank in range(size)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one[step:]


def test_the_loader_works_ahead_while_a_batch_is_used(tmp_path):
    """When a batch arrives, those after it are being read already; an error in the thread reaches the caller."""
    rows, read = make_rows(tmp_path, [2000]), threading.Event()
    world, positions = train_gpt.World(0, 1, torch.device("cpu"), 60.0), list(range(0, 100, 10))
    loader = train_gpt.load_batches(rows, positions, 0, world, ahead=80)
    next(loader)
    original, rows.read = rows.read, lambda indices: (read.set(), original(indices))[1]
    next(loader)     # the queue holds the two after it; taking one asks for another
    assert read.wait(10)
    def fail(indices):
        raise OSError("disk gone")
    rows.read = fail
    with pytest.raises(OSError, match="disk gone"):
        list(loader)


def test_document_starts_are_the_boundaries_of_attention():
    """Against a loop over the tokens; the last entry is their number, as in cu_seqlens."""
    tokens = torch.randint(0, 5, (6, 40), generator=torch.Generator().manual_seed(0))
    flat = tokens.flatten().tolist()
    expected = [i for i, token in enumerate(flat) if token == 4 or i % 40 == 0] + [240]
    starts = train_gpt.document_starts(tokens, 4)
    assert starts.tolist() == expected and starts.dtype == torch.int32


def test_500_random_corruptions(tmp_path):
    """Of a shard with a checksum both readers name the file in an error, or the tokens are what they were; of one from
    upstream they tell header, size and range, and take a changed token inside the vocabulary for good."""
    random_bytes = random.Random(0)
    tokens = np.random.default_rng(0).integers(0, 257, size=3000).astype("<u2")
    good = write_shard(tmp_path / "good.bin", tokens).read_bytes()
    upstream = bytearray(good)
    upstream[16:20] = bytes(4)     # no checksum
    told = {True: 0, False: 0}
    for i in range(500):
        checked = i % 2 == 0
        data = bytearray(good if checked else upstream)
        kind = random_bytes.choice(["flip", "flip", "header", "truncate", "extend", "zero", "noise", "swap"])
        at = random_bytes.randrange(20 if kind == "header" else len(data))
        if kind in ("flip", "header"):
            data[at] ^= 1 << random_bytes.randrange(8)
        elif kind == "truncate":
            del data[at:]
        elif kind == "extend":
            data += random_bytes.randbytes(random_bytes.randrange(1, 5000))
        elif kind == "swap":
            data[at:at + 2], data[-2:] = data[-2:], data[at:at + 2]
        else:
            length = random_bytes.randrange(1, 3000)
            data[at:at + length] = bytes(len(data[at:at + length])) if kind == "zero" else \
                random_bytes.randbytes(len(data[at:at + length]))
        path = tmp_path / f"corrupt_{i}.bin"
        path.write_bytes(data)
        errors = []
        for check, *arguments in ((train_gpt.check_shard, str(path), 257), (shards.read_shard, path)):
            try:
                check(*arguments)
            except (train_gpt.RunError, shards.ShardError) as error:
                assert str(path) in str(error)
                errors.append(error)
        header, rest = np.frombuffer(bytes(data[:1024]).ljust(1024, b"\0"), dtype="<i4"), bytes(data[1024:])
        fits = (tuple(header[:2]) == (20240520, 1) and len(rest) == 2 * header[2] and header[3] == 257
                and (np.frombuffer(rest, dtype="<u2") < 257).all())
        summed = header[4:5].view("<u4")[0] in (0, zlib.crc32(rest))
        told[checked] += not (fits and summed)
        vocabulary_alone = header[3] != 257 and len(errors) == 1     # data/ takes any vocabulary, a run its own
        assert len(errors) == (0 if fits and summed else 2) or vocabulary_alone, (kind, at, errors)
        if checked and not errors:
            assert rest == good[1024:] or not header[4]
        path.unlink()
    assert told[True] > told[False] > 100
