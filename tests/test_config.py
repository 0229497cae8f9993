"""Importing the trainer, its command line, and its schedules."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, run, train, unchanged

import train_gpt


def test_import_has_no_side_effect(tmp_path):
    """In a fresh process: no output, no file, no process group, no CUDA context, no change of torch's state."""
    code = f"""
import sys, os, signal, torch
sys.path.insert(0, {str(ROOT)!r})
sys.dont_write_bytecode = True
environment = dict(os.environ)
before = torch.get_rng_state().clone(), torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(2)
import train_gpt
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(2)
assert torch.equal(before[0], after[0]) and before[1:] == after[1:] and environment == dict(os.environ)
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert not os.listdir("."), os.listdir(".")
ours = [m for m in sys.modules.values() if os.path.dirname(getattr(m, "__file__", None) or "") == {str(ROOT)!r}]
assert [m.__name__ for m in ours] == ["train_gpt"], ours
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == result.stderr == "", result.stderr


def test_help_lists_every_field_and_the_tracks():
    result = run("--help")
    assert result.returncode == 0
    for name in train_gpt.Config.__dataclass_fields__:
        assert f"    {name}: " in result.stdout, name
    assert " or ".join(train_gpt.TRACKS) in result.stdout and "# learning rate" in result.stdout


@pytest.mark.parametrize("track, option, value, words", [
    ("tinny", "num_steps", "5", ["track tinny", "tiny"]),
    (None, "num_steps", "5", ["track", "tiny"]),
    ("tiny", "num_stpes", "5", ["--num_stpes", "--help"]),
    ("tiny", "num_steps", "five", ["--num_steps", "five"]),
    ("tiny", "nesterov", "maybe", ["--nesterov", "maybe", "on"]),
    ("tiny", "matrix_optimizer", "no_such_one", ["no_such_one", "muon"]),
    ("tiny", "lr", "-1", ["--lr -1.0"]),
    ("tiny", "lr", "nan", ["--lr nan"]),
    ("tiny", "num_steps", "0", ["--num_steps 0", "1 or more"]),
    ("tiny", "micro_batch", "-1", ["--micro_batch -1", "0"]),
    ("tiny", "head_dim", "7", ["--head_dim 7", "multiple of 2"]),
    ("tiny", "batch_tokens", "1000", ["--batch_tokens 1000", "multiple of 32"]),
    ("tiny", "stages", "1:8 2", ["--stages 1:8 2", "([1-9]"]),
    ("tiny", "stages", "0:8", ["--stages 0:8", "([1-9]"]),
    ("tiny", "windows", "SX", ["--windows SX", "[SL]+"]),
    ("tiny", "run_id", "a/b", ["--run_id a/b"]),
    ("tiny", "run_id", "..", ["--run_id .."]),
    ("tiny", "momentum", "1.5", ["--momentum 1.5", "below 1"]),
    ("tiny", "normuon_beta2", "1", ["--normuon_beta2 1.0", "below 1"])])
def test_bad_command_lines(track, option, value, words, text, tmp_path, capsys):
    """Each is named, with its value and what may stand there; nothing has run."""
    tracks = [track] if track else []
    assert train(*tracks, *SMALL, *text, "--log_dir", tmp_path / "logs", f"--{option}", value) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not list(tmp_path.rglob("log.txt"))


@pytest.mark.upstream
def test_schedules():
    """End points and monotony; a run that is shorter than the cool-down cools down over all of it."""
    c = train_gpt.make_config(dict(track="tiny", num_steps=100, cooldown_steps=40, warmup_steps=10,
                                   momentum_start=0.8, momentum=0.9, momentum_warmup_steps=50))
    lr = [train_gpt.lr_multiplier(c, step) for step in range(100)]
    assert lr[0] == 0.1 and lr[9] == lr[10] == lr[60] == 1.0 and lr[80] == pytest.approx(0.5)
    assert lr[99] == pytest.approx(1 / 40)
    assert all(a > b for a, b in zip(lr[60:], lr[61:], strict=False))
    momentum = [train_gpt.muon_momentum(c, step) for step in range(100)]
    assert momentum[0] == 0.8 and momentum[25] == pytest.approx(0.85) and set(momentum[50:]) == {0.9}
    c = train_gpt.make_config(dict(track="tiny", num_steps=10, cooldown_steps=150, momentum_warmup_steps=0))
    assert [train_gpt.muon_momentum(c, step) for step in (0, 5)] == [0.95, 0.95]
    assert [train_gpt.lr_multiplier(c, step) for step in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])


def test_stages():
    """Equal shares of the steps, each with its batch, window and the root of the batch in the rate."""
    c = train_gpt.make_config(dict(track="tiny", num_steps=9, cooldown_steps=0, batch_tokens=256,
                                   stages="1:32 2:64 4:0"))
    assert [train_gpt.stage(c, step) for step in range(9)] == 3 * [(1, 32)] + 3 * [(2, 64)] + 3 * [(4, 0)]
    assert [train_gpt.batch_rows(c, step) for step in range(0, 9, 3)] == [2, 4, 8]
    assert [train_gpt.lr_multiplier(c, step) for step in range(0, 8, 3)] == pytest.approx([1, 2**0.5, 2])


def test_every_group_of_every_optimizer_follows_the_schedules():
    c = train_gpt.make_config(dict(track="tiny", num_steps=100, dtype="float32"))
    optimizers, _ = train_gpt.make_optimizers(train_gpt.GPT(c), c)
    train_gpt.set_schedules(optimizers, c, 80)
    for group in [group for optimizer in optimizers.values() for group in optimizer.param_groups]:
        assert group["lr"] == pytest.approx(train_gpt.lr_multiplier(c, 80) * group["initial_lr"])
        assert group.get("momentum", train_gpt.muon_momentum(c, 80)) == train_gpt.muon_momentum(c, 80)


@pytest.mark.parametrize("share, micro_batch, expected", [
    (16, 0, 16), (8, 0, 8), (64, 0, 16), (48, 0, 16), (8, 3, 2), (8, 64, 8), (8, 4, 4)])
def test_micro_batch_on_a_cpu(share, micro_batch, expected):
    """The most that divide a process's share, up to the option or 4,096 tokens."""
    c = train_gpt.make_config(dict(track="tiny", micro_batch=micro_batch, seq_len=256))
    assert train_gpt.micro_batch_rows(c, share, torch.device("cpu")) == expected


@pytest.mark.upstream
@pytest.mark.parametrize("share, micro_batch, memory, expected", [
    (16, 0, 24e9, 2), (6, 0, 24e9, 2), (1, 0, 24e9, 1), (16, 5, 24e9, 4), (6, 0, 40e9, 6), (16, 0, 80e9, 4),
    (16, 1, 80e9, 1)])
def test_micro_batch_on_a_gpu(monkeypatch, share, micro_batch, memory, expected):
    """Of small: up to the option, or 16,384 tokens, of a GPU of 40 GB 49,152."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
    c = train_gpt.make_config(dict(track="small", micro_batch=micro_batch))
    assert train_gpt.micro_batch_rows(c, share, torch.device("cuda", 0)) == expected


def test_processes_that_do_not_divide_the_batch(monkeypatch):
    monkeypatch.setattr(train_gpt, "ranks", lambda: (0, 3))
    c = train_gpt.make_config(dict(track="tiny", batch_tokens=4096, seq_len=256))
    with unchanged(), pytest.raises(train_gpt.RunError, match="nproc_per_node 3: give a divisor of 16 rows"):
        train_gpt.set_up(c, torch.device("cpu"), {})
