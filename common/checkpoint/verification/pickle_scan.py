"""Scans the pickles of a checkpoint before torch and Megatron-Core load them, which would run their code.

The restricted unpickler reads every pickle that they would: in torch_dist `.metadata`, common.pt and each item of the
.distcp files (torch.load's `weights_only` is off for bytes items such as the RNG state, and for all items in old
versions); in torch format the files of all ranks; and the pickles in `_extra_state`.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, OPTIMIZER_FILE, Checkpoint
from common.checkpoint.formats.torch_dist_reader import load_metadata
from common.checkpoint.formats.torch_dist_writer import COMMON_BACKEND, SHARDED_BACKEND
from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.extra_state import check_extra_state
from common.checkpoint.untrusted.pickled_tensors import PickledStorage
from common.errors import KitError
from common.json_file import read_json

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_THREADS = 8  # most of the time is spent waiting for a network file system
_SMALL_BYTES = 1024  # the pickle of one tensor has 200
EXTRA_STATE = "_extra_state"


def check_pickles(checkpoint: Checkpoint) -> None:
    """Raises KitError, naming the file and the global, when a pickle of `checkpoint` could run code.

    Also where one is damaged, or would take far more memory than its size. Tensors are not read: time and memory grow
    only with their number.
    """
    if checkpoint.format == "torch_dist":
        check_torch_dist(checkpoint.path)
    else:
        check_rank_files(checkpoint.path)


def check_torch_dist(path: Path) -> None:
    """Checks the folder of a checkpoint in torch_dist format."""
    _check_backends(path / "metadata.json")
    metadata = load_metadata(path / ".metadata")
    common = path / "common.pt"
    if common.is_file():
        _check_archives(common, [_Item("", 0, common.stat().st_size)])
    files = _items(path, metadata)
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(_check_archives, (path / name for name in files), files.values()):
            pass


def check_rank_files(path: Path) -> None:
    """Checks the folder of a checkpoint in torch format.

    Only this kit reads its weights, with placeholders for Megatron's classes; Megatron-Core loads its optimizer.
    """
    for file in sorted(path.glob(f"mp_rank_*/{MODEL_FILE}")):
        with _open(file) as stream:
            archive = _archive(stream, file, _Item("", 0, file.stat().st_size))
            _check_extra_states(archive.load(foreign=True), archive)
    for file in sorted(path.glob(f"mp_rank_*/{OPTIMIZER_FILE}")):
        _check_archives(file, [_Item("", 0, file.stat().st_size)])


@dataclass(frozen=True)
class _Item:
    """A part of a file, from the storage metadata."""

    key: str
    offset: int
    length: int


def _check_backends(path: Path) -> None:
    """Raises KitError for other backends: metadata.json selects the code with which Megatron-Core reads the folder."""
    backends = read_json(path, "copy the checkpoint again")
    for name in ("sharded_backend", "common_backend"):
        expected = (SHARDED_BACKEND | COMMON_BACKEND)[name]
        if name == "common_backend" and name not in backends:
            continue  # as Megatron-Core writes from 0.19 on: the common state is one of the objects
        if backends.get(name) != expected:
            raise KitError(
                f"{path}: {name} is not {expected}, the only supported one: convert the checkpoint with other software"
            )


def _items(path: Path, metadata: "Metadata") -> dict[str, list[_Item]]:
    """The items of each file of the checkpoint, by offset."""
    files: dict[str, list[_Item]] = {}
    for index, info in metadata.storage_data.items():
        file = info.relative_path
        if Path(file).name != file or vars(info).get("transform_descriptors"):
            raise KitError(
                f"{path / '.metadata'} places {index.fqn[:200]!r} in {file[:200]!r}, which is not a plain file of the"
                " checkpoint: take it from a source you trust"
            )
        files.setdefault(file, []).append(_Item(index.fqn, info.offset, info.length))
    return {file: sorted(items, key=lambda item: item.offset) for file, items in files.items()}


def _open(path: Path) -> Any:
    """The file, unbuffered."""
    try:
        if not path.is_file():
            raise KitError(f"{path} is missing: restore it, or copy the checkpoint again")
        return path.open("rb", buffering=0)
    except OSError as error:
        raise KitError(f"{path} cannot be read ({error.strerror}): copy the checkpoint again") from error


def _check_archives(path: Path, items: Iterable[_Item]) -> None:
    """Raises KitError unless each of `items`, parts of the file at `path`, is safe to load."""
    passed: dict[bytes, list[PickledStorage]] = {}  # chunks of the same shape have the same pickle
    with _open(path) as stream:
        for item in items:
            archive = _archive(stream, path, item)
            if archive.pickled in passed and EXTRA_STATE not in item.key:
                archive.check_storages(passed[archive.pickled])
                continue
            value = archive.load()
            if EXTRA_STATE in item.key:
                check_extra_state(value, archive)
            elif len(archive.pickled) < _SMALL_BYTES:
                passed[archive.pickled] = list(archive.storages.values())


def _archive(stream: Any, path: Path, item: _Item) -> ArchiveReader:
    handle, size = stream.fileno(), os.fstat(stream.fileno()).st_size
    if not 0 <= item.offset <= item.offset + item.length <= size:
        raise KitError(f"{path} has {size} bytes, but {item.key} ends at {item.offset + item.length}: copy it again")

    def read(start: int, length: int) -> bytes:
        return os.pread(handle, max(min(length, item.length - start), 0), item.offset + start)

    return ArchiveReader(read, item.length, path)


def _check_extra_states(state: Any, archive: ArchiveReader) -> None:
    """Checks each `_extra_state` among the weights of a rank's file."""
    for weights in state.values() if isinstance(state, dict) else ():
        for key, value in weights.items() if isinstance(weights, dict) else ():
            if EXTRA_STATE in str(key):
                check_extra_state(value, archive)
