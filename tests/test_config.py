"""The file's limits, importing it, and its command line."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, run

import train_gpt


def test_lines_and_columns():
    lines = (ROOT / "train_gpt.py").read_text().splitlines()
    assert len(lines) <= 1000
    assert max(map(len, lines)) <= 120


def test_import_has_no_side_effect(tmp_path):
    """In a fresh process: no output, no file, no process group, no CUDA context, no change of torch's state."""
    code = f"""
import sys, os, signal, torch
sys.path.insert(0, {str(ROOT)!r})
sys.dont_write_bytecode = True
before = torch.get_rng_state().clone(), torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(2)
import train_gpt
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(2)
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
assert not os.listdir("."), os.listdir(".")
ours = [m for m in sys.modules.values() if os.path.dirname(getattr(m, "__file__", None) or "") == {str(ROOT)!r}]
assert {{m.__name__ for m in ours}} <= {{"train_gpt", "kernels"}}, ours
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == result.stderr == "", result.stderr


def test_help_lists_every_field_with_its_default():
    result = run("--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    for name, field in train_gpt.FIELDS.items():
        if name != "track":
            assert f"--{name} " in text and field.metadata["meaning"] in text.replace("- ", "-"), name
    assert "small 4600" in text


@pytest.mark.parametrize("arguments, message", [
    (["tiny", "--num_stpes", "5"], "--num_stpes: no such field of Config; did you mean num_steps?"),
    (["tiny", "--num_steps", "five"], "argument --num_steps: invalid int value: 'five'"),
    (["tiny", "--betas", "0.9,x"], "argument --betas: invalid numbers value: '0.9,x'"),
    (["tiny", "small"], "small: no such field of Config"),
    (["tiny", "--seed", str(2**33)], "--seed 8589934592: must be at most"),
    (["tiny", "--update_scale", "sqrt"], "argument --update_scale: invalid choice: 'sqrt'"),
    (["tinny"], "tinny: no such track; did you mean tiny?"),
    ([], "no track named"),
    (["tiny", "--lr", "-1"], "--lr -1.0: must be a finite number, not negative"),
    (["tiny", "--lr", "nan"], "--lr nan"),
    (["tiny", "--head_dim", "7"], "--head_dim 7: rotary positions turn pairs"),
    (["tiny", "--batch_tokens", "1000"], "--batch_tokens (1000,): must be a positive multiple of --seq_len"),
    (["tiny", "--run_id", "a/b"], "--run_id a/b: names a folder"),
])
def test_bad_command_lines(arguments, message, capsys):
    assert train_gpt.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_presets_and_overrides():
    tiny, small = (train_gpt.make_config(dict(track=track)) for track in ("tiny", "small"))
    assert (small.num_layers, small.model_dim, small.num_heads, small.head_dim) == (12, 768, 6, 128)
    assert (small.padded_vocab_size, small.val_tokens, small.target) == (50304, 10_485_760, 3.28)
    assert (tiny.vocab_size, tiny.val_tokens, tiny.target) == (257, 1_048_576, 1.30)
    assert train_gpt.parse_command_line(["tiny", "--batch_tokens", "256,512", "--compile"]) == dict(
        track="tiny", batch_tokens=(256, 512), compile="on")
    json.dumps(vars(small))


def test_schedules():
    """End points and monotony; the multiplier is the same for every group of every optimizer."""
    c = train_gpt.make_config(dict(track="tiny", num_steps=100, cooldown_steps=40, warmup_steps=10, final_lr_frac=0.1,
                                   momentum_start=0.8, momentum=0.9, momentum_warmup_steps=50,
                                   batch_tokens=(256, 512)))
    lr = [train_gpt.lr_multiplier(c, step) for step in range(101)]
    assert lr[0] == 0.1 and lr[9] == lr[10] == lr[60] == 1.0 and lr[80] == pytest.approx(0.55)
    assert lr[100] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(lr[60:], lr[61:], strict=False))
    momentum = [train_gpt.muon_momentum(c, step) for step in range(100)]
    assert momentum[0] == 0.8 and momentum[25] == pytest.approx(0.85) and set(momentum[50:]) == {0.9}
    assert [train_gpt.batch_rows(c, step) for step in (0, 49, 50, 99)] == [1, 1, 2, 2]
    optimizers, _ = train_gpt.make_optimizers(train_gpt.GPT(c), c)
    train_gpt.set_schedules(optimizers, c, 80)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert len(groups) == 4 and all(group["lr"] == pytest.approx(0.55 * group["base_lr"]) for group in groups)


def test_short_run_cools_down_over_all_of_it():
    c = train_gpt.make_config(dict(track="tiny", num_steps=10, cooldown_steps=150))
    assert [train_gpt.lr_multiplier(c, step) for step in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])


@pytest.mark.parametrize("rows, processes, micro_batch, expected", [
    (16, 1, 0, 16), (16, 2, 0, 8), (64, 1, 0, 16), (48, 1, 0, 16), (16, 2, 3, "give 1, 2, 4, 8, or 0"),
    (16, 3, 0, "start 1, 2, 4, 8, 16 of them"), (16, 2, 64, 8), (16, 2, 4, 4)])
def test_micro_batch(rows, processes, micro_batch, expected):
    c = train_gpt.make_config(dict(track="tiny", micro_batch=micro_batch, seq_len=256))
    if isinstance(expected, int):
        assert train_gpt.micro_batch_rows(c, rows, processes) == expected
    else:
        with pytest.raises(train_gpt.RunError, match=expected):
            train_gpt.micro_batch_rows(c, rows, processes)
