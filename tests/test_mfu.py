"""bench/mfu.py, against the formula by hand."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_compare import log_text

import train_gpt

spec = importlib.util.spec_from_file_location("mfu", ROOT / "bench/mfu.py")
mfu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mfu)

# Of tiny: 3 blocks of 12 x 160 x 160 weights, lm_head of 320 x 160, and attention over 256 tokens of 160 channels.
TINY = 6 * (3 * 12 * 160 * 160 + 320 * 160) + 12 * 3 * 256 * 160


def test_flops_of_tiny_without_look_ups():
    model = train_gpt.GPT(train_gpt.make_config(dict(track="tiny")))
    assert mfu.flops_per_token(model) == TINY == 7_311_360
    model.more = torch.nn.Embedding(1000, 160)
    assert mfu.flops_per_token(model) == TINY
    model.more = torch.nn.Linear(10, 10)
    assert mfu.flops_per_token(model) == TINY + 6 * 100


@pytest.mark.parametrize("hardware, peak", [
    ("8 x NVIDIA A100-SXM4-80GB", 8 * 312e12), ("1 x NVIDIA H100 PCIe", 756e12), ("1 x NVIDIA L4", 121e12),
    ("2 x NVIDIA H100 80GB HBM3", 2 * 989e12), ("1 x 2 threads of AMD EPYC", None)])
def test_a_made_log(tmp_path, hardware, peak):
    """With a field of an older version in its Config."""
    fields = {**vars(train_gpt.make_config(dict(track="tiny"))), "ns_steps": 5}
    text = log_text(hardware=hardware, **fields)
    (tmp_path / "log.txt").write_text(text + "tokens_per_second: 50000000\n")
    out = subprocess.run([sys.executable, ROOT / "bench/mfu.py", tmp_path], capture_output=True, text=True, check=True)
    share = f"{50_000_000 * TINY / peak:.4f}" if peak else f"n/a (no peak is known of {hardware})"
    assert out.stdout == f"mfu: {share}\n"
    (tmp_path / "log.txt").write_text(text.split("\nrun_id: ")[0])
    assert "n/a" in mfu.utilisation(mfu.read_log(tmp_path))
