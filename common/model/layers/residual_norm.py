"""RMSNorm fused with the residual add before it.

Megatron-Core calls the add (`self_attn_bda`, `mlp_bda`) and the norm one after the other. Here the add computes both,
and the norm returns the stored output. If its input is another tensor, as in a stage's first layer, it computes it.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

from common.model.layers.norm import RMSNorm, rms_norm
from common.model.layers.weights import await_weights


class Norms(Protocol):
    """The two operations, with gradients; `norm_kernels.TritonNorms` implements them."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., h] -> the normalized x."""

    def norm_of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [..., h] -> their sum and its norm."""


class FusedResidualNorm:
    """Mixin of a module that normalizes its input, or takes the output of the fused add and norm."""

    norms: Norms
    eps: float
    _ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def norm_weight(self) -> torch.Tensor:
        """The norm's weight [h]."""
        raise NotImplementedError

    def sum_and_norm(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x + residual; also stores its norm, which `normed` returns when called with this sum."""
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
    """A norm of local layers, and the final norm of either kind of layers."""

    def norm_weight(self) -> torch.Tensor:
        """The norm's weight [h]."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normalized x, of the same shape and dtype."""
        return self.normed(x)


def column_parallel_linear() -> type[torch.nn.Module]:
    """Transformer Engine's column-parallel layer without a norm."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    kind: type[torch.nn.Module] = TEColumnParallelLinear
    return kind


def normed_linear(base: Any) -> type[torch.nn.Module]:
    """Megatron-Core's TELayerNormColumnParallelLinear, with the same parameter names, and a norm that can be fused.

    base: `column_parallel_linear`, or a subclass, which gets the normalized input.
    """

    class NormedLinear(FusedResidualNorm, base):
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
            """The linear layer's output for the normalized x [s, b, h], and its bias if it is to be added later."""
            return super().forward(self.normed(x))

    return NormedLinear


class TorchNorms:
    """Norms in plain PyTorch."""

    @staticmethod
    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As Norms."""
        return rms_norm(x, weight, eps)

    def norm_of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Norms."""
        total = x + residual
        return total, self.norm(total, weight, eps)


class ResidualSum:
    """A layer's `self_attn_bda` or `mlp_bda`: the residual add, fused with the norm that follows it once connected."""

    following: FusedResidualNorm | None = None

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function of the residual add, as get_bias_dropout_add of Megatron-Core returns it."""
        if self.following is None:
            add: Callable[..., torch.Tensor] = get_bias_dropout_add(training, fused)
            return add
        return self._add

    def _add(
        self, x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """The sum [s, b, h]."""
        x, bias = x_with_bias
        assert bias is None and dropout == 0.0, "Qwen has neither"
        assert self.following
        return self.following.sum_and_norm(x, residual)


def set_norms(block: Any, norms: Norms) -> None:
    """Has the norms of `block`, a TransformerBlock, compute with `norms`."""
    for module in block.modules():
        if isinstance(module, FusedResidualNorm):
            module.norms = norms


def connect_norms(block: Any, *, across_layers: bool) -> None:
    """Connects each ResidualSum of `block`, a TransformerBlock built with them, to the norm that follows it.

    across_layers: also to the norm of the next layer; not with full recomputation, which runs each layer separately.
    """
    begins = [_norm(layer.input_layernorm, layer.self_attention.linear_qkv) for layer in block.layers]
    for layer, following in zip(block.layers, [*begins[1:], block.final_layernorm], strict=True):
        layer.self_attn_bda.following = _norm(layer.pre_mlp_layernorm, layer.mlp.linear_fc1)
        if across_layers:
            layer.mlp_bda.following = following


def _norm(separate: Any, linear: Any) -> FusedResidualNorm:
    """The one with the norm: a separate module in local layers, the linear layer in Transformer Engine's."""
    (found,) = (module for module in (separate, linear) if isinstance(module, FusedResidualNorm))
    return found
