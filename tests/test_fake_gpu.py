"""The GPU path of train_gpt.py on a GPU that is not there: tests/fake_gpu."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import plan
import pytest
from conftest import ROOT
from fake_gpu import device

import train_gpt

pytestmark = pytest.mark.skipif(bool(device.missing()), reason=device.missing())
STEPS = 3
SMALL = ["small", "--num_steps", str(STEPS), "--val_tokens", "65536", "--val_every", "2", "--save_every", "2",
         "--prime_steps", "1"]
# Quick to compile: short and long layers, with values and without; the first and the last stage.
STAGES = ["--windows", "SL", "--stages", "1:384 3:1408"]
ONE = ["--num_layers", "1", "--windows", "L", "--value_tables", "0", "--stages", "1:384"]
FAULTS = ("item_in_the_step", "float32_logits", "shape_that_recompiles", "kernel_that_spills",
          "operation_without_cuda_kernel", "collective_of_twice_the_bytes")
RUNS = {     # the longest first; the A100 has the memory of an RTX 3090
    "8 x H100": ["--capability", "9.0", "--ranks", "8", *SMALL, *STAGES, "--num_layers", "3", "--value_tables", "1"],
    "A100": ["--capability", "8.0", "--memory", "24", *SMALL, *STAGES, "--num_layers", "2", "--value_tables", "0"],
    "faults": ["--ranks", "2", *(f"--fault={name}" for name in FAULTS), *SMALL, *ONE, "--batch_tokens", "65536"],
    "cpu tensor": ["--fault", "cpu_tensor_in_the_forward", *SMALL, *ONE, "--compile", "off"]}
CLEAN = ["A100", "8 x H100"]
WHOLE = {"8 x A100": ["--capability", "8.0", "--ranks", "8", *SMALL],
         "H100": ["--capability", "9.0", "--memory", "24", *SMALL]}
AT_ONCE = {"8 x H100": {"16": 2, "48": 6}, "A100": {"16": 2, "48": 2}, "8 x A100": {"16": 2, "32": 4, "48": 6},
           "H100": {"16": 2, "32": 2, "48": 2}}


def start(name: str) -> tuple[str, dict]:
    command = [sys.executable, ROOT / "tests/fake_gpu/run.py", *(RUNS | WHOLE)[name]]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr[-3000:]
    log, _, report = result.stdout.strip().rpartition("\n")
    return log, json.loads(report)


@pytest.fixture(scope="module")
def reports() -> dict[str, tuple[str, dict]]:
    """{name: (log, report)}, two runs at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(start, RUNS), strict=True))


def config_of(name: str) -> train_gpt.Config:
    given = train_gpt.parse_command_line((RUNS | WHOLE)[name][(RUNS | WHOLE)[name].index("small"):])
    return train_gpt.make_config(given | dict(dtype="bfloat16"))


def check_run(log: str, report: dict) -> None:
    assert report["problems"] == []
    assert report["kernels"], "nothing was compiled"
    for line in ("kernels: attention torch varlen_attn; bfloat16; torch.compile True",
                 "late_compilations: 0", "checkpoint: .* at step 2/3", "step:3/3 val_loss:.*"):
        assert re.search(f"^{line}$", log, re.MULTILINE), line


def check_memory(name: str, log: str, report: dict) -> None:
    """Of the plan: all that a step takes, and little more; with two rows at once it fits a card of 24 GB, with six one
    of 40 GB."""
    assert report["at_once"] == AT_ONCE[name] and f"at once: {AT_ONCE[name]}".replace("'", "") in log
    most = max(report["at_once"].values())
    assert 0.85 < report["peak"] / plan.planned_bytes(config_of(name), most) < 1.1
    assert report["peak"] < {2: 20e9, 6: 35e9}[most]


@pytest.mark.parametrize("name", CLEAN)
def test_a_run_of_two_stages_has_no_problem(reports, name):
    """No operation without a CUDA kernel, wait for the GPU in a step, late compilation, spill or fp32 logits."""
    check_run(*reports[name])


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("name", WHOLE)
def test_every_layer_and_stage(name):
    log, report = start(name)
    check_run(log, report)
    check_memory(name, log, report)


@pytest.mark.parametrize("name", CLEAN)
def test_what_waits_for_the_gpu(reports, name):
    """The places outside a step where the host waits, so that a count of none inside means something."""
    found = reports[name][1]["synchronisations"]
    places = {re.sub(".* < (read_steps|validate|save) < .*", r"\1", place) for place in found}
    assert places == {"read_steps", "validate", "save"}


@pytest.mark.upstream
@pytest.mark.parametrize("name", CLEAN)
def test_the_planned_memory(reports, name):
    check_memory(name, *reports[name])


@pytest.mark.upstream
def test_collectives(reports):
    """A step reduces all gradients but the n-grams', of which it gathers every token's, and one tensor for each shape
    of Muon's matrices."""
    c = config_of("8 x H100")
    sizes = {name: p.numel() for name, p in train_gpt.GPT(c).named_parameters() if p.requires_grad}
    # Of each shape as many as 8 ranks share: the layers' 12 of 768 x 768, 3 of 3072 x 768 and 3 of 768 x 3072.
    assert c.num_layers == 3 and c.model_dim == 768
    matrices = (16 + 4 * 8 + 4 * 8) * 768 ** 2
    for step, record in enumerate(reports["8 x H100"][1]["steps"]):
        tokens = train_gpt.batch_rows(c, step) * c.seq_len
        _, size = record["collectives"].pop("c10d::allreduce_ float32")
        assert size == 4 * sum(sizes.values())     # in buckets of 25 MiB or of one larger gradient
        assert record["collectives"] == {
            "c10d::_allgather_base_ bfloat16": [3, 2 * matrices],
            "c10d::_allgather_base_ int64": [1, 8 * tokens * (c.ngram_max - 1)],
            "c10d::_allgather_base_ float32": [1, 4 * tokens * c.ngram_dim]}
    assert all(record["collectives"] == {} for record in reports["A100"][1]["steps"])


def test_attention_by_hand(reports):
    """One layer's windows of a step, and its operations: each token sees at most the window and itself, in documents
    of the longest length."""
    c = config_of("A100")
    for step, record in enumerate(reports["A100"][1]["steps"]):
        found = {kernel: work for kernel, work in record["work"].items() if kernel.startswith("torch_attn")}
        window = train_gpt.stage(c, step)[1]
        for w in (window // 2, window):     # of one layer each
            pairs = sum(min(i, w) + 1 for i in range(c.document_tokens)) / c.document_tokens
            operations = train_gpt.batch_rows(c, step) * c.seq_len * pairs * c.model_dim
            for name, factor in (("", 4), ("_backward", 10)):
                work = found.pop(f"torch_attn._varlen_attn{name}.default {c.document_tokens} {w}")
                assert work[1] == pytest.approx(factor * operations)
        assert found == {}


@pytest.mark.parametrize("fault, message", {
    "item in the step": "the host waits in a step: item < .*train_step < .*",
    "fp32 logits": "a float32 tensor of .* bytes: the logits",
    "shape that recompiles": "[1-9][0-9]* graphs compiled in training",
    "kernel that spills": "square spills [1-9][0-9]* bytes",
    "operation without a CUDA kernel": "no CUDA kernel: .*attention_for_cpu.*"}.items())
def test_planted_faults(reports, fault, message):
    assert any(re.fullmatch(message, line) for line in reports["faults"][1]["problems"])


def test_planted_collective_of_twice_the_bytes(reports):
    """Muon's, in float32, which DDP's are."""
    for record in reports["faults"][1]["steps"]:
        assert "c10d::_allgather_base_ bfloat16" not in record["collectives"]
    for record in reports["8 x H100"][1]["steps"]:
        assert "c10d::_allgather_base_ bfloat16" in record["collectives"]


def test_planted_cpu_tensor(reports):
    assert "two devices, cuda:0 and cpu" in reports["cpu tensor"][1]["status"]
