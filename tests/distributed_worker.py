"""Run by test_distributed.py under torchrun: prints facts of a few steps on gloo ranks as one line of JSON."""

import json
import os

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


def sharded_steps(world) -> dict:
    """Muon's parameters after 20 steps on recorded float64 gradients, and what each rank holds of the momentum."""
    model = small_model(num_layers=3).double()
    c = model.config
    optimizer = train_gpt.make_optimizers(model, c)[0][1]
    alone = [p.detach().clone().requires_grad_() for p in optimizer.owners]
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    reference = train_gpt.Muon([{**groups[p], "params": [q]} for p, q in zip(optimizer.owners, alone, strict=True)])
    reference.rank, reference.world_size, reference.owners = 0, 1, dict.fromkeys(alone, 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for p, q in zip(optimizer.owners, alone, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    held = sum(state["momentum_buffer"].numel() for state in optimizer.state.values())
    whole = optimizer.state_dict()["state"]
    return dict(
        difference=max((p - q).abs().max().item() for p, q in zip(optimizer.owners, alone, strict=True)),
        held=held, total=sum(p.numel() for p in optimizer.owners),
        saved=sum(state["momentum_buffer"].numel() for state in whole.values()),
        held_after_saving=sum(state["momentum_buffer"].numel() for state in optimizer.state.values()))


if __name__ == "__main__":
    world = train_gpt.start_world(60)
    facts = dict(all_reduces=count_all_reduces(world), **sharded_steps(world))
    facts["held"] = world.gather(facts["held"])
    if world.rank == 0:
        print("FACTS " + json.dumps(facts), flush=True)
    dist.destroy_process_group()
    os._exit(0)     # as train_gpt.py does, for the reason given there
