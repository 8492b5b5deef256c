"""Megatron-Core 0.16, the last for Python 3.10 and 3.11."""

from typing import Any

from common.engine.base import Engine


class MegatronCore016(Engine):
    """As Engine, with a different MLP spec."""

    release = "0.16.1"
    environment = "torch 2.6 or later on Python 3.10 or 3.11 (a CPU, MetaX's MACA 3.5)"
    oldest_torch = (2, 6)
    norm_grads_method = "get_main_grads_for_grad_norm"

    def mlp_submodules(self, layer: Any) -> Any:
        """As in Engine; before 0.19 a dense MLP is a ModuleSpec."""
        return layer.mlp.submodules
