"""Layouts of the distributed optimizer in torch_dist checkpoints, and which versions of Megatron-Core load them."""

from pathlib import Path
from typing import Any

from common.engine.versions import ENGINES, installed_engine
from common.errors import KitError

# The layout that is written: Megatron-Core's from 0.16 on. `common.training.checkpointing.shards` writes and reads it
# itself, so it does so with every version.
OPTIMIZER_SHARDING = "fully_reshardable"
SAME_RANKS = "dp_zero_gather_scatter"  # the legacy layout that loads at the same TP, PP and VPP only


def check_optimizer_sharding(kind: str, path: Path, *, same_ranks: bool) -> None:
    """Raises KitError unless the installed version loads the optimizer of `path`, saved in layout `kind`.

    same_ranks: whether it is loaded at the TP, PP and VPP that it was saved at.
    """
    if kind == OPTIMIZER_SHARDING:
        return
    way_out = "go on from the weights alone: set LOAD_CHECKPOINT_PATH to it and SAVE_CHECKPOINT_PATH to a new folder"
    installed = installed_engine()
    if kind not in installed.legacy_optimizer_shardings:
        loading = [f"megatron-core {engine.name}" for engine in ENGINES if kind in engine.legacy_optimizer_shardings]
        raise KitError(
            f"{path} holds the optimizer as {kind}, which {' or '.join(loading) or 'no supported version'} loads;"
            f" {installed.name} is installed: use one that does, or {way_out}"
        )
    if kind == SAME_RANKS and not same_ranks:
        raise KitError(
            f"{path} holds the optimizer as {kind}, as megatron-core 0.11 saves it: it loads at its own TP, PP and"
            f" VPP alone; use those, or {way_out}"
        )


def sharded_optimizer_state(optimizer: Any, model_state: dict[str, Any], kind: str) -> dict[str, Any]:
    """The sharded state dict to load a distributed optimizer into that was saved in the legacy layout `kind`."""
    return installed_engine().sharded_optimizer_state(optimizer, model_state, content_metadata(kind))


def content_metadata(kind: str) -> dict[str, Any]:
    """What decides the layout inside torch_dist."""
    return {"distrib_optim_sharding_type": kind, "non_homogeneous_layers": False}


def save_options() -> dict[str, Any]:
    """The entry of a checkpoint's common state from which Megatron-Core's loader knows the layout (since 0.14)."""
    return {"content_metadata": content_metadata(OPTIMIZER_SHARDING)}
