"""Weights that are used without a call of the module that holds them."""

import torch


def await_weights(module: torch.nn.Module) -> None:
    """Waits until the weights of `module` are those of the last step on this rank, as a call of it would.

    Under overlap_param_gather Megatron-Core gathers parameters over the data-parallel ranks during the forward pass,
    and waits for those of a module in a hook before its call (DistributedDataParallel._make_forward_pre_hook).
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
