#!/usr/bin/env bash
# Step 4 on a CPU: talk to the model that step 2 exported, or let it answer a file of prompts.
# 第 4 步（CPU）：与第 2 步导出的模型对话，或让它回答一个文件中的问题。
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# Needed / 必填
: "${HF_MODEL_PATH:=}" # the folder that step 2 wrote, or another Qwen2 or Qwen3 / 第 2 步写出的目录，或其他 Qwen2、Qwen3

# What to answer / 回答什么
: "${MODE:=auto}"    # chat; complete: continue texts; auto: chat, but rows with text are continued / 对话、续写，或自动判断
: "${SYSTEM:=}"      # the system turn of conversations without one; empty: the template's / system 内容；空：模板的默认值
: "${PROMPTS:=}"     # rows as step 1 takes them, or .txt, one a line; empty: you type / 问题文件（第 1 步的格式或 .txt）；空：键盘输入
: "${OUTPUT:=}"      # with PROMPTS: a new jsonl file for the answers; empty: printed / 写入回答的新 jsonl 文件；空：打印
: "${ROLES:=system}" # as in step 1: instruction is the system's turn, or alpaca: the user's / 与第 1 步相同
: "${BATCH_SIZE:=8}" # with PROMPTS: prompts answered at once / 一次回答的问题数

# Generation; empty: what the model's generation_config.json says / 生成；空：按 generation_config.json
: "${MAX_NEW_TOKENS:=512}"  # longest answer in tokens / 回答的最大长度（token）
: "${TEMPERATURE:=}"        # 0: always the likeliest token / 0：总取概率最大的 token
: "${TOP_P:=}"              # sample from the likeliest tokens of this total probability; 1: all / 核采样；1：关闭
: "${TOP_K:=}"              # sample from so many tokens; 0: all / 只从前 K 个中采样；0：关闭
: "${REPETITION_PENALTY:=}" # above 1 against repetition / 大于 1 抑制重复
: "${SEED:=1234}"           # of sampling / 采样的随机种子

# Computation / 计算
: "${DTYPE:=}"      # bf16, fp16 or fp32; empty: as the weights are / 计算类型；空：与权重相同
: "${DEVICE:=auto}" # auto: a GPU where there is one; or cpu, cuda, cuda:1 / auto：有 GPU 则用 GPU

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/chat.sh
source "$VENDOR/../common/shell/chat.sh" "$@"
