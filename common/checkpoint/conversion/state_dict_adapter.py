"""Lazy state dicts in both directions: Hugging Face's tensors from Megatron's, and Megatron's from Hugging Face's."""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.checkpoint.formats.hf_folder import CODES
from common.checkpoint.formats.mapping import ParamMapping, hf_shape, megatron_shape, merge, shard
from common.checkpoint.formats.megatron_folder import MegatronReader
from common.checkpoint.formats.parallel_layout import ParallelLayout, chunk_tensors, model_chunks, model_tensors
from common.checkpoint.formats.torch_dist_writer import TensorShard
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.checkpoint.io.mapped_file import load
from common.errors import KitError
from common.model.shape.config import QwenConfig


def hf_shapes(qwen: QwenConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor in a Hugging Face folder of this model, in model order."""
    names = [name for mapping, layer in model_tensors(qwen) for name in mapping.hf_names(layer)]
    return {name: hf_shape(name, qwen) for name in names}


def hf_state_dict(reader: MegatronReader, qwen: QwenConfig, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """The Hugging Face state dict of a Megatron checkpoint; `dtype` None keeps the stored one."""
    tensors = {}
    for mapping, layer in model_tensors(qwen):
        stored = reader.dtype(mapping, layer)
        if (dtype or stored) not in CODES:
            raise KitError(f"{mapping.megatron_name('local', layer)} is of {stored}: set DTYPE to bf16, fp16 or fp32")
        for part, name in enumerate(mapping.hf_names(layer)):
            parts = partial(reader.hf_parts, mapping, layer, part)
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


class MegatronTensors:
    """Megatron's tensors, whole or sharded, made from a Hugging Face folder.

    Raises KitError where the Hugging Face parts of one Megatron tensor (of all layers if stacked) differ in dtype.
    """

    def __init__(self, reader: HfTensors, qwen: QwenConfig, dtype: torch.dtype | None) -> None:
        self.reader, self.qwen, self._dtype = reader, qwen, dtype
        self._in_memory = lru_cache(maxsize=1)(lambda name: load(reader.tensor(name)))
        first: dict[str, str] = {}
        for mapping, layer in model_tensors(qwen):
            for name in mapping.hf_names(layer):
                other = first.setdefault(mapping.te, name)
                if self.dtype(name) != self.dtype(other):
                    dtypes = f"{name} is of {self.dtype(name)} and {other} of {self.dtype(other)}"
                    raise KitError(f"{reader.folder}: {dtypes}, but one Megatron tensor holds both: set DTYPE")

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the Hugging Face tensor `name` is written."""
        return self._dtype or self.reader.dtype(name)

    def tensor(self, mapping: ParamMapping, layer: int | None, tp_rank: int = 0, tp: int = 1) -> LazyTensor:
        """The shard of TP rank `tp_rank`."""
        names = mapping.hf_names(layer)
        shape = megatron_shape(mapping, self.qwen, tp)
        parts = partial(self._parts, mapping, names, tp_rank, tp)
        return LazyTensor(shape, self.dtype(names[0]), parts, " + ".join(names))

    def _parts(self, mapping: ParamMapping, names: tuple[str, ...], tp_rank: int, tp: int) -> list[list[Tensor]]:
        vocabulary_rows = self.qwen.padded_vocab_size(tp)
        # A tensor sharded by columns is read once for all TP ranks, which are written in turn.
        tensor = self._in_memory if mapping.axis == 1 and tp > 1 else self.reader.tensor
        parts = [shard(mapping, tensor(name), tp_rank, tp, vocabulary_rows) for name in names]
        return [[piece] for piece in merge(mapping, parts, self.qwen)]


def rank_state_dict(
    source: MegatronTensors, layout: ParallelLayout, pp_rank: int, tp_rank: int
) -> dict[str, dict[str, LazyTensor]]:
    """The state dicts of one rank's model chunks in torch format, by the keys of its file."""
    return {
        chunk.key: {
            each.name: source.tensor(each.mapping, each.layer, tp_rank, layout.tp)
            for each in chunk_tensors(source.qwen, layout, chunk)
        }
        for chunk in model_chunks(source.qwen, layout)
        if chunk.pp_rank == pp_rank
    }


def torch_dist_shards(source: MegatronTensors) -> Iterator[TensorShard]:
    """The shards of a torch_dist checkpoint: whole tensors, and one shard per layer of those with stacked layers."""
    num_layers = source.qwen.num_hidden_layers
    for mapping, layer in model_tensors(source.qwen):
        tensor = source.tensor(mapping, layer)
        if layer is None:
            yield TensorShard(mapping.te, tensor.shape, (0,) * len(tensor.shape), tensor)
        else:
            key, stacked_shape = mapping.te.replace("{i}.", ""), (num_layers, *tensor.shape)
            one_layer = LazyTensor((1, *tensor.shape), tensor.dtype, tensor.parts, tensor.name)
            yield TensorShard(key, stacked_shape, (layer, *(0,) * len(tensor.shape)), one_layer)
