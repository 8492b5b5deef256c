"""Which layers lie where: pipeline stages, their virtual chunks, and the tensors of each.

8 layers at PP=2, VPP=2, chunk c on stage c % PP as its chunk c // PP:

    layers   0 1   2 3   4 5   6 7        stage 0: model0 = 0 1, model1 = 4 5
    chunk     0     1     2     3         stage 1: model0 = 2 3, model1 = 6 7

PIPELINE_LAYERS=1,3,3,1 gives the chunks other sizes: 0 | 1 2 3 | 4 5 6 | 7.
"""

import itertools
from dataclasses import dataclass

from common.checkpoint.formats.mapping import EMBEDDING, OUTPUT, ParamMapping, param_mappings
from common.errors import KitError
from common.model.shape.config import QwenConfig


@dataclass(frozen=True)
class ParallelLayout:
    """The parallel sizes of a checkpoint in torch format; `transformer_impl` decides the parameters' names.

    `pipeline_layers`: the layers of each chunk in the model's order; empty: as many each.
    """

    tp: int
    pp: int
    vpp: int
    transformer_impl: str
    pipeline_layers: tuple[int, ...] = ()

    def check(self, qwen: QwenConfig) -> None:
        """Raises KitError unless a model of this shape can be divided so."""
        for name in ("tp", "pp", "vpp"):
            if getattr(self, name) < 1:
                raise KitError(f"{name.upper()}={getattr(self, name)}: it must be at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise KitError(f"VPP={self.vpp} needs pipeline stages, but PP=1: set PP to 2 or more, or VPP=1")
        qwen.check_tensor_parallel(self.tp)
        qwen.chunk_layers(self.pp, self.vpp, self.pipeline_layers)


@dataclass(frozen=True)
class Placed:
    """One tensor of a chunk: its Megatron name there, its row, and its layer's number in the whole model."""

    name: str
    row: ParamMapping
    layer: int | None


@dataclass(frozen=True)
class ModelChunk:
    """The part of the model that one pipeline rank holds under one key of its file."""

    key: str  # model, or model0, model1, ...
    pp_rank: int
    layers: range
    first: bool
    last: bool


def chunks_of(qwen: QwenConfig, layout: ParallelLayout) -> list[ModelChunk]:
    """The chunks in the order of their layers; chunk c lies on stage c % PP."""
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


def tensors_of(qwen: QwenConfig, layout: ParallelLayout, chunk: ModelChunk) -> list[Placed]:
    """The tensors of `chunk`, in the order of the model.

    A tied model's last stage holds a copy of the embedding as its output layer, where it is not the first stage too.
    """
    impl = layout.transformer_impl
    rows = param_mappings(qwen)
    placed = [Placed(row.megatron_name(impl), row, None) for row in rows if row.stage == "first" and chunk.first]
    for position, layer in enumerate(chunk.layers):
        placed += [Placed(row.megatron_name(impl, position), row, layer) for row in rows if row.stage == "layer"]
    placed += [Placed(row.megatron_name(impl), row, None) for row in rows if row.stage == "last" and chunk.last]
    if chunk.last and not chunk.first and qwen.tie_word_embeddings:
        placed.append(Placed(OUTPUT.megatron_name(impl), EMBEDDING, None))
    return placed


def whole_model(qwen: QwenConfig) -> list[tuple[ParamMapping, int | None]]:
    """Each row with each of its layers, in the order of the model."""
    rows = param_mappings(qwen)
    listed: list[tuple[ParamMapping, int | None]] = [(row, None) for row in rows if row.stage == "first"]
    for layer in range(qwen.num_hidden_layers):
        listed += [(row, layer) for row in rows if row.stage == "layer"]
    return listed + [(row, None) for row in rows if row.stage == "last"]
