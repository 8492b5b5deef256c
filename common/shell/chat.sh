# shellcheck shell=bash
# Step 4: the settings become one `python -m common.chat`.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"

need HF_MODEL_PATH
flags "${NAMES[@]}"
run common.chat
