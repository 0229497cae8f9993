"""Two nodes with nothing set by hand: network namespaces, where a host's own name is 127.0.1.1 as it is on Debian."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, command, environment, losses, run, wait_for

NODES = [f"gpt{os.getpid()}{letter}" for letter in "ab"]     # an interface's name has at most 15 characters
OPTIONS = ["tiny", *SMALL, "--num_steps", 40, "--val_every", 20, "--save_every", 10, "--run_id", "r"]


def shell(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def inside(node: int, *words) -> list[str]:
    """The command line that runs these words on a node, as the process that it starts."""
    rename = f'echo host{node} > /proc/sys/kernel/hostname && exec "$@"'
    return ["ip", "netns", "exec", NODES[node], "unshare", "--uts", "sh", "-c", rename, "sh", *map(str, words)]


def connect() -> None:
    for node, name in enumerate(NODES):
        shell("ip", "netns", "add", name)
        hosts = Path("/etc/netns", name, "hosts")     # `ip netns exec` lays it over /etc/hosts
        hosts.parent.mkdir(parents=True)
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 host{node}\n")
    peer = ["peer", "name", NODES[1], "netns", NODES[1]]
    shell("ip", "link", "add", NODES[0], "netns", NODES[0], "type", "veth", *peer)
    for node, name in enumerate(NODES):
        shell("ip", "-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", name)
        shell("ip", "-n", name, "link", "set", "lo", "up")
        shell("ip", "-n", name, "link", "set", name, "up")
        shell(*inside(node, "grep", f"127.0.1.1 host{node}", "/etc/hosts"))


def disconnect() -> None:
    for name in NODES:
        if Path("/run/netns", name).exists():
            for pid in shell("ip", "netns", "pids", name).split():
                os.kill(int(pid), signal.SIGKILL)
            shell("ip", "netns", "delete", name)
        shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


@pytest.fixture(scope="module")
def network():
    """Two namespaces joined by a cable, which end with the module."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command ip")
    try:
        try:
            connect()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}: {getattr(error, 'stderr', '')}")
        yield
    finally:
        disconnect()


@pytest.fixture(scope="module")
def one_node(text, tmp_path_factory):
    """Starts two processes on one node; calling it waits for their losses."""
    folder = tmp_path_factory.mktemp("one_node")
    process = subprocess.Popen(command(*OPTIONS, *text, "--log_dir", folder, nproc=2), env=environment())

    def wait() -> dict:
        assert process.wait(60) == 0
        return losses(folder / "r")

    yield wait
    process.terminate()     # and so its workers
    process.wait(60)


def start(node: int, *options, master: str = "10.77.0.1") -> subprocess.Popen:
    clean = {name: value for name, value in environment().items() if not name.startswith(("GLOO_", "NCCL_"))}
    clean |= dict(NNODES="2", NODE_RANK=str(node), MASTER_ADDR=master, NPROC_PER_NODE="1", PYTHON=sys.executable)
    return subprocess.Popen(inside(node, ROOT / "run.sh", *options), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env=clean)


def test_a_rank_that_dies_is_named_and_the_run_resumes_on_one_node(network, text, tmp_path, one_node):
    nodes = [start(node, *OPTIONS, *text, "--log_dir", tmp_path) for node in (0, 1)]
    wait_for(tmp_path / "r/log.txt", r"^checkpoint: .* at step 10/")
    launcher = shell("pgrep", "-P", str(nodes[1].pid), "-f", "torch.distributed.run").strip()
    os.kill(int(shell("pgrep", "-P", launcher)), signal.SIGKILL)
    killed = time.monotonic()
    output = nodes[0].communicate(timeout=60)[0]
    assert time.monotonic() - killed < 10 and nodes[0].returncode != 0
    assert re.findall(r"^rank 0 of 2: lost (.*?);", output, re.MULTILINE) == ["rank 1 (host host1)"], output
    assert "step:40/" not in (tmp_path / "r/log.txt").read_text()
    result = run("--resume", tmp_path / "r", nproc=2)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "r") == one_node()


@pytest.mark.slow
def test_two_nodes_end_with_the_losses_of_one(network, text, tmp_path, one_node):
    """On a CPU they are equal as printed: the ranks and their collectives are the same."""
    nodes = [start(node, *OPTIONS, *text, "--log_dir", tmp_path) for node in (0, 1)]
    for node in nodes:
        output = node.communicate(timeout=60)[0]
        assert node.returncode == 0, output
    assert losses(tmp_path / "r") == one_node()


def test_a_first_node_whose_name_is_its_own_alone_is_an_error(network, text):
    node = start(0, *OPTIONS, *text, master="host0")
    output = node.communicate(timeout=60)[0]
    assert node.returncode == 2
    assert re.search("MASTER_ADDR host0: .*GLOO_SOCKET_IFNAME", output), output
