"""Names of a checkpoint on disk: the tracker file, the folder of an iteration, the folder of a rank.

    FOLDER/latest_checkpointed_iteration.txt     "release" (weights alone) or a number
    FOLDER/config.json, tokenizer.json, ...      the model's own files
    FOLDER/release/  FOLDER/iter_0000100/        a checkpoint: .metadata and *.distcp (torch_dist), or
        mp_rank_TT[_PPP]/model_optim_rng.pt      one file a tensor and pipeline rank (torch)

The names are Megatron-LM's (megatron/training/checkpointing.py).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.atomic_file import sync
from common.errors import KitError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE: Literal["release"] = "release"
MODEL_FILE = "model_optim_rng.pt"
OPTIMIZER_FILE = "distrib_optim.pt"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: `folder` holds the tracker and the model's files, `path` the weights."""

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
    """The newest iteration that `folder` says it holds; None without a tracker file."""
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
    """Writes the tracker file in one step: a reader finds the old one or the new one."""
    partial = folder / (TRACKER + ".partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(f"{iteration}\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / TRACKER)
    sync(folder)


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of `folder`, or the one that `folder` itself is; None where there is none.

    Raises KitError when the tracker names a folder that is missing or holds no weights.
    """
    iteration = read_tracker(folder)
    if iteration is None:
        return _checkpoint_itself(folder)
    path = iteration_dir(folder, iteration)
    if not path.is_dir():
        raise KitError(
            f"{folder / TRACKER} names {path.name}, which is not there:"
            f" give that folder back, or write one of {_written(folder)} there"
        )
    kind = format_of(path)
    if kind is None:
        raise KitError(f"{path} holds neither {MODEL_FILE} in mp_rank_* nor .metadata: it is no whole checkpoint")
    return Checkpoint(folder, path, iteration, kind)


def _checkpoint_itself(path: Path) -> Checkpoint | None:
    """`path` as the folder of one iteration."""
    path = path.absolute()
    number = iteration_number(path.name)
    kind = format_of(path) if number is not None or path.name == RELEASE else None
    if kind is None:
        return None
    return Checkpoint(path.parent, path, RELEASE if number is None else number, kind)


def format_of(path: Path) -> Literal["torch", "torch_dist"] | None:
    """The format of the checkpoint in `path`; None when it is not whole."""
    if (path / ".metadata").is_file() and (path / "metadata.json").is_file():
        return "torch_dist"
    return "torch" if any(path.glob(f"mp_rank_*/{MODEL_FILE}")) else None


def iteration_number(name: str) -> int | None:
    """100 for `iter_0000100`; None for any other name."""
    found = re.fullmatch(r"iter_(\d{7,})", name)
    return int(found[1]) if found else None


def list_iterations(folder: Path) -> list[int]:
    """The iterations that lie whole in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    numbered = ((iteration_number(path.name), path) for path in folder.iterdir() if path.is_dir())
    return sorted(number for number, path in numbered if number is not None and format_of(path))


def _written(folder: Path) -> list[str]:
    names = [str(number) for number in list_iterations(folder)]
    return names + ([RELEASE] if format_of(folder / RELEASE) else [])
