# syntax=docker/dockerfile:1
# The kit on MetaX's Megatron-LM image (maca 2.27). Not run on hardware / 未在硬件上运行
# Every +metax and +maca package stays as it is; the image's own Megatron-LM is left alone.
# 镜像自带的 +metax、+maca 软件包保持不变，也不改动镜像自带的 Megatron-LM。
#
#   docker build -f docker/metax.Dockerfile -t qwen-megatron:metax .
#   docker run --rm -it --device=/dev/dri --device=/dev/mxcd --group-add video --ipc=host --ulimit memlock=-1 \
#     qwen-megatron:metax
ARG BASE_IMAGE=cr.infini-ai.com/te-c7vnqlzlmvzffc2v/megatron-lm:maca2.27.0.7-py310
FROM ${BASE_IMAGE}

ARG BASE_IMAGE
ARG KIT_NAME=qwen-megatron
ARG VERSION=0
ARG REVISION=unknown
ARG MEGATRON_CORE=0.11.0
LABEL org.opencontainers.image.title="${KIT_NAME}" \
  org.opencontainers.image.description="Qwen2.5 on Megatron-Core, MetaX; not run on hardware" \
  org.opencontainers.image.licenses="Apache-2.0" \
  org.opencontainers.image.version="${VERSION}" \
  org.opencontainers.image.revision="${REVISION}" \
  org.opencontainers.image.base.name="${BASE_IMAGE}"

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The base's packages become constraints before the first pip; a build in which pip moved one of them fails.
# Nothing is imported here: torch may want the driver's libraries, which a build does not have.
COPY docker/base_packages.py requirements/metax.txt /opt/kit/
RUN python3 /opt/kit/base_packages.py >/opt/kit/constraints.txt \
  && grep '^torch==' /opt/kit/constraints.txt \
  && python3 -m pip install --no-cache-dir --no-deps "megatron-core==${MEGATRON_CORE}" \
  && python3 -m pip install --no-cache-dir -c /opt/kit/constraints.txt -r /opt/kit/metax.txt \
  && python3 /opt/kit/base_packages.py | diff /opt/kit/constraints.txt -

COPY . /workspace/${KIT_NAME}
WORKDIR /workspace/${KIT_NAME}

# The entry point is the base's own.
CMD ["/bin/bash"]
