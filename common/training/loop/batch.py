"""A micro-batch on the device, with the arguments by which attention stays within segments.

Letters: b micro-batch, s sequence.
"""

from typing import Any

import torch
from megatron.core import parallel_state

from common.data.dataset.data_loader import Batch
from common.model.layers.context_parallel import context_parallel_slice
from common.model.layers.documents import packed_seq_params, separation
from common.training.planning.plan import Plan


def prepare_batch(plan: Plan, batch: Batch, device: torch.device) -> tuple[Batch, dict[str, Any]]:
    """(tokens, labels and loss_mask on `device`, the attention's keyword arguments) of a micro-batch [b, s].

    There are arguments only if the batch has segment_ids: for Transformer Engine's attention packed_seq_params, with
    the rows flattened to [1, b * s]; for the kit's an attention_mask. With context parallelism, this rank's part of s
    is left.
    A sample of two rows, of a pair that is not packed, becomes both: [2 * b, s / 2].
    """
    segments = batch.pop("segment_ids", None)
    if plan.settings.rows_per_sample > 1:
        batch = {name: tensor.reshape(-1, plan.settings.seq_length) for name, tensor in batch.items()}
    if plan.sizes.cp > 1:
        rank = parallel_state.get_context_parallel_rank()
        batch = {name: context_parallel_slice(tensor, plan.sizes.cp, rank) for name, tensor in batch.items()}
    attention: dict[str, Any] = {}
    if segments is not None and plan.packed_sequences:
        batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
        packed = packed_seq_params(segments)
        packed.cu_seqlens_q = packed.cu_seqlens_kv = packed.cu_seqlens_q.to(device, non_blocking=True)
        attention["packed_seq_params"] = packed
    elif segments is not None:
        attention["attention_mask"] = separation(segments, device, plan.sizes.cp)
    if device.type == "cuda":  # not in the loader, which would initialize CUDA before its workers are forked
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}, attention
