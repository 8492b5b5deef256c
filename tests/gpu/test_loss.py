"""The Triton kernels of the loss against the same steps by PyTorch, in float32 and bfloat16."""

import pytest
import torch

from common.model.loss import LinearCrossEntropy, TorchKernels, Vocabulary

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1000, 151936])
def test_both_kernels_give_the_same_statistics_and_gradients(dtype: torch.dtype, columns: int) -> None:
    from common.model.loss_kernels import TritonKernels

    torch.manual_seed(0)
    logits = (4 * torch.randn(65, columns, device="cuda")).to(dtype)
    logits[:, columns - 3 :] = float("-inf")
    labels = torch.randint(-1, columns - 3, (65,), device="cuda")
    labels[0] = -1
    weights = torch.rand(65, device="cuda")
    mine, theirs = (kernels.statistics(logits, labels) for kernels in (TritonKernels, TorchKernels))
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected = TorchKernels.gradients(logits, labels, theirs[0], theirs[1], weights)
    found = TritonKernels.gradients(logits.clone(), labels, mine[0], mine[1], weights)
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-7)


def test_the_whole_loss_in_bfloat16_is_that_of_cross_entropy() -> None:
    from common.model.loss_kernels import TritonKernels

    torch.manual_seed(0)
    hidden = torch.randn(9000, 256, device="cuda").bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(151936, 256, device="cuda")).bfloat16().requires_grad_()
    labels = torch.randint(0, 151936, (9000,), device="cuda")
    weights = (torch.rand(9000, device="cuda") < 0.5).float()
    losses = LinearCrossEntropy.apply(hidden, weight, labels, weights, Vocabulary(None, 0, 151936), TritonKernels, True)
    gradients = torch.autograd.grad(losses.sum(), [hidden, weight])
    logits = hidden.float() @ weight.float().t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights
    assert (losses - expected).abs().max() < 0.02  # logits of bfloat16 have 8 bits
    for found, theirs in zip(gradients, torch.autograd.grad(expected.sum(), [hidden, weight]), strict=True):
        error = (found.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 0.01, float(error)
