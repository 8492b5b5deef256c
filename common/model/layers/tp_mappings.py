"""Communication of hidden states at the start and the end of a tensor-parallel region."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


def enter(hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """[s, b, h] of all tokens; with sequence parallelism gathered from each rank's part of s."""
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return copy_to_tensor_model_parallel_region(hidden) if config.tensor_model_parallel_size > 1 else hidden


def leave(part: torch.Tensor, config: Any) -> torch.Tensor:
    """The sum of all ranks' [s, b, h]; with sequence parallelism reduce-scattered to this rank's part of s."""
    if config.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(part)
    return reduce_from_tensor_model_parallel_region(part) if config.tensor_model_parallel_size > 1 else part
