"""bench/loader.py, bench/optimizers.py, bench/step.py and bench/sample.py, on little."""

import dataclasses
import re
import subprocess
import sys

import pytest
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
    for name, size in (("AdamW", 8 * (matrices + rest)), ("Muon", 4 * matrices + 8 * rest)):
        assert found[name] == round(size / 2**20)


def test_the_parts_of_a_step(text):
    """Each optimizer of the run is a part, and the shares are of the sum; operations come slowest first."""
    given = train_gpt.parse_command_line(["tiny", *SMALL])
    c = train_gpt.make_config(given)
    optimizers = train_gpt.make_optimizers(train_gpt.GPT(c), dataclasses.replace(c, dtype="float32"))[0]
    out = printed("step.py", "--steps", 3, "--operations", 4, "tiny", *SMALL, *text)
    parts = re.findall(r"^\| ([\w ]+) \| (\d+\.\d+) \| (?:(\d+)%)? ?\|$", out, re.M)
    times = {name: float(ms) for name, ms, _ in parts}
    assert {"loader", "forward and backward", *optimizers} == times.keys() - {"all"}
    assert 2 * times["all"] == pytest.approx(sum(times.values()), abs=0.1)
    for name, ms, share in parts[:-1]:
        assert float(share) == pytest.approx(100 * float(ms) / times["all"], abs=1.5), name
    operations = [float(ms) for ms in re.findall(r"^\| aten::\w+ \| \d+ \| (\S+) \| \d+% \|$", out, re.M)]
    assert len(operations) == 4 and operations == sorted(operations, reverse=True)


def test_a_step_beside_that_of_another_file(text, tmp_path):
    """A file that waits 50 ms in each step is found out; one without the functions is named."""
    slower, empty = tmp_path / "slower.py", tmp_path / "empty.py"
    empty.touch()
    slower.write_text((ROOT / "train_gpt.py").read_text().replace(
        "\ndef train_step(run, tokens):\n", "\ndef train_step(run, tokens):\n    time.sleep(0.05)\n"))
    out = printed("step.py", "--steps", 30, "tiny", *SMALL, *text, "--against", slower)
    a, b = (float(ms) for ms in re.findall(r"^\| [AB]: \S+ \| (\S+) \|$", out, re.M))
    found = re.search(r"time / A's: (\S+) \(95% confidence interval (\S+) to (\S+), p = (\S+)\)", out).groups()
    ratio, low, high, p = map(float, found)
    assert a - b > 20 and low < ratio < high < 1 and p < 0.05
    assert ratio == pytest.approx(b / a, rel=0.3)
    done = subprocess.run([sys.executable, ROOT / "bench/step.py", "--against", empty], stderr=subprocess.PIPE,
                          text=True, env=environment())
    assert done.returncode == 1 and done.stderr.startswith(f"step.py: {empty}: has no parse_command_line, ")


@pytest.mark.slow
def test_a_token_with_the_cache_and_without():
    out = printed("sample.py", "--track", "tiny", "--tokens", 64)
    rows = re.findall(r"^\| (?:all )?(\d+).* \| (\S+) \| (\S+) \| (\S+) \|$", out, re.M)
    assert [int(length) for length, *_ in rows] == [2, 17, 33, 48, 64, 64]
