# shellcheck shell=bash
# What holds for this machine, whatever the step; the settings below can be set beforehand.
# 本机环境，与步骤无关；下列设置可在运行前更改。

export KIT_PLATFORM=cpu # the file of common/platforms/ that tells what this machine can do / 平台

# This machine / 本机 (cpu/env.sh)
: "${CUDA_VISIBLE_DEVICES:=}" # hides GPUs: everything runs on the CPU / 隐藏 GPU，全部在 CPU 上运行
export CUDA_VISIBLE_DEVICES
