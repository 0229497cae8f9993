"""run.sh: its choices, by an interpreter that says on stderr what it should run; whole runs; the making of .venv."""

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
import torch
from conftest import ROOT, SMALL, environment, losses, wait_for

import train_gpt

FAKE = f"""#!/bin/sh
case "$*" in *importlib.metadata*) exit ;; *get_device_properties*) exec {sys.executable} "$@" ;; esac
echo "$*" >&2
case "$*" in *${{FAILS:-nothing}}*) echo "x: good: x"; echo "bad: y"; exit 3 ;; esac
"""
ADDED = """
torch.cuda.device_count = lambda: int(os.environ.get("GPUS", 0))
torch.cuda.get_device_properties = lambda i: argparse.Namespace(major=8, total_memory=float(os.environ["BYTES"]))
TRACKS["mine"] = dict(prepare="data/mine.py own", data="own", vocab_size=257, document_tokens=0)
if __name__"""
MINE = """import numpy, shards, sys
for part in "train", "val":
    with shards.ShardWriter(f"{sys.argv[1]}/{part}_0.bin", 257) as shard:
        shard.write(numpy.random.default_rng(0).integers(0, 97, 2100).astype("<u2"))"""


def script(path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "*.bin", "records", "tests", "logs"))
    script(clone / "fake", FAKE)
    script(clone / "data/mine.py", MINE)
    script(clone / "train_gpt.py", (ROOT / "train_gpt.py").read_text().replace("\nif __name__", ADDED))
    return clone


def start(clone, *arguments, **variables) -> subprocess.Popen:
    return subprocess.Popen(["./run.sh", *arguments], cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**environment(), "PYTHON": "./fake", **variables}, start_new_session=True)


def result(clone, *arguments, **variables) -> tuple[int, str, list[str]]:
    process = start(clone, *arguments, **variables)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors.splitlines()


TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node="
ONE_OF_TWO = ("-m torch.distributed.run --nnodes=2 --node_rank=1 --master_addr=127.0.0.1 --master_port=99 "
              "--nproc_per_node=8 ")
EIGHT, NODES = dict(GPUS="8", BYTES="80e9"), dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="99")


def verify(folder: str) -> str:
    return f"data/shards.py verify {folder}/*train_*.bin {folder}/*val_*.bin"


def steps(track: str, launched: str) -> list[str]:
    c = train_gpt.make_config(dict(track=track))
    return [c.prepare, verify(c.data), f"{launched} --save_every {c.num_steps}", "tools/plot.py logs/new/",
            "tools/sample.py logs/new/ --tokens 100"]


TINY, SMALL_8 = steps("tiny", "train_gpt.py tiny"), steps("small", TORCHRUN + "8 train_gpt.py small")


@pytest.mark.parametrize("arguments, variables, status, lines", [
    ("", {}, 0, TINY),
    ("", EIGHT, 0, SMALL_8),
    ("tiny", dict(FAILS="sample"), 0, [*TINY, "run.sh: the run is complete, but no sample could be written"]),
    ("--num_steps 5 --save_every 0", EIGHT, 0, [     # no checkpoint, no sample
        *SMALL_8[:2], TORCHRUN + "8 train_gpt.py small --num_steps 5 --save_every 0", SMALL_8[3]]),
    ("--preflight --num_steps 5", EIGHT, 0,
     [*SMALL_8[:2], "tools/preflight.py --processes 8 small --num_steps 5"]),
    ("small", EIGHT | NODES, 0, steps("small", ONE_OF_TWO + "train_gpt.py small")[:-2]),     # the other node plots
    ("tiny --data=m --run_id r --log_dir a", dict(NPROC_PER_NODE="2", FAILS="plot"), 0, [
        verify("m"),
        TORCHRUN + "2 train_gpt.py tiny --data=m --run_id r --log_dir a --save_every 500",
        "tools/plot.py a/r", "run.sh: the run is complete, but its plot could not be drawn"]),
    ("--resume logs/new", EIGHT, 0, [
        verify("t  t"), TORCHRUN + "8 train_gpt.py --resume logs/new", "tools/plot.py logs/new",
        "tools/sample.py logs/new --tokens 100"]),
    ("tiny", dict(FAILS="verify"), 1, [
        *TINY[:2], "bad: y", "run.sh: data/tiny: give another --data, or move what is bad away and run this again"]),
    ("tiny", dict(FAILS="train_gpt"), 3, TINY[:-2]),
    ("large", {}, 1, ["error: track large: give small or lab or tiny or mine"]),
    ("tiny --help", {}, 0, ["train_gpt.py --help"]),
    ("tiny", dict(PYTHON="false"), 1, ["run.sh: PYTHON=false has no torch 2.11 or newer; name another, or none"]),
    pytest.param("", dict(GPUS="8", BYTES="16e9"), 0, TINY, marks=pytest.mark.slow),
    pytest.param("", dict(GPUS="1", BYTES="20e9"), 0, steps("small", "train_gpt.py small"), marks=pytest.mark.slow)])
def test_what_it_runs(clone, arguments, variables, status, lines):
    (clone / "logs/new").mkdir(parents=True)
    ends = [f"checkpoint: x at step {c['num_steps']}/1\n" for c in (vars(train_gpt.Config()), train_gpt.TRACKS["tiny"])]
    (clone / "logs/new/log.txt").write_text("".join(ends))
    content = dict(config=vars(train_gpt.Config(data="t  t")), step=1)
    torch.save(content | dict(digest=train_gpt.describe(content)[1]), clone / "logs/new/checkpoint.pt")
    found, _, errors = result(clone, *arguments.split(), **variables)
    assert (found, [line.replace(f"{clone}/", "") for line in errors]) == (status, lines)


def test_a_new_track_is_one_entry_and_signals_save(clone):
    """Its data are made and checked, it is trained on and plotted, and stopped twice in between."""
    arguments, log = ["mine", *SMALL, "--num_steps", "80", "--run_id", "r"], clone / "logs/r/log.txt"
    for number, kill, step in ((signal.SIGTERM, os.kill, 5), (signal.SIGINT, os.killpg, 40)):
        process = start(clone, *arguments, PYTHON=sys.executable)
        wait_for(log, f"^step:{step}/")
        for _ in range(2):     # SIGTERM reaches run.sh alone, Ctrl-C all that the terminal has started
            kill(process.pid, number)
        assert process.wait(timeout=60) == 128 + number and log.read_text().splitlines()[-1].startswith("stopped at")
        arguments = ["--resume", "logs/r"]
    status, output, errors = result(clone, *arguments, PYTHON=sys.executable)
    assert status == 0 and ": good: " not in output and (clone / "logs/r/loss.png").exists(), errors
    assert "run.sh: " not in "".join(errors)     # plot and sample succeeded, too
    assert sorted(step for kind, step in losses(log.parent) if kind == "train") == list(range(1, 81))


def test_ctrl_c_in_the_plotting_loses_nothing(clone):
    arguments, log = ["mine", *SMALL, "--run_id", "r"], clone / "logs/r/log.txt"
    (clone / "tools/plot.py").write_text("import pathlib, sys, time\npathlib.Path(sys.argv[1], 'begun').touch()\n"
                                         "time.sleep(60)\n")
    process = start(clone, *arguments, PYTHON=sys.executable)
    wait_for(log.with_name("begun"), "")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read().endswith("run.sh: stopped; the run itself is complete: logs/r\n")
    before = losses(log.parent)
    shutil.copy(ROOT / "tools/plot.py", clone / "tools")
    status, output, errors = result(clone, "--resume", "logs/r", PYTHON=sys.executable)
    assert status == 0 and losses(log.parent) == before and (clone / "logs/r/loss.png").exists(), errors


def test_a_clone_without_the_pins_makes_venv_once(clone):
    """Where there is no Python, one that is too old, one without the pins, one that has them; and no such pins."""
    real, version = os.path.realpath(sys.executable), metadata.version("packaging")
    with zipfile.ZipFile(clone / f"packaging-{version}-py3-none-any.whl", "w") as wheel:
        for file in metadata.files("packaging"):
            wheel.write(file.locate(), file)
    script(clone / "requirements.txt", f'packaging=={version}\nabsent==1.0; python_version < "3"\n')
    script(clone / "dev.txt", "-r requirements.txt\npackaging>1\n")
    for tool in ("bash", "dirname", "grep"):
        (clone / tool).symlink_to(shutil.which(tool))
    script(clone / "python", f'#!/bin/sh\n{real} -Ic "import sys; sys.version_info = 3, 9; exec(sys.argv[2])" "$@"\n')

    def env(path="."):
        return result(clone, "env", "dev.txt", PYTHON="", PATH=path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(clone))

    status, output, errors = env()
    assert status == 1 and not output and errors[-1].endswith("no Python 3.10 or newer was found; install one")
    script(clone / "python3", f'#!/bin/sh\nexec {real} -I "$@"\n')
    assert env() == (0, ".venv/bin/python\n", ["run.sh: installing dev.txt into .venv, once"])
    assert env() == (0, ".venv/bin/python\n", [])
    assert env(path=".venv/bin:.") == (0, "python\n", [])     # an active environment that has them
    script(clone / "requirements.txt", "packaging==0.0.1\n")
    status, output, errors = env()
    assert status == 1 and not output and "packaging==0.0.1" in errors[-1]
