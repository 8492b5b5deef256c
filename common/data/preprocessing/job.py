"""What step 1 is to write, of what, and how; and into which parts that falls."""

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
    """What is to be written, of what, and how.

    streams: name to (end of the file's name, dtype), in the order in which files get their final names.
    described: what decides the bytes beside the inputs, in sections ("tokenizer", "settings"); it goes to the manifest
    and into the hash.
    partitions: the runs that share the parts; partition_index: which of them this one is. None: it writes all parts
    and joins them.
    skip_bad_rows: what is there already may have left rows out. It is no part of the hash, so that a run that a bad
    row stopped can be taken up again with ON_ERROR=skip.
    spans: those of `inputs`, where they were looked at already.
    verify_input: a finished run's input is compared by hash, not by size and time.
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
        """The prefix of the finished files of `stream`."""
        return Path(f"{self.output_prefix}_{self.streams[stream][0]}")

    @property
    def folder(self) -> Path:
        """Where the parts lie while the run goes on."""
        return parts_folder(self.output_prefix)

    @cached_property
    def stamps(self) -> list[tuple[int, int]]:
        """(bytes, time of change in ns) of each input, as this run found it."""
        return [(found.st_size, found.st_mtime_ns) for found in (path.stat() for path in self.inputs)]

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the bytes of a part beside what it reads."""
        streams = {name: [end, dtype.str] for name, (end, dtype) in self.streams.items()}
        return {"kind": self.kind, "streams": streams, "described": self.described}

    @cached_property
    def plan(self) -> list[list[Span]]:
        """What each part reads."""
        stamps = self.stamps  # what changes from here on is noticed
        parts = split_into_parts(self.spans or whole_spans(self.inputs, self.max_row_bytes), self.partitions)
        ends = {span.file: span.end for part in parts for span in part}
        for file, path in enumerate(self.inputs):
            if ends.get(file) not in (None, stamps[file][0]):
                raise KitError(f"{path} was changed while it was read: run the same command again")
        return parts

    @cached_property
    def plan_sha256(self) -> str:
        """One hash over the facts, the inputs' sizes and the plan: runs that share the work must agree on it."""
        spans = [[(span.file, span.start, span.end) for span in part] for part in self.plan]
        sizes = [size for size, _ in self.stamps]
        return manifest.hash_json([manifest.VERSION, self.facts, self.partitions, sizes, spans])

    def part(self, number: int) -> Part:
        """Part `number`."""
        spans = self.plan[number]
        return Part(
            prefix=self.folder / f"part_{number:05d}_{self.plan_sha256[:8]}",
            number=number,
            facts_sha256=manifest.hash_json([manifest.VERSION, self.facts]),
            streams={name: dtype for name, (_, dtype) in self.streams.items()},
            spans=spans,
            stamps=[self.stamps[span.file] for span in spans],
        )

    def share(self) -> list[int]:
        """The numbers of the parts that this run writes: those whose middle lies in its share of the bytes."""
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
        """path, size, time of change and hash of each input, as `known` tells it of a file that is as it was.

        known: the inputs of a manifest, in order. All that changed, or with `verify_input` all, is read.
        """
        with ThreadPoolExecutor(self.workers, "hash") as pool:
            return [self._hashed(number, old, lambda *span: SpanHash(pool, *span)) for number, old in enumerate(known)]

    def _hashed(self, number: int, old: dict[str, Any], hashed: Callable[..., SpanHash]) -> dict[str, Any]:
        path, (size, changed) = self.inputs[number], self.stamps[number]
        now = {"path": str(path), "size": size, "mtime_ns": changed}
        told = old.get("blocks_sha256")
        if told and not self.verify_input and {name: old.get(name) for name in now} == now:
            return {**now, "blocks_sha256": told}
        return {**now, "blocks_sha256": hash_of_blocks(hashed(path, 0, size, size).result()["blocks"])}


def parts_folder(output_prefix: Path) -> Path:
    """Where the parts of `output_prefix` lie."""
    return Path(f"{output_prefix}.parts")


def identity_of(kind: str, hashed_inputs: list[dict[str, Any]], described: dict[str, Any]) -> str:
    """One hash over all that decides the result: contents of the inputs in order, tokenizer, settings."""
    contents = [(each["size"], each["blocks_sha256"]) for each in hashed_inputs]
    return manifest.hash_json([manifest.VERSION, kind, contents, described])
