"""bench/ab.py: order, going on after a kill, crashes and early ends, with a trainer that only writes a log."""

import importlib
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

import numpy as np
import pytest
from conftest import ROOT, SMALL
from scipy import stats

sys.path.append(str(ROOT / "bench"))
ab, compare = importlib.import_module("ab"), importlib.import_module("compare")     # ab finds records/

# Its loss falls with --lr, by far more than its noise. --control names a file: run folders in it that `crash` or `hold`
# (in the middle, while the file says so).
FAKE = '''
import hashlib, json, os, sys, time
from pathlib import Path

source = Path(__file__).read_text()
c = dict(track=sys.argv[1], num_steps=4, val_tokens=8, target=9.0, lr=0.002, seed=0, control="")
for name, value in zip(sys.argv[2::2], sys.argv[3::2]):
    c[name[2:]] = type(c.get(name[2:], ""))(value)
folder = Path(c["log_dir"], c["run_id"])
with open(folder.parent / "calls.txt", "a") as calls:
    calls.write(c["run_id"] + "\\n")


def controlled():
    return dict(line.split() for line in Path(c["control"]).read_text().splitlines()) if c["control"] else {}


print("the trainer's first words", flush=True)
if controlled().get(c["run_id"]) == "crash":
    sys.exit("ValueError: a crash asked for")
log = open(folder / "log.txt", "w")
git = os.popen(f"git -C {Path(__file__).parent} describe --always 2>/dev/null").read() if "git" in c else ""
facts = ["=" * 100, f"run folder: {folder}", f"config: {json.dumps(c)}",
         f"source: sha256 {hashlib.sha256(source.encode()).hexdigest()}, git {git.strip() or 'none'}",
         "versions: python 3.11.7, torch 2.13.0, cuda None, Linux", "hardware: 1 x a CPU", "host: here",
         "data sha256: train aa, val bb", "step:2/4 train_loss:5 train_time:50000ms step_avg:1ms"]
print(source + "\\n".join(facts), file=log, flush=True)
while controlled().get(c["run_id"]) == "hold":
    (folder / "held").write_text(f"{os.getpid()}\\n")
    time.sleep(0.02)
noise = (c["seed"] * 7919 + round(c["lr"] * 1e6) * 31) % 13
print(f"step:4/4 val_loss:{3 - 500 * (c['lr'] - 0.002) + noise / 1000} train_time:{100_000 + 40 * noise}ms", file=log)
'''


@pytest.fixture
def repository(tmp_path):
    """A repository with ab.py, compare.py and the trainer above."""
    for name in ("bench/ab.py", "records/compare.py", "records/logs.py"):
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "repo" / name)
    (tmp_path / "repo/train_gpt.py").write_text(FAKE)
    return tmp_path / "repo"


@pytest.fixture
def start(repository, tmp_path, monkeypatch, capsys):
    """Runs ab.py in this process, in that repository: returns (status, or text of the error, and what it printed)."""
    monkeypatch.setattr(ab, "ROOT", repository)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def start(*arguments, out=tmp_path / "out", metric="final_loss"):
        monkeypatch.setattr(sys, "argv", ["ab.py", str(out), "--metric", metric, *arguments])
        try:
            status = ab.main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out + captured.err

    return start


def calls(out: Path) -> list[str]:
    return (out / "calls.txt").read_text().split()


@pytest.fixture
def run_compare(monkeypatch, capsys):
    """Runs records/compare.py in this process; returns what it printed, and the error that it ended with."""
    def run_compare(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        try:
            error = compare.main()
        except SystemExit as exit_:
            error = exit_.code
        return capsys.readouterr().out, error
    return run_compare


def test_order_and_going_on(start, run_compare, repository, tmp_path):
    """Two candidates, three blocks: A B C, C B A, A B C; what is finished is not run again, nor is the plan changed."""
    out, arguments = tmp_path / "out", ["--candidate", "--lr 0.003", "--candidate", "", "--seeds", "7,3,5",
                                        "--fields", "--lr 0.001 --num_steps 4"]
    status, printed = start(*arguments)
    assert status == 0
    order = ["00_A_seed7", "00_B_seed7", "00_C_seed7", "01_C_seed3", "01_B_seed3", "01_A_seed3",
             "02_A_seed5", "02_B_seed5", "02_C_seed5"]
    plan = json.loads((out / "plan.json").read_text())
    lines = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert calls(out) == plan["runs"] == [line["run"] for line in lines] == order
    assert (plan["metric"], plan["alpha"], plan["alpha_each"], plan["seeds"]) == ("final_loss", 0.05, 0.025, [7, 3, 5])
    assert "2 equal shares" in plan["rule"] and plan["rule"] in printed
    assert {side: facts["command"].split("tiny ")[1] for side, facts in plan["sides"].items()} == dict(
        A="--lr 0.001 --num_steps 4", B="--lr 0.001 --num_steps 4 --lr 0.003", C="--lr 0.001 --num_steps 4")
    for line in lines:
        assert (line["status"], line["outcome"]) == (0, "finished") and line["start"] <= line["end"]
        assert len(line["before"]["load"]) == len(line["after"]["load"]) == 3
    assert (out / "01_B_seed3/console.txt").read_text() == "the trainer's first words\n"

    # The numbers: noise as the trainer above makes it, the verdicts as compare has them.
    noise = {name: (int(name[9:]) * 7919 + (3000 if "B" in name else 1000) * 31) % 13 for name in order}
    for name in order:
        loss = 3 - 500 * (0.001 if "B" in name else -0.001) + noise[name] / 1000
        assert re.search(rf"^{name}  loss {loss:.4f}  {100 + noise[name] / 25:.2f} s", printed, re.M), printed
    ratio = (100 + noise["02_B_seed5"] / 25) / (100 + noise["02_A_seed5"] / 25)
    assert re.search(rf"^02_B_seed5 .*  B/A {ratio:.3f}$", printed, re.M)
    assert re.search(r"^01_A_seed3 .*  C/A 1.000  B/A \S+$", printed, re.M)
    reports = printed.split("\n\n")[1:]
    assert reports[0].startswith("B, --lr 0.003, against A:\nmetric: final_loss, alpha 0.025\nchange: lr ")
    lower = 1 - np.mean([noise[name] / 1000 * (1 if "B" in name else -1) for name in order if "C" not in name]) * 2
    assert f"verdict: faster (B's loss is {lower:.4f} lower" in reports[0]
    assert f"difference, B - A: -{lower:.4f}" in reports[0] and "not counted" not in reports[0]
    assert reports[1].startswith("C, the baseline again, against A:") and "verdict: not decided (p = 1" in reports[1]
    assert "difference, C - A: +0.0000" in reports[1]
    by_compare = json.loads(run_compare(out, "--json")[0])
    assert [(result["candidate"], result["decision"]) for result in by_compare] == [
        ("B", "faster"), ("C", "not decided")]

    # A second start, the repository's source edited: nothing is run, and the verdicts are the same.
    (repository / "train_gpt.py").write_text("raise SystemExit(1)\n")
    status, again = start(*arguments)
    assert status == 0 and calls(out) == order and again.split("\n\n")[1:] == reports
    assert again.count("(was there)") == 9
    for change, words in ((["--alpha", "0.01"], "alpha: 0.05 then, 0.01 now"), (["--nproc", "2"], "nproc: 1 then, 2"),
                          (["--candidate", ""], "candidates: ['--lr 0.003', ''] then"), (["--track", "x"], "track: "),
                          (["--looks", "2"], "looks: [] then, [2] now")):
        status, _ = start(*arguments, *change)
        assert words in status and "Give those, or another OUT" in status
    assert "metric: 'final_loss' then" in start(*arguments, metric="loss_at_time")[0]
    with open(out / "source_B/train_gpt.py", "a") as source:
        source.write("# later\n")
    assert "source_B was edited after the start" in start(*arguments)[0]
    (out / "plan.json").write_text("{")
    assert "plan.json is damaged" in start(*arguments)[0]


@pytest.fixture
def process(repository, tmp_path):
    """Starts ab.py as a process of its own, whose run 01_B_seed1, the third of four, holds; both go on."""
    control, out, started = tmp_path / "control", tmp_path / "out", []
    arguments = ["--seeds", "2", "--fields", f"--control {control}", "--candidate", "--lr 0.003"]

    def start_process():
        started.append(subprocess.Popen(
            [sys.executable, repository / "bench/ab.py", out, "--metric", "final_loss", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    control.write_text("01_B_seed1 hold\n")
    first = start_process()
    held = out / "01_B_seed1/held"
    while not (held.exists() and held.read_text().endswith("\n")):
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.02)
    yield first, int(held.read_text()), control, arguments, start_process
    control.write_text("")     # ends a run that is still there
    for ab_process in started:
        ab_process.kill()
        ab_process.communicate()


ORDER = ["00_A_seed0", "00_B_seed0", "01_B_seed1", "01_A_seed1"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_goes_on_after_a_cut(process, start, tmp_path, how):
    """No finished run is repeated; the half one is put aside and run anew. SIGKILL goes to both processes."""
    first, run, control, arguments, _ = process
    out = tmp_path / "out"
    first.send_signal(how)
    if how == signal.SIGKILL:
        os.kill(run, how)
    printed = first.communicate(timeout=60)[0]
    if how != signal.SIGKILL:
        assert first.returncode == 128 + how and "the same command goes on" in printed
        last = json.loads((out / "runs.jsonl").read_text().splitlines()[-1])
        assert (last["run"], last["outcome"], last["status"]) == ("01_B_seed1", "stopped", -signal.SIGTERM)
        with pytest.raises(ProcessLookupError):
            os.kill(run, 0)
    control.write_text("")
    status, printed = start(*arguments)
    assert status == 0, printed
    assert calls(out) == [*ORDER[:3], *ORDER[2:]]
    assert re.findall(r"^(\S+)  loss .*\(was there\)$", printed, re.M) == ORDER[:2]
    assert f"01_B_seed1  did not finish: now in {out}/aside/01_B_seed1_1, and run anew" in printed
    assert (out / "aside/01_B_seed1_1/held").exists() and not (out / "01_B_seed1/held").exists()
    assert "verdict: faster" in printed


def test_a_run_that_a_killed_one_left_is_waited_for(process, tmp_path):
    first, _, control, _, start_process = process
    first.kill()
    first.wait()
    second = start_process()
    line = second.stdout.readline()
    assert line.startswith("waiting for the end of another ab.py, or of a run that a killed one left")
    control.write_text("")
    printed = second.communicate(timeout=60)[0]
    assert second.returncode == 0 and calls(tmp_path / "out") == ORDER, printed
    assert "verdict: faster" in printed and not (tmp_path / "out/aside").exists()


def test_a_candidate_that_crashes(start, run_compare, tmp_path):
    """B crashes at seeds 0 and 1 and is given up; A and C end; a second start repeats nothing and says the same."""
    control, out = tmp_path / "control", tmp_path / "out"
    control.write_text("00_B_seed0 crash\n01_B_seed1 crash\n")
    arguments = ["--seeds", "4", "--fields", f"--control {control}", "--candidate", "--lr 0.004",
                 "--candidate", "--lr 0.003"]
    status, printed = start(*arguments)
    assert status == 1
    blocks = enumerate(("ABC", "CBA", "AC", "CA"))
    assert calls(out) == [f"{i:02}_{side}_seed{i}" for i, sides in blocks for side in sides]
    assert "00_B_seed0  crashed: exit status 1; " in printed
    assert "    the trainer's first words\n    ValueError: a crash asked for\n" in printed
    assert "02_B_seed2  not started: B crashed 2 times in a row" in printed
    verdicts = re.findall(r"^verdict: .*", printed, re.M)
    assert verdicts[0] == "verdict: not decided (B crashed: 00_B_seed0, 01_B_seed1)"
    assert verdicts[1].startswith("verdict: faster (C's loss is 0.5") and len(verdicts) == 2
    lines = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(line["run"], line["status"]) for line in lines if line["outcome"] == "crashed"] == [
        ("00_B_seed0", 1), ("01_B_seed1", 1)]
    control.write_text("")
    status, again = start(*arguments)
    assert status == 1 and len(calls(out)) == 10 and re.findall(r"^verdict: .*", again, re.M) == verdicts
    assert "00_B_seed0  crashed before, see " in again
    by_compare, error = run_compare(out)
    assert "side B has no finished run" in error and by_compare.splitlines()[-1] == verdicts[1]
    with open(out / "runs.jsonl", "a") as file:
        file.write("{")
    assert "runs.jsonl, line 11: is damaged" in start(*arguments)[0]


def test_a_crash_now_and_then_does_not_end_a_side(start, tmp_path):
    control = tmp_path / "control"
    control.write_text("00_B_seed0 crash\n02_B_seed2 crash\n")
    status, printed = start("--seeds", "4", "--fields", f"--control {control}", "--candidate", "--lr 0.004")
    assert status == 1 and len(calls(tmp_path / "out")) == 8
    assert "verdict: not decided (B crashed: 00_B_seed0, 02_B_seed2)" in printed


def test_a_baseline_that_crashes_ends_it(start, tmp_path):
    control, out = tmp_path / "control", tmp_path / "out"
    control.write_text("01_A_seed1 crash\n")
    arguments = ["--seeds", "2", "--fields", f"--control {control}", "--candidate", "--lr 0.003"]
    status, printed = start(*arguments)
    assert "the baseline crashed" in status and "ValueError: a crash asked for" in printed
    control.write_text("")
    status, printed = start(*arguments)
    assert status == 0 and calls(out) == [*ORDER, "01_A_seed1"] and "verdict: faster" in printed


def test_git_revision_and_file(start, repository, tmp_path):
    """B from a commit, with its kernels.py; C a file with other fields; their logs do not claim a commit."""
    def git(*arguments):
        return subprocess.run(["git", "-C", repository, "-c", "user.name=x", "-c", "user.email=x@x", *arguments],
                              check=True, capture_output=True, text=True).stdout.strip()
    git("init", "-q")
    (repository / "kernels.py").write_text("# of the commit\n")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    (repository / "train_gpt.py").write_text(FAKE + "# edited\n")
    (repository / "kernels.py").unlink()
    (tmp_path / "my tweak.py").write_text(FAKE.replace("3 - 500", "2 - 500"))
    out = repository / "logs/out"
    arguments = ["--seeds", "2", "--fields", "--git yes", "--candidate", "git:HEAD", "--candidate",
                 f"'{tmp_path}/my tweak.py' --lr 0.0021"]
    status, printed = start(*arguments, out=out)
    assert status == 0, printed
    assert (out / "source_A/train_gpt.py").read_text() == FAKE + "# edited\n"
    assert (out / "source_B/train_gpt.py").read_text() == FAKE
    assert (out / "source_B/kernels.py").read_text() == "# of the commit\n"
    assert not (out / "source_A/kernels.py").exists()
    sides = json.loads((out / "plan.json").read_text())["sides"]
    assert [sides[side]["git"] for side in "ABC"] == [f"{commit}-dirty", commit, "none"]
    assert {"train_gpt.py", "kernels.py"} == sides["B"]["sha256"].keys()
    assert ", git none" in (out / "00_B_seed0/log.txt").read_text()
    assert "C's loss is 1.0" in printed and re.search(r"C, .*\nmetric.*\nchange: lr 0.002 -> 0.0021; source ", printed)
    assert "git rev-parse" in start("--candidate", "git:nowhere", out=tmp_path / "other")[0]


def test_several_processes(start, tmp_path, monkeypatch):
    """An interpreter that notes what torchrun is asked for, and starts the trainer once."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/launched\nshift 4\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert start("--nproc", "2", "--seeds", "1", "--candidate", "--lr 0.003")[0] == 0
    launched = (tmp_path / "launched").read_text().splitlines()
    assert launched == [
        f"-m torch.distributed.run --standalone --nproc_per_node=2 {tmp_path}/out/source_{side}/train_gpt.py tiny "
        f"{fields}--seed 0 --log_dir {tmp_path}/out --run_id 00_{side}_seed0"
        for side, fields in (("A", ""), ("B", "--lr 0.003 "))]


def test_ends_early_by_the_rule(start, run_compare, tmp_path):
    out, arguments = tmp_path / "out", ["--seeds", "4", "--looks", "2,3", "--candidate", "--lr 0.003"]
    status, printed = start(*arguments)
    assert status == 0 and calls(out) == ORDER
    assert "blocks: 4, or 2 or 3 where these decide" in printed and "3 equal shares" in printed
    assert "look after 2 of 4 blocks: B faster (" in printed and "alpha 0.0166667" in printed
    assert f"warning: ended early: after 2 of 4 blocks, a look in {out}/plan.json" in printed
    assert printed.splitlines()[-1].startswith("verdict: faster")
    assert start(*arguments)[1].splitlines()[-1] == printed.splitlines()[-1] and calls(out) == ORDER
    # compare agrees, but not where a run is left out of the look, nor where later ones are on the disk
    assert run_compare(out)[0].splitlines()[-1] == printed.splitlines()[-1]
    shutil.copytree(out / "00_A_seed0", out / "02_A_seed2")
    some = [f"{out}/{name}" for name in ORDER]
    result = run_compare(some[0], some[3], "vs", *some[1:3], "--metric", "final_loss", "--alpha", 0.05 / 3)[0]
    assert "void: runs left out" in result and result.splitlines()[-1].startswith("verdict: not decided")
    shutil.rmtree(out / "02_A_seed2")
    shutil.rmtree(out / "01_B_seed1")
    assert "void: runs left out" in run_compare(out)[0]


def test_goes_on_past_a_look_that_does_not_decide(start, tmp_path):
    """B differs from A by chance alone; C would be decided. A second start does not look again."""
    arguments = ["--seeds", "3", "--looks", "2", "--candidate", "--lr 0.002001", "--candidate", "--lr 0.003"]
    status, printed = start(*arguments)
    assert status == 0 and len(calls(tmp_path / "out")) == 9
    assert re.search("look after 2 of 3 blocks: B not decided .*; C faster", printed) and "ended early" not in printed
    assert "look after" not in start(*arguments)[1]


def test_the_shares_keep_the_chance_of_a_wrong_verdict(start, repository):
    """5,000 experiments without a difference, two looks and the end: at most alpha of them decide at any of the three.

    At the full alpha each time, as many as 11% would; the standard errors are 0.3 and 0.4 points.
    """
    (repository / "train_gpt.py").write_text("raise SystemExit\n")     # only the plan is of interest
    start("--seeds", "8", "--looks", "3,5", "--candidate", "")
    share = json.loads((repository.parent / "out/plan.json").read_text())["alpha_each"]
    losses = np.random.default_rng(0).normal(3.28, 0.002, (2, 5000, 8))
    p = np.min([stats.ttest_ind(*losses[..., :look], axis=1, equal_var=False).pvalue for look in (3, 5, 8)], axis=0)
    assert 0.02 < np.mean(p < share) < 0.05 < 0.08 < np.mean(p < 0.05)


@pytest.mark.parametrize("arguments, words", [
    (["--candidate", "nowhere.py"], "nowhere.py: no such file"),
    (["--candidate", "--seed 3"], "leave --seed out"),
    (["--candidate", "", "--fields", "--run_id=x --lr 1"], "leave --run_id=x out"),
    (["--candidate", "'a"], "No closing quotation"),
    (["--candidate", "", "--fields", "small"], "--fields small: must begin with '--'"),
    (["--candidate", "", "--seeds", "0"], "--seeds 0: must be"),
    (["--candidate", "", "--seeds", "3,3"], "--seeds 3,3: must be"),
    (["--candidate", "", "--seeds", "x"], "--seeds x: must be"),
    (["--candidate", "", "--looks", "1"], "--looks [1]: must ascend"),
    (["--candidate", "", "--looks", "5"], "--looks [5]: must ascend"),
    (["--candidate", "", "--looks", "4,3"], "--looks [4, 3]: must ascend"),
    (["--candidate", "", "--alpha", "5"], "--alpha 5.0: must lie"),
    (["--candidate", "", "--nproc", "0"], "--nproc 0: must be"),
])
def test_bad_input(start, tmp_path, arguments, words):
    assert words in start(*arguments)[0]
    assert not (tmp_path / "out/plan.json").exists()


def test_a_folder_of_something_else_is_left_alone(start, tmp_path):
    (tmp_path / "out/run").mkdir(parents=True)
    assert "has no plan.json, but holds run; name a new folder" in start("--candidate", "")[0]


def test_load(start, tmp_path, monkeypatch):
    """Others on the cores and on the GPUs call for a warning; the clocks are in runs.jsonl."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text("""#!/bin/sh
case "$1" in
    --query-gpu=clocks.sm,temperature.gpu,power.draw,*) printf 'names\n1980 MHz, 40, 100 W\n' ;;
    --query-compute-apps=*) printf 'pid, process_name\n42, someone\n' ;;
esac
""")
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    clock = iter(range(0, 10**6, 10**4))     # 10,000 core seconds a run
    monkeypatch.setattr(ab, "busy_seconds", lambda: next(clock))
    printed = start("--candidate", "--lr 0.003", "--seeds", "1")[1]
    assert "warning: before 00_A_seed0, others are on the GPUs: 42, someone" in printed
    assert re.search(r"warning: while 00_B_seed0 ran, others used \d+\.\d of the \d+ cores", printed)
    line = json.loads((tmp_path / "out/runs.jsonl").read_text().splitlines()[0])
    assert line["before"]["gpus"] == line["after"]["gpus"] == ["names", "1980 MHz, 40, 100 W"]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat here")
def test_busy_seconds_hold_those_of_a_run():
    busy, own = ab.busy_seconds(), ab.own_seconds()
    subprocess.run([sys.executable, "-S", "-c", "import time\nwhile time.process_time() < 0.4: pass"], check=True)
    busy, own = ab.busy_seconds() - busy, ab.own_seconds() - own
    assert own >= 0.39 and busy >= own - 0.1     # ticks of 10 ms; what others did comes on top


def test_the_trainer(text, start, tmp_path, monkeypatch):
    """The real train_gpt.py."""
    monkeypatch.setattr(ab, "ROOT", ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fields = shlex.join([*SMALL, *text, "--num_steps", "4"])
    status, printed = start("--seeds", "1", "--fields", fields, "--candidate", "--lr 0.003")
    assert status == 0, printed
    assert re.search(r"^00_B_seed0  loss \d\.\d{4}  \d+\.\d\d s  B/A \d+\.\d{3}$", printed, re.M)
    assert "change: lr 0.002 -> 0.003\n" in printed
    assert printed.splitlines()[-1] == "verdict: not decided (too few runs)"
    for side in "AB":
        run = ab.read_log(tmp_path / f"out/00_{side}_seed0")
        assert run.finished and run.source == (ROOT / "train_gpt.py").read_text() and run.host
