"""Features of Transformer Engine by version, checked from package metadata without importing it."""

import re
from collections.abc import Callable
from importlib import metadata
from typing import Any

from common.engine.base import Engine
from common.engine.versions import first_version_with, installed_engine
from common.errors import KitError

PACKED_SINCE = (1, 7)  # the causal mask within packed rows: TEDotProductAttention in extensions/transformer_engine.py
TP_COMM_OVERLAP_SINCE = (1, 9)  # bootstrap_backend; before, only MPI: Megatron-LM's training/initialize.py
FP8_SINCE = {"delayed": (1, 0), "tensorwise": (2, 2), "blockwise": (2, 3)}  # get_fp8_context in fp8_utils.py of 0.16
BF16_MOMENTS_SINCE = (2, 1)  # the dtypes of FusedAdam's moments


def check_installed() -> None:
    """Raises KitError unless Transformer Engine is installed, for TRANSFORMER_IMPL=transformer_engine."""
    _need("TRANSFORMER_IMPL=transformer_engine", (1, 0), "start an image that has it, or set it to local")


def check_packed_sequences(setting: str) -> None:
    """Raises KitError for Transformer Engine before 1.7, whose attention has no causal mask within packed samples.

    Megatron-Core passes that mask from 1.7 on.
    """
    _need(f"{setting}=true", PACKED_SINCE, f"set TRANSFORMER_IMPL=local, or {setting}=false")


def check_tp_comm_overlap() -> None:
    """Raises KitError for Transformer Engine before 1.9, which creates its buffers with MPI only."""
    _need("TP_COMM_OVERLAP=true", TP_COMM_OVERLAP_SINCE, "set it to auto")


def check_fp8(fp8_format: str, fp8_recipe: str) -> None:
    """Raises KitError if Transformer Engine or Megatron-Core is too old for this FP8 recipe."""
    if fp8_format == "none":
        return
    remedy = "use FP8_FORMAT=none" if fp8_recipe == "delayed" else "use FP8_RECIPE=delayed"
    _need(f"FP8_RECIPE={fp8_recipe}", FP8_SINCE[fp8_recipe], remedy)
    if fp8_recipe != "delayed":
        _need_megatron(f"FP8_RECIPE={fp8_recipe}", lambda engine: engine.fp8_recipes, remedy)


def fp8_options(fp8_format: str, fp8_recipe: str) -> dict[str, Any]:
    """TransformerConfig's fields for FP8; raises KitError if Transformer Engine or Megatron-Core is too old."""
    if fp8_format == "none":
        return {}
    check_fp8(fp8_format, fp8_recipe)
    recipes = installed_engine().fp8_recipes
    return {"fp8": fp8_format, **({"fp8_recipe": fp8_recipe} if recipes else {})}


def check_optimizer_state(kind: str) -> None:
    """Raises KitError if Transformer Engine or Megatron-Core is too old for moments in bf16."""
    if kind == "bf16":
        _need_megatron("OPTIMIZER_STATE=bf16", lambda engine: engine.bf16_moments, "set it to fp32")
        _need("OPTIMIZER_STATE=bf16", BF16_MOMENTS_SINCE, "set it to fp32")


def optimizer_state_options(kind: str) -> dict[str, Any]:
    """OptimizerConfig's fields for bf16 moments (Megatron-Core's precision-aware optimizer), none for others.

    Of the float32 master weights Transformer Engine's Adam stores the 16 bits that the bf16 weights lack. Raises
    KitError if Transformer Engine or Megatron-Core is too old.
    """
    if kind != "bf16":
        return {}
    check_optimizer_state(kind)
    import torch  # the estimate imports this module without torch

    moments = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
    return {"use_precision_aware_optimizer": True, "store_param_remainders": True, **moments}


def transformer_engine_version() -> tuple[int, int] | None:
    """Major and minor version of the installed Transformer Engine; None if it is not installed."""
    try:
        text = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _need(setting: str, since: tuple[int, int], remedy: str) -> None:
    found = transformer_engine_version()
    if found is None or found < since:
        there = f"{found[0]}.{found[1]} is installed" if found else "none is installed"
        raise KitError(f"{setting} needs Transformer Engine {since[0]}.{since[1]} or later, and {there}: {remedy}")


def _need_megatron(setting: str, feature: Callable[[Engine], bool], remedy: str) -> None:
    installed = installed_engine()
    if not feature(installed):
        since = first_version_with(feature)
        raise KitError(f"{setting} needs megatron-core {since} or later, and {installed.name} is installed: {remedy}")
