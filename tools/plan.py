#!/usr/bin/env python3
"""Projects a run of train_gpt.py on GPUs that need not be there: time, memory, and where a step goes.

    python tools/plan.py small                          # a table: 1 and 8 of each GPU; five minutes
    python tools/plan.py small --gpu 3090 --num_steps 2000     # one GPU; any options of train_gpt.py
    python tools/plan.py small --png plan.png           # and a picture of where a step on 8 of each goes
    python tools/plan.py small --calibrate              # the fractions in GPUS, from published steps, and the errors

A step of each stage is compiled for, and run on, a GPU that is not there (tests/fake_gpu), which counts the operations
and bytes of each kernel. A kernel takes the longer of its operations at a fraction of the GPU's peak and its bytes at
85% of its bandwidth. Attention counts as if each document had the longest's length. Of the collectives, only the
all-reduce of the gradients of the blocks and of lm_head hides behind the backward of the last micro-batch: those of the
embedding and of the value tables are whole at its end. All figures are projected. Linux x86-64 with g++; no GPU is
needed.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from runs import ROOT

import train_gpt

sys.path.append(str(ROOT / "tests"))
from fake_gpu.device import missing  # noqa: E402

FORWARD_AND_BACKWARD = ("matrices of the blocks", "lm_head", "attention", "between matrices", "loss",
                        "embeddings and sums of gradients")
PARTS = (*FORWARD_AND_BACKWARD, "Newton-Schulz", "Muon and AdamW", "n-gram tables", "collectives that nothing hides")
BANDWIDTH_FRACTION, SHORTEST = 0.85, 4e-6       # of a GPU's bandwidth; seconds of the shortest kernel


@dataclass(frozen=True)
class Gpu:
    """Memory, peak without sparsity and bandwidth are of the makers' data sheets; the bus is assumed, as NCCL reports
    such figures (all-reduce on 8 GPUs: NVLink, or PCIe 4.0 for the RTX cards)."""
    memory: int         # 10^9 bytes
    peak: float         # FLOP/s in bfloat16 with float32 sums
    bandwidth: float    # bytes/s
    bus: float          # bytes/s of an all-reduce
    fraction: float     # of the peak that matrix products and attention reach, by --calibrate; RTX: the A100's


GPUS = {
    "A100 40GB": Gpu(40, 312e12, 1555e9, 230e9, 0.603),
    "A100 80GB": Gpu(80, 312e12, 2039e9, 230e9, 0.603),
    "H100": Gpu(80, 989e12, 3350e9, 360e9, 0.527),
    "RTX 4090": Gpu(24, 165e12, 1008e9, 12e9, 0.603),
    "RTX 3090": Gpu(24, 71e12, 936e9, 12e9, 0.603)}
# Seconds of a step of 524,288 tokens on 8 GPUs of this model's shapes, as published by modded-nanogpt: records 8 to 11
# of track 1, and a run on 8xA100-SXM4-80GB of its track 3 (2026-05-22).
FITTED = {"H100": ("record 8", 0.1419), "A100 80GB": ("track 3, 8xA100", 0.348)}
CHECKED = {"record 9": 0.1548, "record 10": 0.1447, "record 11": 0.1450}
# Those runs' recipe, as options: rows of running text, all of which a token sees, and none of today's parts.
PUBLISHED = """--seq_len 1024 --document_tokens 0 --windows L --stages 1:0 --val_window 0 --batch_tokens 524288
    --mixing off --value_tables 0 --ngram_rows 0 --normuon_beta2 0 --micro_batch 64""".split()


def stages_of(c: train_gpt.Config) -> Counter:
    """{(factor, window): steps}."""
    return Counter(train_gpt.stage(c, step) for step in range(c.num_steps))


def trace(arguments: list[str], c: train_gpt.Config, ranks: int, memory: int) -> dict[tuple, dict]:
    """What the second step of each stage does on rank 0 of `ranks`, by tests/fake_gpu/run.py: {stage: record}."""
    if missing():
        sys.exit(f"plan.py: {missing()}")
    short = dict(num_steps=2 * len(c.stages.split()), val_tokens=c.seq_len, val_every=0)
    options = short | dict(prime_steps=1, save_every=0)
    command = [sys.executable, ROOT / "tests/fake_gpu/run.py", f"--ranks={ranks}", f"--memory={memory}", *arguments]
    result = subprocess.run([*command, *(f"--{name}={value}" for name, value in options.items())],
                            capture_output=True, text=True)
    report = json.loads(result.stdout.strip().rpartition("\n")[2]) if result.returncode in (0, 1) else {}
    if report.get("status") != 0:
        sys.exit(f"plan.py: the step does not run on the fake GPU: {report.get('status', '')}\n{result.stderr[-2000:]}")
    return {train_gpt.stage(replace(c, **short), i): record for i, record in enumerate(report["steps"])}


def part_of(kernel: str, vocab_size: int) -> str:
    optimizer, _, kernel = kernel.rpartition(": ")
    name, *shapes = kernel.split()
    product = name.startswith(("aten.bmm", "aten.baddbmm"))
    if optimizer:
        others = "n-gram tables" if optimizer == "RowAdam" else "Muon and AdamW"
        return "Newton-Schulz" if product or name.startswith("triton") else others
    if "attention" in name or "_attn" in name and not name.startswith("triton"):
        return "attention"
    if name.startswith("aten.mm"):
        return "lm_head" if str(vocab_size) in "x".join(shapes).split("x") else "matrices of the blocks"
    if name.startswith("triton"):
        return "loss" if any(word in name for word in ("softmax", "nll", "tanh")) else "between matrices"
    return "embeddings and sums of gradients"


def rows_at_once(c: train_gpt.Config, ranks: int, memory: int) -> tuple:
    """Of each stage, on a GPU of so many 10^9 bytes."""
    with patch.object(torch.cuda, "mem_get_info", lambda device: (0, 1e9 * memory)):
        return tuple(train_gpt.micro_batch_rows(c, factor * c.batch_tokens // c.seq_len // ranks, torch.device("cuda"))
                     for factor, _ in stages_of(c))


def planned_bytes(c: train_gpt.Config, rows: int) -> float:
    """A GPU's memory in compiled training with so many rows at once, fitted to what the GPU that is not there needs."""
    matrices = 12 * c.num_layers * c.model_dim ** 2
    embeddings = (2 + c.value_tables) * c.padded_vocab_size * c.model_dim
    values = 18.5 * c.num_layers * c.model_dim + 1.2 * c.padded_vocab_size     # that a token keeps
    size = getattr(torch, c.dtype).itemsize * values * rows * c.seq_len
    # Of the n-grams: weights, squares and sums, each token's sum and gradient, and RowAdam's step.
    tokens = c.seq_len * max(train_gpt.batch_rows(c, step) for step in range(c.num_steps))
    channels, grams = bool(c.ngram_rows) * (c.ngram_dim or c.model_dim), c.ngram_max - 1
    kept = channels * (12 * grams * c.ngram_rows + 8 * tokens)
    return max(size, 20 * channels * grams * tokens) + kept + 16 * (matrices + embeddings)


def step_seconds(stage: tuple, record: dict, gpu: Gpu, c: train_gpt.Config, ranks: int) -> dict[str, float]:
    """{part: seconds} of a step of this stage."""
    parts = dict.fromkeys(PARTS, 0.0)
    for kernel, (calls, operations, size) in record["work"].items():
        compute = operations / (gpu.peak * gpu.fraction)
        seconds = max(compute, size / (gpu.bandwidth * BANDWIDTH_FRACTION), calls * SHORTEST)
        parts[part_of(kernel, c.padded_vocab_size)] += seconds

    def moved(*words: str) -> float:     # seconds of those whose names have all of the words
        return (ranks - 1) / ranks / gpu.bus * sum(
            size * (2 if "allreduce" in kind else 1) for kind, (_, size) in record["collectives"].items()
            if all(word in kind for word in words))
    gradients = moved("allreduce")
    tables = (1 + c.value_tables) * c.padded_vocab_size * c.model_dim     # whole when the backward ends
    tables *= getattr(torch, c.reduce_dtype).itemsize
    late = min(gradients, 2 * tables * (ranks - 1) / ranks / gpu.bus)
    rows = dict(zip(stages_of(c), rows_at_once(c, ranks, gpu.memory), strict=True))[stage]
    micro_batches = stage[0] * c.batch_tokens / c.seq_len / ranks / rows
    hidden = 2 / 3 * sum(parts[part] for part in FORWARD_AND_BACKWARD) / micro_batches
    return parts | {PARTS[-1]: max(0, gradients - late - hidden) + late + moved() - gradients}


def project(records: dict, gpu: Gpu, c: train_gpt.Config, ranks: int) -> dict:
    """All figures of one row: seconds of the run, of a step of each stage, and of a mean step and its parts; tokens/s,
    fraction of the peak, memory in bytes."""
    steps, parts, stages = stages_of(c), dict.fromkeys(PARTS, 0.0), []
    for stage, count in steps.items():
        of_stage = step_seconds(stage, records[stage], gpu, c, ranks)
        stages.append(sum(of_stage.values()))
        for part, seconds in of_stage.items():
            parts[part] += count / c.num_steps * seconds
    rows, seconds = rows_at_once(c, ranks, gpu.memory), sum(parts.values())
    whole = seconds * c.num_steps
    operations = sum(count * operations_of(records[stage]) for stage, count in steps.items())
    return dict(parts=parts, seconds=seconds, stages=stages, whole=whole, rows=rows, tokens=tokens_of(c) / whole,
                memory=planned_bytes(c, max(rows)), mfu=operations / whole / gpu.peak)


def operations_of(record: dict) -> float:
    return sum(operations for _, operations, _ in record["work"].values())


def tokens_of(c: train_gpt.Config) -> int:
    """Of the whole run."""
    return c.batch_tokens * sum(factor * count for (factor, _), count in stages_of(c).items())


def fit(seconds: float, records: dict, gpu: Gpu, *rest) -> float:
    """The fraction of the peak with which a mean step takes so long."""
    low, high = 0.05, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        slow = project(records, replace(gpu, fraction=middle), *rest)["seconds"] > seconds
        low, high = (middle, high) if slow else (low, middle)
    return low


def calibrate(records: dict, c: train_gpt.Config) -> None:
    fractions = {name: fit(seconds, records, GPUS[name], c, 8) for name, (_, seconds) in FITTED.items()}
    print("GPUs            fitted on                    ms   fraction of the peak")
    for name, (run, seconds) in FITTED.items():
        print(f"8 x {name:12}{run:26}{1e3 * seconds:6.1f}   {fractions[name]:.3f}")
    print("\nnot fitted                  fraction of     published    projected   error")
    checks = [(run, seconds, "H100", "H100") for run, seconds in CHECKED.items()]
    checks += [(FITTED["A100 80GB"][0], FITTED["A100 80GB"][1], "A100 80GB", "H100"),
               (FITTED["H100"][0], FITTED["H100"][1], "H100", "A100 80GB")]
    for run, published, name, other in checks:
        gpu = replace(GPUS[name], fraction=fractions[other])
        seconds = project(records, gpu, c, 8)["seconds"]
        print(f"{run + ', 8 x ' + name.split()[0]:28}{other:12}{1e3 * published:10.1f} ms{1e3 * seconds:10.1f} ms"
              f"{100 * (seconds / published - 1):+8.1f}%")


def show(rows: dict[tuple, dict], traces: dict[tuple, dict], c: train_gpt.Config) -> None:
    print(f"{c.track}, {c.num_steps:,} steps of {tokens_of(c) / c.num_steps:,.0f} tokens on average; all figures are "
          "projected")
    kind = max(traces)
    most, records = kind[0], traces[kind]
    for stage, count in stages_of(c).items():
        reduced = sum(size for _, size in records[stage]["collectives"].values())
        operations = most * operations_of(records[stage]) / stage[0] / c.batch_tokens
        print(f"  {count:,} steps of {stage[0] * c.batch_tokens:,} tokens, window {stage[1] or 'all'}: "
              f"{1e-6 * operations:,.0f} million operations a token, {1e-6 * reduced:,.0f} MB in collectives a step")
    print("\nGPUs            rows at once   memory, GiB   ms a step: stages, mean         tokens/s    MFU   to the end")
    for (n, name), row in rows.items():
        minutes = row["whole"] / 60
        end = f"{minutes:9.1f} min" if minutes < 120 else f"{minutes / 60:9.1f} h"
        stages = "/".join(f"{1e3 * seconds:.0f}" for seconds in row["stages"])
        at_once = "/".join(map(str, row["rows"]))
        print(f"{n} x {name:12}{at_once:>10}{row['memory'] / 2**30:14.1f}{stages:>22}{1e3 * row['seconds']:10.1f}"
              f"{row['tokens']:17,.0f}{100 * row['mfu']:6.0f}%{end}")
    columns = [key for key in rows if key[0] == most]
    print("\nms of a mean step" + " " * 18 + "".join(f"{f'{n} x {name}':>15}" for n, name in columns))
    for part in PARTS:
        print(f"{part:35}" + "".join(f"{1e3 * rows[key]['parts'][part]:15.2f}" for key in columns))


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
    if options.calibrate:
        arguments += PUBLISHED
    try:
        c = replace(train_gpt.make_config(train_gpt.parse_command_line(arguments)), dtype="bfloat16")
    except train_gpt.RunError as error:
        sys.exit(f"plan.py: {error}")
    chosen = {name: gpu for name, gpu in GPUS.items() if options.gpu.lower() in name.lower()}
    if not chosen:
        sys.exit(f"plan.py: --gpu {options.gpu}: give one of {', '.join(GPUS)}")
    counts = [8] if options.calibrate else [n for n in (1, 8) if train_gpt.batch_rows(c, 0) % n == 0]
    # A trace for each number of GPUs and of rows at once.
    kinds = {(n, rows_at_once(c, n, gpu.memory)): (n, gpu.memory) for gpu in chosen.values() for n in counts}
    with ThreadPoolExecutor(2) as pool:
        records = pool.map(lambda kind: trace(arguments, c, *kind), kinds.values())
        traces = dict(zip(kinds, records, strict=True))
    if options.calibrate:
        return calibrate(*traces.values(), c)

    rows = {(n, name): project(traces[n, rows_at_once(c, n, gpu.memory)], gpu, c, n)
            for name, gpu in chosen.items() for n in counts}
    show(rows, traces, c)
    if options.png:
        draw({f"{n} x {name}": row for (n, name), row in rows.items() if n == counts[-1]}, options.png)


if __name__ == "__main__":
    main()
