#!/usr/bin/env python3
"""Runs a baseline, A, and candidates, B, C, ..., in turn over several seeds, and says which is faster.

    python tools/ab.py logs/lr --metric final_loss --candidate "--lr 0.003"
    python tools/ab.py logs/tweak --metric time_to_target --seeds 8 --candidate tweak.py
    python tools/ab.py logs/both --metric final_loss --candidate git:HEAD~1 --candidate "tweak.py --lr 0.003"

A SPEC is one quoted text: a program, as a file or as git:REVISION, then its `--field value` pairs. Without a program,
it takes that of the baseline, and the baseline takes the repository's train_gpt.py. A single word that begins with
'-' needs '=': --candidate=--lr=0.003. The candidate "" is the baseline again, which shows what chance does.

Block i runs each variant once with seed i, and every second block is in reversed order (A B B A), so that a drift of
the machine meets all variants alike. Each run is a new process, with the repository as its working directory, of a
copy of the program that is made at the start: later edits change nothing. The folder OUT then holds

    plan.json      all that was fixed before the first run; other arguments later are an error
    source_A.py    the copy of A's program
    00_A_seed0     a folder for each run: log.txt, and console.txt, what it printed
    aside          what is left of runs that did not finish, and that were started again

After Ctrl-C, a kill or a crash, the same command goes on where it stopped: what finished is not run again. A candidate
that crashes twice is not started any more, and the others go on. A crash of the baseline ends the experiment. The exit
status is 0 where all runs finished, and 1 where something crashed.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

from compare import METRICS, compare, report
from runs import ROOT, LogError, Run, printable, read_log, sha256

OWN_FIELDS = ("--seed", "--log_dir", "--run_id", "--resume")      # ab.py gives these, or they make no sense here
# What runs depend on besides the command line, and what they get where it is not set; bench/README.md on the last.
ENVIRONMENT = {"OMP_NUM_THREADS": None, "CUDA_VISIBLE_DEVICES": None, "GOMP_SPINCOUNT": "10000"}
MOST_CRASHES = 2            # after which a candidate is not started any more
STOP_SECONDS = 40           # from SIGTERM to SIGKILL; torchrun takes 30 for its workers
LAST_LINES = 10             # of the output of a run that crashed


class PlanError(Exception):
    """Arguments that are no good, or a run that ended the experiment; the message names the remedy."""


# The plan: all that is fixed before the first run.

def parse_spec(spec: str, program: str) -> tuple[str, list[str]]:
    """Returns (program, fields) of a SPEC; `program` is taken where it names none."""
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise PlanError(f"{spec!r}: {error}; give a program, or none, and then '--field value' pairs") from None
    if words and not words[0].startswith("-"):
        program = words.pop(0)
    for word in words:
        if word.split("=")[0] in OWN_FIELDS:
            raise PlanError(f"{spec!r}: leave {word} out; every run starts at its first step, and gets its seed and its "
                            "folder from ab.py")
    return program, words


def parse_variants(plan: dict) -> dict[str, tuple[str, list[str]]]:
    """Returns {letter: (program, fields)} of the baseline, A, and of the candidates."""
    baseline = parse_spec(plan["baseline"], str(ROOT / "train_gpt.py"))
    variants = [baseline, *(parse_spec(spec, baseline[0]) for spec in plan["candidates"])]
    return dict(zip(string.ascii_uppercase, variants, strict=False))


def read_program(program: str) -> tuple[str, bytes]:
    """Returns (what was read, its bytes) of a file or of git:REVISION, of which the first is git:COMMIT."""
    if not program.startswith("git:"):
        try:
            return program, Path(program).read_bytes()
        except OSError as error:
            raise PlanError(f"{program}: {error.strerror}; give a program, git:REVISION, or fields such as "
                            "'--lr 0.003'") from None
    try:
        revision = program.removeprefix("git:") + "^{commit}"
        command = ["git", "-C", ROOT, "rev-parse", "--verify", "--end-of-options", revision]
        commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        command = ["git", "-C", ROOT, "show", f"{commit}:./train_gpt.py"]
        return f"git:{commit}", subprocess.run(command, check=True, capture_output=True).stdout
    except subprocess.CalledProcessError:
        raise PlanError(f"{program}: git knows no such commit with a train_gpt.py; `git log` shows those there "
                        "are") from None


def make_plan(args: argparse.Namespace) -> dict:
    """Returns the plan that follows from the command line; raises PlanError where that makes no sense."""
    checks = dict(
        fields=(not parse_spec(args.fields, "")[0], "must begin with '--'; a program belongs into a SPEC"),
        seeds=(args.seeds and len({*args.seeds}) == len(args.seeds), "give a number from 1 on, or a list such as 3,4"),
        alpha=(0 < args.alpha < 1, "must lie between 0 and 1, such as 0.05"),
        nproc=(args.nproc > 0, "must be 1 or more"),
        candidate=(len(args.candidate) < 26, "there are letters for 25"))
    for name, (good, remedy) in checks.items():
        if not good:
            raise PlanError(f"--{name} {getattr(args, name)}: {remedy}")
    runs = []
    for block, seed in enumerate(args.seeds):
        names = [f"{block:02}_{letter}_seed{seed}" for letter in string.ascii_uppercase[:1 + len(args.candidate)]]
        runs += reversed(names) if block % 2 else names
    return dict(
        metric=args.metric, alpha=args.alpha, alpha_each=args.alpha / len(args.candidate), track=args.track,
        fields=args.fields, seeds=args.seeds, nproc=args.nproc, baseline=args.baseline, candidates=args.candidate,
        environment={name: os.environ.get(name, default) for name, default in ENVIRONMENT.items()}, runs=runs)


def fix_plan(out: Path, plan: dict) -> dict:
    """Writes the plan and copies the programs, at the first start; later, checks that they are the same.

    Returns the plan with its `variants`: {letter: {source: where its program is from, sha256: of its copy}}.
    """
    path = out / "plan.json"
    if not path.exists():
        strangers = [p.name for p in out.iterdir() if not re.fullmatch(r"lock|plan\.json\.part|source_[A-Z]\.py", p.name)]
        if strangers:
            raise PlanError(f"{out} has no plan.json, but holds {strangers[0]}; name a new folder")
        variants = {}
        for letter, (program, _) in parse_variants(plan).items():
            source, content = read_program(program)
            (out / f"source_{letter}.py").write_bytes(content)
            variants[letter] = dict(source=source, sha256=hashlib.sha256(content).hexdigest())
        plan = dict(plan, variants=variants)
        part = path.with_suffix(".json.part")
        part.write_text(json.dumps(dict(plan, sha256=sha256(json.dumps(plan))), indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        return plan

    # Runs follow from the command line; of what the file says, only the sha256 of the copies is used.
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        intact = there.pop("sha256") == sha256(json.dumps(there))
        variants = there.pop("variants")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise PlanError(f"{path} was edited, or is damaged: it does not have its sha256. Undo that, or name another OUT")
    different = [f"{name}: {there.get(name)!r} then, {plan.get(name)!r} now" for name in {**plan, **there}
                 if there.get(name) != plan.get(name)]
    if different:
        raise PlanError(f"{out} was started with other arguments: {'; '.join(different)}. Give those, or another OUT")
    return dict(plan, variants=variants)


# The runs.

def finished(folder: Path) -> Run | None:
    """Returns the run in the folder, where its log has the validation loss of its last step."""
    try:
        run = read_log(folder / "log.txt")
    except LogError:
        return None
    return run if run.finished else None


def command(out: Path, plan: dict, name: str) -> list[str]:
    """Returns the command of a run; raises PlanError where the copy of its program was edited."""
    block, letter, _ = name.split("_")
    program = out / f"source_{letter}.py"
    if not program.exists() or hashlib.sha256(program.read_bytes()).hexdigest() != plan["variants"][letter]["sha256"]:
        raise PlanError(f"{program} was edited, or is gone: plan.json has another sha256. Undo that, or name another OUT")
    launch = [sys.executable]
    if plan["nproc"] > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={plan['nproc']}"]
    return [*launch, str(program), plan["track"], *shlex.split(plan["fields"]), *parse_variants(plan)[letter][1],
            "--seed", str(plan["seeds"][int(block)]), "--log_dir", str(out), "--run_id", name]


def run_program(folder: Path, words: list[str], environment: dict, lock) -> int:
    """Runs a command, whose output goes into the folder, and returns its exit status."""
    if folder.exists():
        aside = folder.parent / "aside"
        aside.mkdir(exist_ok=True)
        place = aside / f"{folder.name}_{len(list(aside.glob(f'{folder.name}_*'))) + 1}"
        folder.rename(place)
        print(f"{folder.name}  did not finish: it is now in {place}, and starts again")
    folder.mkdir()
    # The copies may lie in a repository whose commit is not theirs: git is not to find it, and logs say 'git none'.
    environment = {**os.environ, **{name: value for name, value in environment.items() if value is not None},
                   "GIT_CEILING_DIRECTORIES": str(folder.parent.parent)}
    with open(folder / "console.txt", "wb") as console:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=console,
                                   stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock.fileno()])
    try:
        return process.wait()
    except SystemExit:
        stop(process)
        raise


def stop(process: subprocess.Popen) -> None:
    """Ends a run and its processes: by SIGTERM, and after a while, or on a second Ctrl-C, by SIGKILL."""
    print("stopping the run", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired, SystemExit):
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
            return


def time_left(seconds: dict[str, list[float]], names: list[str]) -> str:
    """Returns the time that these runs will take, in words, from the seconds that each variant's runs took."""
    mean = {letter: fmean(times) for letter, times in seconds.items() if times}
    left = sum(mean.get(name.split("_")[1], fmean(mean.values())) for name in names)
    return f"about {datetime.timedelta(seconds=round(left))} left"


def experiment(out: Path, plan: dict, lock) -> int:
    """Runs what the plan has and is not finished, and prints the verdicts; returns the exit status."""
    runs = {letter: [] for letter in plan["variants"]}
    crashed, seconds = {letter: [] for letter in runs}, {letter: [] for letter in runs}
    for number, name in enumerate(plan["runs"], 1):
        letter, words, note = name.split("_")[1], command(out, plan, name), "finished before"
        run = finished(out / name)
        if not run and len(crashed[letter]) == MOST_CRASHES:
            print(f"{name}  not started: {letter} crashed {MOST_CRASHES} times")
            continue
        if not run:
            started = time.monotonic()
            status = run_program(out / name, words, plan["environment"], lock)
            run = finished(out / name)
            if not run:
                crashed[letter].append(name)
                report_crash(out / name, status)
                continue
            seconds[letter].append(time.monotonic() - started)
            note = time_left(seconds, plan["runs"][number:])
        runs[letter].append(run)
        print(f"{name}  loss {run.final[1]:.4f}  {run.final[0]:.2f} s  run {number} of {len(plan['runs'])}, {note}")

    for letter, spec in zip(list(runs)[1:], plan["candidates"], strict=True):
        print(f"\n{letter}, {spec or 'the baseline again'}, against A:")
        if crashed[letter]:
            print(f"verdict: inconclusive ({letter} crashed: {', '.join(crashed[letter])})")
        else:
            print(report(compare(runs["A"], runs[letter], plan["metric"], plan["alpha_each"], letter)))
    return 1 if any(crashed.values()) else 0


def report_crash(folder: Path, status: int) -> None:
    """Prints the last lines of a run that crashed; raises PlanError where it is the baseline's."""
    console = folder / "console.txt"
    lines = console.read_text(errors="replace").strip().splitlines()[-LAST_LINES:] or ["(it printed nothing)"]
    print(f"{folder.name}  crashed, exit status {status}. The end of {console}:")
    print(printable("\n".join(f"    {line}" for line in lines)))
    if "_A_" in folder.name:
        raise PlanError("the baseline crashed, as you see above. The same command tries it again; to change the plan, "
                        "name another OUT")


def seed_list(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",") if seed] if "," in text else list(range(int(text)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the experiment, new or to go on with")
    parser.add_argument("--metric", choices=METRICS, required=True, help="what decides: see tools/compare.py --help")
    parser.add_argument("--candidate", action="append", required=True, metavar="SPEC", help="once for each candidate")
    parser.add_argument("--baseline", default="", metavar="SPEC", help="(default: the repository's train_gpt.py)")
    parser.add_argument("--track", default="tiny", help="preset of all variants (default: tiny)")
    parser.add_argument("--fields", default="", help="for all variants, in one text: '--num_steps 200 ...'")
    parser.add_argument("--seeds", type=seed_list, default="5", metavar="N | I,J,..",
                        help="0 to N-1, or those named; a block for each (default: 5)")
    parser.add_argument("--alpha", type=float, default=0.05, help="accepted chance of any wrong verdict (default: 0.05)")
    parser.add_argument("--nproc", type=int, default=1, help="processes, or GPUs, of a run (default: 1)")
    args = parser.parse_args()

    def leave(number, frame):
        raise SystemExit(128 + number)
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        plan, out = make_plan(args), args.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "w")     # runs inherit it, so that it is held while one of them goes on
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the end of another ab.py, or of a run that a killed one left, in {out}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        plan = fix_plan(out, plan)
        print(f"plan: {len(plan['runs'])} runs in {out}, named BLOCK_VARIANT_SEED; alpha {plan['alpha_each']:g} for "
              "each candidate")
        return experiment(out, plan, lock)
    except (PlanError, LogError, OSError) as error:
        sys.exit(f"ab.py: {error}")
    except SystemExit:
        print("ab.py: stopped; the same command goes on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
