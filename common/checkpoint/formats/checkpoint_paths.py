"""Paths of a checkpoint: the tracker file, the folder of an iteration, the folder of a rank.

    FOLDER/latest_checkpointed_iteration.txt     "release" (weights only) or a number
    FOLDER/config.json, tokenizer.json, ...      the model's own files
    FOLDER/release/  FOLDER/iter_0000100/        a checkpoint: .metadata and *.distcp (torch_dist), or
        mp_rank_TT[_PPP]/model_optim_rng.pt      one file per TP and PP rank (torch)

The names are Megatron-LM's (megatron/training/checkpointing.py).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import KitError
from common.files import write_atomically

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE: Literal["release"] = "release"
MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: `folder` holds the tracker and the model's other files, `path` the weights."""

    folder: Path
    path: Path
    iteration: int | Literal["release"]
    format: Literal["torch", "torch_dist"]


def iteration_dir(folder: Path, iteration: int | str) -> Path:
    """`folder/iter_0000100`, or `folder/release`."""
    return folder / (RELEASE if iteration == RELEASE else f"iter_{iteration:07d}")


def rank_dir_name(tp_rank: int, pp_rank: int, pp_size: int) -> str:
    """`mp_rank_00`, or `mp_rank_00_001` where there are pipeline stages."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else "")


def read_tracker(folder: Path) -> int | Literal["release"] | None:
    """The iteration in the tracker file of `folder`; None without one."""
    path = folder / TRACKER
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if not text.isdecimal() or len(text) > 18:
        raise KitError(f"{path} holds {text[:40]!r}: it must hold a number or the word release; write one there")
    return int(text)


def write_tracker(folder: Path, iteration: int | str) -> None:
    """Writes the tracker file atomically."""
    write_atomically(folder / TRACKER, f"{iteration}\n".encode())


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, or `folder` itself if it is one; None without a checkpoint.

    Raises KitError when the tracker names a folder that is missing or has no weights.
    """
    iteration = read_tracker(folder)
    if iteration is None:
        return _checkpoint_at(folder)
    path = iteration_dir(folder, iteration)
    if not path.is_dir():
        raise KitError(
            f"{folder / TRACKER} names {path.name}, which does not exist:"
            f" restore that folder, or write one of {_available(folder)} there"
        )
    kind = format_of(path)
    if kind is None:
        raise KitError(f"{path} holds neither {MODEL_FILE} in mp_rank_* nor .metadata: the checkpoint is incomplete")
    return Checkpoint(folder, path, iteration, kind)


def require_checkpoint(path: Path) -> Checkpoint:
    """As `find_checkpoint`, for LOAD_CHECKPOINT_PATH; raises KitError without a checkpoint."""
    found = find_checkpoint(path) if path.is_dir() else None
    if found is None:
        raise KitError(f"LOAD_CHECKPOINT_PATH={path} holds no Megatron checkpoint: give step 2's or a run's folder")
    return found


def _checkpoint_at(path: Path) -> Checkpoint | None:
    """The checkpoint in `path`, if that is the folder of an iteration."""
    path = path.absolute()
    number = iteration_number(path.name)
    kind = format_of(path) if number is not None or path.name == RELEASE else None
    if kind is None:
        return None
    return Checkpoint(path.parent, path, RELEASE if number is None else number, kind)


def format_of(path: Path) -> Literal["torch", "torch_dist"] | None:
    """The format of the checkpoint in `path`; None when it is incomplete."""
    if (path / ".metadata").is_file() and (path / "metadata.json").is_file():
        return "torch_dist"
    return "torch" if any(path.glob(f"mp_rank_*/{MODEL_FILE}")) else None


def iteration_number(name: str) -> int | None:
    """100 for `iter_0000100`; None for any other name."""
    found = re.fullmatch(r"iter_(\d{7,})", name)
    return int(found[1]) if found else None


def list_iterations(folder: Path) -> list[int]:
    """The iterations of the complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    numbered = ((iteration_number(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted(number for number, path in numbered if number is not None and format_of(path))


def _available(folder: Path) -> list[str]:
    names = [str(number) for number in list_iterations(folder)]
    return names + ([RELEASE] if format_of(folder / RELEASE) else [])
