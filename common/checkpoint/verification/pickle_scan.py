"""Whether a checkpoint may be given to torch and Megatron-Core, which unpickle what they find in it, and run its code.

Read beforehand, by the restricted unpickler, is every pickle that they would: of torch_dist `.metadata`, common.pt and
each item of the .distcp files (torch.load's `weights_only` is not set for the items that are bytes, as the random
state, and in old versions for none), of torch format the files of every rank; and the pickles in `_extra_state`.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, OPTIMIZER_FILE, Checkpoint
from common.checkpoint.formats.torch_dist_reader import load_metadata
from common.checkpoint.formats.torch_dist_writer import BACKEND, COMMON
from common.checkpoint.untrusted.archive_reader import ArchiveReader
from common.checkpoint.untrusted.extra_state import check_extra_state
from common.checkpoint.untrusted.pickled_tensors import PickledStorage
from common.errors import KitError
from common.json_file import read_json

_THREADS = 8  # what takes time is the waiting for a network's file system
_SMALL_BYTES = 1024  # the pickle of one tensor has 200
EXTRA_STATE = "_extra_state"


def check_pickles(checkpoint: Checkpoint) -> None:
    """Raises KitError, naming the file and what it asks for, when a pickle of `checkpoint` could run code.

    Also where one asks for more memory than it is large, or is damaged. Tensors are not read: time and memory go with
    their number alone.
    """
    if checkpoint.format == "torch_dist":
        check_torch_dist(checkpoint.path)
    else:
        check_rank_files(checkpoint.path)


def check_torch_dist(path: Path) -> None:
    """The same for the folder of a checkpoint in torch_dist."""
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
    """The same for the folder of a checkpoint in torch format.

    Its weights are read by this kit alone, which knows to pass over Megatron's own classes; its optimizer is not.
    """
    for file in sorted(path.glob(f"mp_rank_*/{MODEL_FILE}")):
        with _open(file) as stream:
            archive = _archive(stream, file, _Item("", 0, file.stat().st_size))
            _check_extra_states(archive.load(foreign=True), archive)
    for file in sorted(path.glob(f"mp_rank_*/{OPTIMIZER_FILE}")):
        _check_archives(file, [_Item("", 0, file.stat().st_size)])


@dataclass(frozen=True)
class _Item:
    """What .metadata tells of a part of a file."""

    key: str
    offset: int
    length: int


def _check_backends(path: Path) -> None:
    """Raises KitError for other backends: Megatron-Core takes from here by whose code it reads the folder."""
    told = read_json(path, "copy the checkpoint again")
    for name in ("sharded_backend", "common_backend"):
        known = (BACKEND | COMMON)[name]
        if told.get(name) != known:
            raise KitError(
                f"{path} names another {name} than {known}, which alone is read: convert it where it is read"
            )


def _items(path: Path, metadata: Metadata) -> dict[str, list[_Item]]:
    """The items of each file of the checkpoint, in the order of their places."""
    files: dict[str, list[_Item]] = {}
    for index, info in metadata.storage_data.items():
        file = info.relative_path
        if Path(file).name != file or vars(info).get("transform_descriptors"):
            raise KitError(
                f"{path / '.metadata'} places {index.fqn[:200]!r} in {file[:200]!r}, which is no plain file of the"
                " checkpoint: take it from a source you trust"
            )
        files.setdefault(file, []).append(_Item(index.fqn, info.offset, info.length))
    return {file: sorted(items, key=lambda item: item.offset) for file, items in files.items()}


def _open(path: Path) -> Any:
    """The file, unbuffered."""
    try:
        if not path.is_file():
            raise KitError(f"{path} is missing: give it back, or copy the checkpoint again")
        return path.open("rb", buffering=0)
    except OSError as error:
        raise KitError(f"{path} cannot be read ({error.strerror}): copy the checkpoint again") from error


def _check_archives(path: Path, items: Iterable[_Item]) -> None:
    """Raises KitError unless each of `items`, parts of the file at `path`, is harmless."""
    passed: dict[bytes, list[PickledStorage]] = {}  # blocks of one shape have one pickle
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
        raise KitError(f"{path} has {size} bytes, and {item.key} ends at {item.offset + item.length}: copy it again")

    def read(start: int, length: int) -> bytes:
        return os.pread(handle, max(min(length, item.length - start), 0), item.offset + start)

    return ArchiveReader(read, item.length, path)


def _check_extra_states(state: Any, archive: ArchiveReader) -> None:
    """The same for the `_extra_state` among the weights of a rank's file."""
    for weights in state.values() if isinstance(state, dict) else ():
        for key, value in weights.items() if isinstance(weights, dict) else ():
            if EXTRA_STATE in str(key):
                check_extra_state(value, archive)
