"""The MLP with SwiGLU fused into its GEMMs (arXiv 2002.05202).

Letters: n tokens of a micro-batch, h hidden size, f this rank's part of ffn_hidden_size.

Unfused, SwiGLU reads and writes 3 f values per token in the forward pass and 5 f in the backward pass. Fused, the
epilogue of the first GEMM computes it, and that of the second one's input gradient computes the gradients of gate and
up. silu(gate) * up is not saved: the backward GEMM's epilogue computes it again.
"""

from typing import Any, Protocol

import torch
from torch.nn.functional import silu

from common.model.layers.gradients import accumulate_main_grad, matmul_into
from common.model.probe import PROBED, find_fault


class GatedProducts(Protocol):
    """The GEMMs around SwiGLU; `both` [n, 2f] is gate and up, in a layout of the implementation."""

    def up(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [n, h], weight [2f, h], the gate's rows first -> (both, silu(gate) * up [n, f])."""

    def down_gradient(
        self, d_out: torch.Tensor, weight: torch.Tensor, both: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """d_out [n, h], weight [h, f] -> (the gradient of both, possibly in place, silu(gate) * up [n, f])."""

    def input_gradient(self, d_both: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """weight [2f, h] -> the gradient of x [n, h]."""

    def add_weight_gradient(self, total: torch.Tensor, d_both: torch.Tensor, x: torch.Tensor) -> None:
        """Adds the gradient of the weight [2f, h] to `total`, float32."""


class TorchProducts:
    """The reference in plain PyTorch; both: the gate's f columns, then those of up."""

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
        d_activated = d_out @ weight
        gate, up = both.chunk(2, dim=1)
        sigmoid = gate.sigmoid()
        d_gate = d_activated * up * sigmoid * (1 + gate * (1 - sigmoid))
        return torch.cat([d_gate, d_activated * gate * sigmoid], dim=1), gate * sigmoid * up

    @staticmethod
    def input_gradient(d_both: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As GatedProducts."""
        return d_both @ weight

    @staticmethod
    def add_weight_gradient(total: torch.Tensor, d_both: torch.Tensor, x: torch.Tensor) -> None:
        """As GatedProducts."""
        matmul_into(total, d_both, x, add=True)


class GatedProduct(torch.autograd.Function):
    """x [n, h], up_weight [2f, h], down_weight [h, f] -> (silu(gate) * up) down_weight^T [n, h]; no biases."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor, products: GatedProducts
    ) -> torch.Tensor:
        """The result; saves x, gate and up."""
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
        d_down = d_up = None
        if ctx.needs_input_grad[2]:
            d_down = accumulate_main_grad(down_weight, lambda total: matmul_into(total, d_out, activated, add=True))
        d_x = products.input_gradient(d_both, up_weight)
        if ctx.needs_input_grad[1]:
            d_up = accumulate_main_grad(up_weight, lambda total: products.add_weight_gradient(total, d_both, x))
        return d_x, d_up, d_down, None


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
    out = GatedProduct.apply(*leaves, products)
    return [out.detach(), *torch.autograd.grad((out * tensors[3]).sum(), leaves)]
