"""Several ranks: the collectives of a step, the shared-out optimizer, and ranks that die or hang."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, command, environment, wait_for
from distributed_worker import steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("half")


@pytest.fixture(scope="module", params=[2, 4])
def facts(request, folder):
    path = os.pathsep.join([str(ROOT), str(ROOT / "data"), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}",
         ROOT / "tests/distributed_worker.py", folder], capture_output=True, text=True, timeout=120,
        env={**environment(), "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    return json.loads(re.search(r"FACTS (.*)", result.stdout)[1])


def test_all_reduces_do_not_depend_on_the_micro_steps(facts):
    assert len(set(facts["all_reduces"].values())) == 1 and facts["all_reduces"]["8"] >= 1


def test_the_ranks_share_muon_and_a_state_of_two_goes_on_on_four_and_one(facts, folder):
    """20 steps on 2 and 4 ranks are those of one process, in float64; so is a run that 2 ranks saved after 10."""
    expected = steps(0, 20)[1]
    found = [facts["matrices"], facts["resumed"] or steps(10, 20, torch.load(folder / "half.pt"))[1]]
    for matrices in found:
        assert matrices.keys() == expected.keys()
        assert max((torch.as_tensor(p, dtype=torch.float64) - expected[name]).abs().max()
                   for name, p in matrices.items()) < 1e-9


def test_the_ranks_share_the_orthogonalization(facts):
    """3 layers have 9 matrices of Q, K and V, and 9 others; no rank has more than two beyond an equal share."""
    shares = facts["shares"]
    assert sum(shares) == 18 and max(shares) <= 18 / len(shares) + 2


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_with_a_message(text, tmp_path):
    """One of two ranks is stopped (SIGSTOP): the other says which collective it waited for, and the run ends."""
    options = [*SMALL, *text, "--num_steps", 100_000, "--collective_timeout", 5, "--log_dir", tmp_path, "--run_id", "r"]
    process = subprocess.Popen(
        command("tiny", *options, nproc=2),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        wait_for(tmp_path / "r/log.txt", r"^step:20/")
        workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
                   .stdout.split()]
        os.kill(workers[1], signal.SIGSTOP)
        output = process.communicate(timeout=90)[0]
    finally:
        process.kill()
    assert process.returncode != 0
    assert re.search(r"rank 0 of 2: .*another rank.*--collective_timeout", output), output
