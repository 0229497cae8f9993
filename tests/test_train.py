"""Whole runs: the same result on any number of processes, after a resume, a second time; what stops one."""

import copy
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

import pytest
import torch
from conftest import ROOT, SMALL, command, environment, losses, one_thread, run, train
from test_distributed import wait_for

import train_gpt

RUN = [*SMALL, "--val_every", "1", "--save_every", "12", "--micro_batch", "2", "--run_id", "r", "--metrics_every", "5"]


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """A run of one process, with accumulation: its folder, whose checkpoint is of step 12 of 20."""
    folder = tmp_path_factory.mktemp("one")
    assert train("tiny", *RUN, *text, "--log_dir", folder) == 0
    return folder / "r"


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    """The same of two processes over gloo, with accumulation too, by the real command."""
    folder = tmp_path_factory.mktemp("two")
    result = run("tiny", *RUN, *text, "--log_dir", folder, nproc=2)
    assert result.returncode == 0, result.stderr
    return folder / "r"


def test_two_processes_equal_one(one, two):
    a, b = losses(one), losses(two)
    assert a.keys() == b.keys() and len(a) == 40
    assert max(abs(float(a[key]) - float(b[key])) for key in a) < 1e-4


def test_it_learns(one):
    found = losses(one)
    assert float(found["val", 20]) < float(found["train", 1]) - 0.3


def same(a, b) -> bool:
    """Whether two checkpoints' contents are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (dict, list, tuple)):
        keys = a.keys() if isinstance(a, dict) else range(len(a))
        return len(a) == len(b) and all(same(a[key], b[key]) for key in keys)
    return a == b


@pytest.fixture(scope="module")
def whole(one, text, tmp_path_factory):
    """A second run with the same seed, but with no priming and no metrics, which saves the end."""
    folder = tmp_path_factory.mktemp("whole")
    options = ["--prime_steps", 0, "--metrics_every", 0, "--save_every", 20, "--log_dir", folder]
    assert train("tiny", *RUN, *text, *options) == 0
    return folder / "r"


def test_same_seed_same_losses_and_priming_and_metrics_leave_no_trace(one, whole):
    assert losses(one) == losses(whole)
    assert "\nmetrics: " in (one / "log.txt").read_text() and "\nmetrics: " not in (whole / "log.txt").read_text()


def test_another_seed_another_loss(one, text, tmp_path):
    assert train("tiny", *RUN, *text, "--seed", 1, "--log_dir", tmp_path) == 0
    assert losses(tmp_path / "r")["val", 20] != losses(one)["val", 20]


def test_resume_is_bit_equal(one, whole, tmp_path):
    """From step 12: the losses, and at the end every weight and every optimizer state, are those of a whole run."""
    assert train("--resume", one, "--log_dir", tmp_path, "--save_every", 20) == 0
    resumed = losses(tmp_path / "r")
    assert resumed == {key: loss for key, loss in losses(whole).items() if key[1] > 12} and len(resumed) == 16
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, tmp_path / "r"))
    assert a.keys() == b.keys() >= {"step", "seconds", "rng", "model", "adamw", "muon"}
    for key in a.keys() - {"seconds", "config"}:
        assert same(a[key], b[key]), key
    assert a["step"] == 20 and not same(a["model"], torch.load(one / "checkpoint.pt", weights_only=True)["model"])


def test_two_processes_resume_bit_equal_and_one_goes_on_with_their_checkpoint(two, tmp_path):
    """The whole run of two wrote its checkpoint at step 12."""
    result = run("--resume", two, "--log_dir", tmp_path, nproc=2)
    assert result.returncode == 0, result.stderr
    expected = {key: loss for key, loss in losses(two).items() if key[1] > 12}
    assert losses(tmp_path / "r") == expected and len(expected) == 16
    assert train("--resume", two, "--log_dir", tmp_path / "alone") == 0
    alone = losses(tmp_path / "alone/r")
    assert alone.keys() == expected.keys()
    assert max(abs(float(loss) - float(expected[key])) for key, loss in alone.items()) < 1e-4


def test_a_checkpoint_is_exactly_the_state_and_a_new_part_joins_by_one_line(text, tmp_path, monkeypatch):
    """An average of the weights that a fork adds to the state is saved, restored after priming, and resumed."""
    class Average:
        def __init__(self, model):
            self.model, self.sum = model, 0.0

        def add(self):
            self.sum += sum(p.detach().double().sum().item() for p in self.model.parameters())

        def state_dict(self):
            return dict(sum=self.sum)

        def load_state_dict(self, content):
            self.sum = content["sum"]

    set_up, train_step, averages = train_gpt.set_up, train_gpt.train_step, []

    def forked_set_up(*arguments):
        state = set_up(*arguments)
        state.state.parts["average"] = Average(state.model)
        averages.append(state.state.parts["average"])
        return state

    def forked_step(state, tokens):
        train_step(state, tokens)
        averages[-1].add()

    monkeypatch.setattr(train_gpt, "set_up", forked_set_up)
    monkeypatch.setattr(train_gpt, "train_step", forked_step)
    assert train("tiny", *RUN, *text, "--log_dir", tmp_path) == 0
    saved = torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)
    assert saved["average"]["sum"] != 0
    assert train("--resume", tmp_path / "r", "--log_dir", tmp_path / "again") == 0
    assert averages[0].sum == averages[1].sum


@pytest.mark.parametrize("number, nproc", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_a_resume_goes_on(number, nproc, text, tmp_path):
    """Stopped at some step by a signal, all ranks save the same step; resumed in place, the log has no gap."""
    process = subprocess.Popen(
        command("tiny", *SMALL, *text, "--num_steps", 300, "--log_dir", tmp_path, "--run_id", "r", nproc=nproc),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(tmp_path, r"^step:5/")
    process.send_signal(number)
    if number == signal.SIGTERM:
        process.send_signal(number)     # as a batch system does, which signals each process of a job
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and (nproc > 1 or process.returncode == 128 + number)
    step = int(re.search(r"stopped at step (\d+)/300", output)[1])
    assert torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["step"] == step < 300, errors
    assert train("--resume", tmp_path / "r") == 0
    assert sorted(step for kind, step in losses(tmp_path / "r") if kind == "train") == list(range(1, 301))


def test_resume_rejects_what_would_change_the_run(one, text, tmp_path, capsys):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/checkpoint.pt").write_bytes((one / "checkpoint.pt").read_bytes()[:5000])
    content = torch.load(one / "checkpoint.pt", weights_only=True)
    (tmp_path / "older").mkdir()
    torch.save(content | dict(config=content["config"] | dict(gone=1)), tmp_path / "older/checkpoint.pt")
    for folder, arguments, words in (
            (one, ["--lr", "0.5"], ["--lr 0.5", "0.002", "leave it out"]),
            (one, ["small"], ["--track small", "tiny"]),
            (one, ["--val_files", text[1]], ["--resume", "other data"]),
            (tmp_path / "none", [], [f"--resume {tmp_path}/none", "checkpoint"]),
            (tmp_path / "older", [], [f"--resume {tmp_path}/older", "version"]),
            (tmp_path / "damaged", [], ["checkpoint.pt", "give the folder of a run"])):
        before = sorted(tmp_path.rglob("*"))
        assert train(*arguments, "--resume", folder, "--log_dir", tmp_path) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and all(word in message for word in words), message
        assert sorted(tmp_path.rglob("*")) == before     # nothing was written


def test_log_and_summary(one):
    log = (one / "log.txt").read_text()
    source, rest = log.split("\n" + "=" * 100 + "\n", 1)
    assert source + "\n" == (ROOT / "train_gpt.py").read_text()     # the log is the record
    assert json.loads(re.search(r"^config: (.*)$", rest, re.M)[1])["num_steps"] == 20
    assert re.search(r"^step:12/20 train_loss:\d\.\d+ .*train_time:\d+ms step_avg:\d+\.\d+ms$", rest, re.M)
    assert re.search(r"^step:12/20 val_loss:\d\.\d+ .*train_time:\d+ms step_avg:\d+\.\d+ms$", rest, re.M)
    for word in ("versions: python", "hardware: ", "source: sha256", "kernels: ", "lm_head.weight", "data sha256: "):
        assert word in rest
    summary = dict(re.findall(r"^(\w+): (.*)$", rest[rest.rindex("\nrun_id: "):], re.M))
    assert float(summary["val_loss"]) == float(losses(one)["val", 20])
    assert float(summary["tokens_per_second"]) == pytest.approx(20 * 512 / float(summary["train_seconds"]), rel=0.01)
    assert summary["target_reached"] == "false" and summary["data_comparable"] == "false"


def test_the_data_compares_where_its_hashes_and_tokens_are_the_tracks(one, text, tmp_path):
    """With the hashes of this data given the loss compares, but not over fewer validation tokens than the track's."""
    found = re.search(r"^data sha256: train (\w+), val (\w+)$", (one / "log.txt").read_text(), re.M)
    hashes = ["--train_sha256", found[1], "--val_sha256", found[2]]
    for options, expected in [(hashes, "false"), (["--val_sha256", ""], "null")]:
        options = [*SMALL, *text, *options, "--num_steps", 2, "--log_dir", tmp_path, "--run_id", expected]
        assert train("tiny", *options) == 0
        assert f"\ndata_comparable: {expected}\n" in (tmp_path / expected / "log.txt").read_text()


def test_metrics_of_the_optimizers(one, two):
    """Every fifth step of the run, the same of one and of two processes."""
    a, b = ([json.loads(line) for line in re.findall("^metrics: (.*)$", (folder / "log.txt").read_text(), re.M)]
            for folder in (one, two))
    assert [line["step"] for line in a] == [line["step"] for line in b] == [5, 10, 15, 20]
    assert a[1]["parameters"].keys() == b[1]["parameters"].keys() > {"blocks.0.attention.qkv.weight"}
    for name, figures in a[1]["parameters"].items():
        assert figures == pytest.approx(b[1]["parameters"][name], rel=0.02, abs=1e-4)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(one, text, tmp_path, capsys):
    """A scale that overflows fp32 makes the first loss NaN; weights that overflow it, put into a checkpoint, the first
    loss after a resume, which must leave the checkpoint as it is."""
    options = [*SMALL, *text, "--save_every", 1, "--log_dir", tmp_path, "--run_id", "s"]
    assert train("tiny", *options, "--attention_scale", 3e38) == 2
    message = capsys.readouterr().err
    assert "step 1" in message and "nan" in message and "lower --lr" in message
    assert not (tmp_path / "s/checkpoint.pt").exists()
    content = torch.load(one / "checkpoint.pt", weights_only=True)
    for name in ("up", "proj"):
        content["model"][f"blocks.0.mlp.{name}.weight"] *= 1e30
    (tmp_path / "r").mkdir()
    torch.save(content, tmp_path / "r/checkpoint.pt")
    before = (tmp_path / "r/checkpoint.pt").read_bytes()
    assert train("--resume", tmp_path / "r", "--save_every", 1) == 2
    assert "step 13" in capsys.readouterr().err
    assert (tmp_path / "r/checkpoint.pt").read_bytes() == before


def test_weights_that_are_not_finite_are_not_saved(text, tmp_path, monkeypatch, capsys):
    """The loss of the step is finite still; the update made a weight infinite."""
    step = train_gpt.train_step

    def broken(state, tokens):
        step(state, tokens)
        if state.state.step == 2:
            state.model.blocks[0].mlp.up.weight.data[0, 0] = math.inf

    monkeypatch.setattr(train_gpt, "train_step", broken)
    options = ["--save_every", 1, "--val_every", 0, "--prime_steps", 0, "--log_dir", tmp_path, "--run_id", "r"]
    assert train("tiny", *SMALL, *text, *options) == 2
    assert "step 2" in capsys.readouterr().err
    assert torch.load(tmp_path / "r/checkpoint.pt", weights_only=True)["step"] == 1


def test_a_resume_goes_on_in_the_folder_of_its_checkpoint(one, tmp_path):
    shutil.copytree(one, tmp_path / "moved")
    assert train("--resume", tmp_path / "moved") == 0
    assert len(losses(tmp_path / "moved")) == 40


def test_a_run_folder_is_never_overwritten(one, text, capsys):
    before = (one / "log.txt").read_bytes()
    assert train("tiny", *RUN, *text, "--log_dir", one.parent) == 2
    assert "--run_id r" in capsys.readouterr().err
    assert (one / "log.txt").read_bytes() == before


def test_a_validation_set_smaller_than_a_micro_batch(text, tmp_path):
    """Priming takes no more rows than there are: 2 of 256 here, where 4 would run at once."""
    options = ["--train_files", text[1], "--val_files", text[1].replace("train_*", "train_000001"),
               "--seq_len", 2048, "--batch_tokens", 8192, "--micro_batch", 4, "--val_tokens", 2048]
    assert train("tiny", *SMALL, *options, "--num_steps", 1, "--log_dir", tmp_path, "--run_id", "r") == 0


def test_validation_needs_its_tokens(text, tmp_path, capsys):
    assert train("tiny", *SMALL, *text, "--val_tokens", 2**20, "--log_dir", tmp_path / "logs") == 2
    assert f"--val_tokens {2**20}" in capsys.readouterr().err and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("optimizer", ["orthogonal_nesterov", "adamw"])
def test_the_other_matrix_optimizers_learn_and_resume(optimizer, text, tmp_path):
    assert train("tiny", *RUN, *text, "--matrix_optimizer", optimizer, "--log_dir", tmp_path) == 0
    whole = losses(tmp_path / "r")
    assert train("--resume", tmp_path / "r", "--log_dir", tmp_path / "again") == 0
    assert losses(tmp_path / "again/r") == {key: loss for key, loss in whole.items() if key[1] > 12}
    assert float(whole["val", 20]) < float(whole["train", 1]) - 0.1


def test_bfloat16_follows_float32_and_is_taken_where_the_cpu_has_units(one, text, tmp_path):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has_units = "avx512_bf16" in info or "amx_bf16" in info
    dtype = "auto" if has_units else "bfloat16"
    assert train("tiny", *RUN, *text, "--dtype", dtype, "--log_dir", tmp_path) == 0
    for folder, dtype in ((one, "float32"), (tmp_path / "r", "bfloat16")):
        assert f'"dtype": "{dtype}"' in (folder / "log.txt").read_text()
    a, b = losses(one), losses(tmp_path / "r")
    assert 0 < max(abs(float(a[key]) - float(b[key])) for key in a) < 0.02


def test_validation_is_a_plain_cross_entropy_whatever_is_trained_on(text, tmp_path, monkeypatch):
    """A z-loss in the training loss, and a layer that drops out in training alone, do not move the target."""
    c = train_gpt.make_config(train_gpt.parse_command_line(["tiny", *SMALL, *text, "--log_dir", str(tmp_path)]))
    with one_thread():
        state = train_gpt.set_up(c, torch.device("cpu"), {})
        with torch.no_grad():
            for p in state.model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
        rows = range(c.val_tokens // c.seq_len)
        plain = train_gpt.evaluate(state, rows)

        def z_loss(x_BTD, targets_BT):
            logits = state.model.logits(x_BTD)
            cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())
            return cross_entropy + 0.1 * logits.logsumexp(-1).square().mean()

        hidden = state.model.hidden

        def dropping(tokens):
            return torch.nn.functional.dropout(hidden(tokens), 0.5, state.model.training)

        monkeypatch.setattr(state.model, "loss", z_loss)
        monkeypatch.setattr(state.model, "hidden", dropping)
        tokens = state.val_rows.read(range(4)).to(torch.int64)
        assert state.model(tokens[:, :-1], tokens[:, 1:]).item() > plain + 0.1
        assert train_gpt.evaluate(state, rows) == plain and state.model.training
    # Against float64 sums over single rows.
    total = 0.0
    for i in rows:
        tokens = state.val_rows.read([i]).to(torch.int64)
        with torch.no_grad():
            logits = state.model.logits(hidden(tokens[:, :-1])).double()
        total += torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
    assert plain == pytest.approx(total / c.val_tokens, rel=1e-6)


def test_a_new_quantity_is_logged_by_one_entry(text, tmp_path, monkeypatch):
    """As a fork would add the norm of the gradient: it is printed with the loss, and the readers of logs take it."""
    from logs import read_log
    step = train_gpt.train_step

    def with_norm(state, tokens):
        step(state, tokens)
        state.unread[-1] = dict(three=torch.tensor(3.0), **state.unread[-1])

    monkeypatch.setattr(train_gpt, "train_step", with_norm)
    assert train("tiny", *SMALL, *text, "--num_steps", 3, "--log_dir", tmp_path, "--run_id", "r") == 0
    text = (tmp_path / "r/log.txt").read_text()
    assert re.search(r"^step:3/3 three:3\.0+ train_loss:\S+ ", text, re.M)
    log = read_log(tmp_path / "r")
    assert log.losses["train"].keys() == {1, 2, 3} and log.finished


GOLDEN = Path(__file__).parent / "golden.json"


def test_golden_losses_of_the_preset(text, tmp_path):
    """The first steps of the track tiny as it is, but for the text, in float32: a change of the recipe changes them.
    They were recorded on an AMD EPYC with torch 2.13; elsewhere sums may be rounded otherwise."""
    options = ["--num_steps", 8, "--val_tokens", 4096, "--dtype", "float32", "--log_dir", tmp_path, "--run_id", "r"]
    assert train("tiny", *text, *options) == 0
    found = {f"{kind} {step}": float(loss) for (kind, step), loss in losses(tmp_path / "r").items()}
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), abs=2e-5)


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
            train_gpt.save_checkpoint(path, dict(step=step, config=dict(), model=dict(w=weights)))
            os.write(writer, b"x")
    os.close(writer)
    done = len(os.read(reader, 1))
    time.sleep(0.0007 * i)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done += len(os.read(reader, 10_000))
    content = train_gpt.load_checkpoint(str(path.parent))
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
    assert run("tiny", *options, "--run_id", "whole").returncode == 0
    start = ["tiny", *options, "--run_id", "r"]
    for i in range(5):
        process = subprocess.Popen(command(*start), stdout=subprocess.DEVNULL, env=environment())
        wait_for(tmp_path, rf"/r/checkpoint.pt at step {40 * (i + 1)}/")
        time.sleep(0.011 * i)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        start = ["--resume", tmp_path / "r"]
    assert run(*start).returncode == 0
    assert losses(tmp_path / "r") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_compiled_equals_eager(text, tmp_path):
    for name in ("on", "off"):
        options = ["--num_steps", 8, "--compile", name, "--log_dir", tmp_path, "--run_id", name]
        result = run("tiny", *SMALL, *text, *options)
        assert result.returncode == 0, result.stderr
    a, b = losses(tmp_path / "on"), losses(tmp_path / "off")
    assert max(abs(float(a[key]) - float(b[key])) for key in b) < 1e-3


def test_a_batch_of_any_size_is_averaged(text):
    """A fork may let the batch grow: parts of unequal size are weighted by their rows."""
    model = train_gpt.GPT(train_gpt.make_config(dict(track="tiny", dtype="float32", num_layers=1))).initialize()
    tokens = torch.randint(257, (5, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    gradients = []
    for size in (5, 2):
        loss = train_gpt.accumulate_gradients(model, tokens, size)
        gradients.append((loss.item(), copy.deepcopy([p.grad for p in model.parameters()])))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for a, b in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
