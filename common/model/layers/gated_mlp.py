"""The MLP with SwiGLU inside its matrix products (arXiv 2002.05202): no pass over its halves by itself.

Letters: n tokens of a micro-batch, h hidden size, f this rank's part of ffn_hidden_size.

Apart, SwiGLU reads and writes 3 f values a token on the way forward and 5 f back. Here the product before it writes
them, and the gradient of the product after it is turned into theirs as it is written. silu(gate) * up is not kept: it
comes out of the backward pass's product again.
"""

from typing import Any, Protocol

import torch
from torch.nn.functional import silu

from common.model.layers.gradients import give_gradient, put_product
from common.model.probe import PROBED, find_fault


class GatedProducts(Protocol):
    """The products around SwiGLU; `both` [n, 2f] is gate and up in an order of their own."""

    def up(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [n, h], weight [2f, h], the gate's rows first -> (both, silu(gate) * up [n, f])."""

    def down_gradient(
        self, d_out: torch.Tensor, weight: torch.Tensor, both: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d_out [n, h], weight [h, f] -> (the gradient of both, maybe in its place, silu(gate) * up [n, f] again)."""

    def input_gradient(self, d_both: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """weight [2f, h] -> the gradient of x [n, h]."""

    def add_weight_gradient(self, total: torch.Tensor, d_both: torch.Tensor, x: torch.Tensor) -> None:
        """Adds that of the weight [2f, h] to `total`, float32."""


class TorchProducts:
    """The four in plain PyTorch, by which others are judged; both: the gate's f columns, then those of up."""

    @staticmethod
    def up(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As GatedProducts."""
        both = x @ weight.t()
        gate, up = both.chunk(2, dim=1)
        return both, silu(gate) * up

    @staticmethod
    def down_gradient(
        d_out: torch.Tensor, weight: torch.Tensor, both: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As GatedProducts."""
        above = d_out @ weight
        gate, up = both.chunk(2, dim=1)
        share = gate.sigmoid()
        d_gate = above * up * share * (1 + gate * (1 - share))
        return torch.cat([d_gate, above * gate * share], dim=1), gate * share * up

    @staticmethod
    def input_gradient(d_both: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As GatedProducts."""
        return d_both @ weight

    @staticmethod
    def add_weight_gradient(total: torch.Tensor, d_both: torch.Tensor, x: torch.Tensor) -> None:
        """As GatedProducts."""
        put_product(total, d_both, x, add=True)


class GatedProduct(torch.autograd.Function):
    """x [n, h], up_weight [2f, h], down_weight [h, f] -> (silu(gate) * up) down_weight^T [n, h]; no biases."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor, products: GatedProducts
    ) -> torch.Tensor:
        """The result; x and both halves are kept."""
        both, activated = products.up(x, up_weight)
        ctx.save_for_backward(x, up_weight, down_weight, both)
        ctx.products = products
        return activated @ down_weight.t()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x and of the weights."""
        x, up_weight, down_weight, both = ctx.saved_tensors
        products: GatedProducts = ctx.products
        d_out = upstream[0].contiguous()
        d_both, activated = products.down_gradient(d_out, down_weight, both)
        d_down = give_gradient(down_weight, lambda total: put_product(total, d_out, activated, add=True))
        d_x = products.input_gradient(d_both, up_weight)
        d_up = give_gradient(up_weight, lambda total: products.add_weight_gradient(total, d_both, x))
        return d_x, d_up, d_down, None


def why_not(products: GatedProducts, hidden_size: int, width: int, device: torch.device) -> str:
    """Why `products` cannot be used for bf16 tensors of h and f on `device`; empty where all they give is right."""
    generator = torch.Generator(device).manual_seed(0)  # whole weights: seconds on a CPU at the sizes of 72B
    shapes = [(PROBED, hidden_size), (2 * width, hidden_size), (hidden_size, width), (PROBED, hidden_size)]
    scales = [1.0, hidden_size**-0.5, width**-0.5, 1.0]
    given = [
        (by * torch.randn(shape, generator=generator, device=device)).bfloat16()
        for shape, by in zip(shapes, scales, strict=True)
    ]
    return find_fault(lambda: _results(products, given), lambda: _results(TorchProducts(), [x.float() for x in given]))


def _results(products: GatedProducts, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of the three tensors before the last under its (output * last).sum()."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = GatedProduct.apply(*leaves, products)
    return [out.detach(), *torch.autograd.grad((out * tensors[3]).sum(), leaves)]
