"""The job of a run of step 1: its inputs, output and encoder, and the parts that it is split into."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset import manifest
from common.data.dataset.file_hash import SpanHash, hash_of_blocks
from common.data.preprocessing.parts import Part
from common.data.preprocessing.workers import Encoder
from common.data.sources.row_blocks import MAX_ROW_BYTES
from common.data.sources.spans import Span, split_into_parts, whole_spans
from common.errors import KitError


@dataclass(frozen=True)
class Job:
    """What to write, from which inputs, and how.

    streams: name to (suffix of the file name, dtype), in the order in which files get their final names.
    described: what determines the output besides the inputs, in sections ("tokenizer", "settings"); it is written to
    the manifest and hashed.
    partitions: the number of runs that share the parts. partition_index: the index of this run, or None when it writes
    and merges all parts.
    skip_bad_rows: existing output may have skipped rows. It is not hashed, so that a run that stopped at a bad row can
    be resumed with ON_ERROR=skip.
    spans: those of `inputs`, if already known.
    verify_input: compare the input of a finished run by hash instead of size and modification time.
    """

    kind: str
    output_prefix: Path
    inputs: list[Path]
    streams: dict[str, tuple[str, np.dtype[Any]]]
    encode: Encoder
    described: dict[str, dict[str, Any]]
    workers: int
    partitions: int = 1
    partition_index: int | None = None
    skip_bad_rows: bool = False
    verify_input: bool = False
    spans: list[Span] | None = None
    max_row_bytes: int = MAX_ROW_BYTES

    def final(self, stream: str) -> Path:
        """The prefix of the final files of `stream`."""
        return Path(f"{self.output_prefix}_{self.streams[stream][0]}")

    @property
    def folder(self) -> Path:
        """The folder of the parts during the run."""
        return parts_folder(self.output_prefix)

    @cached_property
    def stamps(self) -> list[tuple[int, int]]:
        """(bytes, modification time in ns) of each input when this run started."""
        return [(found.st_size, found.st_mtime_ns) for found in (path.stat() for path in self.inputs)]

    @property
    def facts(self) -> dict[str, Any]:
        """What determines the bytes of a part besides its input."""
        streams = {name: [end, dtype.str] for name, (end, dtype) in self.streams.items()}
        return {"kind": self.kind, "streams": streams, "described": self.described}

    @cached_property
    def plan(self) -> list[list[Span]]:
        """The spans that each part reads."""
        stamps = self.stamps  # taken first, so that later changes are detected
        parts = split_into_parts(self.spans or whole_spans(self.inputs, self.max_row_bytes), self.partitions)
        ends = {span.file: span.end for part in parts for span in part}
        for file, path in enumerate(self.inputs):
            if ends.get(file) not in (None, stamps[file][0]):
                raise KitError(f"{path} changed while it was being read: run the same command again")
        return parts

    @cached_property
    def plan_sha256(self) -> str:
        """A hash of the facts, the input sizes and the plan, on which all runs that share the work must agree."""
        spans = [[(span.file, span.start, span.end) for span in part] for part in self.plan]
        sizes = [size for size, _ in self.stamps]
        return manifest.hash_json([manifest.VERSION, self.facts, self.partitions, sizes, spans])

    def part(self, number: int) -> Part:
        """Part `number` of the plan."""
        spans = self.plan[number]
        return Part(
            prefix=self.folder / f"part_{number:05d}_{self.plan_sha256[:8]}",
            number=number,
            facts_sha256=manifest.hash_json([manifest.VERSION, self.facts]),
            streams={name: dtype for name, (_, dtype) in self.streams.items()},
            spans=spans,
            stamps=[self.stamps[span.file] for span in spans],
        )

    def own_parts(self) -> list[int]:
        """The parts that this run writes: those whose middle lies in its partition of the bytes."""
        if self.partition_index is None:
            return list(range(len(self.plan)))
        sizes = [sum(span.size for span in part) for part in self.plan]
        total, before, found = sum(sizes), 0, []
        for number, size in enumerate(sizes):
            if (2 * before + size) * self.partitions // (2 * total) == self.partition_index:
                found.append(number)
            before += size
        return found

    def hashed_inputs(self, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Path, size, modification time and hash of each input; hashes of unchanged files are taken from `known`.

        known: the inputs of a manifest, in order. Changed files, or with `verify_input` all files, are read.
        """
        with ThreadPoolExecutor(self.workers, "hash") as pool:
            return [self._hashed(number, old, lambda *span: SpanHash(pool, *span)) for number, old in enumerate(known)]

    def _hashed(self, number: int, old: dict[str, Any], hashed: Callable[..., SpanHash]) -> dict[str, Any]:
        path, (size, changed) = self.inputs[number], self.stamps[number]
        now = {"path": str(path), "size": size, "mtime_ns": changed}
        known = old.get("blocks_sha256")
        if known and not self.verify_input and {name: old.get(name) for name in now} == now:
            return {**now, "blocks_sha256": known}
        return {**now, "blocks_sha256": hash_of_blocks(hashed(path, 0, size, size).result()["blocks"])}


def parts_folder(output_prefix: Path) -> Path:
    """The folder of the parts of `output_prefix`."""
    return Path(f"{output_prefix}.parts")


def identity_of(kind: str, hashed_inputs: list[dict[str, Any]], described: dict[str, Any]) -> str:
    """A hash of all that determines the output: contents of the inputs in order, tokenizer, settings."""
    contents = [(each["size"], each["blocks_sha256"]) for each in hashed_inputs]
    return manifest.hash_json([manifest.VERSION, kind, contents, described])
