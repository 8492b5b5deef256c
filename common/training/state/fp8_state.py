"""What FP8 with delayed scaling remembers from step to step: each tensor's scale, and the largest values it had lately.

Transformer Engine keeps it in a module's `fp8_meta`, and saves it (get_extra_state in pytorch/module/base.py) as a
pickle of its own classes, which a checkpoint that is read without running code cannot hold. Without it a resumed run
begins at scale 1, where most gradients are too small for FP8.
"""

from collections.abc import Iterator
from typing import Any

import torch

from common.engine.transformer_engine import transformer_engine_version
from common.errors import KitError
from common.log import logger
from common.model.build import unwrap
from common.training.settings import TrainSettings

# Before it, amaxes wait in a global buffer for the next step's reduction (amax_and_scale_update in pytorch/fp8.py).
SINCE = (1, 6)
DIRECTIONS = ("scaling_fwd", "scaling_bwd")
KEPT = ("scale", "scale_inv", "amax_history")  # scale_inv until Transformer Engine 1.13

# {"scaling_fwd": {"scale": [n], "amax_history": [length, n]}, "scaling_bwd": ...}: float32, of a module's n FP8 tensors
Scales = dict[str, dict[str, torch.Tensor]]


def has_fp8_state(chosen: TrainSettings) -> bool:
    """Whether a run with these settings has what `fp8_state` tells; the other recipes look at no step but their own."""
    return chosen.fp8_format != "none" and chosen.fp8_recipe == "delayed"


def fp8_state(model: list[Any]) -> list[dict[str, Scales]]:
    """Of each chunk {module's name: its Scales on the host}, for the modules that have any; plain tensors and text.

    Empty for a Transformer Engine before 1.6, which keeps part of it elsewhere.
    """
    if not _is_kept():
        return []
    return [{name: scales for name, module in _engine_modules(chunk) if (scales := _scales(module))} for chunk in model]


def restore_fp8_state(model: list[Any], saved: list[dict[str, Scales]] | None) -> None:
    """Has `model`, of the parallel sizes at which it was saved, go on from what `fp8_state` gave; None: there is none.

    Transformer Engine makes the tensors in a module's first forward pass: they are filled then, right after that.
    Raises KitError where the model is another one.
    """
    if not saved or not _is_kept():
        logger.info(
            "FP8's scales and amax histories start anew: the checkpoint was written at other parallel sizes, without"
            " FP8_RECIPE=delayed, or with a Transformer Engine before %d.%d",
            *SINCE,
        )
        return
    here = [dict(_engine_modules(chunk)) for chunk in model]
    unknown = [name for chunk, modules in zip(saved, here, strict=False) for name in chunk if name not in modules]
    if unknown or len(saved) != len(model):
        raise KitError(
            f"the checkpoint's FP8 state is of {len(saved)} chunk(s) a rank, and this model has {len(model)}; modules"
            f" that it has not: {', '.join(unknown[:3]) or 'none'}: use the Transformer Engine, TRANSFORMER_IMPL and"
            " VPP that it was saved with"
        )
    for chunk, modules in zip(saved, here, strict=True):
        for name, scales in chunk.items():
            _restore(name, modules[name], scales)


def _is_kept() -> bool:
    engine = transformer_engine_version()
    return engine is None or engine >= SINCE  # without one, no module has any


def _engine_modules(chunk: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in unwrap(chunk).named_modules() if hasattr(module, "fp8_meta"))


def _scales(module: Any) -> Scales:
    waiting: Scales | None = module.__dict__.get("fp8_scales_to_restore")
    if waiting is not None:  # no forward pass since it was loaded
        return waiting
    found = {direction: module.fp8_meta.get(direction) for direction in DIRECTIONS}
    return {
        direction: {name: getattr(meta, name).detach().cpu().clone() for name in KEPT if hasattr(meta, name)}
        for direction, meta in found.items()
        if hasattr(meta, "amax_history")  # other recipes have no memory
    }


def _restore(name: str, module: Any, scales: Scales) -> None:
    if module.fp8_meta.keys() & scales.keys():
        _fill(name, module.fp8_meta, scales)
        return
    make = type(module).init_fp8_meta_tensors

    def make_and_fill(*recipes: Any) -> None:
        make(module, *recipes)
        del module.init_fp8_meta_tensors, module.fp8_scales_to_restore
        _fill(name, module.fp8_meta, scales)

    module.init_fp8_meta_tensors, module.fp8_scales_to_restore = make_and_fill, scales


@torch.no_grad()
def _fill(name: str, fp8_meta: dict[str, Any], scales: Scales) -> None:
    """Copies into the tensors that are there: Transformer Engine's quantizers and global buffers point to them."""
    for direction, tensors in scales.items():
        for kind, tensor in tensors.items():
            place = getattr(fp8_meta.get(direction), kind, None)
            if place is None and kind == "scale_inv":
                continue  # no part of later versions' state
            if place is None or place.shape != tensor.shape:
                there = "none" if place is None else f"one of {list(place.shape)}"
                raise KitError(
                    f"the checkpoint's FP8 {kind} of {name} ({direction}) has the shape {list(tensor.shape)}, and this"
                    f" run has {there}: use the Transformer Engine and the FP8 settings that it was saved with"
                )
            place.copy_(tensor)
