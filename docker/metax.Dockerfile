# syntax=docker/dockerfile:1
# The kit on MetaX's Megatron-LM image (maca 2.27), or on an image of MACA 3.5 to 3.8. Not run on hardware / 未在硬件上运行
# Every +metax and +maca package stays as it is; the image's own Megatron-LM is left alone.
# 镜像自带的 +metax、+maca 软件包保持不变，也不改动镜像自带的 Megatron-LM。
#
#   docker build -f docker/metax.Dockerfile -t qwen-megatron:metax .
#   docker run --rm -it --device=/dev/dri --device=/dev/mxcd --group-add video --ipc=host --ulimit memlock=-1 \
#     qwen-megatron:metax
#
# The registry of the default base is a tenant's: where you cannot pull from it, give your own copy as BASE_IMAGE.
# 默认基础镜像位于租户仓库；无法拉取时，用 BASE_IMAGE 指定自己的副本。
#
# MACA 3.5 to 3.8 by --build-arg, after a login to MetaX's registry / MACA 3.5 至 3.8（需登录 MetaX 镜像仓库）：
#   REQUIREMENTS=metax-3.txt PYTHON=/opt/conda/bin/python3 and / 以及
#   BASE_IMAGE=cr.metax-tech.com/public-ai-release/maca/vllm-metax:0.15.0-maca.ai3.5.3.203-torch2.8-py310-ubuntu22.04-amd64
#     MEGATRON_CORE=0.16.1                                           Python 3.10
#   BASE_IMAGE=cr.metax-tech.com/public-library/maca-pytorch:3.8.0.11-torch2.10-py312-ubuntu24.04-amd64
#     MEGATRON_CORE=0.19.2                                           Python 3.12
ARG BASE_IMAGE=cr.infini-ai.com/te-c7vnqlzlmvzffc2v/megatron-lm:maca2.27.0.7-py310
FROM ${BASE_IMAGE}
# Mirrors, for this build alone; no credentials in them: build arguments stand in the image's history.
ARG PIP_INDEX_URL=
ARG APT_MIRROR=
# System packages that a platform asks for, as Infini-AI's dev machines: "openssh-server sudo runit runit-systemd".
ARG PLATFORM_PACKAGES=
# The newest that imports on torch 2.1; with torch 2.6 and later 0.16.1 for Python 3.10, 0.19.2 for 3.12.
ARG MEGATRON_CORE=0.11.0
# The file of requirements/.
ARG REQUIREMENTS=metax.txt
# The base's Python with MetaX's torch; images of MACA 3 have another one first in PATH.
ARG PYTHON=python3
# The kit's user and the owner of its files; 0 is root. Another one needs --group-add video for the devices.
ARG USER_ID=0
ARG GROUP_ID=0
ARG BASE_IMAGE
ARG KIT_NAME=qwen-megatron
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="${KIT_NAME}" \
  org.opencontainers.image.description="Qwen2.5 on Megatron-Core, MetaX; not run on hardware" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.base.name="${BASE_IMAGE}"

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Some bases end in another user; the last USER below is the image's.
USER 0:0

COPY docker/*.py docker/*.sh requirements/metax*.txt /opt/kit/docker/
RUN read -ra packages <<<"${PLATFORM_PACKAGES}" \
  && bash /opt/kit/docker/platform_packages.sh "${packages[@]}" \
  && bash /opt/kit/docker/add_user.sh "${USER_ID}" "${GROUP_ID}"
RUN bash /opt/kit/docker/install.sh "${MEGATRON_CORE}" "/opt/kit/docker/${REQUIREMENTS}"
# A later pip in the container keeps the base's packages too; the kit's scripts start this Python.
ENV PIP_CONSTRAINT=/opt/kit/constraints.txt
ENV PYTHON=${PYTHON}

WORKDIR /workspace/${KIT_NAME}
COPY --chown=${USER_ID}:${GROUP_ID} . .
# The smoke test: everything that needs no device; the rest is looked at when a container starts.
RUN bash metax/doctor.sh -- --no-device

USER ${USER_ID}:${GROUP_ID}
# The entry point is the base's own.
CMD ["/bin/bash", "-c", "bash metax/doctor.sh || true; exec bash"]
