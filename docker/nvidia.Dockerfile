# syntax=docker/dockerfile:1
# The kit on NGC's PyTorch image, whose torch, Transformer Engine, apex and flash-attn stay as they are.
# 基于 NGC PyTorch 镜像，镜像自带的 torch、Transformer Engine、apex 和 flash-attn 保持不变。
#
#   docker build -f docker/nvidia.Dockerfile -t qwen-megatron:nvidia .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 qwen-megatron:nvidia
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:24.03-py3
FROM ${BASE_IMAGE}

ARG BASE_IMAGE
ARG KIT_NAME=qwen-megatron
ARG VERSION=0
ARG REVISION=unknown
ARG MEGATRON_CORE=0.14.0
LABEL org.opencontainers.image.title="${KIT_NAME}" \
  org.opencontainers.image.description="Qwen2.5 on Megatron-Core, NVIDIA" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.base.name="${BASE_IMAGE}"

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The base's packages become constraints before the first pip; a build in which pip moved one of them fails.
COPY docker/base_packages.py requirements/nvidia.txt /opt/kit/
RUN python3 /opt/kit/base_packages.py >/opt/kit/constraints.txt \
  && grep '^torch==' /opt/kit/constraints.txt \
  && python3 -m pip install --no-cache-dir --no-deps "megatron-core==${MEGATRON_CORE}" \
  && python3 -m pip install --no-cache-dir -c /opt/kit/constraints.txt -r /opt/kit/nvidia.txt \
  && python3 /opt/kit/base_packages.py | diff /opt/kit/constraints.txt - \
  && python3 -c "import torch, transformers, tokenizers, safetensors, orjson, jsonlines"

COPY . /workspace/${KIT_NAME}
WORKDIR /workspace/${KIT_NAME}

# The entry point is the base's own.
CMD ["/bin/bash"]
