"""tools/export.py through the real command: what transformers makes of the folder, where this repository is not."""

import base64
import json
import os
import subprocess
import sys

import export
import local_text
import pytest
import sample
import shards
import torch
from conftest import ROOT, SMALL, STAGED, run, train
from safetensors.torch import load_file
from test_local_text import GPT2_RANKS, write_small_ranks
from tokenizers import Tokenizer

SAVED = ["tiny", *SMALL, *STAGED, "--val_every", 20, "--prime_steps", 0]
TEXTS = ["", "def main(args):\n    return  [x**2 for x in self]\n\n\n", "  naïve é🙂\u200b\x85\x1c\r\n it's", "a" * 99,
         "".join(map(chr, range(2**11)))]
# Runs outside the repository: loads the folder, and saves what the model gives for the tokens in argv.
SCRIPT = """
import importlib.util, json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert importlib.util.find_spec("train_gpt") is None and importlib.util.find_spec("sample") is None
folder, tokens = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
found = dict(name=type(model).__name__, logits=model(tokens).logits, loss=model(tokens, labels=tokens).loss)
found["greedy"] = model.generate(tokens[:, :40], max_new_tokens=60, min_new_tokens=60)
batch = tokenizer(["abc", "a longer text"], return_tensors="pt", padding=True)
found["ids"] = batch["input_ids"], tokenizer("abc")["input_ids"]
found["text"] = tokenizer.decode([256, 97, 98], skip_special_tokens=True)
found["batch"] = model(**batch).logits[0, -4:], model(batch["input_ids"][:1, -4:]).logits[0]
torch.manual_seed(0)
sampled = model.generate(**batch, max_new_tokens=9, do_sample=True, num_return_sequences=2)
found["sampled"] = sampled
beams = dict(max_new_tokens=20, min_new_tokens=20, num_beams=4)     # of a padded batch, and of its first row alone
found["beams"] = model.generate(**batch, **beams)[0, -23:], model.generate(batch["input_ids"][:1, -4:], **beams)[0, 1:]
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
found["again"] = again(tokens).logits
torch.save(found, "found.pt")
"""


def command(*arguments, **variables) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "tools/export.py", *map(str, arguments)], capture_output=True,
                          text=True, timeout=100, env={**os.environ, **variables})


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run's folder: 20 steps, a checkpoint at the last."""
    folder = tmp_path_factory.mktemp("logs")
    assert train(*SAVED, *text, "--save_every", 20, "--log_dir", folder, "--run_id", "r") == 0
    return folder / "r"


def test_the_folder_has_the_weights_the_config_and_a_card_of_what_the_log_says(trained, tmp_path):
    out = tmp_path / "out"
    done = command(trained, "--out", out)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    weights, content = load_file(out / "model.safetensors"), torch.load(trained / "checkpoint.pt", weights_only=True)
    assert weights.keys() == content["model"].keys() and len(weights) > 10
    assert all(torch.equal(weights[name], content["model"][name]) for name in weights)
    config = json.loads((out / "config.json").read_text())["train_gpt"]
    assert config.items() <= content["config"].items() and config["seq_len"] == 32
    log, readme = (trained / "log.txt").read_text(), (out / "README.md").read_text()
    for fact in ("20 of 20", f"| {sum(p.numel() for p in weights.values()):,}", "--ngram_dim 8", *(
            log.rpartition(f"\n{name}")[2].splitlines()[0] for name in ("val_loss: ", "hardware: ", "versions: "))):
        assert fact.removeprefix("| ") in readme, fact
    assert all(digest in readme for digest in content["sha256"].values()) and "that of the run" in readme
    for path in out.iterdir():      # nothing of this machine's
        assert path.suffix == ".safetensors" or str(trained.parent) not in path.read_text(), path
        assert path.suffix == ".safetensors" or content["config"]["data"] not in path.read_text(), path


def test_a_loss_of_another_step_is_not_the_checkpoints(trained):
    run = export.read_log(trained)
    early, last = (export.facts(run, dict(step=step, seconds=1.0)) for step in (12, 20))
    loss = "validation loss, nats a token"
    assert early[loss] == "not measured at step 12" and early["steps"] == "12 of 20" and "target" not in early
    assert last[loss] == f"{run.summary['val_loss']:.6f}" and last["target"] == "1.3"


@pytest.mark.parametrize("kind", ["bytes", "odd", "trained", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_tokenizer_gives_the_ids_and_the_text_of_the_repositorys_own(kind, tmp_path, monkeypatch):
    own, read = sample.Bytes(), (ROOT / "train_gpt.py").read_text()
    if kind == "odd":     # no merges lead to self, which is a token where it is a whole word, as in tiktoken
        path = write_small_ranks(tmp_path / "ranks")
        path.write_text(f"{path.read_text()}{base64.b64encode(b'self').decode()} 265\n")
        own = shards.load_bpe(str(path))
    if kind == "trained":
        (tmp_path / "text.txt").write_text(read)
        monkeypatch.setattr(local_text, "VAL_ONE_IN", 2)
        local_text.main([str(tmp_path), "--separator", "\\n\\n", "--train_bpe", "500", "--out", str(tmp_path / "bpe")])
        own = shards.load_bpe(str(tmp_path / "bpe/bpe.tiktoken"))
    if kind == "gpt2":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_RANKS.parent))
        if not GPT2_RANKS.exists():
            pytest.skip("no ranks of GPT-2 here")
        own = shards.load_bpe("gpt2")
    end = getattr(own, "n_vocab", 257) - 1
    tokenizer = export.convert_tokenizer([own.decode_bytes([token]) for token in range(end)])
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    for text in [*TEXTS, read]:
        ids = own.encode_ordinary(text)
        assert tokenizer.encode(text).ids == [end, *ids] and tokenizer.decode([end, *ids]) == text, text[:40]
    assert tokenizer.encode("<|endoftext|>").ids == [end, end] and tokenizer.get_vocab_size() == end + 1


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


def test_bad_input_is_one_line_and_executes_nothing(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    monkeypatch.setenv("MARK", str(tmp_path / "executed"))
    torch.save(dict(config=Malicious(), model={}), tmp_path / "bad/checkpoint.pt")
    content = torch.load(trained / "checkpoint.pt", weights_only=True)
    (tmp_path / "alone").mkdir()
    torch.save(content, tmp_path / "alone/checkpoint.pt")
    for name, options, words in [
            ("none", [], ["none/checkpoint.pt"]), ("bad", [], ["bad/checkpoint.pt", "whole"]),
            ("alone", [], ["alone/log.txt", "give the folder"]),
            (trained, ["--push", "a b"], ["--push a b", "NAME/REPO"]),
            (trained, ["--out", tmp_path / "full"], [f"--out {tmp_path}/full", "give another"])]:
        words_given = ["export.py", tmp_path / name, "--out", tmp_path / "out", *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words_given])
        with pytest.raises(SystemExit) as stop:
            export.main()
        *_, line = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_transformers_gives_our_logits_and_text_where_this_repository_is_not(nproc, text, tmp_path):
    pytest.importorskip("transformers")     # needs Python 3.11
    options = [*SAVED, *text, "--save_every", 20, "--log_dir", tmp_path, "--run_id", "r"]
    assert run(*options, nproc=nproc).returncode == 0
    assert command(tmp_path / "r", "--out", tmp_path / "o").returncode == 0
    model, _ = sample.load_model(tmp_path / "r", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(97, 123, (1, 90), generator=generator)
    tokens[:, ::20] = 256
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-I", "-c", SCRIPT, tmp_path / "o", json.dumps(tokens.tolist())],
                          cwd=tmp_path, capture_output=True, text=True, timeout=200,
                          env=variables | dict(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    with torch.no_grad():
        logits = model.logits(model.hidden(tokens, model.config.val_window))
        loss = model.loss(model.hidden(tokens[:, :-1], model.config.val_window), tokens[:, 1:])
    assert found["name"] == "GPTSpeedrunForCausalLM" and logits.std() > 0.1
    torch.testing.assert_close(found["logits"], logits[..., :257], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["again"], found["logits"], rtol=0, atol=0)
    torch.testing.assert_close(found["loss"], loss, rtol=0, atol=1e-5)
    start = tokens[0, :40].tolist()
    greedy = list(sample.generate(model, start, 60, lambda logits: int(logits[:256].argmax())))
    assert found["greedy"][0].tolist() == start + greedy
    assert found["ids"][1] == [256, *b"abc"] and found["ids"][0][1].tolist() == [256, *b"a longer text"]
    assert found["text"] == "ab"
    torch.testing.assert_close(*found["batch"], rtol=0, atol=1e-4)
    assert torch.equal(*found["beams"])
    assert found["sampled"].shape == (4, 14 + 9) and not torch.equal(*found["sampled"][2:])
