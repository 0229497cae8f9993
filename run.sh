#!/usr/bin/env bash
# Everything from a fresh clone to a trained model and its plot:
#   ./run.sh [tiny|small] [--field value ...]     environment, data, training, plot (python train_gpt.py --help: fields)
#   ./run.sh env requirements.txt                 prints the interpreter to use, making .venv where it is needed
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

# What hardware is there: the number of GPUs, and whether one of them can train `small`.
read -r gpus large < <("$python" -c 'import torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(len(gpus), int(any((g.major, g.minor) >= (8, 0) and g.total_memory >= 20e9 for g in gpus)))')

log_dir=logs resume='' track='' own_data='' previous=''
for argument in "$@"; do
    case $previous$argument in
        --help | -h) exec "$python" train_gpt.py --help ;;
        --log_dir?*) log_dir=${argument#--log_dir=} ;;
        --resume?*) resume=${argument#--resume=} ;;
        --train_files?*) own_data=1 ;;
        tiny | small) track=$argument ;;
    esac
    case $argument in
        --*=*) previous='' ;;
        --*) previous=$argument ;;
        *) previous='' ;;
    esac
done
if [ -z "$track$resume" ]; then
    [ "$large" = 1 ] && track=small || track=tiny
    set -- $track "$@"
fi
if [ -z "$own_data$resume" ]; then
    case $track in
        tiny) "$python" data/local_text.py ;;
        small) "$python" data/fineweb.py ;;
    esac
fi

# Signals: the terminal sends Ctrl-C to the trainer too, SIGTERM has to be passed on; either way it saves and stops.
if [ "$gpus" -gt 0 ] || [ -n "${NPROC_PER_NODE:-}${NNODES:-}" ]; then
    nproc=${NPROC_PER_NODE:-$gpus}
    if [ -z "${NPROC_PER_NODE:-}" ] && { [ "$track" = tiny ] || [ "$gpus" = 0 ]; }; then
        nproc=1     # a step of tiny has 4 rows
    fi
    if [ "${NNODES:-1}" = 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
        rendezvous=(--standalone)
    else
        rendezvous=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}"
            --master_port="${MASTER_PORT:-29500}")
    fi
    launch=("$python" -m torch.distributed.run "${rendezvous[@]}" --nproc_per_node="$nproc")
else
    launch=("$python")
fi
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
    run=$resume     # a resumed run goes on in its own folder; a new one is the newest
    [ -n "$run" ] || run=$(ls -td "$log_dir"/*/ | head -n 1)
    [ -d "$run" ] || run=$(dirname "$run")
    "$python" records/plot.py "$run" || echo "run.sh: the run is whole, but its plot could not be drawn" >&2
fi
