"""run.sh's choices, with an interpreter that writes down what it is asked to run instead of running it, and whole runs
of a track of its own."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, environment

import train_gpt

GPUS = """import os, types, torch
count, size = map(int, os.environ["FAKE_GPUS"].split())
torch.cuda.device_count = lambda: count
torch.cuda.get_device_properties = lambda i: types.SimpleNamespace(major=8, minor=0, total_memory=size * 10**9)
"""
FAKE = """#!/bin/sh
case "$*" in
    *importlib.metadata*) ;;
    *get_device_properties*) shift; exec "$REAL" -c "$GPUS$@" ;;
    *) echo "$*" >> calls
       case "$*" in *train_gpt.py*)
           mkdir -p ${FAKE_RUN:-logs/new}
           if [ -n "${FAKE_WAIT:-}" ]; then
               trap 'sleep 0.3; echo saved >> calls; exit 143' TERM
               echo waiting >> calls
               while :; do sleep 0.05; done
           fi
           exit ${FAKE_STATUS:-0} ;;
       esac ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Runs a copy of run.sh; returns (status, the commands that it gave the interpreter, in order)."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    shutil.copy(ROOT / "train_gpt.py", tmp_path)
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)

    def start(*arguments, gpus="0 0", **variables):     # the GPUs' number, and the GB of each
        (tmp_path / "calls").unlink(missing_ok=True)
        result = subprocess.run(["./run.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, env={
            **os.environ, "PYTHON": "./python", "REAL": sys.executable, "GPUS": GPUS, "FAKE_GPUS": gpus, **variables},
            timeout=60)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return result.returncode, calls

    return start


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node="
VERIFY = "data/shards.py verify data/tiny/train_*.bin data/tiny/val_*.bin"


def test_a_cpu_takes_tiny_in_one_process(start):
    assert start() == (0, ["data/local_text.py", VERIFY, "train_gpt.py tiny", "records/plot.py logs/new/"])


@pytest.mark.parametrize("arguments, gpus, launched", [
    ([], "8 80", TORCHRUN + "8 train_gpt.py small"),
    ([], "8 16", TORCHRUN + "1 train_gpt.py tiny"),
    (["--num_steps", "5"], "1 20", TORCHRUN + "1 train_gpt.py small --num_steps 5"),
    pytest.param(["tiny"], "8 80", TORCHRUN + "1 train_gpt.py tiny", marks=pytest.mark.slow),
    pytest.param(["--num_steps", "5", "small"], "2 80", TORCHRUN + "2 train_gpt.py --num_steps 5 small",
                 marks=pytest.mark.slow),
    pytest.param(["small"], "0 0", "train_gpt.py small", marks=pytest.mark.slow),
])
def test_track_and_processes(start, arguments, gpus, launched):
    status, calls = start(*arguments, gpus=gpus)
    assert status == 0 and calls[2] == launched
    assert calls[0] == ("data/fineweb.py" if "small" in launched else "data/local_text.py")


def test_several_nodes(start):
    status, calls = start("small", gpus="8 80", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert status == 0 and calls[0] == "data/fineweb.py" and calls[2:] == [
        "-m torch.distributed.run --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=1234 "
        "--nproc_per_node=8 train_gpt.py small"]     # no plot: the first node has the run's folder
    assert start("tiny", NPROC_PER_NODE="2")[1][2] == TORCHRUN + "2 train_gpt.py tiny"


def test_own_data_and_resume_prepare_nothing(start, tmp_path):
    assert start("tiny", "--train_files", "mine/*.bin")[1][:2] == [
        "data/shards.py verify mine/*.bin data/tiny/val_*.bin", "train_gpt.py tiny --train_files mine/*.bin"]
    config = vars(train_gpt.make_config(dict(track="tiny", log_dir="moved since")))
    (tmp_path / "out/run").mkdir(parents=True)
    torch.save(dict(config=config), tmp_path / "out/run/checkpoint.pt")
    assert start("--resume", "out/run", gpus="8 80") == (
        0, [VERIFY, TORCHRUN + "1 train_gpt.py --resume out/run", f"records/plot.py {tmp_path}/out/run"])


def test_names_of_the_run_and_failure(start):
    assert start("tiny", "--log_dir", "other", FAKE_RUN="other/r")[1][-1] == "records/plot.py other/r/"
    assert start("tiny", "--run_id", "r", "--log_dir=a b")[1][-1] == "records/plot.py a b/r"
    status, calls = start("tiny", FAKE_STATUS="2")
    assert status == 2 and "plot" not in calls[-1]


@pytest.mark.parametrize("arguments", [
    ["large"], ["--resume", "nowhere"], pytest.param(["tiny", "--no_such_field", "1"], marks=pytest.mark.slow),
    pytest.param(["--lr", "x"], marks=pytest.mark.slow), pytest.param(["--lr", "-1"], marks=pytest.mark.slow)])
def test_a_wrong_command_line_ends_before_anything_is_made(start, arguments):
    assert start(*arguments) == (2, [])


def test_help_is_the_trainers(start):
    assert start("tiny", "--help") == (0, ["train_gpt.py --help"])


def test_sigterm_reaches_the_trainer_and_is_waited_for(start, tmp_path):
    process = subprocess.Popen(["./run.sh", "tiny"], cwd=tmp_path, env={
        **os.environ, "PYTHON": "./python", "REAL": sys.executable, "GPUS": GPUS, "FAKE_GPUS": "0 0",
        "FAKE_WAIT": "1"})
    while "waiting" not in ((tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "saved"     # and no plot of a run that was stopped


def test_an_interpreter_without_torch_is_named(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexec /usr/bin/env python3 -S -I \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    result = subprocess.run([ROOT / "run.sh", "tiny"], capture_output=True, text=True,
                            env={**os.environ, "PYTHON": str(tmp_path / "python")})
    assert result.returncode != 0 and "has torch 0.0 (none); name one with 2.11 or newer" in result.stderr


MINE = """
import sys
sys.path.insert(0, "data")
import numpy as np
from shards import ShardWriter
for name in ("train_0", "val_0"):
    with ShardWriter(f"{sys.argv[1]}/{name}.bin", 257) as shard:
        shard.write(np.random.default_rng(0).integers(0, 97, 2100).astype("<u2"))
"""


def test_a_new_track_is_one_entry_in_tracks(tmp_path):
    """Its data are made by its program, checked, trained on and plotted; damaged ones end it before training."""
    shutil.copytree(ROOT / "records", tmp_path / "records", ignore=lambda folder, names: {
        name for name in names if not name.endswith(".py")})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.py").write_text(MINE)
    for name in ("run.sh", "data/shards.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    source = (ROOT / "train_gpt.py").read_text()
    (tmp_path / "train_gpt.py").write_text(source.replace("\nTRACKS = {\n", """
TRACKS = {
    "mine": dict(prepare="data/mine.py own", train_files="own/train_*.bin", val_files="own/val_*.bin", vocab_size=257),
""", 1))

    def start(*options):
        return subprocess.run(["./run.sh", "mine", *SMALL, "--num_steps", "2", *options], cwd=tmp_path, timeout=120,
                              capture_output=True, text=True, env={**environment(), "PYTHON": sys.executable})

    done = start("--run_id", "one")
    assert done.returncode == 0, done.stderr
    assert "step:2/2 val_loss:" in done.stdout and "good" not in done.stdout
    assert (tmp_path / "logs/one/loss.png").exists()
    shard = tmp_path / "own/val_0.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    done = start("--train_files", "own/train_*.bin", "--run_id", "two")
    assert done.returncode == 1 and done.stderr.startswith("bad: own/val_0.bin: token ")
    assert not (tmp_path / "logs/two").exists()
