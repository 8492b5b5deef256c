#!/usr/bin/env bats
# nvidia/setup.sh: what is missing is named before anything is installed; then the commands, in their order.
# shellcheck disable=SC2016 # a stub expands its text when it runs

bats_require_minimum_version 1.5.0
load helper

# stub NAME LINE...: a program of that name, first in PATH, with these lines of shell.
stub() {
  mkdir -p bin
  printf '%s\n' '#!/usr/bin/env bash' "${@:2}" >"bin/$1"
  chmod +x "bin/$1"
}

# A machine with two H100 that has all that is needed.
setup() {
  unset PYTHONPATH VENV CUDA_HOME CXX MAX_JOBS PYTHON_BASE
  forget_settings
  cd "$BATS_TEST_TMPDIR" || return
  mkdir -p cuda/bin cuda/include include
  touch include/Python.h cuda/include/cusparse.h
  stub nvidia-smi '[[ $* == *driver_version,compute_cap* ]] && printf "580.65.06, 9.0\n580.65.06, 9.0\n"'
  stub python3.12 'case $2 in *sysconfig*) echo '"$PWD"'/include ;; *version_info*) echo 3.12 ;; *) touch ran ;; esac'
  stub g++ 'echo 11.4.0'
  stub df 'printf "Filesystem\n/dev/x 1G 1G 100G 1%% /\n"'
  stub uname '[[ $1 == -s ]] && echo Linux || echo x86_64'
  stub nvcc 'echo "Cuda compilation tools, release 13.0, V13.0.88"'
  mv bin/nvcc cuda/bin/
  export PATH="$PWD/bin:$PATH" CUDA_HOME=$PWD/cuda VENV=$PWD/venv
  SETUP=$KIT/nvidia/setup.sh
}

@test "a dry run checks the machine, prints the commands in their order and installs nothing" {
  run -0 --separate-stderr "$SETUP" --dry-run
  [[ -z $stderr && ! -e ran && ! -e venv ]]
  [[ $(grep -c '^ok ' <<<"$output") == 9 && $(grep -c '^+ ' <<<"$output") == 3 ]]
  mapfile -t commands < <(grep '^+ ' <<<"$output")
  [[ ${commands[0]} == *"PYTHON_BASE=python3.12 VENV=$PWD/venv bash "*"/common/shell/setup_venv.sh "*"/requirements/nvidia-venv.txt" ]]
  pinned=$(sed -n 's/^transformer-engine==//p' "$KIT/requirements/nvidia-venv.txt")
  [[ ${commands[1]} == *"NVTE_PYTORCH_FORCE_BUILD=TRUE $PWD/venv/bin/python -m pip install --no-deps"*"transformer-engine-torch==$pinned" ]]
  [[ ${commands[2]} == *"PYTHON=$PWD/venv/bin/python bash "*/nvidia/doctor.sh ]]
}

@test "everything that is missing is named at once, with its remedy, and nothing starts" {
  stub nvidia-smi 'printf "535.104.05, 8.0\n535.104.05, 7.0\n"'
  stub g++ 'echo 9.4.0'
  stub python3.12 'case $2 in *sysconfig*) echo /nowhere ;; *version_info*) echo 3.11 ;; *) touch ran ;; esac'
  stub df 'printf "Filesystem\n/dev/x 1G 1G 7G 1%% /\n"'
  stub uname '[[ $1 == -s ]] && echo Linux || echo aarch64'
  rm cuda/bin/nvcc cuda/include/cusparse.h
  for flags in '' --dry-run; do
    # shellcheck disable=SC2086 # none or one
    run -2 --separate-stderr "$SETUP" $flags
    [[ $stderr == 'setup.sh: nothing was installed, missing: machine disk driver GPU Python headers nvcc toolkit compiler' ]]
    [[ $output == *'driver       535.104.05: CUDA 13, which torch is built for, needs driver 580 or later'* ]]
    [[ $output == *'2 of compute capability 7.0: bf16 needs 8.0 or later'* && $output == *'7 GB free in '* ]]
    [[ $output == *'Python       3.11: the lock is for Python 3.12: set PYTHON_BASE'* && $output == *'install python3.12-dev'* ]]
    [[ $output == *"not in CUDA_HOME=$PWD/cuda: "* && $output == *'cusparse.h: '*'whole CUDA 13 toolkit'* ]]
    [[ $output == *'9.4.0: Transformer Engine needs g++ 10 or later'* ]]
    [[ ! -e ran && ! -e venv && $output != *$'\n+ '* ]]
  done
}

@test "a machine without a GPU, a Python or a compiler is told so" {
  stub nvidia-smi 'echo "NVIDIA-SMI has failed" >&2; exit 9'
  run -2 env PYTHON_BASE=/nowhere/python CXX=/nowhere/cc "$SETUP"
  [[ $output == *'nvidia-smi reports none: install NVIDIA'* && $output == *'PYTHON_BASE=/nowhere/python is no program'* ]]
  [[ $output == *'CXX=/nowhere/cc is no compiler'* ]]
}

@test "nvcc of another CUDA is refused" {
  printf '%s\n' '#!/bin/sh' 'echo "Cuda compilation tools, release 12.4, V12.4.131"' >cuda/bin/nvcc
  run -2 "$SETUP" -n
  [[ $output == *'nvcc         12.4: Transformer Engine is built with the CUDA 13 toolkit'* && $output == *'missing: nvcc' ]]
}

@test "a step that fails ends the set-up with its status" {
  stub python3.12 'case $* in *sysconfig*) echo '"$PWD"'/include ;; *"%d.%d"*) echo 3.12 ;; "-m venv"*) exit 1 ;; esac'
  run -2 "$SETUP"
  [[ $output == *'python3.12 cannot make '*'install its venv module'* && $output != *transformer-engine-torch* ]]
}

@test "the pins are those of requirements/hopper.txt and of docs/benchmarks.md" {
  lock=$KIT/requirements/nvidia-venv.txt
  while read -r pin; do
    grep -qxF "$pin" "$lock"
  done < <(sed -n '/^[a-z]/{s/\[cu13\]//;p}' "$KIT/requirements/hopper.txt")
  measured=$(sed -n '/^## Training, compared/,/^| /p' "$KIT/docs/benchmarks.md")
  for name in torch flash-attn-4 quack-kernels megatron-core; do
    grep -qF "$name $(sed -n "s/^$name==//p" "$lock")" <<<"$measured"
  done
  for name in 'Transformer Engine' transformers; do
    found=$(sed -n "s/^$(tr ' ' - <<<"${name,,}")==\([0-9]*\.[0-9]*\)\..*/\1/p" "$lock")
    grep -qF "$name $found" <<<"$measured"
  done
  run ! grep -vE '^(#.*|[a-z0-9._-]+==[^ ]+)$' "$lock"
}
