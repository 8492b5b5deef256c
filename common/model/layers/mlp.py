"""Megatron-Core's MLP with the fused GEMMs of `gated_mlp`: a submodule for a layer's spec."""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from common.model.layers.exchange import Alone, ExchangingLinear
from common.model.layers.gated_mlp import GatedProduct, GatedProducts
from common.model.layers.residual_norm import FusedResidualNorm
from common.model.layers.tp_mappings import enter, leave
from common.model.layers.weights import await_weights


def gated_mlp(submodules: MLPSubmodules, products: GatedProducts) -> type[MLP]:
    """The class that builds MLPs of `submodules`, for every supported version of Megatron-Core.

    Not a ModuleSpec: from 0.14 on Megatron-Core warns in every layer about one of an unknown class.
    """

    class GatedMLP(MLP):
        """An MLP with fused SwiGLU; its parameters are those of Megatron-Core's."""

        def __init__(self, config: Any, pg_collection: Any = None, **_: Any) -> None:
            group = {"tp_group": pg_collection.tp} if pg_collection else {}
            super().__init__(config, submodules, **group)

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
            """hidden_states [s, b, h], unnormalized if linear_fc1 has the norm -> the same shape, and no bias."""
            first, second = self.linear_fc1, self.linear_fc2
            await_weights(first)
            await_weights(second)
            x = first.normed(hidden_states) if isinstance(first, FusedResidualNorm) else hidden_states
            exchange = second.exchange if isinstance(second, ExchangingLinear) else None
            x = x if exchange else enter(x, self.config)
            part: torch.Tensor = GatedProduct.apply(
                x.flatten(0, 1), first.weight, second.weight, products, exchange or Alone()
            )
            out = part.view(x.shape)
            return (out if exchange else leave(out, self.config)), None

    return GatedMLP
