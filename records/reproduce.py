#!/usr/bin/env python3
"""Runs a run again from its log: its source, checked against the recorded sha256, with its Config.

    python records/reproduce.py records/tiny/RECORD/RUN.txt              # says what would run, here and then
    python records/reproduce.py records/tiny/RECORD/RUN.txt --run        # asks, runs it, compares the final losses
    python records/reproduce.py LOG --run --yes -- --num_steps 3         # with no question, and with other options
    python records/reproduce.py LOG --out old_train_gpt.py               # the source alone

The source runs as a program of yours, so look at a stranger's first (--out). It runs in this repository's folder, for
its data/, with as many processes and CPU threads as then, on the CPU where the log is of one, and its own log goes to
logs/reproduce_*. On the same hardware and threads the loss is identical; elsewhere it should lie within three spreads
(standard deviations) of the mean of the record's runs that differ in the seed alone. Options after -- override the
Config. The exit status is 0 where the loss is reproduced, or options keep it from being compared.
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

from compare import changed, setting
from leaderboard import ROOT, read_record
from logs import THEN, LogError, Run, read_log

import train_gpt

OWN_PATHS = {"log_dir", "run_id", "resume"}     # fields of Config that name folders of the original run
SPREADS = 3     # that a loss may lie from the record's mean


def find_run(path: Path) -> Run:
    """Reads a log that can be run again; raises LogError where the log lacks what that takes, or was tampered with."""
    run = read_log(path)
    if run.kind != "train_gpt.py":
        raise LogError(f"{path} is a log of {run.kind}; this runs those of train_gpt.py")
    if run.source is None:
        raise LogError(f"{path} has no source, and none of its sha256 ({run.source_sha256}) is kept beside it; give "
                       "the log as the run wrote it")
    if THEN in f"{run.source_sha256}{run.hardware}":
        raise LogError(f"{path} was resumed with another source or on other hardware, so no one command repeats it")
    return run


def options(config: dict) -> list[str]:
    """Returns the command line that gives a recorded Config, without the paths of the original run."""
    values = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in config.items()}
    return [config["track"], *(f"--{name}={value}" for name, value in values.items()
                               if name not in OWN_PATHS | {"track"})]


def prepare(config: dict) -> str:
    """Returns the program that makes the data; of an older Config, which does not name it, today's of its track."""
    return config.get("prepare") or train_gpt.make_config(dict(track=config["track"])).prepare


def data_here(run: Run) -> dict[str, str]:
    """Returns {option: what is wrong with its files here}; reads the shards that the run would, as it would."""
    config, wrong = run.config, {}
    tokens = dict(train=sum(run.batch_tokens), val=config["val_tokens"])
    c = argparse.Namespace(**{**config, "prepare": prepare(config)})
    for split, recorded in (("train", run.train_sha256), ("val", run.val_sha256)):
        option = f"{split}_files"
        try:
            here = train_gpt.Rows(option, config[option], c, tokens[split] // c.seq_len).sha256
        except (train_gpt.RunError, OSError) as error:
            wrong[option] = str(error)
        else:
            if here != recorded:
                wrong[option] = f"{config[option]} has the sha256 {here}, the run's had {recorded}"
    return wrong


def alike(run: Run) -> list[Run]:
    """Returns the finished runs of the log's record that differ from it in the seed alone, itself among them."""
    path = run.path.resolve()
    record = next((folder for folder in path.parents if folder.parent.parent == ROOT / "records"), None)
    runs = read_record(record) if record else [run]
    return [other for other in runs if other.finished and setting(other) == setting(run)]


def judge(run: Run, new: Run) -> tuple[bool, str]:
    """Returns (whether the loss is reproduced, the comparison in words)."""
    what = [changed([{**setting(one), "seed": str(one.config["seed"]), "data": f"{one.train_sha256} {one.val_sha256}"}
                     for one in (run, new)])]
    what += [f"{one.path} has no final loss" for one in (run, new) if not one.finished]
    if any(what):
        return True, f"not compared: {'; '.join(filter(None, what))}"
    then, here = run.final[1], new.final[1]
    lines = [f"final val_loss: recorded {then:.6f}, here {here:.6f}, difference {here - then:+.6f}"]
    losses = [other.final[1] for other in alike(run)]
    near = False
    if len(losses) > 1 and stdev(losses):
        distance = abs(here - fmean(losses)) / stdev(losses)
        near = distance <= SPREADS
        lines.append(f"the record: mean {fmean(losses):.4f}, spread {stdev(losses):.4f}, n = {len(losses)}; here "
                     f"{distance:.1f} spreads from the mean, {abs(here - then) / stdev(losses):.1f} from this run")
    else:
        lines.append("the record has no other seed of this setting, so no spread to judge by")
    verdict = "yes, identical" if here == then else f"yes, within {SPREADS} spreads of the mean" if near else "no"
    return here == then or near, "\n".join([*lines, f"reproduced: {verdict}"])


def execute(command: list[str], environment: dict) -> int:
    """Runs the command in the repository's folder; signals go on to it, so that the trainer saves and stops."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    for number in (signal.SIGINT, signal.SIGTERM):     # a terminal sends Ctrl-C to both
        signal.signal(number, lambda number, _: process.send_signal(number) if number == signal.SIGTERM else None)
    return process.wait()


def main():
    arguments = sys.argv[1:]
    middle = arguments.index("--") if "--" in arguments else len(arguments)
    overrides = arguments[middle + 1:]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s LOG [--run [--yes]] [--nproc N] [--out FILE] [-- OPTIONS]")
    parser.add_argument("log", type=Path, metavar="LOG", help="log or run folder")
    parser.add_argument("--run", action="store_true", help="run it, after a question")
    parser.add_argument("--yes", action="store_true", help="the answer to that question")
    parser.add_argument("--nproc", type=int, help="processes (default: as many as the run had)")
    parser.add_argument("--out", type=Path, help="file to write the source to")
    args = parser.parse_args(arguments[:middle])
    try:
        sys.exit(reproduce(args, overrides))
    except LogError as error:
        sys.exit(f"reproduce.py: {error}")


def reproduce(args: argparse.Namespace, overrides: list[str]) -> int:
    run = find_run(args.log)
    if args.out:
        if args.out.exists():
            raise LogError(f"--out {args.out} exists; name a new file")
        args.out.write_text(run.source, encoding="utf-8")
        print(f"source: {args.out}")

    # What it was, and what is here.
    nproc = args.nproc or run.world_size or 1
    threads = re.search(r"x (\d+) threads of", run.hardware or "")
    environment = dict(os.environ)
    device = "cuda" if train_gpt.torch.cuda.is_available() and not threads else "cpu"
    if threads:
        environment.update(OMP_NUM_THREADS=threads[1], CUDA_VISIBLE_DEVICES="")
        train_gpt.torch.set_num_threads(int(threads[1]))
    hardware = train_gpt.describe_hardware(train_gpt.torch.device(device)).removeprefix("1 x ")     # of one process
    here = dict(hardware=f"{nproc} x {hardware}", torch=train_gpt.torch.__version__)
    final = f"val_loss {run.final[1]:.6f} after {run.num_steps} steps, {run.final[0]:.1f} s" if run.finished else "none"
    print(f"log: {run.path}\nsource: sha256 {run.source_sha256}, as recorded; git {run.git}\nrecorded result: {final}")
    for name, value in here.items():
        print(f"{name}: {getattr(run, name)}; here {value if value != getattr(run, name) else 'the same'}")
    wrong = data_here(run)
    for option in ("train_files", "val_files"):
        print(f"{option}: {wrong.get(option, 'the same')}")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    words = [*options(run.config), *overrides]
    shown = [f"OMP_NUM_THREADS={threads[1]}", "CUDA_VISIBLE_DEVICES="] if threads else []
    print("command:", *shown, shlex.join(["python", *launch, "SOURCE", *words]))
    if not args.run:
        return 0

    if wrong and not overrides:
        raise LogError(f"the data are not the run's: {'; '.join(wrong.values())}. python {prepare(run.config)} makes "
                       f"them (--help says from what; the run had torch {run.torch}); or name other files after --, "
                       "and the loss is not compared")
    if not args.yes:
        if not sys.stdin.isatty():
            raise LogError("this would run code from a log, and there is no terminal to ask on; read it (--out FILE), "
                           "then give --yes")
        if input(f"Run this code from {run.path} on this machine? [y/N] ").strip().lower() not in ("y", "yes"):
            print("not run")
            return 1
    (ROOT / "logs").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"reproduce_{run.name}_", dir=ROOT / "logs"))
    (folder / "train_gpt.py").write_text(run.source, encoding="utf-8")
    own = [f"--log_dir={folder}", "--run_id=run"]
    status = execute([sys.executable, *launch, str(folder / "train_gpt.py"), *words, *own], environment)
    if status:
        raise LogError(f"the run ended with status {status}; what it wrote is in {folder}")
    good, text = judge(run, read_log(folder / "run"))
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    main()
