#!/usr/bin/env python3
"""Makes a record of runs, finished, stopped or crashed: a folder in records/ that holds what is worth keeping.

    python tools/keep.py --name gelu logs/tweak --recipes "ReLU squared" GELU     # an experiment of tools/ab.py
    python tools/keep.py --name gelu logs/base_* logs/gelu_*                       # or any runs

records/TRACK/DATE_NAME then has runs.json (the facts of all runs), curves.json.gz (their losses, thinned), plan.json
of an experiment, change.diff (how the variants differ), loss.png, and a README.md with the table, whose question and
answer are yours to write. Each source is kept once for all records, in records/sources. Nothing is overwritten, and
the runs stay where they are: a log itself is not kept.
"""

import argparse
import dataclasses
import datetime
import difflib
import json
import re
import shlex
import shutil
import string
import sys
import tempfile
from pathlib import Path

import leaderboard
import plot
from compare import read_plan
from runs import NAME, ROOT, THEN, LogError, Run, changed, find_runs, group, setting, write_record


def day(run: Run) -> str:
    """Returns the day on which the run started, from its run_id, else that of its log's last change (YYYY-MM-DD)."""
    stamp = re.search(r"(20\d\d)([01]\d)([0-3]\d)-\d{6}", str(run.config.get("run_id", "")))
    return "-".join(stamp.groups()) if stamp else f"{datetime.date.fromtimestamp(run.path.stat().st_mtime)}"


def change(variants: list[list[Run]]) -> str:
    """Returns how the variants differ from the first: a line of Config for each, and a diff of each other source."""
    first, lines, sources = variants[0][0], [], {}
    for other in (runs[0] for runs in variants[1:]):
        fields = changed([{**setting(run), "source": ""} for run in (first, other)])
        lines.append(f"# {leaderboard.title([first])} -> {leaderboard.title([other])}: {fields or 'the same Config'}")
        sources[other.source_sha256] = other.source
    for sha256, source in sources.items():
        names = [f"records/sources/{one[:12]}.py" for one in (first.source_sha256, sha256)]
        diff = list(difflib.unified_diff(first.source.splitlines(), source.splitlines(), *names, lineterm=""))
        lines += diff if len(diff) <= 500 else [f"# {len(diff)} lines: diff -u {' '.join(names)}"]
    return "\n".join(lines) + "\n"


def command(plan: Path, runs: list[Run]) -> str:
    """Returns the command that repeats an experiment, from its plan and from the kept sources of its runs."""
    told = json.loads(plan.read_text(encoding="utf-8"))
    sources = {run.side: f"records/sources/{run.source_sha256[:12]}.py" for run in runs}
    specs = []
    for letter, spec in zip(string.ascii_uppercase, [told["baseline"], *told["candidates"]], strict=False):
        words = shlex.split(spec)
        fields = words[1:] if words and not words[0].startswith("-") else words
        specs.append(shlex.join([sources[letter], *fields]) if letter in sources else spec)     # one left no log
    seeds = ",".join(map(str, told["seeds"])) + ("," if len(told["seeds"]) == 1 else "")
    words = ["python", "tools/ab.py", "logs/again", f"--metric={told['metric']}", f"--seeds={seeds}"]
    options = [f"--fields={told['fields']}", f"--baseline={specs[0]}", *(f"--candidate={spec}" for spec in specs[1:])]
    return shlex.join([*words, *options])


def readme(name: str, record: str, runs: list[Run], told: str, several: bool) -> str:
    return "\n".join([
        f"# {name.replace('_', ' ')}", "", f"Question: {leaderboard.TO_WRITE} one sentence)", "",
        f"Answer: {leaderboard.TO_WRITE} what the runs say)", "", f"<!-- record {record} -->", leaderboard.END, "",
        *["What changed: [change.diff](change.diff).", ""] * several, "![loss](loss.png)", "", "```bash", told,
        f"python tools/reproduce.py records/{record}/{runs[0].name} --run     # any run again", "```", ""])


def keep(name: str, paths: list[Path], recipes: list[str], root: Path = ROOT) -> Path:
    """Makes the record and returns its folder; raises LogError, and leaves nothing behind, where that cannot be."""
    runs, bad = find_runs(paths)
    for text in bad:
        print(f"keep.py: left out: {text}", file=sys.stderr)
    for run in runs:
        if run.source is None or THEN in run.source_sha256:
            raise LogError(f"{run.path} has no source of the sha256 that it states; give the log as the run wrote it")
    for what in (name, *(run.name for run in runs)):
        if not NAME.fullmatch(what):
            raise LogError(f"{what!r}: names a file; use letters, digits, '.', '_' and '-' only")
    if len({run.name for run in runs}) < len(runs):
        raise LogError("several runs have one name; rename their folders, so that each can be kept")
    if len({run.config["track"] for run in runs}) > 1:
        raise LogError("the runs are of several tracks; keep each of them apart")
    variants = group(runs)
    plan = len(paths) == 1 and read_plan(paths[0]) and paths[0] / "plan.json"
    if plan:
        variants.sort(key=lambda members: members[0].side or "")
    if recipes and len(recipes) != len(variants):
        raise LogError(f"--recipes names {len(recipes)}, and the runs are {len(variants)} variants; name each, in the "
                       f"order of {', '.join(members[0].name for members in variants)}")
    variants = [[dataclasses.replace(run, recipe=recipe) for run in members]
                for recipe, members in zip(recipes or [""] * len(variants), variants, strict=True)]
    runs = [run for members in variants for run in members]

    record = f"{runs[0].config['track']}/{min(map(day, runs))}_{name}"
    folder = root / "records" / record
    if folder.exists():
        raise LogError(f"{folder} exists, and a record is never overwritten; give another --name")
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary) / "record"
        part.mkdir()
        write_record(part, runs)
        if plan:
            shutil.copyfile(plan, part / "plan.json")
        if len(variants) > 1:
            (part / "change.diff").write_text(change(variants), encoding="utf-8")
        plot.draw(runs, part / "loss.png")
        told = command(plan, runs) if plan else f"{leaderboard.TO_WRITE} the command)"
        (part / "README.md").write_text(readme(name, record, runs, told, len(variants) > 1), encoding="utf-8")
        shutil.copytree(part, folder)
    (root / "records" / "sources").mkdir(exist_ok=True)
    for run in runs:
        (root / "records" / "sources" / f"{run.source_sha256[:12]}.py").write_text(run.source, encoding="utf-8")
    leaderboard.update(root, write=True)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders or logs, or one experiment")
    parser.add_argument("--name", required=True, help="of the record: what was tried, in a word or two")
    parser.add_argument("--recipes", nargs="+", default=[], help="names for a leaderboard: of each variant, in order")
    args = parser.parse_args()
    try:
        folder = keep(args.name, args.runs, args.recipes)
    except LogError as error:
        sys.exit(f"keep.py: {error}")
    print(f"record: {folder}\nNow write question and answer in its README.md and look at loss.png. "
          "python tools/leaderboard.py --check names what is missing. Commit it with records/sources.")


if __name__ == "__main__":
    main()
