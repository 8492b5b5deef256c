"""Reads the pickle of a torch.save archive; its storages only on request."""

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from common.checkpoint.untrusted.pickled_tensors import PickledStorage, storage_of
from common.checkpoint.untrusted.restricted_unpickler import RestrictedUnpickler
from common.checkpoint.untrusted.zip_records import Read, Record, read_data_start, read_records
from common.errors import KitError

LoadStorage = Callable[[PickledStorage, Record], Any]


class ArchiveReader:
    """An archive of `length` bytes, read through `read`; raises KitError, naming `source`, where it is not one."""

    def __init__(self, read: Read, length: int, source: Path) -> None:
        self.read, self.source = read, source
        self.storages: dict[str, PickledStorage] = {}  # by key, as the pickle names them
        try:
            self.records = read_records(read, length)
            self.pickled = self.data("data.pkl")
            order = self.data("byteorder") if "byteorder" in self.records else b"little"
        except (ValueError, IndexError, struct.error) as error:
            raise KitError(f"{source} is not a complete torch.save file ({error}): copy it again") from error
        if order != b"little":
            raise KitError(f"{source} was written big-endian: convert it on the machine that wrote it")

    def data(self, name: str) -> bytes:
        """The bytes of a record; raises ValueError where it is truncated."""
        record = self.records[name]
        data = self.read(read_data_start(self.read, record), record.size)
        if len(data) != record.size:
            raise ValueError(f"record {name} is truncated")
        return data

    def record_of(self, storage: PickledStorage) -> Record:
        """The record of a storage; raises ValueError where it is missing or too short.

        torch takes the size from the pickle, and reads past the end of a smaller record.
        """
        record = self.records.get(f"data/{storage.key}")
        if record is None or record.size < storage.num_bytes:
            raise ValueError(f"record data/{storage.key} is missing or too short")
        return record

    def check_storages(self, storages: Iterable[PickledStorage]) -> None:
        """Raises KitError unless this archive has the records of `storages`, from an equal pickle elsewhere."""
        try:
            for storage in storages:
                self.record_of(storage)
        except ValueError as error:
            raise KitError(f"{self.source} is damaged ({error}): copy it again from its source") from error

    def load(self, *, foreign: bool = False, load_storage: LoadStorage | None = None) -> Any:
        """The object, its tensors made from what `load_storage` returns, or TensorStubs without it.

        Raises KitError when it is damaged or could run code; `foreign` as for RestrictedUnpickler.
        """
        try:
            return _ArchiveUnpickler(self, foreign, load_storage).load()
        except KitError:
            raise
        except Exception as error:  # unpickling raises whatever its objects raise
            raise KitError(f"{self.source} is damaged ({error}): copy it again from its source") from error


class _ArchiveUnpickler(RestrictedUnpickler):
    """Resolves persistent ids to the storages of an archive."""

    def __init__(self, archive: ArchiveReader, foreign: bool, load_storage: LoadStorage | None) -> None:
        super().__init__(archive.pickled, archive.source, foreign=foreign)
        self.archive, self.load_storage = archive, load_storage

    def persistent_load(self, pid: Any) -> PickledStorage:
        """The storage that `pid` references."""
        try:
            storage = storage_of(pid, parts=5)
        except (ValueError, TypeError):
            self.refuse("has a persistent id that torch.save does not write")
        storages = self.archive.storages
        if storage.key not in storages:
            record = self.archive.record_of(storage)
            storages[storage.key] = (
                replace(storage, load=_cached(self.load_storage, storage, record)) if self.load_storage else storage
            )
        return storages[storage.key]


def _cached(load_storage: LoadStorage, storage: PickledStorage, record: Record) -> Callable[[], Any]:
    return cache(partial(load_storage, storage, record))
