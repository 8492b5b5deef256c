"""A stub of FlashAttention 4 on the CPU: the two passes that the kit calls, in plain torch, into given tensors."""

from typing import Any

import torch

DETERMINISTIC: list[bool] = []  # of each call backward


def _weights(q: torch.Tensor, k: torch.Tensor, scale: float | None) -> torch.Tensor:
    scores = torch.einsum("bsnd,btnd->bnst", q.float(), k.float()) * (scale or q.shape[-1] ** -0.5)
    hidden = ~torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return scores.masked_fill(hidden, float("-inf"))


def _flash_attn_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float | None, causal: bool, return_lse: bool,
    out: torch.Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """q [b, s, n, d], k and v [b, s, g, d] -> (out [b, s, n, d], lse [b, n, s], and three more)."""
    assert causal and return_lse and q.dtype == torch.bfloat16
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = _weights(q, k, softmax_scale)
    out.copy_(torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), v.float()))
    return out, scores.logsumexp(-1), None, None, None


def _flash_attn_bwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor,
    *, softmax_scale: float | None, causal: bool, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor,
    deterministic: bool = False,
) -> None:  # fmt: skip
    """Gradients by the formulas of arXiv 2205.14135, appendix B."""
    assert causal
    DETERMINISTIC.append(deterministic)
    b, s, groups, d = k.shape
    heads = q.shape[2]
    wide_k, wide_v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
    shares = (_weights(q, wide_k, softmax_scale) - lse[..., None]).exp()
    above = torch.einsum("bsnd,btnd->bnst", dout.float(), wide_v.float())
    mean = (dout.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
    d_scores = shares * (above - mean) * (softmax_scale or d**-0.5)
    dq.copy_(torch.einsum("bnst,btnd->bsnd", d_scores, wide_k.float()))
    for place, of_heads in (
        (dk, torch.einsum("bnst,bsnd->btnd", d_scores, q.float())),
        (dv, torch.einsum("bnst,bsnd->btnd", shares, dout.float())),
    ):
        place.copy_(of_heads.view(b, s, groups, heads // groups, d).sum(3))
