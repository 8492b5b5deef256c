"""The tensors of either side, each made from the other's when it is written."""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.checkpoint.formats.hf_folder import CODES
from common.checkpoint.formats.mapping import ParamMapping, hf_shape, megatron_shape, merge, shard
from common.checkpoint.formats.megatron_folder import MegatronReader
from common.checkpoint.formats.parallel_layout import ParallelLayout, chunks_of, tensors_of, whole_model
from common.checkpoint.formats.torch_dist_writer import TensorShard
from common.checkpoint.io.disk import load
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.errors import KitError
from common.model.shape.config import QwenConfig


def hf_shapes(qwen: QwenConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor that a Hugging Face folder of this model holds, in the model's order."""
    names = [name for row, layer in whole_model(qwen) for name in row.hf_names(layer)]
    return {name: hf_shape(name, qwen) for name in names}


def hf_tensors(reader: MegatronReader, qwen: QwenConfig, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Every Hugging Face tensor, made from a Megatron checkpoint; `dtype` None keeps the stored one."""
    tensors = {}
    for row, layer in whole_model(qwen):
        stored = reader.dtype(row, layer)
        if (dtype or stored) not in CODES:
            raise KitError(f"{row.megatron_name('local', layer)} is of {stored}: set DTYPE to bf16, fp16 or fp32")
        for part, name in enumerate(row.hf_names(layer)):
            parts = partial(reader.hf_parts, row, layer, part)
            tensors[name] = LazyTensor(hf_shape(name, qwen), dtype or stored, parts, name)
    return tensors


class HfTensors(Protocol):
    """The tensors of a Hugging Face folder by name."""

    folder: Path

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `name`."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`."""
        ...


class Source:
    """A Hugging Face folder's tensors as one rank's, or the whole model's, Megatron tensors.

    Raises KitError where Megatron has one tensor, or one for all layers, of parts that are of several dtypes.
    """

    def __init__(self, reader: HfTensors, qwen: QwenConfig, dtype: torch.dtype | None) -> None:
        self.reader, self.qwen, self._dtype = reader, qwen, dtype
        self._in_memory = lru_cache(maxsize=1)(lambda name: load(reader.tensor(name)))
        first: dict[str, str] = {}
        for row, layer in whole_model(qwen):
            for name in row.hf_names(layer):
                other = first.setdefault(row.te, name)
                if self.dtype(name) != self.dtype(other):
                    kinds = f"{name} is of {self.dtype(name)} and {other} of {self.dtype(other)}"
                    raise KitError(f"{reader.folder}: {kinds}, which one tensor cannot hold: set DTYPE")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the tensor `name` is written."""
        return self._dtype or self.reader.dtype(name)

    def megatron(self, row: ParamMapping, layer: int | None, tp_rank: int, tp: int) -> LazyTensor:
        """Tensor rank `tp_rank`'s part of `row`."""
        names = row.hf_names(layer)
        shape = megatron_shape(row, self.qwen, tp)
        return LazyTensor(shape, self.dtype(names[0]), partial(self._parts, row, names, tp_rank, tp), " + ".join(names))

    def _parts(self, row: ParamMapping, names: tuple[str, ...], tp_rank: int, tp: int) -> list[list[Tensor]]:
        rows = self.qwen.padded_vocab_size(tp)
        # What is divided by columns is read once for all tensor ranks, which are written in turn.
        tensor = self._in_memory if row.axis == 1 and tp > 1 else self.reader.tensor
        parts = [shard(row, tensor(name), tp_rank, tp, rows) for name in names]
        return [[piece] for piece in merge(row, parts, self.qwen)]


def rank_chunks(source: Source, layout: ParallelLayout, pp_rank: int, tp_rank: int) -> dict[str, dict[str, LazyTensor]]:
    """The chunks of one rank's file in torch format."""
    return {
        chunk.key: {
            placed.name: source.megatron(placed.row, placed.layer, tp_rank, layout.tp)
            for placed in tensors_of(source.qwen, layout, chunk)
        }
        for chunk in chunks_of(source.qwen, layout)
        if chunk.pp_rank == pp_rank
    }


def dist_blocks(source: Source) -> Iterator[TensorShard]:
    """The blocks of a torch_dist checkpoint: whole tensors, those of the layers stacked, a block a layer."""
    num_layers = source.qwen.num_hidden_layers
    for row, layer in whole_model(source.qwen):
        tensor = source.megatron(row, layer, 0, 1)
        if layer is None:
            yield TensorShard(row.te, tensor.shape, (0,) * len(tensor.shape), tensor)
        else:
            block = LazyTensor((1, *tensor.shape), tensor.dtype, tensor.parts, tensor.name)
            yield TensorShard(
                row.te.replace("{i}.", ""), (num_layers, *tensor.shape), (layer, *(0,) * len(tensor.shape)), block
            )
