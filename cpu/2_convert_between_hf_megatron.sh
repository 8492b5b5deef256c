#!/usr/bin/env bash
# Step 2 on a CPU: a Hugging Face model to a Megatron checkpoint, or back to safetensors.
# 第 2 步（CPU）：Hugging Face 模型与 Megatron 检查点互相转换。
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# Needed / 必填
: "${CONVERT_TYPE:=}"         # huggingface-to-megatron or megatron-to-huggingface / 转换方向
: "${LOAD_CHECKPOINT_PATH:=}" # folder that is read; a Hugging Face one also by its id / 读取的目录；Hugging Face 模型也可写 ID
: "${SAVE_CHECKPOINT_PATH:=}" # folder that is written / 写入的目录

# Either way / 两个方向
: "${DTYPE:=}" # of the written weights: bf16, fp16 or fp32; empty: as they are / 写出权重的类型；空：不变

# huggingface-to-megatron / 转为 Megatron
: "${TP:=1}"                   # of torch format: tensor parallel size / torch 格式的张量并行
: "${PP:=1}"                   # of torch format: pipeline parallel size / torch 格式的流水线并行
: "${VPP:=1}"                  # of torch format: virtual chunks a rank / torch 格式的虚拟流水线块数
: "${PIPELINE_LAYERS:=}"       # layers of each stage, as 7,7,8,6; empty: even / 各阶段的层数，如 7,7,8,6；空：均分
: "${CKPT_FORMAT:=torch_dist}" # torch_dist: loads at any TP, PP; torch: at those above / torch_dist 可在任意 TP、PP 下加载；torch 只能在上面的
: "${TRANSFORMER_IMPL:=local}" # names of the weights: transformer_engine or local / 权重命名
: "${NEW_TOKENS:=}"            # file of tokens to add to the model, a JSON line each / 要加入模型的新词元文件，每行一个 JSON

# megatron-to-huggingface / 转为 Hugging Face
: "${HF_MODEL_PATH:=}"        # config.json and tokenizer; empty: what the checkpoint carries / 空：取检查点自带的文件
: "${MAX_SHARD_SIZE:=5GB}"    # largest safetensors file / 单个 safetensors 文件上限
: "${AVERAGE:=1}"             # the mean of so many of the newest checkpoints / 最新若干个检查点的平均
: "${EXPORT:=merged}"         # of a LoRA adapter: merged weights, or adapter: a PEFT folder / LoRA：合并后的权重，或 PEFT 目录
: "${BASE_CHECKPOINT_PATH:=}" # to merge: the weights that it adds to; empty: where the run read them / 合并用的原权重；空：训练时的位置

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/convert.sh
source "$VENDOR/../common/shell/convert.sh" "$@"
