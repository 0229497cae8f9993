"""tools/watch.py against the trainer's own logs: read as they grow, shown beside a record, and mirrored."""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import watch
from conftest import ROOT, SMALL, command, environment, losses, train
from runs import read_log, write_record

STEPS = [*SMALL, "--val_every", "10", "--run_id", "r"]


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """A folder with one finished run of 20 steps."""
    folder = tmp_path_factory.mktemp("logs")
    assert train("tiny", *STEPS, *text, "--log_dir", folder) == 0
    return folder


@pytest.fixture
def shown(monkeypatch, capsys):
    """Calls the program as a pipe does; returns its exit status, the picture and what is on stderr."""
    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["watch.py", *map(str, arguments)])
        try:
            watch.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


def test_a_real_run_in_a_pipe(folder):
    output = subprocess.run([sys.executable, ROOT / "tools/watch.py", folder], capture_output=True, text=True)
    run = read_log(folder / "r")
    assert (output.returncode, output.stderr) == (0, "")
    assert all(len(line) <= 100 for line in output.stdout.splitlines())
    words = output.stdout.split()
    assert {"r", "finished,", "tiny,", "20/20", "100%"} <= set(words), output.stdout
    assert {f"{run.final[1]:.4f}", f"{run.losses['train'][20][1]:.4f}"} <= set(words)
    # Its seconds in the log, from which the speed comes, are rounded to ms.
    speed = next(int(word.replace(",", "")) for word in words if re.fullmatch(r"[\d,]*\d{3}", word))
    assert abs(speed / run.summary["tokens_per_second"] - 1) < 2 / 1e3 / run.final[0] + 1e-3


def test_a_log_that_comes_in_pieces_is_the_whole_log(folder, tmp_path):
    """Cut in the source, a line or a character, at each of which a kill or the file system may cut it."""
    source, host, rest = (folder / "r/log.txt").read_bytes().rpartition(b"\nhost: ")
    data, path = source + host + "ö".encode() + rest, tmp_path / "log.txt"
    cuts = sorted({*np.random.default_rng(0).integers(0, len(data), 40), *range(len(data) - 2000, len(data), 97)})
    cuts += [data.index("ö".encode()) + 1, len(data)]
    log, lines = watch.Log(path), ""
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        lines += log.read()
        if log.run:
            watch.picture({"r": log}, 12, 100)
    assert lines.encode() == data and log.run == read_log(path) and log.run.losses["val"].keys() == {10, 20}
    path.write_bytes(data[:-500])      # another run has its place
    assert log.read().encode() == data[:-500].rpartition(b"\n")[0] + b"\n"


def test_states(folder, tmp_path):
    lines = (folder / "r/log.txt").read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if line.startswith("step:12/"))
    path, begun = tmp_path / "log.txt", "".join(lines[:end + 1])
    stopped = begun + "stopped at step 12/20; --resume x\n"
    for content, silent, state in [("".join(lines), 9e9, "finished"), (begun, 5, "running"), (begun, 200, "stalled"),
                                   (stopped, 9e9, "stopped"), (stopped + begun, 5, "running"),
                                   (begun.partition("step:1/")[0], 200, "running")]:     # it compiles
        path.write_text(content)
        os.utime(path, (time.time() - silent,) * 2)
        log = watch.Log(path)
        log.read()
        assert log.state() == state, (content[-200:], silent)


def test_the_records_loss_at_the_same_step(folder, tmp_path, monkeypatch):
    """Five runs of a recipe, 1 to 5 below the run; faster recipes miss the target or are shorter."""
    run, recipes = read_log(folder / "r"), []
    for recipe, seconds, best, end in (("good", 3, 1, 20), ("missed", 2, -1, 20), ("short", 1, 9, 10)):
        for seed in range(5):
            lower = {}
            for kind, points in run.losses.items():
                lower[kind] = {step: (seconds * step, loss - best * (1 + seed))
                               for step, (_, loss) in points.items() if step <= end}
            config = {**run.config, "seed": seed, "lr": seconds / 1e3, "target": run.final[1], "num_steps": end}
            recipes.append(replace(run, name=f"{recipe}{seed}", recipe=recipe, config=config, losses=lower,
                                   num_steps=end))
    record = tmp_path / "records/tiny/2026-01-01_mine"
    record.mkdir(parents=True)
    write_record(record, recipes)
    monkeypatch.setattr(watch, "ROOT", tmp_path)
    watch.record_of.cache_clear()
    assert watch.record_of("tiny", 10)[0].recipe == watch.record_of("tiny", 7)[0].recipe == "short"
    runs = watch.record_of("tiny", 20)
    assert [(other.recipe, other.config["seed"]) for other in runs] == [("good", seed) for seed in range(5)]
    middle = (run.losses["train"][4][1] + run.losses["train"][5][1]) / 2 - 3
    assert watch.loss_at(runs, "train", 4.5) == pytest.approx(middle, abs=1e-4)
    log = watch.Log(folder / "r/log.txt")
    log.read()
    cells = [str(cell) for cell in watch.row("r", log, 10)]
    assert cells[4] == f"{run.final[1] - 3:.4f}\n+3.0000"
    watch.record_of.cache_clear()


def test_the_curve_and_the_time_left_of_half_a_run(folder):
    """Steps of 30 seconds and 512 tokens, of which ten are left; its loss falls by 1 in each."""
    log = watch.Log(folder / "r/log.txt")
    log.read()
    points = {step: (30.0 * step, 10.0 - step) for step in range(1, 11)}
    log.run, log.changed = replace(log.run, losses=dict(train=points, val={})), time.time()
    name, step, loss, val, _, curve, speed, left = map(str, watch.row("r", log, 20))
    assert (name, step, loss, val) == ("r\nrunning, tiny, 300 s", "10/20\n50%", "0.0000", "-")
    assert (speed, left) == ("17", "0:05:00")
    assert curve == "".join(sorted(curve[:10], reverse=True)) + 10 * " " and curve[0] == "█" and curve[9] == "▁"


def test_folders_come_and_go(folder, tmp_path, shown):
    logs, here = {}, tmp_path / "logs"
    assert watch.look(here, logs) == {} and shown(here)[1].split() == ["no", "run", "yet"]
    shutil.copytree(folder / "r", here / "group/[red]a")
    (here / "foreign").mkdir()
    (here / "foreign/log.txt").write_bytes(b"\xff\x1b[2J 1\n2\n")
    assert watch.look(here, logs).keys() == {"group/[red]a", "foreign"}
    status, picture, _ = shown(here)
    assert status == 0 and "group/[red]a" in picture and "left out:" in picture and "\x1b" not in picture
    shutil.rmtree(here / "group")
    assert watch.look(here, logs).keys() == logs.keys() == {"foreign"}
    assert "\n r " in shown(folder / "r")[1] and "\n r " in shown(folder / "r/log.txt")[1]


@pytest.mark.parametrize("arguments, error", [
    (["nowhere", "--once"], "error: nowhere: does not exist; give the folder of runs\n"),
    (["logs", "--most", "0"], "error: --most 0: give 1 or more\n"),
    (["logs", "--wandb", "p"], "error: --wandb p: needs a package: pip install wandb\n"),
    (["logs", "--tensorboard", "d"], "error: --tensorboard d: needs a package: pip install tensorboard\n")])
def test_bad_input(shown, monkeypatch, arguments, error):
    for package in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)     # as where it is not installed
    assert shown(*arguments) == (2, "", error)


def test_mirrors_have_every_number_of_the_log(folder, shown, monkeypatch, tmp_path):
    points, calls = {"board": {}, "wandb": {}}, []

    def writer(path, **options):
        return SimpleNamespace(close=lambda: calls.append(path), add_scalar=lambda key, value, step:
                               points["board"].update({(key, step): value}))

    def init(**options):
        return SimpleNamespace(finish=lambda: calls.append(options["project"]), log=lambda values, step:
                               points["wandb"].update({(key, step): values[key] for key in values}))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=KeyError))
    shutil.copytree(folder / "r", tmp_path / "a/r")
    with open(tmp_path / "a/r/log.txt", "a") as log:
        print("step:20/20 mine/norm:1.5e-07 odd:1.2.3 bad:nan train_time:2000ms", file=log)
    assert shown(tmp_path, "--once", "--tensorboard", tmp_path / "tb", "--wandb", "p")[0] == 0
    found = losses(folder / "r")
    for values in points.values():
        assert {(key.removesuffix("_loss"), step): f"{value:.6f}" for (key, step), value in values.items()
                if key.endswith("_loss")} == found
        assert values["mine/norm", 20] == 1.5e-07 and np.isnan(values["bad", 20]) and values["train_time", 20] == 2000
        assert len([key for key, _ in values if key == "step_avg"]) == 20 and ("odd", 20) not in values
    assert sorted(calls) == sorted([str(tmp_path / "tb/a/r"), "p"])


@pytest.mark.slow
def test_a_running_trainer_on_a_terminal(text, tmp_path):
    """From before its folder is there to its end; Ctrl-C ends the watching, as it should."""
    terminal, end = pty.openpty()
    logs = ["--log_dir", tmp_path / "logs"]
    watching = subprocess.Popen([sys.executable, ROOT / "tools/watch.py", logs[1]], stdout=end)
    trainer = subprocess.Popen(command("tiny", *STEPS, "--num_steps", 600, "--val_every", 0, *text, *logs),
                               stdout=subprocess.DEVNULL, env=environment())
    seen, last = b"", time.monotonic() + 80
    while b"finished" not in seen and time.monotonic() < last:
        seen += os.read(terminal, 10_000)       # it draws every two seconds
    watching.send_signal(signal.SIGINT)
    assert (watching.wait(20), trainer.wait(60)) == (0, 0), seen
    places = [seen.find(word) for word in (b"no run yet", b"running", b"finished")]
    assert -1 < places[0] < places[1] < places[2], seen
