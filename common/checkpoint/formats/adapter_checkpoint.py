"""A checkpoint of adapters alone, of either format and any layout; the run's metadata says what they belong to."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.formats.common_state import run_metadata
from common.checkpoint.formats.identity import weights_hash
from common.checkpoint.formats.megatron_folder import chunk_keys, generic_name, rank_files
from common.checkpoint.formats.peft_folder import Adapter
from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.errors import KitError
from common.model.shape.config import QwenConfig
from common.model.shape.lora import (
    ADAPTERS,
    MATRICES,
    MODULES,
    LoraConfig,
    adapter_shapes,
    is_adapter,
    megatron_name,
    tp_axis,
)


@dataclass(frozen=True)
class AdapterOf:
    """What a checkpoint's adapters are, and the checkpoint whose weights they add to."""

    lora: LoraConfig
    base: str  # the path that the run read
    base_hash: str

    def metadata(self) -> dict[str, Any]:
        """Plain values for a checkpoint's `run`."""
        lora = {**asdict(self.lora), "targets": list(self.lora.targets)}
        return {"lora": lora, "base": self.base, "base_hash": self.base_hash}


def adapter_of(checkpoint: Checkpoint) -> AdapterOf | None:
    """What `checkpoint` adapts; None if it holds whole weights."""
    found = run_metadata(checkpoint).get("adapter")
    if not found:
        return None
    try:
        lora = found["lora"]
        config = LoraConfig(int(lora["rank"]), float(lora["alpha"]), tuple(lora["targets"]), float(lora["dropout"]))
        if config.rank < 1 or not config.targets or not set(config.targets) <= set(MODULES):
            raise ValueError(lora)
        return AdapterOf(config, str(found["base"]), str(found["base_hash"]))
    except (KeyError, TypeError, ValueError) as error:
        raise KitError(f"{checkpoint.path}: what it records of its adapters is damaged: copy it again") from error


def check_whole(checkpoint: Checkpoint, remedy: str) -> None:
    """Raises KitError, with `remedy`, if `checkpoint` holds adapters alone."""
    if found := adapter_of(checkpoint):
        raise KitError(f"{checkpoint.path} holds a LoRA adapter of {found.base}, not whole weights: {remedy}")


def check_base(found: AdapterOf, base: Checkpoint, checkpoint: Checkpoint, setting: str) -> None:
    """Raises KitError, which names `setting`, unless `base` holds what the adapters of `checkpoint` were trained on."""
    if weights_hash(base.path) != found.base_hash:
        raise KitError(
            f"{base.path} does not hold the weights that {checkpoint.path} was trained on (then at {found.base}): set"
            f" {setting} to that checkpoint"
        )


def read_adapter(checkpoint: Checkpoint, lora: LoraConfig, qwen: QwenConfig) -> Adapter:
    """The matrices of `checkpoint` in memory, whole; raises KitError where one is missing or has another shape."""
    is_torch = checkpoint.format == "torch"
    adapter = _read_torch(checkpoint.path) if is_torch else _read_torch_dist(checkpoint.path, lora, qwen)
    for layer in range(qwen.num_hidden_layers):
        for module in lora.targets:
            for matrix, shape in adapter_shapes(module, lora.rank, qwen).items():
                found = adapter.get((layer, module, matrix))
                if found is None or tuple(found.shape) != shape:
                    name, held = megatron_name(module, matrix, layer), "missing" if found is None else list(found.shape)
                    raise KitError(f"{checkpoint.path}: {name} is {held}, and must be {list(shape)}: copy it again")
    return adapter


def _read_torch_dist(path: Path, lora: LoraConfig, qwen: QwenConfig) -> Adapter:
    reader, adapter = TorchDistReader(path), {}
    for module in lora.targets:
        for matrix in MATRICES:
            key = megatron_name(module, matrix)
            if key not in reader.tensors:
                raise KitError(f"{path} lacks {key}: copy it again")
            reader.check_coverage(key)
            for layer in range(qwen.num_hidden_layers):
                adapter[layer, module, matrix] = reader.read(key, layer)
    return adapter


def _read_torch(path: Path) -> Adapter:
    """The shards of all ranks, joined; layers are numbered over the chunks in model order, as in TorchWeights."""
    files = rank_files(path)
    tp, pp = 1 + max(t for _, t in files), 1 + max(p for p, _ in files)
    adapter, first_layer = {}, 0
    for chunk in chunk_keys(files[0, 0], path):
        for pp_rank in range(pp):
            names = [name for name in files[pp_rank, 0][chunk] if is_adapter(name)]
            layers = set()
            for name in names:
                generic, layer = generic_name(name)
                assert layer is not None
                module, matrix = generic.split(f".{ADAPTERS}.")[1].split(".")
                shards = [files[pp_rank, rank][chunk][name] for rank in range(tp)]
                axis = tp_axis(module, matrix)
                adapter[first_layer + layer, module, matrix] = shards[0] if axis is None else torch.cat(shards, axis)
                layers.add(layer)
            first_layer += len(layers)
    return adapter
