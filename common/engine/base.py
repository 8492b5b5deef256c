"""Engine: what the kit uses of Megatron-Core, as in the newest version; subclasses for older ones override the rest.

The attributes need neither torch nor megatron; methods that need them import them.
"""

from contextlib import AbstractContextManager
from typing import Any


class Engine:
    """One minor version of Megatron-Core."""

    release: str  # the release that tests/lanes.sh runs
    environment: str  # where it is used, for error messages
    oldest_torch: tuple[int, int]  # major and minor of the oldest torch that it trains with
    numpy_2: bool = True  # whether it works with numpy 2 or later
    fp8_recipes: bool = True  # TransformerConfig.fp8_recipe; without it FP8 uses delayed scaling
    bf16_moments: bool = True  # OptimizerConfig.store_param_remainders
    fused_single_qkv_rope: bool = True  # TransformerConfig.fused_single_qkv_rope
    strided_weight_gradients: bool = True  # local linear layers accept inputs that are not contiguous
    fused_residual_norms: bool = True  # its layers call norms and residual adds as layers/residual_norm.py expects
    separate_postprocess: bool = True  # GPTModel has a method for output layer and loss, _postprocess
    frozen_shared_embeddings: bool = True  # tied embeddings without gradients on two pipeline stages
    uneven_pipeline_layers: bool = True  # any number of layers per chunk: pipeline_model_parallel_layout
    norm_grads_method: str = "get_grads_for_grad_norm"  # of a distributed optimizer; renamed in 0.19
    minus_sqrt_decay: bool = True  # OptimizerParamScheduler knows lr_wsd_decay_style "minus_sqrt"
    quiet_loggers: tuple[str, ...] = ()  # loggers whose warnings at every start do not concern users
    # Layouts of the distributed optimizer in older torch_dist checkpoints that its dist_checkpointing loads.
    legacy_optimizer_shardings: tuple[str, ...] = ("dp_zero_gather_scatter",)

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor."""
        major, minor = self.release.split(".")[:2]
        return int(major), int(minor)

    @property
    def name(self) -> str:
        """Major and minor as text: "0.16"."""
        return ".".join(map(str, self.version))

    def chunk_place(self, index: int, vpp: int) -> tuple[bool, bool, dict[str, Any]]:
        """(whether this rank's chunk `index` of `vpp` is the model's first, its last, GPTModel's arguments for it).

        Called before a chunk, or its sharded state dict, is built.
        """
        from megatron.core import parallel_state

        stage = {"vp_stage": index} if vpp > 1 else {}
        where: dict[str, Any] = {"ignore_virtual": False, **stage} if vpp > 1 else {}
        first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
        return first(**where), last(**where), stage

    def without_postprocess(self, model: Any) -> AbstractContextManager[None]:
        """A context in which GPTModel.forward returns the hidden states; only if `separate_postprocess` is False."""
        raise NotImplementedError

    def mlp_submodules(self, layer: Any) -> Any:
        """The MLPSubmodules of the TransformerLayerSubmodules `layer`, to be modified in place."""
        return layer.mlp.keywords["submodules"]

    def sharded_optimizer_state(
        self, optimizer: Any, model_state: dict[str, Any], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """The sharded state dict of a distributed optimizer for loading, in the legacy layout in `metadata`."""
        found: dict[str, Any] = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=metadata)
        return found

    def grads_for_norm(self, optimizer: Any) -> list[Any]:
        """The gradients of this rank's shard that the global norm counts, each on one rank of all."""
        found: list[Any] = getattr(optimizer, self.norm_grads_method)()
        return found

    def uses_decoupled_grad(self, optimizer_config: Any) -> bool:
        """Whether the optimizer reads gradients from `decoupled_grad` instead of `grad`."""
        return bool(optimizer_config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)

    def finalize_model_grads(self, model: list[Any], num_tokens: Any = None, **more: Any) -> None:
        """Megatron-Core's finalize_model_grads, which divides gradients by the sum of all ranks' `num_tokens`."""
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(model, num_tokens, **more)
