# syntax=docker/dockerfile:1
# The kit on a machine without a GPU: the quickstart and every test run in it.
# 无 GPU 的镜像：可运行快速上手脚本和全部测试。
#
#   docker build -f docker/cpu.Dockerfile -t qwen-megatron:cpu .
#   docker run --rm -it --ipc=host qwen-megatron:cpu bash cpu/quickstart.sh
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}
# Mirrors, for this build alone; no credentials in them: build arguments stand in the image's history.
ARG PIP_INDEX_URL=
ARG APT_MIRROR=
# Index for torch alone: PyTorch's CPU index spares gigabytes of CUDA packages.
ARG TORCH_INDEX_URL=
# System packages that a platform asks for, as Infini-AI's dev machines: "openssh-server sudo runit runit-systemd".
ARG PLATFORM_PACKAGES=
# The kit's user and the owner of its files; 0 is root.
ARG USER_ID=0
ARG GROUP_ID=0
ARG BASE_IMAGE
ARG KIT_NAME=qwen-megatron
ARG VERSION=0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="${KIT_NAME}" \
  org.opencontainers.image.description="Qwen2.5 on Megatron-Core, CPU" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.base.name="${BASE_IMAGE}"

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

COPY docker/*.sh /opt/kit/docker/
RUN read -ra packages <<<"${PLATFORM_PACKAGES}" \
  && bash /opt/kit/docker/platform_packages.sh "${packages[@]}"
# Outside the kit's folder, so that a kit mounted over it finds the same Python.
ENV VENV=/opt/kit/venv
ENV PYTHON=${VENV}/bin/python
COPY requirements/cpu.txt /opt/kit/requirements/
COPY common/shell/setup_venv.sh /opt/kit/docker/
RUN PIP_NO_CACHE_DIR=1 bash /opt/kit/docker/setup_venv.sh /opt/kit/requirements/cpu.txt \
  && bash /opt/kit/docker/add_user.sh "${USER_ID}" "${GROUP_ID}"

WORKDIR /workspace/${KIT_NAME}
COPY --chown=${USER_ID}:${GROUP_ID} . .
RUN bash cpu/doctor.sh -- --no-device

USER ${USER_ID}:${GROUP_ID}
CMD ["/bin/bash", "-c", "bash cpu/doctor.sh || true; exec bash"]
