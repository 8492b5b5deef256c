"""The weights of a model with a LoRA adapter merged into them: W + (alpha / r) B A, in float64, rounded once."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from common.checkpoint.formats.peft_folder import Adapter
from common.checkpoint.io.lazy_tensor import Columns, LazyTensor, row_blocks
from common.checkpoint.io.mapped_file import load
from common.model.shape.config import QwenConfig
from common.model.shape.lora import MATRICES, LoraConfig, hf_module


def merged_state_dict(
    base: dict[str, LazyTensor], adapter: Adapter, lora: LoraConfig, qwen: QwenConfig
) -> dict[str, LazyTensor]:
    """`base`, a Hugging Face state dict, with each adapted module's weight merged as it is written."""
    merged = dict(base)
    for layer in range(qwen.num_hidden_layers):
        for module in lora.targets:
            name = f"{hf_module(module, layer)}.weight"
            a, b = (adapter[layer, module, matrix].double() for matrix in MATRICES)
            parts = partial(_merged, base[name], a, b * lora.scale)
            merged[name] = LazyTensor(base[name].shape, base[name].dtype, parts, name)
    return merged


def _merged(weight: LazyTensor, a: Tensor, b: Tensor) -> Iterator[Columns]:
    """Rows of W + B A, float64, some megabytes at a time."""
    at = 0
    for columns in weight.parts():
        for block in row_blocks(columns):
            rows = torch.cat([load(part) for part in block], dim=-1).double()
            yield [rows.addmm_(b[at : at + len(rows)], a)]
            at += len(rows)
