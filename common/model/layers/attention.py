"""Core attention: PyTorch's scaled_dot_product_attention, the image's flash_attn, or FlashAttention 4.

Megatron-Core's local attention materializes the scores [b, n, s, s], and copies keys and values for grouped queries.
Letters: s sequence, q queries, k keys, b micro-batch, n query heads, g query groups, d head size; n and g are those of
this rank.

With torch.use_deterministic_algorithms the gradients of queries are accumulated over blocks of keys in a fixed order.
Both flash kernels have an argument for it; PyTorch's check the flag themselves (check_cudnn_deterministic in ATen's
sdp_utils.cpp, attention_backward.cu).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch.utils.checkpoint import checkpoint

from common.errors import KitError
from common.log import logger
from common.model.layers.context_parallel import chunk_numbers, gather_rows
from common.model.layers.documents import documents_of_chunk, offsets_of_rows
from common.model.probe import PROBED, find_fault, need, try_on_all_ranks
from common.model.shape.masks import MASK_ELEMENTS

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class SdpaAttention(torch.nn.Module):
    """Causal attention, with `separation` within the documents of a row; under CP over gathered keys and values."""

    faster_than_engine = False  # than Transformer Engine's attention

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any) -> None:
        super().__init__()
        self.scale = config.softmax_scale  # None: 1 / sqrt(d)
        self.cp_size = config.context_parallel_size

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query [s / cp, b, n, d], key and value [s / cp, b, g, d], attention_mask a `separation` -> [s / cp, b, n*d].

        Without attention_mask a row is one document.
        """
        assert attention_bias is None and packed_seq_params is None
        if attention_mask is not None and attention_mask.dtype is torch.bool:
            return self.masked(query, key, value, attention_mask)
        if attention_mask is None and self.cp_size == 1:
            return self.causal(query, key, value)
        offsets = None
        if attention_mask is not None:
            offsets = offsets_of_rows(attention_mask.tolist(), self.cp_size * query.shape[0], query.shape[1])
        if self.cp_size == 1:
            return self.chunk(query, key, value, 0, offsets)
        key, value = gather_rows(key, value)
        numbers = chunk_numbers(self.cp_size, parallel_state.get_context_parallel_rank())
        chunks = zip(query.chunk(2), numbers, strict=True)
        return torch.cat([self.chunk(one, key, value, number * one.shape[0], offsets) for one, number in chunks])

    def chunk(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, offsets: list[list[int]] | None
    ) -> torch.Tensor:
        """[c, b, n*d] of the queries [c, b, n, d] from `start` on; `offsets` of each row's documents, None: one each.

        Each document is attended to by itself, so there is no mask.
        """
        end = start + query.shape[0]
        if offsets is None:
            return self.causal(query, key[:end], value[:end])
        rows = []
        for row, (q, k, v) in zip(offsets, zip(*(x.unbind(1) for x in (query, key, value)), strict=True), strict=True):
            first, queries, keys = documents_of_chunk(row, start, end)
            parts = zip(q.split(queries), k[first:end].split(keys), v[first:end].split(keys), strict=True)
            rows.append(torch.cat([self.causal(*(x[:, None] for x in part), varying=True) for part in parts]))
        return torch.cat(rows, dim=1)

    def causal(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, varying: bool = False
    ) -> torch.Tensor:
        """[q, b, n*d]: the queries [q, b, n, d] are the last q positions of the keys [k, b, g, d].

        varying: the lengths differ from call to call.
        """
        query, key, value, options = self._arguments(query, key, value)
        if query.shape[2] < key.shape[2]:
            return _of_heads(lower_right(query, key, value, options))
        with preferred_kernels(query.device.type, varying):
            return _of_heads(F.scaled_dot_product_attention(query, key, value, is_causal=True, **options))

    def masked(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As forward without context parallelism; mask bool [b, 1, s, s], True = masked out."""
        query, key, value, options = self._arguments(query, key, value)
        return _of_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=~mask, **options))

    def _arguments(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """(query, key, value, options) of torch's function, from [s, b, n or g, d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in tensors)
        options: dict[str, Any] = {"scale": self.scale}
        if query.shape[1] != key.shape[1] and TORCH >= (2, 5):
            options["enable_gqa"] = True
        elif query.shape[1] != key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return query, key, value, options


def _of_heads(out: torch.Tensor) -> torch.Tensor:
    """[s, b, n*d] from [b, n, s, d]."""
    return out.permute(2, 0, 1, 3).flatten(2)


def lower_right(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """[b, n, q, d]: causal attention of the last q of k positions; query [b, n, q, d], key and value [b, g, k, d].

    By the flash kernels on CUDA, which need no mask. Elsewhere by masks of at most MASK_ELEMENTS, one block of queries
    after the other; each block is computed again in the backward pass, so that no two masks exist at once.
    """
    (q, k), device = (query.shape[2], key.shape[2]), query.device
    if device.type == "cuda" and TORCH >= (2, 3) and query.dtype is not torch.float32:
        from torch.nn.attention.bias import causal_lower_right

        return F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(q, k), **options)
    if q * k <= MASK_ELEMENTS or q == 1:
        mask = torch.ones(q, k, dtype=torch.bool, device=device).tril(k - q)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    parts, end = [], k - q
    for block in query.split(max(1, MASK_ELEMENTS // k), dim=2):
        end += block.shape[2]
        arguments = block, key[:, :, :end], value[:, :, :end], options
        parts.append(checkpoint(lower_right, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts, dim=2)


def preferred_kernels(device: str, varying: bool = False) -> AbstractContextManager[None]:
    """On CUDA, cuDNN's attention before PyTorch's own FlashAttention 2, which is slower on Hopper (torch 2.6 on).

    Not for `varying` lengths: cuDNN builds a new plan for each.
    """
    if device != "cuda" or TORCH < (2, 6):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order[1:] if varying else order, set_priority=True)


class FlashAttention(SdpaAttention):
    """Causal attention with flash_attn, which has GQA without copies; with a mask or in float32 as SdpaAttention."""

    def causal(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, varying: bool = False
    ) -> torch.Tensor:
        """As in SdpaAttention; fewer queries than keys are the last positions from flash_attn 2.1 on."""
        if query.dtype == torch.float32:
            return super().causal(query, key, value, varying=varying)
        return self.flash(query, key, value).flatten(2)

    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [q, b, n, d], key and value [k, b, g, d] -> [q, b, n, d]."""
        from flash_attn import flash_attn_func  # optional, the vendor's build

        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out: torch.Tensor = flash_attn_func(query, key, value, softmax_scale=self.scale, causal=True, **determinism())
        return out.transpose(0, 1)


class FlashAttention4(FlashAttention):
    """The same with FlashAttention 4 (package flash-attn-4), which is JIT-compiled for Hopper and later GPUs."""

    faster_than_engine = True

    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [q, b, n, d], key and value [k, b, g, d] -> [q, b, n, d]."""
        out: torch.Tensor = _Flash4.apply(query, key, value, self.scale)
        return out


class _Flash4(torch.autograd.Function):
    """flash_attn.cute's forward and backward with the output in Megatron-Core's layout; its own Function needs a copy.

    Both are private functions of its interface.py, and may change; `select_core_attention` tests them before a run.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """query [q, b, n, d], key and value [k, b, g, d] -> [q, b, n, d], contiguous."""
        from flash_attn.cute.interface import _flash_attn_fwd

        out = query.new_empty(query.shape)
        rows = [x.transpose(0, 1) for x in (query, key, value, out)]
        lse = _flash_attn_fwd(*rows[:3], softmax_scale=scale, causal=True, return_lse=True, out=rows[3])[1]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.determinism = scale, determinism()
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of query, key and value, contiguous too."""
        from flash_attn.cute.interface import _flash_attn_bwd

        *tensors, lse = ctx.saved_tensors
        rows = [x.transpose(0, 1) for x in (*tensors, upstream[0])]
        gradients = [x.new_empty(x.shape) for x in tensors[:3]]
        outputs = dict(zip(("dq", "dk", "dv"), (x.transpose(0, 1) for x in gradients), strict=True))
        _flash_attn_bwd(*rows, lse, softmax_scale=ctx.scale, causal=True, **outputs, **ctx.determinism)
        return *gradients, None


def determinism() -> dict[str, bool]:
    """A flash kernel's argument for torch's deterministic mode; flash_attn before 2.4.1 does not have it."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


KINDS: dict[str, type[SdpaAttention]] = {
    "flash_attn": FlashAttention,
    "flash_attn_4": FlashAttention4,
    "sdpa": SdpaAttention,
}


def select_core_attention(
    preferred: Sequence[str],
    heads: tuple[int, int, int],
    device: torch.device,
    *,
    engine: bool = False,
    chunked: bool = False,
) -> type[SdpaAttention] | None:
    """The first of `preferred` that works on `device` with `heads`, (n, g, d); logs it, and why others do not.

    A kernel that is missing, fails or is wrong on any rank is used on none. If none works, returns None with `engine`,
    for Transformer Engine's own, and otherwise raises KitError. chunked: it must be right for the last queries of
    longer rows too, which context parallelism needs. A collective call.
    """
    failures: list[str] = []
    for name in preferred:
        _, failure = try_on_all_ranks(partial(_need_right, KINDS[name], heads, device, chunked))
        if not failure:
            logger.info("core attention: %s%s", name, f" ({'; '.join(failures)})" if failures else "")
            return KINDS[name]
        failures.append(f"{name}: {failure}")
    if engine:
        logger.info("core attention: Transformer Engine's (%s)", "; ".join(failures))
        return None
    raise KitError(f"no core attention works here ({'; '.join(failures)}): run `python -m common.doctor`")


def _need_right(kind: type[SdpaAttention], heads: tuple[int, int, int], device: torch.device, chunked: bool) -> None:
    need(unusable_reason(kind, heads, device))
    if chunked:
        need(unusable_reason(kind, heads, device, PROBED // 4))


def unusable_reason(
    kind: type[SdpaAttention], heads: tuple[int, int, int], device: torch.device, num_queries: int = PROBED
) -> str:
    """Why `kind` cannot be used for bf16 tensors of `heads`, (n, g, d); empty if output and gradients are right."""
    num_heads, num_groups, size = heads
    generator = torch.Generator().manual_seed(0)
    lengths = (num_queries, PROBED, PROBED)
    counts = (num_heads, num_groups, num_groups)
    shapes = [(length, 2, count, size) for length, count in zip(lengths, counts, strict=True)]
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    weight = torch.randn(num_queries, 2, num_heads * size, generator=generator).bfloat16()
    return find_fault(
        lambda: _results(kind, [x.to(device) for x in inputs], weight.to(device)),
        lambda: _results(SdpaAttention, [x.float() for x in inputs], weight.float()),
    )


def _results(kind: type[SdpaAttention], tensors: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """The output of `kind` and the gradients of its (output * weight).sum()."""
    config = SimpleNamespace(softmax_scale=None, context_parallel_size=1)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = kind(config, 1, None, "self").causal(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]
