#!/usr/bin/env bash
# The kit's checks. Usage: bash tests/run.sh [STAGE|AREA ...]
#
#   without names   every stage, in 25 to 55 minutes on 2 cores, by the machine; it must pass before a commit
#   STAGE           lint unit shell docker distributed nodes end_to_end docs
#   AREA            data model checkpoint inference training engine estimate demo report adopt base shell: lint and what
#                   a change there can break first, in under 2 minutes on 2 cores
#
# A failed check does not stop the next one; the exit status is 1 if any failed.
set -uo pipefail

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$KIT" || exit
# When all stages run, those of the second line, which mostly wait, run beside those of the first.
STAGES=(lint unit distributed end_to_end docs)
BESIDE=(nodes docker shell)
# What each area runs after lint; every area with Python runs tests/unit/test_layers.py too.
declare -A AREAS=(
  [data]='tests/unit/data tests/end_to_end/test_preprocess_rows.py'
  [model]='tests/unit/model tests/unit/test_logits.py'
  [checkpoint]='tests/unit/checkpoint tests/end_to_end/test_convert.py tests/end_to_end/test_convert_commands.py'
  [inference]='tests/unit/inference tests/unit/evaluate tests/end_to_end/test_chat.py'
  [training]='tests/unit/training tests/unit/test_parallel.py
    tests/distributed/test_tracking.py'
  [engine]='tests/unit/engine tests/unit/test_platforms.py
    tests/unit/test_facts.py tests/unit/test_doctor.py tests/unit/test_machine.py tests/distributed/test_packing.py'
  [estimate]='tests/unit/estimate tests/distributed/test_tune.py'
  [demo]='tests/unit/demo'
  [report]='tests/unit/report tests/unit/test_trigram.py'
  [adopt]='tests/unit/adopt tests/end_to_end/test_adopt.py'
  [base]='tests/unit/test_errors.py tests/unit/test_folders.py tests/unit/test_hub.py tests/unit/test_json_file.py
    tests/unit/test_locks.py tests/unit/test_progress.py tests/unit/test_settings.py tests/docs'
  [shell]='tests/shell'
)
: "${VENV:=$KIT/.venv}"
export VENV OMP_NUM_THREADS=1 # the tests start several processes each

for name; do
  [[ " ${STAGES[*]} ${BESIDE[*]} ${!AREAS[*]} " == *" $name "* ]] || {
    echo "tests/run.sh: no stage or area '$name': ${STAGES[*]} ${BESIDE[*]}; ${!AREAS[*]}" >&2
    exit 2
  }
done

bash common/shell/setup_venv.sh requirements/dev.txt || exit
# The tests of the scripts build locales of other languages.
[[ -d /usr/share/i18n/charmaps ]] || apt-get install -y --no-install-recommends locales || exit
export PATH="$VENV/bin:$PATH" PYTHON="$VENV/bin/python"

scratch=$(mktemp -d)
beside=
trap '[[ -z $beside ]] || kill -- "-$beside" 2>/dev/null; rm -rf -- "$scratch"' EXIT

# check NAME COMMAND...: runs it, and records its time and whether it failed.
check() {
  local name=$1 began=$SECONDS result=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || result=FAILED
  printf '%-28s %4d s  %s\n' "$name" $((SECONDS - began)) "$result" >>"$scratch/report"
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
# Two files at a time, as the tests of one file share fixtures; in their order: else the longest test, which is alone in
# its file, comes last, and a core waits for it.
two=(-n 2 --dist loadfile --no-loadscope-reorder)

# run_one NAME: a stage or, where no stage has the name, an area.
run_one() {
  local paths
  case $1 in
    lint) lint ;;
    shell) check shell bats tests/shell ;;
    unit | docker | distributed | end_to_end | docs) check "$1" "${pytest[@]}" "${two[@]}" "tests/$1" ;;
    nodes) check "$1" "${pytest[@]}" "tests/$1" ;;
    *)
      read -ra paths -d '' <<<"${AREAS[$1]}"
      check "$1" "${pytest[@]}" "${two[@]}" tests/unit/test_layers.py "${paths[@]}"
      ;;
  esac
}

if (($#)); then
  for name; do
    # Lint comes before the first area.
    [[ -z ${AREAS[$name]+set} || -n ${linted:-} ]] || { lint && linted=yes; }
    run_one "$name"
  done
else
  set -m # else bash lets a background job ignore Ctrl-C, and so do the processes that the tests signal
  for name in "${BESIDE[@]}"; do run_one "$name"; done >"$scratch/beside" 2>&1 &
  beside=$!
  set +m
  for name in "${STAGES[@]}"; do run_one "$name"; done
  wait "$beside"
  beside=
  cat -- "$scratch/beside"
fi

printf '\n== summary\n'
cat -- "$scratch/report"
! grep -q 'FAILED$' "$scratch/report"
