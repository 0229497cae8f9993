#!/usr/bin/env python3
"""Makes a record of finished, stopped and crashed runs: a folder in records/ with their logs, and a README to finish.

    python records/keep.py --name muon_momentum logs/base_* logs/tweak_*     # run folders, or logs
    python records/keep.py --name muon_momentum bench/OUT                    # an A/B folder, with its plan.json

The folder is records/TRACK/DATE_NAME, by the day of the first run. Each log stands there without its source, which is
kept once for all runs that had it, as source_<start of its sha256>.py.kept; logs.py joins them again. An A/B folder
keeps its own structure, other runs become RUN.txt. The README has the tables, and the diff against the leader of the
track; hypothesis and conclusion are yours to write. Nothing is overwritten, and the runs stay where they are.
"""

import argparse
import datetime
import hashlib
import itertools
import re
import sys
import tempfile
from pathlib import Path

import plot
from compare import check_left_out, read_plan
from leaderboard import ROOT, TO_WRITE, ranked, settings_of, update
from logs import DIVIDER, THEN, LogError, Run, read_log, source_name


def without_sources(run: Run) -> tuple[str, dict[str, str]]:
    """Returns (text of the log without the source at its start and at each resume, {sha256: source}).

    A piece that is not the source that its facts name is left where it is: no word of a log gets lost.
    """
    *pieces, end = run.path.read_text(encoding="utf-8").split(DIVIDER + "run folder: ")
    text, sources = "", {}
    for piece, facts in itertools.pairwise([*pieces, end]):
        named = re.search(r"^source: sha256 (\w+)", facts, re.MULTILINE)
        starts = [0, *(line.end() for line in re.finditer("\n", piece))]     # before a resume's source stand steps
        start = next((i for i in reversed(starts) if named
                      and hashlib.sha256(piece[i:].encode()).hexdigest() == named[1]), None)
        if start is not None:
            sources[named[1]] = piece[start:]
        text += (piece + DIVIDER if start is None else piece[:start]) + "run folder: "
    if run.source is not None:     # of a log that was kept before, too
        sources[run.source_sha256.split(THEN)[0]] = run.source
    return text + end, sources


def without_machine(text: str, root: Path) -> str:
    """Returns the text with paths below the repository relative to it, and the commands' interpreter as `python`."""
    return re.sub(r'("command": ")[^" ]*/(python[\d.]* )', r"\1\2", text.replace(f"{root.resolve()}/", ""))


def day(run: Run) -> str:
    """Returns the day on which the run started, from its run_id, else that of the file's last change (YYYY-MM-DD)."""
    stamp = re.search(r"(20\d\d)([01]\d)([0-3]\d)-\d{6}", run.config.get("run_id", ""))
    return "-".join(stamp.groups()) if stamp else f"{datetime.date.fromtimestamp(run.path.stat().st_mtime)}"


def find_runs(paths: list[Path]) -> tuple[list[Run], Path | None]:
    """Returns (the runs, the A/B folder where the one path is such)."""
    folder = paths[0] if len(paths) == 1 and (paths[0] / "plan.json").exists() else None
    if folder:
        read_plan(folder)     # says what is wrong with it
        paths = sorted(path.parent for path in folder.glob("*/log.txt"))
        if not paths:
            raise LogError(f"{folder} has a plan.json, but no run has a log.txt yet; run it first")
    runs = [read_log(path) for path in paths]
    for run in runs:
        if run.kind != "train_gpt.py" or run.source is None:
            raise LogError(f"{run.path} is no log of train_gpt.py with its source; give the log as the run wrote it")
    if len(tracks := {run.config["track"] for run in runs}) > 1:
        raise LogError(f"the runs are of the tracks {', '.join(sorted(tracks))}; keep each of them apart")
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LogError(f"several runs are named {', '.join(twice)}; rename their folders, so that each can be kept")
    return runs, folder


def readme(name: str, record: str, runs: list[Run], ab: bool, previous: Run | None, before: str, plotted: bool) -> str:
    since = f" since {before} {previous.name}" if previous else ""
    log = f"records/{record}/{runs[0].name}" + ("" if ab else ".txt")
    tables = [f"settings {record}", *[f"comparison {record}"] * ab, f"runs {record}"]
    return "\n".join([
        f"# {name.replace('_', ' ')}", "", f"Hypothesis: {TO_WRITE} one sentence)", "", "## What changed", "",
        f"<!-- changes {record}{since} -->", "<!-- end -->", "", "## Result", "", f"{TO_WRITE} what the runs say)", "",
        *(line for table in tables for line in (f"<!-- {table} -->", "<!-- end -->", "")),
        *["![loss of the first run of each setting](loss.png)", ""] * plotted,
        "```bash", "# any run again, from its log", f"python records/reproduce.py {log} --run", "```", ""])


def keep(name: str, paths: list[Path], root: Path = ROOT) -> Path:
    """Makes the record, and returns its folder; raises LogError, and leaves nothing behind, where that cannot be."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise LogError(f"--name {name}: names a folder: letters, digits, '.', '_' and '-' only")
    runs, folder = find_runs(paths)
    track = runs[0].config["track"]
    record = f"{track}/{min(map(day, runs))}_{name}"
    destination = root / "records" / record
    if destination.exists():
        raise LogError(f"{destination} exists, and a record is never overwritten; give another --name")
    best = next((one for one, _ in ranked(root, track)), None)     # the leader, if there is one
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent.parent) as temporary:
        made = Path(temporary) / destination.name
        made.mkdir()
        for run in runs:
            text, sources = without_sources(run)
            path = made / run.name / "log.txt" if folder else made / f"{run.name}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(without_machine(text, root), encoding="utf-8")
            for sha256, source in sources.items():
                (made / source_name(sha256)).write_text(source, encoding="utf-8")
        for extra in ("plan.json", "runs.jsonl"):
            if folder and (folder / extra).exists():
                (made / extra).write_text(without_machine((folder / extra).read_text("utf-8"), root), encoding="utf-8")
        drawn = [run for one in settings_of(made) for run in one.runs if run.losses["train"]]
        if drawn:
            plot.draw(plot.group_runs(drawn, []), made / "loss.png")
        before = best and best.record.relative_to(root / "records").as_posix()
        (made / "README.md").write_text(readme(name, record, runs, bool(folder), best and best.runs[0], before,
                                               bool(drawn)), encoding="utf-8")
        made.rename(destination)
    update(root, write=True)
    return destination


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders or logs, or one A/B folder")
    parser.add_argument("--name", required=True, help="of the record: what was tried, in a word or two")
    args = parser.parse_args()
    try:
        for warning in check_left_out(find_runs(args.runs)[0], "", 0)[1]:
            print(f"warning: {warning} (a record holds every run that was made for it)")
        folder = keep(args.name, args.runs)
    except LogError as error:
        sys.exit(f"keep.py: {error}")
    print(f"record: {folder}\nnow write what its README.md leaves to you, look at it, and commit; "
          "python records/leaderboard.py --check says what is missing")


if __name__ == "__main__":
    main()
