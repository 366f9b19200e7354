#!/usr/bin/env bash
# Two machines of eight GPUs under Slurm: sbatch train/multinode/slurm.sh train/recipes/dolly-v2-12b.yaml [--flags ...]
# The checkout, .venv and output_dir must be on a file system that all machines share.
# Slurm sends SIGTERM 120 s before the time is up; the run saves a checkpoint, and the same command resumes from it.
#SBATCH --job-name=dolly
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun .venv/bin/torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    --module train.finetune "$@"
