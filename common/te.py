"""What is asked of Transformer Engine, by the versions that have it."""

from importlib import metadata
from typing import Any

from common import mcore
from common.errors import KitError

FP8_SINCE = {"delayed": (1, 0), "tensorwise": (2, 2), "blockwise": (2, 3)}  # get_fp8_context in fp8_utils.py of 0.16


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
    if mcore.version() >= mcore.FP8_RECIPES_SINCE:
        return {"fp8": fp8_format, "fp8_recipe": fp8_recipe}
    if fp8_recipe != "delayed":
        raise KitError(f"FP8_RECIPE={fp8_recipe} needs megatron-core 0.12 or later: use FP8_RECIPE=delayed")
    return {"fp8": fp8_format}


def optimizer_state_options(kind: str) -> dict[str, Any]:
    """OptimizerConfig's fields: none but for bf16 moments (Megatron-Core's precision-aware optimizer); raises KitError.

    Transformer Engine's Adam could keep of the master weights the 16 bits that bf16 parameters lack; a checkpoint would
    then hold those in place of weights (fully_reshardable writes what it finds, as float32), so they are kept whole.
    """
    if kind != "bf16":
        return {}
    if mcore.version() < mcore.BF16_MOMENTS_SINCE:
        raise KitError(f"OPTIMIZER_STATE={kind} needs megatron-core 0.13 or later: set it to fp32")
    engine = transformer_engine_version()
    if engine is None or engine < (2, 1):
        raise KitError(
            f"OPTIMIZER_STATE={kind} needs Transformer Engine 2.1 or later, whose Adam does it: set it to fp32"
        )
    import torch  # the estimate reads this file without it

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
