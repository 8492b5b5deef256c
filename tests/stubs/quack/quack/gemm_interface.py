"""The three products that the kit calls, in plain torch: the columns of gate and up are interleaved."""

# ruff: noqa: N803  the names are QuACK's
from types import SimpleNamespace

import torch
from torch.nn.functional import silu

from quack.gemm_config import GemmConfig


def gemm_gated(
    A: torch.Tensor, B: torch.Tensor, *, activation: str, preact_out: torch.Tensor, postact_out: torch.Tensor,
    concat_layout: tuple[str, ...], config: GemmConfig, dynamic_scheduler: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A [n, h], B [h, 2f], the gate's columns first -> A B, its columns in pairs, and silu(gate) * up, both written."""
    assert activation == "swiglu" and concat_layout == ("B",) and config.tile_n % 32 == 0
    gate, up = (A.float() @ B.float()).chunk(2, 1)
    return preact_out.copy_(torch.stack([gate, up], 2).flatten(1)), postact_out.copy_(silu(gate) * up)


def gemm_dgated(
    A: torch.Tensor, B: torch.Tensor, PreAct: torch.Tensor, *, activation: str, dx_out: torch.Tensor,
    postact_out: torch.Tensor, config: GemmConfig, dynamic_scheduler: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A [n, h], B [h, f], PreAct [n, 2f] in pairs -> dx_out: its gradient; postact_out: silu(gate) * up."""
    assert activation == "swiglu" and config.tile_n % 32 == 0
    above = A.float() @ B.float()
    gate, up = PreAct.float()[:, ::2], PreAct.float()[:, 1::2]
    share = gate.sigmoid()
    postact_out.copy_(gate * share * up)
    dx_out.copy_(torch.stack([above * up * share * (1 + gate * (1 - share)), above * gate * share], 2).flatten(1))
    return dx_out, postact_out


def _gemm(
    A: torch.Tensor, B: torch.Tensor, out: torch.Tensor, *, config: GemmConfig, concat_layout: tuple[str, ...],
    add_to_output: bool = False, dynamic_scheduler: bool = False,
) -> None:  # fmt: skip
    """A B into `out`, or added; under ("B",) the rows of B are halves to be read in pairs, under ("out",) its own."""
    (name,) = concat_layout
    left, right = A.float(), B.float()
    if name == "B":
        right = torch.stack(right.chunk(2), 1).flatten(0, 1)
    product = left @ right
    if name == "out":
        product = torch.cat([product[::2], product[1::2]])
    out.copy_(out + product if add_to_output else product)


gemm_tuned = SimpleNamespace(fn=_gemm)
