#!/usr/bin/env bash
# Installs the kit's packages beside those of a vendor's base image, none of which may change.
#
# Usage: [NAME=value ...] bash docker/install.sh MEGATRON_CORE REQUIREMENTS
#
#   MEGATRON_CORE                         its version; installed without dependencies, for its metadata asks for a newer torch
#   PYTHON=python3                        the base image's Python
#   CONSTRAINTS=/opt/kit/constraints.txt  the base's packages, written before the first pip and used by every one
#   OLDEST_CUDA                           refuse a torch that was built for an older CUDA
#   WHEELS                                folder of wheels that docker/build_extensions.sh made
set -euo pipefail

MEGATRON_CORE=$1 REQUIREMENTS=$2
: "${PYTHON:=python3}" "${CONSTRAINTS:=/opt/kit/constraints.txt}" "${OLDEST_CUDA:=}" "${WHEELS:=}"
HERE=$(dirname -- "${BASH_SOURCE[0]}")

die() {
  printf 'docker/install.sh: %s\n' "$*" >&2
  exit 1
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "the base image's $("$PYTHON" --version) is too old: take a base with Python 3.10 or later"
"$PYTHON" "$HERE/base.py" constraints >"$CONSTRAINTS"
grep '^torch==' "$CONSTRAINTS" || die "the base image has no torch: take one that brings it"
[[ -z $OLDEST_CUDA ]] || "$PYTHON" "$HERE/base.py" cuda "$OLDEST_CUDA"

# Set for every pip below. The base's own constraint file (NGC from 25.03) gives way: it pins small tools too, and what
# the vendor built is in ours. Wheels alone: nothing is compiled here, so no compiler is asked for.
export PIP_CONSTRAINT=$CONSTRAINTS PIP_NO_CACHE_DIR=1 PIP_ONLY_BINARY=:all: PIP_BREAK_SYSTEM_PACKAGES=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

pip_install() {
  "$PYTHON" -m pip install "$@" ||
    die "pip could not install '$*' beside the base's packages ($CONSTRAINTS); its message stands above"
}

pip_install --no-deps "megatron-core==$MEGATRON_CORE"
pip_install -r "$REQUIREMENTS"
shopt -s nullglob
built=(${WHEELS:+"$WHEELS"/*.whl})
((${#built[@]} == 0)) || pip_install "${built[@]}"
"$PYTHON" "$HERE/base.py" compare "$CONSTRAINTS"
# What was built here is held from now on as well.
[[ -n ${PIP_DRY_RUN:-} ]] || "$PYTHON" "$HERE/base.py" constraints >"$CONSTRAINTS"
