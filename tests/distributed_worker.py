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


def count_all_reduces() -> dict[int, int]:
    """Returns {micro-steps: all-reduces of gradient buckets in a step}."""
    model = DistributedDataParallel(small_model())
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
            train_gpt.accumulate_gradients(model, tokens, micro_batch)
            model.zero_grad()
            result[8 // micro_batch] = counts[-1]
    return result


OPTIONS = dict(num_layers=3, normuon_beta2=0.9, matrix_weight_decay=0.1, decay_kind="cautious")


def steps(first: int, last: int, state: dict | None = None) -> tuple:
    """Muon's steps `first` to `last` of 20 on recorded float64 gradients, from `state` on; returns the optimizer and
    {parameter: its values at the end}."""
    model = small_model(**OPTIONS).double()
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
    return optimizer, {name: p.detach() for name, p in matrices.items()}


def shared_steps(folder: str) -> dict:
    """20 steps; on 2 ranks the first 10, saved, too, on 4 the last 10 from there. `shares`: how many matrices this
    rank orthogonalized in a step."""
    path, resumed, shares = Path(folder) / "half.pt", {}, []
    if dist.get_world_size() == 2:
        optimizer, half = steps(0, 10)
        if dist.get_rank() == 0:
            torch.save(dict(optimizer=optimizer.state_dict(), matrices=half), path)
    else:
        resumed = steps(10, 20, torch.load(path))[1]
    original = train_gpt.Muon.orthogonalize
    train_gpt.Muon.orthogonalize = staticmethod(lambda G, *rest: (shares.append(len(G)), original(G, *rest))[1])
    matrices = steps(0, 20)[1]
    return dict(shares=train_gpt.gather(sum(shares) / 20),
                matrices={name: p.tolist() for name, p in matrices.items()},
                resumed={name: p.tolist() for name, p in resumed.items()})


if __name__ == "__main__":
    train_gpt.join_ranks(60)
    facts = dict(all_reduces=count_all_reduces(), **shared_steps(sys.argv[1]))
    if dist.get_rank() == 0:
        print("FACTS " + json.dumps(facts), flush=True)
    dist.destroy_process_group()
    os._exit(0)     # as train_gpt.py does, for the reason given there
