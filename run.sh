#!/usr/bin/env bash
# Everything from a fresh clone to a trained model and its plot:
#   ./run.sh [TRACK] [--field value ...]     environment, data, training, plot (python train_gpt.py --help: fields)
#   ./run.sh env requirements.txt            prints the interpreter to use, making .venv where it is needed
# With no track named: small on a GPU of compute capability 8.0 and 20 GB or more, else tiny.
# PYTHON=python3.12 ./run.sh takes that interpreter as it is. NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and
# NPROC_PER_NODE go to torchrun: give the first four on every node of several.
set -euo pipefail
cd "$(dirname "$0")"

satisfies() { # interpreter, requirements file: whether every pinned version is installed there
    "$1" - "$2" <<'PY'
import importlib.metadata, pathlib, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

def pins(name):
    for line in filter(None, pathlib.Path(name).read_text().splitlines()):
        yield from pins(line[3:]) if line.startswith("-r ") else [Requirement(line)]

try:
    sys.exit(not all(pin.specifier.contains(importlib.metadata.version(pin.name))
                     for pin in pins(sys.argv[1]) if pin.marker is None or pin.marker.evaluate()))
except importlib.metadata.PackageNotFoundError as error:
    sys.exit(f"{error}")
PY
}

find_python() { # requirements file: prints an interpreter that satisfies it
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c 'import importlib.metadata, sys
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    version = "0.0 (none)"
if tuple(map(int, version.split()[0].split(".")[:2])) < (2, 11):
    sys.exit(f"run.sh: PYTHON={sys.executable} has torch {version}; name one with 2.11 or newer, or none")' || return 1
        echo "$PYTHON"
        return
    fi
    local python
    for python in python python3 .venv/bin/python; do
        if command -v "$python" >/dev/null && satisfies "$python" "$1" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "run.sh: installing $1 into .venv, once" >&2
            [ -x .venv/bin/pip ] || "$python" -m venv .venv >&2 || return 1
            .venv/bin/python -m pip install --disable-pip-version-check --quiet -r "$1" >&2 || return 1
            echo .venv/bin/python
            return
        fi
    done
    echo "run.sh: no Python 3.10 or newer found; install one, or name it: PYTHON=/path/to/python ./run.sh" >&2
    return 1
}

if [ "${1:-}" = env ]; then
    find_python "$2"
    exit
fi
python=$(find_python requirements.txt)

for argument in "$@"; do
    case $argument in
        --help | -h) exec "$python" train_gpt.py --help ;;
    esac
done

# What is there, and what the run will be, by the trainer's own reading of the command line.
plan=$("$python" -c '
import os, shlex, sys
import torch, train_gpt
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
large = any((g.major, g.minor) >= (8, 0) and g.total_memory >= 20e9 for g in gpus)
given, saved, chosen = train_gpt.parse_command_line(sys.argv[1:]), None, ""
try:
    if given.get("resume"):
        saved = train_gpt.load_checkpoint(given["resume"])["config"]
    elif "track" not in given:
        given["track"] = chosen = "small" if large else "tiny"
    c = train_gpt.make_config(given, saved)
except train_gpt.RunError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
for name, value in dict(
        gpus=len(gpus), chosen=chosen, prepare="" if saved or "train_files" in given else c.prepare,
        # A step with fewer tokens leaves most GPUs idle.
        processes=len(gpus) if gpus and c.batch_tokens >= 4096 * len(gpus) else 1,
        train_files=c.train_files, val_files=c.val_files, log_dir=c.log_dir,
        run=os.path.join(c.log_dir, c.run_id) if c.run_id else "").items():
    print(f"{name}={shlex.quote(str(value))}")' "$@")
eval "$plan"
[ -z "$chosen" ] || set -- "$chosen" "$@"

# The data: `prepare` is a program with its options, and the others are patterns, which may hold spaces.
[ -z "$prepare" ] || "$python" $prepare
checked=$(IFS=; "$python" data/shards.py verify $train_files $val_files) || {
    grep -v ': good: ' <<<"$checked" >&2
    exit 1
}

# Signals: the terminal sends Ctrl-C to the trainer too, SIGTERM has to be passed on; either way it saves and stops.
if [ "$gpus" -gt 0 ] || [ -n "${NPROC_PER_NODE:-}${NNODES:-}" ]; then
    if [ "${NNODES:-1}" = 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        rendezvous=(--standalone)
    else
        rendezvous=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}"
            --master_port="${MASTER_PORT:-29500}")
    fi
    launch=("$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="${NPROC_PER_NODE:-$processes}")
else
    launch=("$python")
fi
# Idle OpenMP threads sleep soon, for where other programs want the cores (bench/README.md).
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
"${launch[@]}" train_gpt.py "$@" &
trainer=$!
trap 'kill -TERM $trainer' TERM
trap : INT
status=0
wait $trainer || status=$?
while kill -0 $trainer 2>/dev/null; do     # a signal ended the wait: the trainer still saves
    status=0
    wait $trainer || status=$?
done
[ "$status" = 0 ] || exit "$status"
if [ "${NODE_RANK:-0}" = 0 ]; then
    [ -n "$run" ] || run=$(ls -td "$log_dir"/*/ | head -n 1)     # a run without a name is the newest
    "$python" records/plot.py "$run" || echo "run.sh: the run is whole, but its plot could not be drawn" >&2
fi
