# syntax=docker/dockerfile:1
# The kit on a machine without a GPU: the quickstart and every test run in it.
# 无 GPU 的镜像：可运行快速上手脚本和全部测试。
#
#   docker build -f docker/cpu.Dockerfile -t qwen-megatron:cpu .
#   docker run --rm -it --ipc=host qwen-megatron:cpu bash cpu/quickstart.sh
#
# Build arguments: TORCH_INDEX_URL for a torch without CUDA packages, PIP_INDEX_URL for a mirror.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

ARG BASE_IMAGE
ARG KIT_NAME=qwen-megatron
ARG VERSION=0
ARG REVISION=unknown
ARG TORCH_INDEX_URL
ARG PIP_INDEX_URL
LABEL org.opencontainers.image.title="${KIT_NAME}" \
  org.opencontainers.image.description="Qwen2.5 on Megatron-Core, CPU" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.base.name="${BASE_IMAGE}"

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

WORKDIR /workspace/${KIT_NAME}
COPY requirements requirements
COPY common/shell/setup_venv.sh common/shell/
RUN PIP_NO_CACHE_DIR=1 bash common/shell/setup_venv.sh requirements/cpu.txt
COPY . .

CMD ["/bin/bash"]
