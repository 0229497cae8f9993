"""bench/loader.py and bench/tokenize_text.py on small input: they end, and the figures fit the time that passed."""

import re
import subprocess
import sys
import time

import pytest
from bpe_reference import write_small_ranks
from conftest import ROOT, SMALL, environment


def bench(name: str, *arguments, status: int = 0) -> tuple[str, float]:
    """Returns (what it prints, the seconds that it took)."""
    started = time.monotonic()
    command = [sys.executable, ROOT / "bench" / name, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200)
    assert result.returncode == status, result.stderr
    return result.stdout + result.stderr, time.monotonic() - started


def test_loader(text):
    printed, wall = bench("loader.py", "--tokens", 2**20, "tiny", *SMALL, *text)
    found = re.search(r"^waiting for data in tiny .*: (\S+) of (\S+) s, (\S+)%$", printed, re.MULTILINE)
    waited, trained, percent = map(float, found.groups())
    assert 0 <= waited <= trained < wall and percent == pytest.approx(100 * waited / trained, abs=5)
    rows = re.findall(r"^(\w+), (1 process|1 of 8 ranks) +(\d+) +(\d+) +(\d+\.\d\d)$", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [("tiny", "1 process"), ("small", "1 of 8 ranks"), ("small", "1 process")]
    for *_, loader, plain, ratio in rows:
        assert float(loader) > 2**20 / 1e6 / wall and float(plain) > 2**20 / 1e6 / wall
        assert (float(loader) - 0.5) / (float(plain) + 0.5) - 0.01 < float(ratio) < (float(loader) + 0.5) / (
            float(plain) - 0.5) + 0.01


def test_loader_passes_on_what_training_refuses():
    assert "error: --lr -1" in bench("loader.py", "tiny", "--lr", "-1", status=2)[0]


def test_tokenize_text(tmp_path):
    printed, wall = bench("tokenize_text.py", "--size_mb", 0.5, "--encoding", write_small_ranks(tmp_path / "ranks"))
    lines = re.findall(r"^(\w+): (\S+) MB/s, (\S+) CPU s, (?:\d+ at once|peak memory (\d+) MB)$", printed, re.MULTILINE)
    assert [line[0] for line in lines] == ["plain_processes", "local_text", "local_text", "plain_processes"]
    assert sum(0.5 / float(speed) for _, speed, *_ in lines) < wall
    assert all(0 < float(cpu_seconds) < 50 and 20 < int(peak or 50) < 500 for *_, cpu_seconds, peak in lines)


def test_tokenize_text_ends_with_an_error_of_local_text():
    printed, _ = bench("tokenize_text.py", "--size_mb", 0.1, "--encoding", "none", status=1)
    assert "none: not BPE ranks" in printed
