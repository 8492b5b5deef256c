"""The state of FP8 delayed scaling: each tensor's scale and amax history.

Transformer Engine keeps it in a module's `fp8_meta`, and saves it (get_extra_state in pytorch/module/base.py) as a
pickle of its own classes, which a checkpoint that loads without running code cannot hold. Without it a resumed run
starts from scale 1, where most gradients are too small for FP8.
"""

from collections.abc import Iterator
from typing import Any

import torch

from common.engine.transformer_engine import transformer_engine_version
from common.errors import KitError
from common.log import logger
from common.model.build import unwrap
from common.training.settings import TrainSettings

# Before 1.6, amaxes wait in a global buffer for the next step's reduction (amax_and_scale_update in pytorch/fp8.py).
MIN_TE_VERSION = (1, 6)
DIRECTIONS = ("scaling_fwd", "scaling_bwd")
TENSORS = ("scale", "scale_inv", "amax_history")  # scale_inv until Transformer Engine 1.13

# {"scaling_fwd": {"scale": [n], "amax_history": [length, n]}, "scaling_bwd": ...}: float32, of a module's n FP8 tensors
Scales = dict[str, dict[str, torch.Tensor]]


def has_fp8_state(settings: TrainSettings) -> bool:
    """Whether FP8 with these settings has state between steps; only delayed scaling does."""
    return settings.fp8_format != "none" and settings.fp8_recipe == "delayed"


def fp8_state(model: list[Any]) -> list[dict[str, Scales]]:
    """{module's name: its Scales on the host} of each chunk, for the modules that have any; plain tensors and strings.

    Empty for a Transformer Engine before 1.6, which keeps part of the state elsewhere.
    """
    if not _is_supported():
        return []
    return [{name: scales for name, module in _te_modules(chunk) if (scales := _scales(module))} for chunk in model]


def restore_fp8_state(model: list[Any], saved: list[dict[str, Scales]] | None) -> None:
    """Restores the result of `fp8_state` into `model`, which must have the same parallel sizes; None: nothing saved.

    Transformer Engine creates the tensors in a module's first forward pass; they are filled right after that.
    Raises KitError if the model's chunks or modules differ.
    """
    if not saved or not _is_supported():
        logger.info(
            "FP8 scales and amax histories are reset: the checkpoint was written at other parallel sizes, without"
            " FP8_RECIPE=delayed, or with a Transformer Engine before %d.%d",
            *MIN_TE_VERSION,
        )
        return
    own_modules = [dict(_te_modules(chunk)) for chunk in model]
    unknown = [name for chunk, own in zip(saved, own_modules, strict=False) for name in chunk if name not in own]
    if unknown or len(saved) != len(model):
        raise KitError(
            f"the checkpoint's FP8 state has {len(saved)} chunk(s) per rank, and this model has {len(model)}; modules"
            f" missing in this model: {', '.join(unknown[:3]) or 'none'}: use the Transformer Engine, TRANSFORMER_IMPL"
            " and VPP that the checkpoint was saved with"
        )
    for chunk, own in zip(saved, own_modules, strict=True):
        for name, scales in chunk.items():
            _restore(name, own[name], scales)


def _is_supported() -> bool:
    version = transformer_engine_version()
    return version is None or version >= MIN_TE_VERSION  # without Transformer Engine, no module has FP8 state


def _te_modules(chunk: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in unwrap(chunk).named_modules() if hasattr(module, "fp8_meta"))


def _scales(module: Any) -> Scales:
    pending: Scales | None = module.__dict__.get("fp8_scales_to_restore")
    if pending is not None:  # no forward pass since it was loaded
        return pending
    metas = {direction: module.fp8_meta.get(direction) for direction in DIRECTIONS}
    return {
        direction: {name: getattr(meta, name).detach().cpu().clone() for name in TENSORS if hasattr(meta, name)}
        for direction, meta in metas.items()
        if hasattr(meta, "amax_history")  # other recipes have no history
    }


def _restore(name: str, module: Any, scales: Scales) -> None:
    if module.fp8_meta.keys() & scales.keys():
        _fill(name, module.fp8_meta, scales)
        return
    init = type(module).init_fp8_meta_tensors

    def init_and_fill(*recipes: Any) -> None:
        init(module, *recipes)
        del module.init_fp8_meta_tensors, module.fp8_scales_to_restore
        _fill(name, module.fp8_meta, scales)

    module.init_fp8_meta_tensors, module.fp8_scales_to_restore = init_and_fill, scales


@torch.no_grad()
def _fill(name: str, fp8_meta: dict[str, Any], scales: Scales) -> None:
    """Copies into the existing tensors, since Transformer Engine's quantizers and global buffers point to them."""
    for direction, tensors in scales.items():
        for kind, tensor in tensors.items():
            target = getattr(fp8_meta.get(direction), kind, None)
            if target is None and kind == "scale_inv":
                continue  # later versions have none
            if target is None or target.shape != tensor.shape:
                own = "none" if target is None else f"one of {list(target.shape)}"
                raise KitError(
                    f"the checkpoint's FP8 {kind} of {name} ({direction}) has the shape {list(tensor.shape)}, and this"
                    f" run has {own}: use the Transformer Engine and the FP8 settings that it was saved with"
                )
            target.copy_(tensor)
