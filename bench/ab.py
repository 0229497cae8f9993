#!/usr/bin/env python3
"""Runs a baseline, A, and candidates, B, C, ..., in turn, n seeds each, and asks records/compare.py which is faster.

    python bench/ab.py logs/lr --metric final_loss --candidate "--lr 0.003"
    python bench/ab.py logs/tweak --metric time_to_target --seeds 8 --looks 4 --candidate tweak.py
    python bench/ab.py logs/both --metric final_loss --candidate git:HEAD~1 --candidate "tweak.py --lr 0.003"

A SPEC is one quoted text: a train_gpt.py, as a file or as git:REVISION, then `--field value` pairs for it; where it
names no source, that of the baseline, and where the baseline names none, the repository's. A single word that starts
with '-' needs '=': --candidate=--compile. The candidate "" is the baseline again, which shows what chance does.

Block i takes seed i of --seeds, each side once, every second block in reversed order (A B B A), so that a drift of the
machine meets the sides alike. Each run is a fresh process, started in the repository's root from a copy of the source
made at the start (OUT/source_A): later edits change nothing. The folder OUT then holds

    plan.json     all that was fixed before the first run; other arguments later are an error
    00_A_seed0    a folder a run: log.txt, and console.txt, what it printed
    runs.jsonl    a line a run: times, exit status, and load, clocks and GPUs before, during and after it
    aside         runs that did not finish, which are run anew, from their first step

The same command goes on where it was cut off (Ctrl-C, SIGTERM, SIGKILL) and repeats no run that finished, nor one of a
candidate that crashed. A candidate that crashes twice in a row is not started any more; the others go on, and the exit
status is 1. A baseline that crashes ends the experiment.

--looks 3,5 fixes a rule for ending early: after 3 and after 5 blocks compare is asked, and where it decides on every
candidate, that is the end. Each comparison, of a candidate at a look or at the end, has an equal share of alpha
(Bonferroni), so that the chance of any wrong 'faster' or 'slower' stays at alpha.

Garbage collection: a fresh process starts without another run's garbage, and Python's collector stays as the user of
train_gpt.py has it, since it hardly runs: once in 200 steps of tiny, for 0.2 ms (Python 3.11, gc.callbacks).
"""

import argparse
import datetime
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))
from compare import METRICS, Result, block_and_side, compare, report  # noqa: E402
from logs import LogError, Run, read_log  # noqa: E402

SOURCES = ("train_gpt.py", "kernels.py")     # of which the second may be missing
OWN_FIELDS = ("--seed", "--log_dir", "--run_id", "--resume")     # of Config, not for a SPEC
ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")     # what runs depend on beside the command
CRASHES = 2                # in a row, after which a candidate is not started any more
SAMPLE_SECONDS = 30        # between looks at the clocks during a run; the last one is noted
STOP_SECONDS = 40          # from SIGTERM to SIGKILL; torchrun takes 30 for its workers
OTHERS = 0.1               # of the cores: more than that at work for others calls for a warning
GPU_STATE = "clocks.sm,temperature.gpu,power.draw,clocks_throttle_reasons.active,utilization.gpu"


class AbError(Exception):
    """Bad input, or a run that ended the experiment: the message names the option or file and the remedy."""


# The plan: all that is fixed before the first run.

def parse_spec(spec: str, source: str) -> tuple[str, list[str]]:
    """Returns (source, fields) of a SPEC; `source` is taken where it names none."""
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise AbError(f"{spec!r}: {error}; give a file or git:REVISION, then '--field value' pairs") from None
    if words and not words[0].startswith("-"):
        source = words.pop(0)
    for word in words:
        if word.split("=")[0] in OWN_FIELDS:
            raise AbError(f"{spec!r}: ab.py gives each run its {', '.join(OWN_FIELDS[:3])}, and runs start from their "
                          f"first step; leave {word} out")
    return source, words


def git(folder: Path, *arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise AbError("git is not installed; name the source by its file") from None
    except subprocess.CalledProcessError as error:
        raise AbError(f"git {' '.join(arguments)}: {error.stderr.decode().strip()}") from None


def copy_source(source: str, folder: Path) -> dict:
    """Copies the source's files into the folder; returns {git: commit, as in a log, sha256: {file: of it}}."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if source.startswith("git:"):
        revision = source.removeprefix("git:")
        commit = git(ROOT, "rev-parse", "--verify", revision + "^{commit}").decode().strip()
        here = git(ROOT, "ls-tree", "--name-only", commit, "./").decode().split("\n")
        for name in SOURCES:
            if name == "train_gpt.py" or name in here:
                (folder / name).write_bytes(git(ROOT, "show", f"{commit}:./{name}"))
    else:
        path = Path(source)
        if not path.is_file():
            raise AbError(f"{source}: no such file; give a train_gpt.py, git:REVISION, or fields such as '--lr 0.003'")
        shutil.copyfile(path, folder / SOURCES[0])
        if (kernels := path.with_name(SOURCES[1])).exists():
            shutil.copyfile(kernels, folder / SOURCES[1])
        try:
            describe = "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"     # as train_gpt.py does
            commit = git(path.resolve().parent, *describe).decode().strip()
        except AbError:     # no repository there
            commit = "none"
    return dict(git=commit, sha256=sha256(folder))     # the copy's log says 'git none'


def sha256(folder: Path) -> dict:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SOURCES
            if (folder / name).exists()}


def make_plan(out: Path, arguments: dict) -> dict:
    """Copies the sources and writes plan.json; or returns the one that is there, which must have these arguments."""
    path = out / "plan.json"
    if path.exists():
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            different = [f"{name}: {plan[name]!r} then, {value!r} now" for name, value in arguments.items()
                         if plan[name] != value]
            edited = [folder for side in plan["sides"] if plan["sides"][side]["sha256"]
                      != sha256(folder := out / f"source_{side}")]
        except (ValueError, KeyError, TypeError) as error:
            raise AbError(f"{path} is damaged ({error!r}); name another OUT") from None
        if different:
            raise AbError(f"{out} was started with other arguments: {'; '.join(different)}. Give those, or another OUT")
        if edited:
            raise AbError(f"{edited[0]} was edited after the start; undo that, or name another OUT")
        return plan

    strangers = [p.name for p in out.iterdir() if not re.fullmatch(r"lock|plan\.json\.part|source_[A-Z]", p.name)]
    if strangers:
        raise AbError(f"{out} has no plan.json, but holds {strangers[0]}; name a new folder")
    launch = [sys.executable]
    if arguments["nproc"] > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments['nproc']}"]
    common = parse_spec(arguments["fields"], "")[1]
    sources = [parse_spec(arguments["baseline"], str(ROOT / "train_gpt.py"))]
    sources += [parse_spec(spec, sources[0][0]) for spec in arguments["candidates"]]
    sides = {}
    for side, (source, fields) in zip(string.ascii_uppercase, sources, strict=False):
        folder = out / f"source_{side}"
        sides[side] = dict(source=source, **copy_source(source, folder), command=shlex.join([
            *launch, str(folder / SOURCES[0]), arguments["track"], *common, *fields]))
    runs = []
    for block, seed in enumerate(arguments["seeds"]):
        names = [f"{block:02}_{side}_seed{seed}" for side in sides]
        runs += reversed(names) if block % 2 else names
    tests = len(arguments["candidates"]) * (len(arguments["looks"]) + 1)
    looks = " or ".join(map(str, arguments["looks"]))
    plan = dict(**arguments, alpha_each=arguments["alpha"] / tests, rule=(
        f"number of blocks: {len(arguments['seeds'])}"
        + (f", or {looks} where these decide on every candidate that has not crashed" if looks else "")
        + f"; alpha {arguments['alpha']:g}" + (f", in {tests} equal shares" if tests > 1 else "")),
        runs=runs, sides=sides)
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return plan


# The machine.

def machine() -> dict:
    """Returns load averages, mean MHz of the cores, and what nvidia-smi says, each where there is such a thing."""
    state = dict(load=[round(load, 2) for load in os.getloadavg()])
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    clocks = [float(mhz) for mhz in re.findall(r"cpu MHz\s*: ([\d.]+)", info)]
    if not clocks:
        files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
        clocks = [int(path.read_text()) / 1000 for path in files]
    if clocks:
        state["cpu_mhz"] = round(sum(clocks) / len(clocks))
    if shutil.which("nvidia-smi"):
        for name, query in (("gpus", f"--query-gpu={GPU_STATE}"), ("gpu_processes", "--query-compute-apps=pid,name")):
            result = subprocess.run(["nvidia-smi", query, "--format=csv"], capture_output=True, text=True)
            state[name] = (result.stdout or result.stderr).strip().splitlines()     # a line of names, then the values
    return state


def busy_seconds() -> float | None:
    """Returns the seconds for which the cores that we may use have been at work for anyone, other virtual machines
    included; None where there is no /proc/stat."""
    if not Path("/proc/stat").exists():
        return None
    ticks = 0
    for core, times in re.findall(r"^cpu(\d+) (.*)$", Path("/proc/stat").read_text(), re.MULTILINE):
        if int(core) in os.sched_getaffinity(0):
            user, nice, system, _, _, irq, softirq, steal = map(int, times.split()[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Returns the CPU seconds of this process and of its runs, of which only those that have ended count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# The runs.

def finished(folder: Path) -> Run | None:
    """Returns the run in the folder, where its log has the validation loss of its last step."""
    try:
        run = read_log(folder / "log.txt")
    except LogError:
        return None
    return run if run.finished else None


def put_aside(folder: Path) -> None:
    """Moves what a run that was cut off has left; from where it stood, its time would not be that of one run."""
    aside = folder.parent / "aside"
    aside.mkdir(exist_ok=True)
    place = aside / f"{folder.name}_{len(list(aside.glob(f'{folder.name}_*'))) + 1}"
    folder.rename(place)
    print(f"{folder.name}  did not finish: now in {place}, and run anew")


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def start_run(out: Path, name: str, command: list[str], lock) -> None:
    """Runs the command to its end and adds a line to runs.jsonl, whose outcome is finished, crashed or stopped."""
    folder, side = out / name, block_and_side(name)[1]
    if folder.exists():
        put_aside(folder)
    folder.mkdir()
    line = dict(run=name, start=now(), before=machine())
    if others := line["before"].get("gpu_processes", [])[1:]:
        print(f"warning: before {name}, others are on the GPUs: {'; '.join(others)}")
    # The copies may lie in this repository, whose commit need not be theirs: their logs are to say 'git none'.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(out)}
    started, busy, own = time.monotonic(), busy_seconds(), own_seconds()
    with open(folder / "console.txt", "wb") as console:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=console,
                                   stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[lock.fileno()])
    stopped = False
    try:
        while process.poll() is None:
            try:
                process.wait(SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                line["during"] = machine()
    except SystemExit:
        stopped = True
        stop(process)
        raise
    finally:
        seconds = time.monotonic() - started
        line.update(end=now(), seconds=round(seconds, 1), status=process.returncode, after=machine())
        line["outcome"] = "stopped" if stopped else "finished" if finished(folder) else "crashed"
        others = None if busy is None else (busy_seconds() - busy - own_seconds() + own) / seconds
        line["others_cores"] = others and round(others, 2)
        with open(out / "runs.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if others is not None and others > OTHERS * cores():
        print(f"warning: while {name} ran, others used {others:.1f} of the {cores()} cores, which may cost it time")
    if line["outcome"] == "crashed":
        tail = (folder / "console.txt").read_text(errors="replace").strip().splitlines()[-10:]
        print(f"{name}  crashed: exit status {process.returncode}; {shlex.join(command)}\n"
              + "\n".join(f"    {text}" for text in tail or ["(it printed nothing)"]))
        if side == "A":
            raise AbError(f"the baseline crashed, see above and {folder / 'console.txt'}; where the plan is right, the "
                          "same command goes on with it, else name another OUT")


def stop(process: subprocess.Popen) -> None:
    """Ends a run and its processes: by SIGTERM, then, or on a second Ctrl-C, by SIGKILL."""
    print("stopping the run", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):     # it has just ended; the second is macOS's word for that
            pass
        try:
            process.wait(STOP_SECONDS)
            return
        except (subprocess.TimeoutExpired, SystemExit):
            continue


def read_outcomes(out: Path) -> dict[str, str]:
    """Returns {run: its last outcome} of runs.jsonl."""
    path, outcomes = out / "runs.jsonl", {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            outcomes[line["run"]] = line["outcome"]
        except (ValueError, KeyError, TypeError):
            raise AbError(f"{path}, line {number}: is damaged; delete that line") from None
    return outcomes


def judge(out: Path, plan: dict, side: str, names: list[str]) -> Result:
    """Compares a candidate with the baseline by the runs of these names."""
    a, b = ([read_log(out / name) for name in names if block_and_side(name)[1] == letter] for letter in ("A", side))
    return compare(a, b, plan["metric"], plan["alpha_each"], candidate=side)


def experiment(out: Path, plan: dict, lock) -> int:
    """Runs what the plan has and is not finished, and prints the verdicts; returns the exit status."""
    outcomes, candidates = read_outcomes(out), list(plan["sides"])[1:]
    crashed, in_a_row = {side: [] for side in candidates}, dict.fromkeys(candidates, 0)
    num_blocks, size, done = len(plan["seeds"]), len(plan["sides"]), []
    for block in range(num_blocks):
        seconds = {}
        for name in plan["runs"][block * size:(block + 1) * size]:
            done.append(name)
            side, run, before = block_and_side(name)[1], finished(out / name), ["(was there)"]
            if not run and side != "A" and outcomes.get(name) == "crashed":
                print(f"{name}  crashed before, see {out / name / 'console.txt'}")
            elif not run and in_a_row.get(side, 0) >= CRASHES:
                print(f"{name}  not started: {side} crashed {CRASHES} times in a row")
                continue
            elif not run:
                command = [*shlex.split(plan["sides"][side]["command"]), "--seed", str(plan["seeds"][block]),
                           "--log_dir", str(out), "--run_id", name]
                start_run(out, name, command, lock)
                run, before = finished(out / name), []
            if not run:
                crashed[side].append(name)
                in_a_row[side] += 1
                continue
            in_a_row[side] = 0
            seconds[side], loss = run.final
            ratios = [f"{other}/A {seconds[other] / seconds['A']:.3f}" for other in seconds
                      if "A" in seconds and (side == "A") != (other == side)]
            print(f"{name}  loss {loss:.4f}  {seconds[side]:.2f} s", *ratios, *before, sep="  ")
        going = [side for side in candidates if not crashed[side]]
        if going and block + 1 in plan["looks"] and not any((out / name).exists() for name in plan["runs"][len(done):]):
            results = [judge(out, plan, side, done) for side in going]
            print(f"look after {block + 1} of {num_blocks} blocks: "
                  + "; ".join(f"{result.candidate} {result.verdict}" for result in results))
            if all(result.decision != "not decided" for result in results):
                break

    for side in candidates:
        print(f"\n{side}, {plan['candidates'][candidates.index(side)] or 'the baseline again'}, against A:")
        if crashed[side]:
            print(f"verdict: not decided ({side} crashed: {', '.join(crashed[side])})")
        else:
            print(report(judge(out, plan, side, done)))
    return 1 if any(crashed.values()) else 0


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the experiment, new or to go on with")
    parser.add_argument("--metric", choices=METRICS, required=True, help="what decides: see records/compare.py")
    parser.add_argument("--candidate", action="append", required=True, metavar="SPEC", help="again for each more")
    parser.add_argument("--baseline", default="", metavar="SPEC", help="(default: the repository's train_gpt.py)")
    parser.add_argument("--track", default="tiny", help="preset of all sides (default: tiny)")
    parser.add_argument("--fields", default="", help="of Config, for all sides, in one text: '--num_steps 200 ...'")
    parser.add_argument("--seeds", default="5", metavar="N | I,J,..", help="0 to N-1, or those named; a block each (5)")
    parser.add_argument("--looks", type=numbers, default=[], metavar="N,..", help="blocks after which it may end early")
    parser.add_argument("--alpha", type=float, default=0.05, help="chance of any wrong verdict that is taken (0.05)")
    parser.add_argument("--nproc", type=int, default=1, help="processes of a run, or GPUs; torchrun starts several (1)")
    args = parser.parse_args()

    def leave(number, frame):
        raise SystemExit(128 + number)
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    sys.stdout.reconfigure(line_buffering=True)
    try:
        out = args.out.resolve()
        try:
            seeds = numbers(args.seeds) if "," in args.seeds else list(range(int(args.seeds)))
        except ValueError:
            seeds = []
        for name, good, remedy in (
                ("fields", not parse_spec(args.fields, "")[0], "must begin with '--'; a source belongs into a SPEC"),
                ("seeds", seeds and len({*seeds}) == len(seeds), "must be a number from 1 on, or a list such as 3,4"),
                ("looks", args.looks == sorted({*args.looks} & {*range(2, len(seeds))}),
                 f"must ascend from 2 or more to less than the {len(seeds)} blocks"),
                ("alpha", 0 < args.alpha < 1, "must lie between 0 and 1, such as 0.05"),
                ("nproc", args.nproc > 0, "must be 1 or more"),
                ("candidate", len(args.candidate) < 26, "there are letters for 25")):
            if not good:
                raise AbError(f"--{name} {getattr(args, name)}: {remedy}")
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "w")     # runs inherit it, so that it is held while one of them goes on
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the end of another ab.py, or of a run that a killed one left, in {out}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        plan = make_plan(out, dict(
            metric=args.metric, alpha=args.alpha, track=args.track, fields=args.fields, seeds=seeds, looks=args.looks,
            nproc=args.nproc, baseline=args.baseline, candidates=args.candidate,
            environment={name: os.environ.get(name) for name in ENVIRONMENT}))
        print(f"plan: {len(plan['runs'])} runs in {out}; {plan['rule']}")
        if os.getloadavg()[0] > max(1, OTHERS * cores()):
            print(f"warning: the load average is {os.getloadavg()[0]:.1f}, on {cores()} cores, before the first run")
        return experiment(out, plan, lock)
    except (AbError, LogError, OSError) as error:
        sys.exit(f"ab.py: {error}")
    except SystemExit:
        print("ab.py: stopped; the same command goes on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    sys.exit(main())
