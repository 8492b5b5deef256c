"""RMSNorms that come with the residual sum before them: what half a layer adds is normed for the next as it is added.

Megatron-Core calls the sum (`self_attn_bda`, `mlp_bda`) and the norm after it one after the other; here the sum gives
both, and the norm finds its output ready. Where its input is another tensor, as of a stage's first layer, it computes.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

from common.model.layers.norm import RMSNorm
from common.model.layers.weights import await_weights


class Norms(Protocol):
    """The two operations, with gradients; `norm_kernels.TritonNorms` has them as kernels."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., h] -> the normed x."""

    def norm_of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [..., h] -> their sum and its norm."""


class FusedResidualNorm:
    """The part of a module that norms its input, or has had it normed."""

    norms: Norms
    eps: float
    _ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def norm_weight(self) -> torch.Tensor:
        """The norm's weight [h]."""
        raise NotImplementedError

    def sum_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x + residual; its norm waits for `normed` to be called with what is given back here."""
        assert isinstance(self, torch.nn.Module)
        await_weights(self)
        total, out = self.norms.norm_of_sum(x, residual, self.norm_weight(), self.eps)
        self._ready = total, out
        return total

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x [..., h]."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is x:
            return ready[1]
        return self.norms.norm(x, self.norm_weight(), self.eps)


class FusedResidualRMSNorm(FusedResidualNorm, RMSNorm):
    """A norm of local layers, and the last of both kinds."""

    def norm_weight(self) -> torch.Tensor:
        """The norm's weight [h]."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normalized x, of the same shape and dtype."""
        return self.normed(x)


def normed_linear() -> type[torch.nn.Module]:
    """Megatron-Core's TELayerNormColumnParallelLinear, parameter names and all, with a norm that can be joined."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    class NormedLinear(FusedResidualNorm, TEColumnParallelLinear):
        def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
            super().__init__(input_size, output_size, config=config, **options)
            self.eps = config.layernorm_epsilon
            weight = torch.ones(input_size, dtype=config.params_dtype, device=self.weight.device)
            self.layer_norm_weight = torch.nn.Parameter(weight)
            setattr(self.layer_norm_weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

        def norm_weight(self) -> torch.Tensor:
            """The norm's weight [h]."""
            return self.layer_norm_weight

        def forward(self, x: torch.Tensor) -> Any:
            """The linear layer's output, and its bias where it is to be added later, of the normed x [s, b, h]."""
            return super().forward(self.normed(x))

    return NormedLinear


class ResidualSum:
    """A layer's `self_attn_bda` or `mlp_bda`: the residual sum, with the norm that follows it once that is known."""

    following: FusedResidualNorm | None = None

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function of the sum, as Megatron-Core's get_bias_dropout_add returns it."""
        if self.following is None:
            add: Callable[..., torch.Tensor] = get_bias_dropout_add(training, fused)
            return add
        return self._add

    def _add(
        self, x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """The sum [s, b, h]; both kinds of layers call it so."""
        x, bias = x_with_bias
        assert bias is None and dropout == 0.0, "Qwen has neither"
        assert self.following
        return self.following.sum_and_norm(x, residual)


def connect_norms(block: Any, norms: Norms, *, across_layers: bool) -> None:
    """Connects each ResidualSum of `block`, a TransformerBlock built with them, to the norm that follows it.

    across_layers: also that of the next layer; not where layers are computed again for their gradients, each alone.
    """
    for module in block.modules():
        if isinstance(module, FusedResidualNorm):
            module.norms = norms
    begins = [_norm(layer.input_layernorm, layer.self_attention.linear_qkv) for layer in block.layers]
    for layer, following in zip(block.layers, [*begins[1:], block.final_layernorm], strict=True):
        layer.self_attn_bda.following = _norm(layer.pre_mlp_layernorm, layer.mlp.linear_fc1)
        if across_layers:
            layer.mlp_bda.following = following


def _norm(alone: Any, linear: Any) -> FusedResidualNorm:
    """The one of the two that norms: local layers have it alone, Transformer Engine's in the linear layer after it."""
    (found,) = (module for module in (alone, linear) if isinstance(module, FusedResidualNorm))
    return found
