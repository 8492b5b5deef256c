#!/usr/bin/env bash
# Step 1 on a CPU, pretraining: jsonl text to Megatron's .bin and .idx.
# 第 1 步（CPU，预训练）：把 jsonl 文本转换为 Megatron 的 .bin 和 .idx。
set -euo pipefail
VENDOR=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# Needed / 必填
: "${INPUT:=}"          # a .jsonl file, a folder of them or a glob / jsonl 文件、目录或通配符
: "${OUTPUT_PREFIX:=}"  # writes {OUTPUT_PREFIX}_{JSON_KEY}_document.bin and .idx / 输出文件的前缀
: "${TOKENIZER_PATH:=}" # Hugging Face folder with tokenizer.json / 含 tokenizer.json 的目录

# Optional / 可选
: "${JSON_KEY:=text}"   # the field that holds the text / 文本所在的字段
: "${APPEND_EOD:=true}" # end each document with EOD_TOKEN / 每篇文档末尾加 EOD_TOKEN
: "${EOD_TOKEN:=auto}"  # auto: <|endoftext|>; or a token's text / auto 为 <|endoftext|>，或填写某个 token
: "${WORKERS:=}"        # processes; empty: one a core / 进程数；空：每核一个
: "${PARTITIONS:=1}"    # parts that are written apart, then joined / 分几份处理后合并

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/preprocess_pretrain.sh
source "$VENDOR/../common/shell/preprocess_pretrain.sh" "$@"
