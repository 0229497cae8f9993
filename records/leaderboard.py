#!/usr/bin/env python3
"""Writes the tables of README.md, of records/README.md and of each record's README, from the logs in records/.

    python records/leaderboard.py             # rewrites all that stands between the markers
    python records/leaderboard.py --check     # writes nothing; exits 1 and names what does not agree with the logs

A table stands between a marker, on a line of its own, and the line <!-- end -->. RECORD is a folder in records/:
    <!-- leaderboard TRACK -->                    the settings of a track that compare, the fastest first
    <!-- settings RECORD -->                      the settings of a record
    <!-- sides RECORD NAME ... -->                the sides A, B .. of an A/B folder, by names of yours (_ is a space)
    <!-- runs RECORD -->                          its runs, every one
    <!-- best RECORD FIELD ... -->                of each value of these fields of Config, the setting of lowest loss
    <!-- comparison RECORD -->                    compare.py's verdicts on the candidates of an A/B folder
    <!-- changes RECORD [since RECORD RUN] -->    what changed, as a diff of the source, since a run of another record
    <!-- published -->                            not from a log: figures of others, with their source

A setting is a source with its Config, the seed left out. Its time to target is the training time of its runs, whose
length was fixed before, where their mean final loss is at or below the target; a first crossing does not count. A
setting has a place where that is sure: see records/README.md. Spread is the standard deviation.
"""

import argparse
import difflib
import functools
import inspect
import math
import os
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from compare import changed, compare, read_plan, setting
from logs import THEN, LogError, Run, read_log, source_name
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train_gpt import TRACKS, make_config  # noqa: E402

END = "<!-- end -->"
TO_WRITE = "(to write:"     # what keep.py leaves to the author of a record
LONGEST_DIFF = 300     # lines, up to which a diff stands in a README
LONGEST_TITLE = 90     # characters, up to which a setting is told by all that differs
FEWEST_RUNS, ALPHA = 5, 0.01     # of a setting that has a place, and of the test that its mean is below the target


@dataclass(frozen=True)
class Setting:
    """The runs of a record that have one source and one Config, the seed left out."""
    record: Path
    runs: list[Run]
    what: str                   # its values of the fields in which the settings of the record differ

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    @property
    def losses(self) -> list[float]:
        return [run.final[1] for run in self.finished]

    @property
    def title(self) -> str:
        """What tells the setting from the record's others; where that is long, its first run, as in its changes."""
        return (self.what or "-") if len(self.what) <= LONGEST_TITLE else self.runs[0].name

    @property
    def loss(self) -> float:
        """Mean final validation loss; of no finished run: infinite."""
        return fmean(self.losses) if self.losses else math.inf

    @property
    def target(self) -> float:
        return self.runs[0].config["target"]

    @property
    def reached(self) -> bool:
        return self.loss <= self.target

    @property
    def p(self) -> float | None:
        """The chance of losses this low, were the true mean the target (one-sided t-test); None with no spread."""
        if len(self.losses) < 2 or not stdev(self.losses):
            return None
        return float(stats.ttest_1samp(self.losses, self.target, alternative="less").pvalue)

    @property
    def comparable(self) -> bool:
        """Whether data, validation and target are the track's, as far as the sha256 of its data are known."""
        return (self.target == make_config(dict(track=self.runs[0].config["track"])).target
                and all(run.summary.get("data_comparable") is not False for run in self.runs))

    @property
    def has_place(self) -> bool:
        seeds = {run.config["seed"] for run in self.runs}
        grounds = {f"{run.hardware} {run.source_sha256}" for run in self.runs}
        return (len(self.finished) == len(self.runs) == len(seeds) >= FEWEST_RUNS and self.comparable
                and len(grounds) == 1 and THEN not in grounds.pop() and self.p is not None and self.p < ALPHA)

    def seconds(self) -> dict[str, float]:
        """Returns {hardware: mean seconds of training}: times on different hardware have no common mean."""
        names = dict.fromkeys(run.hardware for run in self.finished)
        return {name: fmean(run.final[0] for run in self.finished if run.hardware == name) for name in names}


# What is in a record.

@functools.cache
def read_record(folder: Path) -> list[Run]:
    """Reads all runs of a record: each log.txt below it, and each .txt in it; raises LogError where there is none."""
    paths = sorted({*folder.rglob("log.txt"), *folder.glob("*.txt")})
    if not paths:
        raise LogError(f"{folder} holds no log of a run; name a record as its folder in records/, such as "
                       "tiny/2026-11-22_run_sh")
    return [read_unchanged(path, path.stat().st_mtime_ns) for path in paths]


@functools.cache
def read_unchanged(path: Path, time_of_change: int) -> Run:
    return read_log(path)


def records_of(root: Path, track: str) -> list[Path]:
    """Returns the folders of a track's records, by date."""
    return sorted(path for path in (root / "records" / track).glob("*") if path.is_dir())


def settings_of(folder: Path) -> list[Setting]:
    """Returns the settings of a record, in the order of their first runs."""
    groups = {}
    for run in read_record(folder):
        groups.setdefault(tuple(setting(run).items()), []).append(run)
    fields = [dict(group) for group in groups]
    varying = [name for name in dict.fromkeys(name for group in fields for name in group)
               if len({group.get(name) for group in fields}) > 1]
    return [Setting(folder, runs, ", ".join(f"{name} {values.get(name, 'none')}".replace('"', "") for name in varying))
            for values, runs in zip(fields, groups.values(), strict=True)]


def side_of(run: Run) -> str:
    """Returns the letter of a run in an A/B folder, or ''."""
    found = re.match(r"\d+_([A-Z])_", run.folder.name)
    return found[1] if found else ""


def block_times(one: Setting) -> dict[str, float]:
    """Returns {block: mean logarithm of the seconds} of runs in an A/B folder, whose names are such as 03_A_seed4."""
    blocks = {}
    for run in one.finished:
        if block := re.match(r"\d+(?=_[A-Z]_)", run.folder.name):
            blocks.setdefault(block[0], []).append(math.log(run.final[0]))
    return {block: fmean(times) for block, times in blocks.items()}


def ratio_to_adamw(one: Setting, others: list[Setting]) -> float | None:
    """Returns the setting's time over that of the fastest AdamW that reached the target in the same blocks: the
    geometric mean of the blocks' ratios, which a drifting machine does not touch; None where there is none."""
    mine, ratios = block_times(one), []
    for other in others:
        theirs = block_times(other)
        both = mine.keys() & theirs.keys()
        if both and one.reached and other.reached and other.runs[0].config.get("matrix_optimizer") == "adamw":
            ratios.append(math.exp(fmean(mine[block] - theirs[block] for block in both)))
    return max(ratios, default=None)


def ranked(root: Path, track: str) -> list[tuple[Setting, float | None]]:
    """Returns [(setting, time over AdamW's)] of all records of a track: those with a place, those that reached the
    target, the rest; the first two by that ratio, or where there is none by their seconds, the rest by their loss."""
    rows = []
    for record in records_of(root, track):
        settings = settings_of(record)
        rows += [(one, ratio_to_adamw(one, settings)) for one in settings]
    return sorted(rows, key=lambda row: (
        not row[0].has_place, not row[0].reached, row[1] or math.inf,
        min(row[0].seconds().values()) if row[0].reached else row[0].loss))


# The tables, as lines of Markdown.

def table(heads: list[str], rows: list[list]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in [heads, ["---"] * len(heads), *rows]]


def figures(one: Setting, ratio: float | None) -> dict:
    """Returns {head: figure} of a setting, for a row."""
    unfinished = len(one.runs) - len(one.finished)
    reached = "yes" if one.reached else "no"
    return {
        "n": f"{len(one.finished)}" + (f" (and {unfinished} unfinished)" if unfinished else ""),
        "loss": f"{one.loss:.4f}" if one.losses else "-",
        "spread": f"{stdev(one.losses):.4f}" if len(one.losses) > 1 else "-",
        "target reached": (f"{reached}, p = {one.p:.2g}" if one.reached and one.p is not None else reached) + (
            "" if one.comparable else ", but with other data or target"),
        "seconds": " / ".join(f"{mean:.1f}" for mean in one.seconds().values()) or "-",
        "time / AdamW's": f"{ratio:.3f}" if ratio else "-", "steps": one.runs[0].num_steps,
        "hardware": " / ".join(one.seconds()) or one.runs[0].hardware}


def leaderboard(root: Path, here: Path, track: str) -> list[str]:
    rows, others = [], {}
    for place, (one, ratio) in enumerate(ranked(root, track), 1):
        if not one.comparable:
            others.setdefault(f"[{one.record.name}]({os.path.relpath(one.record, here)})", []).append(one)
            continue
        date, _, name = one.record.name.partition("_")
        found = figures(one, ratio)
        if not one.reached:
            found["seconds"] = "-"     # the time to a loss above the target is none
        rows.append({"place": place if one.has_place else "-", "record":
                     f"[{name}]({os.path.relpath(one.record, here)})", "what": one.title, **found, "date": date})
    lines = table(list(rows[0]), [list(row.values()) for row in rows]) if rows else [f"Nothing has run on {track} yet."]
    left_out = ", ".join(f"{len(settings)} of {record}" for record, settings in sorted(others.items()))
    return lines + ["", f"Left out, with other data, validation tokens or target: {left_out}."] * bool(others)


def settings(root: Path, here: Path, record: str) -> list[str]:
    groups, rows = settings_of(root / "records" / record), []
    for one in groups:
        found = figures(one, ratio_to_adamw(one, groups))
        if len(one.losses) > 1:
            found["spread"] += f" ({min(one.losses):.4f} to {max(one.losses):.4f})"
        rows.append({"setting": one.title, **found})
    return table(list(rows[0]), [list(row.values()) for row in rows])


def sides(root: Path, here: Path, record: str, *names: str) -> list[str]:
    groups = sorted(settings_of(root / "records" / record), key=lambda one: side_of(one.runs[0]))
    if [side_of(one.runs[0]) for one in groups] != list(string.ascii_uppercase[:len(names)]):
        raise LogError(f"records/{record} has not {len(names)} sides, A and so on; name each in the marker, in order")
    heads = ["n", "loss", "spread", "target reached", "steps", "seconds", "time / AdamW's"]
    rows = [figures(one, ratio_to_adamw(one, groups)) for one in groups]
    return table(["side", *heads], [[name.replace("_", " "), *(row[head] for head in heads)]
                                    for name, row in zip(names, rows, strict=True)])


def runs(root: Path, here: Path, record: str) -> list[str]:
    folder, rows = root / "records" / record, []
    for one in settings_of(folder):
        for run in one.runs:
            loss, seconds = (f"{run.final[1]:.4f}", f"{run.final[0]:.1f}") if run.finished else (
                f"stopped at step {max([0, *run.losses['train'], *run.losses['val']])}", "-")
            rows.append([f"[{'log' if run.folder == folder and run.path.name == 'log.txt' else run.name}]"
                         f"({os.path.relpath(run.path, here)})", one.title, run.config["seed"], loss, seconds,
                         run.num_steps, run.hardware, run.torch])
    return table(["run", "setting", "seed", "loss", "seconds", "steps", "hardware", "torch"], rows)


def best(root: Path, here: Path, record: str, field: str, *more: str) -> list[str]:
    values, fields = {}, (field, *more)
    for one in settings_of(root / "records" / record):
        config = one.runs[0].config
        if missing := [field for field in fields if field not in config]:
            raise LogError(f"{one.runs[0].path} has no field {missing[0]} in its Config; name one that it has")
        values.setdefault(str([config[field] for field in fields]), []).append(one)
    winners = [(min(tried, key=lambda one: one.loss), len(tried)) for tried in values.values()]
    winners.sort(key=lambda winner: winner[0].loss)
    heads = ["n", "loss", "spread", "steps"]
    return table(["best setting", "settings tried", *heads], [
        [one.what, tried, *(figures(one, None)[head] for head in heads)] for one, tried in winners])


def comparison(root: Path, here: Path, record: str) -> list[str]:
    folder, by_side, rows = root / "records" / record, {}, []
    plan = read_plan(folder)
    if plan is None:
        raise LogError(f"{folder} has no plan.json, so no sides; leave its comparison out")
    for run in read_record(folder):
        if side := side_of(run):
            by_side.setdefault(side, []).append(run)
    for side in sorted(by_side.keys() - {"A"}):
        try:
            result = compare(by_side.get("A", []), by_side[side], plan["metric"], plan["alpha"], candidate=side)
        except LogError as error:
            rows.append([side, "-", "-", "-", f"not decided ({error})"])
            continue
        p = "-" if result.p is None else f"{result.p:.2g}"
        rows.append([side, result.change.replace('"', ""), f"{len(result.a.runs)} and {len(result.b.runs)}", p,
                     result.verdict])
    return [f"By {plan['metric']}, alpha {plan['alpha']:g}, both named before the first run. The baseline is A.", "",
            *table(["candidate", "change from A", "runs of A and of it", "p", "verdict"], rows)]


@functools.cache
def diff_of(a: str, b: str, *names: str) -> list[str]:
    return list(difflib.unified_diff(a.splitlines(), b.splitlines(), *names, lineterm=""))


def changes(root: Path, here: Path, record: str, since: str = "", before: str = "", name: str = "") -> list[str]:
    first, *others = [one.runs[0] for one in settings_of(root / "records" / record)]
    pairs, lines, shown_before = [(f"{first.name} -> {other.name}", first, other) for other in others], [], {}
    if since:
        old = [run for run in read_record(root / "records" / before) if run.name == name]
        if not old:
            raise LogError(f"records/{before} has no run {name}; name one of its runs in the marker of the changes")
        pairs.insert(0, (f"{before} {name} -> {first.name}", old[0], first))
    else:
        lines = ["No record was there before.", ""]
    for what, a, b in pairs:
        if None in (a.source, b.source):
            raise LogError(f"{a.path if a.source is None else b.path} has no source, so no diff can be made of it")
        diff = diff_of(a.source, b.source, *(f"train_gpt.py {run.source_sha256[:12]}" for run in (a, b)))
        fields = changed([{**setting(run), "source": ""} for run in (a, b)]).replace('"', "")
        above = shown_before.setdefault((a.source_sha256, b.source_sha256), what) if diff else what
        told = "the same source." if not diff else "this diff:" if above == what else f"the diff of {above}."
        if above == what and len(diff) > LONGEST_DIFF:
            told = f"a diff of {len(diff)} lines, of {' and '.join(source_name(run.source_sha256) for run in (a, b))}."
        lines += [f"{what}: {fields or 'the same Config'}; {told}", ""]
        if told == "this diff:":
            shown = " open" if len(diff) < 80 else ""
            lines += [f"<details{shown}><summary>{len(diff)} lines</summary>", "", "~~~~~diff", *diff, "~~~~~", "",
                      "</details>", ""]
    return lines[:-1]


# The files.

TABLES = {make.__name__: make for make in (leaderboard, settings, sides, runs, best, comparison, changes)}
KINDS = "|".join([*TABLES, "published"])
TABLE = re.compile(rf"^<!-- ({KINDS})((?: [\w./-]+)*) -->\n(.*?)^{END}$", re.MULTILINE | re.DOTALL)
MARKER = re.compile(rf"^<!-- (?:{KINDS}|end)\b.*$", re.MULTILINE)


def rewrite(root: Path, path: Path) -> tuple[str, list[str]]:
    """Returns (text of the file with all tables made anew, what of it disagreed with the logs)."""
    text, wrong = path.read_text(encoding="utf-8"), []

    def make(match: re.Match) -> str:
        kind, words, old = match[1], match[2].split(), match[3]
        marker = f"<!-- {' '.join([kind, *words])} -->"
        if MARKER.search(old):
            raise LogError(f"{path}: {marker} has no {END} of its own; write it below the table")
        if kind == "published":
            return match[0]
        try:
            inspect.signature(TABLES[kind]).bind(root, path.parent, *words)
        except TypeError:
            raise LogError(f"{path}: {marker} has too few or too many words; --help shows the markers") from None
        new = "".join(f"{line}\n" for line in TABLES[kind](root, path.parent, *words))
        if new != old:
            wrong.append(f"{path.relative_to(root)}: {marker} does not agree with the logs")
        return f"{marker}\n{new}{END}"

    new = TABLE.sub(make, text)
    if left := MARKER.search(TABLE.sub("", text)):
        raise LogError(f"{path}: {left[0]} stands alone; a marker, its table and {END} belong together")
    if TO_WRITE in text:
        wrong.append(f"{path.relative_to(root)}: a part of it is yet {TO_WRITE[1:-1]}")
    return new, wrong


def update(root: Path, write: bool) -> list[str]:
    """Makes all tables of the repository at `root`; returns what disagreed with the logs, or is missing.

    Writes the files that differ where `write` says so; raises LogError where a log, or a marker, is damaged.
    """
    read_record.cache_clear()
    places, wrong = [root / "README.md", root / "records" / "README.md"], []
    needed = {places[1]: [f"<!-- leaderboard {track} -->" for track in TRACKS if records_of(root, track)]}
    for track in TRACKS:
        for record in records_of(root, track):
            places.append(record / "README.md")
            needed[places[-1]] = [f"<!-- runs {track}/{record.name} -->"]     # every run counts
    texts = {}
    for path in places:
        if not path.exists():
            wrong.append(f"{path.relative_to(root)}: is not there")
            continue
        texts[path], more = rewrite(root, path)
        wrong += more + [f"{path.relative_to(root)}: has no table {marker}" for marker in needed.get(path, [])
                         if marker not in texts[path]]
    if write:
        for path, text in texts.items():
            if text != path.read_text(encoding="utf-8"):
                path.write_text(text, encoding="utf-8")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, name what disagrees with the logs")
    args = parser.parse_args()
    try:
        wrong = update(ROOT, write=not args.check)
        if not args.check:
            for text in wrong:
                print(f"was wrong: {text}")
            wrong = update(ROOT, write=False)
    except LogError as error:
        sys.exit(f"leaderboard.py: {error}")
    if wrong:
        remedy = ["python records/leaderboard.py writes the tables anew"] * args.check
        sys.exit("\n".join(["leaderboard.py: these are wrong:", *wrong, *remedy]))
    print("all tables agree with the logs")


if __name__ == "__main__":
    main()
