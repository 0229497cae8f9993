import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import ShardWriter

import train_gpt

ROOT = Path(__file__).parent.parent
SMALL = ["--num_layers", "2", "--num_heads", "2", "--head_dim", "16", "--seq_len", "32", "--batch_tokens", "512",
         "--val_tokens", "2048", "--num_steps", "20", "--cooldown_steps", "10", "--momentum_warmup_steps", "5",
         "--dtype", "float32", "--ngram_rows", "512"]
# Every part of the recipe that `tiny` leaves out, in three stages.
STAGED = ["--stages", "1:8 2:16 3:0", "--val_window", "24", "--windows", "SL", "--document_tokens", "24",
          "--mixing", "on", "--value_tables", "1", "--ngram_max", "3", "--ngram_dim", "8",
          "--matrix_weight_decay", "0.1"]
# For these sizes one thread is fastest, and pytest runs two processes (test.sh).
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")
    parser.addoption("--upstream", action="store_true", help="run the checks of this repository's own documents, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--upstream"):
        left_out = [item for item in items if "upstream" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: ./test.sh --slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU here: bench/gpu.sh runs it on one"))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> list[str]:
    """Options that name a folder of small shards: bytes of a second-order pattern, which a model can learn."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, size=random.integers(2, 7), dtype=np.uint8)) for _ in range(40)]
    for name, size in (("train_000000", 3000), ("train_000001", 1001), ("val_000000", 1500)):
        data = b" ".join(words[i] for i in random.integers(0, len(words), size=size))
        tokens = np.concatenate([[256], np.frombuffer(data, dtype=np.uint8)]).astype("<u2")
        tokens[random.integers(0, len(tokens), size=size // 10)] = 256     # documents of very different lengths
        with ShardWriter(folder / f"{name}.bin", 257) as shard:
            shard.write(tokens)
    return ["--data", str(folder)]


def command(*arguments, nproc: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launch, str(ROOT / "train_gpt.py"), *map(str, arguments)]


def environment(gpu: bool = False) -> dict:
    """Of a run on a CPU, whose promises the tests check, unless a GPU is asked for."""
    return {**os.environ, **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}


def run(*arguments, nproc: int = 1, timeout: float = 200, gpu: bool = False) -> subprocess.CompletedProcess:
    """Runs the real train_gpt.py, under torchrun for nproc > 1, and returns what it printed and its status."""
    return subprocess.run(command(*arguments, nproc=nproc), capture_output=True, text=True, timeout=timeout,
                          env=environment(gpu))


@contextlib.contextmanager
def unchanged():
    """Leaves the signal handlers and the random state as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(*arguments) -> int:
    """Runs train_gpt.main on this command line, in this process, and returns its exit status."""
    with unchanged():
        try:
            return train_gpt.main([*map(str, arguments)])
        except SystemExit as stop:     # of argparse
            return stop.code


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory) -> Path:
    """The folder of a finished run with every part of the recipe, and its checkpoint."""
    logs = tmp_path_factory.mktemp("logs")
    assert train("tiny", *SMALL, *STAGED, *text, "--save_every", 20, "--log_dir", logs, "--run_id", "r") == 0
    return logs / "r"


def losses(log: Path) -> dict[tuple[str, int], str]:
    """Returns {(train or val, step): loss as printed} of a run folder; a step logged twice must agree."""
    found, pattern = {}, r"^step:(\d+)/\d+ (?:.* )?(train|val)_loss:(\S+)"
    for step, kind, loss in re.findall(pattern, (log / "log.txt").read_text(), re.MULTILINE):
        assert found.setdefault((kind, int(step)), loss) == loss, f"step {step} has {kind} losses {loss} and another"
    return found


def wait_for(path: Path, pattern: str, seconds: float = 60) -> None:
    """Waits until the file has a line that matches."""
    end = time.monotonic() + seconds
    while not (path.exists() and re.search(pattern, path.read_text(), re.MULTILINE)):
        assert time.monotonic() < end, f"no line of {path} matches {pattern} within {seconds} s"
        time.sleep(0.02)
