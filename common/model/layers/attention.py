"""Core attention: PyTorch's scaled_dot_product_attention, the image's flash_attn, or FlashAttention 4.

Megatron-Core's local attention materializes the scores [b, n, s, s], and copies keys and values for grouped queries.
Letters: s sequence, b micro-batch, n query heads, g query groups, d head size; n and g are those of this rank.

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
from megatron.core.packed_seq_params import PackedSeqParams

from common.errors import KitError
from common.log import logger
from common.model.probe import PROBED, find_fault, need, try_on_all_ranks

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class SdpaAttention(torch.nn.Module):
    """Causal attention; with a mask, attention where the mask (True = masked out) allows it."""

    faster_than_engine = False  # than Transformer Engine's attention

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any) -> None:
        super().__init__()
        self.scale = config.softmax_scale  # None: 1 / sqrt(d)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"

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
        """query [s, b, n, d], key and value [s, b, g, d], attention_mask bool [b, 1, s, s] or None -> [s, b, n*d]."""
        assert attention_bias is None and packed_seq_params is None
        return self.attend(query, key, value, attention_mask)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As forward, with the kernel of this class."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        options: dict[str, Any] = {"scale": self.scale}
        if grouped and TORCH >= (2, 5):
            options["enable_gqa"] = True
        elif grouped:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        if attention_mask is None:
            with preferred_kernels(query.device.type):
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=~attention_mask, **options)
        return out.permute(2, 0, 1, 3).flatten(2)


def preferred_kernels(device: str) -> AbstractContextManager[None]:
    """On CUDA, cuDNN's attention before PyTorch's own FlashAttention 2, which is slower on Hopper (torch 2.6 on)."""
    if device != "cuda" or TORCH < (2, 6):
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def packed_seq_params(segment_ids: torch.Tensor) -> PackedSeqParams:
    """Megatron-Core's PackedSeqParams in the "thd" format, for the rows of [b, s] concatenated to one of b * s tokens.

    `segment_ids` int [b, s], on the CPU, numbers the documents of a row. cu_seqlens is int32 [segments + 1] on the CPU.
    max_seqlen is the length of a row, since cuDNN builds a new plan for every other value.
    """
    row_length = segment_ids.shape[1]
    flat = segment_ids.flatten()
    begins = torch.ones_like(flat, dtype=torch.bool)
    begins[1:] = flat[1:] != flat[:-1]
    begins[::row_length] = True
    offsets = torch.cat([begins.nonzero().flatten(), torch.tensor([flat.numel()])]).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=row_length,
        max_seqlen_kv=row_length,
    )


class FlashAttention(SdpaAttention):
    """Causal attention with flash_attn, which has GQA without copies; with a mask or in float32 as SdpaAttention."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As forward, with flash_attn where it is supported."""
        if attention_mask is not None or query.dtype == torch.float32:
            return super().attend(query, key, value, attention_mask)
        return self.flash(query, key, value).flatten(2)

    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n, d]."""
        from flash_attn import flash_attn_func  # optional, the vendor's build

        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out: torch.Tensor = flash_attn_func(query, key, value, softmax_scale=self.scale, causal=True, **determinism())
        return out.transpose(0, 1)


class FlashAttention4(FlashAttention):
    """The same with FlashAttention 4 (package flash-attn-4), which is JIT-compiled for Hopper and later GPUs."""

    faster_than_engine = True

    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n, d]."""
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
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n, d], contiguous."""
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
    preferred: Sequence[str], heads: tuple[int, int, int], device: torch.device, *, engine: bool = False
) -> type[SdpaAttention] | None:
    """The first of `preferred` that works on `device` with `heads`, (n, g, d); logs it, and why others do not.

    A kernel that is missing, fails or is wrong on any rank is used on none. If none works, returns None with `engine`,
    for Transformer Engine's own, and otherwise raises KitError. A collective call.
    """
    failures: list[str] = []
    for name in preferred:
        _, failure = try_on_all_ranks(partial(_need_right, KINDS[name], heads, device))
        if not failure:
            logger.info("core attention: %s%s", name, f" ({'; '.join(failures)})" if failures else "")
            return KINDS[name]
        failures.append(f"{name}: {failure}")
    if engine:
        logger.info("core attention: Transformer Engine's (%s)", "; ".join(failures))
        return None
    raise KitError(f"no core attention works here ({'; '.join(failures)}): run `python -m common.doctor`")


def _need_right(kind: type[SdpaAttention], heads: tuple[int, int, int], device: torch.device) -> None:
    need(unusable_reason(kind, heads, device))


def unusable_reason(kind: type[SdpaAttention], heads: tuple[int, int, int], device: torch.device) -> str:
    """Why `kind` cannot be used for bf16 tensors of `heads`, (n, g, d); empty if output and gradients are right."""
    num_heads, num_groups, size = heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(PROBED, 2, count, size) for count in (num_heads, num_groups, num_groups)]
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    weight = torch.randn(PROBED, 2, num_heads * size, generator=generator).bfloat16()
    return find_fault(
        lambda: _results(kind, [x.to(device) for x in inputs], weight.to(device)),
        lambda: _results(SdpaAttention, [x.float() for x in inputs], weight.float()),
    )


def _results(kind: type[SdpaAttention], tensors: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """The output of `kind` and the gradients of its (output * weight).sum()."""
    config = SimpleNamespace(softmax_scale=None, context_parallel_size=1)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = kind(config, 1, None, "self")(*leaves, None)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def block_causal_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Bool [b, 1, s, s], True where position i must not attend to j: another segment, or j after i.

    `segment_ids` int [b, s] numbers the documents of a row; RoPE is relative, so positions need no restart.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    size = segment_ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment_ids.device).tril()
    return ~(same & causal)[:, None]
