# shellcheck shell=bash
# What holds for this machine, whatever the step; the settings below can be set beforehand. Not run on hardware.
# 本机环境，与步骤无关；下列设置可在运行前更改。未在硬件上运行。

export KIT_PLATFORM=metax # the file of common/platforms/ that tells what this machine can do / 平台

# This machine / 本机 (metax/env.sh)
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}" # Megatron-Core relies on kernels starting in order / 保证核函数按顺序启动
: "${MACA_PATH:=/opt/maca}"           # the SDK; a login over SSH lacks the image's variables / SDK 目录

: "${LD_LIBRARY_PATH:=$MACA_PATH/lib:$MACA_PATH/mxgpu_llvm/lib:$MACA_PATH/ompi/lib}" # its libraries / SDK 动态库

: "${MACA_SMALL_PAGESIZE_ENABLE:=1}" # memory in small pages, as in MetaX's own scripts / 小页内存
: "${SET_DEVICE_NUMA_PREFERRED:=1}"  # host memory near its GPU / 主机内存靠近所属 GPU
: "${MCCL_MAX_NCHANNELS:=16}"        # as in MetaX's Megatron scripts / 与 MetaX 的 Megatron 脚本一致
export CUDA_DEVICE_MAX_CONNECTIONS MACA_PATH LD_LIBRARY_PATH
export MACA_SMALL_PAGESIZE_ENABLE SET_DEVICE_NUMA_PREFERRED MCCL_MAX_NCHANNELS
