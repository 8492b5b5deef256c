"""The output layer with its loss fused into the GEMMs, by QuACK (github.com/Dao-AILab/quack, package quack-kernels).

The first GEMM writes the exponentials of the logits, each tile of a row scaled by its own power of two, and their sums.
The other two apply the scales as they read, so that neither logits nor their gradients are written
(linear_cross_entropy.py).
"""

from typing import Any

import torch

from common.model.kernels.loss_kernels import TritonKernels
from common.model.layers.loss import LinearCrossEntropy, LossInputs, LossParts, Vocabulary
from common.model.probe import PROBED, find_fault
from common.model.shape.chunks import fused_chunk_size

# Columns of a tile, the fastest first, and vocabulary rows to test it with, which no faster tile divides.
TILES = {192: 1920, 256: 1792, 128: 896}
MULTIPLE = 128  # must divide the rows of the vocabulary
IGNORED = -100


def tile_of(rows: int) -> int | None:
    """The tile for a vocabulary of `rows` rows; None if QuACK's GEMMs cannot divide it."""
    return None if rows % MULTIPLE else next(tile for tile in TILES if rows % tile == 0)


class QuackLoss(TritonKernels):
    """Kernels of LinearCrossEntropy; raises ImportError if quack is not installed.

    Falls back to chunks with Triton's kernels where QuACK's cannot run, as with TP. Loss weights must be 0 or 1.
    """

    def __init__(self) -> None:
        from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy_fwd

        self._losses = scaled_exp_linear_cross_entropy_fwd

    def losses(self, inputs: LossInputs, with_gradients: bool) -> LossParts:
        """As TorchKernels; in chunks with TP, a padded vocabulary or one that does not fill tiles.

        Without gradients too: QuACK's forward-only path was not tested.
        """
        hidden, weight, local, weights, vocabulary = inputs
        rows = weight.shape[0]
        tile = tile_of(rows)
        if not with_gradients or tile is None or vocabulary.num_tokens < rows or vocabulary.num_ranks > 1:
            return super().losses(inputs, with_gradients)
        number, width = hidden.shape
        losses, d_hidden, d_weight = self._losses(
            hidden.contiguous(),
            weight,
            torch.where((weights > 0) & (local >= 0), local, IGNORED),
            fused_chunk_size(number, width),
            IGNORED,
            need_dx=True,
            need_dw=weight.requires_grad,
            tile_n1=tile,
        )
        return losses[:number], d_hidden[:number], d_weight


def unusable_reason(kernels: Any, hidden_size: int, vocab_size: int, device: torch.device) -> str:
    """Why `kernels` cannot compute the loss for bf16 tensors of these sizes on `device`; empty if they can."""
    tile = tile_of(vocab_size)
    if tile is None:
        return f"{vocab_size} rows of the vocabulary cannot be divided by {MULTIPLE}"
    rows = TILES[tile]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PROBED, hidden_size, generator=generator).bfloat16().to(device)
    weight = (torch.randn(rows, hidden_size, generator=generator) * hidden_size**-0.5).bfloat16().to(device)
    labels = torch.randint(0, rows, (PROBED,), generator=generator).to(device)
    weights = (torch.rand(PROBED, generator=generator) < 0.7).float().to(device)

    def with_kernels() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        losses = LinearCrossEntropy.apply(*leaves, labels, weights, Vocabulary(None, 0, rows), kernels, True)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    def reference() -> list[torch.Tensor]:
        leaves = [x.float().requires_grad_() for x in (hidden, weight)]
        losses = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].t(), labels, reduction="none") * weights
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    return find_fault(with_kernels, reference)
