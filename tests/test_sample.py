"""tools/sample.py: the cache against none, draws against numpy, text in bytes, and checkpoints that are none."""

import dataclasses
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sample
import torch
from conftest import ROOT, SMALL, STAGED, environment, run

import train_gpt

EVERYTHING = dict(num_layers=4, windows="SLSL", val_window=24, seq_len=32, document_tokens=16, mixing="on",
                  value_tables=2, ngram_rows=512, ngram_max=3, ngram_dim=8, num_heads=2, head_dim=16)
MODELS = {"windows": EVERYTHING, "whole rows": EVERYTHING | dict(val_window=0),
          "tiny's": dict(num_layers=2, num_heads=2, head_dim=16, seq_len=32, ngram_rows=512)}


def make_model(dtype: str, **fields) -> train_gpt.GPT:
    c = train_gpt.make_config(dict(track="tiny", val_tokens=64, batch_tokens=64, dtype="float32", **fields))
    model = train_gpt.GPT(dataclasses.replace(c, dtype=dtype)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.3, generator)
    return model.to(getattr(torch, dtype))


@pytest.mark.parametrize("name, dtype, tolerance", [
    ("windows", "float64", 1e-6), ("windows", "float32", 1e-4), ("whole rows", "float64", 1e-6),
    ("tiny's", "float32", 1e-4)])
def test_the_cache_changes_nothing(name, dtype, tolerance):
    """200 tokens after three documents, past windows and seq_len, against a forward of the whole text for each."""
    model, found = make_model(dtype, **MODELS[name]), []
    text = [256, *b"a document", 256, *b"another", 256, *b"and the third, cut by no row's end"]

    def draw(logits):
        found.append(logits)
        return int(logits.argmax())
    tokens = list(sample.generate(model, text, 200, draw))
    with torch.no_grad():
        for step in [*range(0, 200, 40), 199]:
            whole = torch.tensor([text + tokens[:step]])
            logits = model.logits(model.hidden(whole, sample.context(model.config)))[0, -1, :257]
            assert (logits - found[step]).abs().max() <= tolerance
            assert dtype == "float32" or logits.argmax() == tokens[step]
    assert len(set(tokens)) > 5     # a model that repeats one token would show nothing


def test_within_a_row_the_text_sees_what_validation_sees():
    for fields in MODELS.values():
        model, found = make_model("float64", **fields), []
        text = [256, *range(97, 97 + 31)]
        next(sample.generate(model, text, 1, lambda logits, found=found: found.append(logits) or 0))
        with torch.no_grad():
            x = model.hidden(torch.tensor([text]), model.config.val_window)
        assert torch.allclose(model.logits(x)[0, -1, :257], found[0], atol=1e-6)


@pytest.mark.parametrize("temperature, top_k, top_p", [(1, 0, 1.0), (0.5, 0, 1.0), (1, 3, 1.0), (2, 0, 0.7),
                                                       (1, 4, 0.6), (0, 0, 1.0), (1e-320, 0, 1.0), (1, 0, 1e-9)])
def test_draws_have_the_probabilities_that_numpy_gives(temperature, top_k, top_p):
    logits, draws = np.array([0.3, 2.0, -1.0, 1.0, 1.6, 0.0]), 1000
    generator = torch.Generator().manual_seed(0)
    counts = np.bincount([sample.choose(torch.tensor(logits), temperature, top_k, top_p, generator)
                          for _ in range(draws)], minlength=6)
    expected = np.exp((logits - logits.max()) / max(temperature, 1e-3))
    expected /= expected.sum()
    kept, total = [], 0.0
    for token in sorted(range(6), key=lambda token: -expected[token]):
        if total < top_p and len(kept) < (top_k or 6):
            kept.append(token)
        total += expected[token]
    expected[[token for token in range(6) if token not in kept]] = 0
    expected /= expected.sum()
    assert not counts[expected == 0].any()
    assert abs(counts / draws - expected).max() < 4.5 * 0.5 / draws ** 0.5     # 4.5 deviations at least


def say(monkeypatch, capsys, *arguments, typed: bytes = b"") -> tuple[int, str, str]:
    """Returns status, stdout and stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    capsys.readouterr()
    try:
        status = sample.main() or 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_command(trained, monkeypatch, capsys):
    """Same seed, same text; prompts that are no UTF-8, several samples, a pipe of prompts."""
    def printed(*arguments, **typed):
        status, output, errors = say(monkeypatch, capsys, trained, "--tokens", 25, *arguments, **typed)
        assert (status, errors) == (0, ""), errors
        return output
    prompt = "--prompt", "Zeit für é\x1b[2J"
    first = printed("--seed", 1, *prompt)
    assert first.startswith("Zeit für é?[2J") and len(first) > 16     # a terminal obeys nothing
    assert first == printed("--seed", 1, *prompt) and first != printed("--seed", 2, *prompt)
    both = printed("--samples", 2, "--prompt", "\udcff x")
    assert both.count("? x") == 2 and both.startswith("---- sample 1 of 2\n")
    typed = printed("--interactive", "--temperature", 0, typed=b"one\ntwo \xff\n")
    assert typed.count("prompt: ") == 3 and "prompt: one" in typed and "prompt: two \ufffd" in typed


def test_characters_split_over_tokens(capsys, monkeypatch):
    """Each is printed once it is whole; what never becomes whole is one mark; the end of the text ends all."""
    tokens = [*"é€𝄞".encode(), 0xC3, ord("x"), 0xE2, 0x82, 256, ord("y")]
    monkeypatch.setattr(sample, "generate", lambda *_: iter(tokens))
    model, args = SimpleNamespace(config=train_gpt.Config(vocab_size=257)), SimpleNamespace(tokens=9)
    sample.write(model, sample.Bytes(), "", args, None)
    assert capsys.readouterr().out == "é€𝄞\ufffdx\ufffd\n"


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def break_checkpoint(path, content: dict, kind: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "malicious":
        torch.save(content | dict(step=Malicious()), path)
    elif kind in ("truncated", "empty"):
        path.write_bytes(data[:len(data) // 2 if kind == "truncated" else 0])
    elif kind != "missing":
        if kind == "unknown key":
            content["config"]["new_knob"] = 1
        elif kind == "architecture":
            content["model"] = train_gpt.GPT(train_gpt.Config(**content["config"] | dict(num_heads=3))).state_dict()
        elif kind == "value":
            content["config"]["num_layers"] = 0
        elif kind == "no parts":
            content = dict(weights=content["model"])
        content.pop("digest", None)
        digest = getattr(train_gpt, "describe", lambda content: [0, 0])(content)[1]
        torch.save(content | dict(digest=digest), path)


@pytest.mark.parametrize("kind, named", [
    ("malicious", ""), ("truncated", ""), ("empty", ""), ("missing", ""), ("unknown key", "new_knob"),
    ("architecture", "another architecture"), ("value", "num_layers"), ("no parts", "")])
def test_what_is_no_checkpoint_is_one_line(trained, tmp_path, monkeypatch, capsys, kind, named):
    copy = tmp_path / "r"
    copy.mkdir()
    (copy / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes())
    break_checkpoint(copy / "checkpoint.pt", torch.load(trained / "checkpoint.pt"), kind)
    monkeypatch.chdir(tmp_path)
    status, output, errors = say(monkeypatch, capsys, copy)
    assert status == 2 and output == "" and errors.count("\n") == 1 and errors.startswith("error: "), errors
    assert named in errors and (named == "num_layers" or str(copy) in errors) and not (tmp_path / "executed").exists()


def test_values_of_options(trained, monkeypatch, capsys):
    for option, value in (("tokens", 0), ("temperature", -1), ("temperature", "nan"), ("top_p", 0), ("top_k", -1)):
        status, _, errors = say(monkeypatch, capsys, trained, f"--{option}", value)
        assert status == 2 and errors.startswith(f"error: --{option} "), errors


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_the_real_command(text, tmp_path, nproc):
    """On the checkpoint of a real run: streams text through a pipe, and says that the source differs."""
    options = [*SMALL, *STAGED, *text, "--save_every", 20, "--log_dir", tmp_path, "--run_id", "r"]
    assert run("tiny", *options, nproc=nproc).returncode == 0
    command = [sys.executable, ROOT / "tools/sample.py", tmp_path / "r", "--tokens", "80", "--interactive"]

    def sampled():
        return subprocess.run(command, input="ab\ncd\n", capture_output=True, text=True, timeout=100, env=environment())
    first = sampled()
    assert first.returncode == 0 and first.stderr == "" and first.stdout.count("prompt: ") == 3
    log = tmp_path / "r/log.txt"
    log.write_text(log.read_text().replace("source: sha256 ", "source: sha256 f"))
    second = sampled()
    assert second.stdout == first.stdout and "read by today's" in second.stderr
