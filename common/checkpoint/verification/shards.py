"""The weights of a Megatron checkpoint as its files hold them, read for verification."""

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, Checkpoint
from common.checkpoint.verification.independent_readers import DistTensors, StoredTensor, rank_state
from common.errors import KitError
from common.model.shape.config import QwenConfig

SKIPPED = re.compile(r"(^|\.)_extra_state(\d+|/.*)?$|\.rotary_(pos_)?emb\.inv_freq$|^rotary_pos_emb\.inv_freq$")
OTHER_KEYS = re.compile(r"^((chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|opt_param_scheduler)")


class Shard(NamedTuple):
    """A Megatron tensor in a file, and its place in the model."""

    name: str  # its layer is numbered within the whole model
    tp_rank: int
    tp: int
    tensor: StoredTensor


def checkpoint_shards(checkpoint: Checkpoint, qwen: QwenConfig) -> Iterator[Shard]:
    """Every weight of `checkpoint`, in the shards that its files hold."""
    return (_dist_shards if checkpoint.format == "torch_dist" else _rank_shards)(checkpoint.path, qwen)


class MeanTensor:
    """The mean of tensors of one shape, in the first's dtype: summed in float32, in order, divided, rounded once."""

    def __init__(self, tensors: Sequence[StoredTensor]) -> None:
        self._tensors, self.shape, self.dtype = tensors, tensors[0].shape, tensors[0].dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """As StoredTensor."""
        total = reduce(torch.add, (tensor.rows(start, stop).float() for tensor in self._tensors))
        return (total / len(self._tensors)).to(self.dtype)


def mean_shards(checkpoints: Sequence[Iterator[Shard]]) -> Iterator[Shard]:
    """The mean of each shard over checkpoints; raises KitError unless they have the same."""
    for shards in itertools.zip_longest(*checkpoints):
        first = shards[0]
        kinds = {each and (each.name, each.tp_rank, each.tp, each.tensor.shape, each.tensor.dtype) for each in shards}
        if len(kinds) > 1:
            raise KitError(
                "the checkpoints to average differ in their layout or dtype: set AVERAGE to fewer, or"
                " LOAD_CHECKPOINT_PATH to the last one before the change"
            )
        yield first if len(shards) == 1 else first._replace(tensor=MeanTensor([each.tensor for each in shards]))


def _rank_shards(path: Path, qwen: QwenConfig) -> Iterator[Shard]:
    """Every tensor of every rank's file, with its layer numbered within the whole model."""
    ranks = {}
    for folder in path.glob("mp_rank_*"):
        tp_rank, stage = (int(word) for word in f"{folder.name}_0".split("_")[2:4])
        ranks[tp_rank, stage] = folder
    tp, pp = (1 + max(numbers) for numbers in zip(*ranks, strict=True))
    files = {rank: rank_state(folder / MODEL_FILE) for rank, folder in ranks.items()}
    names = [key for key in files[0, 0] if re.fullmatch(r"model\d*", key)]
    first_layer = 0
    for chunk in sorted(names, key=lambda name: (len(name), name)):  # model2 before model10
        for stage in range(pp):
            states = [files[tp_rank, stage][chunk] for tp_rank in range(tp)]
            held = dict.fromkeys(name for state in states for name in state if not SKIPPED.search(name))
            for name, (tp_rank, state) in itertools.product(held, enumerate(states)):
                if name in state:
                    yield Shard(_renumber(name, first_layer), tp_rank, tp, state[name])
            numbers = [int(found[1]) for name in held if (found := re.match(r"decoder\.layers\.(\d+)\.", name))]
            first_layer += 1 + max(numbers, default=-1)


def _renumber(name: str, first_layer: int) -> str:
    """The name with `first_layer` added to its layer's number."""
    return re.sub(r"^(decoder\.layers\.)(\d+)", lambda found: found[1] + str(int(found[2]) + first_layer), name)


def _dist_shards(path: Path, qwen: QwenConfig) -> Iterator[Shard]:
    """Every weight of a torch_dist checkpoint, unsharded, one per layer."""
    files = DistTensors(path)
    for key in files.entries:
        if SKIPPED.search(key) or OTHER_KEYS.search(key):
            continue
        stacked = re.fullmatch(r"decoder\.layers\.(\D.*)", key)
        if stacked is None:
            yield Shard(key, 0, 1, files.tensor(key))
            continue
        for layer in range(qwen.num_hidden_layers):
            yield Shard(f"decoder.layers.{layer}.{stacked[1]}", 0, 1, files.tensor(key, layer))
