"""Whole runs: the same result on any number of processes, after a resume, a second time; what stops one."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL, STAGED, command, environment, losses, run, train, unchanged, wait_for
from test_model import small_model
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

import train_gpt

RUN = [*SMALL, *STAGED, "--val_every", "1", "--save_every", "12", "--micro_batch", "2", "--run_id", "r"]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def write_checkpoint(folder: Path, content: dict) -> None:
    """As `save` does: with the digest of what it holds."""
    content = {name: value for name, value in content.items() if name != "digest"}
    torch.save(content | dict(digest=train_gpt.describe(content)[1]), folder / "checkpoint.pt")


def same(a, b) -> bool:
    """Whether two checkpoints, or parts of them, are equal to the last bit."""
    leaves = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in leaves)


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(abs(float(a[key]) - float(b[key])) for key in a)


@pytest.fixture(scope="module")
def one(text, tmp_path_factory):
    """A run of one process, with accumulation: its folder, whose checkpoint is of step 12 of 20."""
    folder = tmp_path_factory.mktemp("one")
    assert train("tiny", *RUN, *text, "--log_dir", folder) == 0
    return folder / "r"


@pytest.fixture(scope="module")
def two(text, tmp_path_factory):
    """The same of two processes over gloo, by the real command."""
    folder = tmp_path_factory.mktemp("two")
    result = run("tiny", *RUN, *text, "--log_dir", folder, nproc=2)
    assert result.returncode == 0, result.stderr
    return folder / "r"


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A second run of one process, but with no priming, which saves the end."""
    folder = tmp_path_factory.mktemp("whole")
    options = ["--prime_steps", 0, "--save_every", 20, "--log_dir", folder]
    assert train("tiny", *RUN, *text, *options) == 0
    return folder / "r"


# The same result.

def test_it_learns_and_two_processes_equal_one(one, two):
    a, b = losses(one), losses(two)
    # AdamW divides the first gradients of the mixing, which are tiny, by themselves, and their rounding with them.
    # Without it the losses are equal to the last digit.
    assert len(a) == 40 and largest_difference(a, b) < 1e-3
    assert float(a["val", 20]) < float(a["train", 1]) - 0.3


def test_gradients_that_travel_in_bfloat16(two, text, tmp_path):
    """Two processes: the first loss is the same, later ones are near, and not all of them equal."""
    options = ["--reduce_dtype", "bfloat16", "--log_dir", tmp_path]
    result = run("tiny", *RUN, *text, *options, nproc=2)
    assert result.returncode == 0, result.stderr
    a, b = losses(two), losses(tmp_path / "r")
    assert a["train", 1] == b["train", 1] and a["val", 20] != b["val", 20] and largest_difference(a, b) < 0.02


@pytest.mark.slow
def test_eight_processes_equal_one_on_a_shrunken_small(text, tmp_path):
    """Of the preset: its parts, six layers, and its three stages."""
    options = [*SMALL, *text, "--vocab_size", 257, "--document_tokens", 24, "--stages", "1:8 2:16 3:24",
               "--num_layers", 6, "--val_every", 1, "--val_window", 30, "--log_dir", tmp_path]
    for nproc in (1, 8):
        result = run("small", *options, "--run_id", nproc, nproc=nproc, timeout=400)
        assert result.returncode == 0, result.stderr
    assert largest_difference(losses(tmp_path / "1"), losses(tmp_path / "8")) < 2e-3


def test_same_seed_same_losses_and_priming_leaves_no_trace(one, whole):
    assert losses(one) == losses(whole)


def test_a_run_whose_folder_has_moved_goes_on_bit_equal(one, whole, tmp_path):
    """From step 12: the losses, and at the end every weight and every optimizer state, are those of a whole run."""
    shutil.copytree(one, tmp_path / "moved")
    assert train("--resume", tmp_path / "moved", "--save_every", 20) == 0
    assert losses(tmp_path / "moved") == losses(whole)     # which also compares the steps that were logged twice
    assert len(re.findall("^step:13/20 (?:.* )?train_loss", (tmp_path / "moved/log.txt").read_text(), re.M)) == 2
    a, b = checkpoint(whole), checkpoint(tmp_path / "moved")
    assert a.keys() == b.keys() >= {"step", "seconds", "rng", "model", "adamw", "muon"} and a["step"] == 20
    for key in a.keys() - {"seconds", "config", "digest"}:
        assert same(a[key], b[key]), key
    assert not same(a["model"], checkpoint(one)["model"])


@pytest.mark.parametrize("step", [3, 6, 7, 17])
def test_a_run_that_stops_in_any_stage_goes_on_bit_equal(step, text, whole, tmp_path, monkeypatch):
    """Inside the first, at its last step, in the second and in the third."""
    train_step = train_gpt.train_step

    def stopped(run, tokens):
        train_step(run, tokens)
        if run.step == step:
            run.signals.append(signal.SIGTERM)

    monkeypatch.setattr(train_gpt, "train_step", stopped)
    options = ["--save_every", 0, "--prime_steps", 0, "--log_dir", tmp_path]
    assert train("tiny", *RUN, *text, *options) == 128 + signal.SIGTERM
    monkeypatch.setattr(train_gpt, "train_step", train_step)
    assert train("--resume", tmp_path / "r") == 0
    assert losses(tmp_path / "r") == losses(whole)


def test_two_processes_resume_bit_equal_and_one_goes_on_with_their_checkpoint(two, tmp_path):
    """The whole run of two wrote its checkpoint at step 12."""
    result = run("--resume", two, "--log_dir", tmp_path, nproc=2)
    assert result.returncode == 0, result.stderr
    expected = {key: loss for key, loss in losses(two).items() if key[1] > 12}
    assert losses(tmp_path / "r") == expected and len(expected) == 16
    assert train("--resume", two, "--log_dir", tmp_path / "alone") == 0
    assert largest_difference(losses(tmp_path / "alone/r"), expected) < 1e-3


def test_bfloat16_follows_float32_and_is_taken_where_the_cpu_has_units(one, text, tmp_path):
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has_units = "avx512_bf16" in info or "amx_bf16" in info
    assert train("tiny", *RUN, *text, "--dtype", "auto" if has_units else "bfloat16", "--log_dir", tmp_path) == 0
    for folder, dtype in ((one, "float32"), (tmp_path / "r", "bfloat16")):
        assert f'"dtype": "{dtype}"' in (folder / "log.txt").read_text()
    assert 0 < largest_difference(losses(one), losses(tmp_path / "r")) < 0.06


@pytest.mark.upstream
def test_golden_losses_of_the_preset(text, tmp_path):
    """The first steps of the track tiny as it is, but for the text, in float32: a change of the recipe changes them.
    They were recorded on an AMD EPYC with torch 2.13; elsewhere sums may be rounded otherwise."""
    options = ["--num_steps", 8, "--val_tokens", 4096, "--dtype", "float32", "--log_dir", tmp_path, "--run_id", "r"]
    assert train("tiny", *text, *options) == 0
    found = {f"{kind} {step}": float(loss) for (kind, step), loss in losses(tmp_path / "r").items()}
    golden = Path(__file__).parent / "golden.json"
    if os.environ.get("WRITE_GOLDEN"):
        golden.write_text(json.dumps(found, indent=1) + "\n")
    assert found == pytest.approx(json.loads(golden.read_text()), abs=2e-5)


@pytest.mark.slow
def test_compiled_equals_eager(text, tmp_path):
    """All that is compiled is compiled in priming, or the summary says so."""
    size = ["--batch_tokens", 256, "--micro_batch", 4]
    for name, options in dict(on=[], off=["--compile", "off"], late=["--prime_steps", 0]).items():
        options = ["--num_steps", 8, "--compile", "on", *options, "--log_dir", tmp_path, "--run_id", name]
        result = run("tiny", *SMALL, *text, *size, *options)
        assert result.returncode == 0, result.stderr
        late = int(re.search(r"^late_compilations: (\d+)$", result.stdout, re.M)[1])
        assert (late > 0) == (name == "late")
    assert largest_difference(losses(tmp_path / "on"), losses(tmp_path / "off")) < 1e-3


def test_a_batch_of_any_size_is_averaged():
    """A fork may let the batch grow: parts of unequal size are weighted by their rows."""
    model = small_model()
    tokens = torch.randint(257, (5, 33), generator=torch.Generator().manual_seed(0))
    whole = train_gpt.accumulate_gradients(model, tokens, 5)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in trained]
    assert train_gpt.accumulate_gradients(model, tokens, 2).item() == pytest.approx(whole.item(), rel=1e-6)
    for p, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


# What a run writes.

def test_log_and_summary(one):
    source, rest = (one / "log.txt").read_text().split("\n" + "=" * 100 + "\n", 1)
    assert source + "\n" == (ROOT / "train_gpt.py").read_text()     # the log is the record
    assert json.loads(re.search(r"^config: (.*)$", rest, re.M)[1])["num_steps"] == 20
    for kind in ("train", "val"):
        assert re.search(rf"^step:12/20 (.* )?{kind}_loss:\d\.\d+ .*train_time:\d+ms step_avg:\d+\.\d+ms$", rest, re.M)
    for word in ("versions: python", "hardware: ", "source: sha256", "kernels: ", "lm_head.weight", "data sha256: "):
        assert word in rest
    summary = dict(re.findall(r"^(\w+): (.*)$", rest[rest.rindex("\nrun_id: "):], re.M))
    assert float(summary["val_loss"]) == float(losses(one)["val", 20])
    assert float(summary["tokens_per_second"]) == pytest.approx(39 * 512 / float(summary["train_seconds"]), rel=0.01)
    assert summary["target_reached"] == "false" and summary["data_comparable"] == "false"
    config = json.loads(re.search(r"^config: (.*)$", rest, re.M)[1])
    sizes = {name: p.numel() for name, p in train_gpt.GPT(train_gpt.Config(**config)).named_parameters()}
    assert int(summary["parameters"]) == sum(sizes.values())
    assert int(summary["parameters_that_multiply"]) <= sum(sizes.values()) - sizes["embed.weight"]


def test_the_data_compares_where_its_hashes_and_tokens_are_the_tracks(one, text, tmp_path):
    """With the hashes of this data given the loss compares, but not over fewer validation tokens than the track's."""
    found = re.search(r"^data sha256: train (\w+), val (\w+)$", (one / "log.txt").read_text(), re.M)
    hashes = ["--sha256", f"{found[1][:16]} {found[2][:16]}"]
    for options, expected in [(hashes, "false"), (["--sha256", ""], "null")]:
        options = [*SMALL, *text, *options, "--num_steps", 2, "--log_dir", tmp_path, "--run_id", expected]
        assert train("tiny", *options) == 0
        assert f"\ndata_comparable: {expected}\n" in (tmp_path / expected / "log.txt").read_text()


def test_the_loss_on_a_second_text_stands_beside_the_tracks(one, text, tmp_path):
    """That of the validation rows, given as the second text, is the validation loss; of none it is nan."""
    shutil.copytree(text[1], tmp_path / "data")
    (tmp_path / "data/second").mkdir()
    shutil.copy(tmp_path / "data/val_000000.bin", tmp_path / "data/second/0.bin")
    options = [*SMALL, "--data", tmp_path / "data"]
    c = train_gpt.make_config(train_gpt.parse_command_line(["tiny", *map(str, options)]))
    count = train_gpt.Rows("*val_*.bin", c, 1).count
    options += ["--val_tokens", 32 * count, "--num_steps", 2, "--log_dir", tmp_path, "--run_id", "r"]
    assert train("tiny", *options) == 0
    log = (tmp_path / "r/log.txt").read_text()
    assert re.search(r"^second_loss: (\d.*)$", log, re.M)[1] == re.search(r"^val_loss: (\d.*)$", log, re.M)[1]
    assert "\nsecond_loss: nan\n" in (one / "log.txt").read_text()


def test_a_fork_adds_a_part_to_the_state_and_a_figure_to_the_log(text, tmp_path, monkeypatch):
    """An average of the weights is saved, restored after priming, and resumed; the readers of logs take the figure."""
    set_up, train_step, averages = train_gpt.set_up, train_gpt.train_step, []

    def forked_set_up(*arguments):
        run = set_up(*arguments)
        averages.append(AveragedModel(run.model))
        run.saved["average"] = averages[-1]
        return run

    def forked_step(run, tokens):
        train_step(run, tokens)
        averages[-1].update_parameters(run.model)
        run.unread[-1] = dict(three=torch.tensor(3.0), **run.unread[-1])

    monkeypatch.setattr(train_gpt, "set_up", forked_set_up)
    monkeypatch.setattr(train_gpt, "train_step", forked_step)
    assert train("tiny", *RUN, *text, "--log_dir", tmp_path) == 0
    assert train("--resume", tmp_path / "r", "--log_dir", tmp_path / "again") == 0
    assert averages[0].n_averaged == 20 and same(averages[0].state_dict(), averages[1].state_dict())
    assert not same(averages[0].module.state_dict(), checkpoint(tmp_path / "r")["model"])
    assert re.search(r"^step:3/20 three:3\.0+ (?:.* )?train_loss:\S+ ", (tmp_path / "r/log.txt").read_text(), re.M)
    read = runs.read_log(tmp_path / "r")
    assert read.losses["train"].keys() == set(range(1, 21)) and read.finished


def test_validation_is_a_plain_cross_entropy_whatever_is_trained_on(text, tmp_path, monkeypatch):
    """Of float64 sums over single rows. A training loss that is another, and a layer that drops out in training alone,
    do not move it. All batches have one size, although 7 does not divide 40 rows."""
    options = ["tiny", *SMALL, *text, "--val_tokens", "1280", "--log_dir", str(tmp_path)]
    c, sizes = train_gpt.make_config(train_gpt.parse_command_line(options)), []
    with unchanged(), torch.no_grad():
        run = train_gpt.set_up(c, torch.device("cpu"), {})
        for p in run.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
        rows, hidden = range(c.val_tokens // c.seq_len), run.model.hidden
        total = 0.0
        for i in rows:
            tokens = run.val_rows.read([i]).to(torch.int64)
            logits = run.model.logits(hidden(tokens[:, :-1]))[0].double()
            total += F.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        monkeypatch.setattr(run.model, "loss", lambda x, targets: x.sum())
        monkeypatch.setattr(run.model, "hidden",
                            lambda *given: F.dropout(hidden(*given), 0.5, run.model.training))
        assert not torch.equal(run.model.hidden(tokens), hidden(tokens))
        run.micro_batch, plain = 7, run.validation_loss
        run.validation_loss = lambda model, x, targets: sizes.append(len(x)) or plain(model, x, targets)
        assert train_gpt.evaluate(run, run.val_rows, rows) == pytest.approx(total / c.val_tokens, rel=1e-6)
        assert sizes == [7] * 5 + [5]
        assert run.model.training


# What stops a run.

def test_a_signal_saves_and_a_resume_goes_on(text, tmp_path):
    """Stopped at some step by a signal, all ranks save the same step; resumed in place, the log has no gap."""
    process = subprocess.Popen(
        command("tiny", *SMALL, *text, "--num_steps", 150, "--log_dir", tmp_path, "--run_id", "r", nproc=2),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(tmp_path / "r/log.txt", r"^step:5/")
    for _ in range(2):     # as a batch system does, which signals each process of a job
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    step = int(re.search(r"stopped at step (\d+)/150", output)[1])
    assert checkpoint(tmp_path / "r")["step"] == step < 150, errors
    assert train("--resume", tmp_path / "r") == 0
    assert sorted(step for kind, step in losses(tmp_path / "r") if kind == "train") == list(range(1, 151))


def test_resume_rejects_what_would_change_the_run(one, text, tmp_path, capsys):
    for name in ("damaged", "older", "other"):
        (tmp_path / name).mkdir()
    for name in ("train", "val"):     # each with the other's tokens
        source = {"train": "val", "val": "train"}[name]
        shutil.copy(Path(text[1], f"{source}_000000.bin"), tmp_path / f"other/{name}_000000.bin")
    (tmp_path / "damaged/checkpoint.pt").write_bytes((one / "checkpoint.pt").read_bytes()[:5000])
    content = checkpoint(one)
    write_checkpoint(tmp_path / "older", content | dict(config=content["config"] | dict(gone=1)))
    before = sorted(tmp_path.rglob("*"))
    for folder, arguments, words in (
            (one, ["--lr", "0.5"], ["--lr 0.5", str(content["config"]["lr"]), "leave it out"]),
            (one, ["small"], ["--track small", "tiny"]),
            (one, ["--data", tmp_path / "other"], ["--resume", "other data"]),
            (tmp_path / "none", [], [f"--resume {tmp_path}/none", "checkpoint"]),
            (tmp_path / "older", [], [f"--resume {tmp_path}/older", "version"]),
            (tmp_path / "damaged", [], ["checkpoint.pt", "give a run that has a whole one"])):
        assert train(*arguments, "--resume", folder, "--log_dir", tmp_path) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and all(word in message for word in words), message
        assert sorted(tmp_path.rglob("*")) == before     # nothing was written


def test_a_run_folder_is_never_overwritten(one, text, capsys):
    before = (one / "log.txt").read_bytes()
    assert train("tiny", *RUN, *text, "--log_dir", one.parent) == 2
    assert "--run_id r" in capsys.readouterr().err
    assert (one / "log.txt").read_bytes() == before


def test_a_validation_set_smaller_than_a_micro_batch(text, tmp_path):
    """Priming takes no more rows than there are: 2 of 256 here, where 4 would run at once."""
    for name, source in dict(train="train_000000", val="train_000001").items():
        shutil.copy(Path(text[1], f"{source}.bin"), tmp_path / f"{name}_0.bin")
    options = ["--data", tmp_path, "--seq_len", 2048, "--batch_tokens", 8192, "--micro_batch", 4, "--val_tokens", 2048]
    assert train("tiny", *SMALL, *options, "--num_steps", 1, "--log_dir", tmp_path, "--run_id", "r") == 0


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_checkpoint(what, text, tmp_path, monkeypatch, capsys):
    step = train_gpt.train_step

    def broken(run, tokens):
        step(run, tokens)
        if run.step == 2 and what == "loss":
            run.unread[-1]["train_loss"] *= math.nan
        elif run.step == 2:     # its loss is finite still
            run.model.lm_head.weight.data[0, 0] = math.inf

    monkeypatch.setattr(train_gpt, "train_step", broken)
    options = ["--save_every", 1, "--val_every", 0, "--prime_steps", 0, "--log_dir", tmp_path, "--run_id", "r"]
    assert train("tiny", *SMALL, *text, *options) == 2
    message = capsys.readouterr().err
    assert "step 2" in message and "not finite; lower --lr" in message and checkpoint(tmp_path / "r")["step"] == 1


KILL_SAVERS = """
import itertools, os, signal, sys, time, torch, train_gpt
from pathlib import Path
from types import SimpleNamespace
folder, last = Path(sys.argv[1]), 0
c = train_gpt.Config(num_steps=1)
model = torch.nn.Linear(50_000, 1, bias=False)
run = SimpleNamespace(folder=folder, config=c, sha256={}, seconds=0.0, model=model, saved=dict(model=model))
for i in range(40):
    child = os.fork()
    if child == 0:
        for run.step in itertools.count(last + 1):
            model.weight.data.fill_(run.step)
            train_gpt.save(run)
            (folder / str(run.step)).touch()
    while not (folder / str(last + 1)).exists():
        time.sleep(0.0001)
    time.sleep(0.0007 * i)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    content = train_gpt.load_checkpoint(folder)
    assert content["step"] > last and (content["model"]["weight"] == content["step"]).all()
    last = content["step"]
    print("last", last, file=sys.stderr, flush=True)
"""


def test_sigkill_at_any_moment_of_saving_leaves_a_loadable_checkpoint(tmp_path):
    """A process that saves without a pause is killed at 40 moments: what it leaves is whole, and the newest."""
    result = subprocess.run([sys.executable, "-c", KILL_SAVERS, tmp_path], capture_output=True, text=True, timeout=60,
                            env={**environment(), "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0 and len(re.findall("^last", result.stderr, re.M)) == 40, result.stderr
