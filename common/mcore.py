"""The one place that knows Megatron-Core's versions: what is supported, and what each of them needs mended."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from common.errors import KitError

OLDEST, NEWEST = (0, 11), (0, 16)
RANGE = "0.11 to 0.16"


def version() -> tuple[int, int]:
    """Major and minor of the installed megatron-core; raises KitError when it is missing or out of range."""
    try:
        text = metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise KitError("megatron-core is not installed: pip install megatron-core==0.16.1") from error
    major, minor = (int(part) for part in text.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        raise KitError(
            f"megatron-core {text} is installed, and this kit works with {RANGE}:"
            " pip install the version that requirements/ names for this machine"
        )
    return major, minor


def optimizer_sharding() -> str:
    """The layout in which this version saves the distributed optimizer to torch_dist.

    `fully_reshardable` (0.15 on) can be loaded at another TP, PP or DP; `fully_sharded_model_space` is the like of 0.13
    and 0.14; before, only `dp_zero_gather_scatter` loads without apex or Transformer Engine, at the same TP and PP.
    """
    if version() >= (0, 15):
        return "fully_reshardable"
    return "fully_sharded_model_space" if version() >= (0, 13) else "dp_zero_gather_scatter"


def first_and_last_differ(chunk_layers: Sequence[int], vpp: int) -> bool:
    """Whether these layers a chunk differ in the first and last stage alone, as every version can build them."""
    return vpp == 1 and len(set(chunk_layers[1:-1])) <= 1


def check_pipeline_layers(chunk_layers: Sequence[int], vpp: int) -> None:
    """Raises KitError unless the installed version trains with these layers a chunk: before 0.13 not any will do."""
    even = len(set(chunk_layers)) == 1
    if even or first_and_last_differ(chunk_layers, vpp) or version() >= (0, 13):
        return
    major, minor = version()
    raise KitError(
        f"PIPELINE_LAYERS={','.join(map(str, chunk_layers))} with VPP={vpp} needs megatron-core 0.13 or later, and"
        f" {major}.{minor} is installed: let only the first and the last stage differ, at VPP=1, or install a later one"
    )


def check_packed_sequences(setting: str) -> None:
    """Raises KitError for a Transformer Engine under 1.7, whose attention knows no causal mask within packed samples.

    Megatron-Core asks for that mask from 1.7 on (TEDotProductAttention in extensions/transformer_engine.py).
    """
    engine = transformer_engine_version()
    if engine is not None and engine < (1, 7):  # without it, building the layers says so
        raise KitError(
            f"{setting}=true needs Transformer Engine 1.7 or later, and {engine[0]}.{engine[1]} is installed:"
            f" set TRANSFORMER_IMPL=local, or {setting}=false"
        )


FP8_SINCE = {"delayed": (1, 0), "tensorwise": (2, 2), "blockwise": (2, 3)}  # get_fp8_context in fp8_utils.py of 0.16


def fp8_options(fp8_format: str, fp8_recipe: str) -> dict[str, Any]:
    """TransformerConfig's fields for FP8; raises KitError where Transformer Engine or Megatron-Core is too old."""
    if fp8_format == "none":
        return {}
    engine = transformer_engine_version()
    since = FP8_SINCE[fp8_recipe]
    if engine is not None and engine < since:
        raise KitError(
            f"FP8_RECIPE={fp8_recipe} needs Transformer Engine {since[0]}.{since[1]} or later, and"
            f" {engine[0]}.{engine[1]} is installed: use FP8_RECIPE=delayed"
        )
    if version() >= (0, 12):
        return {"fp8": fp8_format, "fp8_recipe": fp8_recipe}
    if fp8_recipe != "delayed":
        raise KitError(f"FP8_RECIPE={fp8_recipe} needs megatron-core 0.12 or later: use FP8_RECIPE=delayed")
    return {"fp8": fp8_format}


def optimizer_state_options(kind: str) -> dict[str, Any]:
    """OptimizerConfig's fields for fp32, or bf16 moments (Megatron-Core's precision-aware optimizer); raises KitError.

    Transformer Engine's Adam could keep of the master weights the 16 bits that bf16 parameters lack; a checkpoint would
    then hold those in place of weights (fully_reshardable writes what it finds, as float32), so they are kept whole.
    """
    if kind == "fp32":
        return {}
    if version() < (0, 13):
        raise KitError(f"OPTIMIZER_STATE={kind} needs megatron-core 0.13 or later: set it to fp32")
    engine = transformer_engine_version()
    if engine is None or engine < (2, 1):
        raise KitError(
            f"OPTIMIZER_STATE={kind} needs Transformer Engine 2.1 or later, whose Adam does it: set it to fp32"
        )
    import torch

    moments = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
    return {"use_precision_aware_optimizer": True, "store_param_remainders": False, **moments}


def transformer_engine_version() -> tuple[int, int] | None:
    """Major and minor of the installed Transformer Engine; None where there is none."""
    try:
        text = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None
    major, minor = (int(part) for part in text.split(".")[:2])
    return major, minor


@contextmanager
def weight_gradient_fusion(model: list[Any]) -> Iterator[None]:
    """Lets `model`, empty at first, be built with gradient_accumulation_fusion where apex is missing (0.11 to 0.16).

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
    """Compiles Megatron-Core's own rotary embedding into one kernel each way (0.11 to 0.16).

    Its fused ones are Transformer Engine's and apex's; as it stands, local layers run a dozen kernels a tensor.
    """
    import torch
    from megatron.core.models.common.embeddings import rope_utils

    apply = rope_utils._apply_rotary_pos_emb_bshd
    if not hasattr(apply, "_torchdynamo_orig_callable"):
        rope_utils._apply_rotary_pos_emb_bshd = torch.compile(apply)


def mend_torch_adam_step() -> None:
    """Lets the distributed optimizer load its state when the inner optimizer is torch's Adam (0.11 to 0.16).

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
