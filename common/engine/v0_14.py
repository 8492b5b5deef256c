"""Megatron-Core 0.14, for NVIDIA's NGC 24.03."""

from typing import Any

from common.engine.base import Engine


class MegatronCore014(Engine):
    """Also loads a legacy layout of the optimizer that later versions refuse."""

    release = "0.14.0"
    environment = "torch 2.2 to 2.5 (NVIDIA's NGC 24.03)"
    oldest_torch = (2, 2)
    numpy_2 = False
    fused_single_qkv_rope = False
    fused_residual_norms = False
    norm_grads_method = "get_main_grads_for_grad_norm"
    legacy_optimizer_shardings = ("dp_zero_gather_scatter", "fully_sharded_model_space")

    def mlp_submodules(self, layer: Any) -> Any:
        """As in Engine; before 0.19 a dense MLP is a ModuleSpec."""
        return layer.mlp.submodules
