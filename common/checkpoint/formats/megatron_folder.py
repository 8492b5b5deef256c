"""The weights of a Megatron checkpoint of any format and layout, as Hugging Face tensors."""

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
from common.checkpoint.formats.parallel_layout import model_tensors
from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.checkpoint.formats.torch_format import load_rank_file
from common.checkpoint.formats.vocab_padding import check_padding_rows
from common.checkpoint.io.chunks import Chunk
from common.checkpoint.io.lazy_tensor import bitwise_equal, row_blocks
from common.checkpoint.io.mapped_file import load
from common.errors import KitError
from common.log import logger
from common.model.shape.config import QwenConfig

_RANK_DIR = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(_\d{3})?")
# Megatron-Core's keys beside the model's (megatron/training/checkpointing.py, core/optimizer/).
_OTHER_KEYS = re.compile(r"(chained_\d+\.)?optimizer\.|(rng_state|rerun_state_machine_state|opt_param_scheduler)\b")
_LAYER_KEY = re.compile(re.escape(LAYERS) + r"(\d+)\.")


class MegatronReader(Protocol):
    """The weights of a checkpoint; raises KitError when one is missing, unexpected or of the wrong shape."""

    description: str

    def dtype(self, mapping: ParamMapping, layer: int | None) -> torch.dtype:
        """The stored dtype."""
        ...

    def hf_parts(self, mapping: ParamMapping, layer: int | None, part: int) -> Sequence[Sequence[Tensor]]:
        """The views that make Hugging Face tensor number `part`, as `mapping.unshard` returns them."""
        ...


def open_megatron(checkpoint: Checkpoint, qwen: QwenConfig, *, drop_rows: bool = False) -> MegatronReader:
    """The weights of `checkpoint`, checked against `qwen`; drop_rows: see `check_padding_rows`."""
    return (TorchDistWeights if checkpoint.format == "torch_dist" else TorchWeights)(checkpoint.path, qwen, drop_rows)


class TorchDistWeights:
    """Weights in torch_dist format: whole tensors, with stacked or numbered layers."""

    def __init__(self, path: Path, qwen: QwenConfig, drop_rows: bool = False) -> None:
        self._reader, self._qwen = TorchDistReader(path), qwen
        self.description = "torch_dist"
        stored = {key: tensor for key, tensor in self._reader.tensors.items() if is_weight(key)}
        self._stacked = not any(_LAYER_KEY.match(key) for key in stored)
        expected = {self._key(mapping, layer): mapping for mapping, layer in model_tensors(qwen)}
        tied_copy = {OUTPUT.te} if qwen.tie_word_embeddings else set()
        check_names(set(stored) - tied_copy, expected, str(path))
        if tied_copy & set(stored) and not bitwise_equal(*map(self._reader.read, (OUTPUT.te, EMBEDDING.te))):
            raise _untied_error(path)
        for key, mapping in expected.items():
            self._check_tensor(key, mapping, drop_rows)
        self._read = lru_cache(maxsize=1)(self._reader.read)  # the parts of one tensor are read in turn

    def _check_tensor(self, key: str, mapping: ParamMapping, drop_rows: bool) -> None:
        """Raises KitError unless the tensor `key` has the right shape and all of its chunks."""
        path, qwen, shape = self._reader.path, self._qwen, self._reader.tensors[key].shape
        expected = megatron_shape(mapping, qwen, vocabulary_rows=max((*shape[:1], qwen.vocab_size)))
        if mapping.stage == "layer" and self._stacked:
            expected = (qwen.num_hidden_layers, *megatron_shape(mapping, qwen))
        if shape != expected:
            raise wrong_shape(path, key, shape, expected)
        self._reader.check_coverage(key)
        if mapping.vocabulary:
            extra = Chunk((qwen.vocab_size, 0), (shape[0] - qwen.vocab_size, shape[1]))
            blocks = (block for _, block, _ in self._reader.blocks(key, extra))
            check_padding_rows(blocks, path, key, qwen.vocab_size, drop_rows)

    def _key(self, mapping: ParamMapping, layer: int | None) -> str:
        if self._stacked:
            return mapping.te.replace("{i}.", "")
        return mapping.megatron_name("transformer_engine", layer)

    def dtype(self, mapping: ParamMapping, layer: int | None) -> torch.dtype:
        """The stored dtype."""
        return self._reader.tensors[self._key(mapping, layer)].dtype

    def hf_parts(self, mapping: ParamMapping, layer: int | None, part: int) -> Sequence[Sequence[Tensor]]:
        """The views that make Hugging Face tensor number `part`, as `mapping.unshard` returns them."""
        whole = self._read(self._key(mapping, layer), layer if self._stacked else None)
        return unshard(mapping, [whole], part, self._qwen)


def is_weight(key: str) -> bool:
    """Whether a torch_dist key is a weight or unknown: no optimizer or RNG state and no buffer."""
    return not _OTHER_KEYS.match(key) and not is_skipped(key)


def _untied_error(path: Path) -> KitError:
    return KitError(
        f"{path}: config.json ties the embeddings, but {OUTPUT.te} differs from the embedding:"
        " set tie_word_embeddings to false in config.json if the model has both"
    )


@dataclass(frozen=True)
class _Location:
    """The location of a tensor: pipeline rank, key of the model chunk in its file, name there."""

    pp_rank: int
    chunk: str
    name: str


class TorchWeights:
    """Weights in torch format: a file per tensor- and pipeline-parallel rank, each with one or more model chunks."""

    def __init__(self, path: Path, qwen: QwenConfig, drop_rows: bool = False) -> None:
        self._path, self._qwen = path, qwen
        self._files = rank_files(path)
        self.tp = 1 + max(tp for _, tp in self._files)
        self.pp = 1 + max(pp for pp, _ in self._files)
        chunks = chunk_keys(self._files[0, 0], path)
        self.vpp = len(chunks)
        self._locations = self._find(chunks)
        names = [location.name for location in self._locations.values()]
        self.description = f"torch, TP={self.tp} PP={self.pp} VPP={self.vpp}, {implementation_of(names)} names"
        self._check_shapes()
        self._check_replicas()
        if qwen.tie_word_embeddings:
            self._check_tied_copy(chunks[-1])
        for mapping in (each for each in param_mappings(qwen) if each.vocabulary):
            name = self._locations[mapping.te, None].name
            check_padding_rows(self._extra_rows(mapping), path, name, qwen.vocab_size, drop_rows)

    def _find(self, chunks: list[str]) -> dict[tuple[str, int | None], _Location]:
        """(Megatron name, layer) to location; layers are numbered over the chunks in model order."""
        locations: dict[tuple[str, int | None], _Location] = {}
        first_layer = 0
        for chunk in chunks:  # chunk c is on stage c % PP
            for pp_rank in range(self.pp):
                num_layers = 0
                for name in self._chunk(pp_rank, 0, chunk):
                    generic, layer = generic_name(canonical_name(name))
                    num_layers = max(num_layers, 0 if layer is None else layer + 1)
                    key = (generic, None if layer is None else first_layer + layer)
                    if not is_skipped(name) and (generic != OUTPUT.te or not self._qwen.tie_word_embeddings):
                        locations[key] = _Location(pp_rank, chunk, name)
                first_layer += num_layers
                names = [name for name in self._chunk(pp_rank, 0, chunk) if not is_skipped(name)]
                for tp_rank in range(1, self.tp):
                    check_names(self._chunk(pp_rank, tp_rank, chunk), names, f"{self._path}: TP rank {tp_rank}")
        expected = [(mapping.te, layer) for mapping, layer in model_tensors(self._qwen)]
        full_name = {(name, layer): name.replace("{i}", str(layer)) for name, layer in [*locations, *expected]}
        check_names([full_name[key] for key in locations], [full_name[key] for key in expected], str(self._path))
        return locations

    def _chunk(self, pp_rank: int, tp_rank: int, chunk: str) -> dict[str, Any]:
        state = self._files[pp_rank, tp_rank].get(chunk)
        if not isinstance(state, dict):
            raise KitError(f"{self._path}: the file of PP rank {pp_rank} has no '{chunk}': copy it again")
        return state

    def _shards(self, mapping: ParamMapping, layer: int | None) -> list[Tensor]:
        location = self._locations[mapping.te, layer]
        shards = []
        for tp_rank in range(self.tp):
            shard = self._chunk(location.pp_rank, tp_rank, location.chunk).get(location.name)
            if not isinstance(shard, Tensor):
                raise KitError(f"{self._path}: TP rank {tp_rank} lacks {location.name}: the checkpoint is incomplete")
            shards.append(shard)
        return shards

    def _check_shapes(self) -> None:
        for mapping, layer in model_tensors(self._qwen):
            for shard in self._shards(mapping, layer):
                shape = tuple(shard.shape)
                rows = max(sum(shape[:1]) * self.tp, self._qwen.padded_vocab_size(self.tp))
                expected = megatron_shape(mapping, self._qwen, self.tp, rows)
                if shape != expected:
                    raise wrong_shape(self._path, self._locations[mapping.te, layer].name, shape, expected)

    def _extra_rows(self, mapping: ParamMapping) -> Iterator[Tensor]:
        """The embedding rows above vocab_size, in memory, a block at a time."""
        for tp_rank, shard in enumerate(self._shards(mapping, None)):
            for (rows,) in row_blocks([shard[max(self._qwen.vocab_size - tp_rank * len(shard), 0) :]]):
                yield load(rows)

    def _check_replicas(self) -> None:
        """Warns where replicated tensors differ between TP ranks."""
        differing = []
        for mapping, layer in model_tensors(self._qwen):
            if mapping.axis is None:
                first, *others = self._shards(mapping, layer)
                if not all(bitwise_equal(other, first) for other in others):
                    differing.append(self._locations[mapping.te, layer].name)
        if differing:
            logger.warning(
                "%s: %d norm weights differ between TP ranks (%s, ...): using TP rank 0's; the training run did not"
                " all-reduce their gradients", self._path, len(differing), differing[0],
            )  # fmt: skip

    def _check_tied_copy(self, last_chunk: str) -> None:
        """Raises KitError where the last stage's copy of the tied embeddings differs from the embedding."""
        for tp_rank, embedding in enumerate(self._shards(EMBEDDING, None)):
            copy = self._chunk(self.pp - 1, tp_rank, last_chunk).get(OUTPUT.te)
            if copy is not None and not bitwise_equal(copy, embedding):
                raise _untied_error(self._path)

    def dtype(self, mapping: ParamMapping, layer: int | None) -> torch.dtype:
        """The stored dtype."""
        return self._shards(mapping, layer)[0].dtype

    def hf_parts(self, mapping: ParamMapping, layer: int | None, part: int) -> Sequence[Sequence[Tensor]]:
        """The views that make Hugging Face tensor number `part`, as `mapping.unshard` returns them."""
        return unshard(mapping, self._shards(mapping, layer), part, self._qwen)


def rank_files(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(PP rank, TP rank) to the content of its file; raises KitError unless the files of all ranks exist."""
    files = {}
    for folder in sorted(path.glob("mp_rank_*")):
        found = _RANK_DIR.fullmatch(folder.name)
        if found is None or found[3]:
            raise KitError(f"{folder}: expert-parallel or unknown folder: only mp_rank_TT[_PPP] is supported")
        rank = int(found[2] or 0), int(found[1])
        if rank in files:
            raise KitError(f"{path} holds {folder.name} beside mp_rank_{found[1]}: remove the older one")
        files[rank] = load_rank_file(folder / MODEL_FILE)
    pp, tp = (1 + max(ranks) for ranks in zip(*files, strict=True))
    missing = [(p, t) for p in range(pp) for t in range(tp) if (p, t) not in files]
    if missing:
        name = rank_dir_name(missing[0][1], missing[0][0], pp)
        raise KitError(f"{path} has TP={tp} and PP={pp}, but lacks {name}: the checkpoint is incomplete; copy it again")
    return files


def chunk_keys(state: dict[str, Any], path: Path) -> list[str]:
    """The keys of a file's model chunks in the order of their layers: model, or model0, model1, ..."""
    names = [key for key in state if re.fullmatch(r"model\d*", key)]
    if not names or ("model" in names and len(names) > 1):
        raise KitError(f"{path}: a rank's file holds no 'model': it is not a checkpoint of a Megatron-Core model")
    if any("language_model" in state[name] for name in names if isinstance(state[name], dict)):
        raise KitError(
            f"{path} holds a 'language_model', a legacy Megatron-LM model: convert it first with Megatron-LM's"
            " tools/checkpoint/convert.py and --saver core (or mcore)"
        )
    return sorted(names, key=lambda name: (len(name), name))  # model2 before model10


def generic_name(name: str) -> tuple[str, int | None]:
    """`decoder.layers.3.x` -> (`decoder.layers.{i}.x`, 3)."""
    found = _LAYER_KEY.match(name)
    return (name, None) if found is None else (f"{LAYERS}{{i}}.{name[found.end() :]}", int(found[1]))
