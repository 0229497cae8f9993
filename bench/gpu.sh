#!/usr/bin/env bash
# The GPU checks of bench/README.md, in parts of under 10 minutes each, with no network:
#   bench/gpu.sh tests        the tests marked cuda
#   bench/gpu.sh optimizers   a step of each optimizer on the 124M model's matrices, and the state it takes
#   bench/gpu.sh small [--field value ...]    50 steps of the small track on local text: tokens/s, memory, compile seconds
#   bench/gpu.sh sizes        the same with other micro-batches, and eager
#   bench/gpu.sh preflight    20 steps beside what tools/plan.py projects
#   bench/gpu.sh all          all of them, in this order
# Each part writes its output to a file of OUT (default: logs/gpu) and OUT/report.md anew: hardware, versions, and of each
# part its status, seconds and last lines. PYTHON names the interpreter (default: python3; torch 2.11 or newer), GPUS the
# processes of small, sizes and preflight (default: 1). The text is the Python sources of the interpreter's own
# site-packages in GPT-2 tokens; TIKTOKEN_CACHE_DIR must name a folder with r50k_base (default: .tiktoken).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-logs/gpu} gpus=${GPUS:-1}
export TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-.tiktoken}
mkdir -p "$out"
text=(--data data/site_packages)

part() {     # NAME COMMAND...: runs it, keeps its output, status and seconds
    local name=$1 start=$SECONDS
    shift
    "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    echo "$status $((SECONDS - start))" >"$out/$name.status"
    report
    return "$status"
}

report() {
    {
        echo "# GPU checks, $(date -u +%Y-%m-%d)"
        echo
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
        "$python" -c 'import platform, torch; print("torch", torch.__version__, "python", platform.python_version())'
        git describe --always --dirty 2>/dev/null || echo "no git"
        for file in "$out"/*.status; do
            local name status seconds
            name=$(basename "$file" .status)
            read -r status seconds <"$file"
            printf '\n## %s: exit status %s, %s s\n\n```\n' "$name" "$status" "$seconds"
            tail -n 25 "$out/$name.txt"
            echo '```'
        done
    } >"$out/report.md"
}

prepare() {
    [ -f data/site_packages/val_000000.bin ] || "$python" data/local_text.py \
        "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" \
        --suffixes .py --encoding gpt2 --out data/site_packages
}

train() {     # NAME [--field value ...]
    local name=$1 launch=("$python")
    shift
    [ "$gpus" = 1 ] || launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus")
    part "$name" "${launch[@]}" train_gpt.py small --num_steps 50 --cooldown_steps 20 --val_every 0 \
        --val_tokens 524288 "${text[@]}" --log_dir "$out/runs" "$@"
}

run_part() {
    local failed=0
    case ${1:-} in
        tests) part tests "$python" -m pytest tests/test_cuda.py -v -p no:cacheprovider ;;
        optimizers) part optimizers "$python" bench/optimizers.py --device cuda --rounds 20 ;;
        small) prepare && train small "${@:2}" ;;
        sizes)
            prepare || return
            for rows in 2 8; do train "micro_batch_$rows" --micro_batch $rows || failed=1; done
            train eager --compile off || failed=1
            return $failed ;;
        preflight) prepare && part preflight "$python" tools/preflight.py --processes "$gpus" small "${text[@]}" ;;
        all)
            for each in tests optimizers small sizes preflight; do run_part $each || failed=1; done
            return $failed ;;
        *) sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//' >&2; return 2 ;;
    esac
}

run_part "$@"
