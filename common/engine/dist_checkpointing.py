"""Layouts of the distributed optimizer in torch_dist checkpoints, and which versions of Megatron-Core load them."""

from pathlib import Path
from typing import Any

from common.engine.versions import ENGINES, installed_engine
from common.errors import KitError

# The layout of saved checkpoints, Megatron-Core's from 0.16 on. `common.training.checkpointing.shards` writes and reads
# it itself, with every version.
OPTIMIZER_SHARDING = "fully_reshardable"
SAME_RANKS = "dp_zero_gather_scatter"  # the legacy layout that loads at the same TP, PP and VPP only


def check_optimizer_sharding(kind: str, path: Path, *, same_ranks: bool) -> None:
    """Raises KitError unless the installed version can load the optimizer of `path`, saved in layout `kind`.

    same_ranks: whether it is loaded at the TP, PP and VPP that it was saved with.
    """
    if kind == OPTIMIZER_SHARDING:
        return
    alternative = "start from its weights only: set LOAD_CHECKPOINT_PATH to it and SAVE_CHECKPOINT_PATH to a new folder"
    installed = installed_engine()
    if kind not in installed.legacy_optimizer_shardings:
        loading = [f"megatron-core {engine.name}" for engine in ENGINES if kind in engine.legacy_optimizer_shardings]
        raise KitError(
            f"{path} holds the optimizer as {kind}, which {' or '.join(loading) or 'no supported version'} loads;"
            f" {installed.name} is installed: use one that does, or {alternative}"
        )
    if kind == SAME_RANKS and not same_ranks:
        raise KitError(
            f"{path} holds the optimizer as {kind}, as megatron-core 0.11 saves it: it loads only at the TP, PP and"
            f" VPP that it was saved with; use those, or {alternative}"
        )


def sharded_optimizer_state(optimizer: Any, model_state: dict[str, Any], kind: str) -> dict[str, Any]:
    """The sharded state dict of a distributed optimizer for loading, in the legacy layout `kind`."""
    return installed_engine().sharded_optimizer_state(optimizer, model_state, content_metadata(kind))


def content_metadata(kind: str) -> dict[str, Any]:
    """Megatron-Core's content metadata for an optimizer layout."""
    return {"distrib_optim_sharding_type": kind, "non_homogeneous_layers": False}


def save_options() -> dict[str, Any]:
    """The entry of a checkpoint's common state that tells Megatron-Core's loader the layout (from 0.14 on)."""
    return {"content_metadata": content_metadata(OPTIMIZER_SHARDING)}
