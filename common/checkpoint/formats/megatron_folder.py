"""A Megatron checkpoint's weights, whichever its format and layout, as Hugging Face tensors."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, Checkpoint, rank_dir_name
from common.checkpoint.formats.hf_folder import wrong_shape
from common.checkpoint.formats.mapping import (
    EMBEDDING,
    LAYERS,
    OUTPUT,
    ParamMapping,
    canonical_name,
    check_names,
    implementation_of,
    is_skipped,
    megatron_shape,
    param_mappings,
    unshard,
)
from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.checkpoint.formats.torch_format import load_rank_file
from common.checkpoint.formats.vocab_padding import check_rows
from common.checkpoint.io.chunks import Chunk
from common.checkpoint.io.disk import load
from common.checkpoint.io.lazy_tensor import in_rows, same_bits
from common.errors import KitError
from common.log import logger
from common.model.shape.config import QwenConfig

_RANK_DIR = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(_\d{3})?")
# Megatron-Core's own names beside the model's (megatron/training/checkpointing.py, core/optimizer/).
_OTHERS = re.compile(r"(chained_\d+\.)?optimizer\.|(rng_state|rerun_state_machine_state|opt_param_scheduler)\b")
_LAYER_KEY = re.compile(re.escape(LAYERS) + r"(\d+)\.")


class MegatronReader(Protocol):
    """The weights of a checkpoint; raises KitError when one is missing, unknown or of another shape."""

    description: str

    def dtype(self, row: ParamMapping, layer: int | None) -> torch.dtype:
        """The stored dtype."""
        ...

    def hf_parts(self, row: ParamMapping, layer: int | None, part: int) -> Sequence[Sequence[Tensor]]:
        """The views that make Hugging Face tensor number `part` of `row`, as mapping.unshard gives them."""
        ...


def open_megatron(checkpoint: Checkpoint, qwen: QwenConfig, *, drop_rows: bool = False) -> MegatronReader:
    """The weights of `checkpoint`, checked against `qwen`; drop_rows: as vocabulary.check_rows says."""
    return (DistWeights if checkpoint.format == "torch_dist" else RankWeights)(checkpoint.path, qwen, drop_rows)


class DistWeights:
    """Weights in torch_dist format: whole tensors, layers stacked or numbered."""

    def __init__(self, path: Path, qwen: QwenConfig, drop_rows: bool = False) -> None:
        self._reader, self._qwen = TorchDistReader(path), qwen
        self.description = "torch_dist"
        stored = {key: tensor for key, tensor in self._reader.tensors.items() if is_weight(key)}
        self._stacked = not any(_LAYER_KEY.match(key) for key in stored)
        layers = range(qwen.num_hidden_layers)
        places = {
            self._key(row, i): row for row in param_mappings(qwen) for i in (layers if row.stage == "layer" else [None])
        }
        tied_copy = {OUTPUT.te} if qwen.tie_word_embeddings else set()
        check_names(set(stored) - tied_copy, places, str(path))
        if tied_copy & set(stored) and not same_bits(self._reader.read(OUTPUT.te), self._reader.read(EMBEDDING.te)):
            raise _differing_copy(path)
        for key, row in places.items():
            shape = stored[key].shape
            expected = megatron_shape(row, qwen, vocabulary_rows=max((*shape[:1], qwen.vocab_size)))
            if row.stage == "layer" and self._stacked:
                expected = (qwen.num_hidden_layers, *megatron_shape(row, qwen))
            if shape != expected:
                raise wrong_shape(path, key, shape, expected)
            self._reader.check_cover(key)
            if row.vocabulary:
                above = Chunk((qwen.vocab_size, 0), (shape[0] - qwen.vocab_size, shape[1]))
                rows = (block for _, block, _ in self._reader.blocks(key, above))
                check_rows(rows, path, key, qwen.vocab_size, drop_rows)
        self._read = lru_cache(maxsize=1)(self._reader.read)  # the parts of one row are asked for in turn

    def _key(self, row: ParamMapping, layer: int | None) -> str:
        return row.te.replace("{i}.", "") if self._stacked else row.megatron_name("transformer_engine", layer)

    def dtype(self, row: ParamMapping, layer: int | None) -> torch.dtype:
        """The stored dtype."""
        return self._reader.tensors[self._key(row, layer)].dtype

    def hf_parts(self, row: ParamMapping, layer: int | None, part: int) -> Sequence[Sequence[Tensor]]:
        """The views that make Hugging Face tensor number `part` of `row`, as mapping.unshard gives them."""
        whole = self._read(self._key(row, layer), layer if self._stacked else None)
        return unshard(row, [whole], part, self._qwen)


def is_weight(key: str) -> bool:
    """Whether a torch_dist key is the model's, or unknown: not the optimizer's, the random state's or a buffer."""
    return not _OTHERS.match(key) and not is_skipped(key)


def _differing_copy(path: Path) -> KitError:
    return KitError(
        f"{path}: config.json ties the embeddings, but {OUTPUT.te} differs from the embedding:"
        " set tie_word_embeddings to false in config.json if the model has both"
    )


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: the pipeline rank, the key of the chunk in its file, the name there."""

    pp_rank: int
    chunk: str
    name: str


class RankWeights:
    """Weights in torch format: a file for each tensor and pipeline rank, virtual chunks within it."""

    def __init__(self, path: Path, qwen: QwenConfig, drop_rows: bool = False) -> None:
        self._path, self._qwen = path, qwen
        self._files = rank_files(path)
        self.tp = 1 + max(tp for _, tp in self._files)
        self.pp = 1 + max(pp for pp, _ in self._files)
        chunks = chunk_keys(self._files[0, 0], path)
        self.vpp = len(chunks)
        self._places = self._find(chunks)
        names = [place.name for place in self._places.values()]
        self.description = f"torch, TP={self.tp} PP={self.pp} VPP={self.vpp}, {implementation_of(names)} names"
        self._check_shapes()
        self._check_copies()
        for row in param_mappings(qwen):
            if row.vocabulary:
                check_rows(self._rows_above(row), path, self._places[row.te, None].name, qwen.vocab_size, drop_rows)

    def _find(self, chunks: list[str]) -> dict[tuple[str, int | None], _Place]:
        """(row's Megatron name, layer) to place; layers are counted over the chunks in the model's order."""
        places: dict[tuple[str, int | None], _Place] = {}
        first_layer = 0
        for chunk in chunks:  # chunk c lies on stage c % PP
            for pp_rank in range(self.pp):
                num_layers = 0
                for name in self._chunk(pp_rank, 0, chunk):
                    generic, layer = generic_name(canonical_name(name))
                    num_layers = max(num_layers, 0 if layer is None else layer + 1)
                    where = (generic, None if layer is None else first_layer + layer)
                    if not is_skipped(name) and (generic != OUTPUT.te or not self._qwen.tie_word_embeddings):
                        places[where] = _Place(pp_rank, chunk, name)
                first_layer += num_layers
                for tp_rank in range(1, self.tp):
                    names = [name for name in self._chunk(pp_rank, 0, chunk) if not is_skipped(name)]
                    check_names(self._chunk(pp_rank, tp_rank, chunk), names, f"{self._path}: tensor rank {tp_rank}")
        layers = range(self._qwen.num_hidden_layers)
        rows = param_mappings(self._qwen)
        wanted = [(row.te, i) for row in rows for i in (layers if row.stage == "layer" else [None])]
        spelled = {(name, layer): name.replace("{i}", str(layer)) for name, layer in [*places, *wanted]}
        check_names([spelled[key] for key in places], [spelled[key] for key in wanted], str(self._path))
        return places

    def _chunk(self, pp_rank: int, tp_rank: int, chunk: str) -> dict[str, Any]:
        state = self._files[pp_rank, tp_rank].get(chunk)
        if not isinstance(state, dict):
            raise KitError(f"{self._path}: the file of pipeline rank {pp_rank} has no '{chunk}': copy it again")
        return state

    def _shards(self, row: ParamMapping, layer: int | None) -> list[Tensor]:
        place = self._places[row.te, layer]
        shards = []
        for tp_rank in range(self.tp):
            shard = self._chunk(place.pp_rank, tp_rank, place.chunk).get(place.name)
            if not isinstance(shard, Tensor):
                raise KitError(f"{self._path}: tensor rank {tp_rank} lacks {place.name}: the checkpoint is not whole")
            shards.append(shard)
        return shards

    def _check_shapes(self) -> None:
        for row in param_mappings(self._qwen):
            for layer in range(self._qwen.num_hidden_layers) if row.stage == "layer" else [None]:
                for shard in self._shards(row, layer):
                    shape = tuple(shard.shape)
                    rows = max(sum(shape[:1]) * self.tp, self._qwen.padded_vocab_size(self.tp))
                    expected = megatron_shape(row, self._qwen, self.tp, rows)
                    if shape != expected:
                        raise wrong_shape(self._path, self._places[row.te, layer].name, shape, expected)

    def _rows_above(self, row: ParamMapping) -> Iterator[Tensor]:
        """The rows of an embedding above vocab_size, in memory, a block at a time."""
        for tp_rank, shard in enumerate(self._shards(row, None)):
            for (rows,) in in_rows([shard[max(self._qwen.vocab_size - tp_rank * len(shard), 0) :]]):
                yield load(rows)

    def _check_copies(self) -> None:
        """Warns where tensor ranks hold different copies of what they should share; refuses an untied tied model."""
        differing = [
            self._places[row.te, layer].name
            for row in param_mappings(self._qwen)
            if row.axis is None
            for layer in (range(self._qwen.num_hidden_layers) if row.stage == "layer" else [None])
            if any(not same_bits(shard, self._shards(row, layer)[0]) for shard in self._shards(row, layer)[1:])
        ]
        if differing:
            logger.warning(
                "%s: the tensor ranks' copies of %d norms differ (%s, ...): rank 0's are taken; whatever trained this"
                " did not reduce their gradients", self._path, len(differing), differing[0],
            )  # fmt: skip
        if not self._qwen.tie_word_embeddings:
            return
        last = chunk_keys(self._files[0, 0], self._path)[-1]
        for tp_rank, embedding in enumerate(self._shards(EMBEDDING, None)):
            copy = self._chunk(self.pp - 1, tp_rank, last).get(OUTPUT.te)
            if copy is not None and not same_bits(copy, embedding):
                raise _differing_copy(self._path)

    def dtype(self, row: ParamMapping, layer: int | None) -> torch.dtype:
        """The stored dtype."""
        return self._shards(row, layer)[0].dtype

    def hf_parts(self, row: ParamMapping, layer: int | None, part: int) -> Sequence[Sequence[Tensor]]:
        """The views that make Hugging Face tensor number `part` of `row`, as mapping.unshard gives them."""
        return unshard(row, self._shards(row, layer), part, self._qwen)


def rank_files(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(pipeline rank, tensor rank) to the content of its file; raises KitError unless every rank is there."""
    files = {}
    for folder in sorted(path.glob("mp_rank_*")):
        found = _RANK_DIR.fullmatch(folder.name)
        if found is None or found[3]:
            raise KitError(f"{folder}: expert parallel or unknown folders are not read: only mp_rank_TT[_PPP] are")
        rank = int(found[2] or 0), int(found[1])
        if rank in files:
            raise KitError(f"{path} holds {folder.name} beside mp_rank_{found[1]}: remove that of an older checkpoint")
        files[rank] = load_rank_file(folder / MODEL_FILE)
    pp, tp = (1 + max(ranks) for ranks in zip(*files, strict=True))
    missing = [(p, t) for p in range(pp) for t in range(tp) if (p, t) not in files]
    if missing:
        name = rank_dir_name(missing[0][1], missing[0][0], pp)
        raise KitError(f"{path} has TP={tp} and PP={pp}, but lacks {name}: the checkpoint is not whole; copy it again")
    return files


def chunk_keys(state: dict[str, Any], path: Path) -> list[str]:
    """The keys of a file's chunks in the order of their layers: model, or model0, model1, ..."""
    names = [key for key in state if re.fullmatch(r"model\d*", key)]
    if not names or ("model" in names and len(names) > 1):
        raise KitError(f"{path}: a rank's file holds no 'model': it is no checkpoint of Megatron-Core's models")
    if any("language_model" in state[name] for name in names if isinstance(state[name], dict)):
        raise KitError(
            f"{path} holds a 'language_model': it is of Megatron-LM's legacy models, before Megatron-Core's: convert it"
            " there first, by tools/checkpoint/convert.py with --saver core (or mcore)"
        )
    return sorted(names, key=lambda name: (len(name), name))  # model2 before model10


def generic_name(name: str) -> tuple[str, int | None]:
    """`decoder.layers.3.x` -> (`decoder.layers.{i}.x`, 3)."""
    found = _LAYER_KEY.match(name)
    return (name, None) if found is None else (f"{LAYERS}{{i}}.{name[found.end() :]}", int(found[1]))
