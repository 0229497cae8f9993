#!/usr/bin/env python3
"""Is B faster than A? Compares runs of a candidate, B, with those of a baseline, A, by one metric.

    python tools/compare.py logs/tweak                                            # an experiment of tools/ab.py
    python tools/compare.py logs/base_* vs logs/tweak_* --metric final_loss       # any runs: folders or logs
    python tools/compare.py records/tiny/2026-11-23_normuon_840                   # a record, by its plan
    python tools/compare.py theirs/*.txt vs ours/ --metric final_loss --step 3250 # at one step of all runs

Metrics. Name one before the first run: the better of several is faster by chance more often.
    time_to_target  seconds of training, where both mean final validation losses are at or below the target
    final_loss      final validation loss after equal numbers of steps
    loss_at_time    final validation loss, where the mean seconds of training agree within 2%

The test is Welch's t-test, two-sided. Where both variants ran in the same blocks, as ab.py runs them, times are
compared by their ratio within each block, which a drift of the machine does not touch. With several candidates, each
is compared with A at its share of alpha. A 'void' line makes the verdict 'inconclusive'; a 'warning' does not.
'needed' is for planning: run that many, then test once. Testing after every run finds differences that are not there.
"""

import argparse
import dataclasses
import json
import math
import sys
import warnings as python_warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from runs import THEN, LogError, Run, batch_factors, changed, find_runs, printable, setting
from scipy import stats

METRICS = ("time_to_target", "final_loss", "loss_at_time")
POWER = 0.8                     # of the number of runs that is said to be needed
MOST_RUNS = 1000                # beyond which a difference is said to be too small to find
EQUAL_TIME = 0.02               # relative difference of mean times that still counts as equal


@dataclass(frozen=True)
class Result:
    """What compare() found."""
    metric: str
    alpha: float
    candidate: str              # letter of the variant that is compared with A
    finished: dict              # {letter: its finished runs}
    change: str                 # fields in which it differs from A, in words
    blocks: int | None          # whose ratios of seconds were tested; None: Welch's test of two samples
    difference: float | None    # candidate - A, in nats or seconds, in blocks relative; None: target not reached
    low: float | None           # confidence interval of the difference at 1 - alpha; None: too few runs
    high: float | None
    p: float | None
    needed: str                 # runs that would decide, in words
    warnings: list[str]
    voids: list[str]            # 'kind: values' of what makes the comparison void
    decision: str               # faster, slower or inconclusive
    reason: str

    @property
    def verdict(self) -> str:
        return f"{self.decision} ({self.reason})"


# Statistics.

def t_test(a: list[float] | None, b: list[float], alpha: float) -> tuple[float, float, float] | None:
    """Returns (low, high, p) of the mean of b less that of a, or where a is None, less 0; None where b or a has one
    number, or no variance to judge by."""
    samples = [b] if a is None else [a, b]
    if min(map(len, samples)) < 2 or not any(map(stdev, samples)):
        return None
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")      # of a sample of equal numbers
        test = stats.ttest_1samp(b, 0) if a is None else stats.ttest_ind(b, a, equal_var=False)
    low, high = test.confidence_interval(1 - alpha)
    return float(low), float(high), float(test.pvalue)


def words_needed(samples: list[list[float]], difference: float, p: float | None, alpha: float, unit: str) -> str:
    """Returns how many more runs would find this difference, if it and the stds are what they seem, in words."""
    here = min(map(len, samples))
    if here < 2:
        return f"2 or more {unit}, to tell a difference from chance"
    if p is None:
        return "unknown: the runs do not differ, so there is no std to judge by"
    if p < alpha:
        return "none: p is below alpha"
    # The power of t_test for n numbers a sample: noncentral t, with the degrees of freedom of Welch (1947).
    n = np.arange(2, MOST_RUNS + 1)
    variances = np.array([[stdev(sample)**2] for sample in samples]) / n
    degrees = variances.sum(0)**2 / (variances**2 / (n - 1)).sum(0)
    shift, critical = abs(difference) / np.sqrt(variances.sum(0)), stats.t.isf(alpha / 2, degrees)
    enough = n[stats.nct.sf(critical, degrees, shift) + stats.nct.cdf(-critical, degrees, shift) >= POWER]
    if not len(enough):
        return f"more than {MOST_RUNS:,} {unit}: the difference is too small to find"
    return f"about {max(1, enough[0] - here)} more {unit}, for a power of {POWER:.0%} at this difference and std"


# What makes a comparison void, or calls for a word.

def names(items: list) -> str:
    texts = [item.name if isinstance(item, Run) else str(item) for item in items]
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def read_plan(folder: Path) -> dict | None:
    """Returns what compare needs of the folder's plan.json; None where there is none; raises LogError.

    {metric, alpha: of one comparison, runs: names of the planned runs}
    """
    path = folder / "plan.json"
    if not path.exists():
        return None
    try:
        plan = json.loads(printable(path.read_text(encoding="utf-8")))
        return dict(metric=str(plan["metric"]), alpha=float(plan.get("alpha_each", plan["alpha"])),
                    runs=[str(run) for run in plan["runs"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LogError(f"{path} is damaged ({error!r}): it must hold metric, alpha and runs, the names of the planned "
                       "runs") from None


def check_folder(folder: Path, runs: list[Run], metric: str, alpha: float) -> tuple[list[str], list[str]]:
    """Returns (voids, warnings) about what these runs' folder holds beside them: a plan, and runs of their settings."""
    plan, voids, given = read_plan(folder), [], {run.name for run in runs}
    if plan:
        letters = {run.side for run in runs}
        missing = [name for name in plan["runs"] if name not in given and not letters.isdisjoint(name.split("_"))]
        if missing:
            voids.append(f"runs left out: {folder}/plan.json has {names(missing)}, not here")
        for what, value in (("metric", metric), ("alpha", alpha)):
            if plan[what] != value:
                voids.append(f"{what} chosen after looking: {value}, where {folder}/plan.json has {plan[what]}")
        if any(run.num_steps != run.config["num_steps"] for run in runs):
            voids.append(f"step chosen after looking: {runs[0].num_steps}, where {folder}/plan.json has the last")
        given.update(plan["runs"])
    logs = [folder] if (folder / "runs.json").exists() else [*folder.glob("*/log.txt"), *folder.glob("*.txt")]
    try:
        beside = [run for run in find_runs(logs)[0] if run.name not in given and setting(run) in map(setting, runs)]
    except LogError:
        beside = []
    return voids, [f"runs of the same setting lie beside these, not counted: {names(beside)}"] if beside else []


def check(variants: dict[str, list[Run]], metric: str) -> tuple[list[str], list[str]]:
    """Returns (voids, warnings) about the runs of a comparison, finished or not."""
    voids, warnings, unknown = [], [], []
    runs = [run for members in variants.values() for run in members]
    facts = {
        "hardware": lambda run: run.hardware,
        "torch": lambda run: run.torch,
        "training data (sha256)": lambda run: run.train_sha256,
        "validation data (sha256)": lambda run: run.val_sha256,
        "validation set (val_tokens)": lambda run: run.config.get("val_tokens")}
    if metric == "final_loss":
        facts["number of steps"] = lambda run: run.num_steps
    if metric == "time_to_target":
        facts["target"] = lambda run: run.config.get("target")
    for what, value in facts.items():
        values = {letter: sorted({str(value(run)) for run in variants[letter]} - {"None"}) for letter in variants}
        if len(set().union(*values.values())) > 1:
            each = "; ".join(f"{letter} {', '.join(values[letter])}" for letter in variants)
            voids.append(f"different {what}: {each}")
        if any(value(run) is None for run in runs):
            unknown.append(what)
    if any(run.source_sha256 is None for run in runs):
        unknown.append("source")

    for letter, members in variants.items():
        if difference := changed([setting(run) for run in members]):
            voids.append(f"{letter} is not one configuration: {difference}")
        seeds = Counter(run.config.get("seed", run.name) for run in members)
        if repeated := sorted(seed for seed, count in seeds.items() if count > 1):
            voids.append(f"a seed repeated: {letter} has seed {names(repeated)} more than once")
    for run in runs:
        if not run.finished:
            voids.append(f"runs left out: {run.name} has no validation loss at its last step, {run.num_steps}")
        if THEN in f"{run.hardware}{run.versions}{run.source_sha256}":
            voids.append(f"resumed on other ground: {run.name}: {run.hardware}; {run.versions}; {run.source_sha256}")

    for what in ("host", "versions"):
        values = sorted({getattr(run, what) for run in runs} - {None})      # older logs name no host
        if len(values) > 1 and (what == "versions" or metric != "final_loss"):
            warnings.append(f"{what} differ: {' | '.join(values)}")
    if resumed := [run for run in runs if run.resumed]:
        warnings.append(f"resumed, so primed more than once: {names(resumed)}")
    batches = {(run.config.get("batch_tokens"), *batch_factors(run.config)) for run in runs}
    if metric == "final_loss" and len(batches) > 1:
        warnings.append("batch_tokens or stages differ, so equal steps are not equal tokens")
    if unknown:
        warnings.append(f"not in the logs, so not checked: {', '.join(unknown)}")
    return voids, warnings


# The comparison.

def block_ratios(a: list[Run], b: list[Run], voids: list[str]) -> list[float] | None:
    """Returns ln(B's seconds / A's) of each block; None where the runs are not in blocks of the same experiment.

    Adds to `voids` where a block has one variant only, or ran on several machines.
    """
    blocks = {}
    for run in a + b:
        blocks.setdefault((run.folder, run.block), []).append(run)
    ratios, single = [], []
    for block, members in blocks.items():
        times = [[math.log(run.final[0]) for run in members if run in runs] for runs in (a, b)]
        if all(times):
            ratios.append(fmean(times[1]) - fmean(times[0]))
        else:
            single.append(block[1])
    if not ratios or any(run.block is None for run in a + b):
        return None
    if single:
        voids.append(f"runs left out: of block {names(sorted(single))} only one variant is here")
    for (_, block), members in blocks.items():
        hosts = {run.host for run in members} - {None}
        if len(hosts) > 1:
            voids.append(f"blocks that span machines: {block} has {', '.join(sorted(hosts))}")
    return ratios


def compare(a: list[Run], b: list[Run], metric: str, alpha: float = 0.05, candidate: str = "B") -> Result:
    """Compares the runs b, which the result calls `candidate`, with the runs a, by the one metric.

    Raises LogError where a variant has no finished run, or where what is asked does not fit the logs.
    """
    if metric not in METRICS:
        raise LogError(f"metric {metric!r}: must be one of {', '.join(METRICS)}")
    if not 0 < alpha < 1:
        raise LogError(f"alpha {alpha}: must lie between 0 and 1, such as 0.05")
    variants = {"A": a, candidate: b}
    finished = {letter: [run for run in runs if run.finished] for letter, runs in variants.items()}
    for letter, runs in finished.items():
        if not runs:
            raise LogError(f"{letter} has no finished run (given: {names(variants[letter]) or 'none'}); give runs that "
                           "trained to their last step, or a --step that they logged")
    voids, warnings = check(variants, metric)
    for folder in sorted({run.folder for run in a + b}):
        more_voids, more_warnings = check_folder(
            folder, [run for run in a + b if run.folder == folder], metric, alpha)
        voids, warnings = voids + more_voids, warnings + more_warnings

    # What is compared: two samples, or the ratios in blocks.
    seconds_a, seconds_b = ([run.final[0] for run in runs] for runs in finished.values())
    losses_a, losses_b = ([run.final[1] for run in runs] for runs in finished.values())
    first, second, ratios, reason = losses_a, losses_b, None, ""
    if metric == "time_to_target":
        target = a[0].config["target"]
        above = [f"{letter}'s mean {fmean(losses):.4f} is above the target {target:g}"
                 for letter, losses in (("A", losses_a), (candidate, losses_b)) if not fmean(losses) <= target]
        reason = f"{' and '.join(above)}: no time to the target" if above else ""
        ratios = block_ratios(*finished.values(), voids)
        first, second = (None, ratios) if ratios else (seconds_a, seconds_b)
    if metric == "loss_at_time" and abs(fmean(seconds_b) / fmean(seconds_a) - 1) > EQUAL_TIME:
        voids.append(f"not equal times: A {fmean(seconds_a):.2f} s, {candidate} {fmean(seconds_b):.2f} s, more than "
                     f"{EQUAL_TIME:.0%} apart")

    difference = low = high = p = None
    needed = "no number of runs of this length, unless the mean comes down to the target"
    if not reason:
        difference = fmean(second) - (fmean(first) if first else 0)
        low, high, p = t_test(first, second, alpha) or (None, None, None)
        samples = [first, second] if first else [second]
        needed = words_needed(samples, difference, p, alpha, "blocks" if ratios else "runs of each")
        if ratios:      # logarithms of ratios become relative differences
            difference, low, high = (None if x is None else math.expm1(x) for x in (difference, low, high))

    decision = "inconclusive"
    if voids:
        reason = "void: " + "; ".join(dict.fromkeys(text.split(": ")[0] for text in voids))
    elif not reason and p is None:
        reason = "too few runs" if min(map(len, samples)) < 2 else "the runs do not differ at all"
    elif not reason and not p < alpha:
        reason = f"p = {p:.2g}, not below {alpha:g}"
    elif not reason:
        decision = "faster" if difference < 0 else "slower"
        relative = difference if ratios else difference / fmean(seconds_a)
        lower, less = ("lower", "less") if difference < 0 else ("higher", "more")
        reason = f"{candidate} takes {abs(relative):.1%} {less} time than A, p = {p:.2g}"
        if metric != "time_to_target":
            equal = "steps" if metric == "final_loss" else "time"
            reason = f"{candidate}'s loss is {abs(difference):.4f} {lower} than A's at equal {equal}, p = {p:.2g}"
    change = changed([setting(a[0]), setting(b[0])]) or "none: the same configuration"
    return Result(metric, alpha, candidate, finished, change, len(ratios) if ratios else None, difference, low, high, p,
                  needed, warnings, voids, decision, reason)


def report(result: Result) -> str:
    """Returns the result as the text that is printed."""
    lines = [f"metric: {result.metric}, alpha {result.alpha:g}", f"change: {result.change}",
             f"{'':12}{'runs':>5}{'mean':>12}{'std':>10}{'min':>12}{'max':>12}"]
    for letter, runs in result.finished.items():
        for column, what, digits in ((1, "loss", 4), (0, "seconds", 2)):
            values = [run.final[column] for run in runs]
            std = f"{stdev(values):.{digits}f}" if len(values) > 1 else "-"
            lines.append(f"{letter + ' ' + what:12}{len(values):5}{fmean(values):12.{digits}f}{std:>10}"
                         f"{min(values):12.{digits}f}{max(values):12.{digits}f}")
    if result.difference is not None:
        style, unit = "+.4f", ""
        if result.metric == "time_to_target":
            style, unit = ("+.2%", "") if result.blocks else ("+.2f", " s")
        interval = f"{100 * (1 - result.alpha):.4g}% confidence interval"
        shown = "" if result.low is None else f" ({interval} {result.low:{style}} to {result.high:{style}})"
        lines.append(f"difference, {result.candidate} - A: {result.difference:{style}}{unit}{shown}")
    if result.p is not None:
        test = f"t-test of the ratios in {result.blocks} blocks" if result.blocks else "Welch's t-test"
        lines.append(f"p: {result.p:.2g} ({test}, two-sided)")
    return "\n".join([*lines, f"needed: {result.needed}",
                      *(f"warning: {text}" for text in result.warnings), *(f"void: {text}" for text in result.voids),
                      f"verdict: {result.verdict}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s A... vs B... --metric METRIC [options], or %(prog)s EXPERIMENT")
    parser.add_argument("paths", nargs="+", metavar="A... vs B...", help="runs of both, or the folder of an experiment")
    parser.add_argument("--metric", choices=METRICS, help="what decides (an experiment's plan names it)")
    parser.add_argument("--step", type=int, help="compare all runs at this step, not at the last of each")
    parser.add_argument("--alpha", type=float, help="accepted chance of a wrong 'faster' or 'slower' (0.05)")
    args = parser.parse_args()
    try:
        plan = {} if len(args.paths) > 1 else read_plan(Path(args.paths[0]))
        if plan:
            runs, bad = find_runs(args.paths)
            variants = {letter: [run for run in runs if run.side == letter]
                        for letter in sorted({"A", *(run.side for run in runs if run.side)})}
        elif "vs" in args.paths[1:-1]:
            middle = args.paths.index("vs")
            (a, bad), (b, more) = find_runs(args.paths[:middle]), find_runs(args.paths[middle + 1:])
            variants, bad = dict(A=a, B=b), bad + more
        else:
            parser.error(f"{printable(' '.join(args.paths))}: give A... vs B..., or one folder with a plan.json")
    except LogError as error:
        sys.exit(f"compare.py: {error}")
    metric, alpha, failed = args.metric or plan.get("metric"), args.alpha or plan.get("alpha", 0.05), False
    if not metric:
        parser.error(f"--metric: name the one that decides, {', '.join(METRICS)}")
    if args.step is not None:
        variants = {letter: [dataclasses.replace(run, num_steps=args.step) for run in runs]
                    for letter, runs in variants.items()}
    for candidate, runs in list(variants.items())[1:]:
        try:
            print(report(compare(variants["A"], runs, metric, alpha, candidate)), end="\n\n")
        except LogError as error:     # such as no finished run, which other candidates may have
            print(f"compare.py: {error}", file=sys.stderr)
            failed = True
    for text in bad:
        print(f"compare.py: left out, and so not counted: {text}", file=sys.stderr)
    sys.exit(1 if failed or bad else 0)


if __name__ == "__main__":
    main()
