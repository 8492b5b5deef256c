"""A Hugging Face folder's weights: safetensors read through memory maps, and written a tensor at a time.

A safetensors file is a u64 length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.checkpoint.formats.mapping import EMBEDDING, OUTPUT, check_names, is_skipped
from common.checkpoint.io.checksums import check_inside
from common.checkpoint.io.disk import MappedFile, Writer, ahead
from common.checkpoint.io.lazy_tensor import LazyTensor, same_bits
from common.errors import KitError
from common.json_file import read_json
from common.log import logger
from common.model.shape.config import QwenConfig, read_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CODES = {dtype: code for code, dtype in DTYPES.items()}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
HEADER_ALIGNMENT = 8
VOCABULARIES = tuple(name for row in (EMBEDDING, OUTPUT) for name in (row.te, *row.hf))
QUANTIZED_BY = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # GPTQ, AWQ, ModelOpt


class HfReader:
    """The tensors of a folder by name; each lies in the mapped file until it is used.

    Raises KitError when a file is missing, cut short or not of safetensors, or an index and its files disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.is_file() and (folder / SINGLE).is_file():
            raise KitError(f"{folder} holds both {INDEX} and {SINGLE}: remove the one that is not the model's")
        if index.is_file():
            listed = read_index(index)
        elif (folder / SINGLE).is_file():
            listed = None
        else:
            raise KitError(f"{folder} holds neither {INDEX} nor {SINGLE}: give a folder with safetensors")
        self._files: dict[str, Any] = {}
        self._places: dict[str, tuple[MappedFile, int, int]] = {}
        self._file_of: dict[str, str] = {}
        for name in sorted(set(listed.values())) if listed else [SINGLE]:
            file, places = _open(folder / name)
            self._files[name] = file
            self._places |= places
            for tensor in file.keys():  # noqa: SIM118  a safe_open is no mapping
                if listed is not None and listed.get(tensor) != name:
                    raise KitError(f"{folder / name} holds {tensor}, which {INDEX} places elsewhere: copy them again")
                self._file_of[tensor] = name
        if absent := sorted(set(listed or ()) - set(self._file_of)):
            raise KitError(f"{index} names {absent[0]}, which {listed[absent[0]]} lacks: copy the folder again")  # type: ignore[index]

    @property
    def names(self) -> list[str]:
        """All tensors' names."""
        return sorted(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`; its bytes are read when they are looked at."""
        file, start, size = self._places[name]
        return file.tensor(start, size, self.dtype(name)).reshape(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name`."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `name`; raises KitError unless it is bfloat16, float16 or float32."""
        code = self._slice(name).get_dtype()
        if code not in DTYPES:
            raise KitError(f"{self.folder}: {name} is of dtype {code}, not one of {', '.join(DTYPES)}")
        return DTYPES[code]

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)


def read_index(path: Path) -> dict[str, str]:
    """Tensor to file, as an index of safetensors tells it."""
    remedy = "copy it again from the model"
    listed = read_json(path, remedy).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise KitError(f"{path} is no index of safetensors, whose weight_map gives each tensor's file: {remedy}")
    for file in set(listed.values()):
        check_inside(path, file)
    return listed


def _open(path: Path) -> tuple[Any, dict[str, tuple[MappedFile, int, int]]]:
    """The file, found sound by safetensors, and where each tensor's bytes lie in it: their beginning and number."""
    if not path.is_file():
        raise KitError(f"{path} is missing: copy it again from the model")
    try:
        with path.open("rb") as stream:  # safetensors takes no name that is not UTF-8
            file = safe_open(f"/proc/self/fd/{stream.fileno()}", framework="pt")
    except SafetensorError as error:
        raise KitError(f"{path} is no whole safetensors file ({error}): copy it again from the model") from error
    mapped = MappedFile(path)
    (length,) = struct.unpack("<Q", mapped.map[:8])
    header = json.loads(mapped.map[8 : 8 + length])
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return file, {name: (mapped, 8 + length + start, end - start) for name, (start, end) in offsets.items()}


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10^9 each) or "5GiB" (2^30 each), as Hugging Face counts; raises KitError."""
    for unit, factor in UNITS.items():
        number = text.upper().removesuffix(unit).strip()
        if text.upper().endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return int(float(number) * factor)
    raise KitError(f"MAX_SHARD_SIZE={text}: give a number and one of {', '.join(UNITS)}, as 5GB")


def write_safetensors(
    folder: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int, done: Callable[[int], None]
) -> list[str]:
    """The names of the files of `tensors` in `folder`, each of at most `max_shard_bytes` unless one tensor is larger.

    `done` is told the bytes of each block when it is written.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, {tensor: tensors[tensor] for tensor in shard}, done)
    if len(shards) == 1:
        return names
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = {
        "total_parameters": sum(tensor.numel for tensor in tensors.values()),
        "total_size": sum(tensor.num_bytes for tensor in tensors.values()),
    }
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]


def shard_names(count: int) -> list[str]:
    """The names of a model's safetensors files, as many as `count`."""
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]


def plan_shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[list[str]]:
    """The names of each file's tensors, filled one after the other in the given order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], done: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with Writer(path) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for block in ahead(block for tensor in tensors.values() for block in tensor.blocks()):
            stream.write(block)
            done(block.nbytes)


def check_weights(reader: HfReader, expected: Mapping[str, tuple[int, ...]], qwen: QwenConfig) -> None:
    """Raises KitError unless `reader` holds the `expected` tensors, each of its shape and a known dtype.

    A tied model's folder may hold its output layer too, when that is the embedding bit for bit.
    """
    found = set(reader.names)
    if qwen.tie_word_embeddings and "lm_head.weight" in found:
        if not same_bits(reader.tensor("lm_head.weight"), reader.tensor("model.embed_tokens.weight")):
            raise KitError(
                f"{reader.folder}: config.json ties the embeddings, but lm_head.weight differs from"
                " model.embed_tokens.weight: set tie_word_embeddings to false there if the model has both"
            )
        found.remove("lm_head.weight")
    check_names(found, expected, str(reader.folder))
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise wrong_shape(reader.folder, name, reader.shape(name), shape)
        reader.dtype(name)
    buffers = [name for name in reader.names if is_skipped(name)]
    if buffers:
        logger.info("%d buffers are not carried (%s, ...): config.json tells them", len(buffers), buffers[0])


def wrong_shape(where: Path, name: str, shape: Sequence[int], expected: Sequence[int]) -> KitError:
    """What to tell of a tensor that has not the shape that config.json asks for."""
    remedy = "its config.json belongs to another model"
    if name in VOCABULARIES and shape[1:] == expected[1:]:
        remedy = f"set vocab_size to {shape[0]} there if the embedding was resized; else it belongs to another model"
    return KitError(f"{where}: {name} has shape {list(shape)}, config.json asks for {list(expected)}: {remedy}")


def check_unquantized(folder: Path) -> None:
    """Raises KitError where the weights of a model are quantized (GPTQ, AWQ, FP8, ...), by what its folder says."""
    told = read_config(folder).get("quantization_config")
    source = "config.json has a quantization_config"
    for name in QUANTIZED_BY:
        if not told and (folder / name).is_file():
            told, source = {"quant_method": name}, f"it holds {name}"
    if told:
        method = told.get("quant_method", "unknown") if isinstance(told, dict) else told
        raise KitError(
            f"{folder} is a quantized model ({method}; {source}): it has no weights of"
            " bf16, fp16 or fp32: give the model that it was made from"
        )
