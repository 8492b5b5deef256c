"""Exchange of hidden states over the ranks of a tensor-parallel group, piece by piece beside the GEMMs that use them.

Letters: n tokens of a micro-batch, m = n / ranks of them, h hidden size, o output and i input features on this rank.

With sequence parallelism each rank holds m tokens between the layers (arXiv 2205.05198). A column-parallel layer
gathers them, a row-parallel one sums its output over the ranks and scatters it. Here the GEMM of one rank's tokens runs
while those of another are sent, as in Transformer Engine's ring exchange (comm_gemm_overlap) and in PyTorch's
`_pipelined_all_gather_and_consume`: gathered tokens are multiplied from this rank's own on, and other ranks' sums are
computed before this rank's own.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch

from common.model.layers.gradients import accumulate_main_grad, matmul_into

Pieces = Iterator[tuple[slice, torch.Tensor]]


class Gathering(Protocol):
    """Tokens on their way from all ranks."""

    def pieces(self) -> Pieces:
        """(rows of the whole, their values), this rank's own first."""

    def blocks(self) -> Pieces:
        """As `pieces`, the others' in one or two; the memory is used again by the second gathering after this one."""


class Scattering(Protocol):
    """A sum over ranks that is computed piece by piece."""

    def pieces(self) -> Pieces:
        """(rows of the whole, where to write this rank's addend), this rank's own last."""

    def total(self) -> torch.Tensor:
        """This rank's part of the sum, [m, h]."""


class Exchange(Protocol):
    """What all ranks of a group call in the same order."""

    size: int  # the number of ranks

    def gather(self, part: torch.Tensor) -> Gathering:
        """Begins to gather `part` [m, h] of each rank."""

    def scatter(self, rows: int, width: int, like: torch.Tensor) -> Scattering:
        """Begins a sum of [rows, width] over the ranks, in dtype and on the device of `like`."""


class Alone:
    """The Exchange of a single rank, or of one whose caller gathers and scatters; an instance is a single exchange."""

    size = 1

    def __init__(self, tensor: torch.Tensor | None = None) -> None:
        self.tensor = tensor

    def gather(self, part: torch.Tensor) -> "Alone":
        """As Exchange."""
        return Alone(part)

    def scatter(self, rows: int, width: int, like: torch.Tensor) -> "Alone":
        """As Exchange."""
        return Alone(like.new_empty(rows, width))

    def pieces(self) -> Pieces:
        """All rows."""
        yield slice(None), self.total()

    blocks = pieces

    def total(self) -> torch.Tensor:
        """As Scattering."""
        assert self.tensor is not None
        return self.tensor


class GatheredProduct(torch.autograd.Function):
    """x [m, h], weight [o, h], bias [o] or None -> gathered x weight^T + bias [n, o]. Saves x as it is here.

    The backward pass gathers x again while it computes the gradient of x, which is sent during that of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, exchange: Exchange
    ) -> torch.Tensor:
        """The product."""
        ctx.save_for_backward(x, weight)
        ctx.exchange, ctx.has_bias = exchange, bias is not None
        out = x.new_empty(len(x) * exchange.size, len(weight))
        for rows, part in exchange.gather(x.contiguous()).pieces():
            if bias is None:
                torch.mm(part, weight.t(), out=out[rows])
            else:
                torch.addmm(bias, part, weight.t(), out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        d_out = upstream[0].contiguous()
        gathering = ctx.exchange.gather(x.contiguous()) if ctx.needs_input_grad[1] else None
        scattering = ctx.exchange.scatter(len(d_out), x.shape[1], x)
        for rows, part in scattering.pieces():
            torch.mm(d_out[rows], weight, out=part)
        d_weight = None
        if gathering is not None:
            blocks = gathering.blocks()
            d_weight = accumulate_main_grad(weight, lambda total: add_products(total, blocks, d_out, gathered="right"))
        d_bias = d_out.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return scattering.total(), d_weight, d_bias, None


class ScatteredProduct(torch.autograd.Function):
    """x [n, i], weight [h, i] -> this rank's part of the sum over ranks of x weight^T, [m, h]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """The part."""
        ctx.save_for_backward(x, weight)
        ctx.exchange = exchange
        scattering = exchange.scatter(len(x), len(weight), x)
        for rows, part in scattering.pieces():
            torch.mm(x[rows], weight.t(), out=part)
        return scattering.total()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and weight."""
        x, weight = ctx.saved_tensors
        gathering = ctx.exchange.gather(upstream[0].contiguous())
        blocks = gathering.blocks()
        d_x = torch.empty_like(x)

        def multiply(total: torch.Tensor | None) -> None:
            for number, (rows, part) in enumerate(gathering.pieces()):
                torch.mm(part, weight, out=d_x[rows])
                if total is not None and not number:  # more to do while the others' are on their way
                    add_products(total, islice(blocks, 1), x, gathered="left")
            if total is not None:
                add_products(total, blocks, x, gathered="left")

        if ctx.needs_input_grad[1]:
            return d_x, accumulate_main_grad(weight, multiply), None
        multiply(None)
        return d_x, None, None


def add_products(total: torch.Tensor, blocks: Pieces, other: torch.Tensor, *, gathered: str) -> None:
    """Adds left^T right to the float32 `total`, of which `blocks` are one, and `other`, of all rows, is the other."""
    for rows, values in blocks:
        left, right = (values, other[rows]) if gathered == "left" else (other[rows], values)
        matmul_into(total, left, right, add=True)


class ExchangingLinear:
    """Mixin of a parallel linear layer; with an `exchange` it communicates piece by piece beside its GEMMs."""

    exchange: Exchange | None = None
    weight: torch.Tensor
    bias: torch.Tensor | None


def gathered_linear(base: Any) -> type[torch.nn.Module]:
    """`base`, a column-parallel linear layer without a norm, as an ExchangingLinear."""

    class GatheredLinear(ExchangingLinear, base):
        def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            """The output [s, b, o] for x [s / ranks, b, h], and no bias to be added later."""
            if self.exchange is None:
                return super().forward(x, *arguments, **options)
            bias = self.bias if self.bias is not None and self.bias.numel() else None  # Transformer Engine's is empty
            out = GatheredProduct.apply(x.flatten(0, 1), self.weight, bias, self.exchange)
            return out.view(-1, x.shape[1], len(self.weight)), None

    return GatheredLinear


def scattered_linear(base: Any) -> type[torch.nn.Module]:
    """`base`, a row-parallel linear layer without a bias, as an ExchangingLinear."""

    class ScatteredLinear(ExchangingLinear, base):
        def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            """The output [s / ranks, b, h] for x [s, b, i], and no bias."""
            if self.exchange is None:
                return super().forward(x, *arguments, **options)
            out = ScatteredProduct.apply(x.flatten(0, 1), self.weight, self.exchange)
            return out.view(-1, x.shape[1], len(self.weight)), None

    return ScatteredLinear


def set_exchange(block: Any, exchange: Exchange | None) -> None:
    """Has the linear layers and MLPs of `block`, a TransformerBlock, communicate by `exchange`."""
    for module in block.modules():
        if isinstance(module, ExchangingLinear):
            module.exchange = exchange
