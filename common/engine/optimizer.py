"""What is done with one distributed optimizer of Megatron-Core, the same way with every version."""

from typing import Any

from common.engine.versions import installed_engine


def clip_gradients(optimizer: Any, grad_norm: float) -> None:
    """Scales the gradients of one distributed optimizer down to its clip_grad; `grad_norm` is that of all of them."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    config = optimizer.config
    parameters = optimizer.get_parameters()
    if config.clip_grad > 0.0 and parameters:
        clip_grad_by_total_norm_fp32(
            parameters,
            max_norm=config.clip_grad,
            total_norm=grad_norm,
            use_decoupled_grad=installed_engine().uses_decoupled_grad(config),
        )


def make_optimizer_state(optimizer: Any) -> None:
    """Makes the moments of one distributed optimizer by a step on zero gradients, so that they can be loaded into.

    All gradients are the same zeros, as many as the largest parameter has, and none is left. From 0.14 on Megatron-Core
    has `_init_optimizer_states_with_dummy_values`, which makes them for each parameter; and where Transformer Engine's
    Adam reads `decoupled_grad` (bf16 moments), it needs none, and those that were made stay: 2 bytes a parameter.
    """
    import torch

    groups = optimizer.optimizer.param_groups
    parameters = [each for group in groups for each in group["params"] if each.numel()]  # kernels take no empty tensor
    if not getattr(optimizer.optimizer, "use_decoupled_grad", False):
        zeros: dict[Any, torch.Tensor] = {}
        for each in sorted(parameters, key=torch.numel, reverse=True):
            kind = (each.dtype, each.device)
            if kind not in zeros:
                zeros[kind] = torch.zeros_like(each).view(-1)
            each.grad = zeros[kind][: each.numel()].view_as(each)
    optimizer.optimizer.step()
    for each in parameters:
        each.grad = None
