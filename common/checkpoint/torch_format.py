"""Megatron-LM's torch format: one `model_optim_rng.pt` for each tensor and pipeline rank."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.checkpoint.archive import MappedFile, write_archive
from common.errors import KitError


def save_rank_file(path: Path, state: dict[str, Any], done: Callable[[int], None]) -> None:
    """Writes `state`, whose tensors may be LazyTensors, as `torch.save` would, a tensor at a time.

    `done` is told the bytes of each tensor when it is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as stream:
        write_archive(stream, state, done)
        os.fsync(stream.fileno())


def load_rank_file(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, read without running code of the file; its tensors lie in the mapped file.

    Raises KitError when the file is missing, cut short, or names a global that could run code.
    """
    state = MappedFile(path).read()
    if not isinstance(state, dict):
        raise KitError(f"{path} holds no dict: it is no file of a Megatron checkpoint")
    return state
