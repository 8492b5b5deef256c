# shellcheck shell=bash
# Step 2: the settings become one `python -m common.convert`, whose subcommand is CONVERT_TYPE.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"

need CONVERT_TYPE LOAD_CHECKPOINT_PATH SAVE_CHECKPOINT_PATH
one_of CONVERT_TYPE huggingface-to-megatron megatron-to-huggingface
if [[ $CONVERT_TYPE == huggingface-to-megatron ]]; then
  flags LOAD_CHECKPOINT_PATH SAVE_CHECKPOINT_PATH TP PP VPP PIPELINE_LAYERS CKPT_FORMAT TRANSFORMER_IMPL DTYPE NEW_TOKENS
  run common.convert hf-to-megatron
else
  # TP, PP and the format are those of the checkpoint that is read.
  flags LOAD_CHECKPOINT_PATH SAVE_CHECKPOINT_PATH HF_MODEL_PATH DTYPE MAX_SHARD_SIZE AVERAGE EXPORT BASE_CHECKPOINT_PATH
  run common.convert megatron-to-hf
fi
