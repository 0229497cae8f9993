"""records/plot.py: groups and bands against numpy, tokens against the trainer, and the page in a real browser."""

import base64
import contextlib
import hashlib
import html.parser
import importlib
import io
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from conftest import ROOT

plot, logs = importlib.import_module("plot"), importlib.import_module("logs")
plt = plot.plt
RECORDS = ROOT / "records" / "tiny"


def write(folder: Path, seed: int = 0, stop: int | None = None, num_steps: int = 80, source: str = "pass\n",
          **config) -> Path:
    """Writes the log of a run with losses from `seed`, stopped after `stop` steps; returns its folder."""
    config = {**dict(track="tiny", target=1.3, batch_tokens=[512], lr=0.002, matrix_optimizer="muon", log_dir="logs"),
              **config, "num_steps": num_steps, "seed": seed}
    random = np.random.default_rng(seed)
    losses = 1 + 4 / np.arange(1, num_steps + 1) + random.random(num_steps)
    seconds = np.cumsum(random.random(num_steps))
    text = (f"{source}{'=' * 100}\nrun folder: x\nconfig: {json.dumps(config)}\n"
            f"source: sha256 {hashlib.sha256(source.encode()).hexdigest()}, git c0ffee\n"
            "versions: python 3.11.7, torch 2.13.0, cuda 12.8, Linux\nhardware: 8 x NVIDIA H100\n")
    for step in range(1, (stop or num_steps) + 1):
        took = f"train_time:{1e3 * seconds[step - 1]:.0f}ms step_avg:1ms"
        text += f"step:{step}/{num_steps} train_loss:{losses[step - 1]:.6f} {took}\n"
        if step % 40 == 0 or step == num_steps:
            text += f"step:{step}/{num_steps} val_loss:{losses[step - 1] - 0.5:.6f} {took}\n"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(text)
    return folder


def write_metrics(folder: Path, seed: int, kinds: tuple = ("blocks.*.<b>up", "embed"), steps=range(4, 81, 4)) -> dict:
    """Adds lines of metrics to the log, of matrices of two layers, with all figures, and of others, with norms alone.

    Returns {(step, kind, figure): mean over the layers}, from the values that were drawn, with update / weight.
    """
    random, means = np.random.default_rng(seed), {}
    figures = ["gradient", "weight", "update", "orthogonality_error", "least_singular", "largest_singular", "unknown"]
    with open(folder / "log.txt", "a") as log:
        for kind, step in itertools.product(kinds, steps):     # a line for each optimizer
            layers = random.random((2, 7) if kind == kinds[0] else (1, 3))
            if step == 0 and kind == kinds[0]:
                layers[:, 1], layers[:, 3], layers[0, 4] = 0, np.nan, 0
            names = [kind.replace("*", str(layer)) for layer in range(len(layers))]
            parameters = {name: dict(zip(figures, map(float, values), strict=False))
                          for name, values in zip(names, layers, strict=True)}
            log.write(f"metrics: {json.dumps(dict(step=step, parameters=parameters))}\n")
            means |= {(step, kind, figure): values.mean() for figure, values in zip(figures, layers.T, strict=False)}
            means[step, kind, "update_to_weight"] = np.mean([u / w if w else np.nan for _, w, u, *_ in layers])
    return means


def drawn(groups: list) -> dict:
    """Returns {label of a panel: (scale, {(color, line style): [x and y of its lines]})} of the optimizers' picture."""
    panels = {}
    for words, draw in plot.optimizer_picture(groups).panels:
        figure, axis = plt.subplots()
        draw(axis)
        lines = {}
        for line in axis.lines:
            lines.setdefault((line.get_color(), line.get_linestyle()), []).append(line.get_xydata())
        assert axis.get_xlabel() == "steps" and axis.get_ylabel() == words
        panels[words] = (axis.get_yscale(), lines)
        plt.close(figure)
    return panels


def groups_of(*folders: Path, baseline: tuple = ()) -> list:
    return plot.group_runs(plot.read_runs(folders), plot.read_runs(baseline))


def names(*folders: Path, **options) -> list[str]:
    return [group.name for group in groups_of(*folders, **options)]


# Groups, curves and pictures.

def test_groups_and_their_names(tmp_path):
    for seed in range(3):
        write(tmp_path / "logs" / "base" / f"seed{seed}", seed)
        write(tmp_path / "logs" / "tweak" / f"seed{seed}", seed, source="tweak\n")
        write(tmp_path / "ab" / f"{seed:02}_A_seed{seed}", seed)
        write(tmp_path / "ab" / f"{seed:02}_B_seed{seed}", seed, lr=0.003)
        write(tmp_path / "mixed" / f"x{seed}", seed)
        write(tmp_path / "mixed" / f"y{seed}", seed, matrix_optimizer="adamw", lr=0.008)
    base, tweak = tmp_path / "logs" / "base", tmp_path / "logs" / "tweak"
    assert names(base / "seed1") == ["seed1"] and names(base) == ["base"]
    assert names(tmp_path / "logs") == ["base", "tweak"]
    assert names(base / "seed1", tweak / "seed1") == ["base/seed1", "tweak/seed1"]
    assert names(tmp_path / "ab") == ["A (lr 0.002)", "B (lr 0.003)"]
    assert names(tmp_path / "mixed") == ["x0 and 2 more (lr 0.002, matrix_optimizer muon)",
                                         "y0 and 2 more (lr 0.008, matrix_optimizer adamw)"]
    write(base / "longer", num_steps=90, run_id="a name that is no part of the setting")
    assert names(base) == ["longer (num_steps 90)", "seed0 and 2 more (num_steps 80)"]

    # A run among both is a baseline, once; a log that is named twice counts once.
    groups = groups_of(tmp_path / "logs", tweak, tweak / "seed1" / "log.txt", baseline=(base,))
    assert [(len(group.runs), group.baseline) for group in groups] == [(3, False), (1, True), (3, True)]
    assert [group.title.split()[0] for group in groups] == ["tweak", "baseline", "baseline"]
    assert len({group.line for group in groups}) == 3 and groups[0].line == "-"
    sweep = [write(tmp_path / "sweep" / str(i), lr=i) for i in range(1, 31)]
    for count in (9, 30):
        colors = {group.color for group in groups_of(*sweep[:count])}
        assert len(colors) == count and min(np.ptp(plt.matplotlib.colors.to_rgb(color)) for color in colors) > 0.1


def test_band_is_mean_and_standard_deviation(tmp_path):
    """What is drawn for three runs and one that stopped, against numpy."""
    runs = [write(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    stopped = write(tmp_path / "stopped", 7, stop=30)
    groups = groups_of(*runs, stopped)
    assert len(groups) == 1
    tables = []                     # seconds and smoothed loss, from the text of the logs
    for folder in [*runs, stopped]:
        found = re.findall(r"train_loss:(\S+) train_time:(\d+)ms", (folder / "log.txt").read_text())
        losses, seconds = np.array(found, dtype=float).T
        tables.append((seconds / 1e3, [np.mean(losses[max(0, i - 1):i + 1]) for i in range(len(losses))]))   # 80 // 40
    mean, spread = np.mean(tables[:3], axis=0), np.std(tables[:3], axis=0, ddof=1)
    for row, x in ((0, np.arange(1, 81)), (1, 512 * np.arange(1, 81)), (2, mean[0])):
        figure, axis = plt.subplots()
        plot.draw_panel(axis, groups, row, (0, 7))
        lines = {len(line.get_xdata()): line for line in axis.lines}
        np.testing.assert_allclose(lines[80].get_xydata(), np.stack([x, mean[1]], 1), rtol=1e-9)
        np.testing.assert_allclose(lines[30].get_ydata(), tables[3][1], rtol=1e-9)
        band = axis.collections[0].get_paths()[0].vertices
        for i in (0, 40, 79):
            edge = np.unique(band[np.isclose(band[:, 0], x[i]), 1].round(9))
            np.testing.assert_allclose(edge, [mean[1][i] - spread[1][i], mean[1][i] + spread[1][i]], atol=1e-6)
        target = [line.get_ydata() for line in axis.lines if line.get_transform() == axis.get_yaxis_transform()]
        assert target == [[1.3, 1.3]] and axis.get_ylim() == (0, 7)
        plt.close(figure)
    final = [run.final[1] for run in groups[0].whole]
    assert plot.describe(groups[0]) == (f"{groups[0].name}: {fmean(final):.4f} ± {stdev(final):.4f} at step 80, 3 runs "
                                        "and 1 stopped before")


def test_tokens_follow_the_trainer(tmp_path):
    """Of a run of today; of an older one with three stages; of a real one of those."""
    trainer = importlib.import_module("train_gpt")
    config = trainer.make_config(dict(track="tiny", num_steps=20, batch_tokens=512))
    rows = [trainer.batch_rows(config, step) for step in range(20)]
    run = logs.read_log(write(tmp_path / "run", num_steps=20, batch_tokens=512))
    assert plot.tokens_after(run).tolist() == [config.seq_len * sum(rows[:step]) for step in range(21)]
    run = logs.read_log(write(tmp_path / "stages", num_steps=7, batch_tokens=[512, 1024, 2048]))
    assert plot.tokens_after(run).tolist() == [0, 512, 1024, 1536, 2560, 3584, 5632, 7680]     # steps 3 and 5 begin one
    run = logs.read_log(RECORDS / "2026-11-22_run_sh")
    assert plot.tokens_after(run)[-1] == run.summary["tokens"]
    assert plot.speed(run)[2] == pytest.approx(run.summary["tokens_per_second"], rel=1e-5)


def test_lines_of_the_optimizers(tmp_path):
    """Each line against the means of the logs' values: two seeds, and one run in which some is NaN or 0."""
    wide, narrow = [write(tmp_path / "wide" / str(seed), seed) for seed in (1, 2)], write(tmp_path / "b", 3, lr=0.1)
    plain = write(tmp_path / "plain", 4, lr=0.2)
    first, second = (write_metrics(folder, seed) for seed, folder in enumerate(wide))
    third = write_metrics(narrow, 7, steps=range(0, 81, 8))
    groups = groups_of(tmp_path / "wide", plain, narrow)
    picture, panels = plot.optimizer_picture(groups), drawn(groups)
    colors = {text: look["color"] for text, look in picture.legend[:2]}
    styles = {look["linestyle"]: text for text, look in picture.legend[2:]}
    assert list(colors) == ["blocks.*.<b>up", "embed"] and len(set(colors.values())) == 2
    assert styles == {"-": groups[0].title, "--": groups[2].title}
    for (label, scale), figures in plot.FIGURES.items():
        assert panels[label][0] == scale == ("log" if figures[0] in ("gradient", "weight") or "update" in figures[0]
                                             else "linear")
        expected = {}
        for kind, figure in itertools.product(colors, figures):
            if (4, kind, figure) in first:
                expected.setdefault((colors[kind], "-"), []).append(
                    [(step, (first[step, kind, figure] + second[step, kind, figure]) / 2) for step in range(4, 81, 4)])
                expected.setdefault((colors[kind], "--"), []).append(
                    [(step, third[step, kind, figure] or (0 if scale == "linear" else np.nan))
                     for step in range(0, 81, 8)])
        assert panels[label][1].keys() == expected.keys()
        for key, lines in expected.items():
            np.testing.assert_allclose(panels[label][1][key], np.array(lines, dtype=float), rtol=1e-12)
    assert len(panels) == 6 and len(panels["least and largest singular value"][1][colors["blocks.*.<b>up"], "-"]) == 2
    assert np.isnan(third[0, "blocks.*.<b>up", "orthogonality_error"]) and third[0, "blocks.*.<b>up", "weight"] == 0
    assert "means over layers and runs" in picture.reading and "only the first" not in picture.reading

    # Norms alone have no panels of Muon's; of many groups the first are drawn, which is said; without metrics, nothing.
    write_metrics(plain, 1, kinds=("none", "embed"))
    path = plain / "log.txt"
    path.write_text(re.sub(r'"none": {[^}]*}', '"none": {}', path.read_text()))
    assert len(drawn(groups_of(plain))) == 4 and len(plot.optimizer_picture(groups_of(plain)).legend) == 2
    for i in range(3):
        write_metrics(write(tmp_path / "many" / str(i), lr=i), i)
    many = plot.optimizer_picture(groups_of(tmp_path))
    assert len(many.legend) == 3 + 4 and "only the first 4 of 6 groups" in many.reading
    assert plot.optimizer_picture(groups_of(write(tmp_path / "last"))) is None


def test_damaged_metrics(tmp_path, capsys):
    """A damaged line, as by a kill, is left out, which is said; of two lines of a step the later counts."""
    folder = write(tmp_path / "run")
    path, (run,) = folder / "log.txt", plot.read_runs([folder])
    start = path.read_text()
    assert plot.read_metrics(run) == {}
    write_metrics(folder, 1, kinds=("embed",))
    lines, known = path.read_text().removeprefix(start).splitlines(), plot.read_metrics(run)
    assert sorted(known) == list(range(4, 81, 4)) and capsys.readouterr().err == ""
    path.write_text(start + "\n".join(lines)[:-30])
    assert plot.read_metrics(run) == {step: known[step] for step in range(4, 80, 4)}
    assert f"plot.py: left out: {path} has a damaged line of metrics: " in capsys.readouterr().err
    again = lines[4].replace('"step": 20', '"step": 16')
    path.write_text(start + "\n".join([*lines[:4], again]) + "\n")
    assert plot.read_metrics(run) == {**{step: known[step] for step in (4, 8, 12)}, 16: known[20]}
    for damaged in (lines[2][:40], lines[2][:40] + lines[3], '{"step": 8}', '{"step": 8, "parameters": []}',
                    '{"step": null, "parameters": {}}', '{"step": 8, "parameters": {"embed": {"update": "x"}}}'):
        damaged = "metrics: " + damaged.removeprefix("metrics: ")
        path.write_text(start + "\n".join([*lines[:2], damaged, *lines[2:]]) + "\n")
        assert plot.read_metrics(run) == known and "damaged line" in capsys.readouterr().err


def test_command_line(tmp_path, monkeypatch, capsys):
    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        try:
            plot.main()
        except SystemExit as error:
            assert error.code
            return f"{error.code} {capsys.readouterr().err}"
        return capsys.readouterr()
    run = write(tmp_path / "logs" / r"$\frac$ <b>", 1)     # no formula, and no tag
    untrained = write(tmp_path / "logs" / "untrained", 2)
    (untrained / "log.txt").write_text((untrained / "log.txt").read_text().split("step:")[0])
    assert main(run).out == f"plot: {run / 'loss.png'}\n" and (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    done = main(tmp_path / "logs", "--html", tmp_path / "page.html")
    assert done.out == f"page: {tmp_path / 'page.html'}\n" and not (tmp_path / "logs" / "loss.png").exists()
    assert f"left out: {untrained / 'log.txt'} has no training loss of train_gpt.py" in done.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Reader(page).words.count(r"$\frac$ <b>") == 5 and "untrained" not in page     # titles and tables
    assert "Inside the optimizers" not in page and {file.name for file in run.iterdir()} == {"log.txt", "loss.png"}
    write_metrics(run, 1)
    done = main(run, "--html", tmp_path / "page.html", "--out", tmp_path / "x.png")
    assert done.out.split("\n")[:2] == [f"plot: {tmp_path / name}" for name in ("x.png", "x_optimizer.png")]
    assert "Inside the optimizers" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main(run).out == f"plot: {run / 'loss.png'}\nplot: {run / 'optimizer.png'}\n"
    assert plt.imread(run / "optimizer.png").shape[1] == 1760     # four panels in a row
    for arguments, words in (
            ([untrained], "no run is left to draw"), ([tmp_path / "none"], "none does not exist"),
            ([run, "--out", tmp_path / "x.txt"], "must end in one of"),
            ([run, "--out", tmp_path / "none" / "x.png"], "x.png cannot be written (No such file"),
            ([run, "--html", tmp_path / "none" / "x.html"], "x.html cannot be written (No such file")):
        assert words in main(*arguments)


# The page.

class Reader(html.parser.HTMLParser):
    """Collects the tables of a page and what it refers to; asserts that its tags are closed in order."""
    def __init__(self, page: str):
        super().__init__()
        self.open, self.tables, self.references, self.words = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("src", "href", "srcset", "data", "action", "background"):
                self.references.append(value)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        assert tag == "path"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def make_page(folder: Path) -> Path:
    """Writes the page of two groups, one of them a baseline, both with metrics; names are hostile."""
    for seed in (1, 4):
        write(folder / "base" / f"seed{seed}", seed)
    hostile = write(folder / "tweak" / '<img src=x onerror=alert(1)>&"', 5, lr=0.003, matrix_optimizer="<b>adamw</b>")
    stopped = write(folder / "tweak" / "stopped", 6, stop=30, lr=0.003, matrix_optimizer="<b>adamw</b>")
    for i, run in enumerate((hostile, stopped, folder / "base" / "seed1")):
        write_metrics(run, i)
    path, groups = folder / "page.html", groups_of(hostile, stopped, baseline=(folder / "base",))
    path.write_text(plot.page(groups, plot.optimizer_picture(groups)), encoding="utf-8")
    return path


def test_page_has_the_figures_of_the_logs(tmp_path):
    page = make_page(tmp_path).read_text(encoding="utf-8")
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>") and len(reader.references) == 3 + 6
    for reference in reader.references:
        kind, _, data = reference.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
        page = page.replace(data, "")
    assert not re.search(r"//|url\(|@import", page)
    groups, differences, runs = reader.tables
    legend = reader.words.split("Inside the optimizers")[1].split("norms:")[0].split("\n")
    assert [line.strip() for line in legend if line.strip()] == ["blocks.*.<b>up", "embed", groups[1][0], groups[2][0]]
    assert [row[0] for row in groups] == ["group", "tweak (lr 0.003, matrix_optimizer <b>adamw</b>)",
                                          "baseline base (lr 0.002, matrix_optimizer muon)"]
    assert [row[1:] for row in differences] == [["lr", "matrix_optimizer"], ["0.003", "<b>adamw</b>"],
                                                ["0.002", "muon"]]
    base = plot.read_runs([tmp_path / "base"])
    losses, seconds = zip(*((run.final[1], run.final[0]) for run in base), strict=True)
    cells = dict(zip(groups[0], groups[2], strict=True))
    assert cells["final validation loss"] == f"{fmean(losses):.4f} ± {stdev(losses):.4f}"
    assert cells["seconds of training"] == f"{fmean(seconds):.1f} ± {stdev(seconds):.1f}"
    assert cells["finished runs"] == "2" and dict(zip(groups[0], groups[1], strict=True))["finished runs"] == "1 of 2"
    assert min(losses) <= 1.3 < fmean(losses) and cells["target reached"] == "no (1 of 2 runs)"
    rows = {row[0]: dict(zip(runs[0], row, strict=True)) for row in runs[1:]}
    assert rows.keys() == {'<img src=x onerror=alert(1)>&"', "stopped", "seed1", "seed4"}
    for run in base:
        assert rows[run.name] == {
            "run": run.name, "final validation loss": f"{run.final[1]:.4f}", "steps": "80",
            "target reached": "yes" if run.final[1] <= 1.3 else "no", "seconds of training": f"{run.final[0]:.1f}",
            "tokens a second": f"{80 * 512 / run.final[0]:,.0f}", "seed": str(run.config["seed"]),
            "group": groups[2][0], "hardware": "8 x NVIDIA H100", "torch": "2.13.0"}
    assert (rows["stopped"]["final validation loss"], rows["stopped"]["steps"]) == ("-", "30 of 80")


def test_page_of_this_repository(tmp_path):
    """Three seeds of one configuration, against their summaries."""
    runs = plot.read_runs([RECORDS / "2026-11-22_run_sh"])
    groups = plot.group_runs(runs, [])
    page = plot.page(groups)
    reader = Reader(page)
    summaries = [json.loads((run.folder / "summary.json").read_text()) for run in runs]
    losses = [summary["val_loss"] for summary in summaries]
    assert len(losses) == 3 and reader.tables[0][1][1] == f"{fmean(losses):.4f} ± {stdev(losses):.4f}"
    assert reader.tables[0][1][2] == "yes (3 of 3 runs)"
    assert [row[4] for row in reader.tables[1][1:]] == [f"{s['tokens_per_second']:,.0f}" for s in summaries]
    assert "None: all runs have the same source and config" in reader.words and len(page) < 1e6


# The page in a real browser.

class Browser:
    """A headless chromium, driven over the pipe of its DevTools protocol (chromedevtools.github.io)."""
    def __init__(self, program: str, profile: Path):
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        start = ("import fcntl, os, sys; fds = [fcntl.fcntl(int(a), fcntl.F_DUPFD, 10) for a in sys.argv[1:3]]; "
                 "os.dup2(fds[0], 3); os.dup2(fds[1], 4); os.execv(sys.argv[3], sys.argv[3:])")
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(theirs_in), str(theirs_out), program, "--headless", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
        os.close(theirs_in)
        os.close(theirs_out)
        self.fds, self.buffer, self.events, self.sent, self.session = (ours_in, ours_out), b"", [], 0, {}

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for fd in self.fds:
            os.close(fd)

    def receive(self) -> dict:
        deadline = time.monotonic() + 120
        while b"\0" not in self.buffer:
            ready = select.select([self.fds[0]], [], [], max(0, deadline - time.monotonic()))[0]
            data = os.read(self.fds[0], 1 << 20) if ready else b""
            assert data, "the browser said nothing more"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method: str, **parameters) -> dict:
        self.sent += 1
        message = dict(id=self.sent, method=method, params=parameters, **self.session)
        os.write(self.fds[1], json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.sent:
            pass
        assert "result" in answer, answer
        return answer["result"]

    def evaluate(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, awaitPromise=True,
                         returnByValue=True)["result"]["value"]

    def visit(self, page: Path, width: int, scheme: str = "light") -> dict:
        """Loads the page in a tab of its own; returns what it is, asked for and complained of."""
        self.session = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = dict(sessionId=self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        facts = self.evaluate("""new Promise(done => setTimeout(() => done({
            mode: document.compatMode, text: document.body.innerText, width: document.documentElement.scrollWidth,
            images: [...document.images].map(image => {
                const box = image.getBoundingClientRect();
                return [image.naturalWidth, box.x, box.y + scrollY, box.width, box.height];
            })}), 300))""")
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=dict(
            x=0, y=0, width=width, height=self.evaluate("document.documentElement.scrollHeight"), scale=1))["data"]
        return facts | dict(
            picture=plt.imread(io.BytesIO(base64.b64decode(picture)))[..., :3],
            complaints=[event["params"] for event in self.events if event["method"] in (
                "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")],
            fetched=[url for event in self.events if event["method"] == "Network.requestWillBeSent"
                     if not (url := event["params"]["request"]["url"]).startswith("data:") and url != page.as_uri()])


def check(seen: dict, width: int) -> None:
    """Asserts that the page is drawn, fits the width, complains of nothing and asked for nothing but itself."""
    assert not seen["fetched"], f"fetched: {seen['fetched']}"
    assert not seen["complaints"], f"complaints: {seen['complaints']}"
    assert seen["mode"] == "CSS1Compat" and seen["width"] <= width, "layout"
    assert "Config differences" in seen["text"] and '<img src=x onerror=alert(1)>&"' in seen["text"], "text"
    assert "Inside the optimizers" in seen["text"] and "blocks.*.<b>up" in seen["text"], "text"
    assert len(seen["images"]) == 3 + 6, "images"
    for natural, *box in seen["images"]:
        x, y, width, height = map(round, box)
        part = seen["picture"][y:y + height, x:x + width].reshape(-1, 3)
        blue = (part[:, 2] > part[:, 0] + 0.2).sum()     # of the one group that is no baseline, of Muon's matrix
        assert natural and width > 300 and blue > 100, f"images: {blue} blue points in {width}x{height}"


@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    """The page renders, logs no error and fetches nothing; pages that are spoilt fail the same checks."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no browser here: install Debian's package chromium (or chromium-browser, google-chrome)")
    page = make_page(tmp_path)
    browser = Browser(program, tmp_path / "profile")
    try:
        for width, scheme in ((1200, "light"), (1200, "dark"), (400, "light")):
            seen = browser.visit(page, width, scheme)
            check(seen, width)
            assert (seen["picture"].mean() > 0.8) == (scheme == "light")
            assert (seen["picture"].mean() < 0.3) == (scheme == "dark")
        text = page.read_text(encoding="utf-8")
        for old, new, words in (
                ("</body>", "<script>console.error('broken')</script></body>", "complaints: .*broken"),
                ("</body>", "<script>no_such_function()</script></body>", "complaints: .*no_such_function"),
                ("</body>", "<img src='http://127.0.0.1:9/x.png' alt=''></body>", "fetched: .*127.0.0.1:9"),
                ("</body>", "<script>fetch('https://example.com/')</script></body>", "fetched: .*example"),
                ("</head>", "<link rel='stylesheet' href='style.css'></head>", "fetched: .*style.css"),
                ("base64,iVBOR", "base64,AAAAA", "images: "), ("<!DOCTYPE html>", "", "layout"),
                ("overflow-x: auto", "overflow: visible", "layout")):
            spoilt = text.replace(old, new)
            assert spoilt != text
            (tmp_path / "spoilt.html").write_text(spoilt, encoding="utf-8")
            with pytest.raises(AssertionError, match=words):
                check(browser.visit(tmp_path / "spoilt.html", 400), 400)
    finally:
        browser.close()
