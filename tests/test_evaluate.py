"""tools/evaluate.py: the run's own loss, bits a byte, and HellaSwag, against sums that do not use its code."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, STAGED, environment, run
from test_sample import make_model

import train_gpt


def figures(output: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"^(\w+): (\d+\.?\d*)(?: |$)", output, re.M)}


def scored(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    capsys.readouterr()
    try:
        status = evaluate.main() or 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_loss_is_the_runs_own_and_bits_are_of_bytes(trained, text, monkeypatch, capsys):
    status, output, errors = scored(monkeypatch, capsys, trained)
    found, logged = figures(output), re.findall(r"^val_loss: (\S+)", (trained / "log.txt").read_text(), re.M)
    assert status == 0, errors
    assert found["val_loss"] == pytest.approx(float(logged[-1]), abs=1.01e-6) == found["val_loss_in_log"]
    shard = np.fromfile(Path(text[1], "val_000000.bin"), "<u2")[512:]
    targets = shard[1:2049]     # SMALL's val_tokens: rows without a gap
    assert found["bytes"] == (targets < 256).sum() < 2048
    assert found["bits_per_byte"] == pytest.approx(found["val_loss"] * 2048 / math.log(2) / found["bytes"], abs=2e-5)
    assert found["perplexity"] == pytest.approx(2.718281828 ** found["val_loss"], rel=1e-4)

    other = figures(scored(monkeypatch, capsys, trained, "--shards", "*train_*.bin", "--val_tokens", 70)[1])
    tokens = torch.from_numpy(np.fromfile(Path(text[1], "train_000000.bin"), "<u2")[512:][:65].astype(int))
    c = train_gpt.Config(**torch.load(trained / "checkpoint.pt")["config"])
    model = train_gpt.GPT(c)
    model.load_state_dict(torch.load(trained / "checkpoint.pt")["model"])
    with torch.no_grad():     # each row of 32 by itself
        rows = torch.stack([tokens[:33], tokens[32:]])
        logs = model.logits(model.hidden(rows[:, :-1], c.val_window)).double().log_softmax(-1)
    loss = -logs.gather(2, rows[:, 1:, None]).mean().item()
    assert other["val_loss"] == pytest.approx(loss, abs=2e-6) and "val_loss_in_log" not in other


def test_hellaswag_knows_the_right_ending(monkeypatch, capsys):
    """A model that makes the letter after a, b, c... by far the most likely is right where the alphabet goes on."""
    model = make_model("float32", num_layers=1, num_heads=2, head_dim=128, seq_len=32, ngram_rows=0, document_tokens=8)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.proj.weight.zero_()
            block.mlp.proj.weight.zero_()
        torch.nn.init.eye_(model.embed.weight)     # a channel for each byte
        model.lm_head.weight.zero_()
        model.lm_head.weight[98:123] = model.embed.weight[97:122]
        model.lm_head.weight[97] = model.embed.weight[32]     # a word begins with a
    questions = [("see", ["zzz", "abcd", "axe", "qrst"], 1), ("it", ["abc", "xyz", "zyx", "mmm"], 0)]
    evaluate.score_hellaswag(model, questions)
    out = capsys.readouterr().out
    assert "hellaswag_acc: 1.0000" in out and "hellaswag_acc_norm: 1.0000" in out
    evaluate.score_hellaswag(model, [(text, endings, 2) for text, endings, _ in questions])
    assert "hellaswag_acc: 0.0000" in capsys.readouterr().out


def test_log_probabilities_and_both_choices_against_a_direct_computation(capsys):
    """Endings of other lengths, one by one in float64, without a batch, padding or the tool's window."""
    model = make_model("float64", num_layers=2, num_heads=2, head_dim=16, seq_len=32, ngram_rows=512, document_tokens=8)
    random, questions, right, right_norm = np.random.default_rng(0), [], 0, 0
    for _ in range(4):
        text = "".join(map(chr, random.integers(97, 123, 6)))
        endings = ["".join(map(chr, random.integers(97, 123, size))) for size in (2, 5, 9, 14)]
        sums = []
        for ending in endings:
            ids = [256, *f"{text} {ending}".encode()]
            total = 0.0
            for place in range(len(text) + 1, len(ids)):
                with torch.no_grad():
                    logits = model.logits(model.hidden(torch.tensor([ids[:place]])))[0, -1].double()
                total += (logits[ids[place]] - logits.logsumexp(0)).item()
            sums.append(total)
        found = evaluate.log_probabilities(model, [256, *text.encode()], [list(f" {e}".encode()) for e in endings])
        assert found == pytest.approx(sums, abs=1e-4)
        label = int(random.integers(4))
        questions.append((text, endings, label))
        right += int(np.argmax(sums)) == label
        right_norm += int(np.argmax([total / len(e) for total, e in zip(sums, endings, strict=True)])) == label
    evaluate.score_hellaswag(model, questions)
    found = figures(capsys.readouterr().out)
    assert (found["hellaswag_acc"], found["hellaswag_acc_norm"]) == (right / 4, right_norm / 4)


LINE = dict(activity_label="Roof", ctx_a="A man sits.", ctx_b="he", ctx="A man sits. he", label=1,
            endings=["jumps [substeps] up.", "sits [title] Then stands."])


def test_questions_of_a_file_and_of_the_hub(tmp_path, monkeypatch):
    """The Hub is not there: the client is asked for the right file, and its Parquet is read."""
    import huggingface_hub
    import pyarrow
    from pyarrow import parquet
    expected = [("Roof: A man sits. He", ["jumps up.", "sits. Then stands."], 1)]
    (tmp_path / "q.jsonl").write_text(json.dumps(LINE) + "\n")
    assert evaluate.load_questions(str(tmp_path / "q.jsonl")) == expected
    (tmp_path / "q.jsonl").write_text(json.dumps(dict(ctx="A b", endings=["c", "d"], label="0")))
    assert evaluate.load_questions(str(tmp_path / "q.jsonl")) == [("A b", ["c", "d"], 0)]
    parquet.write_table(pyarrow.Table.from_pylist([LINE | dict(label="1")]), tmp_path / "q.parquet")
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *names, **more: asked.append((names, more)) or tmp_path / "q.parquet")
    assert evaluate.load_questions("Rowan/hellaswag") == expected and asked[0][0][0] == "Rowan/hellaswag"


def test_errors_are_one_line(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "none.jsonl").write_text("")
    for arguments in (["--data", tmp_path], ["--val_tokens", 0], ["--hellaswag", tmp_path / "bad.jsonl"],
                      ["--hellaswag", tmp_path / "none.jsonl"]):
        status, output, errors = scored(monkeypatch, capsys, trained, *arguments)
        assert status == 2 and output == "" and errors.count("\n") == 1, errors
        assert errors.startswith(f"error: {arguments[0]} {arguments[1]}"), errors


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_the_real_command(text, tmp_path, nproc):
    options = [*SMALL, *STAGED, *text, "--save_every", 20, "--log_dir", tmp_path, "--run_id", "r"]
    assert run("tiny", *options, nproc=nproc).returncode == 0
    (tmp_path / "q.jsonl").write_text(json.dumps(LINE))
    command = [sys.executable, ROOT / "tools/evaluate.py", tmp_path / "r", "--hellaswag", tmp_path / "q.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment())
    found = figures(done.stdout)
    assert done.returncode == 0, done.stderr
    assert found["val_loss"] == pytest.approx(found["val_loss_in_log"], abs=1.01e-6)
    assert {"hellaswag_acc", "hellaswag_acc_norm", "bits_per_byte"} <= found.keys()
