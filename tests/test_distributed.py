"""Several ranks: the collectives of a step, the shared-out optimizer, and ranks that die or hang."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, command, environment


@pytest.fixture(scope="module", params=[2, 3])
def facts(request):
    path = os.pathsep.join([str(ROOT), str(ROOT / "data"), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}",
         ROOT / "tests/distributed_worker.py"], capture_output=True, text=True, timeout=120,
        env={**environment(), "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    return json.loads(re.search(r"FACTS (.*)", result.stdout)[1])


def test_all_reduces_do_not_depend_on_the_micro_steps(facts):
    assert len(set(facts["all_reduces"].values())) == 1 and facts["all_reduces"]["8"] >= 1


def test_sharded_muon_equals_the_unsharded(facts):
    assert facts["difference"] < 1e-9


def test_each_rank_holds_its_share_of_the_momentum(facts):
    """The shares add up to the whole, none is far above an equal one, and saving gathers the whole and lets it go."""
    assert sum(facts["held"]) == facts["total"] == facts["saved"]
    assert max(facts["held"]) <= facts["total"] / len(facts["held"]) * 1.5
    assert facts["held_after_saving"] == facts["held"][0]


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_with_a_message(text, tmp_path):
    """One of two ranks is stopped (SIGSTOP): the other says which collective it waited for, and the run ends."""
    options = [*SMALL, *text, "--num_steps", 100_000, "--collective_timeout", 5, "--log_dir", tmp_path]
    process = subprocess.Popen(
        command("tiny", *options, nproc=2),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        log = wait_for(tmp_path, r"^step:20/")
        workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
                   .stdout.split()]
        os.kill(workers[1], signal.SIGSTOP)
        output = process.communicate(timeout=90)[0]
    finally:
        process.kill()
    assert process.returncode != 0 and log
    assert re.search(r"error: rank 0 of 2: the .* failed; another rank died, or was waited for longer than "
                     r"--collective_timeout 5 s", output), output


def wait_for(folder, pattern: str, seconds: float = 60):
    """Waits until the one log below `folder` has a line that matches, and returns its path."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for log in folder.glob("*/log.txt"):
            if re.search(pattern, log.read_text(), re.MULTILINE):
                return log
        time.sleep(0.05)
    raise AssertionError(f"no line matches {pattern} within {seconds} s")
