#!/usr/bin/env bash
# Step 5 on NVIDIA: loss and perplexity of an exported model on held-out rows, and its score in choice tasks.
# 第 5 步（NVIDIA）：导出模型在留出数据上的损失和困惑度，以及选择题任务的得分。
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# Needed: the model, and INPUT or TASKS or both / 必填：模型，以及 INPUT、TASKS 之一或两者
: "${HF_MODEL_PATH:=}" # the folder that step 2 wrote, or another Qwen2 or Qwen3 / 第 2 步写出的目录，或其他 Qwen2、Qwen3
: "${INPUT:=}"         # held-out rows as in step 1; of several files each is reported, NAME=FILE as NAME / 留出的数据，可命名
: "${TASKS:=}"         # tasks of lm-evaluation-harness, by commas; needs requirements/eval.txt / 任务名，以逗号分隔

# Results / 结果
: "${OUTPUT:=}" # a new JSON file; empty: only the table / 新的 JSON 文件；空：只打印表格

# Rows: as in step 1 / 数据：与第 1 步相同
: "${FORMAT:=auto}"         # text, instruction, messages or conversations; auto: by the first row / 行的格式
: "${JSON_KEY:=text}"       # texts: the field that holds the text / 文本所在字段
: "${SPECIAL_TOKENS:=text}" # texts: special tokens in them: text, error or parse / 文本中的特殊 token
: "${ROLES:=system}"        # instruction is the system's turn, or alpaca: the user's / instruction 属于 system 还是用户
: "${LOSS_ON:=answer}"      # answer: its text and <|im_end|>; turn: the header too / 只对答案，或对整轮计损失
: "${LOSS_TURNS:=all}"      # all or last: which answers count / 计算所有回答，或只计最后一轮
: "${APPEND_EOD:=}"         # end each row with EOD_TOKEN; empty: texts true, conversations false / 每行末尾加 EOD_TOKEN
: "${EOD_TOKEN:=auto}"      # auto: <|endoftext|>; or a token's text / auto 为 <|endoftext|>，或填写某个 token

# Long rows / 超长的行
: "${SEQ_LENGTH:=}"    # most tokens at once; empty: the model's positions / 一次计算的最大长度；空：模型的位置数
: "${STRIDE:=}"        # texts: tokens from one window to the next; empty: SEQ_LENGTH / 文本窗口的步长；空：SEQ_LENGTH
: "${TRUNCATE:=error}" # conversations over SEQ_LENGTH: error, drop, left or right / 超长对话

# Tasks / 任务
: "${TASKS_PATH:=}"               # folder with task files of your own / 自己的任务文件所在目录
: "${NUM_FEWSHOT:=}"              # examples in a prompt; empty: the task's / 提示中的示例数；空：任务的默认值
: "${APPLY_CHAT_TEMPLATE:=false}" # ask in the model's chat template / 是否用对话模板提问

# Computation / 计算
: "${BATCH_SIZE:=8}" # rows, windows or questions at once / 一次计算的行数
: "${DTYPE:=}"       # bf16, fp16 or fp32; empty: as the weights are / 计算类型；空：与权重相同
: "${DEVICE:=auto}"  # auto: a GPU where there is one; or cpu, cuda, cuda:1 / auto：有 GPU 则用 GPU

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/evaluate.sh
source "$VENDOR/../common/shell/evaluate.sh" "$@"
