"""tools/runs.py: what is read from logs and records, and what strangers' logs cannot do."""

import dataclasses
import gzip
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from conftest import ROOT

import train_gpt

CONFIG = dict(track="tiny", train_files="data/train_*.bin", val_tokens=2048, target=3.28, batch_tokens=512, lr=0.002,
              num_steps=20, seed=0, log_dir="logs", run_id="")


def log_text(loss=3.27, seconds=100.0, *, source="print('model')\n", hardware="8 x NVIDIA H100", torch="2.13.0+cu128",
             platform="Linux-6.18", train="aa", val="bb", git="c0ffee", host="n1", steps=None, **config) -> str:
    """Returns a log such as train_gpt.py writes; with `steps`, of a run that was killed after that many."""
    config = {**CONFIG, **config}
    last = steps or config["num_steps"]
    text = source + "=" * 100 + f"""
run folder: logs/x
config: {json.dumps(config)}
source: sha256 {hashlib.sha256(source.encode()).hexdigest()}, git {git}
versions: python 3.11.7, torch {torch}, cuda 12.8, {platform}
hardware: {hardware}
{f"host: {host}" if host else "kernels: of a log before hosts were named"}
data sha256: train {train}, val {val}
"""
    for step in range(1, last + 1):
        time = f"train_time:{1e3 * seconds * step / last:.0f}ms step_avg:{1e3 * seconds / last:.2f}ms\n"
        text += f"step:{step}/{config['num_steps']} train_loss:{9 - step / 4:.6f} {time}"
        if step == last or step % 10 == 0:
            text += f"step:{step}/{config['num_steps']} val_loss:{loss if step == last else 8:.6f} {time}"
    if steps is None:
        text += f"run_id: x\nval_loss: {loss:.6g}\ntarget_reached: {json.dumps(loss <= 3.28)}\nhardware: {hardware}\n"
    return text


def write(folder: Path, *args, text: str | None = None, **options) -> Path:
    """Writes a log into a new run folder, which it returns."""
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(text or log_text(*args, **options))
    return folder


def run_tool(name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


# Logs.

def test_resumed_log(tmp_path):
    """The later of two lines of a step counts; what the resume changed makes the run equal to no other."""
    first, second = log_text(steps=12, loss=5.0), log_text(hardware="8 x NVIDIA A100", resume="x")
    second = second.replace("step:1/20", "resumed: x at step 10/20\nstep:1/20", 1)
    run = runs.read_log(write(tmp_path / "run", text=first + second))
    assert run.resumed and run.config["resume"] == "x"
    assert run.final == (100.0, 3.27) and run.losses["train"][12] == (60.0, 6.0)
    assert run.hardware == "8 x NVIDIA H100 then 8 x NVIDIA A100" and run.torch == "2.13.0+cu128" and run.host == "n1"


def test_steps_in_any_order_and_with_other_keys(tmp_path):
    """What a fork logs besides, in any order, is ignored; a cut line says nothing."""
    start = log_text().split("step:1/")[0]
    run = runs.read_log(write(tmp_path / "run", text=start + """step:1/20 train_loss:5.5 norm:0.3 train_time:1000ms
step:2/20 train_time:2.5s step_avg:1ms lr:1e-3,2e-3 note: train_loss:4.5e0
step:3/20 step_avg:?ms train_loss:nan my_val_loss:none train_time:3000ms
step:3/20 grad_norm:nanms val_loss:4.25 train_loss:4.0 train_time:3000ms
step:4/20 grad_norm:0.5 train_time:4000ms
step:20/20 train_time:9000ms val_loss:3"""))
    assert run.losses == {"train": {1: (1, 5.5), 2: (2.5, 4.5), 3: (3, 4)}, "val": {3: (3, 4.25)}}


def test_facts_that_stand_in_the_source_too(tmp_path):
    """A source whose text has lines as a log has, in a run that was stopped and resumed."""
    source = ('log(f"""\nrun folder: {x}\nhardware: {y}\nversions: torch 1\nconfig: {"a": 1}\nrun_id: {z}\n'
              'step:3/20 train_loss:1 train_time:1ms\n""")\n')
    text = log_text(source=source, steps=5) + log_text(source="#!x\n" + source, steps=5)
    run = runs.read_log(write(tmp_path / "run", text=text))
    assert (run.hardware, run.torch, run.config["lr"]) == ("8 x NVIDIA H100", "2.13.0+cu128", 0.002)
    assert run.resumed and run.summary == {} and run.source == source and run.losses["train"][3][1] == 8.25


BAD = {
    "a loss that is no number": log_text().replace("train_loss:8.75", "train_loss:abc"),
    "a time that is no number": log_text().replace("train_time:5000ms", "train_time:1.2.3ms"),
    "a negative time": log_text().replace("train_time:5000ms", "train_time:-5000ms"),
    "an endless time": log_text().replace("train_time:5000ms", "train_time:infms"),
    "a step after the last": log_text().replace("step:20/20", "step:21/20"),
    "a track that is a path": log_text(track="../../x"),
    "a track that is an option": log_text(track="--help"),
    "no track": log_text().replace('"track": "tiny", ', ""),
    "a field that is an option of its own": log_text(**{"lr --out": 1}),
    "too many steps": log_text(steps=5, num_steps=10**12),
    "steps in words": log_text().replace('"num_steps": 20', '"num_steps": "20"'),
    "no target": log_text(target="none"),
    "an endless target": log_text().replace('"target": 3.28', '"target": Infinity'),
    "deep JSON": log_text().replace('{"track"', '{"x": ' + "[" * 10**5 + "]" * 10**5 + ', "track"'),
    "JSON that is cut off": log_text().split('"lr"')[0],
    "no config": log_text().replace("\nconfig: ", "\nconf: "),
    "another source than the one that ran": log_text().replace("print('model')", "print('other')"),
    "nothing": "\n",
}


@pytest.fixture(scope="module")
def among_good_ones(tmp_path_factory) -> Path:
    """A folder with two runs each of A and B, and all of the bad logs between them."""
    folder = tmp_path_factory.mktemp("logs")
    for i, (letter, seed) in enumerate([("A", 0), ("B", 0), ("B", 1), ("A", 1)]):
        write(folder / f"0{seed}_{letter}_seed{seed}", 3.27 - i / 100, seed=seed, lr=0.002 if letter == "A" else 0.003)
    for name, text in BAD.items():
        write(folder / name, text=text)
    (folder / "not even text").mkdir()
    (folder / "not even text" / "log.txt").write_bytes(b"\xff\xfe\x00")
    return folder


def test_bad_logs_are_named_and_left_out(among_good_ones):
    found, wrong = runs.find_runs([among_good_ones])
    assert [run.name for run in found] == ["00_A_seed0", "00_B_seed0", "01_A_seed1", "01_B_seed1"]
    for name in [*BAD, "not even text"]:
        assert sum(f"/{name}/log.txt" in text for text in wrong) == 1, name
        with pytest.raises(runs.LogError, match="leave it out|give the folder or log of a run"):
            runs.read_log(among_good_ones / name)


@pytest.mark.parametrize("tool, options", [("compare.py", ["--metric", "final_loss"]), ("plot.py", ["--out", "OUT"])])
def test_tools_go_on_without_bad_logs(among_good_ones, tmp_path, tool, options):
    paths = [among_good_ones]
    if tool == "compare.py":
        paths = [*among_good_ones.glob("*_A_*"), among_good_ones / "nothing", "vs", *among_good_ones.glob("*_B_*")]
    done = run_tool(tool, *paths, *[str(tmp_path / "loss.png") if word == "OUT" else word for word in options])
    assert "Traceback" not in done.stderr and "nothing/log.txt is no log of a run" in done.stderr
    assert "verdict: " in done.stdout if tool == "compare.py" else (tmp_path / "loss.png").stat().st_size > 5000


def test_nothing_that_a_terminal_obeys(tmp_path):
    """Control characters of a log's values and of its folder's name are not printed as they are."""
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m"
    for letter, lr in (("A", "1"), ("B", "2")):
        for seed in (0, 1):
            write(tmp_path / f"{seed}{evil}" / f"0{seed}_{letter}_{evil}", 3.2 + seed / 100, seed=seed, lr=evil + lr,
                  hardware=f"8 x {evil}", host=evil + lr, platform=evil + lr, train=evil)
    write(tmp_path / f"bad{evil}", text="config: ")
    done = run_tool("compare.py", tmp_path, "vs", *tmp_path.glob("*/*_B_*"), "--metric", "final_loss")
    assert "verdict: " in done.stdout and "left out" in done.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stdout + done.stderr)
    done = run_tool("compare.py", tmp_path / f"no{evil}", "vs", tmp_path / f"bad{evil}", "--metric", "final_loss")
    assert done.returncode and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", done.stdout + done.stderr)
    assert runs.printable("a\ud800\x1b\u202e\tb\n") == "a??\u202e\tb\n"


def test_paths_that_hold_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for paths, words in (([tmp_path / "no"], "does not exist"), ([tmp_path / "empty"], "holds no log"), ([], "give ")):
        with pytest.raises(runs.LogError, match=words):
            runs.find_runs(paths)
    one = write(tmp_path / "one")
    assert len(runs.find_runs([one, one / "log.txt", tmp_path / "one"])[0]) == 1     # named three times, read once


# Logs of modded-nanogpt, in the forms that its records have.

NAMED = "Running PyTorch 2.11.0+cu130 compiled for CUDA 13.0 on NVIDIA GH200 120GB with world_size 4\n"
EQUALS = "Running PyTorch 2.10.0 compiled for CUDA 12.8\nRunning on device_name=NVIDIA H100 80GB with world_size=8\n"
TABLE = "Running pytorch 2.5.1+cu124 compiled for CUDA 12.4\n" + "".join(
    f"|   {i}  NVIDIA H100 80GB HBM3          On  |   00000000:61:00.0 Off |   0 |\n" for i in range(8))


def theirs(*finals: float, source="print(1)\n", facts=EQUALS, begin="", loss="val_loss:{:.5f}", train=False) -> str:
    """Returns a log of runs in turn with these losses at step 20 of 25, and lower ones at the last."""
    text = begin + source + runs.DIVIDER + facts + runs.DIVIDER
    for final in finals:
        for step, value in ((0, 10.8), (10, 4.0), (20, final), (25, final - 0.01)):
            text += f"step:{step}/25 train_loss:{value:.4f} train_time:{step}.000s step_avg:nanms\n" * train
            text += f"step:{step}/25 {loss.format(value)} train_time:{1000 * step}ms step_avg:nanms\n"
    return text


def their_runs(folder: Path, **texts: str) -> dict[str, list[runs.Run]]:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return {name: runs.read_runs(folder / f"{name}.txt") for name in texts}


def test_several_runs_in_one_log(tmp_path):
    """Also without a step 0, of which one was stopped, and with a last line that has no end."""
    found = their_runs(tmp_path, several=theirs(3.28, 3.27), one=theirs(3.29).rstrip("\n"), no_zero=re.sub(
        "step:0/.*\n", "", theirs(3.25, 3.24)), stopped="step:10/20 val_loss:4 train_time:9ms\n" + theirs(3.2, 3.1))
    assert [run.name for run in found["several"]] == ["several_1", "several_2"]
    finals = {name: [round(run.final[1], 5) for run in found[name] if run.finished] for name in found}
    assert finals == dict(several=[3.27, 3.26], one=[3.28], no_zero=[3.24, 3.23], stopped=[3.19, 3.09])
    assert found["several"][1].losses["val"][20] == (20.0, 3.27)
    assert len(runs.find_runs([tmp_path])[0]) == 2 + 1 + 2 + 2
    with pytest.raises(runs.LogError, match="holds 2 runs; give the log of one"):
        runs.read_log(tmp_path / "several.txt")


def test_what_their_logs_say(tmp_path):
    """The source, also after a divider; hardware in three forms; track 2's target; the loss of averaged weights."""
    found = their_runs(
        tmp_path, begun=theirs(3.2, begin=runs.DIVIDER), other=theirs(3.2, begin=runs.DIVIDER, source="print(2)\n"),
        equal=theirs(3.2), named=theirs(3.2, facts=NAMED), table=theirs(3.2, facts=TABLE),
        medium=theirs(2.9, source="GPT(num_layers=16, model_dim=1024)\n"),
        averaged=theirs(3.2, loss="val_loss:3.9 val_avg_loss:3.8 val_ema_loss:{:.5f}"))
    one = {name: members[0] for name, members in found.items()}
    assert one["begun"].source_sha256 == one["equal"].source_sha256 == hashlib.sha256(b"print(1)\n").hexdigest()
    assert len(runs.group([one["begun"], one["other"], one["equal"]])) == 2
    assert [(one[name].hardware, one[name].torch) for name in ("equal", "named", "table")] == [
        ("8 x NVIDIA H100 80GB", "2.10.0"), ("4 x NVIDIA GH200 120GB", "2.11.0+cu130"),
        ("8 x NVIDIA H100 80GB HBM3", "2.5.1+cu124")]
    assert [one[name].config["target"] for name in ("equal", "medium")] == [3.28, 2.92]
    assert one["averaged"].final == (25.0, 3.19)
    assert all(run.source is None for run in one.values())      # so that reproduce.py does not run it


# Records.

TEXTS = dict(one=log_text(), two=log_text(3.26, seed=1, lr=0.003), killed=log_text(steps=7, seed=2),
             started=log_text().split("step:1/")[0], long=log_text(num_steps=1000, seed=3),
             resumed=log_text(steps=12) + log_text(hardware="1 x other"))


@pytest.fixture
def record(tmp_path) -> Path:
    """A record of runs in every state, and their source beside it; the logs are in logs/."""
    logs = [dataclasses.replace(runs.read_log(write(tmp_path / "logs" / name, text=text)), recipe="x")
            for name, text in TEXTS.items()]
    record, sources = tmp_path / "records" / "tiny" / "some", tmp_path / "records" / "sources"
    record.mkdir(parents=True)
    sources.mkdir()
    (sources / f"{logs[0].source_sha256[:12]}.py").write_text(logs[0].source)
    runs.write_record(record, logs)
    return record


def test_a_record_holds_what_a_log_said(record):
    """All facts of a run, its validation losses, and its training loss as means."""
    kept = runs.read_record(record)
    for run in kept:
        log = dataclasses.replace(runs.read_log(record.parents[2] / "logs" / run.name), recipe="x", path=run.path)
        assert dataclasses.replace(run, losses={}) == dataclasses.replace(log, losses={})
        assert run.losses["val"] == log.losses["val"] and run.finished == log.finished
    assert kept[0].losses["train"] == {step: (round(5 * step, 3), 9 - step / 4) for step in range(1, 21)}
    curve = kept[4].losses["train"]
    first, second, *_ = steps = sorted(curve)
    assert 40 < len(steps) <= 101 and steps[-1] == 1000
    assert curve[second][1] == pytest.approx(9 - (first + 1 + second) / 2 / 4)     # of the steps after the first
    assert runs.find_runs([record / "two"])[0] == [kept[1]] and runs.find_runs([record])[0] == kept
    with pytest.raises(runs.LogError, match="keeps no run three"):
        runs.find_runs([record / "three"])


@pytest.mark.parametrize("change", [
    dict(name="../x"), dict(name="--run"), dict(config={"track": "../x"}), dict(config={"num_steps": -1}),
    dict(recipe=[1]), dict(name="other"), dict(losses=1), "curves", "source"])
def test_an_edited_record_is_refused(record, change):
    kept, words = json.loads((record / "runs.json").read_text()), "holds no whole record .*; restore it"
    if change == "curves":
        (record / "curves.json.gz").write_bytes(gzip.compress(b'{"one": '))
    elif change == "source":
        words = "was edited: its sha256 is not"
        (source,) = record.parents[1].glob("sources/*")
        source.write_text(source.read_text() + "print('evil')\n")
    else:
        kept["runs"][0].update(change)
        (record / "runs.json").write_text(json.dumps(kept))
    with pytest.raises(runs.LogError, match=words):
        runs.read_record(record)


def test_tokens_of_stages():
    """Those of batch_rows, in the trainer; a log without stages has one."""
    c = train_gpt.make_config(dict(track="tiny", num_steps=8, batch_tokens=256, stages="1:32 2:64 4:0"))
    expected = 0
    for step in range(c.num_steps):
        assert runs.tokens_until(vars(c), step) == expected
        expected += train_gpt.batch_rows(c, step) * c.seq_len
    assert runs.tokens_until(vars(c), c.num_steps) == expected
    assert runs.tokens_until(dict(num_steps=8, batch_tokens=512), 3) == 1536
