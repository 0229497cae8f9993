"""The GPU path of train_gpt.py on a GPU that is not there: tests/fake_gpu."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT
from fake_gpu import device

import train_gpt

pytestmark = pytest.mark.skipif(bool(device.missing()), reason=device.missing())
STEPS = 3
SMALL = ["small", "--num_steps", str(STEPS), "--val_tokens", "65536", "--val_every", "2", "--save_every", "2",
         "--prime_steps", "1"]
FAULTS = ("item_in_the_step", "float32_logits", "shape_that_recompiles", "kernel_that_spills",
          "operation_without_cuda_kernel", "collective_of_twice_the_bytes")
RUNS = {     # the longest first
    "8 x H100": ["--capability", "9.0", "--ranks", "8", *SMALL],
    "faults": ["--ranks", "2", *(f"--fault={name}" for name in FAULTS), *SMALL, "--batch_tokens", "65536"],
    "A100": ["--capability", "8.0", *SMALL, "--batch_tokens", "65536", "--ngram_rows", "4096", "--ngram_max", "2"],
    "cpu tensor": ["--fault", "cpu_tensor_in_the_forward", *SMALL, "--compile", "off", "--num_layers", "1"]}
CLEAN = ["A100", "8 x H100"]


def start(name: str) -> tuple[str, dict]:
    command = [sys.executable, ROOT / "tests/fake_gpu/run.py", *RUNS[name]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr[-3000:]
    log, _, report = result.stdout.strip().rpartition("\n")
    return log, json.loads(report)


@pytest.fixture(scope="module")
def reports() -> dict[str, tuple[str, dict]]:
    """{name: (log, report)}, two runs at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(start, RUNS), strict=True))


def reduced(report: dict) -> int:
    """Bytes that the run reduced, over all steps."""
    return sum(size for _, size in report["collectives"].values())


@pytest.mark.parametrize("name", CLEAN)
def test_a_whole_run_has_no_problem(reports, name):
    """No operation without a CUDA kernel, wait for the GPU in a step, late compilation, spill or fp32 logits."""
    log, report = reports[name]
    assert report["problems"] == []
    assert report["kernels"], "nothing was compiled"
    for line in ("kernels: attention torch SDPA, flash; bfloat16; torch.compile True", "late_compilations: 0",
                 "checkpoint: .* at step 2/3", "step:3/3 val_loss:.*"):
        assert re.search(f"^{line}$", log, re.MULTILINE), line


@pytest.mark.parametrize("name", CLEAN)
def test_what_waits_for_the_gpu(reports, name):
    """The places outside a step where the host waits, so that a count of none inside means something."""
    found = reports[name][1]["synchronisations"]
    places = {re.sub(".* < (read_steps|validate|save) < .*", r"\1", place) for place in found}
    assert places == {"read_steps", "validate", "save"}


@pytest.mark.upstream
@pytest.mark.parametrize("name", CLEAN)
def test_the_planned_memory(reports, name):
    """That from which --micro_batch 0 follows: all that a step takes, and little more."""
    log, report = reports[name]
    rows = int(re.search("^data: .* rows a step, (.*) at once", log, re.MULTILINE)[1])
    c = train_gpt.make_config(dict(track="small", dtype="bfloat16"))
    assert rows == 64
    assert 0.85 < report["peak"] / train_gpt.planned_bytes(c, rows, compiled=True) < 1.03


@pytest.mark.upstream
def test_collectives(reports):
    """A step reduces DDP's buckets and one tensor for each shape of Muon's matrices."""
    model = train_gpt.GPT(train_gpt.make_config(dict(track="small")))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    matrices = sum(size for name, size in sizes.items() if name.startswith("blocks."))
    # Buckets of 25 MiB or of one larger gradient, and a tensor for each of four shapes.
    assert reports["8 x H100"][1]["collectives"] == {
        "c10d::allreduce_ float32": [STEPS * 14, STEPS * 4 * sum(sizes.values())],
        "c10d::allreduce_ bfloat16": [STEPS * 4, STEPS * 2 * matrices]}
    assert reports["A100"][1]["collectives"] == {}


@pytest.mark.parametrize("fault, message", {
    "item in the step": "the host waits in a step: item < .*train_step < .*",
    "fp32 logits": "a float32 tensor of .* bytes: the logits",
    "shape that recompiles": "[1-9][0-9]* graphs compiled in training",
    "kernel that spills": "square spills [1-9][0-9]* bytes",
    "operation without a CUDA kernel": "no CUDA kernel: .*attention_for_cpu.*"}.items())
def test_planted_faults(reports, fault, message):
    assert any(re.fullmatch(message, line) for line in reports["faults"][1]["problems"])


def test_planted_collective_of_twice_the_bytes(reports):
    assert reduced(reports["faults"][1]) > reduced(reports["8 x H100"][1])


def test_planted_cpu_tensor(reports):
    assert "two devices, cuda:0 and cpu" in reports["cpu tensor"][1]["status"]
