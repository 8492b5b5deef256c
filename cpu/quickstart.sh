#!/usr/bin/env bash
# The whole way on a CPU, from jsonl to a trained Hugging Face model that answers: with a tiny Qwen2.5 and sample data
# in a few minutes, or with your own model and rows. What is done already is not done again.
# 在 CPU 上走完全程：从 jsonl 到会回答问题的 Hugging Face 模型。默认用微型 Qwen2.5 和示例数据，几分钟完成；
# 也可用你自己的模型和数据。已完成的步骤不会重做。
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# Optional / 可选
: "${WORK_DIR:=}" # where all of it goes; empty: work in the kit / 输出目录；空：仓库内的 work
: "${SEED:=1}"    # of the sample, its weights and the order of samples / 示例数据、权重和样本顺序的随机种子
: "${TP:=2}"      # tensor parallel size / 张量并行
: "${GPUS:=2}"    # processes, in place of GPUs / 进程数（代替 GPU）

# Your own model and data, both or neither / 自己的模型和数据，须同时设置
: "${HF_MODEL_PATH:=}" # Hugging Face folder of a Qwen2.5 / Qwen2.5 的 Hugging Face 目录
: "${INPUT:=}"         # jsonl: conversations to fine-tune on, or rows with "text" / 对话（微调）或含 text 的行（预训练）

# For your own data / 用于自己的数据
: "${ROLES:=system}"        # instruction is the system's turn, or alpaca: the user's / instruction 属于 system 还是用户
: "${SEQ_LENGTH:=1024}"     # tokens in a sample / 样本长度
: "${TRUNCATE:=right}"      # conversations over SEQ_LENGTH: error, drop, left or right / 超长对话
: "${EPOCHS:=1}"            # passes over the data / 轮数
: "${MICRO_BATCH_SIZE:=1}"  # samples a process runs at once / 每个进程一次计算的样本数
: "${GLOBAL_BATCH_SIZE:=8}" # samples of one step / 每步的样本总数
: "${LR:=1e-5}"             # highest learning rate / 最高学习率

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/quickstart.sh
source "$VENDOR/../common/shell/quickstart.sh" "$@"
