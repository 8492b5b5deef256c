"""Qwen's transformer block as a Megatron-Core spec: Transformer Engine's layers, or local ones with our RMSNorm."""

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from common.engine.versions import installed_engine
from common.model.layers.attention import SdpaAttention
from common.model.layers.exchange import gathered_linear, scattered_linear
from common.model.layers.gated_mlp import GatedProducts
from common.model.layers.lora import adapted
from common.model.layers.mlp import gated_mlp
from common.model.layers.norm import RMSNorm
from common.model.layers.residual_norm import FusedResidualRMSNorm, ResidualSum, column_parallel_linear, normed_linear
from common.model.shape.lora import LINEARS, LoraConfig

COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")


def block_spec(
    transformer_impl: str,
    num_layers: int,
    qk_norm: bool,
    core_attention: type[SdpaAttention] | None = None,
    *,
    fused_residual_norms: bool = False,
    products: GatedProducts | None = None,
    lora: LoraConfig | None = None,
    exchanging: bool = False,
) -> Any:
    """The spec of a pipeline stage with `num_layers` layers; `transformer_impl` is transformer_engine or local.

    core_attention: replaces Transformer Engine's; required for local layers.
    fused_residual_norms: norms and residual adds to be connected by `residual_norm.connect_norms` afterwards.
    products: the MLPs' GEMMs with fused SwiGLU.
    lora: its linear layers are to be given adapters by `lora.add_adapters` afterwards.
    exchanging: its linear layers are to be given an Exchange by `exchange.set_exchange` afterwards.
    """
    engine = transformer_impl == "transformer_engine"
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm) if engine else _local_layer(qk_norm)
    parts = layer.submodules
    mlp = installed_engine().mlp_submodules(parts)
    if core_attention or not engine:
        parts.self_attention.submodules.core_attention = core_attention
    if fused_residual_norms:
        parts.self_attn_bda = parts.mlp_bda = ResidualSum
    # An adapter needs the normalized input, which Transformer Engine's own layer with a norm does not return.
    separate_norms = engine and (fused_residual_norms or lora is not None)
    _replace_linears({"self_attention": parts.self_attention.submodules, "mlp": mlp}, separate_norms, lora, exchanging)
    if fused_residual_norms and not engine:
        parts.input_layernorm = parts.pre_mlp_layernorm = FusedResidualRMSNorm
    if products:
        parts.mlp = gated_mlp(mlp, products)
    if engine and not fused_residual_norms:
        return layer
    # The final norm too: Megatron-Core's fallback for local layers refuses sequence parallelism.
    norm = FusedResidualRMSNorm if fused_residual_norms else RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _replace_linears(owners: dict[str, Any], separate_norms: bool, lora: LoraConfig | None, exchanging: bool) -> None:
    """Sets the classes of the linear layers in `owners`, the submodules of attention and MLP, where they change."""
    for linear in LINEARS:
        owner, name = owners[linear.split(".")[0]], linear.split(".")[1]
        has_norm = separate_norms and name in COLUMN_PARALLEL
        kind: Any = column_parallel_linear() if has_norm else getattr(owner, name)
        if exchanging:
            kind = gathered_linear(kind) if name in COLUMN_PARALLEL else scattered_linear(kind)
        if lora and linear in lora.linears:
            kind = adapted(kind)
        setattr(owner, name, normed_linear(kind) if has_norm else kind)


def _local_layer(qk_norm: bool) -> Any:
    """Megatron-Core's local layer with our RMSNorm."""
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if qk_norm:
        attention = parts.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
