# shellcheck shell=bash
# The doctor: `python -m common.doctor` in the machine's environment.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"

run common.doctor
