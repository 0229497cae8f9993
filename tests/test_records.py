"""records/: keep.py loses nothing, reproduce.py runs what a log says, and every figure agrees with the logs."""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev

import compare
import keep
import leaderboard
import logs
import plot
import pytest
import reproduce
from conftest import ROOT, SMALL, train
from test_compare import log_text

LOGS = sorted({*ROOT.glob("records/*/*/**/log.txt"), *ROOT.glob("records/*/*/*.txt")})
SEARCH = sorted((ROOT / "records" / "tiny" / "2026-11-22_matrix_optimizers" / "search").glob("*.txt"))
RULE = "=" * 100 + "\n"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A repository of what leaderboard.py reads and writes, with the two first records alone, and their tables."""
    repo, table = tmp_path / "repo", "<!-- best tiny/2026-11-22_matrix_optimizers matrix_optimizer -->\n<!-- end -->\n"
    for name in ("2026-11-22_run_sh", "2026-11-22_matrix_optimizers"):
        shutil.copytree(ROOT / "records/tiny" / name, repo / "records/tiny" / name,
                        ignore=shutil.ignore_patterns("loss.png"))
    shutil.copy(ROOT / "records/README.md", repo / "records")
    (repo / "README.md").write_text(table)
    leaderboard.update(repo, write=True)
    return repo


def facts(run: logs.Run) -> logs.Run:
    return dataclasses.replace(run, path=Path())


def made(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(text)
    return folder


# Tables and figures.

def test_the_tables_agree_with_the_logs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", "--check"])
    leaderboard.main()
    assert "all tables agree" in capsys.readouterr().out


def test_sides_by_name():
    """The table of an A/B folder's sides, against the last losses and times in its logs; a wrong number of names."""
    record = "tiny/2026-11-23_gelu"
    lines = leaderboard.sides(ROOT, ROOT, record, "ReLU_squared", "GELU")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ReLU squared", "| GELU"]
    for side, line in zip("AB", lines[2:], strict=True):
        texts = [path.read_text() for path in ROOT.glob(f"records/{record}/*_{side}_*/log.txt")]
        ends = [re.findall(r"^step:(\d+)/\1 val_loss:(\S+) train_time:(\d+)ms", text, re.M)[-1] for text in texts]
        cells = line.strip("| ").split(" | ")
        assert cells[1] == str(len(ends)) and cells[2] == f"{sum(float(end[1]) for end in ends) / len(ends):.4f}"
        assert cells[6] == f"{sum(int(end[2]) for end in ends) / len(ends) / 1000:.1f}"
    for names in (["one"], ["one", "two", "three"]):
        with pytest.raises(leaderboard.LogError, match="name each in the marker"):
            leaderboard.sides(ROOT, ROOT, record, *names)


def test_best_of_the_values_of_one_and_two_fields():
    """Of the nine single runs of a sweep: three optimizers' best, or, by optimizer and rate, each for itself."""
    record, ends = "tiny/2026-11-22_matrix_optimizers", {}
    for path in ROOT.glob(f"records/{record}/*/log.txt"):
        loss = re.findall(r"^val_loss: (\S+)$", path.read_text(), re.M)[-1]
        ends.setdefault(path.parent.name.split("_lr")[0], []).append(float(loss))
    lines = leaderboard.best(ROOT, ROOT, record, "matrix_optimizer")[2:]
    assert [float(line.split(" | ")[3]) for line in lines] == sorted(round(min(tried), 4) for tried in ends.values())
    lines = leaderboard.best(ROOT, ROOT, record, "matrix_optimizer", "lr")[2:]
    assert [line.split(" | ")[1] for line in lines] == ["1"] * sum(map(len, ends.values())) == ["1"] * 9
    with pytest.raises(leaderboard.LogError, match="has no field rate"):
        leaderboard.best(ROOT, ROOT, record, "lr", "rate")


def test_a_changed_figure_is_caught_and_put_right(copy):
    for name, old, new in [("README.md", "| 1.4545 |", "| 1.4454 |"), ("records/README.md", "| 1.2733 |", "| 1.2732 |"),
                           ("records/tiny/2026-11-22_run_sh/README.md", "| 217.5 |", "| 127.5 |")]:
        path, right = copy / name, (copy / name).read_text()
        assert right.count(old) == 1
        path.write_text(right.replace(old, new))
        (wrong,) = leaderboard.update(copy, write=False)
        assert wrong.startswith(f"{name}: <!-- ") and path.read_text() != right
        leaderboard.update(copy, write=True)
        assert path.read_text() == right and leaderboard.update(copy, write=False) == []

    log = copy / "records" / "tiny" / "2026-11-22_run_sh" / "seed2" / "log.txt"     # the log changes, the tables do not
    log.write_text(re.sub(r"(step:1000/1000 val_loss:)\S+", r"\g<1>1.29", log.read_text()))
    assert len(leaderboard.update(copy, write=False)) == 3


def test_a_run_or_table_that_is_left_out_is_caught(copy):
    readme = copy / "records" / "tiny" / "2026-11-22_run_sh" / "README.md"
    right = readme.read_text()
    readme.write_text(right.replace("<!-- runs tiny/2026-11-22_run_sh -->", "<!-- settings tiny/2026-11-22_run_sh -->"))
    assert any("has no table <!-- runs" in text for text in leaderboard.update(copy, write=False))
    for damage, message in [(("<!-- end -->\n", "", 1), "of its own"), (("runs tiny", "runs now tiny"), "too many"),
                            (("<!-- runs", "<!-- end -->\n<!-- runs"), "alone"),
                            (("runs tiny/2", "runs tiny/3"), "no log of a run")]:
        readme.write_text(right.replace(*damage))
        with pytest.raises(leaderboard.LogError, match=message):
            leaderboard.update(copy, write=True)
        assert readme.read_text() == right.replace(*damage)


def test_places_ratios_and_unfinished_runs(tmp_path):
    """Six blocks of A, AdamW, and B, Muon, on a machine that slows down; C stops; D is fast but above the target."""
    folder = tmp_path / "records" / "tiny" / "2026-12-01_x"
    sides = dict(A=("adamw", 1.29, 200), B=("muon", 1.28, 100), C=("muon", 1.27, 50), D=("muon", 1.31, 10))
    for block in range(6):
        for side, (optimizer, loss, seconds) in sides.items():
            made(folder / f"0{block}_{side}_seed{block}", log_text(
                loss + block / 1000, seconds * 1.5**block, target=1.3, seed=block, matrix_optimizer=optimizer,
                lr=1 if side == "B" else 2, num_steps=10 if side == "D" else 20,
                steps=5 if (side, block) == ("C", 3) else None))
    rows = {one.runs[0].name[3]: (place, one, ratio)
            for place, (one, ratio) in enumerate(leaderboard.ranked(tmp_path, "tiny"))}
    assert list(rows) == ["B", "A", "C", "D"]
    assert [rows[side][2] for side in "BA"] == pytest.approx([0.5, 1])
    assert rows["D"][2] is None     # no time to a target that it misses, nor to that of a baseline that does
    missed = [dataclasses.replace(run, config={**run.config, "target": 1.0}) for run in rows["A"][1].runs]
    assert leaderboard.ratio_to_adamw(rows["B"][1], [dataclasses.replace(rows["A"][1], runs=missed)]) is None
    assert [rows[side][1].has_place for side in "BACD"] == [True, True, False, False]
    cells = [line.split(" | ") for line in leaderboard.leaderboard(tmp_path, tmp_path / "records", "tiny")[2:]]
    mean = 100 * sum(1.5**block for block in range(6)) / 6
    assert cells[0][:2] == ["| 1", "[x](tiny/2026-12-01_x)"] and cells[0][7:9] == [f"{mean:.1f}", "0.500"]
    assert cells[0][3:6] == ["6", "1.2825", f"{stdev([0, 1, 2, 3, 4, 5]) / 1000:.4f}"]
    assert cells[2][3] == "5 (and 1 unfinished)" and cells[3][6:9] == ["no", "-", "-"]
    assert len(leaderboard.runs(tmp_path, folder, "tiny/2026-12-01_x")) == 2 + 24


@pytest.mark.parametrize("change", [
    dict(seeds=[0, 1, 2, 3]), dict(seeds=[0, 1, 2, 3, 3]), dict(target=3.0), dict(hardware="1 x 2 threads of X"),
    dict(data_comparable="false"), dict(offset=0.0175), {}])
def test_what_takes_a_place(tmp_path, change):
    """Five seeds of one machine, data and target; p < 0.01, which a mean of 1.2995 with a spread of 0.0016 has not."""
    for i, seed in enumerate(change.get("seeds", range(5))):
        text = log_text(1.28 + i / 1000 + change.get("offset", 0), target=change.get("target", 1.3), seed=seed,
                        hardware=change.get("hardware", "8 x H") if i == 4 else "8 x H")
        made(tmp_path / str(i), text + f"data_comparable: {change.get('data_comparable', 'true')}\n")
    one = max(leaderboard.settings_of(tmp_path), key=lambda one: len(one.runs))
    assert one.reached and one.has_place == (not change)


def prose(path: Path) -> str:
    """Returns a file's text without generated tables and the README's session, which are checked, and without
    published figures."""
    return leaderboard.TABLE.sub("", path.read_text().replace(session(), ""))


def session() -> str:
    return re.search(r"```\n(plan: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


PLACES = [ROOT / "README.md", *sorted((ROOT / "records").glob("**/README.md"))]
FINAL = {path: logs.read_log(path).final for path in [*LOGS, *SEARCH] if logs.read_log(path).finished}


@pytest.mark.parametrize("path", PLACES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_losses_in_the_text_are_in_a_log(path):
    published = "".join(match[3] for match in leaderboard.TABLE.finditer((ROOT / "records/README.md").read_text())
                        if match[1] == "published")
    known = {f"{loss:.4f}" for _, loss in FINAL.values()} | set(re.findall(r"\b\d\.\d{4}\b", published))
    assert set(re.findall(r"\b\d\.\d{4}\b", prose(path))) <= known


def test_the_sample_output_in_the_readme_is_of_the_log():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```\n(kernels: .*?)```", readme, re.DOTALL)[1]
    log = ROOT / re.search(r"\[the log\]\((records/[^)]+)\)", readme)[1]
    assert set(block.splitlines()) - {"..."} <= set(log.read_text().splitlines())


def test_the_session_in_the_readme_is_of_the_logs():
    """Its lines of runs, and what compare.py says of them."""
    record = ROOT / "records" / "tiny" / "2026-11-25_tweak_session"
    runs = {run.name: run for run in map(logs.read_log, record.glob("*/log.txt"))}
    lines = re.findall(r"^(\d\d_[AB]_seed\d)  loss (\S+)  (\S+) s(?:  B/A (\S+))?$", session(), re.M)
    assert [line[0] for line in lines] == leaderboard.read_plan(record)["runs"]
    for name, loss, seconds, ratio in lines:
        assert (f"{runs[name].final[1]:.4f}", f"{runs[name].final[0]:.2f}") == (loss, seconds)
        block = [runs[f"{name[:2]}_{side}_{name[5:]}"].final[0] for side in "AB"]
        assert ratio in ("", f"{block[1] / block[0]:.3f}")
    sides = [[runs[name] for name in sorted(runs) if name[3] == side] for side in "AB"]
    assert compare.report(compare.compare(*sides, "final_loss")) in session()


def test_the_result_in_the_trainers_docstring():
    stated = re.search(r"^tiny: ([\d.]+) nats a byte \(([\d.]+) to ([\d.]+), n = (\d+)\)",
                       (ROOT / "train_gpt.py").read_text(), re.MULTILINE).groups()
    found = {(f"{one.loss:.4f}", f"{min(one.losses):.4f}", f"{max(one.losses):.4f}", str(len(one.losses)))
             for one, _ in leaderboard.ranked(ROOT, "tiny") if one.losses}
    assert stated in found


def test_other_figures_in_the_texts_of_the_two_first_records():
    first, second = (ROOT / "records" / "tiny" / f"2026-11-22_{name}" for name in ("run_sh", "matrix_optimizers"))
    summary, text = logs.read_log(first).summary, prose(first / "README.md")
    assert (f"{summary['train_seconds']:.0f} s of training, {summary['tokens_per_second']:,.0f} tokens a second, "
            f"{summary['peak_memory_gib']:.2f} GiB of memory") in text
    text, loss = prose(second / "README.md"), {one.what: one.loss for one in leaderboard.settings_of(second)}
    lowest = {name: min(loss[what] for what in loss if f"optimizer {name}," in what)
              for name in ("adamw", "muon", "orthogonal_nesterov")}
    assert f"The gap of {lowest['adamw'] - lowest['muon']:.3f} between Muon and AdamW" in text
    assert f"the {lowest['muon'] - lowest['orthogonal_nesterov']:.3f} between OrthogonalNesterov and Muon" in text
    seeds = [FINAL[path][1] for path in LOGS if first in path.parents]
    assert f"preset spread by\n{stdev(seeds):.3f}:" in text
    tried = [FINAL[second / "search" / f"adamw_{ratio}_lr0.008.txt"][1] for ratio in ("0.25", "0.5", "1")]
    assert f"in runs of 320 steps ({', '.join(f'{loss:.4f}' for loss in tried)} at" in text
    for losses, files in re.findall(r"^\| [^|]*\d[^|]* \| ([\d., for]+) \| ([\w, ]+) \|$", text, re.MULTILINE):
        files = [second / "search" / f"tiny_20261122-{file}.txt" for file in files.split(", ")]
        losses = re.findall(r"[\d.]+", losses)
        assert [f"{FINAL[file][1]:.4f}" for file in files] == losses[:len(files)]     # then that of the baseline


def test_the_runs_of_the_search_can_be_read():
    runs = [logs.read_log(path) for path in SEARCH]
    assert len(runs) == 47 and all(run.finished and run.config and run.source is None for run in runs)


# keep.py

def resumed_log() -> str:
    """Returns the log of a run that was resumed with its own source, and then with another."""
    parts = [log_text(steps=12), log_text(steps=15), log_text(source='print("=" * 100)\nprint(2)\n')]
    parts[1:] = [part.replace("step:1/20", "resumed: x at step 10/20\nstep:1/20", 1) for part in parts[1:]]
    return "".join(parts)


def restored(text: str, folder: Path) -> str:
    """Returns a kept log with its sources put back, by other means than keep.py's."""
    pieces = re.split(r"^(?=run folder: )", text, flags=re.MULTILINE)
    sources = [next(folder.glob(f"source_{re.search('source: sha256 (.{12})', piece)[1]}*")) for piece in pieces[1:]]
    return pieces[0] + "".join(path.read_text() + RULE + piece for path, piece in zip(sources, pieces[1:], strict=True))


def test_keep_loses_nothing_and_has_each_source_once(copy, tmp_path):
    texts = dict(base_0=log_text(seed=0), base_1=log_text(3.26, seed=1), crashed=log_text(steps=7, seed=2),
                 resumed=resumed_log(), real=(LOGS[0]).read_text(),
                 empty=log_text().split("step:1/")[0])     # stopped before its first step
    paths = [made(tmp_path / "logs" / name, text) for name, text in texts.items()]
    before = {path: path.read_bytes() for path in [*copy.rglob("*"), *tmp_path.glob("logs/*/*")] if path.is_file()}
    folder = keep.keep("some_runs", paths, copy)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d_some_runs", folder.name) and folder.parent == copy / "records" / "tiny"
    assert len(list(folder.glob("source_*"))) == 3 and (folder / "loss.png").stat().st_size > 5000
    for path, (name, text) in zip(paths, texts.items(), strict=True):
        kept, run = logs.read_log(folder / f"{name}.txt"), logs.read_log(path)
        assert kept.name == name and facts(kept) == facts(run) and kept.source
        assert restored((folder / f"{name}.txt").read_text(), folder) == text
    # every run is in the README's table; what was there stays, but for the tables
    readme = (folder / "README.md").read_text()
    assert all(f"| [{name}]({name}.txt) |" in readme for name in texts)
    assert "stopped at step 7" in readme and "stopped at step 0" in readme
    assert re.search(r"a diff of \d{3,} lines, of source_\w+.py.kept and source_\w+.py.kept", readme)
    changed = {path for path, content in before.items() if path.read_bytes() != content}
    assert changed == {copy / "records" / "README.md"}
    # the author's part is asked for; a record is not overwritten, and a failure leaves nothing
    (wrong,) = leaderboard.update(copy, write=False)
    assert "some_runs/README.md: a part of it is yet to write" in wrong
    listed = sorted(copy.rglob("*"))
    for name, runs, message in [("some_runs", paths, "never overwritten"), ("a/b", paths, "names a folder"),
                                ("y", [*paths, paths[0]], "several runs are named base_0"),
                                ("y", [SEARCH[0]], "with its source")]:
        with pytest.raises(logs.LogError, match=message):
            keep.keep(name, runs, copy)
    assert sorted(copy.rglob("*")) == listed
    # a kept log can be kept again
    again = keep.keep("again", [folder / "base_0.txt"], copy)
    assert facts(logs.read_log(again / "base_0.txt")) == facts(logs.read_log(paths[0]))
    # a source that is not the recorded one is no source
    source = folder / logs.source_name(hashlib.sha256(b"print('model')\n").hexdigest())
    source.write_text("print('other model')\n")
    with pytest.raises(logs.LogError, match="is not the source that ran"):
        logs.read_log(folder / "base_0.txt")


def test_keep_an_ab_folder(copy, tmp_path):
    """Its structure stays, so that compare.py reads it as before; the README has the verdict."""
    folder, names = tmp_path / "OUT", []
    for block in range(4):
        for side, source in (("A", "print('a')\n"), ("B", "print('b')\n")):
            names.append(f"0{block}_{side}_seed{block}")
            run_id = f"tiny_20261201-10200{block}_{side}"
            made(folder / names[-1], log_text(3.27 + block / 1000 - (side == "B") / 10, seed=block, source=source,
                                              run_id=run_id))
            (folder / names[-1] / "checkpoint.pt").write_text("large")
    command = f"/opt/python/bin/python3 {copy}/logs/ab/source_A/train_gpt.py tiny"
    (folder / "plan.json").write_text(json.dumps(dict(metric="final_loss", alpha=0.05, runs=names,
                                                      sides=dict(A=dict(command=command)))))
    (folder / "runs.jsonl").write_text("{}\n")
    record = keep.keep("ab", [folder], copy)
    assert record.name == "2026-12-01_ab"     # the day in the run_ids
    plan = json.loads((record / "plan.json").read_text())     # without the paths of the machine
    assert plan["sides"]["A"]["command"] == "python3 logs/ab/source_A/train_gpt.py tiny"
    files = {path.relative_to(record).as_posix() for path in record.rglob("*") if path.is_file()}
    sources = {path.name for path in record.glob("source_*.py.kept")}
    assert files - sources == {"plan.json", "runs.jsonl", "README.md", "loss.png", *(
        f"{name}/log.txt" for name in names)} and len(sources) == 2
    sides = [[logs.read_log(record / name) for name in names if f"_{side}_" in name] for side in "AB"]
    result = leaderboard.compare(*sides, "final_loss")
    assert result.decision == "faster" and not result.voids
    readme = (record / "README.md").read_text()
    assert f"| 4 and 4 | {result.p:.2g} | faster (B's loss is 0.1000 lower" in readme
    assert "-print('a')\n+print('b')\n" in readme and "since tiny/2026-11-22_run_sh" in readme


# reproduce.py

@pytest.fixture(scope="module")
def record(tmp_path_factory, text) -> Path:
    """The record of a real run of 2 steps, with an odd Config, in a repository of its own."""
    root = tmp_path_factory.mktemp("repository")
    assert train("tiny", *text, *SMALL, "--num_steps", 2, "--momentum_dtype", "bfloat16", "--grad_clip", 0.5,
                 "--lr", "1e-7", "--train_sha256", "", "--seed", 3, "--val_every", 1, "--metrics_every", 1,
                 "--log_dir", root / "logs", "--run_id", "one") == 0
    (root / "records" / "tiny").mkdir(parents=True)
    (root / "README.md").write_text("")
    (root / "records" / "README.md").write_text("")
    return keep.keep("two_steps", [root / "logs" / "one"], root)


@pytest.fixture
def again(record, monkeypatch, capfd):
    """Returns a function that runs reproduce.py on a log, and gives (status or error, what was printed)."""
    monkeypatch.setattr(reproduce, "ROOT", record.parents[2])

    def again(log: Path, *arguments, answer: str | None = None):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", str(log), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", argparse.Namespace(isatty=lambda: answer is not None))
        monkeypatch.setattr("builtins.input", lambda question: print(question) or answer)
        with pytest.raises(SystemExit) as stop:
            reproduce.main()
        return stop.value.code, capfd.readouterr().out

    return again


def test_reproduce_shows_what_it_would_run(record, again, tmp_path):
    status, out = again(record / "one.txt", "--out", tmp_path / "source.py")
    sha256 = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    assert status == 0 and f"source: sha256 {sha256}, as recorded" in out and "hardware: 1 x " in out
    assert "--lr=1e-07 " in out and "--grad_clip=0.5 " in out and "--log_dir" not in out and "torch: " in out
    nproc = again(record / "one.txt", "--nproc", 2)[1]
    assert re.search(r"^hardware: 1 x .*; here 2 x \d+ threads of ", nproc, re.M) and "--nproc_per_node=2" in nproc
    assert (tmp_path / "source.py").read_text() == (ROOT / "train_gpt.py").read_text()
    assert "exists" in again(record / "one.txt", "--out", tmp_path / "source.py")[0]


def test_reproduce_asks_and_refuses(record, again, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "execute", lambda *_: pytest.fail("code from a log ran"))
    assert "no terminal to ask on" in again(record / "one.txt", "--run")[0]
    for answer in ("n", ""):
        status, out = again(record / "one.txt", "--run", answer=answer)
        assert status == 1 and "Run this code from" in out and "not run" in out
    assert "has no source" in again(SEARCH[0], "--run", "--yes")[0]
    # a tampered source, within the log or beside it
    text, source = (record / "one.txt").read_text(), next(record.glob("source_*"))
    whole = made(tmp_path / "whole", source.read_text().replace("import", "import evil,", 1) + RULE + text)
    assert "not the one that ran" in again(whole, "--run", "--yes")[0]
    beside = made(tmp_path / "beside", text)
    (beside / source.name).write_text(source.read_text() + "print('evil')\n")
    assert "is not the source that ran" in again(beside, "--run", "--yes")[0]
    # data that are missing or other
    (beside / source.name).write_text(source.read_text())
    (beside / "log.txt").write_text(re.sub('"train_files": "[^"]*"', '"train_files": "/nowhere/*.bin"', text))
    message = again(beside, "--run", "--yes")[0]
    assert "--train_files /nowhere/*.bin: no row there" in message
    assert "python data/local_text.py makes them" in message
    (beside / "log.txt").write_text(re.sub("(?m)^(data sha256: train ..*, val ).*$", r"\1abc", text))
    assert ", the run's had abc" in again(beside, "--run", "--yes")[0]


def test_reproduce_runs_the_recorded_source_with_the_recorded_config(record, again):
    status, out = again(record / "one.txt", "--run", answer="y")
    (folder,) = (record.parents[2] / "logs").glob("reproduce_one_*")
    then, new = logs.read_log(record / "one.txt"), logs.read_log(folder / "run")
    own = dict(log_dir=str(folder), run_id="run")
    assert new.config == {**then.config, **own} and new.source_sha256 == then.source_sha256
    assert new.losses["val"].keys() == {1, 2} and new.final[1] == then.final[1]
    assert plot.read_metrics(then).keys() == {1, 2} and repr(plot.read_metrics(then)) == repr(plot.read_metrics(new))
    assert status == 0 and "reproduced: yes, identical" in out


def test_reproduce_knows_the_data_of_older_configs():
    """Of a log with batch_tokens in stages and no `prepare`: the rows that it read, and the program of its track."""
    run = next(run for run in map(logs.read_log, LOGS) if isinstance(run.config["batch_tokens"], list))
    assert reproduce.prepare(run.config) == "data/local_text.py"
    run.config.update(train_files="none/*.bin", val_files="none/*.bin")
    assert all("none/*.bin: no row there" in text for text in reproduce.data_here(run).values())


def test_reproduce_judges_by_the_spread_of_the_record(tmp_path, monkeypatch):
    """Of losses 3.270, 3.271, ... 3.274: mean 3.272, and 3 spreads of 0.00158 to each side."""
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    folder = tmp_path / "records" / "tiny" / "2026-12-01_x"
    runs = [logs.read_log(made(folder / str(i), log_text(3.27 + i / 1000, seed=i))) for i in range(5)]
    made(folder / "other", log_text(9.0, seed=5, lr=9.0))     # of another setting
    reach = 3 * math.sqrt(sum((i - 2)**2 for i in range(5)) / 4) / 1000
    for loss, good, word in [(3.27, True, "yes, identical"), (3.272 + reach * 0.99, True, "yes, within 3 spreads"),
                             (3.272 - reach * 1.01, False, "no")]:
        new = dataclasses.replace(runs[0], losses={"train": {}, "val": {20: (1.0, loss)}})
        result, text = reproduce.judge(runs[0], new)
        assert result is good and f"reproduced: {word}" in text
    assert f"mean {fmean([3.27, 3.274]):.4f}, spread 0.0016, n = 5" in text
    new = dataclasses.replace(runs[0], config={**runs[0].config, "seed": 7, "lr": 1.0})
    assert reproduce.judge(runs[0], new) == (True, "not compared: lr 0.002 -> 1.0; seed 0 -> 7")


def sources_of_records() -> dict[str, Path]:
    """Returns {sha256: a log that has it} of all sources in records/."""
    return {logs.read_log(path).source_sha256: path for path in reversed(LOGS)}


@pytest.mark.slow
@pytest.mark.parametrize("log", sources_of_records().values(), ids=lambda path: path.parent.name + "/" + path.name)
def test_every_source_of_a_record_runs_under_this_torch(log, again, text):
    config = logs.read_log(log).config
    length = config["seq_len"]
    options = ["--num_steps", 3, "--warmup_steps", 0, "--val_every", 0, "--vocab_size", 257,
               "--batch_tokens", 4 * length, "--val_tokens", 1499 // length * length]
    status, out = again(log, "--run", "--yes", "--nproc", 1, "--", *options, *text)
    assert status == 0 and f"num_steps {config['num_steps']} -> 3" in out
    assert float(re.search(r"^val_loss: (\S+)$", out, re.MULTILINE)[1]) < math.log(257) + 0.5
