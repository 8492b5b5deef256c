"""PEFT's folder of a LoRA adapter: adapter_config.json and adapter_model.safetensors, which `peft` loads.

Source: peft/tuners/lora/config.py and peft/utils/save_and_load.py (0.21).
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import KitError
from common.json_file import read_json
from common.model.shape.config import QwenConfig
from common.model.shape.lora import MODULES, LoraConfig, adapter_shapes, peft_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What changes the adapter's function, and the values without an effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "bias": ("none", None), "modules_to_save": (None, []), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layers_to_transform": (None, []), "fan_in_fan_out": (False, None),
    "layer_replication": (None, []), "lora_bias": (False, None), "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []), "use_qalora": (False, None), "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []), "arrow_config": (None,), "velora_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,),
}  # fmt: skip
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.\w+\.(\w+)\.(lora_[AB])\.weight")
Adapter = dict[tuple[int, str, str], Tensor]  # by layer, module and matrix


def read_peft_config(folder: Path) -> LoraConfig:
    """What defines the adapter in `folder`; raises KitError for one that is not plain LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        raise KitError(f"{folder} has no {CONFIG}: give a folder that PEFT's save_pretrained or step 2 wrote")
    found = read_json(path, "copy it again")
    if found.get("peft_type") != "LORA":
        raise KitError(f"{path}: peft_type {found.get('peft_type')!r}: only LORA is supported")
    for name, values in NEUTRAL.items():
        if name in found and found[name] not in values:
            raise KitError(f"{path}: {name} is {found[name]!r}, which is not supported: merge it with PEFT first")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise KitError(f"{path}: r is {rank!r} and lora_alpha {alpha!r}: they must be numbers above 0; copy it again")
    if found.get("use_rslora"):  # scaled by alpha / sqrt(r): arXiv 2312.03732
        alpha *= math.sqrt(rank)
    targets = tuple(module for module in MODULES if module in {each for _, each, _ in _read_names(folder)})
    return LoraConfig(rank, float(alpha), targets, float(found.get("lora_dropout") or 0.0))


def read_peft_adapter(folder: Path, lora: LoraConfig, qwen: QwenConfig) -> Adapter:
    """The adapter's matrices; raises KitError unless every layer has those of `lora`, in this model's shapes."""
    tensors, names = _load(folder), _read_names(folder)
    expected = {
        (layer, module, matrix): shape
        for layer in range(qwen.num_hidden_layers)
        for module in lora.targets
        for matrix, shape in adapter_shapes(module, lora.rank, qwen).items()
    }
    adapter = {key: tensors[name] for key, name in names.items()}
    for key, shape in expected.items():
        name = peft_name(key[1], key[2], key[0])
        if key not in adapter:
            raise KitError(f"{folder / WEIGHTS} lacks {name}: this kit adapts a module in every layer or in none")
        if tuple(adapter[key].shape) != shape:
            found = list(adapter[key].shape)
            raise KitError(f"{folder / WEIGHTS}: {name} is {found}, and this model needs {list(shape)}")
    if further := set(adapter) - set(expected):
        layer, module, matrix = min(further)
        raise KitError(f"{folder / WEIGHTS} holds {peft_name(module, matrix, layer)}, which this model does not have")
    return adapter


def _read_names(folder: Path) -> dict[tuple[int, str, str], str]:
    """The name of each matrix in the file; raises KitError for any other tensor."""
    found = {}
    for name in _load(folder):
        match = _NAME.fullmatch(name)
        if match is None or match[2] not in MODULES:
            raise KitError(f"{folder / WEIGHTS} holds {name}: only LoRA on {', '.join(MODULES)} is supported")
        found[int(match[1]), match[2], match[3]] = name
    if not found:
        raise KitError(f"{folder / WEIGHTS} holds no tensor: copy it again")
    return found


def _load(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise KitError(f"{folder} has no {WEIGHTS}: save the adapter as safetensors")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise KitError(f"{path}: {error}: copy it again") from error


def write_peft_folder(folder: Path, adapter: Adapter, lora: LoraConfig, base: str | None) -> None:
    """Writes the adapter to the existing `folder`; base: what the file names as its model, if known."""
    named = {peft_name(module, matrix, layer): value for (layer, module, matrix), value in adapter.items()}
    tensors = {name: value.contiguous() for name, value in named.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
