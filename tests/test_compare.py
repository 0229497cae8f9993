"""records/compare.py and records/logs.py: statistics against simulation and permutation, and what makes them void."""

import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

compare, logs = importlib.import_module("compare"), importlib.import_module("logs")

CONFIG = dict(track="tiny", train_files="data/train_*.bin", val_tokens=2048, target=3.28, batch_tokens=[512], lr=0.002,
              num_steps=20, seed=0, log_dir="logs", run_id="")


def log_text(loss=3.27, seconds=100.0, *, source="print('model')\n", hardware="8 x NVIDIA H100", torch="2.13.0+cu128",
             platform="Linux-6.18", train="aa", val="bb", git="c0ffee", host="n1", steps=None, **config) -> str:
    """Returns a log such as train_gpt.py writes; with `steps`, of a run that was killed after that many."""
    config = {**CONFIG, **config}
    last, text = steps or config["num_steps"], source + "=" * 100 + f"""
run folder: logs/x
config: {json.dumps(config)}
source: sha256 {hashlib.sha256(source.encode()).hexdigest()}, git {git}
versions: python 3.11.7, torch {torch}, cuda 12.8, {platform}
hardware: {hardware}
{f"host: {host}" if host else "kernels: of a log before hosts were named"}
data: 1,000 training tokens in 1 of 1 shards (0 at their ends left out); the run takes 500, or 0.50 epochs
data sha256: train {train}, val {val}
"""
    for step in range(1, last + 1):
        time = f"train_time:{1e3 * seconds * step / last:.0f}ms step_avg:{1e3 * seconds / last:.2f}ms\n"
        text += f"step:{step}/{config['num_steps']} train_loss:{9 - step / 4:.6f} {time}"
        if step == last or step % 10 == 0:
            text += f"step:{step}/{config['num_steps']} val_loss:{loss if step == last else 8:.6f} {time}"
    if steps is None:
        text += (f"run_id: x\ntrack: tiny\nval_loss: {loss:.6g}\ntarget_reached: {json.dumps(loss <= 3.28)}\n"
                 f"mfu: null\nhardware: {hardware}\ntorch: {torch}\n")
    return text


def write(folder: Path, *args, **options) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(log_text(*args, **options))
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return logs.read_log(write(tmp_path_factory.mktemp("template") / "logs" / "run"))


@pytest.fixture
def runs(template):
    """Returns a function that makes runs in memory of given losses and seconds."""
    def make(side: str, losses, seconds=None):
        seconds = [100.0] * len(losses) if seconds is None else seconds
        return [dataclasses.replace(
            template, path=Path("/nowhere") / side / str(i) / "log.txt", config={**template.config, "seed": i},
            losses={"train": {}, "val": {20: (float(time), float(loss))}})
            for i, (loss, time) in enumerate(zip(losses, seconds, strict=True))]
    return make


# Logs.

def test_logs_of_this_repository_agree_with_their_summaries():
    paths = sorted(path.parent / "log.txt" for path in (ROOT / "records").rglob("summary.json"))
    assert len(paths) >= 10
    for path in paths:
        run, summary = logs.read_log(path), json.loads((path.parent / "summary.json").read_text())
        assert run.finished and not run.resumed and run.name == path.parent.name
        assert run.final == pytest.approx((summary["train_seconds"], summary["val_loss"]), abs=1e-3)
        assert run.final[1] == pytest.approx(summary["val_loss"], abs=1e-6)
        assert hashlib.sha256(run.source.encode()).hexdigest() == run.source_sha256
        assert {name: getattr(run, name) for name in ("git", "hardware", "torch", "train_sha256", "val_sha256",
                                                      "world_size")}.items() <= summary.items()
        assert (run.config["seed"], run.num_steps) == (summary["seed"], summary["steps"])
        assert run.summary.keys() == summary.keys() and run.summary["target_reached"] is summary["target_reached"]


def test_resumed_log(tmp_path):
    """The later of two lines of a step counts; what the resume changed makes the run equal to no other."""
    first = log_text(steps=12, loss=5.0)
    second = log_text(hardware="8 x NVIDIA A100", resume="x")
    second = second.replace("step:1/20", "resumed: x at step 10/20\nstep:1/20", 1)
    (tmp_path / "log.txt").write_text(first + second)
    run = logs.read_log(tmp_path)
    assert run.resumed and run.config["resume"] == "x"
    assert run.final == (100.0, 3.27) and run.losses["train"][12] == (60.0, 6.0)
    assert run.hardware == "8 x NVIDIA H100 then 8 x NVIDIA A100" and run.torch == "2.13.0+cu128"
    assert run.host == "n1"
    voids = compare.compare([run], [run], "final_loss").voids
    assert [text.split(": ")[0] for text in voids] == ["a run given twice", *["resumed on other ground"] * 2]


def test_steps_in_any_order_and_with_other_keys(tmp_path):
    """What a fork logs besides, in any order, is ignored; a cut line says nothing, a damaged number is an error."""
    path, start = tmp_path / "log.txt", log_text().split("step:1/")[0]
    path.write_text(start + """step:1/20 train_loss:5.5 grad_norm:0.3 train_time:1000ms step_avg:1ms
step:2/20 train_time:2.5s step_avg:1ms lr:1e-3,2e-3 note: train_loss:4.5e0
step:3/20 step_avg:?ms train_loss:nan my_val_loss:none train_time:3000ms
step:3/20 grad_norm:nanms val_loss:4.25 train_loss:4.0 train_time:3000ms
step:4/20 grad_norm:0.5 train_time:4000ms
step:20/20 train_time:9000ms val_loss:3""")
    run = logs.read_log(path)
    assert run.losses == {"train": {1: (1, 5.5), 2: (2.5, 4.5), 3: (3, 4)}, "val": {3: (3, 4.25)}}
    for pair in ("train_loss:x", "train_time:xms"):
        path.write_text(f"{start}step:1/20 train_loss:1 train_time:1ms {pair}\n")
        with pytest.raises(logs.LogError, match="a line of a step is damaged .could not convert string to float: 'x'"):
            logs.read_log(path)


def test_facts_that_stand_in_the_source_too(tmp_path):
    """A source whose text has lines as a log has, in a run that was stopped and resumed."""
    source = 'log(f"""\nrun folder: {x}\nhardware: {y}\nversions: torch 1\nconfig: {"a": 1}\nrun_id: {z}""")\n'
    (tmp_path / "log.txt").write_text(log_text(source=source, steps=5) + log_text(source="#!x\n" + source, steps=5))
    run = logs.read_log(tmp_path)
    assert (run.hardware, run.torch, run.config["lr"]) == ("8 x NVIDIA H100", "2.13.0+cu128", 0.002)
    assert run.resumed and run.summary == {} and run.source == source


def modded_log(loss, seconds=178.9, unit="ms", steps=1770) -> str:
    """Returns a log such as modded-nanogpt's scripts write; times in seconds are those of its track 3."""
    time = f"{1e3 * seconds:.0f}ms" if unit == "ms" else f"{seconds:.3f}s"
    machine = "Running on device_name=NVIDIA H100 80GB HBM3 with world_size=8\n" if unit == "s" else "".join(
        f"|   {i}  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |\n"
        "| N/A   28C    P0            109W /  700W |    1520MiB /  81559MiB |      0%      Default |\n"
        for i in range(8))
    rule = "=" * 100
    return (f'import torch\nprint0(f"step:{{step}}/{{train_steps}} val_loss:{{val_loss:.4f}}")\n\n{rule}\n'
            f"Running Python 3.12.7\nRunning PyTorch 2.10.0+cu128 compiled for CUDA 12.8\n{machine}{rule}\n"
            f"step:0/{steps} val_loss:10.8258 train_time:0{unit} step_avg:0.03ms\nstep:1/{steps} train_time:77ms "
            f"step_avg:76.76ms\nstep:{steps}/{steps} val_loss:{loss:.4f} train_time:{time} step_avg:101.07ms\n"
            "peak memory allocated: 29148 MiB reserved: 45178 MiB\n")


@pytest.mark.parametrize("unit", ["ms", "s"])
def test_modded_nanogpt(tmp_path, unit):
    losses = dict(a=[3.2781, 3.2779, 3.2786, 3.2790, 3.2774], b=[3.2801, 3.2799, 3.2790, 3.2796, 3.2788])
    for side, values in losses.items():
        (tmp_path / side).mkdir()
        for i, loss in enumerate(values):
            (tmp_path / side / f"{i}.txt").write_text(modded_log(loss, 178.9 + i, unit))
    a, b = (compare.read_runs([str(tmp_path / side)]) for side in losses)
    assert a[1].kind == "modded-nanogpt" and a[1].final == (179.9, 3.2779) and a[1].finished
    assert (a[1].hardware, a[1].torch) == ("8 x NVIDIA H100 80GB HBM3", "2.10.0+cu128")
    result = compare.compare(a, b, "final_loss", modded_track=1)
    assert result.decision == "slower" and result.p == pytest.approx(stats.ttest_ind(
        losses["b"], losses["a"], equal_var=False).pvalue)
    # their rules, from scipy and by hand: (3.28 - 3.27820) * sqrt(5) = 0.00402, (3.28 - 3.27948) * sqrt(5) = 0.00116
    for side, rule, expected in zip("ab", result.rules, ("met", "not met"), strict=True):
        p = stats.ttest_1samp(losses[side], 3.28, alternative="less").pvalue
        assert (p < 0.01) == (expected == "met") and f": {expected} (p = {p:.2g} " in rule
    rules = compare.compare(a, b, "final_loss", modded_track=3).rules
    assert "A: met ((3.28 - mean) * sqrt(n) = 0.0040," in rules[0]
    assert "B: not met ((3.28 - mean) * sqrt(n) = 0.0012," in rules[1]
    assert compare.compare(a, b, "time_to_target", modded_track=1).difference == pytest.approx(0)
    assert any("not checked: " in text and "training data" in text for text in result.warnings)
    with pytest.raises(logs.LogError, match="--modded_track 1 or 3"):
        compare.compare(a, b, "time_to_target")
    ours = logs.read_log(write(tmp_path / "ours"))
    assert any(text.startswith("different trainer") for text in compare.compare(a, [ours], "final_loss").voids)
    assert compare.compare(a, [ours], "final_loss").rules == []
    with pytest.raises(logs.LogError, match="leave it out"):
        compare.compare([ours], [ours], "final_loss", modded_track=3)


# Statistics.

def theoretical_power(n: int, effect: float, alpha: float = 0.05) -> float:
    """Of the two-sided, two-sample t-test with n a side and a difference of `effect` spreads."""
    critical = stats.t.ppf(1 - alpha / 2, 2 * n - 2)
    power = stats.nct(2 * n - 2, effect * np.sqrt(n / 2))
    return power.sf(critical) + power.cdf(-critical)


@pytest.mark.parametrize("effect, sign", [(1, -1), (2, 1), (3, -1)])
def test_power(runs, effect, sign):
    """400 comparisons of 6 runs a side: the share decided has a standard error of at most 2.5 points."""
    random, words = np.random.default_rng(effect), {-1: "faster", 1: "slower"}
    decisions = []
    for _ in range(400):
        a, b = random.normal(3.28, 0.002, 6), random.normal(3.28 + sign * effect * 0.002, 0.002, 6)
        decisions.append(compare.compare(runs("a", a), runs("b", b), "final_loss").decision)
    assert decisions.count(words[sign]) / 400 == pytest.approx(theoretical_power(6, effect), abs=0.05)
    assert decisions.count(words[-sign]) <= 1


def test_p_agrees_with_a_permutation_test(runs):
    """All 12,870 ways to deal 16 losses to two sides; the share whose difference is as large."""
    random = np.random.default_rng(0)
    sides = np.array(list(itertools.combinations(range(16), 8)))
    seen = []
    for effect in (0, 0.5, 1, 1, 1.5, 2):
        a, b = random.normal(3.28, 0.002, 8), random.normal(3.28 + effect * 0.002, 0.002, 8)
        losses = np.concatenate([a, b])
        sums = losses[sides].sum(1)
        p = np.mean(np.abs(2 * sums - losses.sum()) >= abs(a.sum() - b.sum()) - 1e-12)
        seen.append(p)
        assert compare.compare(runs("a", a), runs("b", b), "final_loss").p == pytest.approx(p, abs=0.02)
    assert min(seen) < 0.01 and max(seen) > 0.3


def test_confidence_interval_covers(runs):
    """2,000 intervals at 90%, sizes and spreads unequal: the share that covers has a standard error of 0.7 points."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        low, high, _ = compare.t_test([random.normal(0, 1, 5), random.normal(2, 3, 8)], alpha=0.1)
        covered += low <= 2 <= high
    assert covered / 2000 == pytest.approx(0.9, abs=0.025)
    a, b = random.normal(3.28, 0.002, 5), random.normal(3.28, 0.001, 8)
    result, expected = compare.compare(runs("a", a), runs("b", b), "final_loss"), stats.ttest_ind(b, a, equal_var=False)
    assert (result.low, result.high, result.p) == pytest.approx((*expected.confidence_interval(), expected.pvalue))
    assert result.difference == pytest.approx(b.mean() - a.mean())


def test_runs_needed(runs):
    random = np.random.default_rng(2)
    for effect, spread in ((1.5, 1), (1, 2)):
        n = compare.runs_needed(effect, [1, spread], 0.05)
        for size, low, high in ((n, 0.78, 0.88), (n - 2, 0.6, 0.8)):
            a, b = random.normal(0, 1, (2000, size)), random.normal(effect, spread, (2000, size))
            share = np.mean(stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < 0.05)
            assert low < share < high
    needed = compare.compare(runs("a", [3.270, 3.271, 3.272]), runs("b", [3.271, 3.272, 3.273]), "final_loss").needed
    textbook = next(n for n in range(2, 99) if theoretical_power(n, 1) >= 0.8)
    assert needed.startswith(f"about {textbook - 3} more a side")
    for b, words in (([3.27, 3.29], "no reasonable number"), ([3.27], "2 or more a side"), ([4.27, 4.271], "none")):
        assert compare.compare(runs("a", [3.281, 3.279]), runs("b", b), "final_loss").needed.startswith(words)


def test_a_configuration_against_itself(runs):
    """20 runs, split at random: at the 5% level 'faster' or 'slower' in at most 5 of 40 splits, and in 5% of 200.

    A random split of fixed runs is a draw from the permutation distribution, so the splits are independent and each is
    decided with a chance of about 5%: of 40, more than 5 are with a chance of 1.4% (binomial), hence the fixed seed;
    the share of 200 has a standard error of 1.5 points.
    """
    random = np.random.default_rng(0)
    pool, decided = runs("a", random.normal(3.28, 0.002, 20)), []
    for _ in range(200):
        order = random.permutation(20)
        a, b = ([pool[i] for i in half] for half in (order[:10], order[10:]))
        decided.append(compare.compare(a, b, "final_loss").decision != "not decided")
    assert sum(decided[:40]) <= 5
    assert 0.01 < np.mean(decided) < 0.1


def test_real_runs_of_a_configuration_against_themselves():
    """The same with 20 real runs of 60 steps, which differ in the seed alone."""
    random = np.random.default_rng(1)
    pool = compare.read_runs([str(ROOT / "records/tiny/2026-11-23_one_configuration")])
    assert sorted(run.config["seed"] for run in pool) == list(range(20)) and all(run.finished for run in pool)
    decided = []
    for _ in range(40):
        order = random.permutation(20)
        a, b = ([pool[i] for i in half] for half in (order[:10], order[10:]))
        result = compare.compare(a, b, "final_loss")
        assert not result.voids
        decided.append(result.decision != "not decided")
    assert sum(decided) <= 5


def test_times_are_compared_within_blocks(tmp_path):
    """A machine that drifts by half hides 2% from the sides' means, not from the ratios; p as by flipping signs."""
    random = np.random.default_rng(3)
    drift = np.linspace(1, 1.5, 10)
    noise = random.normal(0, 0.008, (2, 10))
    times = dict(A=100 * drift * np.exp(noise[0]), B=98 * drift * np.exp(noise[1]))
    found = {side: [logs.read_log(write(tmp_path / f"{i:02}_{side}_seed{i}", 3.27, time, seed=i))
                    for i, time in enumerate(times[side])] for side in times}
    result = compare.compare(found["A"], found["B"], "time_to_target")
    ratios = np.log([b.final[0] / a.final[0] for a, b in zip(found["A"], found["B"], strict=True)])
    signs = np.array(list(itertools.product([-1, 1], repeat=10)))
    p = np.mean(np.abs(signs @ ratios) >= abs(ratios.sum()) - 1e-12)
    assert result.p == pytest.approx(p, abs=0.02) and result.decision == "faster"
    assert result.difference == pytest.approx(np.exp(ratios.mean()) - 1)
    assert result.low < result.difference < result.high < 0
    assert stats.ttest_ind(*times.values()).pvalue > 0.5
    # a block of which one side is missing
    voids = compare.compare(found["A"], found["B"][1:], "time_to_target").voids
    assert "runs left out: of block 00 only one side is here" in voids


@pytest.mark.parametrize("b, words", [
    ([3.2703, 3.2705, 3.2701], r"faster \(B takes 2.0% less time than A, p = \d"),
    ([3.2910, 3.2908, 3.2912], r"not decided \(B's mean 3.2910 is above the target 3.28: no time .* no record\)"),
    ([3.2810, 3.2750, 3.2780], r"faster \(")])
def test_time_to_target_takes_the_mean_below_it(runs, b, words):
    a = runs("a", [3.2702, 3.2704, 3.2706], [100.0, 100.1, 99.9])
    result = compare.compare(a, runs("b", b, [98.0, 98.1, 97.9]), "time_to_target")
    assert re.match(words, result.verdict)
    assert (result.p is None) == ("above" in words)
    if "above" in words:     # the other way round, too
        assert compare.compare(runs("b", b), a, "time_to_target").verdict.startswith("not decided (A's mean 3.2910")


def test_no_spread(runs):
    for b in ([3.27, 3.27], [3.26, 3.26]):
        verdict = compare.compare(runs("a", [3.27, 3.27]), runs("b", b), "final_loss").verdict
        assert "no spread" in verdict and "nan" not in verdict
    result = compare.compare(runs("a", [3.27, 3.27]), runs("b", [3.26, 3.2601]), "final_loss")
    assert result.decision == "faster"     # one side's spread is enough
    one = compare.compare(runs("a", [3.27]), runs("b", [3.26]), "final_loss")
    assert one.verdict == "not decided (too few runs)"
    assert "nan" not in compare.report(one) + compare.report(result)


# What makes a comparison void.

BASE = [dict(loss=3.2700, seed=0), dict(loss=3.2704, seed=1)]
TWEAK = [dict(loss=3.2600, seed=0, lr=0.003), dict(loss=3.2604, seed=1, lr=0.003)]


def both(**change) -> list[dict]:
    return [{**run, **change} for run in TWEAK]


@pytest.mark.parametrize("metric, b, words", [
    ("final_loss", TWEAK, None),
    ("final_loss", both(source="print('tweak')\n"), None),
    ("final_loss", both(target=3.0), None),
    ("final_loss", both(val_every=5, run_id="y"), None),
    ("final_loss", both(hardware="8 x NVIDIA A100"), "different hardware: A 8 x NVIDIA H100; B 8 x NVIDIA A100"),
    ("final_loss", both(hardware="4 x NVIDIA H100"), "different world size: A 8; B 4"),
    ("final_loss", both(torch="2.12.0"), "different torch: A 2.13.0+cu128; B 2.12.0"),
    ("final_loss", both(train="cc"), "different training data (sha256): A aa; B cc"),
    ("final_loss", both(val="cc"), "different validation data (sha256): A bb; B cc"),
    ("final_loss", both(val_tokens=4096), "different validation set (val_tokens): A 2048; B 4096"),
    ("final_loss", both(num_steps=30), "different number of steps: A 20; B 30"),
    ("time_to_target", both(num_steps=30), None),
    ("time_to_target", both(target=3.27), "different target: A 3.28; B 3.27"),
    ("loss_at_time", both(seconds=101.9), None),
    ("loss_at_time", both(seconds=102.1), "not equal times: A 100.00 s, B 102.10 s"),
    ("final_loss", [TWEAK[0], TWEAK[0]], "a seed repeated: B has seed 0 more than once"),
    ("final_loss", [TWEAK[0], {**TWEAK[1], "lr": 0.004}], "B is not one configuration: lr 0.003 -> 0.004"),
    ("final_loss", [TWEAK[0], {**TWEAK[1], "source": "0\n"}], "B is not one configuration: source "),
    ("final_loss", [*TWEAK, dict(loss=3.25, seed=2, lr=0.003, steps=17)],
     "runs left out: 2 has no validation loss at its last step, 20 (that of step 17 would be a step chosen after"),
])
def test_void(tmp_path, metric, b, words):
    sides = [[logs.read_log(write(tmp_path / side / str(i), **run)) for i, run in enumerate(runs)]
             for side, runs in (("a", BASE), ("b", b))]
    result = compare.compare(*sides, metric)
    if words is None:
        assert result.voids == [] and "void" not in result.verdict
        assert result.decision == "faster" if metric != "time_to_target" else "no spread" in result.verdict
    else:
        assert any(text.startswith(words) for text in result.voids), result.voids
        assert result.decision == "not decided" and words.split(": ")[0] in result.verdict


def test_warnings_that_do_not_void(tmp_path):
    sides = [[logs.read_log(write(tmp_path / side / str(i), **run, **more)) for i, run in enumerate(runs)]
             for side, runs, more in (("a", BASE, {}), ("b", TWEAK, dict(platform="Linux-5", git="c0ffee-dirty",
                                                                         batch_tokens=[1024])))]
    write(tmp_path / "b" / "unlucky", loss=3.4, seed=2, lr=0.003, batch_tokens=[1024])
    write(tmp_path / "b" / "another_rate", loss=3.4, seed=2, lr=0.004, batch_tokens=[1024])
    result = compare.compare(*sides, "final_loss")
    assert result.decision == "faster"
    assert [text.split(":")[0] for text in result.warnings] == [
        "versions differ", "files differed from their commit (git -dirty; the log's source counts)",
        "batch_tokens differ, so equal steps are not equal tokens",
        "beside these runs lie others of the same configuration, not counted"]
    assert result.warnings[-1].endswith("not counted: unlucky")


def test_hosts(tmp_path):
    """Within a block they must be one, where times count; sides on two nodes call for a warning; old logs name none."""
    def sides(where, *hosts):
        return [[logs.read_log(write(tmp_path / where / f"{i:02}_{side}_x", 3.27, 100 + i, seed=i, host=host[i]))
                 for i in range(2)] for side, host in zip("AB", hosts, strict=True)]
    for metric, words in (("time_to_target", ["blocks that span machines: 01 has n1 | n2"]), ("final_loss", [])):
        result = compare.compare(*sides(f"blocks_{metric}", ("n1", "n1"), ("n1", "n2")), metric)
        assert result.voids == words
    for name, a, b, words in (
            ("moved", ("n1", "n2"), ("n1", "n2"), ["hosts differ: n1 | n2; nodes of one kind can differ in speed"]),
            ("old", (None, "n1"), ("n1", None), []), ("one", ("n1", "n1"), ("n1", "n1"), [])):
        result = compare.compare(*sides(name, a, b), "time_to_target")
        assert (result.voids, result.warnings) == ([], words)
    a, b = ([logs.read_log(write(tmp_path / host / str(i), 3.27, 100 + i, seed=i, host=host)) for i in range(2)]
            for host in ("n1", "n2"))
    result = compare.compare(a, b, "loss_at_time")
    assert result.voids == [] and [text.split(":")[0] for text in result.warnings] == ["hosts differ"]


def run_script(script: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "records" / script), *map(str, arguments)], capture_output=True,
                          text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_command_line(tmp_path, monkeypatch, capsys):
    """An A/B folder with its plan, as a process; then its voids, and bad input, in this one."""
    planned = []
    for i in range(3):
        for side, seconds in (("A", 100 + 20 * i), ("B", 97.1 + 19.3 * i)):
            planned.append(write(tmp_path / f"{i:02}_{side}_seed{i}", 3.27 + i / 1e3, seconds, seed=i,
                                 lr=0.002 if side == "A" else 0.003).name)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(dict(metric="time_to_target", alpha=0.01, runs=planned)))
    done = run_script("compare.py", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "change: lr 0.002 -> 0.003\n" in done.stdout and "in 3 blocks" in done.stdout
    verdict = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"verdict: faster \(B takes 3.\d% less time than A, p = 0.00\d+\)", verdict)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        try:
            compare.main()
        except SystemExit as error:
            assert error.code
            return f"{error.code} {capsys.readouterr().err}"
        return capsys.readouterr().out
    result = json.loads(main(tmp_path, "--json", "--metric", "final_loss"))
    assert result["voids"] == [f"metric chosen after looking: final_loss, where {plan} has time_to_target"]
    first = [tmp_path / planned[0], "vs", tmp_path / planned[1]]
    assert f"void: runs left out: {plan} has 01_A_seed1, 01_B_seed1, 02_A_seed2, 02_B_seed2, not here" in main(
        *first, "--metric", "time_to_target")
    (tmp_path / planned[3] / "log.txt").write_text(log_text(3.271, 116.4, seed=1, lr=0.003, platform="other kernel"))
    assert "void: blocks that span machines: 01 has " in main(tmp_path)
    plan.write_text("{")
    for arguments, words in (
            ([tmp_path], "plan.json is damaged"), (first, "--metric: name the one that decides"),
            (first[:2], "name runs on both sides"), ([first[0]], "no 'vs'"),
            ([*first[:2], plan, "--metric", "final_loss"], "plan.json is no log of train_gpt.py"),
            ([*first[:2], tmp_path / "none", "--metric", "final_loss"], "none does not exist"),
            ([*first, "--metric", "final_loss", "--alpha", "5"], "alpha 5.0: must lie between")):
        assert words in main(*arguments)


def test_several_candidates_and_looks(tmp_path, monkeypatch, capsys):
    """A folder with the sides A, B and C, of 4 blocks the plan having a look at 2: alpha is the plan's."""
    def add(block):
        for side, lr, seconds in (("A", 0.002, 100), ("B", 0.003, 95), ("C", 0.004, 105)):
            write(tmp_path / f"{block:02}_{side}_seed{block}", 3.27 + block / 1e3, seconds + block, seed=block, lr=lr)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        compare.main()
        return capsys.readouterr().out
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(dict(metric="time_to_target", alpha=0.05, alpha_each=0.0125, looks=[2], runs=[
        f"{block:02}_{side}_seed{block}" for block in range(4) for side in "ABC"])))
    add(0)
    assert main(tmp_path).count("\nvoid: runs left out") == 2
    add(1)
    printed = main(tmp_path)
    assert re.findall("^metric: .*", printed, re.M) == ["metric: time_to_target, alpha 0.0125"] * 2
    assert re.findall("^difference, (.) - A: ([+-]).* .98.75% conf", printed, re.M) == [("B", "-"), ("C", "+")]
    assert printed.count(f"warning: ended early: after 2 of 4 blocks, a look in {plan}\n") == 2
    verdicts = re.findall("^verdict: .*", printed, re.M)
    assert verdicts[0].startswith("verdict: faster (B takes 5") and verdicts[1].startswith("verdict: slower (C takes 5")
    # one candidate alone, at the plan's alpha and at another
    alone = [*tmp_path.glob("*_A_*"), "vs", *tmp_path.glob("*_C_*"), "--metric", "time_to_target", "--alpha"]
    assert "verdict: slower (B takes 5" in main(*alone, 0.0125)
    assert f"void: alpha chosen after looking: 0.05, where {plan} has 0.0125" in main(*alone, 0.05)
    # a third block is no look, nor are two of three
    add(2)
    assert main(tmp_path).count("\nvoid: runs left out") == 2
    two = [path for path in alone if "02_" not in str(path)]
    assert "void: runs left out" in main(*two, 0.0125)
    add(3)
    assert "void" not in main(tmp_path) and "ended early" not in main(tmp_path)


def test_damaged_logs(tmp_path):
    (tmp_path / "log.txt").write_text(log_text().replace("print('model')", "print('other')"))
    with pytest.raises(logs.LogError, match="the source in it is not the one that ran"):
        logs.read_log(tmp_path)
    (tmp_path / "log.txt").write_text(log_text().split('"lr"')[0])
    with pytest.raises(logs.LogError, match="config line is damaged"):
        logs.read_log(tmp_path)
    unfinished = logs.read_log(write(tmp_path / "killed", steps=9))
    assert unfinished.summary == {} and not unfinished.finished
    with pytest.raises(logs.LogError, match="side A has no finished run .given: killed"):
        compare.compare([unfinished], [unfinished], "final_loss")


def test_plot_reads_through_the_same_reader(tmp_path):
    done = run_script("plot.py", write(tmp_path / "run"), "--out", tmp_path / "loss.png")
    assert done.returncode == 0 and (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    (tmp_path / "modded.txt").write_text(modded_log(3.28))
    done = run_script("plot.py", tmp_path / "modded.txt")
    assert done.returncode == 1 and "has no training loss of train_gpt.py" in done.stderr
