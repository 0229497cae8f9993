"""Several ranks: the collectives of a step, the shared-out optimizer, and a rank that hangs or dies."""

import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, command, environment, wait_for
from test_model import small_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train_gpt


def count_all_reduces() -> dict[int, int]:
    """Returns {micro-steps: all-reduces of gradient buckets in a step}."""
    model = DistributedDataParallel(small_model())
    reduced = [p for p in model.parameters() if p.requires_grad]
    counts = []

    def hook(state, bucket):
        counts[-1] += 1
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    tokens = torch.randint(257, (8, 17), generator=torch.Generator().manual_seed(dist.get_rank()))
    result = {}
    for _ in range(2):     # the buckets settle after the first step
        for micro_batch in (8, 4, 2, 1):
            counts.append(0)
            places = [p.grad is not None and p.grad.data_ptr() for p in reduced]
            train_gpt.accumulate_gradients(model, tokens, micro_batch)
            result[8 // micro_batch] = counts[-1]
    # The gradients stay where the buckets are, so that nothing copies them there.
    assert places == [p.grad.data_ptr() for p in reduced]
    return result


def steps(first: int, last: int, state: dict | None = None) -> tuple[dict, dict]:
    """Muon's steps `first` to `last` of 10 on recorded float64 gradients, from `state` on; returns the optimizer's
    state and {parameter: its values at the end}."""
    model = small_model(num_layers=3, normuon_beta2=0.9, matrix_weight_decay=0.1).double()
    optimizer = train_gpt.make_optimizers(model, model.config)[0]["muon"]
    for group in optimizer.param_groups:
        group["ns_dtype"] = torch.float64
    matrices = dict(model.blocks.named_parameters())
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        for name, p in matrices.items():
            p.data.copy_(state["matrices"][name])
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in matrices.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return optimizer.state_dict(), {name: p.detach() for name, p in matrices.items()}


def on_a_rank(rank: int, size: int, port: int, path) -> dict:
    """Makes 10 steps. Two ranks save their state after 5, from which four go on. `shares`: how many matrices this rank
    orthogonalized in each call of a step."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train_gpt.join_ranks(60)
    facts = dict(all_reduces=count_all_reduces())
    if size == 2:
        optimizer, half = steps(0, 5)
        if rank == 0:
            torch.save(dict(optimizer=optimizer, matrices=half), path)
    else:
        facts["resumed"] = steps(5, 10, torch.load(path))[1]
    original, shares = train_gpt.orthogonalize, []

    def counting(G, *others):
        shares.append(len(G))
        return original(G, *others)

    train_gpt.Muon.orthogonalize = staticmethod(counting)
    facts["matrices"] = steps(0, 10)[1]
    dist.destroy_process_group()
    return facts | dict(shares=shares[:len(shares) // 10])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("half") / "state.pt"


@pytest.fixture(scope="module", params=[2, 4])
def facts(request, path):
    """What each of 2 or 4 gloo ranks found."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("forkserver")     # whose server imports torch once for all ranks
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(request.param, context) as pool:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        ranks = [pool.submit(on_a_rank, rank, request.param, port, path) for rank in range(request.param)]
        return [rank.result(timeout=100) for rank in ranks]


def test_all_reduces_do_not_depend_on_the_micro_steps(facts):
    assert len(set(facts[0]["all_reduces"].values())) == 1 and facts[0]["all_reduces"][8] >= 1


def test_the_ranks_share_muon_and_a_state_of_two_goes_on_on_four_and_one(facts, path):
    """10 steps on 2 and 4 ranks are those of one process, in float64; so is a run that 2 ranks saved after 5."""
    expected = steps(0, 10)[1]
    resumed = facts[0].get("resumed") or steps(5, 10, torch.load(path))[1]
    for matrices in (resumed, *(rank["matrices"] for rank in facts)):
        assert matrices.keys() == expected.keys()
        assert max((p - expected[name]).abs().max() for name, p in matrices.items()) < 1e-9


def test_the_ranks_share_the_orthogonalization(facts):
    """Of the matrices of a shape each has an equal number, of which less than one for each rank are zeros."""
    counts = Counter(p.shape for p in facts[0]["matrices"].values())
    for rank in facts:
        assert sorted(rank["shares"]) == sorted(math.ceil(count / len(facts)) for count in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("number, nproc", [(signal.SIGSTOP, 2), (signal.SIGKILL, 3)])
def test_the_others_name_a_rank_that_hangs_or_dies(text, tmp_path, number, nproc):
    """Rank 1 is stopped, which --collective_timeout ends, or killed: each of the others names it alone."""
    options = [*SMALL, *text, "--batch_tokens", 96 * nproc, "--num_steps", 100_000, "--collective_timeout", 5,
               "--log_dir", tmp_path, "--run_id", "r"]
    process = subprocess.Popen(
        command("tiny", *options, nproc=nproc),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())
    try:
        wait_for(tmp_path / "r/log.txt", r"^step:20/")
        workers = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
                   .stdout.split()]
        os.kill(workers[1], number)
        output = process.communicate(timeout=90)[0]
    finally:
        process.kill()
    assert process.returncode != 0
    found = re.findall(rf"rank (\d) of {nproc}: lost rank (\d) \([^,]*\); .*--collective_timeout", output)
    assert sorted(found) == [(str(rank), "1") for rank in range(nproc) if rank != 1], output
