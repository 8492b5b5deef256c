# shellcheck shell=bash
# What holds for this machine, whatever the step; the settings below can be set beforehand. Not run on hardware.
# 本机环境，与步骤无关；下列设置可在运行前更改。未在硬件上运行。
# Nothing here is of one site: network cards and sockets (MCCL_IB_HCA, MCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) are
# yours to set. docs/metax.md tells what MetaX's own scripts set besides, and why it is left out.

export KIT_PLATFORM=metax # the file of common/platforms/ that tells what this machine can do / 平台

# From MetaX's documents: this machine / MetaX 文档：本机 (metax/env.sh)
: "${MACA_PATH:=/opt/maca}" # the SDK; a login over SSH lacks the image's variables / SDK 目录；SSH 登录时没有镜像的环境变量

: "${LD_LIBRARY_PATH:=$MACA_PATH/lib:$MACA_PATH/mxgpu_llvm/lib:$MACA_PATH/ompi/lib}" # its libraries / SDK 动态库

# From MetaX's training scripts / MetaX 训练脚本中的取值
: "${MACA_SMALL_PAGESIZE_ENABLE:=1}" # device memory in small pages / 小页显存
: "${SET_DEVICE_NUMA_PREFERRED:=1}"  # host memory near its GPU / 主机内存靠近所属 GPU
: "${MCCL_MAX_NCHANNELS:=16}"        # channels of a collective; unset, MCCL chooses / 集合通信通道数

# Of MACA 3, both empty where the folder is missing / MACA 3 的变量；没有该目录时为空
: "${CUDA_PATH:=/root/cu-bridge/CUDA_DIR}" # CUDA's names over MACA / MACA 上的 CUDA 目录
: "${CUCC_CMAKE_ENTRY:=2}"                 # how its compiler is started / 其编译器的启动方式

# Chosen here / 本套件的选择
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}" # Megatron-Core relies on kernels starting in order / 保证核函数按顺序启动
export MACA_PATH LD_LIBRARY_PATH
export MACA_SMALL_PAGESIZE_ENABLE SET_DEVICE_NUMA_PREFERRED MCCL_MAX_NCHANNELS CUDA_DEVICE_MAX_CONNECTIONS
[[ -d $CUDA_PATH ]] || CUDA_PATH='' CUCC_CMAKE_ENTRY=''
[[ -z $CUDA_PATH ]] || export CUDA_PATH CUCC_CMAKE_ENTRY
