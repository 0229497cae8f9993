"""An unlucky day: full disks, damaged files, two of everything, a stranger's checkpoint."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, command, environment, losses, run, train, wait_for
from test_train import same, write_checkpoint

import train_gpt

RUN = [*SMALL, "--val_every", 10, "--save_every", 6, "--prime_steps", 0, "--run_id", "r"]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run of 20 steps, whose checkpoint is of step 18."""
    folder = tmp_path_factory.mktemp("whole")
    assert train("tiny", *RUN, *text, "--log_dir", folder) == 0
    return folder / "r"


def one_line(message: str, *words: str) -> None:
    assert re.fullmatch(r"error: [^\n]+\n", message) and all(word in message for word in words), message


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_change_of_a_byte_is_refused_or_changes_nothing(whole, tmp_path, count):
    good, generator = (whole / "checkpoint.pt").read_bytes(), random.Random(count)
    content, refused = train_gpt.load_checkpoint(str(whole)), 0
    for i in range(count):
        damaged = bytearray(good)
        place = generator.randrange(len(good))
        damaged[place] ^= 1 << generator.randrange(8) if i % 2 else generator.randrange(1, 256)
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        try:
            assert same(train_gpt.load_checkpoint(str(tmp_path)), content)
        except train_gpt.RunError as error:
            one_line(f"error: {error}\n", str(tmp_path / "checkpoint.pt"), "give a run that has a whole one")
            refused += 1
    assert refused > count / 2


def leaves(content: dict, place: tuple = ()) -> list[tuple]:
    """The places of all values in a checkpoint."""
    if not isinstance(content, dict) or not content:
        return [place]
    return [leaf for name, value in content.items() for leaf in leaves(value, (*place, name))]


def put(content: dict, place: tuple, value) -> dict:
    """A copy in which `value` stands at that place."""
    name, *rest = place
    return content | {name: put(content[name], tuple(rest), value) if rest else value}


STRANGE = [None, "zz", -1, 10**20, float("nan"), {}, [], torch.zeros(3), torch.tensor(float("nan"))]


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_a_strangers_field_never_ends_in_a_traceback(whole, tmp_path, capsys, count):
    """Signed with its digest. What is accepted has a value of the right kind, and trains or says why it cannot."""
    content, generator = train_gpt.load_checkpoint(str(whole)), random.Random(count)
    places = leaves(content)
    for i in range(count):
        (folder := tmp_path / str(i)).mkdir()
        place = generator.choice(places) if i % 2 else generator.choice([p for p in places if p[0] != "config"])
        write_checkpoint(folder, put(content, place, generator.choice(STRANGE)))
        status = train("--resume", folder)
        if status:
            assert status == 2
            one_line(capsys.readouterr().err)


@pytest.mark.parametrize("place, value", [
    (("step",), 99), (("step",), -1), (("seconds",), float("nan")), (("adamw", "state"), {}), (("muon", "state"), {}),
    (("config", "matrix_optimizer"), "zz"), (("model", "lm_head.weight"), torch.zeros(320, 32, dtype=torch.int64)),
    (("model", "lm_head.weight"), torch.zeros(320, 32, dtype=torch.float16)), (("model",), {}), (("rng",), 5)])
def test_a_strangers_state_is_refused(whole, tmp_path, capsys, place, value):
    write_checkpoint(tmp_path, put(train_gpt.load_checkpoint(str(whole)), place, value))
    assert train("--resume", tmp_path) == 2
    one_line(capsys.readouterr().err)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("write", [
    lambda path: path.touch(), lambda path: path.mkdir(), lambda path: torch.save(Malicious(), path),
    lambda path: torch.save([1], path), lambda path: path.symlink_to(path)])
def test_what_is_no_checkpoint_gets_one_line(write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "checkpoint.pt")
    assert train("--resume", tmp_path) == 2
    one_line(capsys.readouterr().err, f"--resume {tmp_path}/checkpoint.pt")
    assert not Path("executed").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which takes root")
def test_a_full_disk(text, whole, tmp_path, capsys):
    """The run ends with a line, its last checkpoint stays; with room again it goes on to the same losses."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (whole / "checkpoint.pt").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        assert train("tiny", *RUN, *text, "--log_dir", disk) == 2
        one_line(capsys.readouterr().err, f"{disk}/r/checkpoint.pt.part", "make room", "--resume")
        assert sorted(path.name for path in (disk / "r").iterdir()) == ["checkpoint.pt", "lock", "log.txt"]
        subprocess.run(["mount", "-o", f"remount,size={10 * size}", str(disk)], check=True)
        assert train("--resume", disk / "r") == 0 and losses(disk / "r") == losses(whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_processes_on_one_run(text, tmp_path, capsys):
    process = subprocess.Popen(command("tiny", *RUN, *text, "--num_steps", 100_000, "--log_dir", tmp_path),
                               stdout=subprocess.DEVNULL, env=environment())
    try:
        wait_for(tmp_path / "r/log.txt", "^checkpoint: ")
        before = (tmp_path / "r/log.txt").read_text()
        assert train("--resume", tmp_path / "r") == 2
        one_line(capsys.readouterr().err, f"{tmp_path}/r", "end what runs there")
        wait_for(tmp_path / "r/log.txt", f"^step:{before.count('train_loss:') + 3}/")
        assert (tmp_path / "r/log.txt").read_text().count("run folder: ") == 2     # one in the source
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("change", [
    lambda path: path.write_bytes(bytes(path.stat().st_size)), lambda path: os.truncate(path, 1100), Path.unlink])
def test_data_that_change_during_a_run_change_nothing(text, whole, tmp_path, monkeypatch, change):
    shutil.copytree(text[1], tmp_path / "data")
    step = train_gpt.train_step

    def unlucky(run, tokens):
        if run.step == 3:
            for path in (tmp_path / "data").glob("*.bin"):
                change(path)
        step(run, tokens)

    monkeypatch.setattr(train_gpt, "train_step", unlucky)
    assert train("tiny", *RUN, "--data", tmp_path / "data", "--log_dir", tmp_path) == 0
    assert losses(tmp_path / "r") == losses(whole)


def test_a_run_folder_that_goes_away(text, tmp_path, monkeypatch, capsys):
    step = train_gpt.train_step
    monkeypatch.setattr(train_gpt, "train_step", lambda run, tokens: (
        step(run, tokens), run.step == 3 and shutil.rmtree(run.folder)))
    assert train("tiny", *RUN, *text, "--log_dir", tmp_path) == 2
    one_line(capsys.readouterr().err, f"{tmp_path}/r/log.txt: No such file")


HUGE = "99999999999999999999"


@pytest.mark.parametrize("option, value", [
    *[(name, HUGE) for name in ("num_heads", "num_layers", "num_steps", "batch_tokens", "seq_len", "ngram_rows")],
    ("matrix_lr_ratio", "1e308"), ("collective_timeout", "1e308"), ("stages", "99999999:1"), ("stages", "1:" + HUGE),
    ("run_id", ".."), ("run_id", 300 * "x"), ("run_id", "a/b"), ("log_dir", __file__), ("data", __file__)])
def test_odd_options(text, tmp_path, capsys, option, value):
    options = ["--log_dir", tmp_path, f"--{option}", value]
    assert train("tiny", *SMALL, *text, *options) == 2
    one_line(capsys.readouterr().err, value[:20] if "/" in value else f"--{option}")
    assert not list(tmp_path.iterdir())


def test_odd_shards(text, tmp_path, capsys):
    shutil.copytree(text[1], tmp_path / "data")
    for make in (Path.mkdir, lambda path: path.symlink_to(path)):
        make(odd := tmp_path / "data/train_0.bin")
        assert train("tiny", *SMALL, "--data", tmp_path / "data", "--log_dir", tmp_path / "logs") == 2
        one_line(capsys.readouterr().err, str(odd), "move it away")
        odd.unlink() if odd.is_symlink() else odd.rmdir()


def test_data_are_those_here_or_beside_the_trainer(tmp_path, monkeypatch):
    c = train_gpt.make_config(dict(track="tiny"))
    monkeypatch.chdir(tmp_path)
    assert c.folder in (Path(c.data), ROOT / c.data)
    (tmp_path / c.data).mkdir(parents=True)
    assert c.folder == Path(c.data)
    (tmp_path / c.data).rmdir()
    monkeypatch.setattr(train_gpt, "HERE", tmp_path / "there")
    (tmp_path / "there" / c.data).mkdir(parents=True)
    assert c.folder == tmp_path / "there" / c.data


# Root without what lets it write where it has no permission; anybody else is an ordinary user.
ORDINARY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(ORDINARY) and not shutil.which("setpriv"), reason="root needs setpriv to be an ordinary user")
@pytest.mark.parametrize("log_dir, message", [
    ("own", None), ("closed/logs", "closed/logs/r: Permission denied"), ("logs", "error: logs/r: Permission denied")])
def test_an_ordinary_user_without_a_home_in_a_read_only_repository(text, whole, tmp_path, log_dir, message):
    """It is also where it runs, so that `logs` would be in it."""
    (own := tmp_path / "own").mkdir()
    (closed := tmp_path / "closed").mkdir()
    shutil.copy(ROOT / "train_gpt.py", closed)
    closed.chmod(0o555)
    given = ["--log_dir", log_dir if log_dir == "logs" else tmp_path / log_dir]
    variables = {name: value for name, value in environment().items() if name != "HOME"}
    program = [*ORDINARY, sys.executable, closed / "train_gpt.py", "tiny", *map(str, [*RUN, *text, *given])]
    result = subprocess.run(program, capture_output=True, text=True, env=variables, cwd=closed)
    if message:
        assert result.returncode == 2
        one_line(result.stderr, message, "give another --log_dir")
    else:
        assert result.returncode == 0 and losses(own / "r") == losses(whole), result.stderr


def test_a_clock_that_goes_back(text, whole, tmp_path, monkeypatch):
    """Two runs that begin in the same second have folders of their own, and no time is negative."""
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(train_gpt.time, "time", lambda: float(next(now)))
    monkeypatch.setattr(train_gpt.time, "strftime", lambda *_: "20010909-014640")
    for _ in range(2):
        assert train("tiny", *RUN, *text, "--log_dir", tmp_path, "--run_id", "") == 0
    first, second = tmp_path.iterdir()
    for folder in (first, second):
        assert losses(folder) == losses(whole)
        times = re.findall(r"train_time:(\S+)ms", (folder / "log.txt").read_text())
        assert sorted(times, key=int) == times and int(times[0]) > 0


SIGNALS = """
import os, random, signal, sys, time, train_gpt
folder, *options = sys.argv[1:]
generator, stops, i = random.Random(0), 0, 0
def start(arguments):
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        os._exit(train_gpt.main(arguments))
    return child
while stops < 60:
    i += 1
    arguments = [*options, "--log_dir", folder, "--run_id", f"r{i}"]
    while True:
        child = start(arguments)
        time.sleep(generator.uniform(0.02, 0.5))
        number = generator.choice([signal.SIGINT, signal.SIGTERM])
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        saved = os.path.exists(f"{folder}/r{i}/checkpoint.pt")
        assert status in (0, 128 + number, -number), status
        if status == 0:
            break
        if saved:
            arguments = ["--resume", f"{folder}/r{i}"]
        elif os.path.exists(f"{folder}/r{i}"):     # ended before the handlers were there: nothing to go on with
            os.rename(f"{folder}/r{i}", f"{folder}/x{i}_{stops}")
        stops += 1
print("stops", stops)
"""


@pytest.mark.slow
def test_signals_at_any_moment(text, whole, tmp_path):
    """Ctrl-C and SIGTERM at 60 random moments or more, while it sets up, trains, validates and saves."""
    options = ["tiny", *map(str, [*SMALL, *text, "--val_every", 1, "--save_every", 2])]
    result = subprocess.run([sys.executable, "-c", SIGNALS, str(tmp_path), *options], capture_output=True, text=True,
                            timeout=1200, env={**environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    expected = {key: loss for key, loss in losses(whole).items() if key[0] == "train"}
    assert int(re.search(r"stops (\d+)", result.stdout)[1]) >= 60
    for folder in tmp_path.glob("r*"):
        assert {key: loss for key, loss in losses(folder).items() if key[0] == "train"} == expected


@pytest.mark.slow
def test_odd_values_of_every_option(text, tmp_path, monkeypatch):
    """500 of them: a clear line or a run, never a traceback or a hang."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")     # where a log_dir of any name goes
    generator, names = random.Random(0), [name for name in vars(train_gpt.Config()) if name != "track"]
    odd = ["", " ", "0", "-1", "1e308", HUGE, "nan", "inf", "0x10", "1.5", "é", "../x", "/dev/null", 5000 * "a", "{}"]
    for i in range(500):
        option, value = generator.choice(names), generator.choice(odd)
        options = [*SMALL, *text, "--num_steps", 2, "--log_dir", tmp_path / str(i), f"--{option}={value}"]
        status = train("tiny", *options)
        assert status in (0, 2), (option, value)


def test_the_real_command_says_it_on_one_line(text, tmp_path):
    result = run("tiny", *SMALL, *text, "--log_dir", __file__)
    assert result.returncode == 2 and result.stdout == ""
    one_line(result.stderr, __file__)
