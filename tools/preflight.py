#!/usr/bin/env python3
"""Before a long run is paid for: 20 real steps on this machine, beside what plan.py projects, and advice.

    ./run.sh small --preflight              # prepares the data, then runs this
    python tools/preflight.py --processes 8 small [--field value ...]     # the data are there

It measures matrix products, memory and the all-reduce of all GPUs, then trains 20 steps of the last stage, of at most
65,536 tokens a process. Most of its time, about two minutes, goes into compilation. Exit status: 1 where a run would
fail.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from plan import BANDWIDTH_FRACTION, GPUS, Gpu, missing, project, tokens_of, trace
from runs import ROOT, LogError, Run, read_log

import train_gpt

STEPS, TOKENS = 20, 65_536      # tokens: most of a step of one process
SLOW = 1.15                     # a measured time over the planned one


@dataclass(frozen=True)
class Machine:
    """What a process measures: FLOP/s of a matrix product in bfloat16, bytes/s of a copy and of an all-reduce."""
    peak: float
    bandwidth: float
    bus: float      # 0: one process
    memory: float   # bytes of a GPU; 0 on a CPU


def timed(device: torch.device, work, seconds: float = 0.5) -> float:
    """Median seconds of `work`, over so many seconds, after two calls that do not count."""
    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    times, end = [once(), once()], time.perf_counter() + seconds
    times.clear()
    while time.perf_counter() < end or len(times) < 3:
        times.append(once())
    return median(times)


def measure() -> None:
    """Under the launcher: prints a Machine as JSON, the slowest of the ranks' figures."""
    device = train_gpt.join_ranks(120)
    size = 1024 if device.type == "cpu" else 8192
    x = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    values = torch.zeros(size * size, device=device)
    copy = torch.empty_like(values)
    figures = dict(peak=2 * size**3 / timed(device, lambda: x @ x),
                   bandwidth=2 * 4 * size * size / timed(device, lambda: copy.copy_(values)), bus=0.0,
                   memory=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0)
    rank, ranks = train_gpt.ranks()
    if ranks > 1:
        def all_reduce() -> None:     # the same number of calls on each rank
            for _ in range(10):
                dist.all_reduce(values)
        for _ in range(2):
            dist.barrier()
            start = time.perf_counter()
            all_reduce()
            if device.type == "cuda":
                torch.cuda.synchronize()
        figures["bus"] = 10 * 4 * size * size * 2 * (ranks - 1) / ranks / (time.perf_counter() - start)
    everyone = train_gpt.gather(figures)
    if rank == 0:
        print(json.dumps({name: min(figures[name] for figures in everyone) for name in figures}), flush=True)
    os._exit(0)


def launch(processes: int, program: str, *arguments: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), program, *arguments]


def as_options(fields: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def find_gpu(name: str, memory: float) -> str:
    """The row of plan.GPUS, or an empty string."""
    if "A100" in name:
        return "A100 40GB" if memory < 60e9 else "A100 80GB"
    return next((row for row in GPUS if row.removeprefix("RTX ") in name), "")


def step_seconds(run: Run) -> float:
    """Mean seconds of the second half of the steps."""
    times = {step: seconds for step, (seconds, _) in run.losses["train"].items()}
    return (times[STEPS] - times[STEPS // 2]) / (STEPS - STEPS // 2)


def advise(run: Run, machine: Machine, gpu: Gpu | None, plan: dict | None, seconds: float) -> list[str]:
    """What is slower or larger than planned, each with what to do about it."""
    found = []
    if machine.memory:
        memory = run.summary["gpu_memory_gib"] * 2**30
        if memory > 0.9 * machine.memory:
            found.append(f"memory: {memory / machine.memory:.0%} of the GPU is taken; halve --micro_batch")
        elif plan and memory > 1.2 * plan["memory"]:
            found.append(f"memory: {memory / plan['memory']:.2f} of the plan; a tweak that keeps more needs a smaller "
                         "--micro_batch where it does not fit")
    if run.summary["late_compilations"]:
        found.append("compilation: shapes change in training; priming must have all of them, see `error:` in the log")
    if gpu is None:
        return found
    kernels = [line for line in run.path.read_text().splitlines() if line.startswith("kernels: ")][-1]
    if "torch SDPA" in kernels:
        found.append("attention: FlashAttention over documents does not work here, so masks are in its place; it needs "
                     "bfloat16 and a torch with CUDA 12 or newer")
    if "torch.compile False" in kernels:
        found.append("compilation is off: leave out --compile off")
    planned = gpu.peak * gpu.fraction
    if machine.peak < planned / SLOW:
        found.append(f"matrix products: {machine.peak / 1e12:.0f} TFLOP/s, planned {planned / 1e12:.0f}; see in "
                     "nvidia-smi whether other programs, a power limit or heat slow the GPU")
    planned = BANDWIDTH_FRACTION * gpu.bandwidth
    if machine.bandwidth < planned / SLOW:
        found.append(f"memory: {machine.bandwidth / 1e9:.0f} GB/s, planned {planned / 1e9:.0f}; see in nvidia-smi "
                     "whether other programs use the GPU, or a part of it is lent (MIG)")
    if machine.bus and machine.bus < gpu.bus / 2:
        found.append(f"interconnect: an all-reduce at {machine.bus / 1e9:.0f} GB/s, planned {gpu.bus / 1e9:.0f}; "
                     "`nvidia-smi topo -m` and NCCL_DEBUG=INFO say which way the data go")
    if plan and seconds > SLOW * plan["seconds"] and not found:
        found.append("the step is slower than its parts: the host may hold the GPU up (few or busy CPU cores), or the "
                     "micro-batch is too small for this GPU: try --micro_batch twice as large")
    return found


def show(run: Run, machine: Machine, gpu: Gpu | None, plan: dict | None, seconds: float) -> None:
    """The table: planned, where there is a plan, beside measured."""
    print(f"{'':28}{'planned':>12}{'measured':>12}")
    for what, planned, found in (
            ("ms a step", plan and 1e3 * plan["seconds"], 1e3 * seconds),
            ("memory, GiB", plan and plan["memory"] / 2**30, run.summary["gpu_memory_gib"]),
            ("matrix products, TFLOP/s", gpu and gpu.peak * gpu.fraction / 1e12, machine.peak / 1e12),
            ("memory, GB/s", gpu and BANDWIDTH_FRACTION * gpu.bandwidth / 1e9, machine.bandwidth / 1e9),
            ("all-reduce, GB/s", gpu and gpu.bus / 1e9, machine.bus / 1e9)):
        print(f"{what:28}{f'{planned:.4g}' if planned else '-':>12}{f'{found:.4g}' if found else '-':>12}")


def main() -> None:
    if sys.argv[1:] == ["--measure"]:
        return measure()
    parser = argparse.ArgumentParser(
        usage="preflight.py [--processes N] TRACK [--field value ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1, help="of this node")
    options, arguments = parser.parse_known_args()
    processes = options.processes
    try:
        c = train_gpt.make_config(train_gpt.parse_command_line(arguments))
    except train_gpt.RunError as error:
        sys.exit(f"preflight.py: {error}")
    rows = min(train_gpt.batch_rows(c, c.num_steps - 1), processes * max(1, TOKENS // c.seq_len))
    window = train_gpt.stage(c, c.num_steps - 1)[1]
    short = dict(num_steps=STEPS, batch_tokens=rows * c.seq_len, stages=f"1:{window}", val_every=0, save_every=0)
    own = dict(val_tokens=min(c.val_tokens, 16 * c.seq_len), log_dir="logs/preflight",
               run_id=f"{c.track}_{time.strftime('%Y%m%d-%H%M%S')}")

    measured = subprocess.run(launch(processes, __file__, "--measure"), stdout=subprocess.PIPE, text=True)
    if measured.returncode:
        sys.exit("preflight.py: the processes do not work together, see above")
    machine = Machine(**json.loads(measured.stdout.strip().splitlines()[-1]))
    gpu = GPUS.get(find_gpu(torch.cuda.get_device_name(0), machine.memory)) if machine.memory else None
    plan, why = None, missing() if gpu else f"tools/plan.py knows {', '.join(GPUS)}"
    if not why:
        shortened = replace(c, dtype="bfloat16", **short)
        plan = project(trace(arguments + as_options(short), shortened, processes, gpu.memory), gpu, shortened,
                       processes)

    fields = as_options(short | own)
    if subprocess.run(launch(processes, str(ROOT / "train_gpt.py"), *arguments, *fields)).returncode:
        sys.exit(f"preflight.py: the {STEPS} steps failed, see above; out of memory: give a smaller --micro_batch")
    try:
        run = read_log(Path(own["log_dir"], own["run_id"]))
    except LogError as error:
        sys.exit(f"preflight.py: {error}")
    seconds = step_seconds(run)
    print(f"\npreflight: {run.hardware}; {STEPS} steps of {short['batch_tokens']:,} tokens"
          + (f"\nno plan: {why}" if why else ""))
    show(run, machine, gpu, plan, seconds)
    tokens = tokens_of(c)
    print(f"projected from these steps: {seconds * tokens / short['batch_tokens'] / 60:.1f} minutes for "
          f"{c.num_steps:,} steps of {tokens / c.num_steps:,.0f} tokens, after {run.summary['compile_seconds']:.0f} s "
          "of compilation")
    for line in advise(run, machine, gpu, plan, seconds) or ["nothing is slower or larger than it should be"]:
        print(f"- {line}")


if __name__ == "__main__":
    main()
