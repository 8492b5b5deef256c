"""What a deterministic run relies on: torch's embedding is deterministic and precise, attention is deterministic."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import embedding

from common.doctor.packages import version
from common.model.layers.attention import KINDS, unusable_reason
from common.training.planning import determinism

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in determinism.environment().items():
        monkeypatch.setenv(name, value)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


def test_a_frequent_tokens_gradient_is_not_summed_in_bf16_and_is_reproducible() -> None:
    weight = torch.zeros(1000, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    tokens = torch.randint(0, 8, (16384,), generator=torch.Generator().manual_seed(0))
    expected = tokens.bincount(minlength=1000).float().cuda()
    tokens = tokens.cuda()
    (ones,) = torch.autograd.grad(embedding(tokens, weight).sum(), weight)
    torch.testing.assert_close(ones[:, 0].float(), expected, rtol=2**-8, atol=0)  # not 256, where sums of bf16 end
    above = torch.randn(16384, 256, device="cuda").bfloat16()
    first, *others = (torch.autograd.grad(embedding(tokens, weight), weight, above)[0] for _ in range(10))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kind", ["flash_attn_4", "sdpa"])
@pytest.mark.parametrize("heads", [(14, 2, 64), (28, 4, 128)])
def test_attention_gives_the_same_gradients_each_time(kind: str, heads: tuple[int, int, int]) -> None:
    if kind == "flash_attn_4" and not version("flash_attn_4"):
        pytest.skip("needs flash-attn-4")
    assert unusable_reason(KINDS[kind], heads, torch.device("cuda")) == ""
    num_heads, num_groups, size = heads
    generator = torch.Generator("cuda").manual_seed(0)
    given = [
        torch.randn(4096, 2, count, size, device="cuda", generator=generator).bfloat16().requires_grad_()
        for count in (num_heads, num_groups, num_groups)
    ]
    above = torch.randn(4096, 2, num_heads * size, device="cuda", generator=generator).bfloat16()
    attention = KINDS[kind](SimpleNamespace(softmax_scale=None, context_parallel_size=1), 1, None, "self")
    first, *others = (torch.autograd.grad(attention(*given, None), given, above) for _ in range(5))
    assert all(torch.equal(mine, theirs) for other in others for mine, theirs in zip(first, other, strict=True))
