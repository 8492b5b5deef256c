"""Core attention of Megatron-Core's local layers by PyTorch's scaled_dot_product_attention.

Megatron-Core's own local attention materialises the scores [b, n, s, s] and takes no grouped queries without copies.
Letters: s sequence, b micro-batch, n query heads, g key-value groups, d head size; n and g are this rank's share.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class SdpaAttention(torch.nn.Module):
    """Causal attention; with a mask, attention where the mask (True = masked out) allows it."""

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


def joined_rows(segment_ids: torch.Tensor) -> PackedSeqParams:
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


def block_causal_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Bool [b, 1, s, s], True where position i must not see j: another segment, or j after i.

    `segment_ids` int [b, s] numbers the documents of a row; RoPE is relative, so positions need no restart.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    size = segment_ids.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment_ids.device).tril()
    return ~(same & causal)[:, None]
