#!/usr/bin/env python3
"""Times a step of each optimizer on the matrices of the 124M model (the track small), and says what its state takes.

    python bench/optimizers.py                                         # on a GPU if there is one, else on the CPU
    python bench/optimizers.py --device cpu --rounds 3
    torchrun --standalone --nproc_per_node=2 bench/optimizers.py --device cpu

All take steps on the same random gradients, in turn (A B C C B A). Of several processes a step lasts until the slowest
has done it, and torch's optimizers do all of the work on each. A first step is timed apart: on a GPU it compiles ours.
The second table is the state of whole training, with AdamW for embedding and lm_head, for one process and, by the
table of owners, for eight.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402

OURS = {
    "Muon": dict(normuon_beta2=0),
    "Muon, bf16 momentum": dict(normuon_beta2=0, momentum_dtype="bfloat16"),
    "Muon, polar_express, NorMuon, cautious decay": dict(
        polynomial="polar_express", normuon_beta2=0.95, matrix_weight_decay=0.1, decay_kind="cautious"),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> dict:
    """Returns {parameter: bytes of the state that this process holds of it}."""
    return {p: sum(x.nbytes for x in state.values()) for p, state in optimizer.state.items()}


def ours(model: train_gpt.GPT, fields: dict, dtype: torch.dtype, compiled: bool) -> train_gpt.Muon:
    c = train_gpt.make_config(dict(track=model.config.track, **fields))
    return train_gpt.make_optimizers(model, c, dtype, compiled)[0][1]


def time_steps(optimizers: dict, world: train_gpt.World, rounds: int) -> dict[str, list[float]]:
    """Returns {name: [seconds of each step]}, of which the first is the warm-up."""
    seconds = {name: [] for name in optimizers}
    for i in range(rounds + 1):
        for name in list(optimizers) if i % 2 else reversed(optimizers):
            if world.size > 1:
                dist.barrier()
            clock = train_gpt.Clock(world.device)
            clock.start()
            optimizers[name].step()
            clock.pause()
            seconds[name].append(max(world.gather(clock.elapsed)))
    return seconds


def memory_lines(model: train_gpt.GPT, optimizers: dict) -> list[str]:
    """The table of whole training's state: AdamW's of two float32 each, Muon's of what one process holds by owners."""
    everything, matrices = (sum(8 * p.numel() for p in part.parameters()) for part in (model, model.blocks))
    lines = ["| state of whole training, MiB a rank | 1 process | 8 processes |", "|---|---|---|",
             f"| AdamW | {everything / 2**20:.0f} | {everything / 2**20:.0f} |"]
    for name in OURS:
        held, sizes = state_bytes(optimizers[name]), []
        for world_size in (1, 8):
            owners = train_gpt.Muon(optimizers[name].param_groups, world=(0, world_size)).owners
            most = max(sum(held[p] for p in held if owners[p] == rank) for rank in range(world_size))
            sizes.append((everything - matrices + most) / 2**20)
        lines.append(f"| {name} | {sizes[0]:.0f} | {sizes[1]:.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="in which ours runs Newton-Schulz [auto: bfloat16 where there are units for it]")
    parser.add_argument("--track", choices=train_gpt.TRACKS, default="small", help="whose matrices [small]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each [5]")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: give 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; give cpu, or leave it out")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    world = train_gpt.start_world(600)
    gpu, bf16 = world.device.type == "cuda", train_gpt.has_bf16_units(world.device)
    dtype = getattr(torch, arguments.dtype if arguments.dtype != "auto" else "bfloat16" if bf16 else "float32")
    model = train_gpt.GPT(train_gpt.make_config(dict(track=arguments.track))).to(world.device)
    matrices = [p for p in model.blocks.parameters()]
    generator = torch.Generator(world.device).manual_seed(0)
    with torch.no_grad():
        for p in matrices:
            p.normal_(0, 0.02, generator=generator)
            p.grad = torch.randn(p.shape, device=world.device, generator=generator)
    optimizers = {"torch.optim.Muon": torch.optim.Muon(matrices, lr=1e-4),
                  "torch.optim.AdamW, fused": torch.optim.AdamW(matrices, lr=1e-4, fused=True),
                  **{name: ours(model, fields, dtype, compiled=gpu) for name, fields in OURS.items()}}
    seconds = time_steps(optimizers, world, arguments.rounds)
    held = {name: max(world.gather(sum(state_bytes(optimizer).values()))) for name, optimizer in optimizers.items()}
    if world.rank == 0:
        cpu = Path("/proc/cpuinfo").read_text() if not gpu and Path("/proc/cpuinfo").exists() else ""
        units = [f"{kind} units" for kind in ("avx512_bf16", "amx_bf16") if kind in cpu]
        limit = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA",) if name in os.environ]
        print(", ".join([str(datetime.date.today()), train_gpt.describe_hardware(world), *units, *limit,
                         f"ours in {str(dtype)[6:]}", f"torch {torch.__version__}",
                         f"Python {platform.python_version()}"]))
        print(f"{sum(p.numel() for p in matrices):,} parameters in {len(matrices)} tensors; median of "
              f"{arguments.rounds} steps (least to most)\n")
        print("| optimizer of the matrices | seconds a step | / torch.optim.Muon | first step | state, MiB a rank |")
        print("|---|---|---|---|---|")
        base = statistics.median(seconds["torch.optim.Muon"][1:])
        for name, (first, *steps) in seconds.items():
            median = statistics.median(steps)
            print(f"| {name} | {median:.4g} ({min(steps):.4g} to {max(steps):.4g}) | {median / base:.3f} | "
                  f"{first:.4g} | {held[name] / 2**20:.0f} |")
        if world.size == 1:
            print("", *memory_lines(model, optimizers), sep="\n")
    if world.size > 1:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)     # as train_gpt.py does, for the reason given there


if __name__ == "__main__":
    main()
