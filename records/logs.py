"""Reads the logs of training runs: those of train_gpt.py and of modded-nanogpt. The other scripts here import it.

A log of train_gpt.py is its source, a line of 100 '=', facts such as `config: {json}`, `step:` lines and a summary of
`key: value` lines; a resumed run goes on in the same file and writes source and facts again. A log of modded-nanogpt is
its source, a line of 100 '=', versions and nvidia-smi, another such line, and `step:` lines.

A `step:` line is `step:N/M key:value ...` in any order. What counts is train_loss or val_loss with train_time, in s or
ms; other keys are ignored.

In a record the logs of train_gpt.py stand without their sources, each of which is kept once, beside them (keep.py).
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

DIVIDER = "=" * 100 + "\n"
STEP = re.compile(r"^step:(\d+)/(\d+) (.*)\n", re.MULTILINE)     # of a line that a kill cut off nothing counts


class LogError(Exception):
    """A log, or what belongs to it, that cannot be used: the message names the file and the remedy."""


@dataclass(frozen=True)
class Run:
    """What a log says of its run; None where it does not say.

    Where the parts of a resumed run differ in a text, it holds both, joined by THEN, so that it equals no other run's.
    """
    path: Path
    kind: str                   # "train_gpt.py" or "modded-nanogpt"
    source: str | None          # program text of the run's start, from the log or from beside it
    source_sha256: str | None
    git: str | None             # commit, with '-dirty' where the files differed from it
    config: dict                # {} in modded-nanogpt's logs
    versions: str | None        # python, torch, cuda and platform
    torch: str | None
    hardware: str | None
    host: str | None            # name of the machine, of rank 0
    world_size: int | None      # processes
    train_sha256: str | None
    val_sha256: str | None
    num_steps: int              # planned length of the run
    resumed: bool
    losses: dict                # {"train" or "val": {step: (seconds of training, loss)}}
    summary: dict               # {} where the run did not finish

    @property
    def folder(self) -> Path:
        return self.path.absolute().parent

    @property
    def name(self) -> str:
        return self.folder.name if self.path.name == "log.txt" else self.path.stem

    @property
    def finished(self) -> bool:
        return self.num_steps in self.losses["val"]

    @property
    def final(self) -> tuple[float, float]:
        """Returns (seconds of training, validation loss) of the last step of a finished run."""
        return self.losses["val"][self.num_steps]

    @property
    def batch_tokens(self) -> list[int]:
        """The tokens of each planned step: one number in the Config or, in older logs, those of equal stages."""
        stages = self.config["batch_tokens"]
        stages = stages if isinstance(stages, list) else [stages]
        return [stages[step * len(stages) // self.num_steps] for step in range(self.num_steps)]


THEN = " then "


def fact(pattern: str, text: str) -> str | None:
    """Returns the value on the lines that match: one, or where a resume changed it, all, in their order."""
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


def source_name(sha256: str) -> str:
    """Returns the name of the file that keeps a source; no .py, which ruff and pytest collect, nor .txt, as of logs."""
    return f"source_{sha256[:12]}.py.kept"


def kept_source(log: Path, sha256: str) -> str | None:
    """Returns the source of that sha256 from the log's folder or the one above, where it is kept there."""
    for folder in (log.parent, log.parent.parent):
        path = folder / source_name(sha256)
        if path.exists():
            source = path.read_text(encoding="utf-8")
            if hashlib.sha256(source.encode()).hexdigest() != sha256:
                raise LogError(f"{path}: is not the source that ran (its sha256 is not {sha256}); restore it, by git "
                               f"checkout {path}")
            return source
    return None


def read_losses(text: str) -> tuple[dict, int]:
    """Returns (losses as in Run, planned number of steps); of two lines of a step, as after a resume, the later counts.

    Raises ValueError where a loss or time is no number.
    """
    losses, num_steps = {"train": {}, "val": {}}, 0
    for step, planned, pairs in STEP.findall(text):
        pairs = dict(pair.split(":", 1) for pair in pairs.split() if ":" in pair)
        for kind in losses:
            if f"{kind}_loss" in pairs and "train_time" in pairs:
                seconds, unit = re.fullmatch(r"(.*?)(m?s)?", pairs["train_time"]).groups()
                seconds = float(seconds) / (1e3 if unit == "ms" else 1)
                losses[kind][int(step)] = (seconds, float(pairs[f"{kind}_loss"]))
                num_steps = int(planned)
    return losses, num_steps


def read_log(path: Path) -> Run:
    """Reads a log file, or the log.txt of a run folder; raises LogError where it is no log, or damaged."""
    path = path / "log.txt" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LogError(f"{path} does not exist; give the folder or log of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"{path} cannot be read ({error}); give the folder or log of a run") from None

    try:
        losses, num_steps = read_losses(text)
    except ValueError as error:
        raise LogError(f"{path}: a line of a step is damaged ({error}); leave this log out") from None

    # Several starts where it was resumed. With "{" the words are in a source.
    source, *starts = re.split(r"^run folder: (?!\{)", text, flags=re.MULTILINE)
    configs = re.findall(r"^config: (\{.*)$", "".join(starts), re.MULTILINE)
    if configs:
        try:
            config = json.loads(configs[-1])
            num_steps = config["num_steps"]
        except (json.JSONDecodeError, KeyError) as error:
            raise LogError(f"{path}: its config line is damaged ({error}); leave this log out") from None
        summary = starts[-1].rpartition("\nrun_id: ")
        summary = read_summary("".join(summary[1:])) if summary[1] else {}
        # The facts stand before the first step. After it come the summary, which may have their keys, and on a resume
        # the source, whose strings may have them.
        text = "\n".join(re.split(r"\nstep:|\n#!|\nrun_id: ", start)[0] for start in starts)
        divider, source = source.endswith(DIVIDER), source.removesuffix(DIVIDER)
        hashes = fact(r"^source: sha256 (\w+)", text)
        if divider and hashes and hashlib.sha256(source.encode()).hexdigest() != hashes.split(THEN)[0]:
            raise LogError(f"{path}: the source in it is not the one that ran (its sha256 is not {hashes}); give the "
                           "log as the run wrote it")
        if not divider:
            source = kept_source(path, hashes.split(THEN)[0]) if hashes else None
        hardware = fact(r"^hardware: (.*)$", text)
        processes = re.match(r"\d+", hardware or "")
        return Run(
            path, "train_gpt.py", source, hashes, fact(r"^source: sha256 \w+, git (\S+)$", text),
            config, fact(r"^versions: (.*)$", text), fact(r"^versions: .*?\btorch ([^,]+)", text), hardware,
            fact(r"^host: (.*)$", text), int(processes[0]) if processes else None,
            fact(r"^data sha256: train (\w+)", text), fact(r"^data sha256: .*\bval (\w+)$", text), num_steps,
            len(starts) > 1, losses, summary)

    source, divider, body = text.partition(DIVIDER)
    if not losses["val"] or not divider:
        raise LogError(f"{path} is no log of train_gpt.py or modded-nanogpt; give the folder or log of a run")
    named = re.search(r"^Running on device_name=(.*) with world_size=(\d+)$", body, re.MULTILINE)
    gpus = re.findall(r"^\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|", body, re.MULTILINE)     # rows of nvidia-smi
    hardware = f"{named[2]} x {named[1]}" if named else f"{len(gpus)} x {gpus[0]}" if gpus else None
    return Run(
        path, "modded-nanogpt", source, hashlib.sha256(source.encode()).hexdigest(), None, {},
        fact(r"(?i)^Running (pytorch .*)$", body), fact(r"(?i)^Running pytorch (\S+)", body), hardware,
        None, int(named[2]) if named else None, None, None,
        num_steps, False, losses, {})
