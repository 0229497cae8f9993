#!/usr/bin/env bash
# From a fresh clone to a trained model and its plot:
#   ./run.sh [TRACK] [--field value ...]     environment, data, training, plot, sample; --help lists the fields
#   ./run.sh TRACK --preflight               instead of training, 20 steps: time, memory, advice (tools/preflight.py)
#   ./run.sh env requirements.txt            prints the interpreter to use, making .venv where it is needed
# Without a track: small on a GPU with compute capability 8.0 and 20 GB, otherwise tiny. PYTHON=python3.12 ./run.sh
# takes that interpreter as it is. NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT go to torchrun.
set -euo pipefail
cd "$(dirname "$0")"

# The interpreter: the first that has the pinned packages, otherwise that of .venv.
python=${PYTHON:-} base='' requirements=requirements.txt
[ "${1:-}" != env ] || requirements=$2
has_pins='import sys, importlib.metadata, packaging.requirements
pins = map(packaging.requirements.Requirement, sys.stdin.read().splitlines())
pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
sys.exit(not all(importlib.metadata.version(pin.name) in pin.specifier for pin in pins))'
for candidate in python python3 .venv/bin/python python3.13 python3.12 python3.11 python3.10; do
    [ -z "$python" ] || break
    if grep -hv '^[-#]' requirements.txt "$requirements" | "$candidate" -c "$has_pins" 2>/dev/null; then
        python=$candidate
    elif "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        base=${base:-$candidate}
    fi
done
if [ -z "$python" ]; then
    echo "run.sh: installing $requirements into .venv, once" >&2
    [ -x .venv/bin/pip ] || "${base:?no Python 3.10 or newer was found; install one}" -m venv .venv >&2
    python=.venv/bin/python
    $python -m pip install --disable-pip-version-check --quiet -r "$requirements" >&2
fi
[ "${1:-}" != env ] || { echo "$python"; exit; }
"$python" -c 'from importlib.metadata import version as v; assert [*map(int, v("torch").split(".")[:2])] >= [2, 11]' \
    2>/dev/null || { echo "run.sh: PYTHON=$python has no torch 2.11 or newer; name another, or none" >&2; exit 1; }

preflight=''
for argument in "$@"; do
    shift
    if [ "$argument" = --preflight ]; then preflight=yes; else set -- "$@" "$argument"; fi
done

# What the run will be, by the trainer's own reading of the command line.
case " $* " in *" --help "* | *" -h "*) exec "$python" train_gpt.py --help ;; esac
plan=$("$python" -c '
import os, shlex, sys, torch, train_gpt
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
large = any(gpu.major >= 8 and gpu.total_memory >= 20e9 for gpu in gpus)
sys.argv[0] = "run.sh"
given, saved, chosen = train_gpt.parse_command_line(sys.argv[1:]), None, ""
try:
    if given.get("resume"):
        saved = train_gpt.load_checkpoint(given["resume"])["config"]
    elif "track" not in given:
        given["track"] = chosen = "small" if large else "tiny"
    c = train_gpt.make_config(given, saved)
except train_gpt.RunError as error:
    sys.exit(f"error: {error}")
save = "" if saved or "save_every" in given else f"--save_every {c.num_steps}"     # for the sample
few = train_gpt.batch_rows(c, 0) * c.seq_len     # tokens; with fewer than 4,096 each, GPUs are idle
plan = dict(chosen=chosen, save=save, steps=c.num_steps, data=c.folder, log_dir=c.log_dir,
            prepare="" if saved or "data" in given else c.prepare, run=c.run_id and os.path.join(c.log_dir, c.run_id),
            processes=len(gpus) if gpus and few >= 4096 * len(gpus) else 1)
print(*(f"{name}={shlex.quote(str(value))}" for name, value in plan.items()))' "$@")
eval "$plan"

[ -z "$prepare" ] || "$python" $prepare     # a program with its options
checked=$("$python" data/shards.py verify "$data/*train_*.bin" "$data/*val_*.bin") ||
    { grep -v ': good: ' <<<"$checked" >&2
      echo "run.sh: $data: give another --data, or move what is bad away and run this again" >&2; exit 1; }

processes=${NPROC_PER_NODE:-$processes} rendezvous=--standalone
[ -z "$preflight" ] || exec "$python" tools/preflight.py --processes "$processes" ${chosen:+"$chosen"} "$@"
if [ "${NNODES:-1}" != 1 ]; then
    rendezvous="--nnodes=$NNODES --node_rank=$NODE_RANK --master_addr=$MASTER_ADDR --master_port=${MASTER_PORT:-29500}"
    # gloo would offer other nodes the address of this one's name, often 127.0.1.1; it gets the network of MASTER_ADDR.
    if [ -z "${GLOO_SOCKET_IFNAME:-}" ] && command -v ip >/dev/null; then
        address=$(getent ahostsv4 "$MASTER_ADDR" | cut -d' ' -f1 | head -n 1) || true
        own=$(ip -o route get "$address" 2>/dev/null | sed 's/.* src \([^ ]*\).*/\1/') || true
        case $MASTER_ADDR:$own in 127.* | localhost:*) ;; *: | *:127.*)
            echo "run.sh: MASTER_ADDR $MASTER_ADDR: is ${own:-unknown} here, which no other node reaches; give its" \
                "address, or set GLOO_SOCKET_IFNAME" >&2; exit 2 ;; esac
        export GLOO_SOCKET_IFNAME=$(ip -o -4 address show to "$own" | cut -d' ' -f2 | head -n 1)
    fi
fi
launch=("$python" -m torch.distributed.run $rendezvous --nproc_per_node="$processes")
[ "$processes" != 1 ] || [ "${NNODES:-1}" != 1 ] || launch=("$python")
# Idle OpenMP threads sleep soon, and leave the cores to others. Freed memory stays with the process, which would
# otherwise give it back and fault it in again many times a second (glibc).
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1000000000}
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}     # at most, by mallopt(3)
"${launch[@]}" train_gpt.py ${chosen:+"$chosen"} "$@" $save &
trainer=$!
trap 'kill -TERM $trainer' TERM     # the terminal sends Ctrl-C to the trainer itself; either way it saves and stops
trap : INT
until wait $trainer && status=0 || status=$?; ! kill -0 $trainer 2>/dev/null; do :; done     # a signal ends a wait
[ "$status" = 0 ] || exit "$status"
[ "${NODE_RANK:-0}" = 0 ] || exit 0     # the first node has the run's folder
run=${run:-$(ls -td "$log_dir"/*/ | head -n 1)}     # a run without a name is the newest
trap 'echo "run.sh: stopped; the run itself is complete: $run" >&2; exit 130' INT
"$python" tools/plot.py "$run" || echo "run.sh: the run is complete, but its plot could not be drawn" >&2
grep -qs "^checkpoint: .* at step $steps/" "$run/log.txt" || exit 0
echo "what it writes (more: python tools/sample.py $run --interactive):"
"$python" tools/sample.py "$run" --tokens 100 ||
    echo "run.sh: the run is complete, but no sample could be written" >&2
