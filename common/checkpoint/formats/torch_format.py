"""Megatron-LM's torch format: one `model_optim_rng.pt` for each tensor and pipeline rank."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.checkpoint.formats.torch_archive import ArchiveFile, ArchiveWriter, write_archives
from common.checkpoint.io.disk import Writer
from common.errors import KitError


def save_rank_files(states: Mapping[Path, dict[str, Any]], done: Callable[[int], None]) -> None:
    """Writes each of `states`, whose tensors may be LazyTensors, as `torch.save` would, a tensor of each in turn.

    `done` is told the bytes of each tensor when it is written.
    """
    with ExitStack() as stack:
        archives = []
        for path, state in states.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            archives.append(ArchiveWriter(stack.enter_context(Writer(path)), state))
        write_archives(archives, done)


def load_rank_file(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, read without running code of the file; its tensors lie in the mapped file.

    Raises KitError when the file is missing, cut short, is none of a rank, or names a global that could run code.
    """
    state = ArchiveFile(path).read()
    if not _has_names(state):
        raise KitError(f"{path} holds no dict of names: it is no file of a Megatron checkpoint")
    for key, value in state.items():
        if re.fullmatch(r"model\d*", key) and not _has_names(value):
            raise KitError(f"{path}: its {key} is no dict of names: it is no file of a Megatron checkpoint")
    return state


def _has_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
