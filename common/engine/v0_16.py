"""Megatron-Core 0.16."""

from common.engine.base import Engine


class MegatronCore016(Engine):
    """The newest, as the base class describes it."""

    release = "0.16.1"
    environment = "torch 2.6 or later (a CPU, NGC 24.12 and later)"
    oldest_torch = (2, 6)
