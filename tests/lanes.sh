#!/usr/bin/env bash
# The kit over the versions of its machines: each lane in a virtual environment of its own, on the CPU; then every lane
# goes on from every other's checkpoints. By hand and before a release: docs/compatibility.md has the figures.
#
# Usage: [NAME=value ...] bash tests/lanes.sh [lane ...]          without names all lanes
#
#   LANES_DIR             folder of environments, checkpoints and reports, 2 GB a lane; default: ~/.cache/qwen-lanes
#   TORCH_INDEX_URL       index for torch alone, as PyTorch's CPU index; empty: PyPI's torch without its CUDA packages,
#                         with stubs for their libraries (needs cc)
#   PYTHON_3_10, PYTHON_3_12   the Pythons; default: python3.10, python3.12

# shellcheck disable=SC2329 # step calls the functions
set -uo pipefail

# name      Python torch  megatron-core requirements            beside them
LANES='
cpu         3.10   2.13.0 0.16.1        requirements/cpu.txt
cpu-3.12    3.12   2.13.0 0.19.2        requirements/cpu.txt
ngc-24.03   3.10   2.3.0  0.14.0        requirements/nvidia.txt  numpy==1.24.4
ngc-2.11    3.12   2.11.0 0.19.2        requirements/cpu.txt
metax-2.27  3.10   2.1.2  0.11.0        requirements/metax.txt   numpy==1.24.4
metax-3.5   3.10   2.8.0  0.16.1        requirements/metax-3.txt numpy==1.26.4
'

TESTS=(
  tests/unit/model/test_kernel_calls.py tests/unit/test_doctor.py tests/unit/checkpoint/test_restricted_unpickler.py
  tests/distributed/test_{logits,training,metax,freezing,context_parallel,hangs}.py tests/end_to_end/test_scripts.py
  tests/nodes/test_{training,waiting}.py
)

case ${1:-} in -h | --help) sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0" && exit 0 ;; esac

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$KIT" || exit
: "${LANES_DIR:=${XDG_CACHE_HOME:-$HOME/.cache}/qwen-lanes}" "${TORCH_INDEX_URL:=}"
: "${PYTHON_3_10:=python3.10}" "${PYTHON_3_12:=python3.12}"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1

die() {
  printf 'tests/lanes.sh: %s\n' "$*" >&2
  exit 2
}

# lane NAME: its line of LANES.
lane() {
  grep "^$1 " <<<"$LANES"
}

# make NAME: its environment, unless it is there with these very packages.
make() {
  local name version torch megatron requirements more base stamp venv=$LANES_DIR/$1
  read -r name version torch megatron requirements more < <(lane "$1")
  base=PYTHON_${version/./_}
  stamp=$(lane "$1" | cat - "$requirements" tests/lanes/torch_without_cuda.py | sha256sum)
  [[ $(cat "$venv/made" 2>/dev/null) != "$stamp" ]] || return 0
  printf '%s: Python %s, torch %s, megatron-core %s, %s\n' "$name" "$version" "$torch" "$megatron" "$requirements $more"
  "${!base}" -m venv --clear "$venv" || die "$base=${!base} made no environment: set it to a Python $version"
  # shellcheck disable=SC2086 # several words in $more
  {
    local pip=("$venv/bin/python" -m pip install --quiet)
    if [[ -n $TORCH_INDEX_URL ]]; then
      "${pip[@]}" --index-url "$TORCH_INDEX_URL" "torch==$torch"
    else
      "${pip[@]}" --no-cache-dir --no-deps "torch==$torch" && "$venv/bin/python" tests/lanes/torch_without_cuda.py
    fi &&
      # Without its dependencies, as in the images: 0.11 requires nvidia-modelopt, which replaces torch.
      "${pip[@]}" --no-deps "megatron-core==$megatron" &&
      grep -vE '^(torch|megatron-core|wandb)==' "$requirements" |
      "${pip[@]}" -r /dev/stdin $more "$(grep '^pytest==' requirements/dev.txt)"
  } >"$venv/pip.log" 2>&1 || {
    tail -n 20 "$venv/pip.log"
    return 1
  }
  [[ $("$venv/bin/python" -c 'import torch; print(torch.__version__.split("+")[0])') == "$torch" ]] &&
    printf '%s\n' "$stamp" >"$venv/made"
}

# step WORD...: runs it, and records how long it took and whether it failed.
step() {
  local began=$SECONDS result=ok
  printf '\n== %s\n' "$*"
  "$@" || { result=FAILED && status=1; }
  report+=("$(printf '%-20s %5d s  %s' "$*" $((SECONDS - began)) "$result")")
  [[ $result == ok ]]
}

# try NAME: the tests that every lane must pass.
try() {
  "$LANES_DIR/$1/bin/python" -m pytest -q -p no:cacheprovider --durations=5 -m lane "${TESTS[@]}"
}

# save NAME: a run that stopped halfway, for the others to resume.
save() {
  local python=$LANES_DIR/$1/bin/python
  [[ -d $EXCHANGE/qwen ]] || "$python" -m tests.lanes.exchange prepare "$EXCHANGE" || return
  "$python" -m tests.lanes.exchange save "$EXCHANGE" "$1"
}

# resume NAME: resumes every lane's run.
resume() {
  "$LANES_DIR/$1/bin/python" -m tests.lanes.exchange resume "$EXCHANGE" "$1"
}

(($# > 0)) || mapfile -t < <(awk 'NF { print $1 }' <<<"$LANES")
(($# > 0)) || set -- "${MAPFILE[@]}"
for name; do [[ -n $(lane "$name") ]] || die "'$name' is no lane; the lanes are:$LANES"; done

EXCHANGE=$LANES_DIR/exchange
status=0 report=() made=()
mkdir -p "$LANES_DIR"
for name; do
  step make "$name" || continue
  made+=("$name")
  step try "$name"
  step save "$name"
done
for name in "${made[@]}"; do step resume "$name"; done

printf '\n== summary\n'
printf '%s\n' "${report[@]}"
exit "$status"
