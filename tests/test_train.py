"""Whole runs of the real command: the same result on any number of processes, after a resume, a second time."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, command, environment, losses, run
from test_distributed import wait_for

import train_gpt

RUN = [*SMALL, "--val_every", "1", "--save_every", "12", "--micro_batch", "2", "--run_id", "r",
       "--optimizer_metrics_every", "5"]


def finished(result: subprocess.CompletedProcess):
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """A run of one process, with accumulation: its folder, whose checkpoint is of step 12 of 20."""
    folder = tmp_path_factory.mktemp("one")
    finished(run("tiny", *RUN, *text, "--log_dir", folder))
    return folder / "r"


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    """The same of two processes over gloo, with accumulation too."""
    folder = tmp_path_factory.mktemp("two")
    finished(run("tiny", *RUN, *text, "--log_dir", folder, nproc=2))
    return folder / "r"


def test_two_processes_equal_one(one, two):
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys() and len(a) == 40
    assert max(abs(float(a[key]) - float(b[key])) for key in a) < 1e-4


def test_bfloat16_follows_float32_and_is_taken_where_the_cpu_has_units(one, text, tmp_path):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has_units = "avx512_bf16" in info or "amx_bf16" in info
    assert train_gpt.has_bf16_units(torch.device("cpu")) == (has_units and hasattr(torch.cpu, "get_capabilities"))
    finished(run("tiny", *RUN, *text, "--dtype", "auto" if has_units else "bfloat16", "--log_dir", tmp_path))
    for folder, dtype in ((one, "float32"), (tmp_path / "r", "bfloat16")):
        log = (folder / "log.txt").read_text()
        assert f"activations and Newton-Schulz {dtype};" in log and f'"dtype": "{dtype}"' in log
    a, b = losses(one), losses(tmp_path / "r")
    assert 0 < max(abs(float(a[key]) - float(b[key])) for key in a) < 0.02


def test_it_learns(one):
    found = losses(one)
    assert float(found["train", 1]) == pytest.approx(math.log(320), abs=1e-5) and float(found["val", 20]) < 4.7


def same(a, b) -> bool:
    """Whether two checkpoints' contents are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    return a == b


@pytest.fixture(scope="module", params=[1, 2])
def again(request, one, two, text, tmp_path_factory):
    """(processes, the first run's folder, a second one's with the same seed but no priming and no metrics, which saves
    the end)."""
    folder = tmp_path_factory.mktemp("again")
    options = ["--prime_steps", 0, "--optimizer_metrics_every", 0, "--save_every", 20, "--log_dir", folder]
    finished(run("tiny", *RUN, *text, *options, nproc=request.param))
    return request.param, one if request.param == 1 else two, folder / "r"


def test_same_seed_same_losses_and_priming_and_metrics_leave_no_trace(again):
    _, first, second = again
    assert losses(first) == losses(second)
    assert (first / "metrics.jsonl").exists() and not (second / "metrics.jsonl").exists()


def test_metrics_of_the_optimizers(one, two):
    """Every fifth step of the run, the same of one and of two processes."""
    a, b = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two))
    assert [line["step"] for line in a] == [line["step"] for line in b] == [5, 10, 15, 20]
    for name, figures in a[1]["parameters"].items():
        assert figures == pytest.approx(b[1]["parameters"][name], rel=0.02, abs=1e-4)
    assert a[1]["parameters"]["blocks.*.mlp.up.weight"].keys() == {
        "gradient", "weight", "update", "update_rms", "update_to_weight", "orthogonality_error", "least_singular",
        "largest_singular", "decay_share"}


def test_another_seed_another_loss(one, text, tmp_path):
    finished(run("tiny", *RUN, *text, "--seed", 1, "--log_dir", tmp_path))
    assert losses(tmp_path / "r")["val", 20] != losses(one)["val", 20]


def test_resume_is_bit_equal(again, tmp_path):
    """From step 12: the losses, and at the end every weight and every optimizer state, are those of a whole run."""
    nproc, source, whole = again
    finished(run("--resume", source, "--log_dir", tmp_path, "--save_every", 20, nproc=nproc))
    resumed = losses(tmp_path / "r")
    assert resumed == {key: loss for key, loss in losses(whole).items() if key[1] > 12} and len(resumed) == 16
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, tmp_path / "r"))
    for key in ("step", "position", "val_loss", "rng", "model", "optimizers"):
        assert same(a[key], b[key]), key
    assert a["step"] == 20 and not same(a["model"], torch.load(source / "checkpoint.pt", weights_only=True)["model"])


def test_resume_at_another_number_of_processes(two, tmp_path):
    finished(run("--resume", two / "checkpoint.pt", "--log_dir", tmp_path))
    whole, resumed = losses(two), losses(tmp_path / "r")
    assert max(abs(float(loss) - float(whole[key])) for key, loss in resumed.items()) < 1e-4


@pytest.mark.parametrize("number, nproc", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_a_resume_goes_on(number, nproc, text, tmp_path):
    """Stopped at some step by a signal, all ranks save the same step; resumed in place, the log has no gap."""
    process = subprocess.Popen(
        command("tiny", *SMALL, *text, "--num_steps", 400, "--log_dir", tmp_path, "--run_id", "r", nproc=nproc),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(tmp_path, r"^step:5/")
    process.send_signal(number)
    if number == signal.SIGTERM:
        process.send_signal(number)     # as a batch system does, which signals each process of a job
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and (nproc > 1 or process.returncode == 128 + number)
    step = int(re.search(r"stopped by a signal at step (\d+)/400", output)[1])
    assert torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["step"] == step < 400, errors
    finished(run("--resume", tmp_path / "r", "--log_dir", tmp_path, nproc=nproc))
    assert sorted(step for kind, step in losses(tmp_path / "r") if kind == "train") == list(range(1, 401))


def test_a_second_ctrl_c_exits_at_once(text, tmp_path):
    """Both signals arrive while the first step still runs, so that only the second can end the process."""
    options = [*text, "--batch_tokens", 65536 * 4, "--val_tokens", 256, "--prime_steps", 0, "--log_dir", tmp_path]
    process = subprocess.Popen(
        command("tiny", *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(tmp_path, r"^priming:")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT     # the step takes longer
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_resume_rejects_what_would_change_the_run(one, text, tmp_path, capsys):
    result = run("--val_files", text[1], "--resume", one, "--log_dir", tmp_path)
    assert result.returncode == 2 and "its run read other data" in result.stderr
    (tmp_path / "checkpoint.pt").write_bytes((one / "checkpoint.pt").read_bytes()[:5000])
    for name, arguments, message in (
            (one, ["--lr", "0.5"], "--lr 0.5: would change the run, whose checkpoint has 0.002"),
            (one, ["small"], "--track small: would change the run"),
            (tmp_path / "none", [], "no checkpoint there"),
            (tmp_path / "checkpoint.pt", [], "is damaged, or of another model")):
        assert train_gpt.main([*arguments, "--resume", str(name), "--log_dir", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_init_from_takes_the_weights_alone(one, text, tmp_path):
    """The first loss is that of the weights (against this process), and the schedule and clock start anew."""
    options = [*SMALL, *text, "--num_steps", 2, "--seed", 9, "--log_dir", tmp_path]
    result = finished(run("tiny", *options, "--init_from", one, "--run_id", "r"))
    saved = torch.load(one / "checkpoint.pt", weights_only=True)
    c = train_gpt.Config(**{**saved["config"], "seed": 9})
    model = train_gpt.GPT(c)
    model.load_state_dict(saved["model"])
    rows = train_gpt.Rows("train_files", c.train_files, c.vocab_size, c.seq_len, 32)
    tokens = rows.read(rows.shuffled(9, np.arange(16))).to(torch.int64)
    with torch.no_grad():
        expected = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert float(losses(tmp_path / "r")["train", 1]) == pytest.approx(expected, abs=1e-5)
    assert "step:1/2" in result.stdout
    result = run("tiny", *SMALL, *text, "--num_layers", 3, "--init_from", one, "--log_dir", tmp_path, "--run_id", "s")
    assert result.returncode == 2 and "is damaged, or of another model" in result.stderr


def test_log_and_summary(one):
    log = (one / "log.txt").read_text()
    source, rest = log.split("\n" + "=" * 100 + "\n", 1)
    assert source + "\n" == (ROOT / "train_gpt.py").read_text()     # the log is the record
    assert json.loads(re.search(r"^config: (.*)$", rest, re.M)[1])["num_steps"] == 20
    assert re.search(r"^step:12/20 train_loss:\d\.\d+ train_time:\d+ms step_avg:\d+\.\d+ms$", rest, re.M)
    assert re.search(r"^step:12/20 val_loss:\d\.\d+ train_time:\d+ms step_avg:\d+\.\d+ms$", rest, re.M)
    for word in ("versions: python", "hardware: ", "source: sha256", "kernels: ", "lm_head.weight", "data sha256: "):
        assert word in rest
    summary = json.loads((one / "summary.json").read_text())
    assert summary["tokens"] == 20 * 512 and summary["mfu"] is None and summary["world_size"] == 1
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"])
    assert summary["data_comparable"] is False and "this loss does not compare" in rest
    assert summary["target_reached"] is (summary["val_loss"] <= summary["target"])
    for key, value in summary.items():
        printed = re.search(rf"^{key}: (.*)$", rest, re.M)[1]
        assert printed == (f"{value:.6g}" if isinstance(value, float) else json.dumps(value).strip('"'))


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(one, text, tmp_path):
    """A scale that overflows fp32 makes the first loss NaN; weights that overflow it, put into a checkpoint, the first
    loss after a resume, which must leave the checkpoint as it is."""
    options = [*SMALL, *text, "--save_every", 1, "--log_dir", tmp_path, "--run_id", "s"]
    result = run("tiny", *options, "--attention_scale", 3e38)
    assert result.returncode == 2 and "error: step 1: the training loss, nan, is not finite" in result.stderr
    assert "lower --lr, or give --warmup_steps or --grad_clip; none was saved" in result.stderr
    assert not (tmp_path / "s/checkpoint.pt").exists() and not (tmp_path / "s/summary.json").exists()
    content = torch.load(one / "checkpoint.pt", weights_only=True)
    for name in ("up", "proj"):
        content["model"][f"blocks.0.mlp.{name}.weight"] *= 1e30
    (tmp_path / "r").mkdir()
    torch.save(content, tmp_path / "r/checkpoint.pt")
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    result = run("--resume", tmp_path / "r", "--log_dir", tmp_path, "--save_every", 1)
    assert result.returncode == 2 and "error: step 13: " in result.stderr
    assert f"the last good checkpoint is in {tmp_path}/r" in result.stderr
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before


def test_going_round_the_data_is_said(text, tmp_path):
    finished(run("tiny", *SMALL, *text, "--num_steps", 60, "--val_every", 0, "--log_dir", tmp_path, "--run_id", "r"))
    log = (tmp_path / "r/log.txt").read_text()
    assert "warning: the run goes round the data" in log and "data: epoch 2 has begun, in a new order" in log


def test_a_resume_goes_on_in_the_folder_of_its_checkpoint(one, tmp_path):
    shutil.copytree(one, tmp_path / "moved")
    finished(run("--resume", tmp_path / "moved/checkpoint.pt"))
    assert len(losses(tmp_path / "moved")) == 40 and "resumed: " in (tmp_path / "moved/log.txt").read_text()


def test_the_data_compares_where_its_hashes_and_tokens_are_the_tracks(one, text, tmp_path):
    """With the hashes of this data given the loss compares, but not over fewer validation tokens than the track's."""
    known = json.loads((one / "summary.json").read_text())
    hashes = ["--train_sha256", known["train_sha256"], "--val_sha256", known["val_sha256"]]
    whole = train_gpt.make_config(dict(track="tiny")).val_tokens
    assert not known["data_comparable"] and whole != 2048
    finished(run("tiny", *SMALL, *text, *hashes, "--log_dir", tmp_path, "--run_id", "few"))
    assert json.loads((tmp_path / "few/summary.json").read_text())["data_comparable"] is False
    finished(run("tiny", *SMALL, *text, "--val_sha256", "", "--log_dir", tmp_path, "--run_id", "unknown"))
    assert json.loads((tmp_path / "unknown/summary.json").read_text())["data_comparable"] is None


def test_a_run_folder_is_never_overwritten(one, text):
    before = (one / "log.txt").read_bytes()
    result = run("tiny", *RUN, *text, "--log_dir", one.parent)
    assert result.returncode == 2 and "holds a run; give another name" in result.stderr
    assert (one / "log.txt").read_bytes() == before


def test_validation_needs_its_tokens(text, tmp_path):
    result = run("tiny", *SMALL, *text, "--val_tokens", 2**20, "--log_dir", tmp_path)
    assert result.returncode == 2 and "give that or less, or more text" in result.stderr


@pytest.mark.parametrize("optimizer", ["orthogonal_nesterov", "adamw"])
def test_the_other_matrix_optimizers_learn_and_resume(optimizer, text, tmp_path):
    finished(run("tiny", *RUN, *text, "--matrix_optimizer", optimizer, "--log_dir", tmp_path))
    whole = losses(tmp_path / "r")
    finished(run("--resume", tmp_path / "r", "--log_dir", tmp_path / "again"))
    assert losses(tmp_path / "again/r") == {key: loss for key, loss in whole.items() if key[1] > 12}
    assert float(whole["val", 20]) < 5.2


KILL_SAVERS = """
import itertools, os, signal, sys, time, torch, train_gpt
from pathlib import Path
path = Path(sys.argv[1])
for i in range(40):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for step in itertools.count(1):
            weights = torch.full((50_000,), step)
            train_gpt.save_checkpoint(path, dict(step=step, config=dict(), model=dict(w=weights), optimizers=[]))
            os.write(writer, b"x")
    os.close(writer)
    done = len(os.read(reader, 1))
    time.sleep(0.0007 * i)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done += len(os.read(reader, 10_000))
    content = train_gpt.load_checkpoint("resume", str(path))
    assert content["step"] in (done, done + 1), (content["step"], done)
    assert (content["model"]["w"] == content["step"]).all()
    print(done)
"""


def test_sigkill_at_any_moment_of_saving_leaves_a_loadable_checkpoint(tmp_path):
    """A process that saves without a pause is killed at 40 moments: what stands there is the last one finished, or the
    one after it, and it is whole."""
    result = subprocess.run([sys.executable, "-c", KILL_SAVERS, tmp_path / "checkpoint.pt"], capture_output=True,
                            text=True, timeout=60, env={**environment(), "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and len(result.stdout.split()) == 40, result.stderr


@pytest.mark.slow
def test_sigkill_of_a_run_that_saves_each_step(text, tmp_path):
    """The real command, killed at 5 moments and resumed from what it left, ends with the losses of a whole run."""
    options = [*SMALL, *text, "--num_steps", 300, "--save_every", 1, "--log_dir", tmp_path]
    finished(run("tiny", *options, "--run_id", "whole"))
    start = ["tiny", *options, "--run_id", "r"]
    for i in range(5):
        process = subprocess.Popen(command(*start), stdout=subprocess.DEVNULL, env=environment())
        wait_for(tmp_path, rf"/r/checkpoint.pt at step {40 * (i + 1)}/")
        time.sleep(0.011 * i)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        start = ["--resume", tmp_path / "r", "--log_dir", tmp_path]
    finished(run(*start))
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_compiled_equals_eager(text, tmp_path):
    for name in ("on", "off"):
        options = ["--num_steps", 8, "--compile", name, "--log_dir", tmp_path, "--run_id", name]
        finished(run("tiny", *SMALL, *text, *options))
    a, b = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert "torch.compile per block" in (tmp_path / "on/log.txt").read_text()
    assert max(abs(float(a[key]) - float(b[key])) for key in b) < 1e-3


@pytest.mark.slow
def test_batch_schedule_on_one_and_two_processes(text, tmp_path):
    for nproc in (1, 2):
        finished(run("tiny", *SMALL, *text, "--batch_tokens", "256,512,1024", "--log_dir", tmp_path, "--run_id", nproc,
                     nproc=nproc))
    a, b = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert a.keys() == b.keys() and max(abs(float(a[key]) - float(b[key])) for key in a) < 1e-4
