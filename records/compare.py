#!/usr/bin/env python3
"""Is B faster than A? Compares the runs of a baseline, A, with those of a candidate, B, by one metric.

    python records/compare.py logs/base_* vs logs/tweak_* --metric final_loss     # run folders, or logs
    python records/compare.py runs/base vs runs/tweak --metric time_to_target     # all runs in two folders
    python records/compare.py logs/ab                # a folder of bench/ab.py: its plan.json names the rest

Metrics; name one before the first run starts, since the better of several is faster by chance more often:
    time_to_target  seconds of training, of sides whose mean final validation loss is at or below the target
    final_loss      final validation loss, after equal numbers of steps
    loss_at_time    final validation loss, of sides whose mean seconds of training agree within 2%

Two-sided Welch's t-test. Where each side has a run in the same blocks (folders such as 03_A_seed4 and 03_B_seed4, run
one after the other), times are compared by their ratio within the blocks, which a drifting machine does not touch.
Of a folder with several candidates, B, C and so on, each is compared with A, at its share of alpha.
Spread is the standard deviation. A 'void' line makes the verdict 'not decided'; a 'warning' does not.
'needed' is planning: run that many and test once. Testing after each run finds differences that are not there.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from logs import THEN, LogError, Run, read_log
from scipy import stats

METRICS = ("time_to_target", "final_loss", "loss_at_time")
POWER = 0.8                     # of the number of runs that is said to be needed
MOST_RUNS = 1000                # a side, beyond which a difference is said not to be decidable
EQUAL_TIME = 0.02               # relative difference of mean times that still counts as equal
MODDED_TARGET = 3.28            # of modded-nanogpt's tracks 1 and 3
# Fields of Config that may differ between the runs of a side: they change neither the result nor its time.
RUNS_OWN = {"seed", "prepare", "train_files", "val_files", "log_dir", "run_id", "resume", "val_every", "save_every",
            "metrics_every", "optimizer_metrics_every", "prime_steps", "collective_timeout"}


@dataclass(frozen=True)
class Side:
    """Final validation losses and seconds of training of the finished runs, in one order."""
    runs: list[str]
    losses: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Result:
    """What compare() found; None where there are too few runs for it, or a side misses the target."""
    metric: str
    alpha: float
    candidate: str              # letter of the side that is called B here
    a: Side
    b: Side
    change: str                 # what B has that A has not
    blocks: int | None          # whose ratios of seconds were tested; None: Welch's test of the sides
    difference: float | None    # B - A: nats or seconds; within blocks, the relative difference of the seconds
    low: float | None           # confidence interval of the difference, at 1 - alpha
    high: float | None
    p: float | None
    needed: str                 # runs that would decide, in words
    rules: list[str]            # of modded-nanogpt, for its logs
    warnings: list[str]
    voids: list[str]            # 'kind: values' of what makes the comparison void
    decision: str               # faster, slower or not decided
    reason: str

    @property
    def verdict(self) -> str:
        return f"{self.decision} ({self.reason})"


# Statistics: a sample is a list of numbers; one sample is compared with 0, of two the second with the first.

def mean_difference(samples: list[list[float]]) -> float:
    return fmean(samples[-1]) - (fmean(samples[0]) if len(samples) == 2 else 0)


def standard_error(spreads: list[float], sizes: list[int]) -> tuple[float, float]:
    """Returns (standard error, degrees of freedom) of the mean, or of the difference of means (Welch, 1947)."""
    variances = [spread**2 / n for spread, n in zip(spreads, sizes, strict=True)]
    freedom = sum(variances)**2 / sum(variance**2 / (n - 1) for variance, n in zip(variances, sizes, strict=True))
    return math.sqrt(sum(variances)), freedom


def t_test(samples: list[list[float]], alpha: float) -> tuple[float, float, float] | None:
    """Returns (low, high, p) of the mean difference; None with a single number, or with no spread to judge it by."""
    if min(map(len, samples)) < 2 or not any(map(stdev, samples)):
        return None
    error, freedom = standard_error([stdev(sample) for sample in samples], [len(sample) for sample in samples])
    difference, margin = mean_difference(samples), error * stats.t.isf(alpha / 2, freedom)
    return difference - margin, difference + margin, 2 * stats.t.sf(abs(difference) / error, freedom)


def power(n: int, difference: float, spreads: list[float], alpha: float) -> float:
    """Returns the chance that t_test, with n numbers a sample, finds `difference` at the given spreads."""
    error, freedom = standard_error(spreads, [n] * len(spreads))
    shift, critical = abs(difference) / error, stats.t.isf(alpha / 2, freedom)
    return stats.nct.sf(critical, freedom, shift) + stats.nct.cdf(-critical, freedom, shift)


def runs_needed(difference: float, spreads: list[float], alpha: float) -> int | None:
    """Returns the least n whose power is POWER, or None above MOST_RUNS."""
    n = 2 + bisect_left(range(2, MOST_RUNS + 1), POWER, key=lambda n: power(n, difference, spreads, alpha))
    return n if n <= MOST_RUNS else None


# What makes a comparison void, or calls for a word.

def names(items: list) -> str:
    items = [item.name if isinstance(item, Run) else str(item) for item in items]
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def block_and_side(name: str) -> tuple[str | None, str | None]:
    """Returns the number of the block and the letter of the side of a run folder such as 03_A_seed4, or None, None."""
    match = re.fullmatch(r"(\d+)_([A-Z])_.*", name)
    return match.groups() if match else (None, None)


def block_of(run: Run) -> tuple[Path, str] | None:
    """Returns the A/B folder and the number of the block, where the run lies in such a folder."""
    number = block_and_side(run.folder.name)[0] if run.path.name == "log.txt" else None
    return (run.folder.parent, number) if number else None


def setting(run: Run) -> dict:
    """Returns what the runs of a side have in common: {field of Config, source or num_steps: value as text}."""
    fields = {name: json.dumps(value) for name, value in run.config.items() if name not in RUNS_OWN}
    return {**fields, "num_steps": str(run.num_steps), "source": str(run.source_sha256)[:12]}


def changed(settings: list[dict]) -> str:
    """Returns the fields in which the settings differ with their values, in words."""
    fields = dict.fromkeys(name for fields in settings for name in fields)
    values = {name: list(dict.fromkeys(fields.get(name, "none") for fields in settings)) for name in fields}
    return "; ".join(f"{name} {' -> '.join(values[name])}" for name in fields if len(values[name]) > 1)


def read_plan(folder: Path) -> dict | None:
    """Returns what the folder's plan.json holds, where there is one.

    {metric, alpha: of one comparison, runs: names of the planned run folders, looks: numbers of blocks after which the
    plan may end early}
    """
    path = folder / "plan.json"
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return dict(metric=str(plan["metric"]), alpha=float(plan.get("alpha_each", plan["alpha"])),
                    runs=[str(run) for run in plan["runs"]], looks=[int(look) for look in plan.get("looks", [])])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LogError(f"{path} is damaged ({error!r}): it must hold metric, alpha and runs, the names of the planned "
                       "run folders") from None


def check_left_out(runs: list[Run], metric: str, alpha: float) -> tuple[list[str], list[str]]:
    """Returns (voids, warnings) about runs that are in a plan, or on the disk, and not among `runs`."""
    voids, warnings = [], []
    given = {run.path.resolve() for run in runs}
    for folder in sorted({run.folder.parent for run in runs if block_of(run)}):
        plan = read_plan(folder)
        if plan is None:
            continue
        given |= {(folder / name / "log.txt").resolve() for name in plan["runs"]}     # other sides are not 'others'
        present = {run.folder.name for run in runs if run.folder.parent == folder}
        sides = {block_and_side(name)[1] for name in present}
        planned = [name for name in plan["runs"] if block_and_side(name)[1] in {*sides, None}]
        missing = [name for name in planned if name not in present]
        blocks = list(dict.fromkeys(block_and_side(name)[0] for name in planned))
        look = next((look for look in plan["looks"] if missing == [
            name for name in planned if block_and_side(name)[0] in blocks[look:]]), None)
        if look and missing and not any((folder / name / "log.txt").exists() for name in missing):
            warnings.append(f"ended early: after {look} of {len(blocks)} blocks, a look in {folder / 'plan.json'}")
        elif missing:
            voids.append(f"runs left out: {folder / 'plan.json'} has {names(missing)}, not here")
        for what, value in (("metric", metric), ("alpha", alpha)):
            if plan[what] != value:
                voids.append(f"{what} chosen after looking: {value}, where {folder / 'plan.json'} has {plan[what]}")
    others = {path for run in runs for path in (
        run.folder.parent.glob("*/log.txt") if run.path.name == "log.txt" else run.folder.glob("*.txt"))}
    alike, settings = [], [setting(run) for run in runs]
    for path in sorted(others):
        if path.resolve() not in given:
            try:
                other = read_log(path)
            except LogError:     # another file beside the logs
                continue
            if setting(other) in settings:
                alike.append(other)
    if alike:
        warnings.append(f"beside these runs lie others of the same configuration, not counted: {names(alike)}")
    return voids, warnings


def check(sides: dict[str, list[Run]], metric: str, alpha: float) -> tuple[list[str], list[str]]:
    """Returns (voids, warnings) about the runs of the two sides, finished or not."""
    voids, warnings, unknown = [], [], []
    runs = [run for side in sides.values() for run in side]

    facts = {
        "trainer": lambda run: run.kind, "hardware": lambda run: run.hardware, "torch": lambda run: run.torch,
        "world size": lambda run: run.world_size, "training data (sha256)": lambda run: run.train_sha256,
        "validation data (sha256)": lambda run: run.val_sha256,
        "validation set (val_tokens)": lambda run: run.config.get("val_tokens")}
    if metric == "final_loss":
        facts["number of steps"] = lambda run: run.num_steps
    if metric == "time_to_target":
        facts["target"] = lambda run: run.config.get("target", MODDED_TARGET)
    for what, value in facts.items():
        values = {side: sorted({str(value(run)) for run in sides[side]} - {"None"}) for side in sides}
        if len(set().union(*values.values())) > 1:
            voids.append(f"different {what}: " + "; ".join(f"{side} {', '.join(values[side])}" for side in sides))
        if any(value(run) is None for run in runs):
            unknown.append(what)
    for side in sides:
        if difference := changed([setting(run) for run in sides[side]]):
            voids.append(f"{side} is not one configuration: {difference}")
        seeds = Counter((run.config["seed"], run.source_sha256) for run in sides[side] if "seed" in run.config)
        if repeated := sorted({seed for (seed, _), count in seeds.items() if count > 1}):
            voids.append(f"a seed repeated: {side} has seed {names(repeated)} more than once")
    paths = Counter(run.path.resolve() for run in runs)
    if twice := [path for path, count in paths.items() if count > 1]:
        voids.append(f"a run given twice: {names(twice)}")
    for run in runs:
        if not run.finished:
            last = max(run.losses["val"], default=None)
            voids.append(f"runs left out: {run.name} has no validation loss at its last step, {run.num_steps}" + (
                f" (that of step {last} would be a step chosen after looking)" if last else ""))
        mixed = (run.hardware, run.versions, run.source_sha256)
        if any(THEN in text for text in mixed if text):
            voids.append(f"resumed on other ground: {run.name} has {' | '.join(t for t in mixed if t and THEN in t)}")
    blocks = {}
    for run in runs:
        blocks.setdefault(block_of(run), []).append(run)
    for block, members in blocks.items():
        kinds, hosts = {f"{run.hardware}; {run.versions}" for run in members}, {run.host for run in members} - {None}
        for machines in (kinds, hosts):
            if block and len(machines) > 1 and metric != "final_loss":
                voids.append(f"blocks that span machines: {block[1]} has {' | '.join(sorted(machines))}")

    hosts = {run.host for run in runs} - {None}     # older logs do not name it
    if len(hosts) > 1 and metric != "final_loss":
        warnings.append(f"hosts differ: {' | '.join(sorted(hosts))}; nodes of one kind can differ in speed")
    versions = {run.versions for run in runs} - {None}
    if len(versions) > 1:
        warnings.append(f"versions differ: {' | '.join(sorted(versions))}")
    if resumed := [run for run in runs if run.resumed]:
        warnings.append(f"resumed, so primed more than once: {names(resumed)}")
    if dirty := [run for run in runs if (run.git or "").endswith("-dirty")]:
        warnings.append(f"files differed from their commit (git -dirty; the log's source counts): {names(dirty)}")
    if metric == "final_loss" and len({str(run.config.get("batch_tokens")) for run in runs}) > 1:
        warnings.append("batch_tokens differ, so equal steps are not equal tokens")
    if any("seed" not in run.config for run in runs):
        unknown.append("seeds")
    if unknown:
        warnings.append(f"not in the logs, so not checked: {', '.join(unknown)}")
    more_voids, more_warnings = check_left_out(runs, metric, alpha)
    return voids + more_voids, warnings + more_warnings


def modded_rules(sides: dict[str, Side], track: int | None) -> list[str]:
    """Returns, in words, whether each side meets modded-nanogpt's rule of the track for a record."""
    if track is None:
        return ["modded-nanogpt's rule is not applied: name the track with --modded_track 1 or 3"]
    lines = []
    for name, side in sides.items():
        if track == 3:
            value, rule = (MODDED_TARGET - fmean(side.losses)) * math.sqrt(len(side.losses)), "(3.28 - mean) * sqrt(n)"
            met, text = value >= 0.004, f"{rule} = {value:.4f}, to be 0.004 or more"
        elif len(side.losses) < 2 or not stdev(side.losses):
            met, text = False, "p < 0.01 that the mean is below 3.28 takes 2 or more runs that differ"
        else:
            p = stats.ttest_1samp(side.losses, MODDED_TARGET, alternative="less").pvalue
            met, text = p < 0.01, f"p = {p:.2g} that the mean is below 3.28, to be below 0.01"
        lines.append(f"modded-nanogpt's rule of track {track}, {name}: {'met' if met else 'not met'} ({text})")
    return lines


# The comparison.

def compare(a: list[Run], b: list[Run], metric: str, alpha: float = 0.05, modded_track: int | None = None,
            candidate: str = "B") -> Result:
    """Compares the runs of the baseline, a, with those of the candidate, b, by the one metric.

    `candidate` is the letter by which the result calls b.

    Raises LogError where a side has no finished run, or where what is asked does not fit the logs.
    """
    if metric not in METRICS:
        raise LogError(f"metric {metric!r}: must be one of {', '.join(METRICS)}")
    if not 0 < alpha < 1:
        raise LogError(f"alpha {alpha}: must lie between 0 and 1, such as 0.05")
    modded = [run for run in a + b if run.kind == "modded-nanogpt"]
    if modded_track and len(modded) < len(a + b):
        raise LogError(f"--modded_track {modded_track}: is for modded-nanogpt's logs alone, and not all of these are; "
                       "leave it out")
    if modded and metric == "time_to_target" and not modded_track:
        raise LogError(f"{modded[0].path}: modded-nanogpt's log names no target; give --modded_track 1 or 3, for 3.28")
    runs, sides = {"A": a, candidate: b}, {}
    for name in runs:
        finished = [run for run in runs[name] if run.finished]
        if not finished:
            raise LogError(f"side {name} has no finished run (given: {names(runs[name]) or 'none'}); give runs that "
                           "trained to their last step")
        sides[name] = Side([run.name for run in finished], [run.final[1] for run in finished],
                           [run.final[0] for run in finished])
    voids, warnings = check(runs, metric, alpha)

    # The samples that are compared, and what keeps them from being so.
    blocked, reason = None, ""
    if metric == "time_to_target":
        target = a[0].config.get("target", MODDED_TARGET)
        means = {name: fmean(side.losses) for name, side in sides.items()}
        if above := [f"{name}'s mean {mean:.4f} is above the target {target:g}" for name, mean in means.items()
                     if mean > target]:
            reason = f"{' and '.join(above)}: no time to the target, and no record"
        blocked = block_times([run for run in a if run.finished], [run for run in b if run.finished], voids)
        samples = [blocked] if blocked else [side.seconds for side in sides.values()]
    else:
        samples = [side.losses for side in sides.values()]
        times = [fmean(side.seconds) for side in sides.values()]
        if metric == "loss_at_time" and abs(times[1] / times[0] - 1) > EQUAL_TIME:
            voids.append(f"not equal times: A {times[0]:.2f} s, {candidate} {times[1]:.2f} s, more than "
                         f"{EQUAL_TIME:.0%} apart")

    difference = low = high = p = None
    if reason:
        needed = "no number of runs of this length, unless the mean comes down to the target"
    else:
        difference = mean_difference(samples)
        outcome = t_test(samples, alpha)
        if outcome:
            low, high, p = map(float, outcome)
        needed = words_needed(samples, difference, p, alpha, "blocks" if blocked else "a side")
        if blocked:     # the logarithms of ratios, as relative differences
            difference, low, high = (None if x is None else math.expm1(x) for x in (difference, low, high))

    decision = "not decided"
    if voids:
        reason = "void: " + "; ".join(dict.fromkeys(text.split(": ")[0] for text in voids))
    elif not reason and p is None:
        reason = ("too few runs" if min(map(len, samples)) < 2 else
                  "the numbers of a side do not differ at all, so there is no spread to judge by")
    elif not reason and p >= alpha:
        reason = f"p = {p:.2g}, not below {alpha:g}"
    elif not reason:
        decision = "faster" if difference < 0 else "slower"
        if metric == "time_to_target":
            relative = difference if blocked else difference / fmean(sides["A"].seconds)
            reason = f"{candidate} takes {abs(relative):.1%} {'less' if difference < 0 else 'more'} time than A"
        else:
            reason = (f"{candidate}'s loss is {abs(difference):.4f} {'lower' if difference < 0 else 'higher'} than "
                      f"A's at equal {'steps' if metric == 'final_loss' else 'time'}")
        reason += f", p = {p:.2g}"
    return Result(
        metric=metric, alpha=alpha, candidate=candidate, a=sides["A"], b=sides[candidate], difference=difference,
        low=low, high=high, p=p,
        change=changed([setting(a[0]), setting(b[0])]) or "none: both sides are one configuration",
        blocks=len(blocked) if blocked else None, needed=needed,
        rules=modded_rules(sides, modded_track) if len(modded) == len(a + b) else [],
        warnings=warnings, voids=voids, decision=decision, reason=reason)


def block_times(a: list[Run], b: list[Run], voids: list[str]) -> list[float] | None:
    """Returns ln(B's seconds / A's) of each block; None where not all runs are in blocks, or no block has both sides.

    Adds to `voids` the blocks that have one side only.
    """
    blocks = [{}, {}]
    for side, runs in zip(blocks, (a, b), strict=True):
        for run in runs:
            side.setdefault(block_of(run), []).append(math.log(run.final[0]))
    both = sorted(blocks[0].keys() & blocks[1].keys() - {None})
    if None in blocks[0] or None in blocks[1] or not both:
        return None
    if single := sorted(blocks[0].keys() ^ blocks[1].keys()):
        voids.append(f"runs left out: of block {names([number for _, number in single])} only one side is here")
    return [fmean(blocks[1][block]) - fmean(blocks[0][block]) for block in both]


def words_needed(samples: list[list[float]], difference: float, p: float | None, alpha: float, unit: str) -> str:
    here = min(map(len, samples))
    if here < 2:
        return f"2 or more {unit} are needed, to tell a difference from chance"
    if p is None:
        return "unknown: there is no spread to reckon with"
    if p < alpha:
        return "none: p is below alpha"
    n = runs_needed(difference, [stdev(sample) for sample in samples], alpha)
    if n is None:
        return f"no reasonable number decides a difference this small (more than {MOST_RUNS:,} {unit})"
    more = max(1, n - here)
    return f"about {more} more {unit}, for a power of {POWER:.0%} at this difference and spread"


def report(result: Result) -> str:
    """Returns the result as the text that is printed."""
    lines = [f"metric: {result.metric}, alpha {result.alpha:g}", f"change: {result.change}",
             f"{'':12}{'runs':>5}{'mean':>12}{'spread':>10}{'min':>12}{'max':>12}"]
    for name, side in (("A", result.a), (result.candidate, result.b)):
        for what, values, digits in (("loss", side.losses, 4), ("seconds", side.seconds, 2)):
            spread = f"{stdev(values):.{digits}f}" if len(values) > 1 else "-"
            lines.append(f"{name + ' ' + what:12}{len(values):5}{fmean(values):12.{digits}f}{spread:>10}"
                         f"{min(values):12.{digits}f}{max(values):12.{digits}f}")
    if result.difference is not None:
        style, unit = "+.4f", ""
        if result.metric == "time_to_target":
            style, unit = ("+.2%", "") if result.blocks else ("+.2f", " s")
        interval = "" if result.low is None else (
            f" ({100 * (1 - result.alpha):.4g}% confidence interval {result.low:{style}} to {result.high:{style}})")
        lines.append(f"difference, {result.candidate} - A: {result.difference:{style}}{unit}{interval}")
    if result.p is not None:
        test = f"t-test of the ratios in {result.blocks} blocks" if result.blocks else "Welch's t-test"
        lines.append(f"p: {result.p:.2g} ({test}, two-sided)")
    lines += [f"needed: {result.needed}", *result.rules, *(f"warning: {text}" for text in result.warnings),
              *(f"void: {text}" for text in result.voids), f"verdict: {result.verdict}"]
    return "\n".join(lines)


def read_runs(paths: list[str]) -> list[Run]:
    """Reads logs, run folders and folders of either: of a folder, all log.txt below it, else the .txt files in it."""
    logs = []
    for path in map(Path, paths):
        found = sorted(path.rglob("log.txt")) or sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise LogError(f"{path} holds no log of a run; give a run folder, a log, or a folder of these")
        logs += found
    return [read_log(path) for path in logs]


def read_sides(folder: Path, plan: dict) -> dict[str, list[Run]]:
    """Reads the runs of an A/B folder: {letter of a side in the plan, A first: its runs}."""
    sides = {side: [] for side in sorted({"A", "B", *(block_and_side(name)[1] for name in plan["runs"])} - {None})}
    for log in sorted(folder.glob("*/log.txt")):
        if (side := block_and_side(log.parent.name)[1]) in sides:
            sides[side].append(read_log(log))
    return sides


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s A... vs B... --metric METRIC [options], or %(prog)s A/B-FOLDER")
    parser.add_argument("paths", nargs="+", metavar="A... vs B...", help="runs of the two sides, or one A/B folder")
    parser.add_argument("--metric", choices=METRICS, help="what decides (needed, but for an A/B folder's plan)")
    parser.add_argument("--alpha", type=float, help="chance of a wrong 'faster' or 'slower' that is taken (0.05)")
    parser.add_argument("--modded_track", type=int, choices=(1, 3), help="of modded-nanogpt's logs: whose rule applies")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    try:
        if "vs" in args.paths:
            middle = args.paths.index("vs")
            plan, sides = {}, dict(A=read_runs(args.paths[:middle]), B=read_runs(args.paths[middle + 1:]))
            if not all(sides.values()):
                parser.error("vs: name runs on both sides of it")
        else:
            plan = read_plan(Path(args.paths[0])) if len(args.paths) == 1 else None
            if plan is None:
                parser.error(f"{' '.join(args.paths)}: no 'vs', and not one folder with a plan.json; give A... vs B...")
            sides = read_sides(Path(args.paths[0]), plan)
        metric = args.metric or plan.get("metric")
        if not metric:
            parser.error(f"--metric: name the one that decides, {', '.join(METRICS)}")
        alpha = plan.get("alpha", 0.05) if args.alpha is None else args.alpha
    except LogError as error:
        sys.exit(f"compare.py: {error}")
    results, errors = [], []
    for candidate, runs in list(sides.items())[1:]:
        try:
            results.append(compare(sides["A"], runs, metric, alpha, args.modded_track, candidate))
        except LogError as error:     # such as no finished run, which the other candidates may have
            errors.append(f"compare.py: {error}")
    if args.json and results:
        found = [{**dataclasses.asdict(result), "verdict": result.verdict} for result in results]
        print(json.dumps(found if len(sides) > 2 else found[0], indent=1))
    elif results:
        print("\n\n".join(map(report, results)))
    if errors:
        sys.exit("\n".join(errors))


if __name__ == "__main__":
    main()
