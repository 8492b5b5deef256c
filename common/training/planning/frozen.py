"""TRAINABLE and FREEZE: which weights have gradients, by patterns over Hugging Face's names."""

import hashlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from common.checkpoint.formats.parallel_layout import ParallelLayout, chunk_tensors, model_chunks, model_tensors
from common.errors import KitError
from common.model.shape.config import QwenConfig
from common.training.settings import TrainSettings

Frozen = frozenset[tuple[str, int | None]]  # Megatron's name (as ParamMapping.te), and the layer


def frozen_weights(settings: TrainSettings, qwen: QwenConfig) -> Frozen:
    """The weights that TRAINABLE does not name, or FREEZE does; empty without either.

    Raises KitError for a pattern that names none, where one tensor of Megatron's would be half frozen, and where
    nothing is left to train.
    """
    if not (settings.trainable or settings.freeze):
        return frozenset()
    tensors = model_tensors(qwen)
    every = [name for mapping, layer in tensors for name in mapping.hf_names(layer)]
    chosen = _matching(settings, "trainable", every) if settings.trainable else set(every)
    chosen -= _matching(settings, "freeze", every) if settings.freeze else set()
    if not chosen:
        raise KitError(f"TRAINABLE={settings.trainable or ''} FREEZE={settings.freeze or ''} leave nothing to train")
    frozen = set()
    for mapping, layer in tensors:
        names = mapping.hf_names(layer)
        left = [name for name in names if name in chosen]
        if left and len(left) < len(names):
            other = next(name for name in names if name not in chosen)
            raise KitError(
                f"{left[0]} is trained and {other} is not, and Megatron-Core holds both in one tensor: choose"
                f" {', '.join(names)} together, as by a pattern that ends in one * for them"
            )
        if not left:
            frozen.add((mapping.te, layer))
    _check_stages(settings, qwen, frozen)
    return frozenset(frozen)


def _check_stages(settings: TrainSettings, qwen: QwenConfig, frozen: set[tuple[str, int | None]]) -> None:
    """Raises KitError if a pipeline stage has nothing to train."""
    sizes = settings.sizes
    layout = ParallelLayout(sizes.tp, sizes.pp, sizes.vpp, "transformer_engine", sizes.pipeline_layers)
    trained = set()
    for chunk in model_chunks(qwen, layout):
        if any((each.mapping.te, each.layer) not in frozen for each in chunk_tensors(qwen, layout, chunk)):
            trained.add(chunk.pp_rank)
    if idle := sorted(set(range(sizes.pp)) - trained):
        raise KitError(
            f"PP={sizes.pp}: TRAINABLE and FREEZE leave stage {idle[0]} nothing to train: use a smaller PP, or train"
            " more"
        )


def _matching(settings: TrainSettings, setting: str, names: list[str]) -> set[str]:
    found: set[str] = set()
    for pattern in getattr(settings, setting).replace(",", " ").split():
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise KitError(
                f"{setting.upper()}: the pattern {pattern} matches no weight: give Hugging Face's names, as"
                f" {names[0]} or {names[-1]}, with * for any part"
            )
        found |= matches
    return found


def describe_frozen(frozen: Frozen) -> str:
    """A hash of which weights are frozen, for a checkpoint's metadata; empty without any."""
    names = sorted(f"{name} {layer}" for name, layer in frozen)
    return hashlib.sha256("\n".join(names).encode()).hexdigest() if names else ""


def check_frozen(run: dict[str, Any], frozen: Frozen, path: Path) -> None:
    """Raises KitError unless the run of the checkpoint `path`, with metadata `run`, trained the same weights."""
    if run.get("frozen", "") != describe_frozen(frozen):
        raise KitError(
            f"{path} was written by a run that trained other weights, and has an optimizer state for them alone: use"
            " the same TRAINABLE and FREEZE, or a new SAVE_CHECKPOINT_PATH with LOAD_CHECKPOINT_PATH set to this one"
        )
