"""records/: keep.py keeps what is worth keeping, leaderboard.py counts right, reproduce.py runs what was recorded."""

import argparse
import hashlib
import json
import math
import re
import shlex
import sys
from pathlib import Path
from statistics import stdev

import compare
import keep
import leaderboard
import pytest
import reproduce
import runs
from conftest import ROOT, SMALL, losses, train
from test_runs import log_text, write

RECORDS = sorted(path.parent for path in ROOT.glob("records/*/**/runs.json"))


@pytest.fixture
def root(tmp_path) -> Path:
    """An empty repository, whose README has a leaderboard."""
    root = tmp_path / "repository"
    (root / "records" / "tiny").mkdir(parents=True)
    (root / "README.md").write_text("<!-- leaderboard tiny -->\n<!-- end -->\n")
    return root


def write_experiment(folder: Path, blocks: int = 6) -> Path:
    """Writes an experiment: A, AdamW, and B, Muon, on a machine that slows down; C stops; D is above the target."""
    variants = dict(A=("adamw", 1.29, 200), B=("muon", 1.28, 100), C=("muon", 1.27, 50), D=("muon", 1.31, 10))
    for block in range(blocks):
        for letter, (optimizer, loss, seconds) in variants.items():
            write(folder / f"0{block}_{letter}_seed{block}", loss + block / 1000, seconds * 1.5**block, target=1.3,
                  seed=block, matrix_optimizer=optimizer, val_tokens=1048576, run_id=f"x_20261201-10200{block}",
                  num_steps=10 if letter == "D" else 20, steps=5 if (letter, block) == ("C", 3) else None,
                  source="print('b')\n" if letter == "B" else "print('a')\n")
    names = [f"0{block}_{letter}_seed{block}" for block in range(blocks) for letter in variants]
    (folder / "plan.json").write_text(json.dumps(dict(
        metric="time_to_target", alpha=0.05, seeds=[*range(blocks)], fields="--x 1", baseline="", runs=names,
        candidates=["b.py --y 'two words'"])))
    return folder


RECIPES = ["AdamW", "Muon", "stopped", "fast"]


# keep.py and leaderboard.py

def test_keep_an_experiment(root, tmp_path):
    """The record holds its runs, plan, sources and verdict; the leaderboard has its recipes by time, AdamW as 1."""
    experiment = write_experiment(tmp_path / "logs")
    (experiment / "00_A_seed0" / "checkpoint.pt").write_text("large")
    record = keep.keep("ab", [experiment], RECIPES, root)
    assert record == root / "records" / "tiny" / "2026-12-01_ab"     # the day in the run_ids
    assert {path.name for path in record.iterdir()} == {"runs.json", "curves.json.gz", "plan.json", "change.diff",
                                                        "README.md", "loss.png"}
    sources = [f"records/sources/{hashlib.sha256(source).hexdigest()[:12]}.py"
               for source in (b"print('a')\n", b"print('b')\n")]
    assert {str(path.relative_to(root)) for path in root.glob("records/sources/*")} == {*sources}
    assert "-print('a')\n+print('b')\n" in (record / "change.diff").read_text()
    kept = {run.name: run for run in runs.read_record(record)}
    logs = {run.name: run for run in runs.find_runs([experiment])[0]}
    assert kept.keys() == logs.keys() and all(
        kept[name].config == logs[name].config and kept[name].losses["val"] == logs[name].losses["val"]
        and kept[name].source == logs[name].source for name in logs)

    readme = (record / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .*", readme, re.M)]
    mean = 100 * sum(1.5**block for block in range(6)) / 6
    assert rows[0] == ["variant", "n", "steps", "loss", "seconds", "time / A's", "against A, by time_to_target"]
    assert rows[3][:4] == ["B: Muon", "6", "20", f"1.2825 ± {stdev(range(6)) / 1000:.4f}"]
    assert rows[3][4].startswith(f"{mean:.1f} ± ") and rows[3][5] == "0.50"
    assert rows[3][6].startswith("faster (B takes 50.0%")
    assert rows[4][:2] == ["C: stopped", "5 and 1 stopped"] and rows[4][6].startswith("inconclusive (void")
    assert shlex.split(readme.split("```bash\n")[1].splitlines()[0])[3:] == [
        "--metric=time_to_target", "--seeds=0,1,2,3,4,5", "--fields=--x 1", f"--baseline={sources[0]}",
        f"--candidate={sources[1]} --y 'two words'"]
    board = (root / "README.md").read_text().splitlines()[3:-1]
    cells = [line.strip("| ").split(" | ") for line in board]
    assert [row[0].split("]")[0] for row in cells] == ["[Muon", "[AdamW"]
    assert [row[2] for row in cells] == ["0.50", "1.00"] and cells[0][1].startswith(f"{mean:.1f} ± ")


def test_a_crash_leaves_names_in_the_command_and_no_verdict(root, tmp_path):
    experiment = write_experiment(tmp_path / "logs", blocks=1)
    (experiment / "00_B_seed0/log.txt").unlink()
    (experiment / "00_A_seed0/log.txt").write_text(log_text(steps=5, matrix_optimizer="adamw"))
    readme = (keep.keep("crash", [experiment], [], root) / "README.md").read_text()
    assert "--candidate=b.py --y " in readme and "faster" not in readme and "| 0 and 1 stopped |" in readme


def test_keep_leaves_out_what_cannot_be_kept(root, tmp_path, capsys):
    paths = [write(tmp_path / "logs" / f"x{seed}", seed=seed) for seed in range(2)]
    bad = write(tmp_path / "logs" / "evil", text=log_text(track="../../../x"))
    record = keep.keep("two", [tmp_path / "logs"], [], root)
    assert [run.name for run in runs.read_record(record)] == ["x0", "x1"]
    assert f"left out: {bad}/log.txt is no log of a run, or damaged (track '../../../x'" in capsys.readouterr().err
    assert "README.md: has a part that is yet to be written" in leaderboard.update(root, write=False)[0]

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = write(tmp_path / "other" / "x0", track="small")
    unverified = write(tmp_path / "old", text=re.sub("source: sha256 [^,]*,", "source: sha256 -,", log_text()))
    for name, given, message in (
            ("two", paths, "never overwritten"), ("a/b", paths, "use letters"), ("../../x", paths, "use letters"),
            ("y", [*paths, write(tmp_path / "again" / "x0", seed=5)], "several runs have one name"),
            ("y", [paths[1], other], "several tracks"), ("y", [unverified], "has no source of the sha256"),
            ("y", [bad], "is no log of a run")):
        with pytest.raises(runs.LogError, match=message):
            keep.keep(name, given, [], root)
    with pytest.raises(runs.LogError, match="--recipes names 3, and the runs are 1 variants"):
        keep.keep("y", paths, ["a", "b", "c"], root)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= after.items() and {path.name for path in after.keys() - before.keys()} == {"log.txt"}


@pytest.mark.parametrize("change", [
    dict(seeds=[0, 1, 2, 3]), dict(seeds=[0, 1, 2, 3, 3]), dict(target=3.0), dict(hardware="1 x 2 threads of X"),
    dict(val_tokens=2048), dict(comparable="false"), dict(offset=0.0175), {}])
def test_what_takes_a_place(tmp_path, change):
    """Five seeds of one machine, data and target; p < 0.01, which a mean of 1.2995 with a std of 0.0016 has not."""
    for i, seed in enumerate(change.get("seeds", range(5))):
        text = log_text(1.28 + i / 1000 + change.get("offset", 0), target=change.get("target", 1.3), seed=seed,
                        hardware=change.get("hardware", "8 x H") if i == 4 else "8 x H",
                        val_tokens=change.get("val_tokens", 1048576))
        write(tmp_path / str(i), text=text + f"data_comparable: {change.get('comparable', 'true')}\n")
    found = max(runs.group(runs.find_runs([tmp_path])[0]), key=len)
    assert leaderboard.has_place(found) == (not change)


def test_only_an_experiment_on_time_takes_a_place(root, tmp_path):
    record = keep.keep("ab", [write_experiment(tmp_path / "logs")], RECIPES, root)
    assert RECIPES[0] in (root / "README.md").read_text()
    plan = (record / "plan.json").read_text()
    (record / "plan.json").write_text(plan.replace("time_to_target", "final_loss"))
    leaderboard.update(root, write=True)
    assert "No recipe holds a place on tiny yet." in (root / "README.md").read_text()


def test_no_ratio_across_dtypes_or_days(tmp_path):
    today, later = (runs.find_runs([write_experiment(tmp_path / day)])[0] for day in ("today", "later"))
    adamw, muon = ([run for run in today if run.side == letter] for letter in "AB")
    assert leaderboard.ratio_to_adamw(muon, [muon, adamw]) == leaderboard.ratio(muon, adamw) == pytest.approx(0.5)
    assert leaderboard.ratio([run for run in later if run.side == "B"], adamw) is None
    muon[0].config["dtype"], adamw[0].config["target"] = "bfloat16", 1.0
    assert leaderboard.ratio(muon, adamw) is None and leaderboard.ratio_to_adamw(adamw, [adamw]) is None


def test_tables_are_caught_and_put_right(root, tmp_path):
    record = keep.keep("ab", [write_experiment(tmp_path / "logs")], RECIPES, root)
    readme = record / "README.md"
    right = readme.read_text()
    for path, old, new in ((root / "README.md", "1.2825", "1.2725"), (readme, "| 0.50 |", "| 0.40 |")):
        before = path.read_text()
        assert before.count(old) == 1
        path.write_text(before.replace(old, new))
        assert any("a table is not that of the runs" in text and str(path.relative_to(root)) in text
                   for text in leaderboard.update(root, write=False))
        leaderboard.update(root, write=True)
        assert path.read_text() == before
    for old, new, message in (
            ("<!-- end -->\n", "", "stands alone"), ("<!-- record", "<!-- end -->\n<!-- record", "stands alone"),
            ("record tiny", "record now tiny", "holds no whole record"),
            ("record tiny/2", "record tiny/3", "holds no whole record")):
        readme.write_text(right.replace(old, new, 1))
        with pytest.raises(runs.LogError, match=message):
            leaderboard.update(root, write=True)
        assert readme.read_text() == right.replace(old, new, 1)


# reproduce.py

@pytest.fixture(scope="module")
def record(tmp_path_factory, text) -> Path:
    """The record of a real run of 2 steps, with an odd Config, in a repository of its own."""
    root = tmp_path_factory.mktemp("repository")
    assert train("tiny", *text, *SMALL, "--num_steps", 2, "--nesterov", "off", "--momentum", 0.5,
                 "--lr", "1e-7", "--sha256", "", "--seed", 3, "--val_every", 1,
                 "--log_dir", root / "logs", "--run_id", "one") == 0
    return keep.keep("two_steps", [root / "logs" / "one"], [], root)


@pytest.fixture
def again(record, monkeypatch, capfd):
    """Returns a function that runs reproduce.py on a run, and gives (status or error, what was printed)."""
    monkeypatch.setattr(reproduce, "ROOT", record.parents[2])

    def again(path: Path, *arguments, answer: str | None = None):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", str(path), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", argparse.Namespace(isatty=lambda: answer is not None))
        monkeypatch.setattr("builtins.input", lambda question: print(question) or answer)
        with pytest.raises(SystemExit) as stop:
            reproduce.main()
        return stop.value.code, capfd.readouterr().out
    return again


def test_reproduce_asks_and_refuses(record, again, tmp_path, monkeypatch):
    """What is not verified does not run, nor does anything without a yes."""
    monkeypatch.setattr(reproduce, "execute", lambda *_: pytest.fail("code from a log ran"))
    status, out = again(record / "one", "--nproc", 2)
    assert status == 0 and re.search(r"^hardware: 1 x .*; here 2 x \d+ threads of ", out, re.M)
    assert "--lr=1e-07 " in out and "--nproc_per_node=2" in out and "--log_dir" not in out and "torch: " in out
    assert "no terminal to ask on" in again(record / "one", "--run")[0]
    for answer in ("n", ""):
        status, out = again(record / "one", "--run", answer=answer)
        assert status == 1 and "Run this code from" in out and "not run" in out
    log = (record.parents[2] / "logs" / "one" / "log.txt").read_text()
    resumed = log_text(steps=5) + log_text(source="print(2)\n")
    for name, text, words in (
            ("edited", log.replace("import", "import evil,", 1), "not the one that ran"),
            ("unstated", re.sub("source: sha256 [^,]*,", "source: sha256 -,", log), "has no source of the sha256"),
            ("path", log.replace('"track": "tiny"', '"track": "../../x"'), "may hold letters"),
            ("resumed", resumed, "was resumed with another source")):
        assert words in again(write(tmp_path / name, text=text), "--run", "--yes")[0]


def test_reproduce_runs_the_recorded_source_with_the_recorded_config(record, again):
    status, out = again(record / "one", "--run", answer="y")
    (folder,) = (record.parents[2] / "logs").glob("reproduce_one_*")
    (then,), new = runs.find_runs([record / "one"])[0], runs.read_log(folder / "run")
    assert new.config == {**then.config, "log_dir": str(folder), "run_id": "run"}
    assert new.source_sha256 == then.source_sha256
    assert new.losses["val"].keys() == {1, 2} and new.final[1] == then.final[1]
    assert all(f"{new.losses[kind][step][1]:.6f}" == loss for (kind, step), loss in losses(folder / "run").items())
    assert status == 0 and "reproduced: yes, identical" in out


def test_reproduce_judges_by_the_std_of_the_record(root, tmp_path):
    """Of losses 3.270, 3.271, ... 3.274: mean 3.272, and 3 std of 0.00158 on either side."""
    paths = [write(tmp_path / "logs" / f"x{i}", 3.27 + i / 1000, seed=i) for i in range(5)]
    paths.append(write(tmp_path / "logs" / "other", 9.0, seed=5, lr=9.0))     # of another setting
    first = runs.read_record(keep.keep("x", paths, [], root))[0]
    reach = 3 * stdev(range(5)) / 1000
    for loss, good, word in [(3.27, True, "yes, identical"), (3.272 + reach * 0.99, True, "yes, within 3 std"),
                             (3.272 - reach * 1.01, False, "no")]:
        new = runs.read_log(write(tmp_path / "new" / str(loss), loss))
        result, text = reproduce.judge(first, new)
        assert result is good and f"reproduced: {word}" in text and "mean 3.2720, std 0.0016, n = 5" in text
    new = runs.read_log(write(tmp_path / "new" / "another", seed=7, lr=1.0, train="cc"))
    assert reproduce.judge(first, new) == (True, "not compared: lr 0.002 -> 1.0; seed 0 -> 7; data aa bb -> cc bb")


# The records and documents of this repository.

@pytest.mark.upstream
def test_records_are_small_and_whole_and_the_tables_agree_with_them():
    assert leaderboard.update(ROOT, write=False) == []
    files = [path for path in (ROOT / "records").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6 and len(files) < 250
    for folder in RECORDS:
        found = runs.read_record(folder)
        assert all(run.source or run.name.startswith("development_") for run in found), folder
        if folder.parent.parent.name == "records":      # not runs beside those of a record, such as a search
            readme = (folder / "README.md").read_text()
            assert len(readme.splitlines()) <= 40 and f"\n<!-- record {folder.parent.name}/{folder.name}" in readme
            assert (folder / "loss.png").stat().st_size < 80_000
            assert f"({folder.parent.name}/{folder.name}/README.md)" in (ROOT / "records/README.md").read_text()


@pytest.mark.upstream
@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("records/*/*/README.md"))],
                         ids=lambda path: path.parent.name)
def test_losses_in_the_text_are_in_a_record(page):
    known = {f"{run.final[1]:.{digits}f}" for folder in RECORDS for run in runs.read_record(folder) if run.finished
             for digits in (4, 6)}
    text = leaderboard.TABLE.sub("", page.read_text()).split("## Muon in")[0]
    if page == ROOT / "README.md":
        variants = runs.group(runs.read_record(ROOT / "records/tiny/2026-11-28_tweak_session"))
        session = compare.report(compare.compare(*variants, "final_loss"))
        assert session in text
        text = text.replace(session, "")
    assert set(re.findall(r"\b[1-9]\.\d{4,6}\b", text)) <= known


@pytest.mark.upstream
def test_the_result_in_the_trainers_docstring():
    stated = re.search(r"^tiny: ([\d.]+) nats per byte \(([\d.]+) to ([\d.]+), n = (\d+)\)",
                       (ROOT / "train_gpt.py").read_text(), re.MULTILINE).groups()
    groups = [leaderboard.finals(group, 1) for folder in RECORDS for group in runs.group(runs.read_record(folder))]
    assert stated in {(f"{sum(losses) / len(losses):.4f}", f"{min(losses):.4f}", f"{max(losses):.4f}", f"{len(losses)}")
                      for losses in groups if losses}


def kept_sources() -> dict[str, Path]:
    """Returns {sha256: a run that has it} of all sources in records/."""
    return {run.source_sha256: run.path for folder in RECORDS for run in runs.read_record(folder) if run.source}


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("path", kept_sources().values(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_source_of_a_record_runs_under_this_torch(path, again, text):
    run = runs.find_runs([path])[0][0]
    config, steps = run.config, 151 if "run.mean" in run.source else 3     # two average the last 60 or 150 steps
    length = config["seq_len"]
    if "data" not in config:     # of the sources that had a pattern for each kind of shards
        text = ["--train_files", f"{text[1]}/*train_*.bin", "--val_files", f"{text[1]}/*val_*.bin"]
        text += ["--second_files", ""] if "second_files" in config else []
    options = ["--num_steps", steps, "--warmup_steps", 0, "--val_every", 0, "--vocab_size", 257,
               "--batch_tokens", 4 * length, "--val_tokens", 1499 // length * length]
    status, out = again(path, "--run", "--yes", "--nproc", 1, "--", *options, *text)
    assert status == 0 and f"num_steps {config['num_steps']} -> {steps}" in out
    assert float(re.search(r"^val_loss: (\S+)$", out, re.MULTILINE)[1]) < math.log(257) + 0.5
