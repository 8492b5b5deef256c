#!/usr/bin/env bash
# Makes .venv and installs a lock into it; done already, it returns at once.
# 建立 .venv 并安装锁定的依赖；已完成时立即返回。
#
# Usage: [NAME=value ...] bash common/shell/setup_venv.sh [requirements/cpu.txt]
#
#   PYTHON_BASE=python3   the Python that .venv is made from, 3.10 or later / 用于建立 .venv 的 Python（3.10 起）
#   VENV=.venv            where it lies; default: in the kit / 位置，默认在本仓库内
#   TORCH_INDEX_URL       index for torch alone, as PyTorch's CPU index (PyPI's torch for Linux brings gigabytes of
#                         CUDA packages) / 仅用于 torch 的索引，例如 PyTorch 的 CPU 索引，可免去数 GB 的 CUDA 包
#   PIP_INDEX_URL         pip's own: a mirror for everything else / pip 自带的设置：其余依赖的镜像
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail

case ${1:-} in -h | --help) sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0" && exit 0 ;; esac

KIT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
: "${PYTHON_BASE:=python3}" "${VENV:=$KIT/.venv}" "${TORCH_INDEX_URL:=}"
REQUIREMENTS=${1:-$KIT/requirements/cpu.txt}

die() {
  printf 'setup_venv.sh: %s\n' "$*" >&2
  exit 2
}

# with_included FILE: FILE, and the files that it takes in by -r.
with_included() {
  local line
  printf '%s\n' "$1"
  while read -r line; do
    [[ $line != '-r '* ]] || printf '%s\n' "${1%/*}/${line#-r }"
  done <"$1"
}

# stamp_of FILE: the file in VENV that holds the hash of FILE as it was installed.
stamp_of() {
  printf '%s\n' "$VENV/installed-${1##*/}"
}

hash_of() {
  sha256sum <"$1"
}

installed() {
  local file
  for file in "${files[@]}"; do
    [[ -x $VENV/bin/python && $(cat "$(stamp_of "$file")" 2>/dev/null) == "$(hash_of "$file")" ]] || return 1
  done
}

[[ -f $REQUIREMENTS ]] || die "$REQUIREMENTS is no file: give one of $KIT/requirements/"
[[ $REQUIREMENTS == */* ]] || REQUIREMENTS=./$REQUIREMENTS
mapfile -t files < <(with_included "$REQUIREMENTS")
! installed || exit 0

command -v -- "$PYTHON_BASE" >/dev/null || die "PYTHON_BASE=$PYTHON_BASE is no program: install Python 3.10 or later"
"$PYTHON_BASE" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "PYTHON_BASE=$PYTHON_BASE is $("$PYTHON_BASE" --version 2>&1): set PYTHON_BASE to Python 3.10 or later"

# An interrupted start leaves a folder without pip: begin again.
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  "$PYTHON_BASE" -m venv --clear "$VENV" ||
    die "$PYTHON_BASE cannot make $VENV: install its venv module (Debian, Ubuntu: apt install python3-venv)"
fi

pip_install() {
  "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet "$@" ||
    die "pip could not install; its message stands above. A mirror is set by PIP_INDEX_URL, for torch by TORCH_INDEX_URL"
}

printf 'setup_venv.sh: installing %s into %s\n' "$REQUIREMENTS" "$VENV" >&2
if [[ -n $TORCH_INDEX_URL ]]; then
  torch=$(cat "${files[@]}" | grep -m1 '^torch==') || die "$REQUIREMENTS pins no torch: unset TORCH_INDEX_URL"
  pip_install --no-deps --index-url "$TORCH_INDEX_URL" "$torch"
fi
pip_install -r "$REQUIREMENTS"
for file in "${files[@]}"; do hash_of "$file" >"$(stamp_of "$file")"; done
