#!/usr/bin/env bash
# The GPU checks of bench/README.md, on one GPU, in parts of under 10 minutes each, with no network:
#   bench/gpu.sh tests       the tests marked cuda
#   bench/gpu.sh small       50 steps of the small track on local text: tokens/s, memory, compile seconds
#   bench/gpu.sh optimizers  a step of each optimizer on the 124M model's matrices, and the state it takes
#   bench/gpu.sh all         all of them
# PYTHON names the interpreter (default: python3; torch 2.11 or newer), OUT a folder for the logs (default: logs/gpu).
# The text is the Python sources of the interpreter's own site-packages in GPT-2 tokens; TIKTOKEN_CACHE_DIR must name a
# folder with r50k_base (default: .tiktoken).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-logs/gpu}
export TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-.tiktoken}
mkdir -p "$out"

tests() {
    "$python" -m pytest tests/test_cuda.py -v -p no:cacheprovider 2>&1 | tee "$out/cuda_tests.txt"
}

small() {
    local packages
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    [ -f data/site_packages/val_000000.bin ] ||
        "$python" data/local_text.py "$packages" --suffixes .py --encoding gpt2 --out data/site_packages
    "$python" train_gpt.py small --num_steps 50 --cooldown_steps 20 --val_every 0 --val_tokens 524288 \
        --train_files 'data/site_packages/train_*.bin' --val_files 'data/site_packages/val_*.bin' \
        --log_dir "$out" "${@:2}"
}

optimizers() {
    "$python" bench/optimizers.py --device cuda --rounds 20 | tee "$out/optimizers.txt"
}

case ${1:-} in
    tests) tests ;;
    small) small "$@" ;;
    optimizers) optimizers ;;
    all) tests && optimizers && small ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
