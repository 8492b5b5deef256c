"""One part of step 1 on disk: its `.bin`/`.idx` files, and the state that records what they were made from.

A part is stored in `part_{number}_{plan}` files. Its state, written last, holds the hashes of its input and nothing
about other parts. A later run reuses a part, whatever its number, if it would read the same bytes split at the same
places and encode them in the same way.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset import manifest
from common.data.dataset.file_hash import SpanHash
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from common.data.encoders.encoded import BAD_ROWS, EncodedChunk
from common.data.preprocessing.rejects import RejectsWriter
from common.data.sources.chunks import FileGroup, RowError, Task, split_into_tasks
from common.data.sources.spans import Span
from common.errors import KitError
from common.files import write_json
from common.log import logger

FORMAT, VERSION = "qwen-kit-part", 1
Encode = Callable[[Iterable[Task]], Iterator[tuple[Task, EncodedChunk]]]
Advance = Callable[[int, int], None]  # takes bytes on disk, and rows


@dataclass(frozen=True)
class FinishedPart:
    """A completed part.

    largest_id: the largest token id.
    records: for each span the index, path, size and modification time of its file, its byte range, its number of lines
    and the hashes of `SpanHash`.
    """

    name: str
    facts_sha256: str
    bytes: int
    largest_id: int
    counts: dict[str, int]
    records: list[dict[str, Any]]

    def proof(self) -> list[Any]:
        """What is equal for two parts that read the same bytes in the same spans."""
        return [
            [each["start"], each["end"], each.get("head"), each.get("tail"), _own_blocks(each)] for each in self.records
        ]

    def to_json(self) -> dict[str, Any]:
        """The JSON that `from_json` reads."""
        return {"format": FORMAT, "version": VERSION, **vars(self)}

    @classmethod
    def from_json(cls, value: Any) -> "FinishedPart":
        """The part stored in `value`; raises ValueError when it is malformed."""
        if not isinstance(value, dict) or (value.get("format"), value.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is not the state of a part in version {VERSION}")
        kinds = {"name": str, "facts_sha256": str, "bytes": int, "largest_id": int, "counts": dict, "records": list}
        manifest.check_fields(value, kinds)
        for record in value["records"]:
            manifest.check_fields(record, RECORD)
            if b"\0" in os.fsencode(record["path"]):  # fsencode raises ValueError for a lone surrogate
                raise ValueError("its 'path' is invalid")
        if not all(isinstance(number, int) for number in value["counts"].values()):
            raise ValueError("'counts' holds a value that is not a number")
        return cls(**{name: value[name] for name in kinds})


def _own_blocks(record: dict[str, Any]) -> list[str]:
    """The blocks that end in the span."""
    blocks: list[str] = record["blocks"]
    return blocks[:-1] if "tail" in record else blocks


RECORD: dict[str, type] = {
    "file": int, "path": str, "size": int, "mtime_ns": int, "start": int, "end": int, "lines": int, "blocks": list,
}  # fmt: skip


def read_value(path: Path) -> Any:
    """The JSON in `path`; raises OSError, or ValueError when it is malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_state(path: Path) -> FinishedPart:
    """The part whose state is in `path`; raises OSError, or ValueError when it is malformed."""
    return FinishedPart.from_json(read_value(path))


class EarlierParts:
    """The completed parts in a folder, by their spans."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[Any, list[FinishedPart]] = {}
        for path in sorted(folder.glob("part_*.json")):
            try:
                state = read_state(path)
            except (OSError, ValueError) as error:
                logger.warning("%s is ignored: %s", path, error)
                continue
            self._found.setdefault(self._key(state.facts_sha256, state.records), []).append(state)

    def _key(self, facts_sha256: str, records: list[dict[str, Any]]) -> Any:
        return facts_sha256, tuple((each["start"], each["end"]) for each in records)

    def find(self, part: "Part", pool: Executor, skip_bad_rows: bool) -> FinishedPart | None:
        """A completed part equal to `part`: its files are intact, and its input had the same hashes."""
        spans = [{"start": span.start, "end": end} for span, end in zip(part.spans, part.ends(), strict=True)]
        for state in self._found.get(self._key(part.facts_sha256, spans), []):
            if state.counts.get(BAD_ROWS) and not skip_bad_rows:
                continue
            lines = [each["lines"] for each in state.records]
            now = FinishedPart(
                state.name, state.facts_sha256, state.bytes, state.largest_id, state.counts, part.records(pool, lines)
            )
            if now.proof() == state.proof() and is_complete(self._folder / state.name, part.streams):
                part.check_unchanged()
                return now
        return None


def is_complete(prefix: Path, streams: Iterable[str]) -> bool:
    """Whether the files of the part at `prefix` exist and have the length in their headers."""
    try:
        for stream in streams:
            IndexedDataset(Path(f"{prefix}_{stream}"))
    except (OSError, ValueError, KitError):
        return False
    return True


@dataclass(frozen=True)
class Part:
    """One part of a job: its output prefix, and the spans that it reads.

    facts_sha256: a hash of what determines its bytes besides its input.
    stamps: (bytes, modification time in ns) of each span's file.
    """

    prefix: Path
    number: int
    facts_sha256: str
    streams: dict[str, np.dtype[Any]]
    spans: list[Span]
    stamps: list[tuple[int, int]]

    @property
    def sequential(self) -> bool:
        """Whether all its files can only be read sequentially."""
        return all(span.end is None for span in self.spans)

    @property
    def disk_bytes(self) -> int:
        """The bytes that it reads from disk."""
        return sum(end - span.start for span, end in zip(self.spans, self.ends(), strict=True))

    def ends(self) -> list[int]:
        """Where each span ends in its file."""
        return [size if span.end is None else span.end for span, (size, _) in zip(self.spans, self.stamps, strict=True)]

    def check_unchanged(self) -> None:
        """Raises KitError when a file has changed since the run started."""
        for span, stamp in zip(self.spans, self.stamps, strict=True):
            found = span.path.stat()
            if (found.st_size, found.st_mtime_ns) != stamp:
                raise KitError(f"{span.path} changed while it was being read: run the same command again")

    def records(self, pool: Executor, lines: list[int], hashes: list[SpanHash] | None = None) -> list[dict[str, Any]]:
        """The records of the spans; lines: their numbers of lines. Without `hashes` the spans are read and hashed."""
        hashes = hashes or self._hashes(pool)
        for each in hashes:
            each.request()
        return [
            {
                "file": span.file, "path": str(span.path), "size": size, "mtime_ns": changed,
                "start": span.start, "end": end, "lines": number, **hashed.result(),
            }
            for span, end, (size, changed), number, hashed in zip(
                self.spans, self.ends(), self.stamps, lines, hashes, strict=True
            )
        ]  # fmt: skip

    def _hashes(self, pool: Executor) -> list[SpanHash]:
        return [
            SpanHash(pool, span.path, span.start, end, size)
            for span, end, (size, _) in zip(self.spans, self.ends(), self.stamps, strict=True)
        ]

    def write(self, encode: Encode, chunk_bytes: int, pool: Executor, advance: Advance) -> FinishedPart:
        """Encodes the spans and writes the state last; returns the completed part.

        Raises RowError for a bad row, with the number of lines before it in its span when its line is unknown.
        """
        state_path = Path(f"{self.prefix}.json")
        state_path.unlink(missing_ok=True)
        counts: Counter[str] = Counter()
        lines, read = [0] * len(self.spans), 0
        hashes, order = self._hashes(pool), deque[list[int]]()
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(IndexedDatasetBuilder(Path(f"{self.prefix}_{name}"), dtype))
                for name, dtype in self.streams.items()
            }
            rejects = stack.enter_context(RejectsWriter(Path(f"{self.prefix}_rejects")))
            try:
                for task, encoded in encode(self._tasks(chunk_bytes, hashes, order)):
                    for name, writer in writers.items():
                        writer.add_documents(encoded.streams[name], encoded.lengths)
                    counts.update(encoded.counts)
                    for number, piece in zip(order.popleft(), encoded.read, strict=True):
                        rejects.add(number, lines[number], piece.rejects)
                        lines[number] += piece.lines
                        read += piece.text_bytes
                        hashes[number].set_known(piece.sha256)
                    advance(task.size, encoded.counts["read"])
            except RowError as error:
                raise error if error.place else error.after(lines[order[0][0]]) from None
            records = self.records(pool, lines, hashes)
            self.check_unchanged()
        finished = FinishedPart(
            self.prefix.name, self.facts_sha256, read, int(writers["tokens"].largest), dict(counts), records
        )
        write_json(state_path, finished.to_json(), indent=None)
        return finished

    def _tasks(self, chunk_bytes: int, hashes: list[SpanHash], order: deque[list[int]]) -> Iterator[Task]:
        """The tasks of all spans; starts hashing their bytes while they are in the page cache."""
        at = [span.start for span in self.spans]
        for task, numbers in split_into_tasks(self.spans, chunk_bytes):
            if len(numbers) == 1 and not isinstance(task, FileGroup):
                at[numbers[0]] += task.size
                hashes[numbers[0]].request(at[numbers[0]])
            order.append(numbers)
            yield task
