"""Run by test_distributed.py under torchrun: prints facts of a few steps on gloo ranks as one line of JSON."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_model import small_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train_gpt


def count_all_reduces(world) -> dict[int, int]:
    """Returns {micro-steps: all-reduces of gradient buckets in a step}."""
    model = DistributedDataParallel(small_model())
    counts = []

    def hook(state, bucket):
        counts[-1] += 1
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, hook)
    tokens = torch.randint(257, (8, 17), generator=torch.Generator().manual_seed(world.rank))
    result = {}
    for _ in range(2):     # the buckets settle after the first step
        for micro_batch in (8, 4, 2, 1):
            counts.append(0)
            train_gpt.accumulate_gradients(model, tokens, micro_batch, world)
            model.zero_grad()
            result[8 // micro_batch] = counts[-1]
    return result


OPTIONS = dict(num_layers=3, normuon_beta2=0.9, matrix_weight_decay=0.1, decay_kind="cautious")


def steps(first: int, last: int, state: dict | None = None, cpu_batch: int = 2**20) -> tuple:
    """Muon's steps `first` to `last` of 20 on recorded float64 gradients, from `state` on; returns the optimizer and
    {parameter: its values at the end}."""
    model = small_model(**OPTIONS).double()
    optimizer = train_gpt.make_optimizers(model, model.config)[0][1]
    optimizer.cpu_batch = cpu_batch
    matrices = {name: p for name, p in model.named_parameters() if p in optimizer.owners}
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        for name, p in matrices.items():
            p.data.copy_(state["matrices"][name])
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in matrices.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return optimizer, {name: p.detach() for name, p in matrices.items()}


def state_bytes(states: dict) -> int:
    return sum(tensor.nbytes for state in states.values() for tensor in state.values())


def sharded_steps(world, folder: str) -> dict:
    """20 steps; on 2 ranks the first 10, saved, too, on 4 the last 10 from there. Bytes that each rank holds. A batch
    has one parameter a rank, or all of a shape."""
    path, resumed = Path(folder) / "half.pt", {}
    if world.size == 2:
        optimizer, half = steps(0, 10, cpu_batch=1)
        whole = optimizer.state_dict()
        if world.rank == 0:
            torch.save(dict(optimizer=whole, matrices=half), path)
    else:
        resumed = steps(10, 20, torch.load(path))[1]
    optimizer, matrices = steps(0, 20, cpu_batch=1 if world.size == 2 else 2**20)
    held = world.gather(state_bytes(optimizer.state))
    saved = optimizer.state_dict()
    return dict(held=held, saved=state_bytes(saved["state"]), held_after=world.gather(state_bytes(optimizer.state)),
                matrices={name: p.tolist() for name, p in matrices.items()},
                resumed={name: p.tolist() for name, p in resumed.items()})


if __name__ == "__main__":
    world = train_gpt.start_world(60)
    facts = dict(all_reduces=count_all_reduces(world), **sharded_steps(world, sys.argv[1]))
    if world.rank == 0:
        print("FACTS " + json.dumps(facts), flush=True)
    dist.destroy_process_group()
    os._exit(0)     # as train_gpt.py does, for the reason given there
