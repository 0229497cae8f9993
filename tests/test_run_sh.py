"""run.sh's choices, with an interpreter that writes down what it is asked to run instead of running it."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT

FAKE = """#!/bin/sh
case "$*" in
    *importlib.metadata*) ;;
    *get_device_properties*) echo "$FAKE_GPUS" ;;
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
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)

    def start(*arguments, gpus="0 0", **variables):
        (tmp_path / "calls").unlink(missing_ok=True)
        result = subprocess.run(["./run.sh", *arguments], cwd=tmp_path, capture_output=True, text=True, env={
            **os.environ, "PYTHON": "./python", "FAKE_GPUS": gpus, **variables}, timeout=30)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return result.returncode, calls

    return start


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node="


def test_a_cpu_takes_tiny_in_one_process(start):
    assert start() == (0, ["data/local_text.py", "train_gpt.py tiny", "records/plot.py logs/new/"])


@pytest.mark.parametrize("arguments, gpus, launched", [
    ([], "8 1", TORCHRUN + "8 train_gpt.py small"),
    ([], "8 0", TORCHRUN + "1 train_gpt.py tiny"),
    (["tiny"], "8 1", TORCHRUN + "1 train_gpt.py tiny"),
    (["--num_steps", "5", "small"], "2 1", TORCHRUN + "2 train_gpt.py --num_steps 5 small"),
    (["--num_steps", "5"], "1 1", TORCHRUN + "1 train_gpt.py small --num_steps 5"),
    (["small"], "0 0", "train_gpt.py small"),
])
def test_track_and_processes(start, arguments, gpus, launched):
    status, calls = start(*arguments, gpus=gpus)
    assert status == 0 and calls[1] == launched
    assert calls[0] == ("data/fineweb.py" if "small" in launched else "data/local_text.py")


def test_several_nodes(start):
    status, calls = start("small", gpus="8 1", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert status == 0 and calls == [
        "data/fineweb.py", "-m torch.distributed.run --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 "
        "--master_port=1234 --nproc_per_node=8 train_gpt.py small"]     # no plot: the first node has the run's folder
    assert start("tiny", NPROC_PER_NODE="2")[1][1] == TORCHRUN + "2 train_gpt.py tiny"


def test_own_data_and_resume_prepare_nothing(start):
    assert start("tiny", "--train_files", "mine/*.bin")[1][0] == "train_gpt.py tiny --train_files mine/*.bin"
    assert start("--resume", "out/run", FAKE_RUN="out/run") == (
        0, ["train_gpt.py --resume out/run", "records/plot.py out/run"])
    assert start("--resume=out/run/checkpoint.pt", FAKE_RUN="out/run")[1][1] == "records/plot.py out/run"


def test_log_dir_and_failure(start):
    assert start("tiny", "--log_dir", "other", FAKE_RUN="other/r")[1][-1] == "records/plot.py other/r/"
    status, calls = start("tiny", FAKE_STATUS="2")
    assert status == 2 and "plot" not in calls[-1]


def test_sigterm_reaches_the_trainer_and_is_waited_for(start, tmp_path):
    process = subprocess.Popen(["./run.sh", "tiny"], cwd=tmp_path, env={
        **os.environ, "PYTHON": "./python", "FAKE_GPUS": "0 0", "FAKE_WAIT": "1"})
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
