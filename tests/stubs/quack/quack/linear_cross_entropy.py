"""The loss with the output layer, in plain torch: outputs are padded to full tiles, as QuACK's."""

import torch


def scaled_exp_linear_cross_entropy_fwd(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, chunk_size: int, ignore_index: int, *,
    need_dx: bool, need_dw: bool, tile_n1: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x [m, d], weight [v, d], target int64 [m] -> (losses float32, gradient of x, both of m padded, of weight)."""
    rows, width = x.shape
    last = -(-((rows - 1) % chunk_size + 1) // 128) * 128
    assert need_dx and need_dw
    assert weight.shape[0] % tile_n1 == weight.shape[0] % 128 == 0 and chunk_size % 128 == 0
    if width in (chunk_size, last):
        raise ValueError("m == n makes row/col inference ambiguous")
    filled = (rows - 1) // chunk_size * chunk_size + last
    exact = [part.detach().float().requires_grad_() for part in (x, weight)]
    with torch.enable_grad():
        logits = exact[0] @ exact[1].t()
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
        d_x, d_weight = torch.autograd.grad(losses.sum(), exact)
    pad = torch.nn.functional.pad
    return (
        pad(losses.detach(), (0, filled - rows)),
        pad(d_x, (0, 0, 0, filled - rows)).to(x.dtype),
        d_weight,
    )
