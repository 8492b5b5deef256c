"""Access to weights without a call of their module."""

import torch


def await_weights(module: torch.nn.Module) -> None:
    """Waits until the parameters of `module` are gathered, as a call of it would.

    With overlap_param_gather Megatron-Core gathers parameters over the data-parallel ranks during the forward pass, and
    waits for those of a module in a forward pre-hook (DistributedDataParallel._make_forward_pre_hook).
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
