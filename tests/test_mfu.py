"""bench/mfu.py, against the formula by hand."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_runs import log_text

import train_gpt

spec = importlib.util.spec_from_file_location("mfu", ROOT / "bench/mfu.py")
mfu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mfu)



@pytest.mark.upstream
def test_flops_of_tiny_without_look_ups():
    """3 blocks of 12 x 160 x 160 weights, lm_head of 320 x 160, and attention over 256 tokens of 160 channels."""
    model = train_gpt.GPT(train_gpt.make_config(dict(track="tiny")))
    model.more = torch.nn.Embedding(1000, 160)
    assert mfu.flops_per_token(model) == 6 * (3 * 12 * 160 * 160 + 320 * 160) + 12 * 3 * 256 * 160
    model.more = torch.nn.Linear(10, 10)
    assert mfu.flops_per_token(model) == 6 * (3 * 12 * 160 * 160 + 320 * 160 + 100) + 12 * 3 * 256 * 160


def test_made_logs(tmp_path):
    """With a field of an older version in its Config."""
    model = train_gpt.GPT(train_gpt.make_config(dict(track="tiny")))
    fields = {**vars(model.config), "ns_steps": 5}
    for hardware, peak in (("8 x NVIDIA A100-SXM4-80GB", 8 * 312e12), ("1 x NVIDIA H100 PCIe", 756e12),
                           ("1 x NVIDIA L4", 121e12), ("2 x NVIDIA H100 80GB HBM3", 2 * 989e12), ("1 x 2 CPUs", None)):
        text = log_text(hardware=hardware, **fields)
        (tmp_path / "log.txt").write_text(text + "tokens_per_second: 50000000\n")
        expected = f"n/a (no peak is known of {hardware})"
        if peak:
            expected = f"{50_000_000 * mfu.flops_per_token(model) / peak:.4f}"
        assert mfu.utilisation(mfu.read_log(tmp_path)) == expected
        (tmp_path / "log.txt").write_text(text.split("\nrun_id: ")[0])
        assert "n/a" in mfu.utilisation(mfu.read_log(tmp_path))
    out = subprocess.run([sys.executable, ROOT / "bench/mfu.py", tmp_path], capture_output=True, text=True, check=True)
    assert out.stdout == f"mfu: n/a (no peak is known of {hardware})\n"
