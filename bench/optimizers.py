#!/usr/bin/env python3
"""Times a step of each optimizer on the matrices of the 124M model (the track small), and says what its state takes.

    python bench/optimizers.py                                         # on a GPU if there is one, else on the CPU
    python bench/optimizers.py --device cpu --rounds 3
    torchrun --standalone --nproc_per_node=2 bench/optimizers.py --device cpu

All take steps on the same random gradients, in turn (A B C C B A). Of several processes a step lasts until the slowest
has done it, and torch's optimizers do all of the work on each. A first step is timed apart: on a GPU it compiles ours.
The second table is the state of whole training, with AdamW for embedding and lm_head, which all ranks hold.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402

OURS = {     # fields of Config
    "Muon": dict(normuon_beta2=0.0),
    "NorMuon": dict(normuon_beta2=0.95),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values())


def time_steps(optimizers: dict, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Returns {name: [seconds of each step]}, of which the first is the warm-up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in optimizers}
    for i in range(rounds + 1):
        for name in list(optimizers) if i % 2 else reversed(optimizers):
            train_gpt.gather(None)     # all begin at once
            wait()
            started = time.perf_counter()
            optimizers[name].step()
            wait()
            seconds[name].append(max(train_gpt.gather(time.perf_counter() - started)))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--track", choices=train_gpt.TRACKS, default="small", help="whose matrices [small]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each [5]")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: give 1 or more")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; give cpu, or leave it out")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = train_gpt.join_ranks(600)
    dtype = "bfloat16" if train_gpt.has_bf16_units(device) else "float32"
    if device.type == "cuda":
        train_gpt.Muon.orthogonalize = staticmethod(torch.compile(train_gpt.orthogonalize, dynamic=False))
    configs = {name: train_gpt.make_config(dict(track=arguments.track, dtype=dtype, **fields))
               for name, fields in OURS.items()}
    model = train_gpt.GPT(configs["Muon"]).to(device)
    matrices = list(model.blocks.parameters())
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in matrices:
            p.normal_(0, 0.02, generator=generator)
            p.grad = torch.randn(p.shape, device=device, generator=generator)
    optimizers = {"torch.optim.Muon": torch.optim.Muon(matrices, lr=1e-4),
                  "torch.optim.AdamW, fused": torch.optim.AdamW(matrices, lr=1e-4, fused=True),
                  **{name: train_gpt.make_optimizers(model, c)[0]["muon"] for name, c in configs.items()}}
    seconds = time_steps(optimizers, device, arguments.rounds)
    if train_gpt.ranks()[0] == 0:
        print(f"{datetime.date.today()}, {train_gpt.describe_hardware(device)}, ours in {dtype}, torch "
              f"{torch.__version__}; median of {arguments.rounds} steps (least to most)\n")
        print("| optimizer of the matrices | seconds a step | / torch.optim.Muon | first step |\n|---|---|---|---|")
        base = statistics.median(seconds["torch.optim.Muon"][1:])
        for name, (first, *steps) in seconds.items():
            median = statistics.median(steps)
            print(f"| {name} | {median:.4g} ({min(steps):.4g} to {max(steps):.4g}) | {median / base:.3f} | "
                  f"{first:.4g} |")
        print("\n| optimizer of the matrices | state of whole training, MiB a rank |\n|---|---|")
        adamw = 8 * sum(p.numel() for p in model.parameters())     # two float32 each
        print(f"| AdamW | {adamw / 2**20:.0f} |")
        for name in OURS:
            size = adamw - 8 * sum(p.numel() for p in matrices) + state_bytes(optimizers[name])
            print(f"| {name} | {size / 2**20:.0f} |")
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)     # as train_gpt.py does, for the reason given there


if __name__ == "__main__":
    main()
