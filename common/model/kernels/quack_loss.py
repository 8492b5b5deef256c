"""The output layer with its loss inside its products, by QuACK (github.com/Dao-AILab/quack), of quack-kernels.

The first product writes the logits' exponentials, each tile of a row by a power of two of its own, with their sums; the
other two scale them as they read, so neither logits nor their gradients are ever written (its linear_cross_entropy.py).
"""

from typing import Any

import torch

from common.model.kernels.loss_kernels import TritonKernels
from common.model.layers.loss import LinearCrossEntropy, LossInputs, LossParts, Vocabulary
from common.model.probe import PROBED, find_fault
from common.model.shape.chunks import fused_chunk_size

# Columns of a tile, the best first, and rows of a vocabulary for its trial, which no better one divides.
TILES = {192: 1920, 256: 1792, 128: 896}
MULTIPLE = 128  # of which the rows of the vocabulary have to be one
IGNORED = -100


def tile_of(rows: int) -> int | None:
    """The tile for a vocabulary of so many rows; None where QuACK's products cannot divide it."""
    return None if rows % MULTIPLE else next(tile for tile in TILES if rows % tile == 0)


class QuackLoss(TritonKernels):
    """What LinearCrossEntropy computes by; raises ImportError where quack is not installed.

    Where QuACK's cannot, as over tensor-parallel ranks, the chunks of Triton's are left. Weights must be 0 or 1.
    """

    def __init__(self) -> None:
        from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy_fwd

        self._losses = scaled_exp_linear_cross_entropy_fwd

    def losses(self, given: LossInputs, with_gradients: bool) -> LossParts:
        """As TorchKernels; in chunks over ranks, and where the vocabulary is padded or does not fill tiles.

        Without gradients too: QuACK's way to have the losses alone was not tried.
        """
        hidden, weight, local, weights, vocabulary = given
        rows = weight.shape[0]
        tile = tile_of(rows)
        if not with_gradients or tile is None or vocabulary.num_tokens < rows or vocabulary.num_ranks > 1:
            return super().losses(given, with_gradients)
        number, width = hidden.shape
        losses, d_hidden, d_weight = self._losses(
            hidden.contiguous(),
            weight,
            torch.where((weights > 0) & (local >= 0), local, IGNORED),
            fused_chunk_size(number, width),
            IGNORED,
            need_dx=True,
            need_dw=True,
            tile_n1=tile,
        )
        return losses[:number], d_hidden[:number], d_weight


def why_not(kernels: Any, hidden_size: int, vocab_size: int, device: torch.device) -> str:
    """Why `kernels` cannot give the loss for bf16 tensors of these sizes on `device`; empty where all is right."""
    tile = tile_of(vocab_size)
    if tile is None:
        return f"{vocab_size} rows of the vocabulary cannot be divided by {MULTIPLE}"
    rows = TILES[tile]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PROBED, hidden_size, generator=generator).bfloat16().to(device)
    weight = (torch.randn(rows, hidden_size, generator=generator) * hidden_size**-0.5).bfloat16().to(device)
    labels = torch.randint(0, rows, (PROBED,), generator=generator).to(device)
    weights = (torch.rand(PROBED, generator=generator) < 0.7).float().to(device)

    def by_kernels() -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        losses = LinearCrossEntropy.apply(*leaves, labels, weights, Vocabulary(None, 0, rows), kernels, True)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    def exactly() -> list[torch.Tensor]:
        leaves = [x.float().requires_grad_() for x in (hidden, weight)]
        losses = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].t(), labels, reduction="none") * weights
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    return find_fault(by_kernels, exactly)
