"""GPT-2's BPE by its definition, and ranks for it: GPT-2's own where they are stored, or else a small made-up file."""

import base64
import itertools
import os
from pathlib import Path

import regex

# GPT-2's split, as its authors published it: \s is Unicode's White_Space, which Python sees otherwise.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+".replace(
    r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or Path(__file__).parents[2] / "shared/tiktoken")
GPT2_RANKS = CACHE / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"     # as tiktoken names r50k_base there


def write_small_ranks(path: Path) -> Path:
    tokens = [bytes([i]) for i in range(255, -1, -1)]
    tokens += [b"th", b"the", b" the", b"in", b"\xc3\xa9", b"\xf0\x9f", b"\xf0\x9f\x99", b"\xf0\x9f\x99\x82", b"\n\n"]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


def read_ranks(path: Path) -> dict[bytes, int]:
    return {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}


def plain_bpe(text: str, ranks: dict[bytes, int]) -> list[int]:
    """In each piece of the split, the adjacent pair of the lowest rank is merged until no pair has one."""
    ids = []
    for piece in regex.findall(SPLIT, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while found := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
            at = min(found)[1]
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids
