"""The output layer with its loss inside its products, by QuACK (github.com/Dao-AILab/quack), of quack-kernels.

The first product writes the logits' exponentials, each tile of a row by a power of two of its own, with their sums; the
other two scale them as they read, so neither logits nor their gradients are ever written (its linear_cross_entropy.py).
"""

from typing import Any

import torch

from common.model.chunks import fused_chunk_size
from common.model.loss import LinearCrossEntropy, LossParts, Vocabulary
from common.model.loss_kernels import TritonKernels

TILES = (192, 256, 128)  # columns of a tile: what divides the vocabulary
IGNORED = -100


class QuackLoss(TritonKernels):
    """What LinearCrossEntropy computes by; raises ImportError where quack is not installed.

    Where QuACK's cannot, as over tensor-parallel ranks, the chunks of Triton's are left. Weights must be 0 or 1.
    """

    def __init__(self) -> None:
        from quack.linear_cross_entropy import scaled_exp_linear_cross_entropy_fwd

        self._losses = scaled_exp_linear_cross_entropy_fwd

    def at_once(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        local: torch.Tensor,
        weights: torch.Tensor,
        vocabulary: Vocabulary,
        with_gradients: bool,
    ) -> LossParts | None:
        """What `in_chunks` gives; None over ranks, and where the vocabulary is padded or does not fill tiles.

        Without gradients too: QuACK's way to have the losses alone was not tried.
        """
        rows = weight.shape[0]
        tile = next((tile for tile in TILES if rows % tile == 0), None)
        if not with_gradients or tile is None or vocabulary.num_tokens < rows or vocabulary.num_ranks > 1:
            return None
        number, width = hidden.shape
        losses, *gradients = self._losses(
            hidden.contiguous(),
            weight,
            torch.where((weights > 0) & (local >= 0), local, IGNORED),
            fused_chunk_size(number, width),
            IGNORED,
            need_dx=True,
            need_dw=True,
            tile_n1=tile,
        )
        d_hidden, d_weight = gradients
        return losses[:number], d_hidden[:number], d_weight


TOLERANCE = 0.02  # of the largest value: bf16 has 8 bits
PROBED = 320


def why_not(kernels: Any, hidden_size: int, vocab_size: int, device: torch.device) -> str:
    """Why `kernels` cannot give the loss for bf16 tensors of these sizes on `device`; empty where all is right."""
    tile = next((tile for tile in TILES if vocab_size % tile == 0), None)
    if tile is None:
        return f"{vocab_size} rows of the vocabulary cannot be divided by 128"
    rows = 7 * tile  # of the tiles' columns, these alone divide it
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(PROBED, hidden_size, generator=generator).bfloat16().to(device)
    weight = (torch.randn(rows, hidden_size, generator=generator) * hidden_size**-0.5).bfloat16().to(device)
    labels = torch.randint(0, rows, (PROBED,), generator=generator).to(device)
    weights = (torch.rand(PROBED, generator=generator) < 0.7).float().to(device)

    def results(hidden: torch.Tensor, weight: torch.Tensor, exact: bool) -> list[torch.Tensor]:
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        if exact:
            losses = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none") * weights
        else:
            losses = LinearCrossEntropy.apply(*leaves, labels, weights, Vocabulary(None, 0, rows), kernels, True)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    try:
        found = results(hidden.clone(), weight.clone(), exact=False)
    except Exception as error:  # whatever a kernel or its compiler raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    right = results(hidden.float(), weight.float(), exact=True)
    worst = max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, right, strict=True))
    return "" if worst <= TOLERANCE else f"its results are off by {worst:.1%}"
