"""`inspect`: the format of a folder, its layout and size, and what wrote it. No tensor is read."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint.formats.adapter_checkpoint import adapter_of
from common.checkpoint.formats.checkpoint_paths import (
    OPTIMIZER_FILE,
    RELEASE,
    Checkpoint,
    find_checkpoint,
    list_iterations,
)
from common.checkpoint.formats.common_state import common_state
from common.checkpoint.formats.hf_folder import INDEX, SINGLE, HfReader
from common.checkpoint.formats.mapping import (
    OUTPUT,
    PARAM_MAPPINGS,
    canonical_name,
    implementation_of,
    is_skipped,
    num_layers,
)
from common.checkpoint.formats.megatron_folder import chunk_keys, generic_name, is_weight, rank_files
from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.checkpoint.untrusted.placeholders import is_int64
from common.errors import KitError
from common.json_file import shown
from common.model.shape.config import read_config

WRITTEN_BY = {"written_by": "this kit, step 2"}  # saved by step 2 in a checkpoint
CONFIG_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
ARGUMENTS = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "padded_vocab_size",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "transformer_impl", "consumed_train_samples", "hf_ckpt_path",
)  # fmt: skip


@dataclass
class Weights:
    """Sizes and dtypes of a checkpoint's weights."""

    num_tensors: int = 0
    num_parameters: int = 0
    num_bytes: int = 0

    def line(self, dtypes: Iterable[torch.dtype]) -> str:
        """One line with the totals and dtypes."""
        counted = sorted(Counter(dtypes).items(), key=str)
        kinds = ", ".join(f"{str(kind).removeprefix('torch.')} x {count}" for kind, count in counted)
        return f"{self.num_parameters:,} parameters in {self.num_tensors} tensors, {size(self.num_bytes)} ({kinds})"


def size(num_bytes: int) -> str:
    """15.24 GB (15,238,000,000 bytes)."""
    return f"{num_bytes / 1e9:.2f} GB ({num_bytes:,} bytes)"


def inspect_folder(folder: Path) -> dict[str, str]:
    """The properties of `folder` by name; raises KitError when its format is unknown."""
    if not folder.is_dir():
        raise KitError(f"{folder} is not a folder: give the folder of a model or checkpoint")
    checkpoint = find_checkpoint(folder)
    if checkpoint:
        details = _torch_dist(checkpoint) if checkpoint.format == "torch_dist" else _torch(checkpoint)
        return {**_general(checkpoint), **details, "on disk": size(_bytes_of(checkpoint.path))}
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return _hugging_face(folder)
    raise KitError(
        f"{folder} is neither a Hugging Face folder ({SINGLE} or {INDEX}) nor a Megatron checkpoint"
        " (latest_checkpointed_iteration.txt, release or iter_*): give the folder that holds one of them"
    )


def _hugging_face(folder: Path) -> dict[str, str]:
    config, reader = read_config(folder), HfReader(folder)
    dtypes = [reader.dtype(name) for name in reader.names]
    numels = [torch.Size(reader.shape(name)).numel() for name in reader.names]
    copies = config.get("tie_word_embeddings") is True and "lm_head.weight" in reader.names
    copied = torch.Size(reader.shape("lm_head.weight")).numel() if copies else 0
    num_bytes = sum(numel * dtype.itemsize for numel, dtype in zip(numels, dtypes, strict=True))
    fields = ", ".join(f"{name} {config.get(name)}" for name in CONFIG_FIELDS)
    return {
        "format": "Hugging Face, safetensors",
        "model": f"{config.get('model_type')}, {fields}, {_tied(config)}",
        "weights": Weights(len(numels), sum(numels) - copied, num_bytes).line(dtypes),
        "files": str(len(list(folder.glob("*.safetensors")))),
        "on disk": size(_bytes_of(folder)),
    }


def _tied(config: dict[str, Any]) -> str:
    return "embeddings tied" if config.get("tie_word_embeddings") else "embeddings not tied"


def _general(checkpoint: Checkpoint) -> dict[str, str]:
    others = [str(number) for number in list_iterations(checkpoint.folder)]
    has_config = (checkpoint.folder / "config.json").is_file()
    iteration = "release (weights only)" if checkpoint.iteration == RELEASE else str(checkpoint.iteration)
    return {
        "format": f"Megatron, {checkpoint.format}",
        "read": str(checkpoint.path),
        "iteration": iteration,
        **({"iterations": ", ".join(others)} if others else {}),
        "config.json": "beside it" if has_config else "missing: set HF_MODEL_PATH to convert it",
        "written by": _writer(common_state(checkpoint)),
        **_adapter(checkpoint),
    }


def _adapter(checkpoint: Checkpoint) -> dict[str, str]:
    """The adapters that the checkpoint holds instead of weights; empty without."""
    found = adapter_of(checkpoint)
    if found is None:
        return {}
    lora = found.lora
    return {"LoRA adapter": f"rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.targets)}; of {found.base}"}


def _writer(state: dict[str, Any]) -> str:
    """The software that wrote a checkpoint, from its common state."""
    arguments = vars(state["args"]) if hasattr(state.get("args"), "__dict__") else {}
    if state.get("run"):
        return "this kit, step 3"
    if state.get("written_by"):
        return _plain(state["written_by"])
    known = ", ".join(f"{name} {_plain(arguments[name])}" for name in ARGUMENTS if arguments.get(name) is not None)
    if "hf_ckpt_path" in arguments or "target_tensor_model_parallel_size" in arguments:
        return f"the converter of Pai-Megatron-Patch or of the kit before this one ({known})"
    return f"Megatron-LM or the like ({known})" if arguments else "unknown: it holds no arguments"


def _plain(value: Any) -> str:
    """A value of the checkpoint as short text; only its type where it could be long or nested."""
    if isinstance(value, (bool, float)) or is_int64(value):
        return str(value)
    return shown(value)[1:-1] if isinstance(value, str) else type(value).__name__


def _torch_dist(checkpoint: Checkpoint) -> dict[str, str]:
    stored = TorchDistReader(checkpoint.path).tensors
    copied, weights, dtypes = _tied_copy(checkpoint), Weights(), []
    for key, tensor in stored.items():
        if is_weight(key):
            numel = torch.Size(tensor.shape).numel()
            weights.num_tensors += 1
            weights.num_parameters += 0 if key in copied else numel
            weights.num_bytes += numel * tensor.dtype.itemsize
            dtypes.append(tensor.dtype)
    numbered = any(num_layers([key]) for key in stored)
    # In Megatron-Core 0.11 the moments are objects, not tensors.
    with_optimizer = any("optimizer" in key for key in stored) or "optimizer" in common_state(checkpoint)
    return {
        "layout": f"whole tensors, layers {'numbered' if numbered else 'stacked'}; loads at any TP, PP and VPP",
        "weights": weights.line(dtypes),
        "optimizer": "yes" if with_optimizer else "no",
    }


def _torch(checkpoint: Checkpoint) -> dict[str, str]:
    files = rank_files(checkpoint.path)
    tp, pp = 1 + max(tp for _, tp in files), 1 + max(pp for pp, _ in files)
    keys = chunk_keys(files[0, 0], checkpoint.path)
    layers = [num_layers(files[pp_rank, 0].get(key, {})) for key in keys for pp_rank in range(pp)]
    named = [(rank, name, value) for rank, state in files.items() for name, value in _tensors(state, keys)]
    copied, weights = _tied_copy(checkpoint), Weights()
    for (_, tp_rank), name, tensor in named:
        weights.num_tensors += 1
        weights.num_bytes += tensor.nbytes
        is_copy = name in copied or tp_rank > 0 and _is_replicated(name)
        weights.num_parameters += 0 if is_copy else tensor.numel()
    state = files[0, 0]
    with_optimizer = "optimizer" in state or any(checkpoint.path.glob(f"mp_rank_*/{OPTIMIZER_FILE}"))
    return {
        "layout": f"TP={tp} PP={pp} VPP={len(keys)}, layers per chunk {','.join(map(str, layers))}",
        "names": implementation_of(name for _, name, _ in named),
        "weights": weights.line(tensor.dtype for _, _, tensor in named),
        "optimizer": "yes" if with_optimizer else "no",
    }


def _tied_copy(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The output layer, if config.json or Megatron's arguments tie it to the embedding."""
    if (checkpoint.folder / "config.json").is_file():
        tied = read_config(checkpoint.folder).get("tie_word_embeddings") is True
    else:
        arguments = common_state(checkpoint).get("args")
        tied = getattr(arguments, "untie_embeddings_and_output_weights", None) is False
    return (OUTPUT.te,) if tied else ()


def _tensors(state: dict[str, Any], keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    for key in keys:
        for name, value in state.get(key, {}).items():
            if isinstance(value, Tensor) and not is_skipped(name):
                yield name, value


def _is_replicated(name: str) -> bool:
    """Whether the tensor is replicated over TP ranks."""
    generic = generic_name(canonical_name(name))[0]
    return any(mapping.te == generic and mapping.axis is None for mapping in PARAM_MAPPINGS)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
