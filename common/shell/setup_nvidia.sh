# shellcheck shell=bash
# Set-up without Docker: checks the machine, installs the lock, builds Transformer Engine's part for torch, runs the doctor.
# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
begin "$@"
((${#FLAGS[@]} == 0)) || die "nothing follows --: the settings are NAME=value before the script"

LOCK=$KIT/requirements/nvidia-venv.txt
VENV=$(realpath -m -- "${VENV:-$KIT/.venv}")
# torch 2.11 is built for CUDA 13.0, whose oldest driver is 580 (CUDA's release notes, "minimum required driver").
LEAST_DRIVER=580
LEAST_CAPABILITY=8.0 # bf16
LEAST_DISK_GB=20     # torch, CUDA's libraries and Transformer Engine, and what is built; not measured
MISSING=()

# judge WHAT FOUND OK REMEDY: prints what was found; unless OK is true, it is missing.
judge() {
  if [[ $3 == true ]]; then
    printf 'ok    %-12s %s\n' "$1" "$2"
  else
    printf 'FAIL  %-12s %s: %s\n' "$1" "$2" "$4"
    MISSING+=("$1")
  fi
}

# at_least VERSION LEAST: true or false, comparing numbers.
at_least() {
  [[ $(printf '%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]] && echo true || echo false
}

# Driver and compute capability of the GPUs, as nvidia-smi reports them.
check_gpus() {
  local found driver capability
  if ! found=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null) || [[ -z $found ]]; then
    judge GPU 'nvidia-smi reports none' false "install NVIDIA's driver $LEAST_DRIVER or later"
    return
  fi
  driver=$(cut -d, -f1 <<<"$found" | sort -V | head -n 1)
  capability=$(cut -d, -f2 <<<"$found" | tr -d ' ' | sort -V | head -n 1)
  judge driver "$driver" "$(at_least "$driver" "$LEAST_DRIVER")" \
    "CUDA 13, which torch is built for, needs driver $LEAST_DRIVER or later: update it, or use docker/nvidia.Dockerfile"
  judge GPU "$(wc -l <<<"$found") of compute capability $capability" "$(at_least "$capability" "$LEAST_CAPABILITY")" \
    "bf16 needs $LEAST_CAPABILITY or later (A100, H100)"
}

# The Python of the lock, with what is needed to make .venv and to build against it.
check_python() {
  local version header
  if ! version=$("$PYTHON_BASE" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
    judge Python "PYTHON_BASE=$PYTHON_BASE is no program" false "install Python 3.12, or set PYTHON_BASE to it"
    return
  fi
  judge Python "$version" "$([[ $version == 3.12 ]] && echo true || echo false)" \
    'the lock is for Python 3.12: set PYTHON_BASE to it'
  header=$("$PYTHON_BASE" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  judge headers "$header" "$([[ -f $header ]] && echo true || echo false)" \
    'Transformer Engine is built against it: install python3.12-dev'
}

# What builds Transformer Engine's part for torch. Its headers of cuDNN and NCCL come with torch's own packages.
check_compilers() {
  local version header
  version=$("$CUDA_HOME/bin/nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p') || version=
  judge nvcc "${version:-not in CUDA_HOME=$CUDA_HOME}" "$([[ $version == 13.* ]] && echo true || echo false)" \
    'Transformer Engine is built with the CUDA 13 toolkit: install it (cuda-toolkit-13-0), or set CUDA_HOME to it'
  header=$CUDA_HOME/include/cusparse.h # torch's headers include it
  judge toolkit "$header" "$([[ -f $header ]] && echo true || echo false)" \
    'Transformer Engine needs the headers of the whole CUDA 13 toolkit, not nvcc alone: install cuda-toolkit-13-0'
  version=$("$CXX" -dumpfullversion -dumpversion 2>/dev/null) || version=
  judge compiler "${version:-CXX=$CXX is no compiler}" "$(at_least "${version:-0}" 10)" \
    'Transformer Engine needs g++ 10 or later: install it, or set CXX'
}

check_machine() {
  local free parent=$VENV
  judge machine "$(uname -s) $(uname -m)" "$([[ $(uname -s)-$(uname -m) == Linux-x86_64 ]] && echo true || echo false)" \
    'the lock is for Linux x86_64: use docker/nvidia.Dockerfile'
  while [[ ! -e $parent ]]; do parent=$(dirname -- "$parent"); done
  free=$(df -P -BG -- "$parent" | awk 'NR == 2 { print $4 + 0 }')
  judge disk "$free GB free in $parent" "$(at_least "$free" "$LEAST_DISK_GB")" \
    "the environment needs about $LEAST_DISK_GB GB: free some, or set VENV to a larger disk"
}

# perform WORD...: runs the command; a dry run prints it.
perform() {
  if [[ $DRY_RUN == true ]]; then
    printf '+ %s\n' "$(quoted "$@")"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# header_folder NAME: the folder of that header in the environment, of one of torch's own packages.
header_folder() {
  local found
  found=$(find "$VENV"/lib/python3.12/site-packages/nvidia -name "$1" -print -quit 2>/dev/null)
  [[ -n $found ]] || die "$1 is not in $VENV, where torch's packages should bring it: install cuDNN's and NCCL's headers"
  dirname -- "$found"
}

# PyPI has the source of transformer-engine-torch alone. It is compiled here, never fetched ready-made from a release
# page, which no index pins.
build_transformer_engine() {
  local version headers="$VENV/lib/python3.12/site-packages/nvidia/*/include"
  version=$(sed -n 's/^transformer-engine==//p' "$LOCK")
  [[ $DRY_RUN == true ]] || headers=$(header_folder cudnn.h):$(header_folder nccl.h)
  perform env "PATH=$VENV/bin:$CUDA_HOME/bin:$PATH" "CPATH=$headers" "CUDA_HOME=$CUDA_HOME" "CXX=$CXX" "MAX_JOBS=$MAX_JOBS" \
    NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE "$VENV/bin/python" -m pip install --no-deps --no-build-isolation \
    "transformer-engine-torch==$version"
}

check_machine
check_gpus
check_python
check_compilers
if ((${#MISSING[@]})); then
  say "nothing was installed, missing: ${MISSING[*]}"
  exit 2
fi
perform env "PYTHON_BASE=$PYTHON_BASE" "VENV=$VENV" bash "$KIT/common/shell/setup_venv.sh" "$LOCK"
build_transformer_engine
perform env "PYTHON=$VENV/bin/python" bash "$VENDOR/doctor.sh"
