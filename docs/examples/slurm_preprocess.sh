#!/usr/bin/env bash
# Step 1 as a Slurm array: each task writes a part, and the last job joins them. Not run on a cluster.
# Submit it from the kit's folder:
#
#   export INPUT=/data/text OUTPUT_PREFIX=/data/pt TOKENIZER_PATH=/models/Qwen2.5-7B
#   id=$(sbatch --parsable --array 0-7 docs/examples/slurm_preprocess.sh)
#   sbatch --dependency "afterok:$id" --export ALL,MERGE=true docs/examples/slurm_preprocess.sh
#
# A task that was ended goes on where it was when it is submitted again: --array 3, with PARTITIONS=8.
#SBATCH --job-name=qwen-data
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --requeue
set -euo pipefail

: "${SCRIPT:=nvidia/1_preprocess_pretrain.sh}" # or 1_preprocess_sft.sh; metax/, cpu/
: "${MERGE:=false}"                            # join the parts
: "${PYTHON:=.venv/bin/python}"                # for joining; in an image: python
: "${WORKERS:=${SLURM_CPUS_PER_TASK:-}}"

cd -- "$SLURM_SUBMIT_DIR"
if [[ $MERGE == true ]]; then
  exec "$PYTHON" -m common.preprocess merge --output-prefix "$OUTPUT_PREFIX"
fi
export PARTITIONS=${PARTITIONS:-$SLURM_ARRAY_TASK_COUNT} PARTITION_INDEX=$SLURM_ARRAY_TASK_ID WORKERS
exec bash "$SCRIPT"
