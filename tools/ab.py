#!/usr/bin/env python3
"""Runs a baseline, A, and candidates, B, C, ..., in turn over several seeds, and says which is faster.

    python tools/ab.py logs/lr --metric final_loss --candidate "--lr 0.003"
    python tools/ab.py logs/both --metric time_to_target --candidate git:HEAD~1 --candidate "tweak.py --lr 0.003"

A SPEC is one quoted text: a program, as a file or as git:REVISION, then its `--field value` pairs. Without a program,
it takes that of the baseline, and the baseline takes the repository's train_gpt.py. A single word that begins with
'-' needs '=': --candidate=--lr=0.003. The candidate "" is the baseline again, which shows what chance does.

Block i runs each variant once with seed i, and every second block is in reversed order (A B B A), so that a drift of
the machine meets all variants alike. Each run is a new process in the repository's folder. OUT holds plan.json, all
that is fixed before the first run; copies of the programs, so that later edits change nothing; and a folder per run.

After Ctrl-C, a kill or a crash, the same command with the same programs goes on where it stopped: what finished is not
run again, and what did not moves to OUT/aside and starts anew. A crash of the baseline ends the experiment, one of a
candidate does not. The exit status is 0 where all runs finished. Several candidates share alpha equally (Bonferroni).
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import shlex
import signal
import string
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

from compare import METRICS, compare, report
from runs import ROOT, LogError, Run, printable, read_log

OWN_FIELDS = ("--seed", "--log_dir", "--run_id", "--resume")      # not for a SPEC: they differ from run to run
AS_RUN_SH = dict(GOMP_SPINCOUNT="10000", MALLOC_TRIM_THRESHOLD_="1000000000", MALLOC_MMAP_THRESHOLD_="33554432")
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", *AS_RUN_SH)     # the same for all runs


# The plan: all that is fixed before the first run.

def parse_spec(spec: str, program: str) -> tuple[str, list[str]]:
    """Returns (program, fields) of a SPEC; `program` is taken where it names none."""
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise LogError(f"{spec!r}: {error}; give a program, or none, and then '--field value' pairs") from None
    if words and not words[0].startswith("-"):
        program = words.pop(0)
    for word in words:
        if word.split("=")[0] in OWN_FIELDS:
            raise LogError(f"{spec!r}: leave {word} out; each run gets its own from ab.py, and starts at step 0")
    return program, words


def parse_variants(plan: dict) -> dict[str, tuple[str, list[str]]]:
    """Returns {letter: (program, fields)} of the baseline, A, and of the candidates."""
    shared = parse_spec(plan["fields"], "")[1]
    baseline = parse_spec(plan["baseline"], str(ROOT / "train_gpt.py"))
    variants = [baseline, *(parse_spec(spec, baseline[0]) for spec in plan["candidates"])]
    return {letter: (program, shared + fields)
            for letter, (program, fields) in zip(string.ascii_uppercase, variants, strict=False)}


def read_program(program: str) -> bytes:
    """Returns the program in a file, or the train_gpt.py of git:REVISION."""
    try:
        if program.startswith("git:"):
            file = program.removeprefix("git:") + ":./train_gpt.py"
            return subprocess.check_output(["git", "-C", str(ROOT), "show", file])
        return Path(program).read_bytes()
    except (OSError, subprocess.CalledProcessError) as error:
        raise LogError(f"{program}: {error}; name a program, git:REVISION, or only fields: '--lr 0.003'") from None


def make_plan(args: argparse.Namespace) -> dict:
    """Returns the plan that follows from the command line; raises LogError where that makes no sense."""
    for name, good, remedy in (
            ("fields", not parse_spec(args.fields, "")[0], "must begin with '--'; a program belongs into a SPEC"),
            ("seeds", args.seeds and len({*args.seeds}) == len(args.seeds), "give a number from 1 on, or a list: 3,4"),
            ("alpha", 0 < args.alpha < 1, "must lie between 0 and 1, such as 0.05"),
            ("candidate", len(args.candidate) < 26, "there are letters for 25")):
        if not good:
            raise LogError(f"--{name} {getattr(args, name)}: {remedy}")
    plan = dict(
        metric=args.metric, alpha=args.alpha, alpha_each=args.alpha / len(args.candidate), track=args.track,
        fields=args.fields, seeds=args.seeds, nproc=args.nproc, baseline=args.baseline, candidates=args.candidate,
        environment={name: os.environ.get(name) for name in ENVIRONMENT}, runs=[])
    for block, seed in enumerate(args.seeds):
        names = [f"{block:02}_{letter}_seed{seed}" for letter in parse_variants(plan)]
        plan["runs"] += reversed(names) if block % 2 else names
    return plan


def fix_plan(out: Path, plan: dict) -> None:
    """Copies the programs and writes plan.json; where it is there, raises LogError if it, or a copy, has changed."""
    path, new = out / "plan.json", not (out / "plan.json").exists()
    copies = {out / f"source_{letter}.py": program for letter, (program, _) in parse_variants(plan).items()}
    if new:
        strangers = {*out.iterdir()} - {*copies, out / "lock", out / "plan.json.part"}
        if strangers:
            raise LogError(f"{out} has no plan.json, but holds {strangers.pop().name}; name a new folder")
        for copy, program in copies.items():
            copy.write_bytes(read_program(program))
    hashes = {copy.name: hashlib.sha256(copy.read_bytes()).hexdigest() for copy in copies if copy.exists()}
    plan = {**plan, **hashes}
    if new:
        part = out / "plan.json.part"
        part.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in {**plan, **then} if then.get(name) != plan.get(name)]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LogError(f"{path} is damaged ({error}); name another OUT") from None
    told = "; ".join(f"{name}: {then.get(name)!r} there, {plan.get(name)!r} now" for name in different[:2])
    if different:
        raise LogError(f"{path} differs from this command line: {printable(told)}. Give the arguments that it has, "
                       f"undo what was edited in {out}, or name another OUT")


# The runs.

def finished(folder: Path) -> Run | None:
    """Returns the run in the folder, where its log has the validation loss of its last step."""
    try:
        run = read_log(folder / "log.txt")
        return run if run.finished else None
    except LogError:
        return None


def make_command(out: Path, plan: dict, name: str) -> list[str]:
    block, letter, _ = name.split("_")
    launch = [sys.executable]
    if plan["nproc"] > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={plan['nproc']}"]
    return [*launch, str(out / f"source_{letter}.py"), plan["track"], *parse_variants(plan)[letter][1],
            "--seed", str(plan["seeds"][int(block)]), "--log_dir", str(out), "--run_id", name]


def run_program(folder: Path, command: list[str], lock) -> int:
    """Runs a command, whose output goes into the folder, and returns its exit status."""
    if folder.exists():
        place = folder.parent / "aside" / f"{folder.name}_{time.time_ns()}"
        place.parent.mkdir(exist_ok=True)
        folder.rename(place)
        print(f"{folder.name}  did not finish: it is now in {place}, and starts again")
    folder.mkdir()
    # The copies may lie in a repository whose commit is not theirs: git must not find it, and logs say 'git none'.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent.parent)}
    with open(folder / "console.txt", "wb") as console:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=console, stderr=console, start_new_session=True, pass_fds=[lock.fileno()])
    try:
        return process.wait()
    except KeyboardInterrupt:
        print("stopping the run", file=sys.stderr)
        for number in (signal.SIGTERM, signal.SIGKILL):     # the second after a while, or on a second Ctrl-C
            with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired, KeyboardInterrupt):
                os.killpg(process.pid, number)
                process.wait(40)     # torchrun takes 30 for its workers
                break
        raise


def report_crash(console: Path, name: str, status: int) -> None:
    """Prints the last lines of a run that crashed; raises LogError where it is the baseline's."""
    lines = console.read_text(errors="replace").splitlines()[-10:]
    print(f"{name}  crashed, exit status {status}; the end of {console}:")
    print(printable("\n".join(f"    {line}" for line in lines)))
    if "_A_" in name:
        raise LogError("the baseline crashed, see above; the same command tries again, another one needs an empty OUT")


def experiment(out: Path, plan: dict, lock) -> int:
    """Runs what the plan has and is not finished, and prints the verdicts; returns the exit status."""
    letters, total, seconds = [*parse_variants(plan)], len(plan["runs"]), []
    runs, crashed = {letter: [] for letter in letters}, {letter: [] for letter in letters}
    for number, name in enumerate(plan["runs"], 1):
        letter, run, note = name.split("_")[1], finished(out / name), "finished before"
        if not run:
            fix_plan(out, plan)     # nothing may have been edited meanwhile
            start = time.monotonic()
            status = run_program(out / name, make_command(out, plan, name), lock)
            run = finished(out / name)
            if not run:
                report_crash(out / name / "console.txt", name, status)
                crashed[letter].append(name)
                continue
            seconds.append(time.monotonic() - start)
            note = f"about {datetime.timedelta(seconds=round(fmean(seconds) * (total - number)))} left"
        runs[letter].append(run)
        print(f"{name}  loss {run.final[1]:.4f}  {run.final[0]:.2f} s  run {number} of {total}, {note}")

    for letter, spec in zip(letters[1:], plan["candidates"], strict=True):
        print(f"\n{letter}, {spec or 'the baseline again'}, against A:")
        if crashed[letter]:
            print(f"verdict: inconclusive ({letter} crashed: {', '.join(crashed[letter])})")
        else:
            print(report(compare(runs["A"], runs[letter], plan["metric"], plan["alpha_each"], letter)))
    return 1 if any(crashed.values()) else 0


def seeds(text: str) -> list[int]:
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
    parser.add_argument("--seeds", type=seeds, default="5", help="0 to N-1, or a list: 5,6,7 (default: 5)")
    parser.add_argument("--alpha", type=float, default=0.05, help="accepted chance of a wrong verdict (default: 0.05)")
    parser.add_argument("--nproc", type=int, default=1, help="processes, or GPUs, of a run (default: 1)")
    args = parser.parse_args()

    for name, value in AS_RUN_SH.items():
        os.environ.setdefault(name, value)
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # as Ctrl-C
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
        fix_plan(out, plan)
        for letter, (program, _) in parse_variants(plan).items():
            if read_program(program) != (out / f"source_{letter}.py").read_bytes():
                raise LogError(f"{program} has changed since this experiment began, which goes on with the copy in "
                               f"{out}/source_{letter}.py; name another OUT, or restore the program from the copy")
        print(f"plan: {len(plan['runs'])} runs in {out}, named BLOCK_VARIANT_SEED; alpha {plan['alpha_each']:g} each")
        return experiment(out, plan, lock)
    except (LogError, OSError) as error:
        sys.exit(f"ab.py: {error}")
    except KeyboardInterrupt:
        print("ab.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
