"""Verifies exported adapters and merged weights: adapters are read a second time, by the readers of verification."""

import re
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.io.lazy_tensor import bitwise_equal
from common.checkpoint.verification.independent_readers import HfTensors
from common.checkpoint.verification.shards import checkpoint_shards
from common.errors import KitError
from common.model.shape.config import QwenConfig

NAME = re.compile(r"decoder\.layers\.(\d+)\.(self_attention|mlp)\.linear_\w+\.adapters\.(\w+)\.lora_([AB])")
SPLIT_OVER_INPUT = ("o_proj", "down_proj")  # whose A is split over TP ranks by columns; the others' B by rows
SLACK = 1e-12  # of the terms of a sum in float64


def adapter_matrices(checkpoint: Checkpoint, qwen: QwenConfig) -> dict[tuple[str, str], Tensor]:
    """The matrices of a checkpoint by (Hugging Face's module, "A" or "B"), whole."""
    shards: dict[tuple[str, str], dict[int, Tensor]] = {}
    for shard in checkpoint_shards(checkpoint, qwen):
        found = NAME.fullmatch(shard.name)
        if found is None:
            raise KitError(f"{checkpoint.path} holds {shard.name} beside its adapters: copy it again")
        part = "mlp" if found[2] == "mlp" else "self_attn"
        key = f"model.layers.{found[1]}.{part}.{found[3]}", found[4]
        shards.setdefault(key, {})[shard.tp_rank] = shard.tensor.rows(0, shard.tensor.shape[0])
    matrices = {}
    for (module, kind), parts in shards.items():
        whole = [parts[rank] for rank in sorted(parts)]
        by_columns = module.endswith(SPLIT_OVER_INPUT)
        is_split = kind == ("A" if by_columns else "B")
        matrices[module, kind] = torch.cat(whole, dim=int(by_columns)) if is_split else whole[0]
    return matrices


def check_peft_folder(folder: Path, checkpoint: Checkpoint, qwen: QwenConfig) -> None:
    """Raises KitError unless adapter_model.safetensors in `folder` holds the bits of the checkpoint's adapters."""
    written, expected = HfTensors(folder, "adapter_model.safetensors"), adapter_matrices(checkpoint, qwen)
    names = {f"base_model.model.{module}.lora_{kind}.weight": value for (module, kind), value in expected.items()}
    differing = set(written.names) ^ set(names)
    for name in set(names) - differing:
        tensor = written.get(name)
        if tensor is None or not bitwise_equal(tensor.rows(0, tensor.shape[0]), names[name]):
            differing.add(name)
    if differing:
        raise KitError(f"{folder}: {min(differing)} differs from {checkpoint.path}: a fault of the disk or of this kit")


class Deltas:
    """What adapters add to the weights of a model: scale x B A."""

    def __init__(self, matrices: dict[tuple[str, str], Tensor], scale: float) -> None:
        self._matrices, self._scale = matrices, scale

    def agree(self, name: str, row: int, columns: range | None, before: Tensor, after: Tensor) -> bool | None:
        """Whether `after`, rows of the merged weight `name` from `row` on, is `before` plus what the adapters add.

        It must be the sum rounded to its dtype; where the sum lies within SLACK of a tie, to either side. None if
        nothing is added to this weight.
        """
        module = name.removesuffix(".weight")
        if (module, "A") not in self._matrices:
            return None
        a, b = (self._matrices[module, kind].to(torch.float64) for kind in "AB")
        a = a if columns is None else a[:, columns.start : columns.stop]
        added = torch.einsum("or,ri->oi", b[row : row + len(before)], a) * self._scale
        total, slack = before.double() + added, SLACK * (before.double().abs() + added.abs())
        low, high = (total - slack).to(after.dtype), (total + slack).to(after.dtype)
        return bool(((low <= after) & (after <= high)).all())
