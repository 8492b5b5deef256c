"""The MLP with SwiGLU fused into its GEMMs (arXiv 2002.05202).

Letters: n tokens of a micro-batch, h hidden size, f this rank's part of ffn_hidden_size.

Unfused, SwiGLU reads and writes 3 f values per token in the forward pass and 5 f in the backward pass. Fused, the
epilogue of the first GEMM computes it, and that of the second one's input gradient computes the gradients of gate and
up. silu(gate) * up is not saved: the backward GEMM's epilogue computes it again.
"""

from typing import Any, Protocol

import torch
from torch.nn.functional import silu

from common.model.layers.exchange import Alone, Exchange, Pieces, add_products
from common.model.layers.gradients import accumulate_main_grad, matmul_into
from common.model.probe import PROBED, find_fault


class GatedProducts(Protocol):
    """The GEMMs around SwiGLU; `both` [n, 2f] is gate and up, in a layout of the implementation."""

    def up(self, x: torch.Tensor, weight: torch.Tensor, both: torch.Tensor, activated: torch.Tensor) -> None:
        """x [n, h], weight [2f, h], the gate's rows first; writes `both` and silu(gate) * up to `activated` [n, f]."""

    def down_gradient(
        self, d_out: torch.Tensor, weight: torch.Tensor, both: torch.Tensor, activated: torch.Tensor
    ) -> None:
        """d_out [n, h], weight [h, f]; writes the gradient of `both` over it, and silu(gate) * up to `activated`."""

    def input_gradient(self, d_both: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """weight [2f, h]; writes the gradient of x [n, h] to `out`."""

    def add_weight_gradient(self, total: torch.Tensor, d_both: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the gradient of the weight [2f, h] to `total`, float32."""


class TorchProducts:
    """The reference in plain PyTorch; both: the gate's f columns, then those of up."""

    @staticmethod
    def up(x: torch.Tensor, weight: torch.Tensor, both: torch.Tensor, activated: torch.Tensor) -> None:
        """As GatedProducts."""
        torch.mm(x, weight.t(), out=both)
        gate, up = both.chunk(2, dim=1)
        torch.mul(silu(gate), up, out=activated)

    @staticmethod
    def down_gradient(d_out: torch.Tensor, weight: torch.Tensor, both: torch.Tensor, activated: torch.Tensor) -> None:
        """As GatedProducts."""
        d_activated = d_out @ weight
        gate, up = both.chunk(2, dim=1)
        sigmoid = gate.sigmoid()
        torch.mul(gate * sigmoid, up, out=activated)
        d_gate = d_activated * up * sigmoid * (1 + gate * (1 - sigmoid))
        both.copy_(torch.cat([d_gate, d_activated * gate * sigmoid], dim=1))

    @staticmethod
    def input_gradient(d_both: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """As GatedProducts."""
        torch.mm(d_both, weight, out=out)

    @staticmethod
    def add_weight_gradient(total: torch.Tensor, d_both: torch.Tensor, x: torch.Tensor) -> None:
        """As GatedProducts."""
        matmul_into(total, d_both, x, add=True)


class GatedProduct(torch.autograd.Function):
    """x, up_weight [2f, h], down_weight [h, f] -> (silu(gate) * up) down_weight^T; no biases.

    x and the result are this rank's tokens of what `exchange` gathers and scatters, with Alone all: [n, h]. Saves them
    and gate and up; the backward pass gathers x again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up_weight: torch.Tensor,
        down_weight: torch.Tensor,
        products: GatedProducts,
        exchange: Exchange,
    ) -> torch.Tensor:
        """The result."""
        rows, width = len(x) * exchange.size, down_weight.shape[1]
        both, activated = x.new_empty(rows, 2 * width), x.new_empty(rows, width)
        for part, values in exchange.gather(x.contiguous()).pieces():
            products.up(values, up_weight, both[part], activated[part])
        scattering = exchange.scatter(rows, len(down_weight), x)
        for part, out in scattering.pieces():
            torch.mm(activated[part], down_weight.t(), out=out)
        ctx.save_for_backward(x, up_weight, down_weight, both)
        ctx.products, ctx.exchange = products, exchange
        return scattering.total()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and of the weights."""
        x, up_weight, down_weight, both = ctx.saved_tensors
        products: GatedProducts = ctx.products
        activated = both.new_empty(len(both), down_weight.shape[1])
        upstream_rows = ctx.exchange.gather(upstream[0].contiguous())
        for part, values in upstream_rows.pieces():
            products.down_gradient(values, down_weight, both[part], activated[part])
        input_rows = ctx.exchange.gather(x.contiguous()) if ctx.needs_input_grad[1] else None
        scattering = ctx.exchange.scatter(len(both), x.shape[1], x)
        for part, out in scattering.pieces():
            products.input_gradient(both[part], up_weight, out)
        d_down = d_up = None
        if ctx.needs_input_grad[2]:
            d_down = accumulate_main_grad(
                down_weight, lambda total: add_products(total, upstream_rows.blocks(), activated, gathered="left")
            )
        if input_rows is not None:
            d_up = accumulate_main_grad(up_weight, lambda total: _add_up(products, total, both, input_rows.blocks()))
        return scattering.total(), d_up, d_down, None, None


def _add_up(products: GatedProducts, total: torch.Tensor, d_both: torch.Tensor, blocks: Pieces) -> None:
    for rows, values in blocks:
        products.add_weight_gradient(total, d_both[rows], values)


def unusable_reason(products: GatedProducts, hidden_size: int, width: int, device: torch.device) -> str:
    """Why `products` cannot be used for bf16 tensors of these sizes on `device`; empty if the results are right."""
    generator = torch.Generator(device).manual_seed(0)  # on the device: 72B's weights take seconds on a CPU
    shapes = [(PROBED, hidden_size), (2 * width, hidden_size), (hidden_size, width), (PROBED, hidden_size)]
    scales = [1.0, hidden_size**-0.5, width**-0.5, 1.0]
    inputs = [
        (scale * torch.randn(shape, generator=generator, device=device)).bfloat16()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    reference = TorchProducts()
    return find_fault(lambda: _results(products, inputs), lambda: _results(reference, [x.float() for x in inputs]))


def _results(products: GatedProducts, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of (output * last tensor).sum() with respect to the three others."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = GatedProduct.apply(*leaves, products, Alone())
    return [out.detach(), *torch.autograd.grad((out * tensors[3]).sum(), leaves)]
