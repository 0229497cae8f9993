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
    """In the third of four runs. A run that a killed ab.py left is waited for; else it is put aside, and run again."""
    control, out, (number, whom) = tmp_path / "control", tmp_path / "out", how.split()
    control.write_text("")
    arguments = ["--seeds", "2", "--fields", f"--control {control}", "--candidate", "--lr 0.003"]
    undisturbed = start(*arguments, out=tmp_path / "undisturbed")[1].split("\n\n")[1:]

    control.write_text("01_B_seed1 hold\n")
    held = out / "01_B_seed1/held"
    command = [sys.executable, repository / "tools/ab.py", out, "--metric", "final_loss", *arguments]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (held.exists() and held.read_text().endswith("\n")):
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.02)
        trainer = int(held.read_text())
        if whom != "trainer":
            first.send_signal(getattr(signal, number))
        if whom != "ab":
            os.kill(trainer, signal.SIGKILL)
        printed = first.communicate(timeout=60)[0]
        if number == "SIGKILL":
            assert first.returncode == (1 if whom == "trainer" else -9)
            assert ("01_B_seed1  crashed, exit status -9" in printed) == (whom == "trainer")
        else:
            assert first.returncode == 130 and "the same command goes on from here" in printed
            with pytest.raises(ProcessLookupError):
                os.kill(trainer, 0)
        second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        left = how == "SIGKILL ab"
        assert second.stdout.readline().startswith("waiting for the end of another ab.py, or of" if left else "plan: ")
    finally:
        control.write_text("")     # ends a run that is still there
        first.kill()
    printed = second.communicate(timeout=60)[0]
    assert second.returncode == 0 and printed.split("\n\n")[1:] == undisturbed
    assert [run.name for run in find_runs([out])[0]] == sorted(ORDER)
    assert sorted(calls(out)) == sorted(ORDER + ["01_B_seed1"] * (not left))
    assert held.exists() == left != any(out.glob("aside/01_B_seed1_*/held"))


def test_crashes(start, tmp_path):
    """B crashes in two blocks, and then A: B's is shown and costs C nothing, A's ends it; a restart runs them again."""
    control, out = tmp_path / "control", tmp_path / "out"
    arguments = ["--seeds", "3", "--fields", f"--control {control}", "--candidate", "--lr 0.004",
                 "--candidate", "--lr 0.003"]
    order = [f"{block:02}_{letter}_seed{block}" for block, letters in enumerate(("ABC", "CBA", "ABC")) for letter in letters]
    control.write_text("00_B_seed0 crash\n01_B_seed1 crash\n02_A_seed2 crash\n")
    status, printed = start(*arguments)
    assert status.startswith("ab.py: the baseline crashed") and calls(out) == order[:7]
    assert f"00_B_seed0  crashed, exit status 1; the end of {out}/00_B_seed0/console.txt:\n    11\n" in printed
    assert "    19\n    ValueError: ?[2Ja crash asked for\n01" not in printed and "\x1b" not in printed

    control.write_text("01_B_seed1 crash\n")
    status, printed = start(*arguments)
    assert status == 1 and calls(out)[7:] == ["00_B_seed0", "01_B_seed1", *order[6:]]
    verdicts = re.findall(r"^verdict: .*", printed, re.M)
    assert verdicts[0] == "verdict: inconclusive (B crashed: 01_B_seed1)"
    assert verdicts[1].startswith("verdict: faster (C's loss is 0.5") and len(verdicts) == 2


def test_programs_from_git_and_files(start, repository, tmp_path):
    """A as edited, B from a commit, C a file with a field; their logs do not claim a commit."""
    git = ["git", "-C", repository, "-c", "user.name=x", "-c", "user.email=x@x"]
    for arguments in (["init", "-q"], ["add", "train_gpt.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (repository / "train_gpt.py").write_text(FAKE + "# edited\n")
    (repository / "my tweak.py").write_text(FAKE.replace("3 - 500", "2 - 500"))
    out = repository / "logs/out"
    status, printed = start("--seeds", "2", "--baseline", "train_gpt.py --lr 0.002", "--candidate", "git:HEAD",
                            "--candidate", "'my tweak.py' --lr 0.0021", out=out)
    assert status == 0 and "C's loss is 1.0" in printed
    assert re.search(r"C, .*\nmetric.*\nchange: lr 0.002 -> 0.0021; source ", printed)
    runs = [read_log(out / f"00_{letter}_seed0") for letter in "ABC"]
    assert [run.source for run in runs[:2]] == [FAKE + "# edited\n", FAKE] and {run.git for run in runs} == {"none"}
    assert "git:nowhere: " in start("--candidate", "git:nowhere", out=tmp_path / "other")[0]


def test_several_processes(start, tmp_path, monkeypatch):
    """An interpreter that notes what torchrun is asked for, and starts the trainer once."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/launched\nshift 4\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert start("--nproc", "2", "--seeds", "1", "--candidate", "--lr 0.003")[0] == 0
    assert (tmp_path / "launched").read_text().splitlines()[1] == (
        f"-m torch.distributed.run --standalone --nproc_per_node=2 {tmp_path}/out/source_B.py tiny --lr 0.003 --seed 0 "
        f"--log_dir {tmp_path}/out --run_id 00_B_seed0")


@pytest.mark.parametrize("arguments, words", [
    (["--candidate", "nowhere.py"], "nowhere.py: .*No such file"),
    (["--candidate", "--seed 3"], "leave --seed out"),
    (["--candidate", "", "--fields", "--run_id=x --lr 1"], "leave --run_id=x out"),
    (["--candidate", "'a"], "No closing quotation"),
    (["--candidate", "", "--fields", "small"], "--fields small: must begin with '--'"),
    (["--candidate", "", "--seeds", "0"], r"--seeds \[\]: give"),
    (["--candidate", "", "--seeds", "3,3"], r"--seeds \[3, 3\]: give"),
    (["--candidate", "", "--alpha", "5"], "--alpha 5.0: must lie"),
    ([x for _ in range(26) for x in ("--candidate", "")], "letters for 25"),
])
def test_bad_input(start, tmp_path, arguments, words):
    assert re.search(words, start(*arguments)[0]) and not (tmp_path / "out/plan.json").exists()


def test_a_folder_of_something_else_is_left_alone(start, tmp_path):
    (tmp_path / "out/run").mkdir(parents=True)
    assert "has no plan.json, but holds run; name a new folder" in start("--candidate", "")[0]


def test_the_real_trainer_by_the_command_of_the_readme(text, tmp_path):
    tweak, out = tmp_path / "tweak.py", tmp_path / "logs/tweak"
    tweak.write_text((ROOT / "train_gpt.py").read_text() + "# edited\n")
    command = ["tools/ab.py", out, "--metric", "final_loss", "--seeds", "1", "--candidate", f"{tweak} --lr 0.00317",
               "--fields", shlex.join([*SMALL, *text, "--num_steps", "2", "--val_every", "0"])]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^00_B_seed0  loss \d\.\d{4}  \d+\.\d\d s  run 2 of 2, about 0:00:00 left$", result.stdout, re.M)
    assert re.search("^change: .*lr .* -> 0.00317.*; source ", result.stdout, re.M)
    assert result.stdout.splitlines()[-1] == "verdict: inconclusive (too few runs)"
    assert read_log(out / "00_B_seed0").source == tweak.read_text()
