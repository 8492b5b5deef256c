#!/usr/bin/env bash
# Every check of the kit. Usage: bash tests/run.sh [STAGE ...]
# Stages: lint shell unit docker distributed nodes end_to_end docs
# Without names all of them run; a failure does not keep the next from running, and the exit status tells.
set -uo pipefail

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$KIT" || exit
STAGES=(lint shell unit docker distributed nodes end_to_end docs)
: "${VENV:=$KIT/.venv}"
export VENV OMP_NUM_THREADS=1 # the tests start several processes each

for stage; do
  [[ " ${STAGES[*]} " == *" $stage "* ]] || {
    echo "tests/run.sh: '$stage' is no stage: ${STAGES[*]}" >&2
    exit 2
  }
done
(($# == 0)) || STAGES=("$@")

bash common/shell/setup_venv.sh requirements/dev.txt || exit
# The tests of the scripts make locales of other people.
[[ -d /usr/share/i18n/charmaps ]] || apt-get install -y --no-install-recommends locales || exit
export PATH="$VENV/bin:$PATH" PYTHON="$VENV/bin/python"

status=0
report=()

# check NAME COMMAND...: runs it, and keeps how long it took and whether it failed.
check() {
  local name=$1 began=$SECONDS result=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || { result=FAILED && status=1; }
  report+=("$(printf '%-28s %4d s  %s' "$name" $((SECONDS - began)) "$result")")
}

lint() {
  local scripts
  mapfile -t scripts < <(find . -name '.?*' -prune -o -name '*.sh' -print | sort)
  check 'lint: ruff' ruff check .
  check 'lint: format' ruff format --check .
  check 'lint: mypy' mypy
  check 'lint: shellcheck' shellcheck "${scripts[@]}" .ci/run tests/shell/*.bats
  check 'lint: shfmt' shfmt -d -i 2 -ci "${scripts[@]}" .ci/run tests/shell/*.bats
  check 'lint: hadolint' hadolint docker/*.Dockerfile
}

pytest=(python -m pytest -q -p no:cacheprovider --durations=5)

for stage in "${STAGES[@]}"; do
  case $stage in
    lint) lint ;;
    shell) check shell bats tests/shell ;;
    # Two files at a time: much of a test is one process, and the tests of a file share what they made.
    unit | docker | distributed | end_to_end) check "$stage" "${pytest[@]}" -n 2 --dist loadfile "tests/$stage" ;;
    *) check "$stage" "${pytest[@]}" "tests/$stage" ;;
  esac
done

printf '\n== summary\n'
printf '%s\n' "${report[@]}"
exit "$status"
