"""Engine: what the kit needs of Megatron-Core, with the newest version's behavior; older ones override what differs.

Reading a fact imports neither torch nor megatron: methods that need them import them.
"""

from contextlib import AbstractContextManager
from typing import Any


class Engine:
    """One minor version of Megatron-Core."""

    release: str  # the release that tests/lanes.sh runs
    environment: str  # where it is used, as errors name it
    oldest_torch: tuple[int, int]  # major and minor of the first torch that it trains with
    numpy_2: bool = True  # whether it works with numpy 2 or later
    fp8_recipes: bool = True  # TransformerConfig.fp8_recipe; without, FP8 uses delayed scaling
    bf16_moments: bool = True  # OptimizerConfig.store_param_remainders
    fused_single_qkv_rope: bool = True  # TransformerConfig.fused_single_qkv_rope
    strided_weight_gradients: bool = True  # local linear layers take inputs that are not contiguous
    fused_residual_norms: bool = True  # its layers call norms and sums where layers/residual_norm.py replaces them
    separate_postprocess: bool = True  # GPTModel's output layer and loss are a method of their own, _postprocess
    uneven_pipeline_layers: bool = True  # any number of layers in any chunk: pipeline_model_parallel_layout
    quiet_loggers: tuple[str, ...] = ()  # those that warn at every start of what no user can change
    # Layouts of the distributed optimizer in torch_dist checkpoints of older kits that its dist_checkpointing loads.
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
        """Whether this rank's chunk `index` of `vpp` is the model's first, its last; GPTModel's arguments for it.

        Called before a chunk is built and before its weights are named.
        """
        from megatron.core import parallel_state

        stage = {"vp_stage": index} if vpp > 1 else {}
        where: dict[str, Any] = {"ignore_virtual": False, **stage} if vpp > 1 else {}
        first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
        return first(**where), last(**where), stage

    def without_postprocess(self, model: Any) -> AbstractContextManager[None]:
        """A context in which GPTModel's forward ends with the hidden states; where `separate_postprocess` is False."""
        raise NotImplementedError

    def mlp_submodules(self, layer: Any) -> Any:
        """The MLPSubmodules in the TransformerLayerSubmodules `layer`, to be changed in place."""
        return layer.mlp.keywords["submodules"]

    def sharded_optimizer_state(
        self, optimizer: Any, model_state: dict[str, Any], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """The sharded state dict to load a distributed optimizer into, in the legacy layout that `metadata` names."""
        found: dict[str, Any] = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=metadata)
        return found

    def uses_decoupled_grad(self, optimizer_config: Any) -> bool:
        """Whether the optimizer reads gradients from `decoupled_grad`, not from `grad`."""
        return bool(optimizer_config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)
