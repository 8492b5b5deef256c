# shellcheck shell=bash
# Step 5: the settings become one `python -m common.evaluate`.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"

need HF_MODEL_PATH 'INPUT|TASKS'
flags "${NAMES[@]}"
run common.evaluate
