"""tools/plan.py by hand-made reports, and tools/preflight.py by real steps on a CPU and by made-up machines."""

import re
import subprocess
import sys
from dataclasses import replace

import plan
import preflight
import pytest
from conftest import ROOT, SMALL, environment
from runs import parse_log
from test_runs import log_text

import train_gpt

GPU = plan.Gpu(peak=100e12, bandwidth=1e12, memory=80e9, bus=100e9, fraction=0.5)
SMALL_TRACK = train_gpt.make_config(dict(track="small", dtype="bfloat16"))
REPORT = dict(
    work={"aten.mm.default 1000x768 768x768": [10, 5e12, 1e9],      # 0.1 s by its operations
          "aten.mm.out 1000x768 50304x768": [1, 5e12, 1e9],
          "aten._scaled_dot_product_flash_attention.default 1x1x8x8 1x1x8x8": [2, 2e12, 1e9],      # 0.02: causal
          "triton_red_fused_log_softmax_3": [1, 0, 85e9],           # 0.1 s by its bytes
          "triton_poi_fused_add_1": [1, 0, 8.5e9],
          "aten.baddbmm.out 2x768x768 2x768x768": [1, 1e12, 1e6],
          "aten.add_.Tensor": [100, 0, 8]},                         # 0.4 ms by its calls
    collectives={"c10d::allreduce_ float32": [14, 20e9], "c10d::allreduce_ bfloat16": [4, 1e9]})


@pytest.mark.upstream
def test_a_step_by_hand():
    """Each kernel by its operations, bytes or calls; the gradients' all-reduce beyond two thirds of the rest."""
    assert plan.rows_at_once(SMALL_TRACK, GPU, 8) == 64
    parts = plan.step_seconds(REPORT, GPU, SMALL_TRACK, 8)
    first = {"matrices of the blocks": 0.1, "lm_head": 0.1, "attention": 0.02, "loss": 0.1, "between matrices": 0.01,
             "Newton-Schulz": 0.02, "optimizers and the rest": 0.0004}
    ring = 2 * 7 / 8 / 100e9
    hidden = 2 / 3 * (0.1 + 0.1 + 0.02 + 0.1 + 0.01)
    assert parts == pytest.approx(first | {"all-reduce that nothing hides": 20e9 * ring - hidden + 1e9 * ring})
    row = plan.project(REPORT, GPU, SMALL_TRACK, 8)
    assert row["seconds"] == pytest.approx(sum(parts.values()))
    assert row["mfu"] == pytest.approx(12e12 / row["seconds"] / 100e12)     # half of attention's 2e12 count


@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_fit_finds_the_fraction(fraction):
    seconds = sum(plan.step_seconds(REPORT, replace(GPU, fraction=fraction), SMALL_TRACK, 8).values())
    assert plan.fit(seconds, REPORT, GPU, SMALL_TRACK, 8) == pytest.approx(fraction, rel=1e-6)


def test_which_gpu_it_is():
    for name, memory, row in (
            ("NVIDIA A100-SXM4-40GB", 42e9, "A100 40GB"), ("NVIDIA A100 80GB PCIe", 85e9, "A100 80GB"),
            ("NVIDIA H100 80GB HBM3", 85e9, "H100"), ("NVIDIA GeForce RTX 4090", 25e9, "RTX 4090"),
            ("Tesla T4", 16e9, "")):
        assert preflight.find_gpu(name, memory) == row


GOOD = preflight.Machine(peak=50e12, bandwidth=0.9e12, bus=100e9, memory=80e9)
SUMMARY = dict(gpu_memory_gib=28.0, late_compilations=0)
PLAN = dict(seconds=0.1, memory=30e9)
KERNELS = "attention torch SDPA, flash; bfloat16; torch.compile True"


@pytest.mark.parametrize("change, word", [
    ({}, None), (dict(peak=20e12), "matrix products: 20 TFLOP/s, planned 50"), (dict(bandwidth=4e11), "400 GB/s"),
    (dict(bus=9e9), "interconnect: an all-reduce at 9 GB/s, planned 100"), (dict(seconds=0.2), "the host may hold"),
    (dict(gpu_memory_gib=70.0), "halve --micro_batch"), (dict(gpu_memory_gib=40.0), "1.43 of the plan"),
    (dict(late_compilations=2), "shapes change"),
    (dict(kernels=KERNELS.replace("True", "False")), "compilation is off"),
    (dict(kernels=KERNELS.replace("flash", "math")), "no fused kernel")])
def test_advice(tmp_path, change, word):
    """A machine as planned gets none; each thing that is off gets one line."""
    path = tmp_path / "log.txt"
    path.write_text(f"kernels: {change.get('kernels', KERNELS)}\n")
    summary = {name: change.get(name, value) for name, value in SUMMARY.items()}
    run = replace(parse_log(path, log_text()), path=path, summary=summary)
    machine = replace(GOOD, **{name: value for name, value in change.items() if hasattr(GOOD, name)})
    lines = preflight.advise(run, machine, GPU, PLAN, change.get("seconds", 0.1))
    assert len(lines) == (word is not None) and (word or "") in "".join(lines)


def test_preflight_of_two_processes(text, tmp_path):
    """Real steps on a CPU, for which there is no plan."""
    command = [sys.executable, ROOT / "tools/preflight.py", "--processes", "2", "tiny", *SMALL, *text]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=200)
    assert result.returncode == 0, result.stderr
    table = result.stdout.partition("\npreflight: ")[2]
    assert re.search(r"^ms a step +- +\d", table, re.MULTILINE) and "no plan: tools/plan.py knows A100" in table
    assert re.search(r"^all-reduce, GB/s +- +\d", table, re.MULTILINE)
    assert "minutes for 20 steps of 512 tokens" in table and (tmp_path / "logs/preflight").exists()


def test_bad_options(tmp_path):
    for tool, options, words in (("plan", ["small", "--gpu", "T4"], "--gpu T4: give one of A100 40GB"),
                                 ("plan", ["large"], "track large: give small"),
                                 ("preflight", ["large"], "track large: give small")):
        command = [sys.executable, ROOT / f"tools/{tool}.py", *options]
        result = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(bool(plan.missing()), reason=plan.missing())
def test_the_whole_plan(tmp_path):
    """The command on the fake GPU: the published steps within 15%, where they were not fitted."""
    command = [sys.executable, ROOT / "tools/plan.py", "small", "--calibrate"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    errors = [float(error) for error in re.findall(r"([+-][\d.]+)%$", result.stdout, re.MULTILINE)]
    assert len(errors) == 5 and max(map(abs, errors)) < 15, result.stdout + result.stderr
    fractions = re.findall(r"^8 x (H100|A100 80GB) .* ([\d.]+)$", result.stdout, re.MULTILINE)
    assert {name: float(value) for name, value in fractions} == {
        name: pytest.approx(plan.GPUS[name].fraction, abs=6e-4) for name in plan.FITTED}
