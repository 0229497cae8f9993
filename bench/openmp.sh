#!/usr/bin/env bash
# What it costs and gains to bound the spinning of OpenMP's idle threads, in milliseconds a step of tiny with 2 threads:
# on idle cores, and with a program on each core that never sleeps. Settings in turn, forwards and backwards.
#   bench/openmp.sh [ROUNDS]     (default: 2; a minute and a half a round)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(./run.sh env requirements.txt)
out=$(mktemp -d)
settings=(GOMP_SPINCOUNT=default GOMP_SPINCOUNT=100000 GOMP_SPINCOUNT=10000 GOMP_SPINCOUNT=1000 OMP_WAIT_POLICY=passive)
backwards=("${settings[4]}" "${settings[3]}" "${settings[2]}" "${settings[1]}" "${settings[0]}")
trap 'kill $(jobs -p) 2>/dev/null; rm -r "$out"' EXIT

run() { # label, setting, steps
    local variable=(env "$2")
    [ "$2" = GOMP_SPINCOUNT=default ] && variable=(env -u GOMP_SPINCOUNT SPIN=default)
    OMP_NUM_THREADS=2 "${variable[@]}" "$python" train_gpt.py tiny --num_steps "$3" --val_every 0 --val_tokens 4096 \
        --log_dir "$out" --run_id "$1-${2/=/_}-$RANDOM$RANDOM" >/dev/null
    echo "$1 $2 $(grep -h "^step:$3/$3 train_loss" "$out"/*/log.txt | tail -n 1 | grep -o 'step_avg:[0-9.]*')"
    rm -r "$out"/*
}

echo "$(date +%F) $(nproc) cores, $(uname -m), $("$python" -c 'import torch; print("torch", torch.__version__)')"
for cores in idle busy; do
    if [ $cores = busy ]; then
        for _ in $(seq "$(nproc)"); do "$python" -S -c 'while True: pass' & done
    fi
    for _ in $(seq "${1:-2}"); do
        for setting in "${settings[@]}" "${backwards[@]}"; do
            run $cores "$setting" $([ $cores = idle ] && echo 30 || echo 12)
        done
    done
done
