#!/usr/bin/env bash
# Step 1 on a CPU, pretraining: jsonl text to Megatron's .bin and .idx.
# 第 1 步（CPU，预训练）：把 jsonl 文本转换为 Megatron 的 .bin 和 .idx。
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# Needed / 必填
: "${INPUT:=}"          # .jsonl, also .gz .zst .bz2 .xz, or a JSON array; a folder, a glob or a list / 文件、目录、通配符或列表
: "${OUTPUT_PREFIX:=}"  # writes {OUTPUT_PREFIX}_{JSON_KEY}_document.bin and .idx / 输出文件的前缀
: "${TOKENIZER_PATH:=}" # Hugging Face folder with tokenizer.json, or an id / 含 tokenizer.json 的目录，或模型 ID

# Documents / 文档
: "${JSON_KEY:=text}"       # the field that holds the text / 文本所在的字段
: "${APPEND_EOD:=true}"     # end each document with EOD_TOKEN / 每篇文档末尾加 EOD_TOKEN
: "${EOD_TOKEN:=auto}"      # auto: <|endoftext|>; or a token's text / auto 为 <|endoftext|>，或填写某个 token
: "${SPECIAL_TOKENS:=text}" # spelled in a document: text, error or parse / 文中的特殊 token：当作文本、报错或解析
: "${ON_ERROR:=stop}"       # stop at a bad row, or skip: to {OUTPUT_PREFIX}.rejects / 遇坏行停止，或跳过并写入 .rejects

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
# shellcheck source=../common/shell/preprocess_pretrain.sh
source "$VENDOR/../common/shell/preprocess_pretrain.sh" "$@"
