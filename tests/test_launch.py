"""launch/: the files agree with the repository, and each node of a Slurm job starts run.sh as a part of one run.

Slurm, Docker and SkyPilot are not there: what scontrol and srun do is written below, from their manuals.
"""

import re
import shlex
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, SMALL, environment, losses

LAUNCH = ROOT / "launch"
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames node[7-8]" ] && printf 'node7\\nnode8\\n'"""
# One task on each node, in the folder of the job; it fails where one of them does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun $1" >&2; shift; done
for node in $(seq "$SLURM_JOB_NUM_NODES"); do SLURM_NODEID=$((node - 1)) "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit; done"""
RUN_SH = """#!/bin/bash
[ "$1" != env ] || { echo "made $2" >&2; echo ./my/python; exit; }
printf -v arguments '<%s>' "$@"
echo "$NODE_RANK of $NNODES at $MASTER_ADDR:$MASTER_PORT by $PYTHON: $arguments $(trap -p TERM)\""""


def job(folder, nodes: int, *arguments, **variables) -> subprocess.CompletedProcess:
    """Runs slurm.sh as Slurm does: a copy of it, elsewhere, with what Slurm sets; scontrol and srun are in bin."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in dict(scontrol=SCONTROL, srun=SRUN, spooled=(LAUNCH / "slurm.sh").read_text()).items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    variables = dict(SLURM_JOB_NUM_NODES=str(nodes), SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_ID="1230042",
                     SLURM_CPUS_PER_TASK="64", SLURM_SUBMIT_DIR=str(folder)) | variables
    path = f"{folder / 'bin'}:{environment()['PATH']}"
    return subprocess.run([folder / "bin/spooled", *arguments], cwd="/", capture_output=True, text=True, timeout=85,
                          env={**environment(), "PATH": path, **variables})


@pytest.mark.parametrize("variables, address", [
    ({}, "node7:20042"), (dict(MASTER_ADDR="10.0.0.1", MASTER_PORT="99"), "10.0.0.1:99")])
def test_each_node_of_a_slurm_job_gets_its_rank(tmp_path, variables, address):
    (tmp_path / "run.sh").write_text(RUN_SH)
    (tmp_path / "run.sh").chmod(0o755)
    result = job(tmp_path, 2, "small", "--data", "my data", **variables)
    rest = f"of 2 at {address} by ./my/python: <small><--data><my data> trap -- '' SIGTERM"
    assert sorted(result.stdout.splitlines()) == [f"0 {rest}", f"1 {rest}"], result.stderr
    calls = ["made requirements.txt", "srun --kill-on-bad-exit=1", "srun --cpus-per-task=64"]
    assert result.stderr.splitlines() == calls


def test_sbatch_reads_its_options():
    """It takes those in comments before the first command; one task a node, as run.sh starts a node's processes."""
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    head = lines[:next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert "--ntasks-per-node=1" in options and options == [line[8:] for line in head if line.startswith("#SBATCH ")]
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)


@pytest.mark.slow
def test_a_slurm_job_of_two_nodes_trains_one_run(text, tmp_path):
    """With the real run.sh: two launchers on this machine, which meet at the address of the first node."""
    options = ["tiny", *SMALL, "--num_steps", "5", *text, "--log_dir", tmp_path, "--run_id", "r"]
    job_folder = tmp_path / "job"
    job_folder.mkdir()
    (job_folder / "run.sh").write_text(f'#!/bin/bash\n[ "$1" != env ] || {{ echo {sys.executable}; exit; }}\n'
                                       f'exec {ROOT}/run.sh "$@"')
    (job_folder / "run.sh").chmod(0o755)
    result = job(job_folder, 2, *map(str, options), MASTER_ADDR="127.0.0.1", NPROC_PER_NODE="1")
    assert result.returncode == 0, result.stderr
    assert ("val", 5) in losses(tmp_path / "r") and "hardware: 2 x " in (tmp_path / "r/log.txt").read_text()


def test_the_dockerfile_copies_what_is_there_and_what_a_run_needs():
    lines = re.sub(r"\\\n", " ", (LAUNCH / "Dockerfile").read_text()).splitlines()
    steps = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert [words[1] for words in steps if words[0] == "FROM"] == [words[1] for words in steps[:1]]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", steps[0][1])
    copied, installed = set(), None
    for name, *words in steps:
        for pattern in words[:-1] if name == "COPY" else ():
            found = [path.relative_to(ROOT) for path in ROOT.glob(pattern)]
            assert found, pattern
            # The folder of each stays as it is, as run.sh calls them by it.
            assert all(path.parent.as_posix() == words[-1].rstrip("/") for path in found)
            copied |= {path.as_posix() for path in found}
        if "requirements.txt" in words and name == "RUN":
            installed = "requirements.txt" in copied
    run_sh = (ROOT / "run.sh").read_text()
    needed = set(re.findall(r"\b(?:data|tools)/\w+\.py\b|\btrain_gpt\.py\b|\brequirements\.txt\b", run_sh))
    assert installed and needed <= copied and {"tools/runs.py", "data/fineweb.py", "run.sh"} <= copied
    assert steps[-1] == ["ENTRYPOINT", "[./run.sh]"]


def test_the_task_of_skypilot():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task.keys() == {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert all(count == 8 for count in task["resources"]["accelerators"].values())


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.2\n"])
def test_what_skypilot_runs_is_run_sh(tmp_path, address):
    (tmp_path / "run.sh").write_text(RUN_SH)
    (tmp_path / "run.sh").chmod(0o755)
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    variables = dict(SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS=f"{address}\n10.0.0.3",
                     PYTHON="", MASTER_PORT="", **task["envs"])
    for script, output in ((task["setup"], "./my/python\n"),
                           (task["run"], f"1 of 2 at {address.strip()}: by : <small> \n")):
        result = subprocess.run(["bash", "-eu", "-c", script], cwd=tmp_path, capture_output=True, text=True,
                                env={**environment(), **variables})
        assert (result.returncode, result.stdout) == (0, output), result.stderr


@pytest.mark.parametrize("path", ["slurm.sh"])
def test_bash_reads_it(path):
    assert subprocess.run(["bash", "-n", LAUNCH / path], capture_output=True).stderr == b""
