#!/usr/bin/env bash
# Step 3 on the nodes of a Slurm job, one launcher a node. Not run on a cluster. Submit it from the kit's folder:
#
#   DATASET_PATH=/data/sft LOAD_CHECKPOINT_PATH=/ckpt/start SAVE_CHECKPOINT_PATH=/ckpt/run TRAIN_MODE=finetune \
#     sbatch --nodes 2 docs/examples/slurm_train.sh
#
# The settings of step 3 come from the environment, which sbatch passes on. The same job again resumes the run.
#SBATCH --job-name=qwen
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# TERM five minutes before the time is up: the run saves and stops.
set -euo pipefail

: "${SCRIPT:=nvidia/3_run_mcore_qwen.sh}"  # or metax/, cpu/
: "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=240}" # seconds that a newer torchrun gives for this; an older one gives 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts[0]}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs that share a node need two ports
export NNODES=$SLURM_JOB_NUM_NODES MASTER_ADDR MASTER_PORT

# With MAX_RESTARTS the nodes meet at a rendezvous, which numbers them.
if ((${MAX_RESTARTS:-0})); then
  export MAX_RESTARTS RDZV_ENDPOINT=$MASTER_ADDR:$MASTER_PORT RDZV_ID=$SLURM_JOB_ID
fi

cd -- "$SLURM_SUBMIT_DIR"
# SLURM_NODEID is known on each node alone.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$1"' bash "$SCRIPT"
