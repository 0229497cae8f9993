#!/usr/bin/env bash
# One run on 8 GPUs of each node, under Slurm, from the root of the repository, which all nodes see:
#   sbatch launch/slurm.sh small                                # one node
#   sbatch --nodes=2 launch/slurm.sh small --save_every 500
#   sbatch launch/slurm.sh --resume logs/RUN                    # goes on from the checkpoint
# What follows the script goes to run.sh. Two minutes before the time limit the run saves a checkpoint and stops.
# Where compute nodes have no internet, first run `./run.sh env requirements.txt` and `python data/fineweb.py` on the
# login node. Add your cluster's --partition and --account. MASTER_ADDR and NPROC_PER_NODE may be set before sbatch.
# It has run on no cluster with GPUs, only on two nodes that were one machine: records/bench/2026-11-28_slurm.txt.
#SBATCH --job-name=gpt-speedrun
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.txt
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"      # Slurm runs a copy of this script from another folder

# The environment once, before all nodes would make it at the same time. data/fineweb.py has a lock.
PYTHON=$(./run.sh env requirements.txt)
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export PYTHON NNODES=$SLURM_JOB_NUM_NODES
export MASTER_ADDR=${MASTER_ADDR:-${nodes[0]}} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Slurm sends SIGTERM to every process of a task. run.sh, which would pass it on, ignores it: at a second one torchrun
# gives up while a checkpoint is written.
# shellcheck disable=SC2016     # each task has its own SLURM_NODEID
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    bash -c 'trap "" TERM; NODE_RANK=$SLURM_NODEID exec ./run.sh "$@"' run.sh "$@"
