# syntax=docker/dockerfile:1
# The kit on NGC's PyTorch image, whose torch, Transformer Engine, apex and flash-attn stay as they are.
# 基于 NGC PyTorch 镜像，镜像自带的 torch、Transformer Engine、apex 和 flash-attn 保持不变。
#
#   docker build -f docker/nvidia.Dockerfile -t qwen-megatron:nvidia .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 qwen-megatron:nvidia
#
# Other bases by --build-arg, CUDA 12.4 or later each / 其他基础镜像（CUDA 12.4 起）：
#   BASE_IMAGE=cr.infini-ai.com/infini-ai/ngc:pytorch-24.03-py3       a mirror of the same image / 同一镜像的镜像站
#   BASE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3 MEGATRON_CORE=0.19.2  newer: torch 2.6 and later / 更新的镜像
#   BASE_IMAGE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel MEGATRON_CORE=0.19.2
#                                 without Transformer Engine and apex: both are built, which takes long / 需编译两者
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:24.03-py3

# Builds what the base has not; on NGC's images it makes an empty folder.
FROM ${BASE_IMAGE} AS extensions
ARG PIP_INDEX_URL=
# The version that megatron-core 0.16.1 was measured with (docs/benchmarks.md); empty: none.
ARG TRANSFORMER_ENGINE=2.11.0
# Tag 25.09; empty: none. Its kernel adds the output layer's gradients in place.
ARG APEX_SOURCE=git+https://github.com/NVIDIA/apex@4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49
ARG MAX_JOBS=4
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
COPY docker/base.py docker/build_extensions.sh /opt/kit/docker/
RUN bash /opt/kit/docker/build_extensions.sh /opt/kit/wheels

FROM ${BASE_IMAGE}
# Mirrors, for this build alone; no credentials in them: build arguments stand in the image's history.
ARG PIP_INDEX_URL=
ARG APT_MIRROR=
# System packages that a platform asks for, as Infini-AI's dev machines: "openssh-server sudo runit runit-systemd".
ARG PLATFORM_PACKAGES=
# 0.14.0 accepts torch 2.3; 0.19.2 needs torch 2.6 and Python 3.12 or later, 0.16.1 is for Python 3.10 and 3.11. The kit
# refuses other versions.
ARG MEGATRON_CORE=0.14.0
# The kit's user and the owner of its files; 0 is root.
ARG USER_ID=0
ARG GROUP_ID=0
ARG BASE_IMAGE
ARG KIT_NAME=qwen-megatron
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="${KIT_NAME}" \
  org.opencontainers.image.description="Qwen2.5 on Megatron-Core, NVIDIA" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.base.name="${BASE_IMAGE}"

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Some bases end in another user; the last USER below is the image's.
USER 0:0

COPY docker/*.py docker/*.sh requirements/nvidia.txt /opt/kit/docker/
RUN read -ra packages <<<"${PLATFORM_PACKAGES}" \
  && bash /opt/kit/docker/platform_packages.sh "${packages[@]}" \
  && bash /opt/kit/docker/add_user.sh "${USER_ID}" "${GROUP_ID}"
RUN --mount=type=bind,from=extensions,source=/opt/kit/wheels,target=/opt/kit/wheels \
  OLDEST_CUDA=12.4 WHEELS=/opt/kit/wheels \
  bash /opt/kit/docker/install.sh "${MEGATRON_CORE}" /opt/kit/docker/nvidia.txt
# A later pip in the container keeps the base's packages too.
ENV PIP_CONSTRAINT=/opt/kit/constraints.txt

WORKDIR /workspace/${KIT_NAME}
COPY --chown=${USER_ID}:${GROUP_ID} . .
# The smoke test: everything that needs no device; the rest is looked at when a container starts.
RUN bash nvidia/doctor.sh -- --no-device

USER ${USER_ID}:${GROUP_ID}
# The entry point is the base's own.
CMD ["/bin/bash", "-c", "bash nvidia/doctor.sh || true; exec bash"]
