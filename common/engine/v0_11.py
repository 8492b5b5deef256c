"""Megatron-Core 0.11, for MetaX's maca 2.27."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common.engine.base import Engine


class MegatronCore011(Engine):
    """Without FP8 recipes, bf16 moments, uneven stages, `vp_stage` and a shape of decay."""

    release = "0.11.0"
    environment = "torch 2.1 (MetaX's maca 2.27)"
    oldest_torch = (2, 1)
    numpy_2 = False
    fused_single_qkv_rope = False
    fused_residual_norms = False
    strided_weight_gradients = False
    fp8_recipes = False
    bf16_moments = False
    separate_postprocess = False
    frozen_shared_embeddings = False
    minus_sqrt_decay = False
    norm_grads_method = "get_main_grads_for_grad_norm"
    uneven_pipeline_layers = False  # it has fully_sharded_model_space, too, but not with torch's Adam

    def chunk_place(self, index: int, vpp: int) -> tuple[bool, bool, dict[str, Any]]:
        """As in Engine; in 0.11 the chunk's index is a global, which stays set."""
        from megatron.core import parallel_state

        where = {"ignore_virtual": False} if vpp > 1 else {}
        if vpp > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
        return first(**where), last(**where), {}

    def sharded_optimizer_state(
        self, optimizer: Any, model_state: dict[str, Any], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """As in Engine; in 0.11 the layout is a separate argument."""
        kind = metadata["distrib_optim_sharding_type"]
        found: dict[str, Any] = optimizer.sharded_state_dict(model_state, is_loading=True, sharding_type=kind)
        return found

    def uses_decoupled_grad(self, optimizer_config: Any) -> bool:
        """As in Engine; in 0.11 it does not depend on FP8."""
        return bool(optimizer_config.use_precision_aware_optimizer)

    @contextmanager
    def without_postprocess(self, model: Any) -> Iterator[None]:
        """As in Engine; in 0.11 `forward` only checks the attribute `post_process`."""
        model.post_process = False
        try:
            yield
        finally:
            model.post_process = True

    def mlp_submodules(self, layer: Any) -> Any:
        """As in Engine; before 0.19 a dense MLP is a ModuleSpec."""
        return layer.mlp.submodules

    def finalize_model_grads(self, model: list[Any], num_tokens: Any = None, **more: Any) -> None:
        """As in Engine; 0.11 sums `num_tokens` over data-parallel ranks alone, and a CP rank has a part of a row."""
        import torch.distributed as dist
        from megatron.core import parallel_state

        if num_tokens is not None:
            dist.all_reduce(num_tokens, group=parallel_state.get_context_parallel_group())
        super().finalize_model_grads(model, num_tokens, **more)
