#!/usr/bin/env bash
# Builds wheels of Transformer Engine and apex where the base image has none, and imports what was compiled.
# With both there it makes an empty folder and needs no compiler.
#
# Usage: [NAME=value ...] bash docker/build_extensions.sh WHEELS
#
#   WHEELS                folder that the wheels go to
#   PYTHON=python3        the base image's Python
#   TRANSFORMER_ENGINE    version to build from PyPI; empty: none
#   APEX_SOURCE           where pip finds apex, pinned to a commit (PyPI's `apex` is another project); empty: none
#   CC=gcc CXX=g++        compilers, version 10 or later
#   MAX_JOBS=4            compilers at once; each takes some 4 GiB
set -euo pipefail

WHEELS=$1
: "${PYTHON:=python3}" "${TRANSFORMER_ENGINE:=}" "${APEX_SOURCE:=}" "${CC:=gcc}" "${CXX:=g++}" "${MAX_JOBS:=4}"
export CC CXX MAX_JOBS
HERE=$(dirname -- "${BASH_SOURCE[0]}")

die() {
  printf 'docker/build_extensions.sh: %s\n' "$*" >&2
  exit 1
}

# there NAME: whether the base image has the package NAME.
there() {
  "$PYTHON" -c 'import sys; from importlib.metadata import version; print(sys.argv[1], version(sys.argv[1]))' "$1" 2>/dev/null
}

# need_compiler PROGRAM: exits unless it is version 10 or later.
need_compiler() {
  local found
  found=$("$1" -dumpfullversion -dumpversion 2>/dev/null) || die "$1 is no compiler here: take a -devel base image"
  ((${found%%.*} >= 10)) ||
    die "$1 is version $found, and what is built here needs gcc and g++ 10 or later: take a newer base, or set CC and CXX"
}

# need_imports MODULE...: exits unless Python loads each; an installed package may have been built without them.
need_imports() {
  local stubs
  # The driver's library is not there in a build; the toolkit's stand-in for it has its name without the version.
  stubs=$(mktemp -d)
  ln -s "${CUDA_HOME:-/usr/local/cuda}/lib64/stubs/libcuda.so" "$stubs/libcuda.so.1"
  LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}:$stubs "$PYTHON" -c '
import importlib, sys
import torch
for name in sys.argv[1:]:
    importlib.import_module(name)' "$@" || die "built, but one of $* cannot be imported; Python's message stands above"
  rm -r "$stubs"
}

mkdir -p "$WHEELS"
missing=()
there transformer-engine || [[ -z $TRANSFORMER_ENGINE ]] || missing+=(transformer-engine)
there apex || [[ -z $APEX_SOURCE ]] || missing+=(apex)
((${#missing[@]})) || exit 0

need_compiler "$CC"
need_compiler "$CXX"
constraints=$(mktemp)
"$PYTHON" "$HERE/base.py" constraints >"$constraints"
export PIP_CONSTRAINT=$constraints PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_DISABLE_PIP_VERSION_CHECK=1
"$PYTHON" -m pip install setuptools==80.9.0 wheel==0.45.1 packaging==25.0 ninja==1.13.0 pybind11==3.0.1 cmake==4.1.2
cuda=$("$PYTHON" -c 'import torch; print(torch.version.cuda.split(".")[0])')

for name in "${missing[@]}"; do
  case $name in
    transformer-engine)
      # Compiled here, never fetched ready-made from a release page, which no index pins.
      # Newer ones than 2.11 would build expert parallelism too, which needs NCCL's newest headers.
      export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0
      "$PYTHON" -m pip wheel --no-deps --no-build-isolation -w "$WHEELS" \
        "transformer-engine==$TRANSFORMER_ENGINE" "transformer-engine-cu$cuda==$TRANSFORMER_ENGINE" \
        "transformer-engine-torch==$TRANSFORMER_ENGINE"
      "$PYTHON" -m pip install "$WHEELS"/transformer_engine*.whl
      need_imports transformer_engine.pytorch transformer_engine_torch
      ;;
    apex)
      export APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=$MAX_JOBS
      "$PYTHON" -m pip wheel --no-deps --no-build-isolation -w "$WHEELS" "$APEX_SOURCE"
      "$PYTHON" -m pip install --no-deps "$WHEELS"/apex*.whl
      need_imports amp_C fused_layer_norm_cuda fused_weight_gradient_mlp_cuda
      ;;
  esac
done
"$PYTHON" "$HERE/base.py" compare "$constraints"
