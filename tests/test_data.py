"""Shards as the trainer reads them, and the order in which it reads their rows."""

import hashlib
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, train
from test_shards import raw_shard

import train_gpt

CPU = torch.device("cpu")


def make_rows(folder, lengths, seq_len=8, max_rows=10**9) -> train_gpt.Rows:
    """Rows over shards of these lengths, whose tokens count up from 0 through all of them."""
    start = 0
    for i, length in enumerate(lengths):
        (folder / f"s_{i:03d}.bin").write_bytes(raw_shard(range(start, start + length), 65535))
        start += length
    c = SimpleNamespace(folder=folder, vocab_size=65535, seq_len=seq_len, document_tokens=0, prepare="data/mine.py")
    return train_gpt.Rows("s_*.bin", c, max_rows)


def test_shards_of_others_are_read_and_hashed(tmp_path):
    (tmp_path / "gpt2.bin").write_bytes(raw_shard([1, 50256, 0], 50257, checksum=False))     # as llm.c writes them
    assert train_gpt.open_shard(tmp_path / "gpt2.bin", 50257).tolist() == [1, 50256, 0]
    rows = make_rows(tmp_path, [20, 30])
    assert rows.sha256 == hashlib.sha256(b"".join((tmp_path / f"s_00{i}.bin").read_bytes() for i in (0, 1))).hexdigest()


@pytest.mark.parametrize("change, words", [
    (lambda good: b"\1\2\3\4" + good[4:], "67305985"),
    (lambda good: good[:-100], "damaged"),
    (lambda good: good[:500], "500 bytes"),
    (lambda good: good[:3], "3 bytes"),
    (lambda good: good[:8] + b"\1\0\0\0" + good[12:], "damaged"),
    (lambda good: good[:8] + b"\xff\xff\xff\xff" + good[12:], "-1"),
    (lambda good: good[:1024] + b"\1\1" + good[1026:], "a token is 257 or more"),
    (lambda good: good[:12] + b"\0\2\0\0" + good[16:], "--vocab_size 257"),
], ids=["magic", "truncated", "short", "tiny", "fewer tokens", "negative", "range", "vocabulary"])
def test_bad_shards_are_named(tmp_path, change, words):
    path = tmp_path / "bad.bin"
    path.write_bytes(change(raw_shard(range(200))))
    with pytest.raises(train_gpt.RunError) as error:
        train_gpt.open_shard(path, 257)
    assert str(path) in str(error.value) and words in str(error.value)


def test_bad_data_end_a_run_before_it_writes(text, tmp_path, capsys):
    (tmp_path / "train_bad.bin").write_bytes(raw_shard([1, 300]))
    for options, words in (
            (["--data", tmp_path], ["train_bad.bin", "257"]),
            (["--data", tmp_path / "none"], [f"--data {tmp_path}/none", "*train_*.bin", "data/local_text.py"]),
            (["--val_tokens", 2**20], [f"--val_tokens {2**20}", text[1]])):
        assert train("tiny", *SMALL, *text, *options, "--log_dir", tmp_path / "logs") == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words) and not (tmp_path / "logs").exists()


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


@pytest.mark.parametrize("cut", [None, 5, 8])
def test_rows_of_documents(tmp_path, cut):
    """A training row begins with the document that holds its first token of the kept text, each document cut to `cut`;
    without it a row is a window of the text. No row has more documents than the count says, and one has as many."""
    generator, end, expected, most = np.random.default_rng(cut or 0), 256, [], 1
    for i, length in enumerate((9, 40, 203, 77)):
        tokens = generator.integers(0, 256, length)
        tokens[generator.random(length) < 0.2] = tokens[5:6] = end
        (tmp_path / f"s_{i}.bin").write_bytes(raw_shard(tokens))
        documents = [[]]
        for token in tokens.tolist():
            documents += [[]] * (token == end)
            documents[-1] = [*documents[-1], token]
        kept = [(j, token) for j, document in enumerate(documents) for token in document[:cut]]
        for place in range(0, len(kept) - 8, 8):
            while cut and place and kept[place - 1][0] == kept[place][0]:
                place -= 1
            expected.append([token for _, token in kept[place:place + 9]])
            most = max(most, len({j for j, _ in kept[place:place + 8]}))
    c = SimpleNamespace(folder=tmp_path, vocab_size=257, seq_len=8, document_tokens=8, prepare="data/local_text.py")
    rows = train_gpt.Rows("s_*.bin", c, 10**9, cut)
    assert rows.count == len(expected) and rows.read(range(rows.count)).tolist() == expected
    assert most <= rows.documents <= 9
    (tmp_path / "s_9.bin").write_bytes(raw_shard(range(50)))
    if cut:
        with pytest.raises(train_gpt.RunError, match=f"--document_tokens {cut}: no end-of-text in a shard; give 0"):
            train_gpt.Rows("s_*.bin", c, 10**9, cut)


def test_a_run_reads_only_the_shards_that_its_budget_needs(tmp_path):
    rows = make_rows(tmp_path, [81, 81, 81], max_rows=11)
    assert rows.count == 20 and len(rows.shards) == 2


@pytest.mark.upstream
def test_order_is_a_permutation_an_epoch_and_a_function_of_the_seed():
    first, second = (train_gpt.training_order(99, 1, range(i * 99, i * 99 + 99)) for i in range(2))
    assert sorted(first) == sorted(second) == list(range(99)) and first != second
    assert train_gpt.training_order(99, 2, range(99)) != first
    assert train_gpt.training_order(99, 1, range(94, 104)) == first[-5:] + second[:5]     # over an epoch's end
    moved = sum(abs(a - b) > 1 for a, b in zip(first, first[1:], strict=False))
    assert moved > 0.9 * 99     # neighbours in the text are not neighbours in the order


def load(rows, starts, rank=0, size=1, step=0) -> list[list]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "ranks", lambda: (rank, size))
        return [batch.tolist() for batch in train_gpt.load_batches(rows, starts, 5, CPU, step)]


@pytest.mark.parametrize("lengths", [AWKWARD, [64 * 8 + 1], [7, 200, 9, 500]], ids=["awkward", "one shard", "unequal"])
def test_ranks_read_the_same_global_batches_and_resume_anywhere(tmp_path, lengths):
    """Over two epochs and with a growing batch: the global batches of 2, 4 and 8 ranks are those of one, which are the
    training order cut into steps; a loader that starts at any of 50 steps gives what the first gave from there on."""
    rows, expected = make_rows(tmp_path, lengths), windows(lengths)
    steps = max(20, rows.count // 24 + 1)     # of each size
    starts = np.cumsum([0] + steps * [8] + steps * [16] + steps * [24]).tolist()
    assert starts[-1] > 2 * rows.count
    one = load(rows, starts)
    order = train_gpt.training_order(rows.count, 5, range(starts[-1]))
    assert one == [[expected[i] for i in order[a:b]] for a, b in zip(starts, starts[1:], strict=False)]
    for size in (2, 4, 8):
        ranks = [load(rows, starts, rank, size) for rank in range(size)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one
    for step in random.Random(0).sample(range(3 * steps), 50):
        size = random.Random(step).choice([1, 2, 4])
        ranks = [load(rows, starts, rank, size, step) for rank in range(size)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == one[step:]
