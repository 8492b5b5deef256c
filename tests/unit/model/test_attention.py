"""Core attention: which is selected, and that all give the same."""

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import KitError
from common.model.layers import attention
from common.model.layers.attention import (
    FlashAttention,
    FlashAttention4,
    SdpaAttention,
    select_core_attention,
    unusable_reason,
)
from common.model.layers.context_parallel import chunk_numbers, context_parallel_slice
from common.model.layers.documents import documents_of_chunk, separation
from common.model.probe import PROBED
from common.model.shape import masks

CPU, HEADS = torch.device("cpu"), (8, 2, 16)
STUBS = Path(__file__).parents[2] / "stubs"


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(STUBS / "flash_attn"))
    import flash_attn

    flash_attn.GROUPS.clear()
    flash_attn.DETERMINISTIC.clear()
    yield flash_attn
    del sys.modules["flash_attn"]


def attend(kind: type[SdpaAttention], mask: torch.Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(32, 3, count, 16, generator=generator).to(dtype) for count in (8, 2, 2))
    module = kind(SimpleNamespace(softmax_scale=0.3, context_parallel_size=1), 1, None, "self")
    return module(query, key, value, mask)


def test_flash_attention_gives_what_sdpa_gives_and_gets_the_groups_uncopied(flash: Any) -> None:
    mine, theirs = attend(FlashAttention), attend(SdpaAttention, dtype=torch.float32)
    assert mine.shape == theirs.shape == (32, 3, 128)
    assert (mine.float() - theirs).abs().max() <= 0.02 * theirs.abs().max()
    assert flash.GROUPS == [(8, 2)]


def test_flash_attention_4_gives_what_sdpa_gives_where_megatron_core_has_it(flash_4: Any) -> None:
    mine, theirs = attend(FlashAttention4), attend(SdpaAttention, dtype=torch.float32)
    assert mine.shape == theirs.shape == (32, 3, 128) and mine.is_contiguous()
    assert (mine.float() - theirs).abs().max() <= 0.02 * theirs.abs().max()
    assert unusable_reason(FlashAttention4, HEADS, CPU) == ""  # gradients too


def test_transformer_engines_own_is_used_where_none_works(
    flash_4: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="kit"):
        assert select_core_attention(("flash_attn_4",), HEADS, CPU, engine=True) is FlashAttention4
        monkeypatch.setattr(flash_4, "_flash_attn_bwd", raising)
        assert select_core_attention(("flash_attn_4",), HEADS, CPU, engine=True) is None
    reason = "flash_attn_4: RuntimeError: no kernel for this head size"
    assert caplog.messages == ["core attention: flash_attn_4", f"core attention: Transformer Engine's ({reason})"]
    with pytest.raises(KitError, match="no core attention works here"):
        select_core_attention(("flash_attn_4",), HEADS, CPU)


def test_with_a_mask_or_in_float32_it_is_sdpa(flash: Any) -> None:
    mask = separation(torch.tensor([[0] * 10 + [1] * 22]).expand(3, -1), CPU)
    assert torch.equal(attend(FlashAttention, mask), attend(SdpaAttention, mask))
    assert torch.equal(attend(FlashAttention, dtype=torch.float32), attend(SdpaAttention, dtype=torch.float32))
    assert flash.GROUPS == []


def test_the_first_that_works_is_used_and_logged(flash: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kit"):
        assert select_core_attention(("flash_attn", "sdpa"), HEADS, CPU) is FlashAttention
        assert select_core_attention(("sdpa", "flash_attn"), HEADS, CPU) is SdpaAttention
    assert caplog.messages == ["core attention: flash_attn", "core attention: sdpa"]


def test_a_missing_one_is_skipped_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kit"):
        assert select_core_attention(("flash_attn", "sdpa"), HEADS, CPU) is SdpaAttention
    assert caplog.messages == ["core attention: sdpa (flash_attn: no module flash_attn)"]


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel for this head size\nat line 1")


def not_causal(q: Any, k: Any, v: Any, **_: Any) -> Any:
    from flash_attn import flash_attn_func

    return flash_attn_func.right(q, k, v, causal=False)


def no_gradient(q: Any, k: Any, v: Any, **more: Any) -> Any:
    from flash_attn import flash_attn_func

    return flash_attn_func.right(q, k, v.detach(), **more) + 0 * v.sum()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (raising, "RuntimeError: no kernel for this head size"),
        (not_causal, "its results are off by"),
        (no_gradient, "its results are off by"),
    ],
)
def test_one_that_fails_or_is_wrong_is_skipped(
    kernel: Any, reason: str, flash: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.right = flash.flash_attn_func
    monkeypatch.setattr(flash, "flash_attn_func", kernel)
    assert unusable_reason(FlashAttention, HEADS, CPU).startswith(reason)
    assert select_core_attention(("flash_attn", "sdpa"), HEADS, CPU) is SdpaAttention
    with pytest.raises(KitError, match="no core attention works here .flash_attn: "):
        select_core_attention(("flash_attn",), HEADS, CPU)


def test_flash_kernels_are_deterministic_where_torch_is(flash: Any, deterministic: None) -> None:
    assert select_core_attention(("flash_attn",), HEADS, CPU) is FlashAttention
    attend(FlashAttention)
    assert set(flash.DETERMINISTIC) == {True}
    torch.use_deterministic_algorithms(False)
    attend(FlashAttention)
    assert flash.DETERMINISTIC[-1] is False


def test_flash_attention_4_is_deterministic_in_its_backward_pass(flash_4: Any, deterministic: None) -> None:
    flash_4.DETERMINISTIC.clear()
    assert unusable_reason(FlashAttention4, HEADS, CPU) == ""
    assert flash_4.DETERMINISTIC and all(flash_4.DETERMINISTIC)


def test_a_nondeterministic_flash_kernel_is_skipped(
    flash: Any, deterministic: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = flash.flash_attn_func

    def older(q: Any, k: Any, v: Any, *, softmax_scale: float | None = None, causal: bool = False) -> Any:
        return right(q, k, v, softmax_scale=softmax_scale, causal=causal)

    monkeypatch.setattr(flash, "flash_attn_func", older)
    with caplog.at_level(logging.INFO, logger="kit"):
        assert select_core_attention(("flash_attn", "sdpa"), HEADS, CPU) is SdpaAttention
    assert (
        "sdpa (flash_attn: TypeError: " in caplog.text and "unexpected keyword argument 'deterministic'" in caplog.text
    )


def test_a_nondeterministic_kernel_is_skipped_where_torch_is_deterministic(
    flash: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = flash.flash_attn_func, []

    def varying(*tensors: Any, **how: Any) -> Any:
        calls.append(None)
        return right(*tensors, **how) * (1 + 2**-7 * (len(calls) % 2))  # one bit of bfloat16

    monkeypatch.setattr(flash, "flash_attn_func", varying)
    assert unusable_reason(FlashAttention, HEADS, CPU) == ""
    torch.use_deterministic_algorithms(True)
    try:
        assert unusable_reason(FlashAttention, HEADS, CPU) == "its results differ from run to run"
    finally:
        torch.use_deterministic_algorithms(False)


def test_probing_draws_nothing_from_the_runs_own_random_numbers() -> None:
    before = torch.get_rng_state()
    assert unusable_reason(SdpaAttention, HEADS, CPU) == ""
    assert torch.equal(torch.get_rng_state(), before)


def test_kernels_are_tested_on_the_last_queries_of_a_row_where_those_are_needed(
    flash: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash_attn before 2.1 takes the first queries of the row for its last."""
    right = flash.flash_attn_func
    assert select_core_attention(("flash_attn", "sdpa"), HEADS, CPU, chunked=True) is FlashAttention

    def older(q: Any, k: Any, v: Any, **more: Any) -> Any:
        return right(q, k[:, : q.shape[1]], v[:, : q.shape[1]], **more) + 0 * v.sum()

    monkeypatch.setattr(flash, "flash_attn_func", older)
    assert select_core_attention(("flash_attn", "sdpa"), HEADS, CPU) is FlashAttention
    assert select_core_attention(("flash_attn", "sdpa"), HEADS, CPU, chunked=True) is SdpaAttention


def test_flash_attention_4_takes_the_last_queries_of_a_row(flash_4: Any) -> None:
    assert unusable_reason(FlashAttention4, HEADS, CPU, PROBED // 4) == ""


def test_the_documents_of_a_chunk_of_queries_and_their_keys() -> None:
    offsets = [0, 3, 10, 16]
    assert documents_of_chunk(offsets, 4, 12) == (3, [6, 2], [7, 2])
    assert documents_of_chunk(offsets, 0, 4) == (0, [3, 1], [3, 1])
    assert documents_of_chunk(offsets, 3, 10) == (3, [7], [7])  # bounds that fall together
    assert documents_of_chunk(offsets, 12, 14) == (10, [2], [4])


ROWS = torch.tensor([[0] * 5 + [1] * 11 + [2] * 1 + [3] * 15, [0] * 32, [0] * 8 + [1] * 8 + [2] * 16])


def outputs_and_gradients(
    monkeypatch: pytest.MonkeyPatch, segments: torch.Tensor | None, cp_size: int, mask_elements: int
) -> list[torch.Tensor]:
    """The output for ROWS' 3 x 32 positions and the gradients, by cp_size ranks one after the other."""
    monkeypatch.setattr(masks, "MASK_ELEMENTS", mask_elements)
    monkeypatch.setattr(attention, "MASK_ELEMENTS", mask_elements)
    monkeypatch.setattr(attention, "gather_rows", lambda key, value: (key, value))
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(32, 3, count, 16, generator=generator).requires_grad_() for count in (8, 2, 2)]
    weight = torch.randn(32, 3, 8 * 16, generator=generator)
    module, whole = (
        SdpaAttention(SimpleNamespace(softmax_scale=0.3, context_parallel_size=cp_size), 1, None, "self"),
        [],
    )
    for rank in range(cp_size):
        monkeypatch.setattr(attention.parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        given = None if segments is None else separation(segments, CPU, cp_size)
        query = context_parallel_slice(leaves[0].transpose(0, 1), cp_size, rank).transpose(0, 1)
        whole += zip(chunk_numbers(cp_size, rank), module(query, *leaves[1:], given).chunk(2), strict=True)
    out = torch.cat([part for _, part in sorted(whole, key=lambda pair: pair[0])])
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("mask_elements", [1 << 26, 40, 0], ids=["masks", "blocks", "rows"])
@pytest.mark.parametrize("segments", [None, ROWS], ids=["plain", "documents"])
def test_chunks_of_a_row_give_what_the_row_gives(
    monkeypatch: pytest.MonkeyPatch, segments: torch.Tensor | None, mask_elements: int, cp_size: int
) -> None:
    mine = outputs_and_gradients(monkeypatch, segments, cp_size, mask_elements)
    theirs = outputs_and_gradients(monkeypatch, segments, 1, 1 << 26)
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max()


def test_masks_of_long_rows_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    assert separation(ROWS, CPU).shape == (3, 1, 32, 32)
    monkeypatch.setattr(masks, "MASK_ELEMENTS", 3 * 32 * 32)
    assert separation(ROWS, CPU).dtype is torch.bool
    offsets = [0, 5, 16, 17, 32, 64, 72, 80, 96]
    assert separation(ROWS, CPU, cp_size=2).tolist() == offsets
    monkeypatch.setattr(masks, "MASK_ELEMENTS", 3 * 32 * 32 - 1)
    assert separation(ROWS, CPU).tolist() == offsets


def test_cudnn_is_not_preferred_for_documents_whose_lengths_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def preferred(device: str, varying: bool = False) -> Any:
        asked.append(varying)
        return nullcontext()

    monkeypatch.setattr(attention, "preferred_kernels", preferred)
    outputs_and_gradients(monkeypatch, None, 1, 0)
    assert asked == [False]
    outputs_and_gradients(monkeypatch, ROWS, 1, 0)
    assert asked == [False, *[True] * 8]
