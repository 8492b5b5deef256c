"""The one place that knows Megatron-Core's versions: what is supported, and what each of them needs mended."""

import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import KitError

# The versions that work, by major and minor: the release that the lanes run, and the machines that it is for.
SUPPORTED = {
    (0, 11): "0.11.0 beside torch 2.1 (MetaX's maca 2.27)",
    (0, 14): "0.14.0 beside torch 2.2 to 2.5 (NVIDIA's NGC 24.03)",
    (0, 16): "0.16.1 beside torch 2.6 or later (a CPU, NGC 24.12 and later)",
}


def version() -> tuple[int, int]:
    """Major and minor of the installed megatron-core; raises KitError when it is missing or not supported."""
    *others, newest = SUPPORTED.values()
    works = f"this kit works with {', '.join(others)} and {newest}"
    remedy = "pip install --no-deps megatron-core==VERSION, the one of these for this machine"
    try:
        text = metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise KitError(f"megatron-core is not installed, and {works}: {remedy}") from error
    numbers = re.match(r"(\d+)\.(\d+)", text)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if found not in SUPPORTED:
        raise KitError(f"megatron-core {text} is installed, and {works}: {remedy}")
    return found


def check_installed() -> None:
    """Raises KitError unless the installed megatron-core is supported and finds beside it what it needs."""
    major, minor = version()
    numpy = metadata.version("numpy")
    if (major, minor) < (0, 16) and int(numpy.split(".")[0]) >= 2:
        raise KitError(
            f"numpy {numpy} is installed, and megatron-core {major}.{minor} needs numpy before 2: pip install"
            " 'numpy<2', or the megatron-core that requirements/ names for this machine"
        )


def check_origin() -> Path:
    """The file that `import megatron.core` loads; raises KitError unless it is the installed package's.

    A Megatron-LM checkout on PYTHONPATH, as some images have it, would stand in its place. Nothing is imported.
    """
    version()
    package = metadata.distribution("megatron-core")
    installed = Path(str(package.locate_file("megatron/core/__init__.py"))).resolve()
    parent = PathFinder.find_spec("megatron")
    spec = parent and PathFinder.find_spec("megatron.core", parent.submodule_search_locations)
    found = Path(spec.origin).resolve() if spec and spec.origin else None
    if found != installed:
        raise KitError(
            f"`import megatron.core` loads {found or 'nothing'}, not the installed megatron-core {package.version}"
            f" ({installed}): take the folder of that checkout out of PYTHONPATH"
        )
    return installed


def prepare(platform: Any) -> None:
    """Readies this process for `import megatron.core`: versions checked, what is old mended, `platform` prepared."""
    check_installed()
    mend_numpy_without_dtypes()
    mend_metadata_of_newer_torch()
    platform.prepare()


def mend_numpy_without_dtypes() -> None:
    """Gives numpy before 1.25 the module numpy.dtypes, of which megatron-core imports one name from 0.14 on.

    NGC's PyTorch 24.03 and maca 2.27 bring numpy 1.24, where the class is reached through an instance.
    """
    import numpy

    if "numpy.dtypes" not in sys.modules and importlib.util.find_spec("numpy.dtypes") is None:
        module: Any = ModuleType("numpy.dtypes")
        module.UInt32DType = type(numpy.dtype("uint32"))
        sys.modules["numpy.dtypes"] = module


def mend_metadata_of_newer_torch() -> None:
    """Lets torch before 2.3 read the `.metadata` of torch_dist that later ones wrote: a class in it has a new name."""
    from torch.distributed.checkpoint import metadata as classes

    if not hasattr(classes, "_MEM_FORMAT_ENCODING"):
        from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING

        setattr(classes, "_MEM_FORMAT_ENCODING", MEM_FORMAT_ENCODING)  # noqa: B010  the module declares no such name


# The layout in which the distributed optimizer is saved to torch_dist: Megatron-Core's from 0.16 on. It is written and
# read by `common.training.checkpointing.shards`, so by every version here.
OPTIMIZER_SHARDING = "fully_reshardable"
# Those of this kit's older checkpoints, with the versions that load each. The first loads at the same TP and PP alone.
OLD_OPTIMIZER_SHARDINGS = {
    "dp_zero_gather_scatter": ((0, 11), (0, 14), (0, 16)),
    "fully_sharded_model_space": ((0, 14),),  # 0.11 has it, but not with torch's Adam; 0.16 refuses its tensors
}


def check_optimizer_sharding(kind: str, path: Path, *, same_ranks: bool) -> None:
    """Raises KitError unless the installed version loads the optimizer of `path`, saved in layout `kind`.

    same_ranks: whether it is loaded at the TP, PP and VPP that it was saved at.
    """
    if kind == OPTIMIZER_SHARDING:
        return
    versions = OLD_OPTIMIZER_SHARDINGS.get(kind, ())
    way_out = "go on from the weights alone: set LOAD_CHECKPOINT_PATH to it and SAVE_CHECKPOINT_PATH to a new folder"
    major, minor = version()
    if (major, minor) not in versions:
        those = " or ".join(f"megatron-core {first}.{second}" for first, second in versions) or "no supported version"
        raise KitError(
            f"{path} holds the optimizer as {kind}, which {those} loads; {major}.{minor} is installed:"
            f" use one that does, or {way_out}"
        )
    if kind == "dp_zero_gather_scatter" and not same_ranks:
        raise KitError(
            f"{path} holds the optimizer as {kind}, as megatron-core 0.11 saves it: it loads at its own TP, PP and"
            f" VPP alone; use those, or {way_out}"
        )


def sharded_optimizer_state(optimizer: Any, model_state: dict[str, Any], kind: str) -> dict[str, Any]:
    """What a distributed optimizer saved in the old layout `kind` is loaded into; 0.11 has a word of its own for it."""
    how = {"metadata": content_metadata(kind)} if version() >= (0, 14) else {"sharding_type": kind}
    found: dict[str, Any] = optimizer.sharded_state_dict(model_state, is_loading=True, **how)
    return found


def content_metadata(kind: str) -> dict[str, Any]:
    """What decides the layout inside torch_dist."""
    return {"distrib_optim_sharding_type": kind, "non_homogeneous_layers": False}


def save_options() -> dict[str, Any]:
    """What Megatron-Core's loader asks of a checkpoint's layout; from 0.14 on."""
    return {"content_metadata": content_metadata(OPTIMIZER_SHARDING)}


def first_and_last_differ(chunk_layers: Sequence[int], vpp: int) -> bool:
    """Whether these layers a chunk differ in the first and last stage alone, as every version can build them."""
    return vpp == 1 and len(set(chunk_layers[1:-1])) <= 1


def check_pipeline_layers(chunk_layers: Sequence[int], vpp: int) -> None:
    """Raises KitError unless the installed version trains with these layers a chunk: in 0.11 not any will do."""
    even = len(set(chunk_layers)) == 1
    if even or first_and_last_differ(chunk_layers, vpp) or version() >= (0, 14):
        return
    major, minor = version()
    raise KitError(
        f"PIPELINE_LAYERS={','.join(map(str, chunk_layers))} with VPP={vpp} needs megatron-core 0.14 or later, and"
        f" {major}.{minor} is installed: let only the first and the last stage differ, at VPP=1, or install a later one"
    )


FP8_RECIPES_SINCE = (0, 14)  # TransformerConfig.fp8_recipe; before, FP8 is scaled with delay
BF16_MOMENTS_SINCE = (0, 14)  # OptimizerConfig.store_param_remainders


def chunk_place(index: int, vpp: int) -> tuple[bool, bool, dict[str, Any]]:
    """Whether this rank's chunk `index` of `vpp` is the model's first, its last, and how GPTModel is told its number.

    From 0.14 on the number is an argument; in 0.11 it is a global, which is set here and stays set: whatever builds a
    chunk or names its weights reads it, so this is to be called before either.
    """
    from megatron.core import parallel_state

    where: dict[str, Any] = {"ignore_virtual": False} if vpp > 1 else {}
    more: dict[str, Any] = {}
    if vpp > 1 and version() >= (0, 14):
        where["vp_stage"] = more["vp_stage"] = index
    elif vpp > 1:
        parallel_state.set_virtual_pipeline_model_parallel_rank(index)
    first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    return first(**where), last(**where), more


def make_optimizer_state(optimizer: Any) -> None:
    """Makes the moments of one distributed optimizer by a step on zero gradients, so that they can be loaded into.

    All gradients are the same zeros, as many as the largest parameter has, and none is left. From 0.14 on Megatron-Core
    has `_init_optimizer_states_with_dummy_values`, which makes them for each parameter; and where Transformer Engine's
    Adam reads `decoupled_grad` (bf16 moments), it needs none, and those that were made stay: 2 bytes a parameter.
    """
    import torch

    groups = optimizer.optimizer.param_groups
    parameters = [each for group in groups for each in group["params"] if each.numel()]  # kernels take no empty tensor
    if not getattr(optimizer.optimizer, "use_decoupled_grad", False):
        zeros: dict[Any, torch.Tensor] = {}
        for each in sorted(parameters, key=torch.numel, reverse=True):
            kind = (each.dtype, each.device)
            if kind not in zeros:
                zeros[kind] = torch.zeros_like(each).view(-1)
            each.grad = zeros[kind][: each.numel()].view_as(each)
    optimizer.optimizer.step()
    for each in parameters:
        each.grad = None


@contextmanager
def weight_gradient_fusion(model: list[Any]) -> Iterator[None]:
    """Lets `model`, empty at first, be built with gradient_accumulation_fusion where apex is missing (every version).

    Transformer Engine's layers add their weight gradients to the float32 buffer by themselves. Only Megatron-Core's own
    output layer asks for apex's kernel, and refuses to be built without: it goes without the fusion then.
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
    """Compiles Megatron-Core's own rotary embedding into one kernel each way (every version).

    Its fused ones are Transformer Engine's and apex's; as it stands, local layers run a dozen kernels a tensor.
    """
    import torch
    from megatron.core.models.common.embeddings import rope_utils

    apply = rope_utils._apply_rotary_pos_emb_bshd
    if not hasattr(apply, "_torchdynamo_orig_callable"):
        rope_utils._apply_rotary_pos_emb_bshd = torch.compile(apply)


SINGLE_QKV_ROPE_SINCE = (0, 16)  # TransformerConfig.fused_single_qkv_rope


def use_kernels(swiglu: Any, split_and_rotate: Any) -> None:
    """Puts these in the place of Megatron-Core's SwiGLU (every version) and of its split and rotated QKV (0.16).

    The latter is called under fused_single_qkv_rope, which is else Transformer Engine's alone.
    """
    from megatron.core.transformer import attention, mlp

    mlp.bias_swiglu_impl = swiglu
    if version() >= SINGLE_QKV_ROPE_SINCE:
        attention.apply_fused_qkv_rotary_pos_emb = split_and_rotate
        attention.HAVE_FUSED_QKV_ROPE = True


def single_qkv_rope(wanted: bool) -> dict[str, Any]:
    """TransformerConfig's field for it; nothing before 0.16."""
    return {"fused_single_qkv_rope": wanted} if version() >= SINGLE_QKV_ROPE_SINCE else {}


def joins_norms() -> bool:
    """Whether layers call their sums and norms as `layers/residual_norm.py` is made for: from 0.16 on, as tried."""
    return version() >= (0, 16)


def clip_gradients(optimizer: Any, grad_norm: float) -> None:
    """Scales the gradients of one distributed optimizer down to its clip_grad; `grad_norm` is that of all of them."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    config = optimizer.config
    name = "use_precision_aware_optimizer" + ("_no_fp8_or_ds_fp8" if version() > (0, 11) else "")
    parameters = optimizer.get_parameters()
    if config.clip_grad > 0.0 and parameters:
        clip_grad_by_total_norm_fp32(
            parameters, max_norm=config.clip_grad, total_norm=grad_norm, use_decoupled_grad=getattr(config, name)
        )


def mend_training() -> None:
    """Mends what a step and its checkpoint need mended in the installed version; called again, it does nothing."""
    mend_torch_adam_step()
    if version() == (0, 11):
        mend_weight_gradient_of_views()


def mend_weight_gradient_of_views() -> None:
    """Lets a linear layer whose input is not contiguous, as attention's output, have its gradient (0.11)."""
    from megatron.core.tensor_parallel import layers

    prepare_tensors = layers.prepare_input_tensors_for_wgrad_compute
    if getattr(prepare_tensors, "mended", False):
        return

    def make_contiguous(grad_output: Any, all_gathered_input: Any) -> Any:
        return prepare_tensors(grad_output, all_gathered_input.contiguous())

    make_contiguous.mended = True  # type: ignore[attr-defined]
    layers.prepare_input_tensors_for_wgrad_compute = make_contiguous


def mend_torch_adam_step() -> None:
    """Lets the distributed optimizer load its state when the inner optimizer is torch's Adam (every version).

    torch's Adam keeps a `step` tensor beside each parameter's moments; apex's and Transformer Engine's keep none.
    (1) The loader copies every entry the optimizer has and fails with KeyError 'step': the entry is passed through,
    since Megatron restores the step before, from the parameter groups. (2) It gives all parameters one and the same
    step tensor, which then counts once a parameter instead of once a step: each gets its own.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    load = DistributedOptimizer.load_state_dict
    if getattr(load, "mended", False):
        return

    def set_states_and_keep_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state.get(self.optimizer.param_groups[group_index]["params"][group_order], {})
        own = {"step": state["step"]} if "step" in state else {}
        set_states(self, model_param, {**own, **tensors})

    def load_and_part_steps(self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    load_and_part_steps.mended = True  # type: ignore[attr-defined]
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states_and_keep_step
    DistributedOptimizer.load_state_dict = load_and_part_steps
