"""What of weights and optimizer a rank saves and loads: its own share of the data-parallel ranks' state.

A rank of the distributed optimizer holds a run of elements of the flat parameters. As rectangles of each parameter that
run is written and read where it is, with no gathering over ranks, and what comes out is Megatron-Core's layout
`fully_reshardable`: tensors of the parameters' shapes, which any other layout of ranks takes its own part of.
Source: sharded_param_state_fully_reshardable in Megatron-Core's optimizer/distrib_optimizer.py (0.16).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from common.checkpoint.io.chunks import Chunk, chunks_of_range
from common.training.state.training_state import TrainingState, optimizer_parts

MASTER = "param"  # the master weights' name in a checkpoint, beside exp_avg and exp_avg_sq
STATES = (MASTER, "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Part:
    """A contiguous part of a rank's state, and its place in a tensor of the checkpoint."""

    key: str
    global_shape: tuple[int, ...]
    place: Chunk
    tensor: Tensor  # of the place's sizes
    saved_here: bool  # else another tensor- or pipeline-parallel rank has the same and saves it
    padded: bool  # whether the checkpoint's tensor may be smaller, as a vocabulary that is padded for other TP is


def weight_parts(training_state: TrainingState, shards: dict[str, Any], *, own: bool) -> Iterator[Part]:
    """The weights of this rank's chunks; `own`: of each, what lies in this data-parallel rank's share alone.

    shards: `state.model_shards`.
    """
    places = _places(training_state)
    shared_out = {param for chunk in training_state.model for buffer in chunk.buffers for param in buffer.params}
    for sharded in _entries(shards):
        param = sharded.data
        start, end = 0, param.numel()
        if own and param in shared_out:
            start, end = places[param][1] if param in places else (0, 0)
        yield from _parts(sharded, param.detach().view(-1)[start:end], start, sharded.key)


def optimizer_state_parts(training_state: TrainingState, shards: dict[str, Any]) -> Iterator[Part]:
    """Master weights and moments of this rank, as they are; all of them are there after the first step."""
    entries = {sharded.data: sharded for sharded in _entries(shards)}
    for param, (optimizer, (start, _)) in _places(training_state).items():
        states = state_of(optimizer, param)
        for name in STATES:
            key = f"optimizer.state.{name}.{entries[param].key}"
            yield from _parts(entries[param], states[name].detach().view(-1), start, key)


def state_of(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """This rank's master weights and moments of `param` in one distributed optimizer, themselves: {"param": [n], ...}.

    Moments in bf16 stay so; Megatron-Core's own function copies them to float32.
    """
    if getattr(optimizer.config, "use_precision_aware_optimizer", False):
        group, order = optimizer.model_param_group_index_map[param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        return {MASTER: state["master_param"], **{name: state[name] for name in STATES[1:]}}
    found: dict[str, Tensor] = optimizer._get_main_param_and_optimizer_states(param)
    return found


def _places(training_state: TrainingState) -> dict[Tensor, tuple[Any, tuple[int, int]]]:
    """The parameters that have elements in this rank's share: optimizer, and which elements."""
    places = {}
    for optimizer in optimizer_parts(training_state.optimizer):
        for param in optimizer.model_param_gbuf_map:
            found = optimizer._get_model_param_range_map(param)["param"]
            places[param] = (optimizer, (found.start, found.end))
    return places


def _entries(shards: dict[str, Any]) -> list[Any]:
    kinds = (ShardedTensor, ShardedTensorFactory)
    return [each for chunk in shards.values() for each in nested_values(chunk) if isinstance(each, kinds)]


def _parts(sharded: Any, flat: Tensor, start: int, key: str) -> Iterator[Part]:
    """`flat`, elements [start, start + n) of the parameter of `sharded`, in the tensors that it is saved as."""
    end = start + flat.numel()
    for stored, first in _stored(replace(sharded, key=key)):
        shape = tuple(stored.local_shape)
        begin = max(start, first)
        at = begin - start
        for block in chunks_of_range(shape, begin - first, min(end, first + stored.data.numel()) - first):
            offsets = tuple(stored.global_offset)
            stacked = stored.prepend_axis_num
            local = zip(offsets[stacked:], block.offsets, strict=True)
            place = Chunk((*offsets[:stacked], *(o + b for o, b in local)), (1,) * stacked + block.sizes)
            tensor = flat[at : at + block.numel].view(place.sizes)
            saved = _first_replica(stored.replica_id)
            yield Part(stored.key, tuple(stored.global_shape), place, tensor, saved, stored.allow_shape_mismatch)
            at += block.numel


def _stored(sharded: Any) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors that a parameter is saved as, gate and up projection of SwiGLU apart, and where in it each begins."""
    if isinstance(sharded, ShardedTensor):
        yield sharded, 0
        return
    stand_in = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    for stored in nested_values(replace(sharded, data=stand_in).build()):
        assert stored.data.is_contiguous(), stored
        yield stored, int(stored.data.storage_offset())


def _first_replica(replica_id: Any) -> bool:
    """Whether no rank of another place in the model has the same; the last number counts data-parallel ranks."""
    return not any(replica_id[:-1])
