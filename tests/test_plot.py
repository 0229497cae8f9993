"""tools/plot.py: lines, bands, dots and words against numpy on the text of the logs, and pictures that can be read."""

import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import plot
import pytest
from PIL import Image
from runs import DIVIDER, LogError, find_runs, write_record
from test_runs import their_runs, theirs

pytestmark = pytest.mark.filterwarnings("error")


def write(folder: Path, seed=0, stop=0, num_steps=80, change=lambda step, loss: loss, val_every=40, **config) -> Path:
    """Writes the log of a run that falls from 6 to about 1.3, or stops before; `change` is made to its losses."""
    config = {**dict(track="tiny", target=1.3, batch_tokens=512, lr=0.002, num_steps=num_steps, seed=seed), **config}
    random, seconds = np.random.default_rng(seed), 0.0
    text = f"pass\n{DIVIDER}run folder: x\nconfig: {json.dumps(config)}\n"
    for step in range(1, (stop or num_steps) + 1):
        loss = change(step, 1.2 + 4.8 * np.exp(-9 * step / num_steps) + 0.1 * random.random())
        seconds += 1 + random.random()
        for kind in ("train", "val") if step % val_every == 0 else ("train",):
            value = loss + 0.02 * (kind == "val")
            text += f"step:{step}/{num_steps} {kind}_loss:{value:.6f} train_time:{1000 * seconds:.0f}ms step_avg:1ms\n"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(text)
    return folder


def logged(folder: Path, kind: str) -> np.ndarray:
    """Returns rows of steps, tokens, seconds and losses, from the text of the log."""
    found = re.findall(rf"step:(\d+)/\d+ {kind}_loss:(\S+) train_time:(\d+)ms", (folder / "log.txt").read_text())
    steps, losses, ms = np.array(found, dtype=float).T
    return np.stack([steps, 512 * steps, ms / 1000, losses])


@pytest.fixture
def drawn(tmp_path):
    """A function that draws the runs in folders, as drawn.png, and returns the figure."""
    def draw(*folders: Path, baselines: tuple = (), x: str = ""):
        runs, others = find_runs(folders)[0], find_runs(baselines)[0] if baselines else []
        figure = plot.draw(runs, tmp_path / "drawn.png", others, (x,) if x else tuple(plot.AXES))
        assert (tmp_path / "drawn.png").stat().st_size < 80_000
        return figure
    return draw


def words(figure) -> list[str]:
    return [text.get_text().strip() for text in figure.legends[0].get_texts()]


def test_lines_bands_and_dots(tmp_path, drawn):
    """What is drawn for three seeds and one that stopped: mean and std over the seeds, against each of the axes."""
    folders = [write(tmp_path / f"seed{seed}", seed, stop=50 * (seed == 3)) for seed in range(4)]
    curves, vals = ([logged(folder, kind) for folder in folders] for kind in ("train", "val"))
    for rows in curves:
        rows[3] = [rows[3, max(0, i - 3):i + 1].mean() for i in range(rows.shape[1])]     # the last 4 of 80 steps
    (mean, std), (dots, bars) = ((np.mean(whole, axis=0), np.std(whole, axis=0, ddof=1))
                                 for whole in (curves[:3], vals[:3]))
    figure = drawn(tmp_path)
    assert [axis.get_xlabel() for axis in figure.axes] == ["steps", "tokens", "seconds of training"]
    for row, axis in enumerate(figure.axes):
        lines = {len(line.get_xdata()): line for line in axis.lines if line.get_linestyle() == "-"}
        np.testing.assert_allclose(lines[80].get_xydata(), mean[[row, 3]].T)
        np.testing.assert_allclose(lines[50].get_xydata(), curves[3][[row, 3]].T)
        assert lines[50].get_linewidth() < lines[80].get_linewidth() and lines[50].get_color() == lines[80].get_color()
        band = next(part for part in axis.collections if len(part.get_paths()[0]) > 80).get_paths()[0].vertices
        for edge in (mean[3] - std[3], mean[3] + std[3]):
            assert all(np.isclose(band, point).all(axis=1).any() for point in zip(mean[row], edge, strict=True))
        across, along = (np.stack(part.get_segments()) for part in axis.collections if hasattr(part, "get_segments"))
        np.testing.assert_allclose(across[:, :, 0], np.stack([dots[row] - bars[row], dots[row] + bars[row]], 1))
        np.testing.assert_allclose(along[:, :, 1], np.stack([dots[3] - bars[3], dots[3] + bars[3]], 1))
        assert [1.3, 1.3] in [list(line.get_ydata()) for line in axis.lines]
        assert axis.get_ylim()[0] < mean[3].min() and mean[3, 8] < axis.get_ylim()[1] < 4
    # The target is reached by the mean over the seeds, at the first validation that is at or below it.
    loss = f"{dots[3, 1]:.4f} ± {bars[3, 1]:.4f}"
    for target, expected in [(dots[3, 1] - 1e-4, loss), (dots[3, 1] + 1e-4, dots[2, 1]), (9.0, dots[2, 0])]:
        for path in tmp_path.glob("*/log.txt"):
            path.write_text(re.sub('"target": [0-9.]+', f'"target": {target}', path.read_text()))
        expected = expected if expected is loss else f"target after {expected:.1f} s"
        assert words(drawn(tmp_path, x="seconds")) == [f"seed0 and 3 more: {expected}, 1 of 4 unfinished"]


def test_bars_of_training_times(tmp_path):
    """A bar for each variant, as long as the mean of the last times in the logs, the slowest on top."""
    folders = {steps: [write(tmp_path / f"{steps}_{seed}", seed, num_steps=steps) for seed in range(3)]
               for steps in (40, 80)}
    write(tmp_path / "stopped", stop=10)
    figure = plot.draw_times(find_runs([tmp_path])[0], tmp_path / "drawn.png")
    bars = figure.axes[0].patches
    for bar, steps in zip(bars, (40, 80), strict=True):
        assert bar.get_width() == pytest.approx(np.mean([logged(folder, "train")[2, -1] for folder in folders[steps]]))
    assert bars[0].get_y() < bars[1].get_y()
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_names_and_colours(tmp_path, drawn):
    """A recipe's name, or the letter and what differs, or the run's; baselines are grey; no two look alike."""
    for block in range(2):
        write(tmp_path / "ab" / f"0{block}_A_seed{block}", block)
        write(tmp_path / "ab" / f"0{block}_B_seed{block}", block, lr=0.003, matrix_optimizer="adamw")
    one, other = (write(tmp_path / name / "run", lr=lr) for name, lr in (("first", 0.1), ("second", 0.2)))
    figure = drawn(tmp_path / "ab", one, baselines=(one, other))
    assert [text.rpartition(": ")[0] for text in words(figure)] == [
        "A", "B: lr 0.002 -> 0.003; matrix_optimizer none -> adamw", "baseline first/run", "baseline second/run"]
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()]
    assert len(set(looks)) == 4 and [color == plot.GREY for color, _ in looks] == [False, False, True, True]
    write_record(one, [replace(run, recipe=f"recipe {run.side}") for run in find_runs([tmp_path / "ab"])[0]])
    assert [text.split(":")[0] for text in words(drawn(one))] == ["recipe A", "recipe B"]


def test_a_source_that_changed_is_named(tmp_path, drawn):
    """The line that B has and A lacks, or else one that it lacks; of more lines, how many."""
    sources = ["a = 1\nb = 2", "a = 1\nb = 3  # faster", "a = 1", "a = 1\nc = 4\nd = 5"]
    for letter, source in zip("ABCD", sources, strict=True):
        path = write(tmp_path / f"00_{letter}_seed0") / "log.txt"
        sha256 = hashlib.sha256(f"{source}\n".encode()).hexdigest()
        path.write_text(path.read_text().replace("pass", source, 1).replace(
            "\nconfig: ", f"\nsource: sha256 {sha256}, git 0\nconfig: ", 1))
    assert [text.rpartition(": ")[0] for text in words(drawn(tmp_path))] == [
        "A", "B: +b = 3 # faster", "C: -b = 2", "D: +c = 4 and 2 more lines"]


def test_logs_of_modded_nanogpt(tmp_path, drawn):
    """Validation losses are a line where there are no training losses; there is no axis of tokens."""
    folders = [tmp_path / name for name in ("without", "with")]
    their_runs(folders[0], several=theirs(3.28, 3.281))
    their_runs(folders[1], several=theirs(3.26, 3.261, source="b\n", train=True))
    (folders[1] / "requirements.txt").write_text("torch\n")
    figure = drawn(*folders)
    assert [axis.get_xlabel() for axis in figure.axes] == ["steps", "seconds of training"]
    assert words(figure) == ["without/several_1: 3.2705 ± 0.0007, target after 25.0 s, 2 runs",
                             "with/several_1: 3.2505 ± 0.0007, target after 20.0 s, 2 runs"]
    seen = {(len(line.get_xdata()), line.get_linestyle()) for line in figure.axes[0].lines}
    assert {(4, "-"), (4, "None")} <= seen
    with pytest.raises(LogError, match="--x tokens: a log does not say"):
        drawn(folders[0], x="tokens")


def test_many_variants(tmp_path, drawn):
    """The best 12 have a look of their own, in colours that the file keeps; the others are grey, which is said."""
    levels = np.random.default_rng(0).permutation(15) / 10
    for run, variant in enumerate(5 * list(range(15))):
        write(tmp_path / f"v{variant:02}_{run}", run, change=lambda _, loss, up=levels[variant]: loss + up, lr=variant)
    figure = drawn(tmp_path)
    assert [int(text[1:3]) for text in words(figure)] == [i for i in range(15) if levels[i] < 1.15]
    assert "band and bars: std; grey: 3 more variants" in figure.legends[0].get_title().get_text()
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()}
    assert len(looks) == 12 and plot.GREY not in dict(looks)
    pixels = np.asarray(Image.open(tmp_path / "drawn.png").convert("RGB")).reshape(-1, 3).astype(int)
    for color in dict(looks):
        assert (abs(pixels - [int(color[i:i + 2], 16) for i in (1, 3, 5)]).max(axis=1) <= 4).sum() > 50


@pytest.mark.parametrize("name, odd, expected", [
    ("nan", dict(change=lambda step, loss: loss if step < 50 else np.nan), ", 1 of 1 unfinished"),
    ("inf", dict(change=lambda step, loss: loss if step < 9 else np.inf), "inf: 1 of 1 unfinished"),
    ("diverged", dict(change=lambda step, loss: loss * 1.1**step), "diverged: "),
    ("one", dict(num_steps=1, val_every=1, change=lambda *_: 5.8), "one: "), ("stopped", dict(stop=1), "unfinished"),
    ("no_validation", dict(val_every=99), "no_validation: 1 of 1 unfinished"),
    (r"$\frac{a}{$ ${", {}, r"$\frac{a}{$ ${: "), ("_hidden", {}, "_hidden: "), ("a\x1b[31m\nb", {}, "a?[31m b: "),
    ("W" * 120 + "end", dict(stop=50), "W" * 30 + "…" + "W" * 27 + "end: ")])
def test_odd_runs(tmp_path, drawn, name, odd, expected):
    """Alone and beside a good run: the words fit into the picture, and the axis shows what is of interest."""
    good, odd = write(tmp_path / "good", 1), write(tmp_path / "odd" / name, **odd, lr=0.1)
    for folders, x, least, highest in [([odd], "seconds", 1, 1e6), ([good, odd], "", 70, 9)]:
        figure = drawn(*folders, x=x)
        assert expected in words(figure)[-1].replace(r"\$", "$") and not re.search(r"(?<!\\)\$", words(figure)[-1])
        box, pixels = figure.legends[0].get_window_extent(), np.asarray(Image.open(tmp_path / "drawn.png"))
        assert box.height <= pixels.shape[0] and box.width <= pixels.shape[1]
        seen = [line for line in figure.axes[0].lines if len(line.get_ydata()) > 1 or line.get_marker() == "."]
        losses = np.concatenate([line.get_ydata() for line in seen])
        low, high = figure.axes[0].get_ylim()
        assert ((low < losses) & (losses < high)).sum() >= least and high < highest


def test_command_line(tmp_path, monkeypatch, capsys):
    good, bad = write(tmp_path / "logs" / "good"), write(tmp_path / "logs" / "a\x1b[31m", batch_tokens=-1)
    untrained = write(tmp_path / "untrained", change=lambda *_: np.nan)
    write_record(good, find_runs([good])[0])
    monkeypatch.chdir(tmp_path)
    for arguments, said, picture in [
            ([good], "", "logs/good/loss.png"), ([tmp_path / "logs"], "left out: ", "logs/loss.png"),
            ([good / "good"], "", "loss.png"), ([good, "--x=tokens", "--baseline", good, "--out=x.png"], "", "x.png"),
            ([good, "--times", "--out=x.png"], "", "x.png"),
            ([bad], "batch_tokens -1: must be a whole number", ""), ([untrained], "no run has a finite loss", ""),
            ([write(tmp_path / "stopped", stop=5), "--times"], "no run has finished", ""),
            ([good, "--out", "none/x.png"], "none/x.png cannot be written (No such file", "")]:
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
        try:
            plot.main()
        except SystemExit as error:     # its message is printed where the process ends
            print(error.code, file=sys.stderr)
        out, err = capsys.readouterr()
        assert said in err and "\x1b" not in err and bool(picture) == out.endswith(f"{picture}\n")
        assert not picture or (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
