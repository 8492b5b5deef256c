"""RMSNorm for Megatron-Core's local layers: its own fallback refuses sequence parallelism and needs torch 2.4."""

from typing import Any

import torch
import torch.nn.functional as F


class RMSNorm(torch.nn.Module):
    """x [..., h] -> x / sqrt(mean(x^2) + eps) * weight, in x's dtype, reduced in float32 (arXiv 1910.07467).

    The weight has the attribute `sequence_parallel`, with which Megatron-Core all-reduces its gradient over the
    tensor-parallel ranks, each of which has its own part of the sequence. Otherwise the replicas would diverge.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  a Parameter has no such field

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normalized x, of the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The normalized x [..., h]; torch has its own function from 2.4 on."""
    if hasattr(F, "rms_norm"):
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight
