"""The loss inside the output layer's products: what QuACK's gets and where chunks are used instead, with a stub."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from common.model.layers.loss import LinearCrossEntropy, TorchKernels, Vocabulary
from common.model.shape.chunks import fused_chunk_size

CPU = torch.device("cpu")


@pytest.fixture
def quack_loss(quack: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose Triton kernels are replaced by PyTorch's."""
    kernels: Any = ModuleType("common.model.kernels.loss_kernels")
    kernels.TritonKernels = TorchKernels
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.delitem(sys.modules, "common.model.kernels.quack_loss", raising=False)
    from common.model.kernels import quack_loss

    yield quack_loss
    sys.modules.pop("common.model.kernels.quack_loss", None)


def losses_and_gradients(kernels: Any, rows: int, num_tokens: int, group: Any = None) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(size, 32, generator=generator, requires_grad=True) for size in (200, rows)]
    labels = torch.randint(0, num_tokens, (200,), generator=generator)
    weights = (torch.rand(200, generator=generator) < 0.6).float()
    losses = LinearCrossEntropy.apply(*leaves, labels, weights, Vocabulary(group, 0, num_tokens), kernels, True)
    return [losses.detach(), *torch.autograd.grad((3 * losses).sum(), leaves)]


def test_losses_and_gradients_are_those_of_the_chunks(quack_loss: Any) -> None:
    kernels = quack_loss.QuackLoss()
    tiles = []
    inner = kernels._losses
    kernels._losses = lambda *given, **how: tiles.append(how["tile_n1"]) or inner(*given, **how)
    for mine, theirs in zip(
        losses_and_gradients(kernels, 384, 384), losses_and_gradients(TorchKernels(), 384, 384), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert tiles == [192]
    for vocab_size in (151936, 152064, 152064 + 256):
        assert quack_loss.unusable_reason(kernels, 64, vocab_size, CPU) == ""
    assert tiles == [192, 128, 192, 256], "each trial is QuACK's, of the tile that training takes"


@pytest.mark.parametrize(("rows", "num_tokens"), [(384, 380), (380, 380), (576, 576)])
def test_a_vocabulary_that_is_padded_or_does_not_fill_tiles_is_computed_in_chunks(
    quack_loss: Any, rows: int, num_tokens: int
) -> None:
    kernels = quack_loss.QuackLoss()
    kernels._losses = None
    for mine, theirs in zip(
        losses_and_gradients(kernels, rows, num_tokens),
        losses_and_gradients(TorchKernels(), rows, num_tokens),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_without_gradients_it_is_computed_in_chunks(quack_loss: Any) -> None:
    kernels = quack_loss.QuackLoss()
    kernels._losses = None
    hidden, weight = torch.randn(200, 32), torch.randn(384, 32)
    labels, weights = torch.randint(0, 384, (200,)), torch.ones(200)
    losses = LinearCrossEntropy.apply(hidden, weight, labels, weights, Vocabulary(None, 0, 384), kernels, False)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none"))


def test_a_wrong_or_failing_loss_is_reported(quack_loss: Any) -> None:
    kernels = quack_loss.QuackLoss()
    right = kernels._losses
    kernels._losses = lambda *given, **how: tuple(1.1 * part for part in right(*given, **how))
    assert quack_loss.unusable_reason(kernels, 64, 151936, CPU).startswith("its results are off by 10.")
    kernels._losses = lambda *given, **how: 1 / 0
    assert quack_loss.unusable_reason(kernels, 64, 151936, CPU) == "ZeroDivisionError: division by zero"
    assert quack_loss.unusable_reason(kernels, 64, 1000, CPU) == "1000 rows of the vocabulary cannot be divided by 128"


@pytest.mark.parametrize(
    ("tokens", "hidden_size", "size"),
    [(65536, 896, 4096), (16384, 2048, 4096), (2048, 2048, 1920), (8192, 4096, 3968), (4096 + 2000, 2048, 3968)],
)
def test_no_chunk_has_as_many_tokens_as_there_are_hidden_values(tokens: int, hidden_size: int, size: int) -> None:
    assert fused_chunk_size(tokens, hidden_size) == size
    full, last = divmod(tokens, size)
    assert hidden_size not in ([size] * bool(full) + [-(-last // 128) * 128])
