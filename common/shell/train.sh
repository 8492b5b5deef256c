# shellcheck shell=bash
# Step 3: the settings become one `python -m common.train`, which checks them and then starts one process a GPU.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"

# Old names, still accepted / 仍可使用的旧名
: "${SAVE_DIST_CHECKPOINT_PATH:=}"  # what training writes and convert reads / 训练写入、转换读取的目录
: "${SAVE_TORCH_CHECKPOINT_PATH:=}" # what convert writes, or training without the other / 转换写入的目录

one_of TRAIN_OR_CONVERT_CKPT train convert
if [[ $TRAIN_OR_CONVERT_CKPT == train ]]; then
  if [[ -n $SAVE_DIST_CHECKPOINT_PATH ]]; then
    old_name SAVE_CHECKPOINT_PATH SAVE_DIST_CHECKPOINT_PATH
    [[ -z $SAVE_TORCH_CHECKPOINT_PATH ]] || say "SAVE_TORCH_CHECKPOINT_PATH is not used: this run does not convert"
  else
    old_name SAVE_CHECKPOINT_PATH SAVE_TORCH_CHECKPOINT_PATH
  fi
  start='LOAD_CHECKPOINT_PATH|HF_MODEL_PATH'
  # A run that can be resumed needs no other start.
  [[ ! -e $SAVE_CHECKPOINT_PATH/latest_checkpointed_iteration.txt ]] || start=SAVE_CHECKPOINT_PATH
  need DATASET_PATH SAVE_CHECKPOINT_PATH "$start"
  [[ -n $TRAIN_ITERS ]] || : "${EPOCHS:=3}"
else
  old_name LOAD_CHECKPOINT_PATH SAVE_DIST_CHECKPOINT_PATH
  old_name SAVE_CHECKPOINT_PATH SAVE_TORCH_CHECKPOINT_PATH
  need LOAD_CHECKPOINT_PATH SAVE_CHECKPOINT_PATH
  [[ $(realpath -m -- "$LOAD_CHECKPOINT_PATH") != $(realpath -m -- "$SAVE_CHECKPOINT_PATH") ]] ||
    die "LOAD_CHECKPOINT_PATH and SAVE_CHECKPOINT_PATH are both $LOAD_CHECKPOINT_PATH: convert writes to another folder"
fi
flags "${NAMES[@]}"
run common.train
