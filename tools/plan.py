#!/usr/bin/env python3
"""Projects a run of train_gpt.py on GPUs that need not be there: time, memory, and where a step goes.

    python tools/plan.py small                          # a table: 1 and 8 of each GPU; one to two minutes
    python tools/plan.py small --gpu 3090 --num_steps 2000     # one GPU; any options of train_gpt.py
    python tools/plan.py small --png plan.png           # and a picture of where a step on 8 of each goes
    python tools/plan.py small --calibrate              # the fractions in GPUS, from published steps, and the errors

The step is compiled for, and run on, a GPU that is not there (tests/fake_gpu), which counts the operations and bytes of
each kernel. A kernel takes the longer of its operations at a fraction of the GPU's peak and its bytes at 85% of its
bandwidth. The gradients' all-reduce hides behind the backward of the last micro-batch, Muon's does not. All figures are
projected. Linux x86-64 with g++; no GPU is needed.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from matplotlib.figure import Figure
from runs import ROOT

import train_gpt

sys.path.append(str(ROOT / "tests"))
from fake_gpu.device import missing  # noqa: E402

PARTS = ("matrices of the blocks", "lm_head", "attention", "between matrices", "loss", "Newton-Schulz",
         "optimizers and the rest", "all-reduce that nothing hides")
BANDWIDTH_FRACTION, SHORTEST = 0.85, 4e-6       # of a GPU's bandwidth; seconds of the shortest kernel


@dataclass(frozen=True)
class Gpu:
    """Peak without sparsity, bandwidth and memory are of the makers' data sheets; the bus is assumed, as NCCL reports
    such figures (all-reduce on 8 GPUs: NVLink, or PCIe 4.0 for the RTX cards)."""
    peak: float         # FLOP/s in bfloat16 with float32 sums
    bandwidth: float    # bytes/s
    memory: float       # bytes
    bus: float          # bytes/s of an all-reduce
    fraction: float     # of the peak that matrix products and attention reach, by --calibrate; RTX: the A100's


GPUS = {
    "A100 40GB": Gpu(312e12, 1555e9, 40e9, 230e9, 0.604),
    "A100 80GB": Gpu(312e12, 2039e9, 80e9, 230e9, 0.604),
    "H100": Gpu(989e12, 3350e9, 80e9, 360e9, 0.529),
    "RTX 4090": Gpu(165e12, 1008e9, 24e9, 12e9, 0.604),
    "RTX 3090": Gpu(71e12, 936e9, 24e9, 12e9, 0.604)}
# Seconds of a step of 524,288 tokens on 8 GPUs of this model's shapes, as published by modded-nanogpt: records 8 to 11
# of track 1, and a run on 8xA100-SXM4-80GB of its track 3 (2026-05-22).
FITTED = {"H100": ("record 8", 0.1419), "A100 80GB": ("track 3, 8xA100", 0.348)}
CHECKED = {"record 9": 0.1548, "record 10": 0.1447, "record 11": 0.1450}


def trace(arguments: list[str], c: train_gpt.Config, ranks: int) -> dict:
    """What one step of rank 0 of `ranks` does: the report of tests/fake_gpu/run.py."""
    if missing():
        sys.exit(f"plan.py: {missing()}")
    options = dict(num_steps=1, prime_steps=1, val_every=0, save_every=0, val_tokens=c.seq_len)
    command = [sys.executable, ROOT / "tests/fake_gpu/run.py", "--ranks", str(ranks), *arguments]
    result = subprocess.run([*command, *(f"--{name}={value}" for name, value in options.items())],
                            capture_output=True, text=True)
    report = json.loads(result.stdout.strip().rpartition("\n")[2]) if result.returncode in (0, 1) else {}
    if report.get("status") != 0:
        sys.exit(f"plan.py: the step does not run on the fake GPU: {report.get('status', '')}\n{result.stderr[-2000:]}")
    return report


def operations_of(kernel: str, operations: int) -> float:
    return operations / 2 if "attention" in kernel else operations     # causal: half of the pairs


def part_of(kernel: str, vocab_size: int) -> str:
    name, *shapes = kernel.split()
    if "attention" in name:
        return "attention"
    if name.startswith("aten.mm"):
        return "lm_head" if str(vocab_size) in "x".join(shapes).split("x") else "matrices of the blocks"
    if name.startswith(("aten.bmm", "aten.baddbmm")):
        return "Newton-Schulz"
    if name.startswith("triton"):
        return "loss" if "log_softmax" in name or "tanh" in name else "between matrices"
    return "optimizers and the rest"


def step_seconds(report: dict, gpu: Gpu, c: train_gpt.Config, ranks: int) -> dict[str, float]:
    """{part: seconds} of a step."""
    parts = dict.fromkeys(PARTS, 0.0)
    for kernel, (calls, operations, size) in report["work"].items():
        compute = operations_of(kernel, operations) / (gpu.peak * gpu.fraction)
        seconds = max(compute, size / (gpu.bandwidth * BANDWIDTH_FRACTION), calls * SHORTEST)
        parts[part_of(kernel, c.padded_vocab_size)] += seconds
    ring = 2 * (ranks - 1) / ranks / gpu.bus
    gradients, updates = [sum(size for kind, (_, size) in report["collectives"].items() if dtype in kind) * ring
                          for dtype in ("float32", "bfloat16")]
    backward = sum(parts[part] for part in PARTS[:5])
    hidden = 2 / 3 * backward * rows_at_once(c, gpu, ranks) / rows_of(c, ranks)
    return parts | {"all-reduce that nothing hides": max(0, gradients - hidden) + updates}


def rows_of(c: train_gpt.Config, ranks: int) -> int:
    return train_gpt.batch_rows(c, 0) // ranks


def rows_at_once(c: train_gpt.Config, gpu: Gpu, ranks: int) -> int:
    return train_gpt.micro_batch_rows(c, rows_of(c, ranks), gpu.memory, compiled=True)


def project(report: dict, gpu: Gpu, c: train_gpt.Config, ranks: int) -> dict:
    """All figures of one row: seconds of a step and its parts, tokens/s, fraction of the peak, memory in bytes."""
    parts = step_seconds(report, gpu, c, ranks)
    seconds, rows = sum(parts.values()), rows_at_once(c, gpu, ranks)
    operations = sum(operations_of(kernel, work[1]) for kernel, work in report["work"].items())
    return dict(parts=parts, seconds=seconds, rows=rows, memory=train_gpt.planned_bytes(c, rows, compiled=True),
                tokens=c.batch_tokens / seconds, mfu=operations / seconds / gpu.peak)


def fit(seconds: float, report: dict, gpu: Gpu, *rest) -> float:
    """The fraction of the peak with which the step takes so long."""
    low, high = 0.05, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        slow = sum(step_seconds(report, replace(gpu, fraction=middle), *rest).values()) > seconds
        low, high = (middle, high) if slow else (low, middle)
    return low


def calibrate(report: dict, c: train_gpt.Config) -> None:
    fractions = {name: fit(seconds, report, GPUS[name], c, 8) for name, (_, seconds) in FITTED.items()}
    print("GPUs            fitted on                    ms   fraction of the peak")
    for name, (run, seconds) in FITTED.items():
        print(f"8 x {name:12}{run:26}{1e3 * seconds:6.1f}   {fractions[name]:.3f}")
    print("\nnot fitted                  fraction of     published    projected   error")
    checks = [(run, seconds, "H100", "H100") for run, seconds in CHECKED.items()]
    checks += [(FITTED["A100 80GB"][0], FITTED["A100 80GB"][1], "A100 80GB", "H100"),
               (FITTED["H100"][0], FITTED["H100"][1], "H100", "A100 80GB")]
    for run, published, name, other in checks:
        gpu = replace(GPUS[name], fraction=fractions[other])
        seconds = sum(step_seconds(report, gpu, c, 8).values())
        print(f"{run + ', 8 x ' + name.split()[0]:28}{other:12}{1e3 * published:10.1f} ms{1e3 * seconds:10.1f} ms"
              f"{100 * (seconds / published - 1):+8.1f}%")


def draw(rows: dict[str, dict], path: str) -> None:
    figure = Figure((9, 0.6 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    for i, row in enumerate(rows.values()):
        left, text = 0, f"{1e3 * row['seconds']:.0f} ms"
        for j, (part, seconds) in enumerate(row["parts"].items()):
            share = 100 * seconds / row["seconds"]
            axes.barh(i, share, left=left, color=f"C{j}", label=part if i == 0 else None)
            left += share
        axes.text(101, i, text, va="center")
    axes.set(yticks=range(len(rows)), yticklabels=rows, xlim=(0, 112), xlabel="% of a step (projected)")
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="plan.py TRACK [--gpu NAME] [--png FILE] [--calibrate] [--field value ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--gpu", help=f"only these; one of, or part of, {', '.join(GPUS)}", default="")
    parser.add_argument("--png", help="a picture of a step on 8 of each GPU")
    parser.add_argument("--calibrate", action="store_true", help="fits the fractions, and lists the errors")
    options, arguments = parser.parse_known_args()
    try:
        c = replace(train_gpt.make_config(train_gpt.parse_command_line(arguments)), dtype="bfloat16")
    except train_gpt.RunError as error:
        sys.exit(f"plan.py: {error}")
    chosen = {name: gpu for name, gpu in GPUS.items() if options.gpu.lower() in name.lower()}
    if not chosen:
        sys.exit(f"plan.py: --gpu {options.gpu}: give one of {', '.join(GPUS)}")
    counts = [8] if options.calibrate else [n for n in (1, 8) if train_gpt.batch_rows(c, 0) % n == 0]
    with ThreadPoolExecutor(2) as pool:
        reports = dict(zip(counts, pool.map(lambda ranks: trace(arguments, c, ranks), counts), strict=True))
    if options.calibrate:
        return calibrate(reports[8], c)

    rows = {(n, name): project(reports[n], gpu, c, n) for name, gpu in chosen.items() for n in counts}
    one = reports[counts[0]]
    operations = sum(operations_of(kernel, work[1]) for kernel, work in one["work"].items())
    print(f"{c.track}, {c.num_steps:,} steps of {c.batch_tokens:,} tokens; all figures are projected")
    print(f"{1e-6 * operations * counts[0] / c.batch_tokens:,.0f} million operations a token; "
          f"{1e-6 * sum(size for _, size in reports[counts[-1]]['collectives'].values()):,.0f} MB reduced a step")
    print("\nGPUs            rows at once   memory, GiB   ms a step     tokens/s    MFU    to the end")
    for (n, name), row in rows.items():
        minutes = row["seconds"] * c.num_steps / 60
        end = f"{minutes:9.1f} min" if minutes < 120 else f"{minutes / 60:9.1f} h"
        print(f"{n} x {name:12}{row['rows']:8}{row['memory'] / 2**30:16.1f}{1e3 * row['seconds']:13.1f}"
              f"{row['tokens']:13,.0f}{100 * row['mfu']:6.0f}%{end}")
    if options.png:
        draw({f"{n} x {name}": row for (n, name), row in rows.items() if n == counts[-1]}, options.png)


if __name__ == "__main__":
    main()
