"""Training runs, as all programs in tools/ see them: read, found, grouped, kept.

A run is read from its log, or from a record that keeps it.

A log of train_gpt.py is its source, a line of 100 '=', facts such as `config: {json}`, lines `step:N/M key:value ...`
and a summary of `key: value` lines. A resumed run goes on in the same file, and writes source and facts again.

A log of modded-nanogpt is its source, between such lines or before the first, then versions and hardware, then `step:`
lines, of several runs in turn where one process made them.

A record (tools/keep.py makes it) is a folder with runs.json, the facts of its runs, and curves.json.gz, their losses.
The sources stand once for all records in records/sources, under the first 12 digits of their sha256.

Logs come from strangers. What a name, a number or a source may be is checked here, where a log is read, and control
characters, which a terminal would obey, are replaced.
"""

import functools
import gzip
import hashlib
import json
import re
import sys
import zlib
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))          # so that any program here can import train_gpt
DIVIDER = "=" * 100 + "\n"
THEN = " then "                     # joins the values of a fact that a resume changed
# A last line counts where it ends as a line does, so that nothing of it was cut off.
STEP = re.compile(r"^step:(\d+)/(\d+) (.*)(?:\n|(?<=ms)\Z)", re.MULTILINE)
NAME = re.compile(r"\w[\w.-]*")     # of a track, a run or a record: what may become a path
MOST_STEPS, LARGEST_LOSS = 10**8, 1e6       # a run that diverged may also log inf or nan
CURVE_POINTS = 80                   # of a training loss that a record keeps
# Fields of Config that change neither the result nor its time, so that runs of one setting may differ in them.
RUNS_OWN = {"seed", "prepare", "data", "train_files", "val_files", "log_dir", "run_id", "resume", "val_every",
            "save_every", "metrics_every", "optimizer_metrics_every", "prime_steps", "collective_timeout"}


class LogError(Exception):
    """A log or record that cannot be used; the message names the file and the remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


@dataclass(frozen=True)
class Run:
    """What is known of a run; None where its log does not say.

    Where a resume changed a fact, it holds both values, joined by THEN, so that it equals no other run's.
    """
    path: Path                      # the log, or RECORD/NAME of a run that a record keeps
    name: str
    source_sha256: str | None       # of the whole program, checked wherever `source` is there
    git: str | None                 # commit, with '-dirty' where the files differed from it
    config: dict
    versions: str | None            # python, torch, cuda and platform
    hardware: str | None            # such as "8 x NVIDIA A100-SXM4-80GB"
    host: str | None
    train_sha256: str | None        # of the data that were read
    val_sha256: str | None
    num_steps: int                  # planned length
    resumed: bool
    summary: dict                   # {} where the run did not finish
    recipe: str = ""                # its name on a leaderboard
    losses: dict = field(default_factory=dict, repr=False)      # {"train" or "val": {step: (seconds, loss)}}
    source: str | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """The folder that holds the run beside others: an experiment of ab.py, a record, or any folder of logs."""
        path = self.path.absolute()
        return path.parent.parent if path.name == "log.txt" else path.parent

    @property
    def block(self) -> str | None:
        """Number of the block in an experiment of ab.py, such as 03 of 03_A_seed4."""
        return self.name.split("_")[0] if self.side else None

    @property
    def side(self) -> str | None:
        """Letter of the variant in an experiment of ab.py, such as A of 03_A_seed4."""
        match = re.fullmatch(r"\d+_([A-Z])_.*", self.name)
        return match[1] if match else None

    @property
    def finished(self) -> bool:
        return self.num_steps in self.losses["val"]

    @property
    def final(self) -> tuple[float, float]:
        """(seconds of training, validation loss) at the last step of a finished run."""
        return self.losses["val"][self.num_steps]

    @property
    def torch(self) -> str | None:
        match = re.search(r"torch ([^,\s]+)", self.versions or "", re.IGNORECASE)
        return match[1] if match else None

    @property
    def world_size(self) -> int | None:
        match = re.match(r"\d+(?= x )", self.hardware or "")
        return int(match[0]) if match else None


def printable(text: str) -> str:
    """Returns the text with '?' for lone surrogates, and control characters other than line ends and tabs."""
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "?", text)


# Logs.

def read_log(path: Path) -> Run:
    """Reads a log, or the log.txt of a run folder; raises LogError where it is no log of one run, or damaged."""
    runs = read_runs(path)
    if len(runs) > 1:
        raise LogError(f"{path} holds {len(runs)} runs; give the log of one")
    return runs[0]


def read_runs(path: Path) -> list[Run]:
    """Reads the runs of a log, of which modded-nanogpt's may hold several; raises LogError as read_log does."""
    path = path / "log.txt" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        own = re.search(r"^run folder: (?!\{)", text, re.MULTILINE)
        return [parse_log(path, text)] if own else parse_modded_log(path, text)
    except FileNotFoundError:
        raise LogError(f"{path} does not exist; give the folder or log of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"{path} cannot be read ({error}); give the folder or log of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LogError(f"{path} is no log of a run, or damaged ({str(error)[:200]}); leave it out") from None


def parse_log(path: Path, text: str) -> Run:
    """Returns the run of a log; raises ValueError and the like where the text is none, or damaged."""
    # Several starts where the run was resumed. With "{" the words stand in a source.
    source, *starts = re.split(r"^run folder: (?!\{)", text, flags=re.MULTILINE)
    starts = [re.split(r"^#!", start, flags=re.MULTILINE)[0] for start in starts]    # without a resume's source
    configs = re.findall(r"^config: (\{.*)$", "".join(starts), re.MULTILINE)
    if not configs:
        raise ValueError("it has no line `config:`")
    config = checked_config(json.loads(printable(configs[-1])))
    tail = printable(starts[-1]).rpartition("\nrun_id: ")
    summary = read_summary("run_id: " + tail[2]) if tail[1] else {}
    # The facts stand before the first step; a summary may hold lines that look like them.
    facts = printable("\n".join(re.split(r"\nstep:|\nrun_id: ", start)[0] for start in starts))

    stated = fact(r"^source: sha256 ([0-9a-f]{64})\b", facts)
    source = source.removesuffix(DIVIDER) if source.endswith(DIVIDER) and stated else None
    if source is not None and hashlib.sha256(source.encode()).hexdigest() != stated.split(THEN)[0]:
        raise ValueError(f"the source in it is not the one that ran, of sha256 {stated}")
    return Run(
        path, name_of(path), stated, fact(r"^source: sha256 \w+, git (\S+)$", facts), config,
        fact(r"^versions: (.*)$", facts), fact(r"^hardware: (.*)$", facts), fact(r"^host: (.*)$", facts),
        fact(r"^data sha256: train (\w+)", facts), fact(r"^data sha256: .*\bval (\w+)$", facts), config["num_steps"],
        len(starts) > 1, summary, losses=read_losses("".join(starts), config["num_steps"]), source=source)


def parse_modded_log(path: Path, text: str) -> list[Run]:
    """Returns the runs of a log of modded-nanogpt: where the step falls, a new one begins; raises ValueError.

    Their `source` stays None, so that nothing keeps or runs it: no line states its sha256, by which to verify it.
    """
    source, divider, body = text.removeprefix(DIVIDER).partition(DIVIDER)
    source, body = (source, body) if divider else ("", text)
    sha256 = hashlib.sha256(source.encode()).hexdigest() if source else None
    target = 2.92 if "model_dim=1024" in source else 3.28       # of track 2, whose model is as wide as GPT-2 medium
    parts, last = [], inf
    for line in STEP.finditer(body):
        if int(line[1]) < last:
            parts.append([])
        parts[-1].append(line)
        last = int(line[1])

    facts, name, runs = printable(body), name_of(path), []
    torch = re.search(r"^Running (pytorch \S+)", facts, re.MULTILINE | re.IGNORECASE)
    device = re.search(r"^Running .*?(?:device_name=|on )(NVIDIA .*?) +with world_size[= ](\d+)$", facts, re.MULTILINE)
    gpus = re.findall(r"^\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|", facts, re.MULTILINE)     # rows of nvidia-smi
    hardware = f"{device[2]} x {device[1]}" if device else f"{len(gpus)} x {gpus[0]}" if gpus else None
    for number, lines in enumerate(parts, 1):
        num_steps = int(lines[-1][2])
        if num_steps > MOST_STEPS:
            raise ValueError(f"{num_steps} steps: at most {MOST_STEPS:,}")
        config = dict(track="modded-nanogpt", target=target, num_steps=num_steps)
        losses = read_losses(body[lines[0].start():lines[-1].end()], num_steps)
        runs.append(Run(path, f"{name}_{number}" if len(parts) > 1 else name, sha256, None, config, torch and torch[1],
                        hardware, None, None, None, num_steps, False, {}, losses=losses))
    if not any(run.losses["val"] for run in runs):
        raise ValueError("it has no validation loss")
    return runs


def name_of(path: Path) -> str:
    return printable(path.absolute().parent.name if path.name == "log.txt" else path.stem)


def checked_config(config: dict) -> dict:
    """Returns the Config of a log; raises ValueError where it has values that no run can have."""
    if not NAME.fullmatch(config["track"]):
        raise ValueError(f"track {config['track']!r}: may hold letters, digits, '_', '-' and '.'")
    for name in config:
        if not name.isidentifier():
            raise ValueError(f"config: {name!r} names no field")
    if isinstance(config.get("batch_tokens"), list):     # older logs hold a list of stages
        stages = set(config["batch_tokens"])
        if len(stages) != 1:
            raise ValueError("batch_tokens in several stages, which only train_gpt.py before 2026-11-25 had")
        config["batch_tokens"] = stages.pop()
    for name, most in dict(num_steps=MOST_STEPS, batch_tokens=2**40, seed=2**64).items():
        value = config[name]
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{name} {str(value)[:40]}: must be a whole number of at most {most:,}")
    if not re.fullmatch(r"\d{1,9}:\d{1,9}( +\d{1,9}:\d{1,9})*", config.get("stages", "1:0")):
        raise ValueError(f"stages {config['stages'][:40]!r}: must be factor:window of each")
    if not abs(config["target"]) < LARGEST_LOSS:
        raise ValueError(f"target {config['target']}: must be a loss below {LARGEST_LOSS:g}")
    return config


def batch_factors(config: dict) -> list[int]:
    """Of batch_tokens, for equal shares of the steps; logs before 2026-11-28 have one."""
    return [int(stage.partition(":")[0]) for stage in config.get("stages", "1:0").split()]


def tokens_until(config: dict, step: int) -> int:
    """Tokens that so many steps take; nan where the log does not say."""
    factors, total = batch_factors(config), 0
    for i, factor in enumerate(factors):
        first, end = (-(-k * config["num_steps"] // len(factors)) for k in (i, i + 1))
        total += factor * max(0, min(step, end) - first)
    return config.get("batch_tokens", nan) * total


def fact(pattern: str, text: str) -> str | None:
    """Returns the value on the lines that match: one, or where a resume changed it, all in their order."""
    return THEN.join(dict.fromkeys(re.findall(pattern, text, re.MULTILINE))) or None


def read_summary(text: str) -> dict:
    """Returns the `key: value` lines as a dict; values that are JSON, as what they mean."""
    summary = {}
    for key, value in re.findall(r"^(\w+): (.*)$", text, re.MULTILINE):
        try:
            summary[key] = json.loads(value)
        except json.JSONDecodeError:
            summary[key] = value
    return summary


def read_losses(text: str, num_steps: int) -> dict:
    """Returns the losses as in Run; of two lines of a step, as after a resume, the later one counts.

    So does the last of several on a line: val_loss, val_avg_loss and val_ema_loss, which are of averaged weights.
    """
    losses = {"train": {}, "val": {}}
    for step, _, pairs in STEP.findall(text):
        values = dict(pair.split(":", 1) for pair in pairs.split() if ":" in pair)
        for kind in losses:
            names = [name for name in values if re.fullmatch(kind + r"(_\w+)?_loss", name)]
            if names and "train_time" in values:
                time = values["train_time"]
                seconds = float(time[:-2]) / 1000 if time.endswith("ms") else float(time.removesuffix("s"))
                losses[kind][int(step)] = checked_point(int(step), seconds, float(values[names[-1]]), num_steps)
    return losses


def checked_point(step: int, seconds: float, loss: float, num_steps: int) -> tuple[float, float]:
    """Returns (seconds, loss); raises ValueError where no run can have them at this step."""
    if not 0 <= step <= num_steps or not 0 <= seconds < inf or loss < -LARGEST_LOSS or LARGEST_LOSS < loss < inf:
        raise ValueError(f"step {step} of {num_steps}: loss {loss} after {seconds} s, which no run has")
    return seconds, loss


# Records.

def facts_of(run: Run) -> dict:
    """Returns all of a run but its path, its losses and its source, which stand elsewhere."""
    return {name: value for name, value in vars(run).items() if name not in ("path", "losses", "source")}


def thinned(run: Run) -> dict:
    """Returns {"train" or "val": [[step, seconds, loss], ...]}; a training loss is the mean since the one before."""
    points, waiting = [], []
    every = max(1, run.num_steps // CURVE_POINTS)
    last = max(run.losses["train"], default=0)
    for step, (seconds, loss) in sorted(run.losses["train"].items()):
        waiting.append(loss)
        if step % every == 0 or step == last:
            points.append([step, round(seconds, 3), round(fmean(waiting), 5)])
            waiting = []
    return dict(train=points, val=[[step, *pair] for step, pair in sorted(run.losses["val"].items())])


def write_record(folder: Path, runs: list[Run]) -> None:
    """Writes runs.json and curves.json.gz into the folder; sources are for records/sources."""
    all_facts = [facts_of(run) for run in runs]
    common = {name: value for name, value in all_facts[0].items() if all(facts[name] == value for facts in all_facts)}
    config = {name: value for name, value in runs[0].config.items()
              if all(name in run.config and run.config[name] == value for run in runs)}
    common["config"] = config
    lines = []
    for facts in all_facts:
        own = {name: value for name, value in facts.items() if name not in common}
        own["config"] = {name: value for name, value in facts["config"].items() if name not in config}
        lines.append(json.dumps(own))
    text = f'{{"common": {json.dumps(common, indent=1)},\n"runs": [\n' + ",\n".join(lines) + "\n]}\n"
    (folder / "runs.json").write_text(text, encoding="utf-8")
    curves = json.dumps({run.name: thinned(run) for run in runs}, separators=(",", ":"))
    (folder / "curves.json.gz").write_bytes(gzip.compress(curves.encode(), mtime=0))


def read_record(folder: Path) -> list[Run]:
    """Reads the runs that a record keeps, with its sources where they are there; raises LogError."""
    try:
        kept = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
        curves = json.loads(gzip.decompress((folder / "curves.json.gz").read_bytes()))
        runs = []
        for own in kept["runs"]:
            facts = {**kept["common"], **own}
            facts["config"] = checked_config({**kept["common"]["config"], **own["config"]})
            if not NAME.fullmatch(facts["name"]):
                raise ValueError(f"a run is named {facts['name']!r}")
            for name in facts.keys() - {"config", "num_steps", "resumed", "summary"}:
                facts[name] = facts[name] and printable(facts[name])
            curve, num_steps = curves[facts["name"]], facts["config"]["num_steps"]
            losses = {kind: {step: checked_point(step, *rest, num_steps) for step, *rest in curve[kind]}
                      for kind in ("train", "val")}
            source = kept_source(folder.absolute(), facts["source_sha256"])
            runs.append(Run(path=folder / facts["name"], losses=losses, source=source, **facts))
        return runs
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LogError(f"{folder} holds no whole record ({str(error)[:200]}); restore it with git checkout") from None


@functools.cache
def kept_source(folder: Path, stated: str | None) -> str | None:
    """Returns the source from `sources` above the record, None if it is not kept there; raises LogError if edited."""
    for path in (above / "sources" / f"{str(stated)[:12]}.py" for above in folder.parents):
        if path.exists():
            source = path.read_text(encoding="utf-8")
            if hashlib.sha256(source.encode()).hexdigest() != stated.split(THEN)[0]:
                raise LogError(f"{path} was edited: its sha256 is not {stated}; restore it: git checkout {path}")
            return source
    return None


# Finding and grouping.

def logs_of(path: Path) -> list[Path]:
    """Returns the logs below a folder, without those that an experiment put aside; of a file, itself."""
    if not path.is_dir():
        return [path]
    logs = [log for log in sorted(path.rglob("log.txt")) if "aside" not in log.relative_to(path).parts]
    logs = logs or sorted(path.glob("*.txt"))
    if not logs:
        raise LogError(f"{path} holds no log of a run; give a run folder, a log, or a record")
    return logs


def find_runs(paths: list[Path]) -> tuple[list[Run], list[str]]:
    """Returns (runs, what is wrong with logs that are left out).

    A path is a log, a run folder, a folder of these, a record, or RECORD/NAME. Raises LogError where a path holds no
    log at all, or where no log can be read.
    """
    runs, bad = [], []
    for path in map(Path, paths):
        if (path.parent / "runs.json").exists() and not path.exists():
            kept = [run for run in read_record(path.parent) if run.name == path.name]
            if not kept:
                raise LogError(f"{path.parent} keeps no run {path.name}; its runs.json names those it keeps")
            runs += kept
        elif (path / "runs.json").exists():
            runs += read_record(path)
        else:
            for log in logs_of(path):
                try:
                    runs += read_runs(log)
                except LogError as error:
                    bad.append(str(error))
    if not runs:
        raise LogError("\n".join(bad) or "no run is given; give the folder or log of one, or a record")
    return list({(run.path.resolve(), run.name): run for run in runs}.values()), list(dict.fromkeys(bad))


def setting(run: Run) -> dict[str, str]:
    """Returns what the runs of one variant have in common: {field of Config or source: value as text}."""
    fields = {name: json.dumps(value) for name, value in run.config.items() if name not in RUNS_OWN}
    return {**fields, "source": str(run.source_sha256)[:12]}


def changed(settings: list[dict[str, str]]) -> str:
    """Returns the fields in which the settings differ, with their values, in words."""
    fields = dict.fromkeys(name for fields in settings for name in fields)
    values = {name: list(dict.fromkeys(fields.get(name, "none") for fields in settings)) for name in fields}
    return "; ".join(f"{name} {' -> '.join(values[name])}" for name in fields if len(values[name]) > 1)


def group(runs: list[Run]) -> list[list[Run]]:
    """Groups runs of one setting, in the order of their first runs."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(sorted(setting(run).items())), []).append(run)
    return list(groups.values())
