"""tools/ab.py: order, going on after a kill, crashes and edits, with fake_trainer.py and once with the real one."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ab
import compare
import pytest
from conftest import ROOT, SMALL, environment
from runs import find_runs, read_log

TRAINER = (ROOT / "tests/fake_trainer.py").read_text()
CANDIDATE = ["--candidate", "--lr 0.003"]
ORDER = ["00_A_seed0", "00_B_seed0", "01_B_seed1", "01_A_seed1"]


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Runs ab.py in this process, with that trainer; returns (status, or text of the error, and what it printed)."""
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for name in ab.AS_RUN_SH:
        monkeypatch.setenv(name, "")     # so that what ab.py sets is deleted after the test
        monkeypatch.delenv(name)

    def start(*arguments, out=tmp_path / "out"):
        options = ["--metric", "final_loss", "--baseline", f"{tmp_path}/trainer.py", *arguments]
        monkeypatch.setattr(sys, "argv", ["ab.py", str(out), *options])
        try:
            status = ab.main()
        except SystemExit as error:
            status = error.code
        return status, "".join(capsys.readouterr())

    return start


def calls(out: Path) -> list[str]:
    return [line.split()[0] for line in (out / "calls.txt").read_text().splitlines()]


def test_order_verdicts_and_a_second_start(start, tmp_path, monkeypatch, capsys):
    """Two candidates, three blocks: A B C, C B A, A B C; what is finished is not run again, nor is the plan changed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    out, arguments = tmp_path / "out", [*CANDIDATE, "--candidate", "", "--seeds", "7,3,5", "--fields", "--lr 0.001"]
    status, printed = start(*arguments)
    order = ["00_A_seed7", "00_B_seed7", "00_C_seed7", "01_C_seed3", "01_B_seed3", "01_A_seed3",
             "02_A_seed5", "02_B_seed5", "02_C_seed5"]
    plan = json.loads((out / "plan.json").read_text())
    assert status == 0 and calls(out) == plan["runs"] == order
    assert (plan["metric"], plan["alpha"], plan["alpha_each"], plan["seeds"]) == ("final_loss", 0.05, 0.025, [7, 3, 5])
    _, processes, *variables = zip(*map(str.split, (out / "calls.txt").read_text().splitlines()), strict=True)
    assert len({*processes}) == 9 and variables == [("3",) * 9, *((value,) * 9 for value in ab.AS_RUN_SH.values())]
    assert all(f"{name}=${{{name}:-{value}}}" in (ROOT / "run.sh").read_text() for name, value in ab.AS_RUN_SH.items())
    for number, name in enumerate(order, 1):
        lr = 0.003 if "B" in name else 0.001
        noise = (int(name[9:]) * 7919 + lr * 1e6 * 31) % 13
        seconds = 100 + noise / 25
        assert f"\n{name}  loss {4 - 500 * lr + noise / 1000:.4f}  {seconds:.2f} s  run {number} of 9, about" in printed

    verdicts = printed.split("\n\n")[1:]
    assert verdicts[0].startswith("B, --lr 0.003, against A:\n") and "verdict: faster (B's loss is 0.9" in verdicts[0]
    assert verdicts[1].startswith("C, the baseline again, against A:") and "verdict: inconclusive (p = 1" in verdicts[1]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(out)])
    pytest.raises(SystemExit, compare.main)
    assert capsys.readouterr().out.split("\n\n")[:2] == [text.split(":\n", 1)[1].strip() for text in verdicts]

    (tmp_path / "trainer.py").write_text("raise SystemExit(1)\n")     # its old verdict would be told of this
    assert f"{tmp_path}/trainer.py has changed since this experiment began" in start(*arguments)[0]
    (tmp_path / "trainer.py").write_text(TRAINER)
    status, again = start(*arguments)
    assert status == 0 and again.count("finished before") == 9 and again.split("\n\n")[1:] == verdicts


def test_another_plan_and_edits_are_refused(start, tmp_path, monkeypatch):
    """Nothing is run then, though a run is missing."""
    out, arguments = tmp_path / "out", [*CANDIDATE, "--seeds", "1", "--fields", "--lr 0.001"]
    start(*arguments)
    shutil.rmtree(out / "00_B_seed0")
    for option, value, words in (
            ("metric", "loss_at_time", "metric: 'final_loss' there, 'loss_at_time' now"), ("nproc", "2", "nproc: 1"),
            ("candidate", "", "candidates: ['--lr 0.003'] there"), ("seeds", "2", "seeds: [0] there, [0, 1] now"),
            ("baseline", "--lr 1", "baseline: "), ("fields", "", "fields: '--lr 0.001' there")):
        assert words in start(*arguments, f"--{option}", value)[0]
    for name, before, after, words in (
            ("plan.json", '"00_B', '"../00_B', "plan.json differs from this command line: runs: "),
            ("plan.json", "{", '{"command": "touch x",', "command: 'touch x' there, None now"),
            ("plan.json", "}", "", "plan.json is damaged"), ("source_B.py", "import", "import re,", "source_B.py: '")):
        text = (out / name).read_text()
        (out / name).write_text(text.replace(before, after, 1))
        status, _ = start(*arguments)
        assert words in status and "name another OUT" in status
        (out / name).write_text(text)
    assert calls(out) == ORDER[:2] and start(*arguments)[0] == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    assert "environment: " in start(*arguments)[0]
    (out / "plan.json").unlink()
    assert "has no plan.json, but holds " in start(*arguments)[0]


@pytest.mark.parametrize("killed, number, status", [
    ("ab trainer", signal.SIGKILL, -9), ("ab", signal.SIGKILL, -9), ("trainer", signal.SIGKILL, 1),
    ("ab", signal.SIGTERM, 130), ("ab", signal.SIGINT, 130)])
def test_a_kill_and_a_restart_end_as_if_undisturbed(start, tmp_path, killed, number, status):
    """In the third of four runs. A run that a killed ab.py left is waited for; else it is put aside, and run again."""
    control, out, left = tmp_path / "control", tmp_path / "out", (killed, status) == ("ab", -9)
    control.write_text("")
    arguments = [*CANDIDATE, "--seeds", "2", "--fields", f"--control {control}"]
    undisturbed = start(*arguments, out=tmp_path / "undisturbed")[1].split("\n\n")[1:]
    control.write_text("01_B_seed1 hold")
    command = [sys.executable, ROOT / "tools/ab.py", out, *sys.argv[2:]]     # as start() has just set it
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        held = out / "01_B_seed1/held"
        while not (held.exists() and held.read_text().endswith("\n")):
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.02)
        trainer = int(held.read_text())
        for name, process in ("ab", first.pid), ("trainer", trainer):
            if name in killed.split():
                os.kill(process, number)
        assert first.wait(60) == status
        if status == 130:
            pytest.raises(ProcessLookupError, os.kill, trainer, 0)
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline().startswith("waiting for the end of another ab.py, or of" if left else "plan: ")
    finally:
        control.write_text("")     # ends a run that is still there
        first.kill()
    assert second.communicate(timeout=60)[0].split("\n\n")[1:] == undisturbed and second.returncode == 0
    assert [run.name for run in find_runs([out])[0]] == sorted(ORDER)
    assert sorted(calls(out)) == sorted(ORDER + ["01_B_seed1"] * (not left))
    assert held.exists() == left != any(out.glob("aside/01_B_seed1_*/held"))


def test_crashes(start, tmp_path):
    """B's are shown and cost C nothing, A's ends the experiment; a restart runs them again."""
    control, out = tmp_path / "control", tmp_path / "out"
    arguments = ["--seeds", "2", "--fields", f"--control {control}", "--candidate", "--lr 0.004", *CANDIDATE]
    control.write_text("00_B_seed0 crash, 01_B_seed1 crash, 01_A_seed1 crash")
    status, printed = start(*arguments)
    assert status.startswith("ab.py: the baseline crashed") and calls(out)[3:] == ["01_C_seed1", *ORDER[2:]]
    assert f"00_B_seed0  crashed, exit status 1; the end of {out}/00_B_seed0/console.txt:\n    11\n" in printed
    assert "    19\n    ValueError: ?[2Ja crash asked for\n00_C" in printed
    control.write_text("01_B_seed1 crash")
    status, printed = start(*arguments)
    assert status == 1 and calls(out)[6:] == ORDER[1:]
    verdicts = re.findall("^verdict: .*", printed, re.M)
    assert verdicts[0] == "verdict: inconclusive (B crashed: 01_B_seed1)" and "faster (C's loss is 0." in verdicts[1]


def test_programs_from_git_and_files(start, tmp_path, monkeypatch):
    """A as edited, B from a commit; their logs do not claim a commit, though they lie in the repository."""
    monkeypatch.setattr(ab, "ROOT", tmp_path)
    (tmp_path / "train_gpt.py").write_text(TRAINER)
    for command in ("init -q", "add train_gpt.py", "-c user.name=x -c user.email=x@x commit -qm first"):
        subprocess.run(["git", "-C", tmp_path, *command.split()], check=True)
    (tmp_path / "train_gpt.py").write_text(TRAINER + "# edited\n")
    assert start("--baseline", "", "--seeds", "1", "--candidate", "git:HEAD")[0] == 0
    runs = [read_log(tmp_path / f"out/00_{letter}_seed0") for letter in "AB"]
    assert [(run.source, run.git) for run in runs] == [(TRAINER + "# edited\n", "none"), (TRAINER, "none")]


def test_several_processes():
    plan = dict(nproc=2, track="tiny", fields="", baseline="", candidates=["--lr 0.003"], seeds=[5])
    command = " ".join(ab.make_command(Path("/out"), plan, "00_B_seed5"))
    assert "torch.distributed.run --standalone --nproc_per_node=2 /out/source_B.py tiny --lr 0.003 --seed 5" in command


@pytest.mark.parametrize("arguments, words", [
    (["--candidate", "nowhere.py"], "nowhere.py: .*No such file"),
    (["--candidate", "git:nowhere"], "git:nowhere: .*; name a program"),
    (["--candidate", "--seed 3"], "leave --seed out"),
    (["--fields", "--run_id=x --lr 1"], "leave --run_id=x out"),
    (["--candidate", "'a"], "No closing quotation"),
    (["--fields", "small"], "--fields small: must begin with '--'"),
    (["--seeds", "0"], "--seeds .*: give a number from 1 on"),
    (["--seeds", "3,3"], "--seeds .3, 3.: give"),
    (["--alpha", "5"], "--alpha 5.0: must lie"),
    (25 * CANDIDATE, "letters for 25")])
def test_bad_input(start, tmp_path, arguments, words):
    assert re.search(words, start(*CANDIDATE, *arguments)[0]) and not (tmp_path / "out/plan.json").exists()


def test_the_real_trainer_by_the_command_of_the_readme(text, tmp_path):
    tweak, out = tmp_path / "tweak.py", tmp_path / "logs/tweak"
    tweak.write_text((ROOT / "train_gpt.py").read_text() + "# edited\n")
    command = ["tools/ab.py", out, "--metric", "final_loss", "--seeds", "1", "--candidate", f"{tweak} --lr 0.00317",
               "--fields", shlex.join([*SMALL, *text, "--num_steps", "2", "--val_every", "0"])]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    words = r"change: .*lr .* -> 0.00317.*; source (.*\n)*verdict: inconclusive \(too few runs\)$"
    assert re.search(words, result.stdout, re.M)
    assert read_log(out / "00_B_seed0").source == tweak.read_text()
