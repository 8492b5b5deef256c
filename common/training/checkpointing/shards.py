"""The shards of weights and optimizer state that a rank saves and loads.

A rank of the distributed optimizer owns a range of elements of the flat parameters. It writes and reads that range as
rectangles of each parameter, without gathering over ranks. The result is Megatron-Core's layout `fully_reshardable`:
tensors of the parameters' shapes, from which a run at any other parallel sizes reads its own shards.
Source: sharded_param_state_fully_reshardable in Megatron-Core's optimizer/distrib_optimizer.py (0.16).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from common.checkpoint.io.chunks import Chunk, chunks_of_range
from common.engine.optimizer import adam_param
from common.training.state.master_weights import MasterWeights
from common.training.state.optimizer import distributed_optimizers
from common.training.state.training_state import TrainingState

MASTER = "param"  # the master weights' name in a checkpoint, beside exp_avg and exp_avg_sq
STATES = (MASTER, "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateShard:
    """A contiguous part of a rank's state, and its place in a tensor of the checkpoint."""

    key: str
    global_shape: tuple[int, ...]
    place: Chunk
    tensor: Tensor | MasterWeights  # of the place's sizes
    is_main_replica: bool  # else another tensor- or pipeline-parallel rank saves the same data
    allow_shape_mismatch: bool  # the checkpoint's tensor may be smaller: a vocabulary padded for another TP


def weight_shards(
    training_state: TrainingState, sharded_state_dict: dict[str, Any], *, own: bool
) -> Iterator[StateShard]:
    """The weights of this rank's chunks; `own`: only those that this data-parallel rank owns.

    sharded_state_dict: from `state_dict.sharded_model_state_dict`.
    """
    ranges = _param_ranges(training_state)
    in_buffers = {param for chunk in training_state.model for buffer in chunk.buffers for param in buffer.params}
    is_first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    for sharded in _sharded_tensors(sharded_state_dict):
        param = sharded.data
        start, end = 0, param.numel()
        if own and param in in_buffers:
            start, end = ranges[param][1] if param in ranges else (0, 0)
        elif own and not is_first_replica:  # a frozen weight, the same on all
            continue
        yield from _shards(sharded, param.detach().view(-1)[start:end], start, sharded.key)


def optimizer_shards(training_state: TrainingState, sharded_state_dict: dict[str, Any]) -> Iterator[StateShard]:
    """Master weights and moments of this rank, not copied; they must exist, as after the first step."""
    sharded_tensors = {sharded.data: sharded for sharded in _sharded_tensors(sharded_state_dict)}
    for param, (optimizer, (start, _)) in _param_ranges(training_state).items():
        states = optimizer_state_of(optimizer, param)
        for name in STATES:
            key = f"optimizer.state.{name}.{sharded_tensors[param].key}"
            yield from _shards(sharded_tensors[param], states[name].detach().view(-1), start, key)


def optimizer_state_of(optimizer: Any, param: Tensor) -> dict[str, Tensor | MasterWeights]:
    """This rank's master weights and moments of `param` in a DistributedOptimizer, not copied: {"param": [n], ...}.

    Moments in bf16 stay bf16; Megatron-Core's own function copies them to float32.
    """
    if getattr(optimizer.config, "use_precision_aware_optimizer", False):
        weight = adam_param(optimizer, param)
        state = optimizer.optimizer.state[weight]
        return {MASTER: MasterWeights(weight, state["master_param"]), **{name: state[name] for name in STATES[1:]}}
    offloaded = getattr(optimizer, "offloaded_state", None)
    read = offloaded.state_of if offloaded else optimizer._get_main_param_and_optimizer_states
    tensors: dict[str, Tensor | MasterWeights] = read(param)
    return tensors


def _param_ranges(training_state: TrainingState) -> dict[Tensor, tuple[Any, tuple[int, int]]]:
    """The parameters of which this rank owns elements: their optimizer, and the range of elements."""
    ranges = {}
    for optimizer in distributed_optimizers(training_state.optimizer):
        for param in optimizer.model_param_gbuf_map:
            owned = optimizer._get_model_param_range_map(param)["param"]
            ranges[param] = (optimizer, (owned.start, owned.end))
    return ranges


def _sharded_tensors(sharded_state_dict: dict[str, Any]) -> list[Any]:
    kinds = (ShardedTensor, ShardedTensorFactory)
    return [each for chunk in sharded_state_dict.values() for each in nested_values(chunk) if isinstance(each, kinds)]


def _shards(sharded: Any, flat: Tensor | MasterWeights, start: int, key: str) -> Iterator[StateShard]:
    """`flat`, elements [start, start + n) of the parameter of `sharded`, in the tensors that it is saved as."""
    end = start + flat.numel()
    for stored, first in _stored_tensors(replace(sharded, key=key)):
        shape = tuple(stored.local_shape)
        begin = max(start, first)
        at = begin - start
        for block in chunks_of_range(shape, begin - first, min(end, first + stored.data.numel()) - first):
            offsets = tuple(stored.global_offset)
            stacked = stored.prepend_axis_num
            local = zip(offsets[stacked:], block.offsets, strict=True)
            place = Chunk((*offsets[:stacked], *(o + b for o, b in local)), (1,) * stacked + block.sizes)
            tensor = flat[at : at + block.numel].view(place.sizes)
            is_main = _is_main_replica(stored.replica_id)
            yield StateShard(
                stored.key, tuple(stored.global_shape), place, tensor, is_main, stored.allow_shape_mismatch
            )
            at += block.numel


def _stored_tensors(sharded: Any) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors that a parameter is saved as, and where in it each begins; two for SwiGLU's gate and up."""
    if isinstance(sharded, ShardedTensor):
        yield sharded, 0
        return
    placeholder = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    for stored in nested_values(replace(sharded, data=placeholder).build()):
        assert stored.data.is_contiguous(), stored
        yield stored, int(stored.data.storage_offset())


def _is_main_replica(replica_id: Any) -> bool:
    """Whether no other tensor- or pipeline-parallel rank saves the same; the last number is the data-parallel rank."""
    return not any(replica_id[:-1])
