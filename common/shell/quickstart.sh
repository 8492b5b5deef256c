# shellcheck shell=bash
# The quickstart: makes .venv where PYTHON names no other Python; then `python -m common.demo run` takes the steps.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"

flags "${NAMES[@]}"
[[ -n $PYTHON || $DRY_RUN == true ]] || (in_users_locale bash "$KIT/common/shell/setup_venv.sh")
run common.demo run
