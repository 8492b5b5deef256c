"""Operations on one distributed optimizer of Megatron-Core, for every version."""

from typing import Any

from common.engine.versions import installed_engine


def adam_param(optimizer: Any, model_param: Any) -> Any:
    """The tensor, this rank's shard of `model_param`, by which one distributed optimizer's Adam keeps its state."""
    group, order = optimizer.model_param_group_index_map[model_param]
    return optimizer.optimizer.param_groups[group]["params"][order]


def reduce_grad_norm(optimizer: Any, flags: Any) -> tuple[float, list[float]]:
    """(global gradient norm of one distributed optimizer, the sum of `flags` over all ranks), by one all-reduce.

    flags: float32 [n] on the device. As get_grad_norm_fp32 in megatron/core/optimizer/clip_grads.py, which has no room
    for them. A collective call; the host waits for it.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.optimizer.clip_grads import l2_norm_impl, multi_tensor_applier

    grads, square = installed_engine().grads_for_norm(optimizer), torch.zeros(1, device=flags.device)
    if grads:
        overflow = torch.zeros(1, dtype=torch.int32, device=flags.device)
        norm, _ = multi_tensor_applier(l2_norm_impl, overflow, [grads], False)
        square = norm.view(1).float() ** 2
    group = optimizer.get_grad_stats_parallel_group()
    assert dist.get_world_size(group) == dist.get_world_size()
    sums = torch.cat([square, flags])
    dist.all_reduce(sums, group=group)
    total, *summed = sums.tolist()
    return total**0.5, summed


def clip_gradients(optimizer: Any, grad_norm: float) -> None:
    """Clips the gradients of one distributed optimizer to its clip_grad; `grad_norm` is the global norm."""
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
    """Creates the moments of one distributed optimizer by a step on zero gradients, to load a checkpoint into them.

    All gradients share one buffer of zeros, of the size of the largest parameter, which is freed. Megatron-Core's own
    `_init_optimizer_states_with_dummy_values` (from 0.14 on) allocates zeros for each parameter. With bf16 moments,
    where Transformer Engine's Adam reads `decoupled_grad`, they are not needed, and would stay: 2 bytes per parameter.
    """
    import torch

    groups = optimizer.optimizer.param_groups
    parameters = [each for group in groups for each in group["params"] if each.numel()]  # kernels reject empty tensors
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
