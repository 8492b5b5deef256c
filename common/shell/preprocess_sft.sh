# shellcheck shell=bash
# Step 1 for fine-tuning: the settings become one `python -m common.preprocess sft`.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"

need INPUT OUTPUT_PREFIX TOKENIZER_PATH
flags "${NAMES[@]}"
run common.preprocess sft
