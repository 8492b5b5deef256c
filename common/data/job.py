"""What step 1 is to write, of what, and how; and one part of it on disk."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.data import manifest
from common.data.encoded import BAD_ROWS
from common.data.fingerprint import Fingerprints
from common.data.indexed import IndexedReader, IndexedWriter
from common.data.inputs import Span, Task, tasks
from common.data.reading import MAX_ROW_BYTES
from common.data.rejects import RejectsWriter
from common.data.workers import Encoder, Workers
from common.errors import KitError


@dataclass(frozen=True)
class Job:
    """What is to be written, of what, and how.

    streams: name to (end of the file's name, dtype), in the order in which files get their final names.
    described: what decides the bytes beside the inputs, in sections ("tokenizer", "settings"); it goes to the manifest
    and into the hash.
    partition_index: the one part that this run writes; None: all of them, which are then joined.
    skip_bad_rows: what is there already may have left rows out. It is no part of the hash, so that a run that a bad
    row stopped can be taken up again with ON_ERROR=skip.
    """

    kind: str
    output_prefix: Path
    inputs: list[Path]
    streams: dict[str, tuple[str, np.dtype[Any]]]
    encode: Encoder
    described: dict[str, dict[str, Any]]
    workers: int
    partitions: int
    partition_index: int | None = None
    skip_bad_rows: bool = False
    max_row_bytes: int = MAX_ROW_BYTES

    def final(self, stream: str) -> Path:
        """The prefix of the finished files of `stream`."""
        return Path(f"{self.output_prefix}_{self.streams[stream][0]}")

    @property
    def folder(self) -> Path:
        """Where the parts lie while the run goes on."""
        return parts_folder(self.output_prefix)

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each input."""
        return [path.stat().st_size for path in self.inputs]

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """The inputs' hashes."""
        return Fingerprints(self.inputs, self.workers)

    @property
    def hashed_inputs(self) -> list[dict[str, Any]]:
        """path, size and hash of each input."""
        return [
            {"path": str(path), "size": size, "blocks_sha256": self.fingerprints.whole(number, size)}
            for number, (path, size) in enumerate(zip(self.inputs, self.sizes, strict=True))
        ]

    @property
    def common(self) -> dict[str, Any]:
        """What all parts of this job agree on."""
        return {
            "kind": self.kind,
            "partitions": self.partitions,
            "streams": {name: [end, dtype.str] for name, (end, dtype) in self.streams.items()},
            "described": self.described,
            "inputs": [{"path": str(p), "size": size} for p, size in zip(self.inputs, self.sizes, strict=True)],
        }


def parts_folder(output_prefix: Path) -> Path:
    """Where the parts of `output_prefix` lie."""
    return Path(f"{output_prefix}.parts")


def part_name(number: int) -> str:
    """What the names of the files of part `number` begin with."""
    return f"part_{number:05d}"


def identity_of(kind: str, hashed_inputs: list[dict[str, Any]], described: dict[str, Any]) -> str:
    """One hash over all that decides the result: contents of the inputs in order, tokenizer, settings."""
    contents = [(each["size"], each["blocks_sha256"]) for each in hashed_inputs]
    return manifest.hash_json([manifest.VERSION, kind, contents, described])


class Part:
    """One part of a job: its files and its state, which says of what they are."""

    def __init__(self, job: Job, number: int, spans: list[Span]) -> None:
        self._job, self.number, self._spans = job, number, spans
        self._prefix = job.folder / part_name(number)
        self._state = Path(f"{self._prefix}.json")

    def finished(self) -> dict[str, Any] | None:
        """The state of an earlier run's part when it is whole and of the same input, tokenizer and settings by hash."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            # The inputs' names may differ, their bytes not.
            if any(state["job"][name] != value for name, value in self._job.common.items() if name != "inputs"):
                return None
            if state["counts"].get(BAD_ROWS) and not self._job.skip_bad_rows:
                return None
            if state["blocks"] != self._blocks():
                return None
            for stream in self._job.streams:
                IndexedReader(Path(f"{self._prefix}_{stream}"))
        except (OSError, ValueError, KeyError, KitError):
            return None
        return state

    def write(self, chunk_bytes: int, workers: Workers, bar: tqdm) -> dict[str, Any]:
        """Encodes the part's spans; returns the state, which is written last."""
        self._state.unlink(missing_ok=True)
        counts: Counter[str] = Counter()
        read = 0
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(IndexedWriter(Path(f"{self._prefix}_{name}"), dtype))
                for name, (_, dtype) in self._job.streams.items()
            }
            rejects = stack.enter_context(RejectsWriter(Path(f"{self._prefix}_rejects")))
            for task, encoded in workers.encode(self._tasks(chunk_bytes)):
                for name, writer in writers.items():
                    writer.add_documents(encoded.streams[name], encoded.lengths)
                rejects.add(task, encoded.rejects)
                counts.update(encoded.counts)
                read += task.size if isinstance(task, Span) else len(task.data)
                bar.update(task.size)
        state = {
            "job": self._job.common,
            "number": self.number,
            "blocks": self._blocks(),
            "bytes": read,
            "counts": dict(counts),
            "largest_id": writers["tokens"].largest,
        }
        manifest.write_json(self._state, state)
        return state

    def _tasks(self, chunk_bytes: int) -> Iterator[Task]:
        """The part's pieces; their bytes are hashed while they are still at hand."""
        for span in self._spans:
            at, file = span.start, self._job.inputs.index(span.path)
            for task in tasks(span, chunk_bytes):
                self._job.fingerprints.request(file, at, at + task.size)
                at += task.size
                yield task

    def _blocks(self) -> list[list[Any]]:
        """[number of the input, number of the block, hash] of all that this part reads."""
        found = {}
        for span in self._spans:
            file = self._job.inputs.index(span.path)
            for number, digest in self._job.fingerprints.blocks(file, span.start, span.start + span.size).items():
                found[file, number] = digest
        return [[file, number, digest] for (file, number), digest in sorted(found.items())]
