#!/usr/bin/env python3
"""Runs a run again: its source, checked against the recorded sha256, with its Config.

    python tools/reproduce.py records/tiny/RECORD/RUN            # says what would run, and how this machine differs
    python tools/reproduce.py records/tiny/RECORD/RUN --run      # asks, runs it, compares the final losses
    python tools/reproduce.py logs/RUN --run --yes -- --num_steps 3       # without asking, and with other options

The source runs as a program of yours, so read a stranger's first. It runs in this repository's folder, for its data,
with as many processes and CPU threads as then, and its log goes to logs/reproduce_*. On the same hardware and threads
the final loss is identical; elsewhere it should lie within three standard deviations of the mean of the runs that
differ in the seed alone. Options after -- override the Config. With other options or other data the losses are not
compared. The exit status is 0 where the loss is reproduced, or not compared.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev

from runs import ROOT, THEN, LogError, Run, changed, find_runs, printable, setting

import train_gpt

OWN_PATHS = {"log_dir", "run_id", "resume"}     # fields of Config that name folders of the original run
MOST_STDS = 3


def find_run(path: Path) -> Run:
    """Reads the run to repeat; raises LogError where it lacks what that takes."""
    runs, _ = find_runs([path])
    if len(runs) > 1:
        raise LogError(f"{path} holds {len(runs)} runs; name one, such as {path}/{runs[0].name}")
    run = runs[0]
    if run.source is None:
        raise LogError(f"{path} has no source of the sha256 that it states ({run.source_sha256}), and what is not "
                       "verified does not run; give the log as the run wrote it")
    if THEN in f"{run.source_sha256}{run.hardware}":
        raise LogError(f"{path} was resumed with another source or on other hardware, so no one command repeats it")
    return run


def options(config: dict) -> list[str]:
    """Returns the command line that gives a recorded Config, without the paths of the original run."""
    words = [config["track"]]
    for name, value in config.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if name not in OWN_PATHS | {"track"}:
            words.append(f"--{name}={text}")
    return words


def judge(run: Run, new: Run) -> tuple[bool, str]:
    """Returns (whether the loss is reproduced, the comparison in words)."""
    facts = [{**setting(one), "seed": str(one.config["seed"]), "data": f"{one.train_sha256} {one.val_sha256}"}
             for one in (run, new)]
    unfinished = [one.name for one in (run, new) if not one.finished]
    if changed(facts) or unfinished:
        reason = changed(facts) or f"{', '.join(unfinished)} has no final loss"
        return True, f"not compared: {reason}"
    then, here = run.final[1], new.final[1]
    lines = [f"final val_loss: recorded {then:.6f}, here {here:.6f}, difference {here - then:+.6f}"]
    beside = find_runs([run.folder])[0] if run.side or (run.folder / "runs.json").exists() else [run]
    losses = [other.final[1] for other in beside if other.finished and setting(other) == setting(run)]
    near = False
    if len(losses) > 1 and stdev(losses):
        distance = abs(here - fmean(losses)) / stdev(losses)
        near = distance <= MOST_STDS
        lines.append(f"recorded runs of this setting: mean {fmean(losses):.4f}, std {stdev(losses):.4f}, n = "
                     f"{len(losses)}; this one is {distance:.1f} std from the mean")
    else:
        lines.append("no other seed of this setting is recorded, so there is no std to judge by")
    verdict = "yes, identical" if here == then else f"yes, within {MOST_STDS} std of the mean" if near else "no"
    return here == then or near, "\n".join([*lines, f"reproduced: {verdict}"])


def execute(command: list[str], environment: dict) -> int:
    """Runs the command in the repository's folder; SIGTERM goes on to it, so that the trainer saves and stops."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    signal.signal(signal.SIGINT, lambda *_: None)       # a terminal sends Ctrl-C to both
    return process.wait()


def reproduce(args: argparse.Namespace, overrides: list[str]) -> int:
    run = find_run(args.run_path)
    nproc = args.nproc or run.world_size or 1
    threads = re.search(r"x (\d+) threads of", run.hardware or "")
    shown = {}
    if threads:
        shown = dict(OMP_NUM_THREADS=threads[1], CUDA_VISIBLE_DEVICES="")
        train_gpt.torch.set_num_threads(int(threads[1]))
    device = "cuda" if train_gpt.torch.cuda.is_available() and not threads else "cpu"
    hardware = train_gpt.describe_hardware(train_gpt.torch.device(device)).removeprefix("1 x ")     # of one process
    final = f"val_loss {run.final[1]:.6f} after {run.num_steps} steps, {run.final[0]:.1f} s" if run.finished else "none"
    print(f"run: {run.path}\nsource: sha256 {run.source_sha256}, as recorded; git {run.git}\nrecorded result: {final}")
    for name, here in dict(hardware=f"{nproc} x {hardware}", torch=train_gpt.torch.__version__).items():
        then = getattr(run, name)
        print(f"{name}: {then}; here {'the same' if here == then else here}")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    words = [*options(run.config), *overrides]
    print("command:", *(f"{name}={value}" for name, value in shown.items()),
          printable(shlex.join(["python", *launch, "SOURCE", *words])))
    if not args.run:
        return 0

    if not args.yes:
        if not sys.stdin.isatty():
            raise LogError("this would run code from a log, and there is no terminal to ask on; read it, then give "
                           "--yes")
        if input(f"Run this code from {run.path} on this machine? [y/N] ").strip().lower() not in ("y", "yes"):
            print("not run")
            return 1
    (ROOT / "logs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"reproduce_{run.name}_", dir=ROOT / "logs"))
    (folder / "train_gpt.py").write_text(run.source, encoding="utf-8")
    own = [f"--log_dir={folder}", "--run_id=run"]
    status = execute([sys.executable, *launch, str(folder / "train_gpt.py"), *words, *own], {**os.environ, **shown})
    if status:
        raise LogError(f"the run ended with status {status}; what it wrote is in {folder}")
    good, text = judge(run, find_run(folder / "run"))
    print(text)
    return 0 if good else 1


def main():
    arguments = sys.argv[1:]
    middle = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s RUN [--run [--yes]] [--nproc N] [-- OPTIONS]")
    parser.add_argument("run_path", type=Path, metavar="RUN", help="log, run folder, or RECORD/NAME")
    parser.add_argument("--run", action="store_true", help="run it, after a question")
    parser.add_argument("--yes", action="store_true", help="the answer to that question")
    parser.add_argument("--nproc", type=int, help="processes (default: as many as the run had)")
    args = parser.parse_args(arguments[:middle])
    try:
        sys.exit(reproduce(args, arguments[middle + 1:]))
    except LogError as error:
        sys.exit(f"reproduce.py: {error}")


if __name__ == "__main__":
    main()
