#!/usr/bin/env python3
"""Times a token of text with and without the key-value cache, and sums up a whole text.

    python bench/sample.py                          # 1,024 tokens of small, random weights, float32, one thread
    python bench/sample.py --track tiny --tokens 64

Measured are a few lengths of the text, on the CPU, in seconds that the process ran, so that others on the machine do
not count. The sum over all lengths is integrated between them, by straight lines.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import sample  # noqa: E402

import train_gpt  # noqa: E402

PARTS, ROUNDS = 4, 3


def seconds_of_a_token(model, length: int, cached: bool) -> float:
    """Median seconds of the last token of a text of `length` tokens, by the model's hidden and logits."""
    c, times = model.config, []
    tokens = torch.randint(c.vocab_size - 1, (1, length), generator=torch.Generator().manual_seed(length))
    known = torch.ones(1, length - 1, c.num_heads, c.head_dim)
    for _ in range(ROUNDS):
        past = [[known, known] for _ in model.blocks] if cached else None
        start = time.process_time()
        model.logits(model.hidden(tokens, sample.context(c), past)[:, -1:]).argmax()
        times.append(time.process_time() - start)
    return median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", choices=train_gpt.TRACKS, default="small")
    parser.add_argument("--tokens", type=int, default=1024, help="of the whole text [1024]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    c = train_gpt.make_config(dict(track=args.track, dtype="float32"))
    model = train_gpt.GPT(c).initialize().eval()
    lengths = np.linspace(2, args.tokens, PARTS + 1).astype(int).tolist()
    seconds = {cached: [seconds_of_a_token(model, length, cached) for length in lengths] for cached in (True, False)}
    print(f"{args.track}, float32: {train_gpt.describe_hardware(torch.device('cpu'))}, torch {torch.__version__}; "
          f"medians of {ROUNDS}\n\n| tokens so far | ms a token, with the cache | without | ratio |\n|---|---|---|---|")
    for length, cached, whole in zip(lengths, seconds[True], seconds[False], strict=True):
        print(f"| {length} | {1e3 * cached:.1f} | {1e3 * whole:.1f} | {whole / cached:.1f} |")
    total = {cached: np.trapezoid(seconds[cached], lengths) for cached in seconds}
    print(f"| all {args.tokens}, s | {total[True]:.1f} | {total[False]:.1f} | {total[False] / total[True]:.1f} |")


if __name__ == "__main__":
    main()
