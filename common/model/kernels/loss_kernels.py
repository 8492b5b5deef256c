"""The two steps of layers/loss.py on a chunk's logits as Triton kernels: one reads them, the other works in place."""

import torch
import triton
import triton.language as tl

from common.model.layers.loss import TorchKernels

BLOCK = 8192
NUM_WARPS = 16


@triton.jit
def _loss_statistics(logits, labels, largest, total, target, num_columns, block: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * num_columns
    maximum = float("-inf")
    total_exp = 0.0
    for first in range(0, num_columns, block):
        columns = first + tl.arange(0, block)
        values = tl.load(start + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(values))
        total_exp = total_exp * tl.exp(maximum - higher) + tl.sum(tl.exp(values - higher))
        maximum = higher
    label = tl.load(labels + row)
    value = tl.load(start + tl.maximum(label, 0)).to(tl.float32)
    tl.store(largest + row, maximum)
    tl.store(total + row, total_exp)
    tl.store(target + row, tl.where(label >= 0, value, 0.0))


@triton.jit
def _loss_gradients(logits, labels, largest, total, weights, num_columns, block: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * num_columns
    maximum = tl.load(largest + row)
    weight = tl.load(weights + row)
    scale = weight / tl.load(total + row)
    label = tl.load(labels + row)
    for first in range(0, num_columns, block):
        columns = first + tl.arange(0, block)
        inside = columns < num_columns
        values = tl.load(start + columns, mask=inside).to(tl.float32)
        values = tl.exp(values - maximum) * scale
        values = tl.where(columns == label, values - weight, values)
        tl.store(start + columns, values.to(logits.dtype.element_ty), mask=inside)


class TritonKernels(TorchKernels):
    """The two steps as Triton kernels; logits must be contiguous."""

    @staticmethod
    def statistics(logits: torch.Tensor, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(largest logit, sum of exp(logit - largest), the label's logit or 0 if it is another rank's) of [c, v]."""
        rows, columns = logits.shape
        largest, total, target = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
        _loss_statistics[(rows,)](logits, local, largest, total, target, columns, block=BLOCK, num_warps=NUM_WARPS)
        return largest, total, target

    @staticmethod
    def gradients(
        logits: torch.Tensor, local: torch.Tensor, largest: torch.Tensor, total: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """weight x (softmax - one-hot label) of [c, v], written over the logits."""
        rows, columns = logits.shape
        _loss_gradients[(rows,)](logits, local, largest, total, weights, columns, block=BLOCK, num_warps=NUM_WARPS)
        return logits
