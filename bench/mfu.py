#!/usr/bin/env python3
"""Says which share of the GPUs' peak a run has used: its model FLOP utilisation (MFU), from its log.

    python bench/mfu.py logs/RUN      # a run folder or a log; prints a share, or n/a with the reason

A token takes 6 FLOP for each weight of an nn.Linear (embeddings are look-ups and do not count), forward and backward,
and 12 num_layers seq_len model_dim for attention (PaLM, arXiv:2204.02311, appendix B). The model is this repository's
train_gpt.py's with the log's Config, as far as this version knows its fields. The peak is of dense bfloat16.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "tools")]
from runs import LogError, Run, read_log  # noqa: E402

import train_gpt  # noqa: E402

# FLOP a second of one GPU, by a part of its name; the first that fits counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
              "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def flops_per_token(model: torch.nn.Module) -> int:
    c, linears = model.config, (part for part in model.modules() if isinstance(part, torch.nn.Linear))
    return 6 * sum(part.weight.numel() for part in linears) + 12 * c.num_layers * c.seq_len * c.model_dim


def utilisation(run: Run) -> str:
    count, _, name = (run.hardware or "").partition(" x ")
    peak = next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)
    if not peak:
        return f"n/a (no peak is known of {run.hardware})"
    if run.config.get("dtype") == "float32":
        return "n/a (the peaks are of bfloat16, the run was in float32)"
    if "tokens_per_second" not in run.summary:
        return "n/a (the run has not finished)"
    known = train_gpt.Config.__dataclass_fields__.keys() & run.config.keys()
    with torch.device("meta"):     # shapes alone
        model = train_gpt.GPT(train_gpt.Config(**{field: run.config[field] for field in known}))
    return f"{run.summary['tokens_per_second'] * flops_per_token(model) / (int(count) * peak):.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="log or run folder")
    try:
        print(f"mfu: {utilisation(read_log(parser.parse_args().log))}")
    except LogError as error:
        sys.exit(f"mfu.py: {error}")


if __name__ == "__main__":
    main()
