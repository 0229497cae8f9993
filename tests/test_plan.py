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

GPU = plan.Gpu(memory=24, peak=100e12, bandwidth=1e12, bus=100e9, fraction=0.5)
# Two rows of 1,024 tokens at once on each of 8 GPUs; the two stages have 2 and 3 steps of 1 and 3 times 16 rows.
CONFIG = train_gpt.make_config(dict(
    track="small", dtype="bfloat16", seq_len=1024, batch_tokens=16 * 1024, val_tokens=1024, document_tokens=0,
    ngram_dim=0, num_steps=5, stages="1:384 3:1408", num_heads=1, head_dim=100, vocab_size=6400, value_tables=1,
    num_layers=2, micro_batch=2))
WORK = {"aten.mm.default 1000x768 768x768": [10, 5e12, 1e9],      # 0.1 s by its operations
        "aten.mm.out 1000x768 6400x768": [1, 5e12, 1e9],
        "torch_attn._varlen_attn.default 2048 384": [2, 1e12, 1e9],
        "triton_red_fused_nll_loss_forward_3": [1, 0, 85e9],        # 0.1 s by its bytes
        "triton_poi_fused__varlen_attn_backward_add_1": [1, 0, 8.5e9],
        "aten.embedding_dense_backward.default": [1, 0, 1.7e9],
        "Muon: aten.baddbmm.out 2x768x768 2x768x768": [1, 1e12, 1e6],
        "Muon: triton_per_fused_div_1": [1, 0, 0.85e9],
        "AdamW: aten.add_.Tensor": [100, 0, 8],                         # 0.4 ms by its calls
        "RowAdam: aten.sort.default": [1, 0, 3.4e9]}
PARTS = {"matrices of the blocks": 0.1, "lm_head": 0.1, "attention": 0.02, "loss": 0.1, "between matrices": 0.01,
         "embeddings and sums of gradients": 0.002, "Newton-Schulz": 0.021, "Muon and AdamW": 0.0004,
         "n-gram tables": 0.004}
COLLECTIVES = {"c10d::allreduce_ float32": [14, 20e9], "c10d::_allgather_base_ bfloat16": [4, 2e9],
               "c10d::_allgather_base_ float32": [1, 2e9], "c10d::_allgather_base_ int64": [1, 1e9]}
RECORD = dict(work=WORK, collectives=COLLECTIVES)
TRACE = {(1, 384): RECORD, (3, 1408): dict(RECORD, work={name: [x, 3 * y, 3 * z] for name, (x, y, z) in WORK.items()})}


def test_a_step_by_hand():
    """Each kernel by its operations, bytes or calls. Of the collectives, the all-reduce of all but the embedding and
    the value table hides behind two thirds of the last micro-batch."""
    ring = 7 / 8 / 100e9
    tables = 2 * 4 * 6400 * 100
    assert plan.step_seconds((1, 384), RECORD, GPU, CONFIG, 8) == pytest.approx(PARTS | {
        "collectives that nothing hides": 2 * 20e9 * ring - 2 / 3 * 0.332 + (2e9 + 2e9 + 1e9) * ring})
    # Three micro-batches of as much: no more is hidden.
    parts = plan.step_seconds((3, 1408), TRACE[3, 1408], GPU, CONFIG, 8)
    assert parts["attention"] == pytest.approx(3 * 0.02)
    assert parts["collectives that nothing hides"] == pytest.approx(
        2 * 20e9 * ring - 2 / 3 * 0.332 + (2e9 + 2e9 + 1e9) * ring)
    # The tables' is not hidden, however long the backward is.
    short = dict(RECORD, collectives={"c10d::allreduce_ float32": [1, tables + 1000]})
    parts = plan.step_seconds((1, 384), short, GPU, CONFIG, 8)
    assert parts["collectives that nothing hides"] == pytest.approx(2 * tables * ring)
    short = dict(RECORD, collectives={"c10d::allreduce_ bfloat16": [1, tables / 2 + 1000]})
    parts = plan.step_seconds((1, 384), short, GPU, replace(CONFIG, reduce_dtype="bfloat16"), 8)
    assert parts["collectives that nothing hides"] == pytest.approx(tables * ring)
    parts = plan.step_seconds((1, 384), dict(RECORD, collectives={}), GPU, CONFIG, 1)
    assert parts["collectives that nothing hides"] == 0


def test_the_rows_at_once():
    """Those of the trainer, by its own rule, for a GPU that is not there."""
    small = train_gpt.make_config(dict(track="small"))
    assert [plan.rows_at_once(small, 8, memory) for memory in (24, 40, 80)] == [(2, 2, 2), (2, 4, 6), (2, 4, 6)]
    assert plan.rows_at_once(replace(small, micro_batch=1), 8, 80) == (1, 1, 1)


def test_a_run_of_two_stages():
    """Three steps of the first and two of the second: stage(c, step) has 0, 0, 0, 1, 1."""
    first, second = (sum(plan.step_seconds(stage, TRACE[stage], GPU, CONFIG, 8).values()) for stage in TRACE)
    row = plan.project(TRACE, GPU, CONFIG, 8)
    assert row["stages"] == pytest.approx([first, second])
    assert row["whole"] == pytest.approx(3 * first + 2 * second)
    assert row["seconds"] == sum(row["parts"].values()) == pytest.approx(row["whole"] / 5)
    assert row["tokens"] == pytest.approx(16 * 1024 * (3 + 2 * 3) / row["whole"])
    assert row["mfu"] == pytest.approx(12e12 * (3 + 2 * 3) / row["whole"] / 100e12)


@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_fit_finds_the_fraction(fraction):
    seconds = plan.project(TRACE, replace(GPU, fraction=fraction), CONFIG, 8)["seconds"]
    assert plan.fit(seconds, TRACE, GPU, CONFIG, 8) == pytest.approx(fraction, rel=1e-6)


def test_the_published_recipe():
    """--calibrate has none of today's parts, whatever the preset has."""
    c = train_gpt.make_config(train_gpt.parse_command_line(["small", *plan.PUBLISHED]))
    assert train_gpt.batch_rows(c, 0) == 512 and train_gpt.stage(c, 0) == (1, 0)
    model = train_gpt.GPT(replace(c, num_heads=1, num_layers=1))
    assert {name for name, _ in model.named_parameters()} == {
        "embed.weight", "lm_head.weight", *(f"blocks.0.{name}.weight" for name in (
            "attention.query", "attention.key", "attention.value", "attention.proj", "mlp.up", "mlp.proj"))}


def test_which_gpu_it_is():
    for name, memory, row in (
            ("NVIDIA A100-SXM4-40GB", 42e9, "A100 40GB"), ("NVIDIA A100 80GB PCIe", 85e9, "A100 80GB"),
            ("NVIDIA H100 80GB HBM3", 85e9, "H100"), ("NVIDIA GeForce RTX 4090", 25e9, "RTX 4090"),
            ("Tesla T4", 16e9, "")):
        assert preflight.find_gpu(name, memory) == row


GOOD = preflight.Machine(peak=50e12, bandwidth=0.9e12, bus=100e9, memory=80e9)
SUMMARY = dict(gpu_memory_gib=28.0, late_compilations=0)
PLAN = dict(seconds=0.1, memory=30e9)
KERNELS = "attention torch varlen (FlashAttention); bfloat16; torch.compile True"


@pytest.mark.parametrize("change, word", [
    ({}, None), (dict(peak=20e12), "matrix products: 20 TFLOP/s, planned 50"), (dict(bandwidth=4e11), "400 GB/s"),
    (dict(bus=9e9), "interconnect: an all-reduce at 9 GB/s, planned 100"), (dict(seconds=0.2), "the host may hold"),
    (dict(gpu_memory_gib=70.0), "halve --micro_batch"), (dict(gpu_memory_gib=40.0), "1.43 of the plan"),
    (dict(late_compilations=2), "shapes change"),
    (dict(kernels=KERNELS.replace("True", "False")), "compilation is off"),
    (dict(kernels=KERNELS.replace("varlen (FlashAttention)", "SDPA")), "masks are in its place")])
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


@pytest.mark.parametrize("tool, options, words", [
    (plan, ["small", "--gpu", "T4"], "plan.py: --gpu T4: give one of A100 40GB"),
    (plan, ["large"], "plan.py: track large: give small"),
    (preflight, ["large"], "preflight.py: track large: give small")])
def test_bad_options(monkeypatch, tool, options, words):
    monkeypatch.setattr(sys, "argv", ["TOOL", *options])
    with pytest.raises(SystemExit) as error:
        tool.main()
    assert str(error.value).startswith(words)


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
