# shellcheck shell=bash
# What holds for this machine, whatever the step; the settings below can be set beforehand.
# 本机环境，与步骤无关；下列设置可在运行前更改。

export KIT_PLATFORM=nvidia # the file of common/platforms/ that tells what this machine can do / 平台

# This machine / 本机 (nvidia/env.sh)
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}" # Megatron-Core relies on kernels starting in order / 保证核函数按顺序启动
export CUDA_DEVICE_MAX_CONNECTIONS
