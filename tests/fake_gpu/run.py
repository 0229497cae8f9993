"""Run train_gpt.py on a fake GPU and say what would go wrong on a real one, on any Linux x86-64 machine with g++.

    python tests/fake_gpu/run.py [--capability 8.0] [--memory 85] [--ranks 8] [--fault NAME]
        TRACK [--field value ...]

The log is that of a real run, but for its losses: tensors have no numbers. Priming, which compiles, is not counted.
The last line is the report, as JSON. --fault plants some of faults.py. Exit status: 1 if there is a problem.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import device

if __name__ == "__main__":
    device.load_hooks()

import numpy as np
import torch
import torch.distributed as dist
from recorder import Recorder
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.distributed import fake_pg  # noqa: F401  the backend "fake"

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import faults  # noqa: E402
from shards import ShardWriter  # noqa: E402

import train_gpt  # noqa: E402

# Of the ranks beyond the first, whose record nobody reads.
OTHERS = ["--compile", "off", "--num_layers", "1", "--value_tables", "0"]


def real(function):
    """The function on real tensors, as data are until they reach the GPU."""
    def wrapped(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)
    return wrapped


def replace_in_trainer(recorder: Recorder) -> None:
    """All that the trainer does with numbers; the record begins after its priming, and notes the work of its steps."""
    for name in ("open_shard", "gather", "permutation"):
        setattr(train_gpt, name, real(getattr(train_gpt, name)))
    read, prime, start_group = real(train_gpt.Rows.read), train_gpt.prime, dist.init_process_group
    train_gpt.Rows.read = lambda self, rows: recorder.from_tensor(read(self, rows))

    def prime_and_start(run, start):
        prime(run, start)
        recorder.start()
        recorder.logits = 4 * run.micro_batch * run.config.seq_len * run.config.padded_vocab_size     # bytes in float32
        recorder.at_once = run.at_once
    train_gpt.prime = prime_and_start

    step = train_gpt.train_step

    def train_step(*args):
        recorder.start_step()
        step(*args)
        recorder.in_step = False
    train_gpt.train_step = train_step
    register_optimizer_step_pre_hook(lambda optimizer, *args: set_optimizer(f"{type(optimizer).__name__}: "))
    register_optimizer_step_post_hook(lambda *args: set_optimizer(""))

    def set_optimizer(name):
        recorder.optimizer = name

    def start_fake_group(backend, **settings):
        with unset_fake_temporarily():
            start_group(backend.replace("nccl", "fake"), **settings)
    dist.init_process_group = start_fake_group
    # DDP compares the shapes of all ranks. It begins with one bucket, and makes those of 25 MiB of the order in which
    # gradients came: both need numbers, so here it begins with the latter.
    ddp = torch.nn.parallel.distributed
    ddp._verify_param_shape_across_processes = lambda *args: True
    ddp.sys = SimpleNamespace(maxsize=25 * 2**20)
    dist.Reducer._rebuild_buckets = lambda self: False
    dist.Logger.set_runtime_stats_and_log = lambda self: None     # reads a GPU's timer

    def deep_copy(self, memo):
        return self.detach().clone() if isinstance(self, FakeTensor) else real_copy(self, memo)
    real_copy, torch.Tensor.__deepcopy__ = real(torch.Tensor.__deepcopy__), deep_copy

    def to(self, where):     # torch's own swaps the data of the parameters
        for module in self.modules():
            for name, p in [*module.named_parameters(recurse=False)]:
                module._parameters[name] = torch.nn.Parameter(p.detach().to(where), p.requires_grad)
        return self
    torch.nn.Module.to = to
    torch.Tensor.pin_memory = lambda self: self
    torch.save = lambda content, file: file.write(str(content).encode())
    train_gpt.describe = lambda content: ([], "")     # nothing has a value


def problems(report: dict) -> list[str]:
    """What would fail, or be slow, on a real GPU."""
    found = [f"no CUDA kernel: {name}" for name in report["missing"]]
    found += [f"the host waits in a step: {place}" for place in report["synchronisations"]
              if "train_step" in place or "load_batches" in place]
    found += [f"{name} spills {stack} bytes" for name, (_, stack) in report["kernels"].items() if stack]
    if report["graphs"]:
        found.append(f"{report['graphs']} graphs compiled in training")
    if report["logits"] and report["largest_float32"] >= report["logits"]:
        found.append(f"a float32 tensor of {report['largest_float32']:,} bytes: the logits")
    if report["status"] != 0:
        found.append(f"exit status {report['status']}")
    return found


def run_rank(options, arguments: list[str], rank: int) -> dict:
    device.install(options.capability, int(1e9 * options.memory))
    with Recorder(train_gpt.__file__) as recorder:
        replace_in_trainer(recorder)
        for name in options.fault:
            faults.FAULTS[name]()
        try:
            status = train_gpt.main(arguments if rank == 0 else [*arguments, *OTHERS])
        except Exception as error:
            status = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return recorder.report() | dict(status=status)


def run(options, arguments: list[str]) -> dict:
    """Rank 0 compiles; the others, whose collectives it would wait for, run the same program as it is."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    if options.ranks > 1:
        os.environ.update(WORLD_SIZE=str(options.ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK="0")
    children = []
    for rank in range(1, options.ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            run_rank(options, arguments, rank)
            os._exit(0)
        children.append(child)
    report = run_rank(options, arguments, 0)
    for child in children:
        os.waitpid(child, 0)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", choices=device.GPUS, default="8.0")
    parser.add_argument("--memory", type=float, default=85, help="of the GPU, in 10^9 bytes")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--fault", choices=faults.FAULTS, action="append", default=[])
    options, arguments = parser.parse_known_args()
    try:
        c = train_gpt.make_config(train_gpt.parse_command_line(arguments))
    except train_gpt.RunError as error:
        sys.exit(f"run.py: {error}")
    with tempfile.TemporaryDirectory() as folder:
        for name, tokens in dict(train=2_000_000, val=c.val_tokens).items():
            with ShardWriter(Path(folder) / f"{name}_000000.bin", c.vocab_size) as shard:
                shard.write(np.where(np.arange(tokens + 1) % 500, 0, c.vocab_size - 1).astype("<u2"))     # documents
        arguments += ["--data", folder, "--log_dir", f"{folder}/logs"]
        report = run(options, arguments)
    report["problems"] = problems(report)
    print(json.dumps(report), flush=True)
    os._exit(bool(report["problems"]))


if __name__ == "__main__":
    main()
