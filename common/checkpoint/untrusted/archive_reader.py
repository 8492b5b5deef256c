"""An archive of torch.save, of which the pickle is read; its storages only where they are asked for."""

import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.checkpoint.untrusted.pickled_tensors import PickledStorage, storage_of
from common.checkpoint.untrusted.restricted_unpickler import RestrictedUnpickler
from common.checkpoint.untrusted.zip_records import Read, Record, read_data_start, read_records
from common.errors import KitError

Make = Callable[[PickledStorage, Record], Any]


class ArchiveReader:
    """The archive of `length` bytes that `read` reads; raises KitError, naming `source`, where it is none."""

    def __init__(self, read: Read, length: int, source: Path) -> None:
        self.read, self.source = read, source
        self.storages: dict[str, PickledStorage] = {}  # that the pickle names
        try:
            self.records = read_records(read, length)
            self.pickled = self.data("data.pkl")
            order = self.data("byteorder") if "byteorder" in self.records else b"little"
        except (ValueError, IndexError, struct.error) as error:
            raise KitError(f"{source} is no whole file of torch.save ({error}): copy it again") from error
        if order != b"little":
            raise KitError(f"{source} was written big-endian: convert it on the machine that wrote it")

    def data(self, name: str) -> bytes:
        """The bytes of a record; raises ValueError where it is not whole."""
        record = self.records[name]
        data = self.read(read_data_start(self.read, record), record.size)
        if len(data) != record.size:
            raise ValueError(f"its record {name} is cut short")
        return data

    def record_of(self, storage: PickledStorage) -> Record:
        """Where its bytes are; raises ValueError where they are not all there.

        torch takes the size from the pickle, and reads on behind a record that is smaller.
        """
        record = self.records.get(f"data/{storage.key}")
        if record is None or record.size < storage.num_bytes:
            raise ValueError(f"record data/{storage.key} is missing or too short")
        return record

    def check_storages(self, storages: Iterable[PickledStorage]) -> None:
        """Raises KitError unless the bytes of `storages`, of the same pickle in another archive, are all here."""
        try:
            for storage in storages:
                self.record_of(storage)
        except ValueError as error:
            raise KitError(f"{self.source} is damaged ({error}): copy it again from where it came") from error

    def load(self, *, foreign: bool = False, make: Make | None = None) -> Any:
        """The object: with `make`, which gives a storage's own, with its tensors; else with stubs for them.

        Raises KitError when it is damaged, or could run code; `foreign` as for RestrictedUnpickler.
        """
        try:
            return _ArchiveUnpickler(self, foreign, make).load()
        except KitError:
            raise
        except Exception as error:  # pickle lets out whatever its objects raise
            raise KitError(f"{self.source} is damaged ({error}): copy it again from where it came") from error


class _ArchiveUnpickler(RestrictedUnpickler):
    """Gives each storage the bytes of its record."""

    def __init__(self, archive: ArchiveReader, foreign: bool, make: Make | None) -> None:
        super().__init__(archive.pickled, archive.source, foreign=foreign)
        self.archive, self.make = archive, make

    def persistent_load(self, pid: Any) -> PickledStorage:
        """The storage that `pid` names."""
        try:
            storage = storage_of(pid, parts=5)
        except (ValueError, TypeError):
            self.refuse("names a storage otherwise than torch.save does")
        storages = self.archive.storages
        if storage.key not in storages:
            record = self.archive.record_of(storage)
            storages[storage.key] = replace(storage, make=_once(self.make, storage, record)) if self.make else storage
        return storages[storage.key]


def _once(make: Make, storage: PickledStorage, record: Record) -> Callable[[], Any]:
    made: list[Any] = []

    def give() -> Any:
        if not made:
            made.append(make(storage, record))
        return made[0]

    return give
