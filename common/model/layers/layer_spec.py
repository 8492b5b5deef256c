"""Qwen's transformer block as a Megatron-Core spec: Transformer Engine's layers, or the local ones with our norm."""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from common.engine.versions import installed_engine
from common.model.layers.attention import SdpaAttention
from common.model.layers.norm import RMSNorm
from common.model.layers.residual_norm import JoinedRMSNorm, normed_linear


def block_spec(
    transformer_impl: str,
    num_layers: int,
    qk_norm: bool,
    core_attention: type[SdpaAttention] | None = None,
    *,
    joined_norms: bool = False,
) -> Any:
    """The spec of a pipeline stage with `num_layers` layers; `transformer_impl` is transformer_engine or local.

    core_attention: in place of Transformer Engine's own; local layers need one.
    joined_norms: with norms for `joined_norm.join`, which has to follow.
    """
    if transformer_impl == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        parts = layer.submodules
        if core_attention:
            parts.self_attention.submodules.core_attention = core_attention
        if not joined_norms:
            return layer
        mlp = installed_engine().mlp_submodules(parts)
        parts.self_attention.submodules.linear_qkv = mlp.linear_fc1 = normed_linear()
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=JoinedRMSNorm)
    norm = JoinedRMSNorm if joined_norms else RMSNorm
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = core_attention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # The final norm too: Megatron-Core's fallback for it refuses sequence parallelism.
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
