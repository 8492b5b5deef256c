#!/usr/bin/env bash
# Makes .venv on a GPU machine without Docker: the environment of docs/benchmarks.md. Not run on hardware.
# 在没有 Docker 的 GPU 机器上建立 .venv：docs/benchmarks.md 的环境。未在硬件上运行过。
# It checks driver, GPU, Python and compiler before it downloads gigabytes, and ends with the doctor.
# 下载数 GB 之前先检查驱动、GPU、Python 和编译器，最后运行 doctor。
: "${BASH_VERSION:?this is a bash script, run it so / 请用 bash 运行: bash $0}"
set -euo pipefail
VENDOR=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")

# Where and with what / 位置与工具
: "${PYTHON_BASE:=python3.12}"    # the Python that .venv is made from, 3.12 with its headers / 用于建立 .venv 的 Python 3.12（含头文件）
: "${VENV:=}"                     # folder of the environment; empty: .venv in the kit / 环境的目录；空：本仓库的 .venv
: "${CUDA_HOME:=/usr/local/cuda}" # CUDA 13 toolkit with bin/nvcc / CUDA 13 工具包，含 bin/nvcc
: "${CXX:=g++}"                   # C++ compiler, version 10 or later / C++ 编译器（10 或更高版本）
: "${MAX_JOBS:=4}"                # compilers at once; each takes some 4 GiB / 同时运行的编译器数，每个约 4 GiB

# shellcheck source=env.sh
source "$VENDOR/env.sh"
# shellcheck source=../common/shell/setup_nvidia.sh
source "$VENDOR/../common/shell/setup_nvidia.sh" "$@"
