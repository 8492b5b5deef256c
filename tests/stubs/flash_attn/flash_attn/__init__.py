"""A stub of a vendor's flash_attn on the CPU: its interface in plain torch; grouped heads are not expanded."""

import torch

GROUPS: list[tuple[int, int]] = []  # (heads, groups) of each call
DETERMINISTIC: list[bool] = []  # of each call


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float | None = None, causal: bool = False,
    deterministic: bool = False,
) -> torch.Tensor:  # fmt: skip
    """q [b, s, n, d], k and v [b, t, g, d] -> [b, s, n, d]; queries are the last positions."""
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    size, heads, width = q.shape[1:]
    keys = k.shape[1]
    GROUPS.append((heads, k.shape[2]))
    DETERMINISTIC.append(deterministic)
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bsnd,btnd->bnst", q.float(), k.float()) * (softmax_scale or width**-0.5)
    if causal:
        scores = scores.masked_fill(~torch.ones(size, keys, dtype=torch.bool).tril(keys - size), float("-inf"))
    return torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v.float()).to(q.dtype)
