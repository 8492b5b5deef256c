"""A Hugging Face folder's weights: safetensors files, read through memory maps and written one tensor at a time.

A safetensors file is a u64 length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes
(https://github.com/huggingface/safetensors#format). Written here, because safetensors' own `save_file` needs all
tensors of a file in memory.
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
from common.checkpoint.io.checksums import check_file_name
from common.checkpoint.io.direct_io import prefetch
from common.checkpoint.io.file_writer import FileWriter
from common.checkpoint.io.lazy_tensor import LazyTensor, bitwise_equal
from common.checkpoint.io.mapped_file import MappedFile
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
    """The tensors of a folder by name, as views of mapped files.

    Raises KitError when a file is missing, truncated or not safetensors, or the index does not match its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.is_file() and (folder / SINGLE).is_file():
            raise KitError(f"{folder} holds both {INDEX} and {SINGLE}: remove the one that is not used")
        if index.is_file():
            listed = read_index(index)
        elif (folder / SINGLE).is_file():
            listed = None
        else:
            raise KitError(f"{folder} holds neither {INDEX} nor {SINGLE}: give a folder with safetensors")
        self._files: dict[str, Any] = {}
        self._spans: dict[str, tuple[MappedFile, int, int]] = {}  # file, offset, size
        self._file_of: dict[str, str] = {}
        for name in sorted(set(listed.values())) if listed else [SINGLE]:
            path = folder / name
            file, spans = _open(path)
            self._files[name] = file
            self._spans |= spans
            for tensor in file.keys():  # noqa: SIM118  a safe_open is not a mapping
                if listed is not None and listed.get(tensor) != name:
                    raise KitError(f"{path} holds {tensor}, which {INDEX} maps to another file: copy both again")
                self._file_of[tensor] = name
        if missing := sorted(set(listed or ()) - set(self._file_of)):
            raise KitError(f"{index} names {missing[0]}, which {listed[missing[0]]} lacks: copy the folder again")  # type: ignore[index]

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return sorted(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`; its data is read when it is accessed."""
        file, start, size = self._spans[name]
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
    """The weight_map of a safetensors index: tensor name to file name."""
    remedy = "copy it again from the model"
    listed = read_json(path, remedy).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise KitError(
            f"{path} is not a safetensors index: its weight_map must map tensor names to file names: {remedy}"
        )
    for file in set(listed.values()):
        check_file_name(path, file)
    return listed


def _open(path: Path) -> tuple[Any, dict[str, tuple[MappedFile, int, int]]]:
    """The file, opened (and validated) by safetensors, and each tensor's mapped file, byte offset and size."""
    if not path.is_file():
        raise KitError(f"{path} is missing: copy it again from the model")
    try:
        with path.open("rb") as stream:  # safetensors rejects paths that are not UTF-8
            file = safe_open(f"/proc/self/fd/{stream.fileno()}", framework="pt")
    except SafetensorError as error:
        raise KitError(f"{path} is not a complete safetensors file ({error}): copy it again from the model") from error
    mapped = MappedFile(path)
    (length,) = struct.unpack("<Q", mapped.map[:8])
    header = json.loads(mapped.map[8 : 8 + length])
    offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return file, {name: (mapped, 8 + length + start, end - start) for name, (start, end) in offsets.items()}


def parse_size(text: str) -> int:
    """The bytes of "5GB" (10^9 each) or "5GiB" (2^30 each), as in Hugging Face; raises KitError."""
    for unit, factor in UNITS.items():
        number = text.upper().removesuffix(unit).strip()
        if text.upper().endswith(unit) and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return int(float(number) * factor)
    raise KitError(f"MAX_SHARD_SIZE={text}: give a number and one of {', '.join(UNITS)}, such as 5GB")


def write_safetensors(
    folder: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int, on_bytes: Callable[[int], None]
) -> list[str]:
    """Writes `tensors` to `folder` in shards of up to `max_shard_bytes` (unless one tensor is larger); the file names.

    `on_bytes` is called with the size of each block once it is written.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, {tensor: tensors[tensor] for tensor in shard}, on_bytes)
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
    """The names of `count` safetensors shards."""
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]


def plan_shards(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[list[str]]:
    """The tensor names of each shard, in the given order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], on_bytes: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with FileWriter(path) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for block in prefetch(block for tensor in tensors.values() for block in tensor.blocks()):
            stream.write(block)
            on_bytes(block.nbytes)


def check_weights(reader: HfReader, expected: Mapping[str, tuple[int, ...]], qwen: QwenConfig) -> None:
    """Raises KitError unless `reader` holds the `expected` tensors, with their shapes and a supported dtype.

    With tied embeddings the folder may hold lm_head.weight too, if it is bitwise equal to the embedding.
    """
    found = set(reader.names)
    if qwen.tie_word_embeddings and "lm_head.weight" in found:
        if not bitwise_equal(reader.tensor("lm_head.weight"), reader.tensor("model.embed_tokens.weight")):
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
        logger.info("%d buffers are not converted (%s, ...): config.json defines them", len(buffers), buffers[0])


def wrong_shape(where: Path, name: str, shape: Sequence[int], expected: Sequence[int]) -> KitError:
    """The error for a tensor whose shape differs from config.json's."""
    remedy = "its config.json belongs to another model"
    if name in VOCABULARIES and shape[1:] == expected[1:]:
        remedy = f"set vocab_size to {shape[0]} there if the embedding was resized; otherwise use the right one"
    return KitError(f"{where}: {name} has shape {list(shape)}, config.json expects {list(expected)}: {remedy}")


def check_unquantized(folder: Path) -> None:
    """Raises KitError where config.json or another file says that the weights are quantized (GPTQ, AWQ, FP8, ...)."""
    config = read_config(folder).get("quantization_config")
    source = "config.json has a quantization_config"
    for name in QUANTIZED_BY:
        if not config and (folder / name).is_file():
            config, source = {"quant_method": name}, f"it holds {name}"
    if config:
        method = config.get("quant_method", "unknown") if isinstance(config, dict) else config
        raise KitError(
            f"{folder} is a quantized model ({method}; {source}): only bf16, fp16 and"
            " fp32 weights can be converted: give the model that it was quantized from"
        )
