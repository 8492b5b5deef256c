"""The Triton kernels against the same steps by PyTorch, in float32 and bfloat16."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.doctor.packages import version
from common.model.layers.loss import LinearCrossEntropy, TorchKernels, Vocabulary

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    """Frees the cache, for programs of other tests on the same GPU."""
    yield
    torch.cuda.empty_cache()


def needs(package: str) -> None:
    if not version(package):
        pytest.skip(f"needs {package.replace('_', '-')}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1000, 151936])
def test_both_kernels_give_the_same_statistics_and_gradients(dtype: torch.dtype, columns: int) -> None:
    from common.model.kernels.loss_kernels import TritonKernels

    torch.manual_seed(0)
    logits = (4 * torch.randn(65, columns, device="cuda")).to(dtype)
    logits[:, columns - 3 :] = float("-inf")
    labels = torch.randint(-1, columns - 3, (65,), device="cuda")
    labels[0] = -1
    weights = torch.rand(65, device="cuda")
    mine, theirs = (kernels.statistics(logits, labels) for kernels in (TritonKernels(), TorchKernels))
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected = TorchKernels.gradients(logits, labels, theirs[0], theirs[1], weights)
    found = TritonKernels.gradients(logits.clone(), labels, mine[0], mine[1], weights)
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("triton", 0.02),  # logits of bfloat16 have 8 bits
        ("quack", 1e-4),  # the losses are float32 sums
    ],
)
def test_the_loss_over_several_chunks_is_that_of_cross_entropy(name: str, bound: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9000, 256, device="cuda").bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(151936, 256, device="cuda")).bfloat16().requires_grad_()
    labels = torch.randint(0, 151936, (9000,), device="cuda")
    weights = (torch.rand(9000, device="cuda") < 0.5).float()
    vocabulary = Vocabulary(None, 0, 151936)
    losses = LinearCrossEntropy.apply(hidden, weight, labels, weights, vocabulary, whole_loss(name), True)
    gradients = torch.autograd.grad(losses.sum(), [hidden, weight])
    logits = hidden.float() @ weight.float().t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights
    assert (losses - expected).abs().max() < bound
    for found, theirs in zip(gradients, torch.autograd.grad(expected.sum(), [hidden, weight]), strict=True):
        error = (found.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 0.01, float(error)


def whole_loss(name: str) -> Any:
    from common.model.kernels.loss_kernels import TritonKernels
    from common.model.kernels.quack_loss import QuackLoss

    if name == "triton":
        return TritonKernels()
    needs("quack_kernels")
    return QuackLoss()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [4864, 1300])
def test_swiglu_and_its_gradient(dtype: torch.dtype, width: int) -> None:
    from common.model.kernels.swiglu import bias_swiglu

    torch.manual_seed(0)
    values = (3 * torch.randn(33, 2, 2 * width, device="cuda")).to(dtype).requires_grad_()
    above = torch.randn(33, 2, width, device="cuda").to(dtype)
    found = bias_swiglu(values, None)
    (gradient,) = torch.autograd.grad(found, values, above)
    exact = values.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    (expected_gradient,) = torch.autograd.grad(expected, exact, above.double())
    for mine, theirs in ((found, expected), (gradient, expected_gradient)):
        rtol, atol = (2**-8, 1e-6) if dtype is torch.bfloat16 else (1e-5, 1e-6)  # one rounding to 8 bits
        torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("s", "b", "g", "r", "d"), [(4096, 2, 2, 7, 64), (33, 3, 1, 8, 128), (33, 1, 4, 7, 128), (7, 5, 2, 1, 16)]
)
def test_queries_keys_and_values_are_split_and_rotated(
    dtype: torch.dtype, s: int, b: int, g: int, r: int, d: int
) -> None:
    from common.model.kernels.qkv_rope import split_and_rotate

    torch.manual_seed(0)
    mixed = torch.randn(s, b, g, (r + 2) * d, device="cuda").to(dtype).requires_grad_()
    positions = torch.arange(32768 - s, 32768, device="cuda")  # the far end of the context: large angles
    angles = positions[:, None] * 1e6 ** (-torch.arange(0, d, 2, device="cuda") / d)
    angles = torch.cat([angles, angles], -1)[:, None, None, :].float()
    found = split_and_rotate(mixed, angles, angles, [r * d, d, d])
    above = [torch.randn_like(part) for part in found]
    (gradient,) = torch.autograd.grad(found, mixed, above)

    exact = mixed.detach().double().requires_grad_()
    query, key, value = exact.split([r * d, d, d], -1)

    def rotated(part: torch.Tensor) -> torch.Tensor:
        first, second = part.chunk(2, -1)
        return part * angles.double().cos() + torch.cat([-second, first], -1) * angles.double().sin()

    expected = rotated(query.reshape(s, b, g * r, d)), rotated(key), value
    (expected_gradient,) = torch.autograd.grad(expected, exact, [part.double() for part in above])
    for mine, theirs in zip((*found, gradient), (*expected, expected_gradient), strict=True):
        rtol, atol = (2**-8, 1e-5) if dtype is torch.bfloat16 else (1e-5, 1e-5)
        torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "h"), [(33, 896), (20000, 1536), (4097, 3584), (2, 8192)])
def test_norms_and_those_of_a_sum(dtype: torch.dtype, n: int, h: int) -> None:
    from common.model.kernels.norm_kernels import TritonNorms

    torch.manual_seed(0)
    x, residual = (torch.randn(n, h, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.1 * torch.randn(h, device="cuda")).to(dtype).requires_grad_()
    past, above = (torch.randn(n, h, device="cuda").to(dtype) for _ in range(2))
    total, out = TritonNorms.norm_of_sum(x, residual, weight, 1e-6)
    of_sum = [total, out, *torch.autograd.grad([total, out], [x, residual, weight], [past, above])]
    alone = TritonNorms.norm(x, weight, 1e-6)
    of_x = [alone, *torch.autograd.grad(alone, [x, weight], above)]

    def exact(value: torch.Tensor, beside: torch.Tensor | None) -> list[torch.Tensor]:
        value, factor = value.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-6) * factor
        d_value, d_factor = torch.autograd.grad(normed, [value, factor], above.double())
        return [normed.detach(), d_value if beside is None else d_value + beside.double(), d_factor]

    rtol = 2**-8 if dtype is torch.bfloat16 else 1e-5  # one rounding to 8 bits
    torch.testing.assert_close(total.double(), x.double() + residual.double(), rtol=rtol, atol=1e-6)
    normed, d_x, d_weight = exact(total, past)
    expected = [total.double(), normed, d_x, d_x, d_weight, *exact(x, None)]
    for mine, theirs in zip([*of_sum, *of_x], expected, strict=True):
        # A weight's gradient is a sum over rows, of which some cancel.
        atol = rtol * float(theirs.abs().max()) / 10 if theirs.ndim == 1 else rtol / 10
        torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("heads", [(14, 2, 64), (16, 2, 128), (28, 4, 128), (8, 8, 128)])
def test_flash_attention_4_is_right_where_it_is_installed(heads: tuple[int, int, int]) -> None:
    from common.model.layers.attention import KINDS, unusable_reason

    needs("flash_attn_4")
    assert unusable_reason(KINDS["flash_attn_4"], heads, torch.device("cuda")) == ""


@pytest.mark.parametrize("kind", ["sdpa", "flash_attn_4"])
@pytest.mark.parametrize("heads", [(14, 2, 64), (28, 4, 128), (5, 1, 128)])
def test_attention_of_a_rows_last_queries_is_right_and_makes_no_mask(kind: str, heads: tuple[int, int, int]) -> None:
    """As context parallelism takes it: 1024 queries of 65,536 keys, whose mask in bf16 would be 128 MiB."""
    from common.model.layers.attention import KINDS, unusable_reason
    from common.model.probe import PROBED

    if kind == "flash_attn_4":
        needs("flash_attn_4")
    device = torch.device("cuda")
    assert unusable_reason(KINDS[kind], heads, device, PROBED // 4) == ""
    config = SimpleNamespace(softmax_scale=None, context_parallel_size=1)
    lengths = zip((1024, 65536, 65536), heads[:2] + heads[1:2], strict=True)
    leaves = [torch.randn(s, 1, n, heads[2], device="cuda").bfloat16().requires_grad_() for s, n in lengths]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = KINDS[kind](config, 1, None, "self").causal(*leaves)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize("kind", ["sdpa", "flash_attn_4"])
def test_documents_one_by_one_are_what_a_mask_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As local layers take rows of more than 8192 positions."""
    from common.model.layers.attention import KINDS
    from common.model.layers.documents import separation
    from common.model.shape import masks

    if kind == "flash_attn_4":
        needs("flash_attn_4")
    device, segments = torch.device("cuda"), (torch.rand(2, 2048) < 0.01).cumsum(1)
    config = SimpleNamespace(softmax_scale=None, context_parallel_size=1)
    leaves = [torch.randn(2048, 2, n, 128, device="cuda").bfloat16().requires_grad_() for n in (28, 4, 4)]
    weight = torch.randn(2048, 2, 28 * 128, device="cuda").bfloat16()

    def results(mask: torch.Tensor) -> list[torch.Tensor]:
        out = KINDS[kind](config, 1, None, "self")(*leaves, mask)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    expected = results(separation(segments, device))
    monkeypatch.setattr(masks, "MASK_ELEMENTS", 0)
    bounds = separation(segments, device)
    assert bounds.device.type == "cpu" and bounds.numel() > 10
    for mine, theirs in zip(results(bounds), expected, strict=True):
        assert (mine - theirs).abs().max() <= 0.02 * theirs.abs().max()


@pytest.mark.parametrize(("hidden_size", "width"), [(896, 4864), (1536, 8960), (2048, 11008), (3584, 18944 // 4)])
def test_quacks_products_are_right_where_they_are_installed(hidden_size: int, width: int) -> None:
    from common.model.kernels.quack_products import QuackProducts
    from common.model.layers.gated_mlp import unusable_reason

    needs("quack_kernels")
    assert unusable_reason(QuackProducts(), hidden_size, width, torch.device("cuda")) == ""


@pytest.mark.parametrize(("hidden_size", "vocab_size"), [(896, 151936), (1536, 151936), (2048, 151936), (3584, 152064)])
def test_quacks_loss_is_right_where_it_is_installed(hidden_size: int, vocab_size: int) -> None:
    from common.model.kernels.quack_loss import QuackLoss, unusable_reason

    needs("quack_kernels")
    assert unusable_reason(QuackLoss(), hidden_size, vocab_size, torch.device("cuda")) == ""
