"""Runtime patches of Megatron-Core, numpy and torch, with the reason for each.

PATCHES lists every patch of Megatron-Core; tests/unit/engine/test_patches.py checks it against the installed version.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from common.engine.optimizer import adam_param
from common.engine.versions import installed_engine

NEWEST = (0, 19)  # the newest version that the patches were written for


@dataclass(frozen=True)
class Patch:
    """One patched name of Megatron-Core.

    parameters: the leading parameters that the replacement relies on; None for a flag, or for a function that is only
    imported if Transformer Engine is installed.
    """

    module: str
    name: str  # an attribute of the module, or of a class in it
    parameters: tuple[str, ...] | None
    why: str
    first: tuple[int, int] = (0, 11)  # the versions that are patched
    until: tuple[int, int] = NEWEST


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
_ATTENTION = "megatron.core.transformer.attention"
_LAYERS = "megatron.core.tensor_parallel.layers"
_OFFLOAD = "OPTIMIZER_STATE=cpu keeps master weights and moments in host memory"
PATCHES = (
    Patch(_LAYERS, "_grad_accum_fusion_available", None, "the output layer cannot be built without apex"),
    Patch(
        _LAYERS, "prepare_input_tensors_for_wgrad_compute", ("grad_output", "all_gathered_input"),
        "it fails on inputs that are not contiguous", until=(0, 11),
    ),
    Patch(
        "megatron.core.models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_bshd",
        ("t", "freqs", "rotary_interleaved"), "local layers have no fused rotary embedding",
    ),
    Patch("megatron.core.transformer.mlp", "bias_swiglu_impl", ("input", "bias"), "our kernel reads each value once"),
    Patch(_ATTENTION, "apply_fused_qkv_rotary_pos_emb", None, "the fused kernel is Transformer Engine's", (0, 16)),
    Patch(_ATTENTION, "HAVE_FUSED_QKV_ROPE", None, "it is False without Transformer Engine", (0, 16)),
    Patch(
        _OPTIMIZER, "DistributedOptimizer._set_main_param_and_optimizer_states", ("self", "model_param", "tensors"),
        f"torch's Adam has a step beside the moments; {_OFFLOAD}",
    ),
    Patch(
        _OPTIMIZER, "DistributedOptimizer.load_state_dict", ("self", "state_dict"),
        "all parameters share one step of torch's Adam",
    ),
    # Replaced in an instance, by common/training/state/optimizer_offload.py.
    Patch(_OPTIMIZER, "DistributedOptimizer._get_main_param_and_optimizer_states", ("self", "model_param"), _OFFLOAD),
    Patch(_OPTIMIZER, "DistributedOptimizer._copy_main_params_to_model_params", ("self",), _OFFLOAD),
    Patch(_OPTIMIZER, "DistributedOptimizer._copy_model_params_to_main_params", ("self",), _OFFLOAD),
)  # fmt: skip


def add_numpy_dtypes() -> None:
    """Adds the module numpy.dtypes to numpy before 1.25; megatron-core imports one class of it from 0.14 on.

    NGC's PyTorch 24.03 and maca 2.27 have numpy 1.24, where the class is accessible through an instance.
    """
    import numpy

    if "numpy.dtypes" not in sys.modules and importlib.util.find_spec("numpy.dtypes") is None:
        module: Any = ModuleType("numpy.dtypes")
        module.UInt32DType = type(numpy.dtype("uint32"))
        sys.modules["numpy.dtypes"] = module


def add_metadata_alias() -> None:
    """Lets torch before 2.3 read the `.metadata` that later versions wrote, in which a class is renamed."""
    from torch.distributed.checkpoint import metadata as classes

    if not hasattr(classes, "_MEM_FORMAT_ENCODING"):
        from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING

        setattr(classes, "_MEM_FORMAT_ENCODING", MEM_FORMAT_ENCODING)  # noqa: B010  the module declares no such name


@contextmanager
def weight_gradient_fusion(model: list[Any]) -> Iterator[None]:
    """Allows gradient_accumulation_fusion without apex; `model` is the list that is filled inside (every version).

    Transformer Engine's layers accumulate weight gradients in the float32 buffer themselves. Only Megatron-Core's
    output layer needs apex's kernel, and cannot be built without it: its fusion is disabled afterwards.
    """
    from megatron.core.tensor_parallel import layers

    available = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = available
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, layers.ColumnParallelLinear):
                module.gradient_accumulation_fusion = available


def fuse_rotary_embedding() -> None:
    """Compiles Megatron-Core's rotary embedding into one kernel each for forward and backward (every version).

    The fused ones are Transformer Engine's and apex's; without them local layers run a dozen kernels per tensor.
    """
    import torch
    from megatron.core.models.common.embeddings import rope_utils

    apply = rope_utils._apply_rotary_pos_emb_bshd
    if not hasattr(apply, "_torchdynamo_orig_callable"):
        rope_utils._apply_rotary_pos_emb_bshd = torch.compile(apply)


def use_kernels(swiglu: Any, split_and_rotate: Any) -> None:
    """Replaces Megatron-Core's SwiGLU (every version) and its fused QKV split and rotation (from 0.16 on).

    The latter is called with fused_single_qkv_rope, which otherwise requires Transformer Engine.
    """
    from megatron.core.transformer import attention, mlp

    mlp.bias_swiglu_impl = swiglu
    if installed_engine().fused_single_qkv_rope:
        attention.apply_fused_qkv_rotary_pos_emb = split_and_rotate
        attention.HAVE_FUSED_QKV_ROPE = True


def single_qkv_rope(enabled: bool) -> dict[str, Any]:
    """TransformerConfig's field fused_single_qkv_rope; none before 0.16."""
    return {"fused_single_qkv_rope": enabled} if installed_engine().fused_single_qkv_rope else {}


def patch_training() -> None:
    """Applies the patches that training and checkpoints need with the installed version; idempotent."""
    patch_torch_adam_step()
    if not installed_engine().strided_weight_gradients:
        patch_strided_weight_gradient()


def patch_strided_weight_gradient() -> None:
    """Fixes the weight gradient of a linear layer whose input is not contiguous, such as attention's output (0.11)."""
    from megatron.core.tensor_parallel import layers

    prepare_tensors = layers.prepare_input_tensors_for_wgrad_compute
    if getattr(prepare_tensors, "patched", False):
        return

    def make_contiguous(grad_output: Any, all_gathered_input: Any) -> Any:
        return prepare_tensors(grad_output, all_gathered_input.contiguous())

    make_contiguous.patched = True  # type: ignore[attr-defined]
    layers.prepare_input_tensors_for_wgrad_compute = make_contiguous


def patch_torch_adam_step() -> None:
    """Fixes the loading of a distributed optimizer whose inner optimizer is torch's Adam (every version).

    torch's Adam has a `step` tensor per parameter beside the moments; apex's and Transformer Engine's do not. (1) The
    loader copies every entry of the state and fails with KeyError 'step': the entry is passed through, since
    Megatron-Core has restored it from the parameter groups. (2) It assigns one step tensor to all parameters, which is
    then incremented once per parameter instead of once per step: each parameter gets its own copy.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict
    if getattr(load, "patched", False):
        return

    def set_states_and_keep_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        state = self.optimizer.state.get(adam_param(self, model_param), {})
        own = {"step": state["step"]} if "step" in state else {}
        set_states(self, model_param, {**own, **tensors})

    def load_and_copy_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    load_and_copy_steps.patched = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_and_keep_step
    DistributedOptimizer.load_state_dict = load_and_copy_steps
