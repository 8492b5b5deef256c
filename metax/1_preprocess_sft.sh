#!/usr/bin/env bash
# Step 1 on MetaX, fine-tuning: jsonl conversations or preferences to Megatron's .bin and .idx, with a loss mask beside the tokens.
# 第 1 步（MetaX，微调）：把 jsonl 对话或偏好转换为 Megatron 的 .bin 和 .idx，并另存损失掩码。
# Not run on hardware / 未在硬件上运行
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# Needed / 必填
: "${INPUT:=}"          # .jsonl, also .gz .zst .bz2 .xz, or a JSON array; a folder, a glob or a list / 文件、目录、通配符或列表
: "${OUTPUT_PREFIX:=}"  # writes {OUTPUT_PREFIX}_text_document and _loss_mask_document / 输出文件的前缀
: "${TOKENIZER_PATH:=}" # Hugging Face folder with tokenizer.json and chat template, or an id / 含分词器和对话模板的目录，或模型 ID

# Samples / 样本
: "${FORMAT:=auto}"       # what a row looks like; auto: told from the first rows / 行的格式；auto：由开头几行判断
: "${ROLES:=system}"      # instruction is the system's turn, or alpaca: the user's / instruction 属于 system 还是用户
: "${LOSS_ON:=answer}"    # answer: its text and <|im_end|>; turn: the header too / 只对答案，或对整轮计损失
: "${LOSS_TURNS:=all}"    # all or last: which answers are learned; of preferences the last / 学习所有回答或最后一轮；偏好只学最后一轮
: "${LOSS_WEIGHTS:=auto}" # a turn's loss may be any weight; auto: by the first rows / 每轮的 loss 可为任意权重
: "${SEQ_LENGTH:=}"       # step 3's, to count what is too long; empty: 2048 and more / 第 3 步的值，仅用于统计超长样本
: "${APPEND_EOD:=false}"  # end each conversation with EOD_TOKEN / 每段对话末尾加 EOD_TOKEN
: "${EOD_TOKEN:=auto}"    # auto: <|endoftext|>; or a token's text / auto 为 <|endoftext|>，或填写某个 token
: "${ON_ERROR:=stop}"     # stop at a bad row, or skip: to {OUTPUT_PREFIX}.rejects / 遇坏行停止，或跳过并写入 .rejects

# Memory / 内存
: "${MAX_ROW_BYTES:=16777216}" # a longer row is a bad row; a byte takes 10 of memory, in tokenizers 330 / 更长的行算坏行

# Work / 运行
: "${TOKENIZER_ENGINE:=auto}" # auto: gigatoken where it is exact; or gigatoken, tokenizers / 分词引擎
: "${WORKERS:=}"              # processes; empty: one a core / 进程数；空：每核一个
: "${PARTITIONS:=1}"          # runs that share the work by PARTITION_INDEX / 分担工作的运行数（配合 PARTITION_INDEX）
: "${PARTITION_INDEX:=}"      # this share alone, from 0; then: python -m common.preprocess merge / 只处理这一份，之后合并
: "${VERIFY_INPUT:=false}"    # a finished run: compare its input by hash, not by size and time / 按哈希核对输入

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/preprocess_sft.sh
source "$VENDOR/../common/shell/preprocess_sft.sh" "$@"
