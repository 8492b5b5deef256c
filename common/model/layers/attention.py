"""Core attention: PyTorch's scaled_dot_product_attention, the image's flash_attn, or FlashAttention 4.

Megatron-Core's own local attention materialises the scores [b, n, s, s] and takes no grouped queries without copies.
Letters: s sequence, b micro-batch, n query heads, g key-value groups, d head size; n and g are this rank's share.

Where torch is to be deterministic (torch.use_deterministic_algorithms), the gradients of queries are summed over blocks
of keys in a fixed order, and not as blocks come to it: both flash kernels have an argument for that, and PyTorch's own
know it by themselves (check_cudnn_deterministic in ATen's sdp_utils.cpp, attention_backward.cu).
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
from common.model.probe import PROBED, find_fault, need, tried

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class SdpaAttention(torch.nn.Module):
    """Causal attention; with a mask, attention where the mask (True = masked out) allows it."""

    before_engine = False  # whether it is faster than what Transformer Engine's layers have

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
        """As forward, by the kernel of this class."""
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
    """What Transformer Engine's attention needs to keep the segments of [b, s] apart, its rows joined to one of b * s.

    `segment_ids` int [b, s], on the CPU, numbers the documents of a row. The format is Megatron-Core's "thd": the
    offsets at which segments begin and end, int32 [segments + 1] on the CPU, and a bound of their length. It is that of
    the row, since each other bound would have cuDNN build another plan.
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
    """Causal attention by flash_attn, which takes grouped heads without copies; with a mask, or in float32, as SDPA."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As forward, by flash_attn where it can."""
        if attention_mask is not None or query.dtype == torch.float32:
            return super().attend(query, key, value, attention_mask)
        return self.flash(query, key, value).flatten(2)

    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n, d]."""
        from flash_attn import flash_attn_func  # the vendor's, where there is one

        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out: torch.Tensor = flash_attn_func(query, key, value, softmax_scale=self.scale, causal=True, **determinism())
        return out.transpose(0, 1)


class FlashAttention4(FlashAttention):
    """The same by FlashAttention 4, of the package flash-attn-4, which compiles itself for Hopper and later GPUs."""

    before_engine = True

    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n, d]."""
        out: torch.Tensor = _Flash4.apply(query, key, value, self.scale)
        return out


class _Flash4(torch.autograd.Function):
    """flash_attn.cute's two halves, with the result in Megatron-Core's layout: its own function would have it copied.

    Its interface.py has both without a promise to keep them as they are; `choose` finds out before a run begins.
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
        places = dict(zip(("dq", "dk", "dv"), (x.transpose(0, 1) for x in gradients), strict=True))
        _flash_attn_bwd(*rows, lse, softmax_scale=ctx.scale, causal=True, **places, **ctx.determinism)
        return *gradients, None


def determinism() -> dict[str, bool]:
    """What a flash kernel is told where torch is to be deterministic; flash_attn before 2.4.1 does not know it."""
    return {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}


KINDS: dict[str, type[SdpaAttention]] = {
    "flash_attn": FlashAttention,
    "flash_attn_4": FlashAttention4,
    "sdpa": SdpaAttention,
}


def choose(
    preferred: Sequence[str], heads: tuple[int, int, int], device: torch.device, *, engine: bool = False
) -> type[SdpaAttention] | None:
    """The first of the kinds `preferred` that works on `device` for `heads`, (n, g, d); which and why is logged.

    A kernel that is not there, fails or is wrong on any rank is passed over on all. Where none is left, None with
    `engine`, for Transformer Engine's own; else raises KitError. A collective call.
    """
    failures: list[str] = []
    for name in preferred:
        _, failure = tried(partial(_need_right, KINDS[name], heads, device))
        if not failure:
            logger.info("core attention: %s%s", name, f" ({'; '.join(failures)})" if failures else "")
            return KINDS[name]
        failures.append(f"{name}: {failure}")
    if engine:
        logger.info("core attention: Transformer Engine's (%s)", "; ".join(failures))
        return None
    raise KitError(f"no core attention works here ({'; '.join(failures)}): `python -m common.doctor` tells more")


def _need_right(kind: type[SdpaAttention], heads: tuple[int, int, int], device: torch.device) -> None:
    need(why_not(kind, heads, device))


def why_not(kind: type[SdpaAttention], heads: tuple[int, int, int], device: torch.device) -> str:
    """Why `kind` cannot be used for bf16 tensors of `heads`, (n, g, d); empty where it is right, backward too."""
    num_heads, num_groups, size = heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(PROBED, 2, count, size) for count in (num_heads, num_groups, num_groups)]
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    weight = torch.randn(PROBED, 2, num_heads * size, generator=generator).bfloat16()
    return find_fault(
        lambda: _results(kind, [x.to(device) for x in given], weight.to(device)),
        lambda: _results(SdpaAttention, [x.float() for x in given], weight.float()),
    )


def _results(kind: type[SdpaAttention], tensors: list[torch.Tensor], weight: torch.Tensor) -> list[torch.Tensor]:
    """The output of `kind` and the gradients of its (output * weight).sum()."""
    config = SimpleNamespace(softmax_scale=None, context_parallel_size=1)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = kind(config, 1, None, "self")(*leaves, None)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def block_causal_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Bool [b, 1, s, s], True where position i must not see j: another segment, or j after i.

    `segment_ids` int [b, s] numbers the documents of a row; RoPE is relative, so positions need no restart.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    size = segment_ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment_ids.device).tril()
    return ~(same & causal)[:, None]
