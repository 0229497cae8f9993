"""tools/compare.py: statistics against simulation and permutation, and what makes a comparison void."""

import dataclasses
import itertools
import json
import re
import sys

import compare
import numpy as np
import pytest
import runs
from conftest import ROOT
from scipy import stats
from test_runs import NAMED, run_tool, their_runs, theirs, write


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return runs.read_log(write(tmp_path_factory.mktemp("template") / "logs" / "run"))


@pytest.fixture
def make(template):
    """Returns a function that makes runs in memory of given losses and seconds."""
    def make(variant: str, losses, seconds=None):
        seconds = [100.0] * len(losses) if seconds is None else seconds
        return [dataclasses.replace(
            template, path=template.path.parents[1] / "none" / variant / f"{i}.txt", name=f"{variant}{i}",
            config={**template.config, "seed": i}, losses={"train": {}, "val": {20: (float(time), float(loss))}})
            for i, (loss, time) in enumerate(zip(losses, seconds, strict=True))]
    return make


# Statistics.

def test_p_agrees_with_a_permutation_test(make):
    """All 12,870 ways to deal 16 losses to two variants; the share whose difference is as large."""
    random = np.random.default_rng(0)
    halves = np.array(list(itertools.combinations(range(16), 8)))
    seen = []
    for effect in (0, 0.5, 1, 1, 1.5, 2):
        a, b = random.normal(3.28, 0.002, 8), random.normal(3.28 + effect * 0.002, 0.002, 8)
        losses = np.concatenate([a, b])
        sums = losses[halves].sum(1)
        p = np.mean(np.abs(2 * sums - losses.sum()) >= abs(a.sum() - b.sum()) - 1e-12)
        seen.append(p)
        result = compare.compare(make("a", a), make("b", b), "final_loss")
        assert result.p == pytest.approx(p, abs=0.02) and (result.decision != "inconclusive") == (result.p < 0.05)
        assert result.difference == pytest.approx(b.mean() - a.mean())
        assert result.low < result.difference < result.high and (result.low > 0) == (result.decision == "slower")
    assert min(seen) < 0.01 and max(seen) > 0.3


def test_runs_needed(make):
    """As many as tables say, 17 for 1 std (Cohen, 1988), and 80% of simulated experiments then find the effect."""
    random = np.random.default_rng(2)
    result = compare.compare(make("a", [3.270, 3.271, 3.272]), make("b", [3.271, 3.272, 3.273]), "final_loss")
    assert result.needed.startswith(f"about {17 - 3} more runs of each")
    few = [0.0, 1.0, 2.0, 3.0], [0.5, 1.5, 3.0, 6.0]     # of stds 1.3 and 2.4
    words = compare.words_needed([*few], 1.25, 0.5, 0.05, "runs")
    n = 4 + int(re.match(r"about (\d+) more runs", words)[1])
    for size, low, high in ((n, 0.77, 0.84), (n * 3 // 4, 0.6, 0.74)):
        samples = [random.normal(np.mean(x), np.std(x, ddof=1), (2000, size)) for x in few]
        assert low < np.mean(stats.ttest_ind(*samples, axis=1, equal_var=False).pvalue < 0.05) < high
    for b, words in (([3.27, 3.29], "more than 1,000"), ([3.27], "2 or more runs"), ([4.27, 4.271], "none")):
        assert compare.compare(make("a", [3.281, 3.279]), make("b", b), "final_loss").needed.startswith(words)


@pytest.mark.parametrize("pool", ["random numbers", "real runs"])
def test_a_configuration_against_itself(make, pool):
    """20 runs of one setting, split at random: at the 5% level 'faster' or 'slower' in at most 5 of 40 splits.

    A random split of fixed runs is a draw from the permutation distribution, so the splits are independent and each is
    decided with a chance of about 5%: of 40, more than 5 are with a chance of 1.4% (binomial), hence the fixed seed.
    """
    random, decided = np.random.default_rng(0), []
    if pool == "random numbers":
        pool = make("a", random.normal(3.28, 0.002, 20))
    else:
        pool, _ = runs.find_runs([ROOT / "tests" / "fixtures" / "one_configuration"])
    assert sorted(run.config["seed"] for run in pool) == list(range(20)) and all(run.finished for run in pool)
    for _ in range(40):
        order = random.permutation(20)
        a, b = ([pool[i] for i in half] for half in (order[:10], order[10:]))
        result = compare.compare(a, b, "final_loss")
        assert not result.voids
        decided.append(result.decision != "inconclusive")
    assert sum(decided) <= 5


def test_times_are_compared_within_blocks(tmp_path):
    """A machine that drifts by half hides 2% from the variants' means, not from the ratios; p as by flipping signs."""
    random = np.random.default_rng(3)
    drift, noise = np.linspace(1, 1.5, 10), random.normal(0, 0.008, (2, 10))
    times = dict(A=100 * drift * np.exp(noise[0]), B=98 * drift * np.exp(noise[1]))
    a, b = ([runs.read_log(write(tmp_path / f"{i:02}_{letter}_seed{i}", 3.27, time, seed=i))
             for i, time in enumerate(times[letter])] for letter in times)
    result = compare.compare(a, b, "time_to_target")
    ratios = np.log([two.final[0] / one.final[0] for one, two in zip(a, b, strict=True)])
    signs = np.array(list(itertools.product([-1, 1], repeat=10)))
    p = np.mean(np.abs(signs @ ratios) >= abs(ratios.sum()) - 1e-12)
    assert result.p == pytest.approx(p, abs=0.02) and result.decision == "faster"
    assert result.difference == pytest.approx(np.exp(ratios.mean()) - 1)
    assert result.low < result.difference < result.high < 0
    assert stats.ttest_ind(*times.values()).pvalue > 0.5
    voids = compare.compare(a, b[1:], "time_to_target").voids
    assert "runs left out: of block 00 only one variant is here" in voids


@pytest.mark.parametrize("b, words", [
    ([3.2703, 3.2705, 3.2701], r"faster \(B takes 2.0% less time than A, p = \d"),
    ([3.2910, 3.2908, 3.2912], r"inconclusive \(B's mean 3.2910 is above the target 3.28: no time"),
    ([3.2810, 3.2750, 3.2780], r"faster \(")])
def test_time_to_target_takes_the_mean_below_it(make, b, words):
    a, b = make("a", [3.2702, 3.2704, 3.2706], [100.0, 100.1, 99.9]), make("b", b, [98.0, 98.1, 97.9])
    result = compare.compare(a, b, "time_to_target")
    assert re.match(words, result.verdict) and (result.p is None) == ("above" in words)
    if "above" in words:     # the other way round, too
        assert compare.compare(b, a, "time_to_target").verdict.startswith("inconclusive (A's mean 3.2910")


def test_too_few_or_equal_losses(make):
    for a, b, verdict in (([3.27], [3.26], "inconclusive (too few runs)"), ([3.27, 3.27], [3.26, 3.2601], "faster ("),
                          ([3.27, 3.27], [3.26, 3.26], "inconclusive (the runs do not differ at all)")):
        result = compare.compare(make("a", a), make("b", b), "final_loss")
        assert result.verdict.startswith(verdict) and "nan" not in compare.report(result)


# What makes a comparison void.

BASE = [dict(loss=3.2700, seed=0), dict(loss=3.2704, seed=1)]
TWEAK = [dict(loss=3.2600, seed=0, lr=0.003), dict(loss=3.2604, seed=1, lr=0.003)]


def both(**change) -> list[dict]:
    return [{**run, **change} for run in TWEAK]


def read(folder, **variants) -> list[list[runs.Run]]:
    return [[runs.read_log(write(folder / name / str(i), **run)) for i, run in enumerate(members)]
            for name, members in variants.items()]


@pytest.mark.parametrize("metric, b, words", [
    ("final_loss", TWEAK, None),
    ("final_loss", both(source="print('tweak')\n"), None),
    ("final_loss", both(target=3.0), None),
    ("final_loss", both(val_every=5, run_id="y"), None),
    ("final_loss", both(hardware="8 x NVIDIA A100"), "different hardware: A 8 x NVIDIA H100; B 8 x NVIDIA A100"),
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
     "runs left out: 2 has no validation loss at its last step, 20")])
def test_void(tmp_path, metric, b, words):
    result = compare.compare(*read(tmp_path, a=BASE, b=b), metric)
    if words is None:
        assert result.voids == [] and "void" not in result.verdict
        assert result.decision == "faster" if metric != "time_to_target" else "do not differ" in result.verdict
    else:
        assert any(text.startswith(words) for text in result.voids), result.voids
        assert result.decision == "inconclusive" and words.split(": ")[0] in result.verdict


def test_a_run_resumed_on_other_hardware_voids(tmp_path):
    (run,), _ = read(tmp_path, a=BASE[:1], b=[])
    resumed = dataclasses.replace(run, hardware="8 x NVIDIA H100 then 8 x NVIDIA A100", resumed=True)
    result = compare.compare([run], [resumed], "final_loss")
    assert "resumed on other ground" in result.verdict and "resumed, so primed more than once: 0" in result.warnings


def test_warnings_that_do_not_void(tmp_path):
    a, b = read(tmp_path, a=BASE, b=both(platform="Linux-5", batch_tokens=1024))
    write(tmp_path / "b" / "unlucky", loss=3.4, seed=2, lr=0.003, batch_tokens=1024)
    write(tmp_path / "b" / "another_rate", loss=3.4, seed=2, lr=0.004, batch_tokens=1024)
    write(tmp_path / "b" / "damaged", text="no log")
    result = compare.compare(a, b, "final_loss")
    assert result.decision == "faster"
    assert [text.split(":")[0] for text in result.warnings] == [
        "versions differ", "batch_tokens or stages differ, so equal steps are not equal tokens",
        "runs of the same setting lie beside these, not counted"]
    assert result.warnings[-1].endswith("not counted: unlucky")


@pytest.mark.parametrize("metric, hosts, words", [
    ("time_to_target", dict(A=["n1", "n1"], B=["n1", "n2"]), "blocks that span machines: 01 has n1, n2"),
    ("final_loss", dict(A=["n1", "n1"], B=["n1", "n2"]), None),
    ("time_to_target", dict(A=["n1", "n2"], B=["n1", "n2"]), "host differ: n1 | n2"),
    ("time_to_target", dict(A=[None, "n1"], B=["n1", None]), None)])
def test_hosts(tmp_path, metric, hosts, words):
    """Within a block they must be one, where times count; variants on two nodes call for a warning."""
    a, b = ([runs.read_log(write(tmp_path / f"{i:02}_{letter}_x", 3.27, 100 + i, seed=i, host=host))
             for i, host in enumerate(hosts[letter])] for letter in "AB")
    result = compare.compare(a, b, metric)
    found = [text for text in result.voids + result.warnings if not text.startswith("not in the logs")]
    assert (words in found) if words else not found
    assert bool(result.voids) == bool(words and words.startswith("blocks"))


# The command line.

@pytest.fixture
def experiment(tmp_path):
    """A folder as ab.py leaves it: A, B and C in 3 blocks, with a plan at alpha 0.02 of each comparison."""
    for block in range(3):
        for letter, lr, seconds in (("A", 0.002, 100), ("B", 0.003, 95), ("C", 0.004, 105)):
            write(tmp_path / f"{block:02}_{letter}_seed{block}", 3.27 + block / 1e3, seconds + block, seed=block, lr=lr)
    names = [f"{block:02}_{letter}_seed{block}" for block in range(3) for letter in "ABC"]
    (tmp_path / "plan.json").write_text(json.dumps(
        dict(metric="time_to_target", alpha=0.04, alpha_each=0.02, runs=names)))
    return tmp_path


@pytest.fixture
def main(monkeypatch, capsys):
    """Returns a function that runs compare.py on its arguments and gives what it printed, or its error."""
    def main(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            compare.main()
        printed = capsys.readouterr()
        return printed.out if stop.value.code == 0 else f"{stop.value.code} {printed.out}{printed.err}"
    return main


def test_an_experiment_by_its_plan(experiment, main):
    done = run_tool("compare.py", experiment)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == main(experiment)
    assert "change: lr 0.002 -> 0.003\n" in done.stdout and "in 3 blocks" in done.stdout
    assert re.findall("^metric: .*", done.stdout, re.M) == ["metric: time_to_target, alpha 0.02"] * 2
    assert re.findall("^difference, (.) - A: ([+-]).* .98% conf", done.stdout, re.M) == [("B", "-"), ("C", "+")]
    verdicts = re.findall("^verdict: .*", done.stdout, re.M)
    assert verdicts[0].startswith("verdict: faster (B takes 5") and verdicts[1].startswith("verdict: slower (C takes 5")


def test_another_choice_than_the_plans_voids(experiment, main):
    """One candidate alone may be compared; not by another metric or alpha, nor without all of its runs."""
    alone = [*experiment.glob("*_A_*"), "vs", *experiment.glob("*_C_*"), "--metric"]
    assert "verdict: slower (B takes 5" in main(*alone, "time_to_target", "--alpha", 0.02)
    for choice, words in ((["time_to_target", "--alpha", 0.05], "alpha chosen after looking: 0.05, where "),
                          (["final_loss", "--alpha", 0.02], "metric chosen after looking: final_loss, where ")):
        assert f"void: {words}{experiment}/plan.json" in main(*alone, *choice)
    fewer = [path for path in alone if "02_" not in str(path)]
    assert f"void: runs left out: {experiment}/plan.json has 02_A_seed2, 02_C_seed2, not here" in main(
        *fewer, "time_to_target", "--alpha", 0.02)


def test_at_a_step_of_all_runs(experiment, main):
    """Losses and seconds of step 10; without such a step, an error; and in an experiment, void."""
    a, b = ([*experiment.glob(f"*_{letter}_*")] for letter in "AB")
    out = main(*a, "vs", *b, "--metric", "final_loss", "--step", 10)
    assert re.search(r"^A loss +3 +8.0000 ", out, re.M) and re.search(r"^B seconds +3 +48.00 ", out, re.M)
    assert "void: step chosen after looking: 10, where" in out
    assert "or a --step that they logged" in main(*a, "vs", *b, "--metric", "final_loss", "--step", 11)


def test_logs_of_modded_nanogpt(tmp_path, main):
    """At one step of all runs; on other hardware; from a folder with a file that is no log, which is named."""
    their_runs(tmp_path / "a", several=theirs(3.28, 3.281, 3.282))
    their_runs(tmp_path / "b", several=theirs(3.26, 3.261, 3.262, source="b\n", facts=NAMED))
    (tmp_path / "b" / "requirements.txt").write_text("torch\n")
    out = main(tmp_path / "a", "vs", tmp_path / "b", "--metric", "final_loss", "--step", 20)
    assert re.search(r"^A loss +3 +3.2810 ", out[2:], re.M) and re.search(r"^B loss +3 +3.2610 ", out, re.M)
    assert "different hardware: A 8 x NVIDIA H100 80GB; B 4 x NVIDIA GH200 120GB" in out
    assert out.count("b/requirements.txt is no log of a run") == 1


def test_bad_input(experiment, main, tmp_path):
    a, b = experiment / "00_A_seed0", experiment / "00_B_seed0"
    unfinished = write(tmp_path / "other" / "killed", steps=9)
    (experiment / "plan.json").write_text("{")
    for arguments, words in (
            ([experiment], "plan.json is damaged"), ([a, "vs", b], "--metric: name the one that decides"),
            ([a, "vs"], "give A... vs B..."), ([a], "give A... vs B..."),
            ([a, "vs", tmp_path / "none", "--metric", "final_loss"], "none does not exist"),
            ([a, "vs", unfinished, "--metric", "final_loss"], "B has no finished run (given: killed)"),
            ([unfinished, "vs", unfinished, "--metric", "final_loss", "--alpha", "5"], "alpha 5.0: must lie between")):
        assert words in main(*arguments)
