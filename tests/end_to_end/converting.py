"""Commands of `common.convert` in this process, and what they leave on the disk."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from common import convert, errors

TRACKER = "latest_checkpointed_iteration.txt"


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file with its content, every folder with nothing."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def words(command: str, **flags: Any) -> list[str]:
    return [command, *(word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value)))]


def run_main(arguments: list[str]) -> int:
    """The exit code of the command in this process."""
    sys.argv = ["common.convert", *arguments]
    try:
        errors.run(convert.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0
