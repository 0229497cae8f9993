"""tools/plot.py: lines, bands, dots and words against numpy on the text of the logs, and pictures that can be read."""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import plot
import pytest
import runs
from matplotlib.cbook import is_math_text
from PIL import Image

pytestmark = pytest.mark.filterwarnings("error")


def write(folder: Path, seed: int = 0, stop: int = 0, num_steps: int = 80, change=lambda step, loss: loss, val_every=40,
          **config) -> Path:
    """Writes the log of a run that falls from 6 to about 1.3, or stops before; `change` is made to its losses."""
    config = {**dict(track="tiny", target=1.3, batch_tokens=512, lr=0.002), **config, "num_steps": num_steps}
    random, seconds = np.random.default_rng(seed), 0.0
    text = f"pass\n{runs.DIVIDER}run folder: x\nconfig: {json.dumps({**config, 'seed': seed})}\n"
    for step in range(1, (stop or num_steps) + 1):
        loss = change(step, 1.2 + 4.8 * np.exp(-9 * step / num_steps) + 0.1 * random.random())
        seconds += 1 + random.random()
        took = f"train_time:{1000 * seconds:.0f}ms step_avg:1ms"
        text += f"step:{step}/{num_steps} train_loss:{loss:.6f} {took}\n"
        if val_every and (step % val_every == 0 or step == num_steps):
            text += f"step:{step}/{num_steps} val_loss:{loss + 0.02:.6f} {took}\n"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(text)
    return folder


def logged(folder: Path, kind: str) -> np.ndarray:
    """Returns rows of steps, tokens, seconds and losses, from the text of the log."""
    found = re.findall(rf"step:(\d+)/\d+ {kind}_loss:(\S+) train_time:(\d+)ms", (folder / "log.txt").read_text())
    steps, losses, ms = np.array(found, dtype=float).T
    return np.stack([steps, 512 * steps, ms / 1000, losses])


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that draws the runs in folders, as drawn.png, and returns the figure."""
    figures, save = [], plot.save

    def draw(*folders: Path, baselines: tuple = (), x: str = ""):
        found = [runs.find_runs(paths)[0] if paths else [] for paths in (folders, baselines)]
        if x:
            plot.draw_one(found[0], tmp_path / "drawn.png", found[1], x)
        else:
            plot.draw(found[0], tmp_path / "drawn.png", found[1])
        assert (tmp_path / "drawn.png").stat().st_size < 80_000
        return figures.pop()

    monkeypatch.setattr(plot, "save", lambda figure, out: figures.append(figure) or save(figure, out))
    return draw


def words(figure) -> list[str]:
    return [text.get_text().strip() for text in figure.legends[0].get_texts()]


def test_lines_bands_and_dots(tmp_path, drawn):
    """What is drawn for three seeds and one that stopped: mean and std over the seeds, against each of the axes."""
    whole = [write(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    stopped = write(tmp_path / "seed3", 3, stop=30)
    smoothed = []
    for rows in (logged(folder, "train") for folder in [*whole, stopped]):
        rows[3] = [rows[3, max(0, i - 3):i + 1].mean() for i in range(rows.shape[1])]     # 4 of 80 steps
        smoothed.append(rows)
    mean, std = np.mean(smoothed[:3], axis=0), np.std(smoothed[:3], axis=0, ddof=1)
    vals = [logged(folder, "val") for folder in whole]
    dots, bars = np.mean(vals, axis=0), np.std(vals, axis=0, ddof=1)

    figure = drawn(*whole, stopped)
    assert [axis.get_xlabel() for axis in figure.axes] == ["steps", "tokens", "seconds of training"]
    for row, axis in enumerate(figure.axes):
        lines = {len(line.get_xdata()): line for line in axis.lines if line.get_linestyle() == "-"}
        np.testing.assert_allclose(lines[80].get_xydata(), mean[[row, 3]].T, rtol=1e-9)
        np.testing.assert_allclose(lines[30].get_xydata(), smoothed[3][[row, 3]].T, rtol=1e-9)
        assert lines[30].get_linewidth() < lines[80].get_linewidth() and lines[30].get_color() == lines[80].get_color()
        band = next(part for part in axis.collections if len(part.get_paths()[0]) > 80).get_paths()[0].vertices
        for edge in (mean[3] - std[3], mean[3] + std[3]):
            assert all(np.isclose(band, point).all(axis=1).any() for point in zip(mean[row], edge, strict=True))
        across, along = (np.stack(part.get_segments()) for part in axis.collections if hasattr(part, "get_segments"))
        np.testing.assert_allclose(across[:, :, 0], np.stack([dots[row] - bars[row], dots[row] + bars[row]], 1))
        np.testing.assert_allclose(along[:, :, 1], np.stack([dots[3] - bars[3], dots[3] + bars[3]], 1))
        low, high = axis.get_ylim()
        assert low < mean[3].min() and mean[3, 8] < high < 4 and [1.3, 1.3] in [list(one.get_ydata()) for one in axis.lines]
    finals = [rows[3, -1] for rows in vals]
    reached = f"target after {dots[2, -1]:.1f} s" if fmean(finals) <= 1.3 else "1 of 4"
    assert words(figure)[0].startswith(f"seed0 and 3 more: {fmean(finals):.4f} ± {stdev(finals):.4f}, {reached}")
    assert words(figure)[0].endswith("1 of 4 unfinished")


def test_a_record_is_drawn_as_its_logs(tmp_path, drawn):
    folders = [write(tmp_path / "logs" / f"seed{seed}", seed, num_steps=800) for seed in range(2)]
    runs.write_record(tmp_path, runs.find_runs(folders)[0])
    log, record = drawn(*folders), drawn(tmp_path)
    assert words(record) == words(log)
    for log_axis, axis in zip(log.axes, record.axes, strict=True):
        points, all_points = (max((line.get_xydata() for line in one.lines), key=len) for one in (axis, log_axis))
        np.testing.assert_allclose(points, all_points[9::10], atol=1e-3)      # of seconds; the losses are close to 1e-5


@pytest.mark.parametrize("finals, expected", [
    ([1.29, 1.3], "target after 4.0 s"), ([1.29, 1.32], "1.3050 ± 0.0212"), ([1.25, 1.25, 1.31], "target after 4.0 s")])
def test_when_the_target_was_reached(tmp_path, drawn, finals, expected):
    """It counts by the mean over the seeds, at the first validation that is at or below it."""
    for seed, final in enumerate(finals):
        text = "".join(f"step:{step}/80 val_loss:{loss} train_time:{step // 20 + seed * 0}s x\n"
                       for step, loss in ((40, 1.4), (80, final)))
        path = write(tmp_path / f"seed{seed}", seed, val_every=0) / "log.txt"
        path.write_text(path.read_text() + text)
    assert words(drawn(tmp_path, x="seconds")) == [f"seed0 and {len(finals) - 1} more: {expected}"]


def test_names_and_colours(tmp_path, drawn):
    """A variant has the name of its recipe, or its letter and what differs; a baseline is grey; two never look alike."""
    for block in range(2):
        write(tmp_path / "ab" / f"0{block}_A_seed{block}", block)
        write(tmp_path / "ab" / f"0{block}_B_seed{block}", block, lr=0.003, matrix_optimizer="adamw")
    one, other = (write(tmp_path / name / "run", 5, lr=lr) for name, lr in (("first", 0.1), ("second", 0.2)))
    figure = drawn(tmp_path / "ab", one, baselines=(one, other))
    assert [text.split(":")[0] for text in words(figure)] == ["A", "B", "baseline first/run", "baseline second/run"]
    assert words(figure)[1].startswith("B: lr 0.002 -> 0.003; matrix_optimizer none -> adamw: ")
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()]
    assert len(set(looks)) == 4 and [color for color, _ in looks].count(plot.GREY) == 2

    kept = runs.find_runs([tmp_path / "ab"])[0]
    runs.write_record(tmp_path / "first", [replace(run, recipe=f"recipe {run.side}") for run in kept])
    assert [text.split(":")[0] for text in words(drawn(tmp_path / "first"))] == ["recipe A", "recipe B"]


@pytest.mark.parametrize("variants, named", [(12, 12), (60, 12)])
def test_many_variants(tmp_path, drawn, variants, named):
    """The best have a colour of their own, which the picture keeps; the others are grey, and their number is said."""
    levels = np.random.default_rng(0).permutation(variants) / 10
    for variant, level in enumerate(levels):
        for seed in range(5 if variants == 12 else 1):
            write(tmp_path / f"{variant}" / f"v{variant}_{seed}", seed, change=lambda _, loss, up=level: loss + up, lr=variant)
    figure = drawn(tmp_path)
    best = sorted(np.argsort(levels)[:named].tolist(), key=str)
    assert [re.match(r"v(\d+)", text)[1] for text in words(figure)] == [str(variant) for variant in best]
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()}
    assert len(looks) == named and plot.GREY not in dict(looks)
    assert (f"{variants - named} more variants" in figure.legends[0].get_title().get_text()) == (variants > named)
    pixels = np.asarray(Image.open(tmp_path / "drawn.png").convert("RGB")).reshape(-1, 3).astype(int)
    for color in dict(looks):
        exact = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - exact).max(axis=1) <= 4).sum() > 50


def nan_after(step: int, value: float):
    return dict(change=lambda at, loss: value if at > step else loss)


@pytest.mark.parametrize("name, odd, expected", [
    ("nan", nan_after(20, np.nan), "1 of 1 unfinished"), ("inf", nan_after(50, np.inf), ", 1 of 1 unfinished"),
    ("diverged", dict(change=lambda step, loss: loss * 1.1**step), "diverged: "), ("one", dict(num_steps=1), "one: "),
    ("no_validation", dict(val_every=0), "no_validation: 1 of 1 unfinished"), ("stopped", dict(stop=1), "unfinished"),
    (r"$\frac{a}{$ ${", {}, r"$\frac{a}{$ ${: "), ("_hidden", {}, "_hidden: "), ("a\x1b[31m\n\u202ab", {}, "a?[31m "),
    ("x" * 120 + "end", {}, "x" * 25 + "…" + "x" * 22 + "end: ")])
def test_odd_runs(tmp_path, drawn, name, odd, expected):
    """Alone and beside a good run: all that is said fits into the picture, and the axis shows what is of interest."""
    good, odd = write(tmp_path / "good", 1), write(tmp_path / "odd" / name, **odd, lr=0.1)
    for folders, x in [([odd], ""), ([odd], "seconds"), ([good, odd], ""), ([good, odd], "tokens")]:
        figure = drawn(*folders, x=x)
        assert expected in words(figure)[-1].replace(r"\$", "$") and not is_math_text(words(figure)[-1])
        box, (width, height) = figure.legends[0].get_window_extent(), figure.canvas.get_width_height()
        assert 0 <= box.x0 and box.x1 <= width + 1 and 0 <= box.y0 and box.y1 <= height + 1
        low, high = figure.axes[0].get_ylim()
        points = np.concatenate([line.get_xydata() for line in figure.axes[0].lines if len(line.get_xydata())])
        assert ((low < points[:, 1]) & (points[:, 1] < high)).sum() > (40 if good in folders else 0)
        assert good not in folders or high < 9
    with pytest.raises(runs.LogError, match="no run has a finite loss"):
        drawn(write(tmp_path / "empty", change=lambda *_: np.nan))
