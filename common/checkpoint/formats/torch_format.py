"""Megatron-LM's torch format: one `model_optim_rng.pt` per tensor- and pipeline-parallel rank."""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.checkpoint.formats.torch_archive import ArchiveFile, ArchiveWriter, write_archives
from common.checkpoint.io.file_writer import FileWriter
from common.errors import KitError


def save_rank_files(states: Mapping[Path, dict[str, Any]], on_bytes: Callable[[int], None]) -> None:
    """Writes `states`, whose tensors may be LazyTensors, as `torch.save` would, in parallel, a tensor of each in turn.

    `on_bytes` is called with the size of each tensor once it is written.
    """
    with ExitStack() as stack:
        archives = []
        for path, state in states.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            archives.append(ArchiveWriter(stack.enter_context(FileWriter(path)), state))
        write_archives(archives, on_bytes)


def load_rank_file(path: Path) -> dict[str, Any]:
    """The content of a rank's file, read without running code from it; its tensors are views of the mapped file.

    Raises KitError when the file is missing, truncated, not a rank's, or references a global that could run code.
    """
    state = ArchiveFile(path).read()
    if not _has_str_keys(state):
        raise KitError(f"{path} holds no dict with str keys: it is not a Megatron checkpoint file")
    for key, value in state.items():
        if re.fullmatch(r"model\d*", key) and not _has_str_keys(value):
            raise KitError(f"{path}: its {key} is no dict with str keys: it is not a Megatron checkpoint file")
    return state


def _has_str_keys(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)
