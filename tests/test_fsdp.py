"""examples/fsdp.py on 1, 2 and 4 gloo ranks against train_gpt.py's own Muon and AdamW in one process, in float64."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import uuid
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, environment
from fake_gpu import device

import train_gpt

sys.path.insert(0, str(ROOT / "examples"))
import fsdp  # noqa: E402

FIELDS = dict(track="tiny", seq_len=16, batch_tokens=128, micro_batch=1, ngram_rows=0, normuon_beta2=0.0, num_steps=20,
              cooldown_steps=12, momentum_warmup_steps=5, matrix_weight_decay=0.1, num_heads=2, head_dim=16)
# Of the 6 rows of most matrices four ranks have 2, 2, 2 and 0.
ODD = dict(num_heads=3, head_dim=2, mixing="on", value_tables=1, windows="SL", stages="1:8 1:0")


@contextlib.contextmanager
def float64():
    """All of the model in float64, so that only the order of sums differs, and its Config."""
    to_float32 = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = to_float32


def config(**fields) -> train_gpt.Config:
    return dataclasses.replace(train_gpt.make_config(FIELDS | fields), dtype="float64")


def batch(step: int) -> torch.Tensor:
    return torch.randint(257, (8, 17), generator=torch.Generator().manual_seed(step))


def measure(model, before: list, optimizers: dict) -> dict:
    """What get_post_step_metrics promises, of one process's whole tensors."""
    kinds = {}
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        state = next(optimizer.state[p] for optimizer in optimizers.values() if p in optimizer.state)
        v = state["momentum_buffer"] if "momentum_buffer" in state else state["exp_avg"]
        rows = torch.stack([x.detach().flatten() for x in (p - old, p, v, p.grad)])
        kinds.setdefault(re.sub(r"\.\d+", "", name), []).append(rows)
    kinds = {kind: torch.cat(rows, 1) for kind, rows in kinds.items()}
    return {kind: [u.norm().item(), x.norm().item(), torch.cosine_similarity(v, g, 0).item()]
            for kind, (u, x, v, g) in kinds.items()}


def reference(**fields) -> dict:
    """10 steps of train_gpt.py's optimizers on whole batches."""
    with float64():
        c = config(**fields)
        model = train_gpt.GPT(c).initialize()
        optimizers = train_gpt.make_optimizers(model, c)[0]
        for step in range(10):
            old = [p.detach().clone() for p in model.parameters()]
            train_gpt.accumulate_gradients(model, batch(step), 8, train_gpt.stage(c, step)[1])
            train_gpt.set_schedules(optimizers, c, step)
            for optimizer in optimizers.values():
                optimizer.step()
        tensors = [p.detach() for p in model.parameters()]
        tensors += [x for o in optimizers.values() for state in o.state.values() for x in state.values()]
        return dict(parameters={name: p.detach() for name, p in model.named_parameters()},
                    metrics=measure(model, old, optimizers), bytes=sum(x.nbytes for x in tensors))


def on_a_rank(rank: int, size: int, store: str, replicas: int, gradients: str, resume, save, fields: dict) -> dict:
    """Steps up to the tenth, from the checkpoint `resume` on; `save` is written after 5."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    original, shapes = fsdp.orthogonalize, []

    def counting(G, *others):
        shapes.append(tuple(G.shape))
        return original(G, *others)

    try:
        with float64():
            run = fsdp.set_up(config(**fields), torch.device("cpu"), replicas, gradients)
            if resume:
                fsdp.load(run, resume)
            while run.step < 10:
                old = [p.to_local().detach().clone() for p in run.model.parameters()]
                fsdp.orthogonalize = counting if run.step == 9 else original
                fsdp.train_step(run, batch(run.step).chunk(size)[rank])
                if save and run.step == 5:
                    fsdp.save(run, save)
            return dict(metrics=fsdp.get_post_step_metrics(run, old), bytes=sum(fsdp.bytes_held(run)), shapes=shapes,
                        parameters={name: p.full_tensor().detach() for name, p in run.model.named_parameters()})
    finally:
        fsdp.orthogonalize = original
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """A function that runs on_a_rank on so many ranks, and returns what each found."""
    context = multiprocessing.get_context("forkserver")     # whose server imports torch once for all ranks
    context.set_forkserver_preload([__name__])
    folder = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        # A process is the same rank each time: torch keeps what it found for a rank of an equal mesh.
        processes = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in range(4)]

        def start(size, replicas=1, gradients="whole", resume=None, save=None, **fields):
            arguments = size, folder / uuid.uuid4().hex, replicas, gradients, resume, save, fields
            ranks = [processes[rank].submit(on_a_rank, rank, *arguments) for rank in range(size)]
            return [rank.result(timeout=60) for rank in ranks]
        yield start


def check(ranks: list[dict], expected: dict, share: float = 0) -> None:
    """The parameters and metrics of one process; each matrix orthogonalized once, whole; a share of the bytes."""
    for rank in ranks:
        assert rank["parameters"].keys() == expected["parameters"].keys()
        for name, p in rank["parameters"].items():
            assert (p - expected["parameters"][name]).abs().max() < 1e-9, name
        assert rank["metrics"].keys() == expected["metrics"].keys()
        for kind, values in rank["metrics"].items():
            assert values == pytest.approx(expected["metrics"][kind], rel=1e-6), kind
        if share:     # AdamW counts its steps for each parameter
            assert rank["bytes"] == pytest.approx(share * expected["bytes"], abs=64)
    matrices = [tuple(p.shape) for name, p in expected["parameters"].items() if re.match(r"blocks.*weight", name)]
    assert sorted(sum([rank["shapes"] for rank in ranks], [])) == sorted(matrices)


def test_two_ranks_are_one_process_and_their_checkpoint_loads_on_one(launch, tmp_path):
    expected = reference()
    check(launch(2, save=tmp_path / "half"), expected, 1 / 2)
    check(launch(1, resume=tmp_path / "half"), expected, 1)


@pytest.mark.slow
def test_four_ranks_and_their_checkpoint_on_two(launch, tmp_path):
    expected = reference()
    check(launch(4, save=tmp_path / "half"), expected, 1 / 4)
    check(launch(2, gradients="sharded", resume=tmp_path / "half"), expected, 1 / 2)
    check(launch(4, replicas=2, resume=tmp_path / "half"), expected, 1 / 2)


@pytest.mark.slow
def test_rows_that_do_not_divide(launch):
    ranks = launch(4, gradients="sharded", **ODD)
    check(ranks, reference(**ODD))
    assert ranks[0]["bytes"] > ranks[3]["bytes"]


def test_the_owners_have_even_work():
    random = torch.Generator().manual_seed(0)
    for owners in (1, 3, 8):
        costs = torch.rand(50, generator=random).tolist()
        loads = [0.0] * owners
        for owner, cost in zip(fsdp.deal(costs, owners), costs, strict=True):
            loads[owner] += cost
        assert max(loads) <= sum(costs) / owners + max(costs) / owners


@pytest.mark.parametrize("arguments, message", [
    (["--replicas", "2"], "--replicas 2: give a divisor of the number of processes, 1"),
    (["--replicas", "0"], "--replicas 0: give a divisor"),
    (["--resume", "nowhere"], "--resume nowhere: no whole checkpoint; give"),
    (["tiny", "--ngram_rows", "512"], "--ngram_rows 512: give 0"),
    (["tiny", "--matrix_optimizer", "adamw"], "--matrix_optimizer adamw: give muon")])
def test_bad_input(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert fsdp.main(arguments) == 2
    assert re.fullmatch(f"error: {re.escape(message)}.*\n", capsys.readouterr().err)


def test_whole_parameters_are_an_error():
    with pytest.raises(train_gpt.RunError, match="give matrices that fully_shard has cut"):
        fsdp.MuonW([torch.nn.Parameter(torch.ones(4, 4))])


def torchrun(nproc: int, *arguments) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *launcher, ROOT / "examples/fsdp.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment())


@pytest.mark.slow
def test_the_program(text, tmp_path):
    """It learns, ends with its table, and goes on from a checkpoint of four processes on two to the same end."""
    options = ["--log_dir", tmp_path, "--save_every", 10, "--ngram_rows", 0]
    whole = torchrun(4, "tiny", *SMALL, *text, *options, "--replicas", 2)
    again = torchrun(2, "--resume", tmp_path / "step_10")
    found = []
    for result in (whole, again):
        assert result.returncode == 0, result.stderr
        found.append(float(re.search(r"^val_loss: (.*)", result.stdout, re.M)[1]))
        assert len(re.findall(r"^\| \d \|", result.stdout, re.M)) == (4 if result is whole else 2)
        assert re.search(r"^\| blocks.mlp.up.weight \| [\d.]+ \| [\d.]+ \| [\d.]+ \|", result.stdout, re.M)
    assert found[0] == pytest.approx(found[1], abs=1e-3) and found[0] < 4.5     # of log 257 = 5.5
    bad = torchrun(4, "tiny", *SMALL, *text, *options, "--replicas", 3)
    assert re.findall("^error.*", bad.stderr, re.M) == [
        "error: --replicas 3: give a divisor of the number of processes, 4"]


@pytest.mark.slow
@pytest.mark.skipif(bool(device.missing()), reason=device.missing())
def test_eight_ranks_on_a_fake_gpu():
    """Nothing waits for the GPU in a step. Two all-to-alls in bfloat16: this rank gets the matrix that it owns, one of
    an MLP, and then its eighth of all."""
    options = ["small", "--num_layers", "2", "--windows", "L", "--value_tables", "0", "--stages", "1:384",
               "--num_steps", "3", "--val_tokens", "524288"]
    command = [sys.executable, ROOT / "tests/fake_gpu/sharded.py", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(result.stdout.splitlines()[-1])
    assert result.returncode == 0 and report["problems"] == []
    matrices = 2 * 12 * 768**2
    for step in report["steps"]:
        assert step["collectives"]["c10d::alltoall_base_ bfloat16"] == [2, 2 * (4 * 768**2 + matrices // 8)]
        sizes = matrices + 2 * 50304 * 768 + 8 * 2     # a rank has one of the 2 numbers of a block's mix, or a zero
        assert step["collectives"]["c10d::_reduce_scatter_base_ float32"] == [3, 4 * sizes // 8]
