"""PyTorch instead of Triton's kernels, under the names of the kit's modules, where there is no triton."""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import silu

from common.model.layers.loss import TorchKernels


def bias_swiglu(gate_and_up: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    assert bias is None
    gate, up = gate_and_up.chunk(2, -1)
    return silu(gate) * up


def split_and_rotate(
    mixed: torch.Tensor, q_freqs: torch.Tensor, k_freqs: torch.Tensor, parts: list[int]
) -> tuple[torch.Tensor, ...]:
    """mixed [s, b, g, (r + 2) * d] -> queries [s, b, g * r, d], keys and values [s, b, g, d]."""
    query, key, value = mixed.split(parts, -1)

    def rotated(part: torch.Tensor) -> torch.Tensor:
        part = part.reshape(*part.shape[:2], -1, parts[1])
        first, second = part.float().chunk(2, -1)
        return (part * q_freqs.cos() + torch.cat([-second, first], -1) * q_freqs.sin()).to(mixed.dtype)

    return rotated(query), rotated(key), value


class TritonNorms:
    """As common.model.layers.residual_norm.Norms."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight

    def norm_of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x + residual, self.norm(x + residual, weight, eps)


MODULES = {
    "common.model.kernels.swiglu": SimpleNamespace(bias_swiglu=bias_swiglu),
    "common.model.kernels.qkv_rope": SimpleNamespace(split_and_rotate=split_and_rotate),
    "common.model.kernels.norm_kernels": SimpleNamespace(TritonNorms=TritonNorms),
    "common.model.kernels.loss_kernels": SimpleNamespace(TritonKernels=type("TritonKernels", (TorchKernels,), {})),
}


def install() -> None:
    """For this process, before a model is built."""
    sys.modules.update(MODULES)  # type: ignore[arg-type]
