"""The parallel layout of a checkpoint: pipeline stages, their model chunks, and the tensors of each.

8 layers at PP=2, VPP=2; chunk c is number c // PP on stage c % PP:

    layers   0 1   2 3   4 5   6 7        stage 0: model0 = 0 1, model1 = 4 5
    chunk     0     1     2     3         stage 1: model0 = 2 3, model1 = 6 7

PIPELINE_LAYERS=1,3,3,1 sets the chunk sizes: 0 | 1 2 3 | 4 5 6 | 7.
"""

import itertools
from dataclasses import dataclass

from common.checkpoint.formats.mapping import EMBEDDING, OUTPUT, ParamMapping, param_mappings
from common.errors import KitError
from common.model.shape.config import QwenConfig


@dataclass(frozen=True)
class ParallelLayout:
    """The parallel sizes of a checkpoint in torch format; `transformer_impl` decides the parameters' names.

    `pipeline_layers`: the number of layers of each chunk in model order; empty: even.
    """

    tp: int
    pp: int
    vpp: int
    transformer_impl: str
    pipeline_layers: tuple[int, ...] = ()

    def check(self, qwen: QwenConfig) -> None:
        """Raises KitError unless a model with this config can be split this way."""
        for name in ("tp", "pp", "vpp"):
            if getattr(self, name) < 1:
                raise KitError(f"{name.upper()}={getattr(self, name)}: it must be at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise KitError(f"VPP={self.vpp} needs pipeline stages, but PP=1: set PP to 2 or more, or VPP=1")
        qwen.check_tensor_parallel(self.tp)
        qwen.chunk_layers(self.pp, self.vpp, self.pipeline_layers)


@dataclass(frozen=True)
class ChunkTensor:
    """A tensor of a model chunk: its Megatron name there, its mapping, and its layer's number in the whole model."""

    name: str
    mapping: ParamMapping
    layer: int | None


@dataclass(frozen=True)
class ModelChunk:
    """A model chunk: the part of the model under one key of a pipeline rank's file."""

    key: str  # model, or model0, model1, ...
    pp_rank: int
    layers: range
    first: bool
    last: bool


def model_chunks(qwen: QwenConfig, layout: ParallelLayout) -> list[ModelChunk]:
    """The model chunks in the order of their layers; chunk c is on stage c % PP."""
    sizes = qwen.chunk_layers(layout.pp, layout.vpp, layout.pipeline_layers)
    ends = list(itertools.accumulate(sizes))
    return [
        ModelChunk(
            key="model" if layout.vpp == 1 else f"model{index // layout.pp}",
            pp_rank=index % layout.pp,
            layers=range(end - size, end),
            first=index == 0,
            last=index == len(sizes) - 1,
        )
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def chunk_tensors(qwen: QwenConfig, layout: ParallelLayout, chunk: ModelChunk) -> list[ChunkTensor]:
    """The tensors of `chunk`, in model order.

    With tied embeddings the last of several stages holds a copy of the embedding as its output layer.
    """
    mappings, impl = param_mappings(qwen), layout.transformer_impl

    def outside_layers(stage: str) -> list[ChunkTensor]:
        return [ChunkTensor(each.megatron_name(impl), each, None) for each in mappings if each.stage == stage]

    tensors = outside_layers("first") if chunk.first else []
    for i, layer in enumerate(chunk.layers):
        tensors += [ChunkTensor(each.megatron_name(impl, i), each, layer) for each in mappings if each.stage == "layer"]
    tensors += outside_layers("last") if chunk.last else []
    if chunk.last and not chunk.first and qwen.tie_word_embeddings:
        tensors.append(ChunkTensor(OUTPUT.megatron_name(impl), EMBEDDING, None))
    return tensors


def model_tensors(qwen: QwenConfig) -> list[tuple[ParamMapping, int | None]]:
    """Each mapping with each of its layers, in model order."""
    mappings = param_mappings(qwen)
    listed: list[tuple[ParamMapping, int | None]] = [(each, None) for each in mappings if each.stage == "first"]
    for layer in range(qwen.num_hidden_layers):
        listed += [(each, layer) for each in mappings if each.stage == "layer"]
    return listed + [(each, None) for each in mappings if each.stage == "last"]
