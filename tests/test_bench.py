"""bench/loader.py and bench/optimizers.py, on little."""

import re
import subprocess
import sys

from conftest import ROOT, SMALL, environment

import train_gpt


def printed(script: str, *arguments) -> str:
    return subprocess.run([sys.executable, ROOT / "bench" / script, *map(str, arguments)], check=True, timeout=100,
                          stdout=subprocess.PIPE, text=True, env=environment()).stdout


def test_the_loader(text):
    out = printed("loader.py", "--tokens", 1_100_000, "tiny", *SMALL, *text)
    waited, seconds, share = re.search(r"^waiting for data in .*: (\S+) of (\S+) s, (\S+)%$", out, re.M).groups()
    assert float(share) < 100 and abs(float(waited) / float(seconds) - float(share) / 100) < 0.01
    rows = re.findall(r"^(tiny|small), .*? (\d+) +(\d+) +(\S+)$", out, re.M)
    assert [name for name, *_ in rows] == ["tiny", "small", "small"]
    assert all(abs(int(loader) / int(plain) - float(ratio)) < 0.1 for _, loader, plain, ratio in rows)


def test_the_optimizers_memory_is_that_of_the_shapes():
    """On tiny's matrices: two float32 of AdamW or one of Muon each."""
    out = printed("optimizers.py", "--track", "tiny", "--rounds", 1)
    assert re.search(r"^\| torch.optim.Muon \| \S+ .*\| 1.000 \|", out, re.M)
    model = train_gpt.GPT(train_gpt.make_config(dict(track="tiny")))
    matrices = sum(p.numel() for p in model.blocks.parameters())
    rest = sum(p.numel() for p in model.parameters()) - matrices
    found = {name: int(size) for name, size in re.findall(r"^\| (.*) \| (\d+) \|$", out, re.M)}
    for name, size in (("AdamW", 8 * (matrices + rest)), ("Muon", 4 * matrices + 8 * rest),
                       ("Muon, bf16 momentum", 2 * matrices + 8 * rest)):
        assert found[name] == round(size / 2**20)
