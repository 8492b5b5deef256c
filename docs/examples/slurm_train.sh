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
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# USR1 five minutes before the time is up: the run saves and stops, and the job is queued again to go on. USR1 and not
# TERM, which Slurm sends when the time is up: the second TERM ends a run at once.
set -euo pipefail

: "${SCRIPT:=nvidia/3_run_mcore_qwen.sh}" # or metax/, cpu/
: "${REQUEUE:=true}"                      # queue the job again when it has stopped before the run's end
readonly STOPPED=75                       # the exit code of a run that has saved and stopped before its end
# srun does not take --cpus-per-task over from the job, from Slurm 22.05 on: each launcher would have one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}

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
status=0
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$1"' bash "$SCRIPT" || status=$?
if ((status == STOPPED)) && [[ $REQUEUE == true ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
