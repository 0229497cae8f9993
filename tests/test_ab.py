"""tools/ab.py: order, going on after a kill, crashes and edits, with a trainer that only writes a log."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from statistics import fmean

import ab
import compare
import pytest
from conftest import ROOT, SMALL, environment
from runs import find_runs, read_log

# Its loss falls with --lr, by far more than its noise. --control names a file: run folders in it that `crash` or `hold`
# (in the middle, while the file says so).
FAKE = '''
import hashlib, json, os, sys, time
from pathlib import Path

source = Path(__file__).read_text()
c = dict(track=sys.argv[1], num_steps=4, batch_tokens=8, target=9.0, lr=0.002, seed=0, control="")
for name, value in zip(sys.argv[2::2], sys.argv[3::2]):
    c[name[2:]] = type(c.get(name[2:], ""))(value)
folder = Path(c["log_dir"], c["run_id"])
assert os.listdir(folder) == ["console.txt"]     # nothing of another run
with open(folder.parent / "calls.txt", "a") as calls:
    print(c["run_id"], os.getpid(), os.environ.get("OMP_NUM_THREADS"), os.environ["GOMP_SPINCOUNT"], file=calls)


def controlled():
    return c["control"] and dict(line.split() for line in Path(c["control"]).read_text().splitlines()).get(c["run_id"])


print("the first words", *range(20), sep="\\n", flush=True)
if controlled() == "crash":
    sys.exit("ValueError: \x1b[2Ja crash asked for")
git = os.popen(f"git -C {Path(__file__).parent} describe --always 2>/dev/null || echo none").read().strip()
sha256 = hashlib.sha256(source.encode()).hexdigest()
log = open(folder / "log.txt", "w")
print(source + "=" * 100, f"run folder: {folder}", "host: here", "data sha256: train aa, val bb",
      f"source: sha256 {sha256}, git {git}", "versions: torch 2.13.0", "hardware: 1 x a CPU", f"config: {json.dumps(c)}",
      "step:2/4 train_loss:5 train_time:50000ms step_avg:1ms", sep="\\n", file=log, flush=True)
while controlled() == "hold":
    (folder / "held").write_text(f"{os.getpid()}\\n")
    time.sleep(0.02)
noise = (c["seed"] * 7919 + round(c["lr"] * 1e6) * 31) % 13
print(f"step:4/4 val_loss:{3 - 500 * (c['lr'] - 0.002) + noise / 1000} train_time:{100_000 + 40 * noise}ms", file=log)
'''
ORDER = ["00_A_seed0", "00_B_seed0", "01_B_seed1", "01_A_seed1"]


@pytest.fixture
def repository(tmp_path):
    """A repository with ab.py and the trainer above."""
    shutil.copytree(ROOT / "tools", tmp_path / "repo/tools", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "repo/train_gpt.py").write_text(FAKE)
    return tmp_path / "repo"


@pytest.fixture
def start(repository, tmp_path, monkeypatch, capsys):
    """Runs ab.py in this process, in that repository: returns (status, or text of the error, and what it printed)."""
    monkeypatch.setattr(ab, "ROOT", repository)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")     # ab.py sets it otherwise, for later tests, too
    monkeypatch.chdir(repository)

    def start(*arguments, out=tmp_path / "out", metric="final_loss"):
        monkeypatch.setattr(sys, "argv", ["ab.py", str(out), "--metric", metric, *arguments])
        try:
            status = ab.main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return start


def calls(out) -> list[str]:
    return [line.split()[0] for line in (out / "calls.txt").read_text().splitlines()]


def test_order_verdicts_and_a_second_start(start, repository, tmp_path, monkeypatch, capsys):
    """Two candidates, three blocks: A B C, C B A, A B C; what is finished is not run again, nor is the plan changed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    out, arguments = tmp_path / "out", ["--candidate", "--lr 0.003", "--candidate", "", "--seeds", "7,3,5",
                                        "--fields", "--lr 0.001 --num_steps 4"]
    status, printed = start(*arguments)
    assert status == 0
    order = ["00_A_seed7", "00_B_seed7", "00_C_seed7", "01_C_seed3", "01_B_seed3", "01_A_seed3",
             "02_A_seed5", "02_B_seed5", "02_C_seed5"]
    plan = json.loads((out / "plan.json").read_text())
    assert calls(out) == plan["runs"] == order
    assert (plan["metric"], plan["alpha"], plan["alpha_each"], plan["seeds"]) == ("final_loss", 0.05, 0.025, [7, 3, 5])
    _, processes, *variables = zip(*(line.split() for line in (out / "calls.txt").read_text().splitlines()), strict=True)
    assert len({*processes}) == 9 and variables == [("3",) * 9, ("10000",) * 9]

    # The numbers: noise as the trainer above makes it, the verdicts as compare.py has them.
    noise = {name: (int(name[9:]) * 7919 + (3000 if "B" in name else 1000) * 31) % 13 for name in order}
    for number, name in enumerate(order, 1):
        loss = 3 - 500 * (0.001 if "B" in name else -0.001) + noise[name] / 1000
        line = rf"^{name}  loss {loss:.4f}  {100 + noise[name] / 25:.2f} s  run {number} of 9, about \d:\d\d:\d\d left$"
        assert re.search(line, printed, re.M), printed
    verdicts = printed.split("\n\n")[1:]
    lower = 1 - fmean(noise[name] / 1000 * (1 if "B" in name else -1) for name in order if "C" not in name) * 2
    assert verdicts[0].startswith("B, --lr 0.003, against A:\nmetric: final_loss, alpha 0.025\nchange: lr ")
    assert f"verdict: faster (B's loss is {lower:.4f} lower" in verdicts[0]
    assert verdicts[1].startswith("C, the baseline again, against A:") and "verdict: inconclusive (p = 1" in verdicts[1]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(out)])
    with pytest.raises(SystemExit, match="0"):
        compare.main()
    assert capsys.readouterr().out.split("\n\n")[:2] == [text.split(":\n", 1)[1].strip() for text in verdicts]

    # A second start, the repository's program edited: nothing is run, and the verdicts are the same.
    (repository / "train_gpt.py").write_text("raise SystemExit(1)\n")
    status, again = start(*arguments)
    assert status == 0 and calls(out) == order and again.split("\n\n")[1:] == verdicts
    assert again.count("finished before") == 9
    for change, words in ((["--alpha", "0.01"], "alpha: 0.05 there, 0.01 now"), (["--nproc", "2"], "nproc: 1 there, 2"),
                          (["--candidate", ""], "candidates: ['--lr 0.003', ''] there"), (["--track", "x"], "track: "),
                          (["--seeds", "7,3"], "seeds: [7, 3, 5] there, [7, 3] now"),
                          (["--fields", ""], "fields: '--lr 0.001 --num_steps 4' there, '' now"),
                          (["--baseline", "--lr 1"], "baseline: '' there")):
        assert words in start(*arguments, *change)[0]
    assert "metric: 'final_loss' there" in start(*arguments, metric="loss_at_time")[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "environment: {'OMP_NUM_THREADS': '3'" in start(*arguments)[0]


@pytest.mark.parametrize("name, edit, words", [
    ("plan.json", lambda text: text.replace('"00_B', '"../00_B'), "plan.json differs from this command line: runs: "),
    ("plan.json", lambda text: text.replace("{", '{"command": "touch x",', 1), "command: 'touch x' there, None now"),
    ("plan.json", lambda text: text.replace('"final_loss"', '"\\u001b[2J"'), r"metric: '\\x1b\[2J' there"),
    ("plan.json", lambda text: text[:50], "plan.json is damaged"),
    ("plan.json", lambda text: "[1]", "plan.json is damaged"),
    ("source_B.py", lambda text: text + "# later\n", r"source_B.py: '\w{64}' there, '\w{64}' now.* undo what was edited"),
])
def test_edits_are_refused(start, tmp_path, name, edit, words):
    """Nothing is run then, though a run is missing; what is run is never read from plan.json."""
    out, arguments = tmp_path / "out", ["--seeds", "1", "--candidate", "--lr 0.003"]
    start(*arguments)
    shutil.rmtree(out / "00_B_seed0")
    (out / name).write_text(edit((out / name).read_text()))
    status, _ = start(*arguments)
    assert re.search(words, status) and "name another OUT" in status and calls(out) == ORDER[:2]


@pytest.mark.parametrize("how", ["SIGKILL both", "SIGKILL ab", "SIGKILL trainer", "SIGTERM ab", "SIGINT ab"])
def test_a_kill_and_a_restart_end_as_if_undisturbed(start, repository, tmp_path, how):
    """In the third of four runs. No finished run is repeated; the unfinished one is put aside and run again."""
    control, out, (number, whom) = tmp_path / "control", tmp_path / "out", how.split()
    arguments = ["--seeds", "2", "--fields", f"--control {control}", "--candidate", "--lr 0.003"]
    command = [sys.executable, repository / "tools/ab.py", out, "--metric", "final_loss", *arguments]
    control.write_text("")
    undisturbed = start(*arguments, out=tmp_path / "undisturbed")[1].split("\n\n")[1:]
    control.write_text("01_B_seed1 hold\n")
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        held = out / "01_B_seed1/held"
        while not (held.exists() and held.read_text().endswith("\n")):
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.02)
        trainer = int(held.read_text())
        if whom != "trainer":
            first.send_signal(getattr(signal, number))
        if whom != "ab":
            os.kill(trainer, signal.SIGKILL)
        printed = first.communicate(timeout=60)[0] if how != "SIGKILL ab" else first.wait()
        assert first.returncode == {"SIGKILL both": -9, "SIGKILL ab": -9, "SIGKILL trainer": 1}.get(how, 130)
        left = how == "SIGKILL ab"
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if left else None
        if left:
            assert second.stdout.readline().startswith("waiting for the end of another ab.py, or of a run that")
    finally:
        control.write_text("")     # ends a run that is still there
        first.kill()
    if not left:
        with pytest.raises(ProcessLookupError):
            os.kill(trainer, 0)
    status, printed = (0, second.communicate(timeout=60)[0]) if left else start(*arguments)
    assert status == 0 and printed.split("\n\n")[1:] == undisturbed, printed
    assert [run.name for run in find_runs([out])[0]] == sorted(ORDER)
    repeated = 0 if left else 1
    assert len(list((out / "aside").glob("01_B_seed1_*/held"))) == repeated and not held.exists() >= repeated
    assert sorted(calls(out)) == sorted(ORDER + ["01_B_seed1"] * repeated)
