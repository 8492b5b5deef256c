"""The sum of a step's loss weights, which normalizes its gradients where weights other than 0 and 1 occur.

Megatron-Core counts tokens in int32 (total_num_tokens in its pipeline_parallel/schedules.py): fractions are lost, and a
sum over 2**31 turns negative, in which case finalize_model_grads does not scale the gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads


class LossWeights:
    """Sums loss weights in float64 and divides the gradients by the sum over all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, weights: torch.Tensor) -> None:
        """Adds one micro-batch's weights, a scalar; called on the last pipeline stage."""
        self.total += weights

    def finalize(self, model: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Megatron-Core's finalize_model_grads with this sum instead of `num_tokens`; resets the sum."""
        finalize_model_grads(model, None, **kwargs)
        dist.all_reduce(self.total, group=parallel_state.get_pipeline_model_parallel_group())
        dist.all_reduce(self.total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        scaling = torch.where(self.total > 0, 1.0 / self.total, 1.0)  # without weights the gradients are zeros
        for chunk in model:
            chunk.scale_gradients(scaling)
        self.total.zero_()
