"""LoRA's adapters (arXiv 2106.09685) on Megatron-Core's linear layers, one for each of Hugging Face's modules.

Letters: s sequence, b micro-batch, r rank, o output and i input features of a linear layer on this TP rank, m modules
of a fused layer.

Only the rank's [s, b, r] is communicated over TP ranks, as the base layer communicates its hidden states:

    column parallel   A whole, B split over o    s gathered (or gradients all-reduced) after A
    row parallel      A split over i, B whole    summed over ranks after A (and s scattered)

With sequence parallelism the whole matrix sees a part of s on each rank, so its gradient is all-reduced, as a norm's.
"""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from common.model.layers.frozen import pass_gradients
from common.model.layers.tp_mappings import enter, leave
from common.model.layers.weights import await_weights
from common.model.shape.config import QwenConfig
from common.model.shape.lora import LINEARS, MATRICES, LoraConfig, adapter_shapes, is_adapter, tp_axis


class Adapter(torch.nn.Module):
    """A [r, i] and B [o, r] of one module."""

    def __init__(self, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.lora_A, self.lora_B = torch.nn.Parameter(lora_a), torch.nn.Parameter(lora_b)


class Adapters(torch.nn.Module):
    """The adapters of one linear layer, by module; each module's rows of the fused output, per query group.

    config: Megatron-Core's TransformerConfig.
    """

    def __init__(self, config: Any, lora: LoraConfig, adapters: Mapping[str, Adapter], rows: dict[str, int]) -> None:
        super().__init__()
        self.config, self.lora, self.rows = config, lora, rows
        self.is_row_parallel = all(tp_axis(module, "lora_A") == 1 for module in adapters)
        for module, adapter in adapters.items():
            self.add_module(module, adapter)
            self._mark(module, adapter)

    def _mark(self, module: str, adapter: Adapter) -> None:
        """Sets the attributes by which Megatron-Core reduces gradients and counts them in the norm."""
        for matrix in MATRICES:
            param, axis = getattr(adapter, matrix), tp_axis(module, matrix)
            if axis is not None:
                set_tensor_model_parallel_attributes(param, is_parallel=True, dim=axis, stride=1)
            else:
                setattr(param, "sequence_parallel", self.config.sequence_parallel)  # noqa: B010  no field of a Parameter

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """out [s, b, o] of the base layer for its input x -> out + (alpha / r) B A x."""
        adapters: list[Any] = [getattr(self, module) for module in self.rows if hasattr(self, module)]
        for adapter in adapters:
            await_weights(adapter)  # which is never called itself
        down = torch.cat([adapter.lora_A for adapter in adapters]) if len(adapters) > 1 else adapters[0].lora_A
        hidden = F.linear(self._dropped(x), down) * self.lora.scale
        hidden = leave(hidden, self.config) if self.is_row_parallel else enter(hidden, self.config)
        up = adapters[0].lora_B if self.is_row_parallel else self._fused_up()
        return torch.addmm(out.flatten(0, 1), hidden.flatten(0, 1), up.t()).view(out.shape)

    def _fused_up(self) -> Tensor:
        """[o, m r] in the order of the fused layer's rows: each module's B on the columns of its own A."""
        present = [module for module in self.rows if hasattr(self, module)]
        rank, width = self.lora.rank, len(present) * self.lora.rank
        example: Tensor = getattr(self, present[0]).lora_B
        groups = example.shape[0] // self.rows[present[0]]
        pieces = []
        for module, rows in self.rows.items():
            if module in present:
                at = present.index(module) * rank
                whole = F.pad(getattr(self, module).lora_B, (at, width - at - rank))
                pieces.append(whole.view(groups, rows, width))
            else:
                pieces.append(example.new_zeros(groups, rows, width))
        return torch.cat(pieces, dim=1).flatten(0, 1) if len(pieces) > 1 else pieces[0].flatten(0, 1)

    def _dropped(self, x: Tensor) -> Tensor:
        """x with LoRA's dropout; ranks that hold different parts of x draw different masks."""
        if not (self.training and self.lora.dropout):
            return x
        differs = self.is_row_parallel or self.config.sequence_parallel
        fork: AbstractContextManager[Any] = get_cuda_rng_tracker().fork() if x.is_cuda and differs else nullcontext()
        with fork:
            return F.dropout(x, self.lora.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Megatron-Core's ShardedTensors of the matrices."""
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {name: tp_axis(*name.split(".")) for name in state}
        split = {name: axis for name, axis in axes.items() if axis is not None}
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, split, sharded_offsets)
        return found


@lru_cache
def adapted(base: Any) -> type[torch.nn.Module]:
    """The linear layer `base` of Megatron-Core with adapters, which `add_adapters` sets."""

    class AdaptedLinear(base):
        adapters: Adapters

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            """The output [s, b, o], and the bias if it is to be added later."""
            out, bias = super().forward(x, *args, **kwargs)
            return self.adapters(x, out), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
        ) -> dict[str, Any]:
            """The base layer's, and that of the adapters."""
            found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            found = {name: value for name, value in found.items() if not is_adapter(name)}
            own: dict[str, Any] = self.adapters.sharded_state_dict(f"{prefix}adapters.", sharded_offsets, metadata)
            return found | own

    return AdaptedLinear


def add_adapters(model: Any, lora: LoraConfig, qwen: QwenConfig, seed: int) -> None:
    """Adds adapters to the `adapted` linear layers of `model`, a chunk, and freezes everything else."""
    model.requires_grad_(False)
    for layer in model.decoder.layers:
        for linear, modules in LINEARS.items():
            adapters = {
                module: _new_adapter(module, layer.layer_number - 1, lora, qwen, seed, model.config.params_dtype)
                for module in modules
                if module in lora.targets
            }
            if adapters:
                found = Adapters(model.config, lora, adapters, _rows_of_group(linear, qwen, model.config))
                layer.get_submodule(linear).adapters = found
    pass_gradients(model)


def _rows_of_group(linear: str, qwen: QwenConfig, config: Any) -> dict[str, int]:
    """The rows of each module in a group of the fused output: of a query group, else of this rank's whole layer."""
    if linear == "self_attention.linear_qkv":
        d = qwen.head_dim
        return {"q_proj": qwen.num_attention_heads // qwen.num_key_value_heads * d, "k_proj": d, "v_proj": d}
    rows = qwen.intermediate_size // config.tensor_model_parallel_size if linear == "mlp.linear_fc1" else 0
    return dict.fromkeys(LINEARS[linear], rows or qwen.hidden_size)


def _new_adapter(module: str, layer: int, lora: LoraConfig, qwen: QwenConfig, seed: int, dtype: torch.dtype) -> Adapter:
    """An adapter whose A is uniform within 1 / sqrt(i), as PEFT's kaiming_uniform_(a=sqrt(5)), and whose B is zero.

    The same at any layout: each matrix is drawn whole from a seed of its own, and then split.
    """
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    digest = hashlib.sha256(f"{seed} {layer} {module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    shapes = adapter_shapes(module, lora.rank, qwen)
    bound = shapes["lora_A"][1] ** -0.5
    whole = {
        "lora_A": torch.empty(shapes["lora_A"]).uniform_(-bound, bound, generator=generator),
        "lora_B": torch.zeros(shapes["lora_B"]),
    }
    parts = []
    for matrix in MATRICES:
        axis = tp_axis(module, matrix)
        part = whole[matrix] if axis is None else whole[matrix].chunk(size, axis)[rank]
        parts.append(part.to(dtype).contiguous())
    return Adapter(*parts)
