"""Data parallelism: the model in Megatron-Core's DistributedDataParallel."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from common.engine.overrides import named_refusals, overrides
from common.training.settings import TrainSettings


def wrap_model(chunks: list[torch.nn.Module], settings: TrainSettings) -> list[DistributedDataParallel]:
    """The chunks with float32 gradient buffers, which are reduced over the data-parallel ranks.

    Only the first chunk has buckets: nothing overlaps with the reduction of the others (get_model in Megatron-LM's
    training/training.py does the same).
    """
    overlap_grad_reduce, overlap_param_gather = settings.overlaps
    fields: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": overlap_grad_reduce,
        "overlap_param_gather": overlap_param_gather,
        "bucket_size": 40_000_000 if overlap_grad_reduce else None,
    }
    with named_refusals(settings.mcore):
        config = DistributedDataParallelConfig(**{**fields, **overrides(settings.mcore)["ddp"]})
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def gather_params(model: list[Any]) -> None:
    """Gathers the weights of the last step on every rank; a collective call, needed before other code reads them.

    With OVERLAP_PARAM_GATHER a rank holds the new weights of its own shard only, until the next forward pass
    (step_with_ready_grads in Megatron-Core's optimizer/distrib_optimizer.py).
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
