#!/usr/bin/env python3
"""Writes the tables of README.md, docs/ and records/ from the runs that records keep.

    python tools/leaderboard.py             # writes every table anew
    python tools/leaderboard.py --check     # writes nothing; exits with 1 and names each table that is out of date

A table stands between a marker, alone on its line, and the line <!-- end -->:
    <!-- leaderboard TRACK [ROWS] -->     recipes with a place, by time within their hardware; ROWS: the first, in short
    <!-- record RECORD [FIELD ... show FIELD ...] -->     variants of a record; with FIELDs of Config, only the one of
                                          lowest loss for each of their values, with the fields to show

A recipe is a source and its Config, the seed aside, with a name in its record; one of an experiment on anything but
time_to_target does not count. It holds a place with 5 or more finished
runs of different seeds on one kind of machine, on the track's data and target, whose mean final loss is below the
target at p < 0.01 (one-sided t-test). Its time is the mean training time of runs whose length was fixed before they
started. "time / AdamW's" is measured in the same blocks of one experiment, at the same dtype, where the mean loss of
AdamW is at or below the target as well; numbers after ± are standard deviations.
"""

import argparse
import os
import re
import sys
from math import exp
from pathlib import Path
from statistics import fmean, stdev

from compare import block_ratios, compare, read_plan
from runs import ROOT, THEN, LogError, Run, changed, group, read_record, setting
from scipy import stats

from train_gpt import TRACKS, make_config

END = "<!-- end -->"
TO_WRITE = "(to write:"         # what keep.py leaves to the author of a record
FEWEST_RUNS, ALPHA = 5, 0.01    # of a recipe with a place
LONGEST_CHANGE = 100            # characters; a longer one is only linked
TABLE = re.compile(rf"^<!-- (leaderboard|record)((?: [\w./-]+)+) -->\n(.*?)^{END}$", re.MULTILINE | re.DOTALL)


# Figures of a recipe, which is a list of runs of one setting.

def plus_minus(values: list[float], digits: int) -> str:
    std = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{std}" if values else "-"


def finals(runs: list[Run], column: int) -> list[float]:
    """Returns the seconds (column 0) or validation losses (1) of the finished runs."""
    return [run.final[column] for run in runs if run.finished]


def title(runs: list[Run]) -> str:
    return runs[0].recipe or runs[0].side or runs[0].name


def has_place(runs: list[Run]) -> bool:
    track, losses = make_config(dict(track=runs[0].config["track"])), finals(runs, 1)
    machines = {f"{run.hardware}{run.source_sha256}" for run in runs}
    for run in runs:
        same = all(run.config.get(name) == getattr(track, name) for name in ("target", "val_tokens"))
        if not same or run.summary.get("data_comparable") is False:
            return False
    if not len(losses) == len(runs) == len({run.config["seed"] for run in runs}) >= FEWEST_RUNS:
        return False
    below = stats.ttest_1samp(losses, track.target, alternative="less").pvalue
    return len(machines) == 1 and THEN not in machines.pop() and below < ALPHA


def ratio(runs: list[Run], baseline: list[Run]) -> float | None:
    """Returns the geometric mean of the ratios of these runs' times to the baseline's in the blocks of an experiment;
    None where they share no block, or their dtypes differ."""
    if runs[0].config.get("dtype") != baseline[0].config.get("dtype"):
        return None
    ratios = block_ratios([run for run in baseline if run.finished], [run for run in runs if run.finished], [])
    return exp(fmean(ratios)) if ratios else None


def ratio_to_adamw(runs: list[Run], record: list[list[Run]]) -> float | None:
    for other in record:
        losses = finals(other, 1)
        if other[0].config.get("matrix_optimizer") == "adamw" and losses and fmean(losses) <= other[0].config["target"]:
            return ratio(runs, other)
    return None


# Tables, as lines of Markdown.

def table(rows: list[dict]) -> list[str]:
    heads = list(rows[0])
    cells = [[" ".join(str(cell).split()).replace("|", "/") for cell in row.values()] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *cells]]


def change_of(runs: list[Run], first: list[Run], link: str) -> str:
    """Returns what the runs have that the first variant has not, with a link to the diff where it says more."""
    if runs is first:
        return "-"
    words = changed([{**setting(variant[0]), "source": ""} for variant in (first, runs)]).replace('"', "")
    if len(words) <= LONGEST_CHANGE and runs[0].source_sha256 == first[0].source_sha256:
        return words
    return f"[diff]({link}/change.diff)"


def leaderboard(root: Path, here: Path, track: str, most: str = "") -> list[str]:
    if track not in TRACKS:
        raise LogError(f"leaderboard {track}: is no track; name one of {', '.join(TRACKS)}")
    best = {}
    for folder in sorted(path.parent for path in (root / "records" / track).glob("*/runs.json")):
        plan, record, link = read_plan(folder), group(read_record(folder)), os.path.relpath(folder, here)
        if plan and plan["metric"] != "time_to_target":
            continue
        for runs in [runs for runs in record if runs[0].recipe and has_place(runs)]:
            to_adamw = ratio_to_adamw(runs, record)
            row = {
                "recipe": f"[{title(runs)}]({link})", "seconds": plus_minus(finals(runs, 0), 1),
                "time / AdamW's": f"{to_adamw:.2f}" if to_adamw else "-", "steps": runs[0].num_steps,
                "loss": plus_minus(finals(runs, 1), 4), "n": len(runs), "change": change_of(runs, record[0], link),
                "hardware": runs[0].hardware, "date": folder.name[:10]}
            # One row a recipe: the newest record counts, of those that measured it beside AdamW if there are such.
            rank = (to_adamw is not None, folder.name)
            key = (title(runs), runs[0].hardware)
            if key not in best or best[key][0] <= rank:
                best[key] = (rank, fmean(finals(runs, 0)), row)
    rows = [row for _, _, row in sorted(best.values(), key=lambda entry: (entry[2]["hardware"], entry[1]))]
    if most:
        rows = [{name: row[name] for name in list(row)[:6]} for row in rows[:int(most)]]
    return table(rows) if rows else [f"No recipe holds a place on {track} yet."]


def record(root: Path, here: Path, name: str, *words: str) -> list[str]:
    folder, fields = root / "records" / name, [word for word in words if word != "show"]
    variants, plan, rows = group(read_record(folder)), read_plan(folder), []
    if plan:
        variants.sort(key=lambda runs: runs[0].side)
    first, shown = variants[0], variants
    if fields:
        keys = fields[:words.index("show")] if "show" in words else fields
        values = {}
        for runs in variants:
            values.setdefault(tuple(runs[0].config.get(key) for key in keys), []).append(runs)
        shown = [min(tried, key=lambda runs: fmean(finals(runs, 1) or [99])) for _, tried in sorted(values.items())]
    for runs in shown:
        config, done = runs[0].config, finals(runs, 1)
        stopped = f" and {len(runs) - len(done)} stopped" if len(done) < len(runs) else ""
        letter = f"{runs[0].side}: " if plan and runs[0].recipe else ""
        row = {} if fields else {"variant": letter + title(runs)}
        if not fields and not (plan and runs[0].recipe):
            row["change"] = change_of(runs, first, os.path.relpath(folder, here))
        row.update({field: config.get(field) for field in fields})
        row.update(n=f"{len(done)}{stopped}", steps=runs[0].num_steps, loss=plus_minus(done, 4),
                   seconds=plus_minus(finals(runs, 0), 1))
        if plan:
            times = ratio(runs, first)
            row["time / A's"] = f"{times:.2f}" if times else "-"
            verdict = "-"
            if runs is not first and done and finals(first, 1):
                verdict = compare(first, runs, plan["metric"], plan["alpha"], runs[0].side).verdict
            row[f"against A, by {plan['metric']}"] = verdict
        rows.append(row)
    return table(rows)


# Files.

def rewrite(root: Path, path: Path) -> str:
    """Returns the text of the file with its tables made anew; raises LogError where a marker is wrong."""
    def make(match: re.Match) -> str:
        try:
            lines = dict(leaderboard=leaderboard, record=record)[match[1]](root, path.parent, *match[2].split())
        except (TypeError, ValueError) as error:
            raise LogError(f"{path}: <!-- {match[1]}{match[2]} -->: {error}; --help shows the markers") from None
        return "\n".join([f"<!-- {match[1]}{match[2]} -->", *lines, END])

    text = path.read_text(encoding="utf-8")
    left = re.search(r"^<!-- (leaderboard|record|end)\b.*", TABLE.sub("", text), re.MULTILINE)
    if left:
        raise LogError(f"{path}: {left[0]} stands alone; a marker, its table and {END} belong together")
    return TABLE.sub(make, text)


def update(root: Path, write: bool) -> list[str]:
    """Makes the tables of the repository at `root`, and writes them where `write` says so; returns what was wrong."""
    wrong = []
    for path in sorted({*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("records/**/*.md")}):
        old = path.read_text(encoding="utf-8")
        new = rewrite(root, path)
        if TO_WRITE in new:
            wrong.append(f"{path.relative_to(root)}: has a part that is yet to be written")
        if new != old:
            wrong.append(f"{path.relative_to(root)}: a table is not that of the runs; python tools/leaderboard.py")
            if write:
                path.write_text(new, encoding="utf-8")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and name what is out of date")
    args = parser.parse_args()
    try:
        wrong = update(ROOT, write=not args.check)
        if not args.check:
            wrong = update(ROOT, write=False)
    except LogError as error:
        sys.exit(f"leaderboard.py: {error}")
    if wrong:
        sys.exit("\n".join(["leaderboard.py: out of date:", *wrong]))
    print("all tables agree with the runs")


if __name__ == "__main__":
    main()
