"""The MLP with SwiGLU inside its products, on the CPU: QuACK's calls by a stub that keeps its layouts."""

from typing import Any

import pytest
import torch

from common.model.kernels.quack_products import QuackProducts
from common.model.layers.exchange import Alone
from common.model.layers.gated_mlp import GatedProduct, TorchProducts, unusable_reason

CPU = torch.device("cpu")
N, H, F = 40, 24, 64


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(N, H), (2 * F, H), (H, F)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def expected(x: torch.Tensor, up_weight: torch.Tensor, down_weight: torch.Tensor) -> list[torch.Tensor]:
    """The output by autograd alone, and the gradients under its sum of squares."""
    gate, up = (x @ up_weight.t()).chunk(2, 1)
    out = (torch.nn.functional.silu(gate) * up) @ down_weight.t()
    return [out, *torch.autograd.grad(out.square().sum(), [x, up_weight, down_weight])]


def test_its_gradients_are_those_of_autograd() -> None:
    given = tensors(torch.float64)
    out = GatedProduct.apply(*given, TorchProducts(), Alone())
    found = [out, *torch.autograd.grad(out.square().sum(), given)]
    for mine, theirs in zip(found, expected(*given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # weights' gradients are summed in float32


def test_weights_gradients_are_added_to_main_grad() -> None:
    given = tensors(torch.float32)
    for weight in given[1:]:
        weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    for _ in range(2):
        GatedProduct.apply(*given, TorchProducts(), Alone()).square().sum().backward()
    for weight, gradient in zip(given[1:], expected(*given)[2:], strict=True):
        assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(weight.main_grad, 1 + 2 * gradient, rtol=1e-4, atol=1e-3)  # type: ignore[attr-defined]


def test_quacks_products_are_called_with_its_layouts(quack: Any) -> None:
    assert unusable_reason(QuackProducts(), H, F, CPU) == ""


def test_wrong_results_are_reported(quack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = quack.gemm_tuned.fn

    def without_layout(*args: Any, concat_layout: tuple[str, ...], **kwargs: Any) -> None:
        right(*args, concat_layout=("out",) if concat_layout == ("B",) else concat_layout, **kwargs)

    monkeypatch.setattr(quack.gemm_tuned, "fn", without_layout)
    assert unusable_reason(QuackProducts(), H, H, CPU).startswith("its results are off by ")


def test_failing_kernels_are_reported(quack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such tile\nand more")

    monkeypatch.setattr(quack, "gemm_dgated", raising)
    assert unusable_reason(QuackProducts(), H, F, CPU) == "RuntimeError: no such tile"
