"""The frame of step 1, for pretraining and fine-tuning alike.

The inputs are cut into parts; each is encoded into files of its own in `{OUTPUT_PREFIX}.parts/`, with a state that
says of what; then the parts are joined by copy, get their final names, and the manifest is written last. A run that
was ended at any moment is taken up again by the same command: a part is used again only if the inputs, the tokenizer
and the settings are the same by hash.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.data import manifest
from common.data.indexed import IndexedReader, IndexedWriter, bin_path, idx_path, sync_folder
from common.data.inputs import Span, cut, read_chunks
from common.data.workers import Encoder, Workers
from common.errors import KitError
from common.log import logger

MAX_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 1 << 16
DROPPED = "dropped: "
PROGRESS_OF = {"read", "supervised"}


@dataclass(frozen=True)
class Job:
    """What is to be written, of what, and how.

    streams: name to (end of the file's name, dtype), in the order in which files get their final names.
    described: what decides the bytes beside the inputs, in sections ("tokenizer", "settings"); it goes to the manifest
    and into the hash.
    """

    kind: str
    output_prefix: Path
    inputs: list[Path]
    streams: dict[str, tuple[str, np.dtype[Any]]]
    encode: Encoder
    described: dict[str, dict[str, Any]]
    workers: int
    partitions: int

    def final(self, stream: str) -> Path:
        """The prefix of the finished files of `stream`."""
        return Path(f"{self.output_prefix}_{self.streams[stream][0]}")

    @property
    def folder(self) -> Path:
        """Where the parts lie while the run goes on."""
        return Path(f"{self.output_prefix}.parts")

    @cached_property
    def hashed_inputs(self) -> list[dict[str, Any]]:
        """path, size and sha256 of each input."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(_hash_file, self.inputs))

    @cached_property
    def identity(self) -> str:
        """One hash over all that decides the result: contents of the inputs in order, tokenizer, settings."""
        contents = [(each["size"], each["sha256"]) for each in self.hashed_inputs]
        return manifest.hash_json([manifest.VERSION, self.kind, contents, self.described])


def _hash_file(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"path": str(path), "size": size, "sha256": digest.hexdigest()}


def run(job: Job) -> dict[str, Any]:
    """The manifest of what `job` wrote, or of what lay there finished already.

    Raises KitError when something else lies at the output prefix, a worker dies, or the disk refuses.
    """
    started = time.monotonic()
    done = find_finished(job)
    try:
        if done:
            if job.folder.exists():
                _remove_parts(job.folder)
            logger.info("%s is finished already, of the same input, tokenizer and settings", job.output_prefix)
            return done
        job.folder.mkdir(parents=True, exist_ok=True)
        with _locked(job.folder):
            return _run(job, started)
    except OSError as error:
        raise KitError(
            f"{job.output_prefix} cannot be written: {error}: mend it and run the same command again;"
            " finished parts are kept"
        ) from error


def find_finished(job: Job) -> dict[str, Any] | None:
    """The manifest of a finished run of the same job; raises KitError when other files lie in its place."""
    content = manifest.read(job.output_prefix)
    finals = [path for name in job.streams for path in (bin_path(job.final(name)), idx_path(job.final(name)))]
    there = [path for path in finals if path.exists()]
    if content is None:
        if there and not job.folder.exists():
            raise KitError(f"{there[0]} is there, and nothing tells what it is of: remove it or change OUTPUT_PREFIX")
        return None
    if content["identity"] != job.identity:
        raise KitError(
            f"{manifest.manifest_path(job.output_prefix)} tells of other input, tokenizer or settings"
            f" ({_difference(content, job)}): remove it and its files, or change OUTPUT_PREFIX"
        )
    if len(there) < len(finals):
        raise KitError(f"{manifest.manifest_path(job.output_prefix)} is there but not its files: remove it to go on")
    return content


def _difference(content: dict[str, Any], job: Job) -> str:
    """The names of what differs between a manifest and `job`."""
    names = []
    for section, new in job.described.items():
        old = content.get(section, {})
        names += sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if [each["sha256"] for each in content["inputs"]] != [each["sha256"] for each in job.hashed_inputs]:
        names.insert(0, "input")
    return ", ".join(names)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder of parts for this process; raises KitError when another one has it."""
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KitError(f"another run writes {folder}: wait for it, or change OUTPUT_PREFIX") from error
        yield


def _run(job: Job, started: float) -> dict[str, Any]:
    before = [path.stat() for path in job.inputs]
    total = sum(each.st_size for each in before)
    size = min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, total // (job.workers * 8)))
    counts: Counter[str] = Counter()
    encoded = 0
    with Workers(job.encode, job.workers) as workers, _progress(total) as bar:
        for number, spans in enumerate(cut(job.inputs, job.partitions)):
            part = Part(job, number)
            state = part.finished()
            if state is None:
                state = part.write(spans, size, workers, bar)
                encoded += state["bytes"]
            counts.update(state["counts"])
    _check_unchanged(job.inputs, before)
    if counts["read"] == sum(dropped(counts).values()):
        _remove_parts(job.folder)
        raise KitError(f"INPUT holds no document: {counts['read']} rows were read and {dropped(counts)} dropped")
    _join(job)
    content = _describe(job, counts)
    manifest.write(job.output_prefix, content)
    _remove_parts(job.folder)
    _report(job, content, encoded, time.monotonic() - started)
    return content


def dropped(counts: Counter[str]) -> dict[str, int]:
    """Cause to number of the documents that were not kept."""
    return {cause.removeprefix(DROPPED): number for cause, number in counts.items() if cause.startswith(DROPPED)}


def _check_unchanged(paths: list[Path], before: list[os.stat_result]) -> None:
    for path, old in zip(paths, before, strict=True):
        new = path.stat()
        if (new.st_size, new.st_mtime_ns) != (old.st_size, old.st_mtime_ns):
            raise KitError(f"{path} was changed while it was read: run the same command again")


def _progress(total: int) -> tqdm:
    """A bar over the inputs' bytes when a person watches."""
    return tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())


class Part:
    """One part of a job: its files and its state."""

    def __init__(self, job: Job, number: int) -> None:
        self._job, self._number = job, number
        self._name = f"part_{number:05d}"
        self._state = job.folder / f"{self._name}.json"
        self._identity = manifest.hash_json([job.identity, job.partitions, number])

    def prefix(self, stream: str) -> Path:
        """The prefix of this part's files of `stream`."""
        return self._job.folder / f"{self._name}_{stream}"

    def finished(self) -> dict[str, Any] | None:
        """The state of an earlier run's part when it is whole and of the same hash."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            if state["identity"] != self._identity:
                return None
            for stream in self._job.streams:
                IndexedReader(self.prefix(stream))
        except (OSError, ValueError, KitError):
            return None
        logger.info("part %d of %d is there from an earlier run", self._number + 1, self._job.partitions)
        return state

    def write(self, spans: list[Span], chunk_bytes: int, workers: Workers, bar: tqdm) -> dict[str, Any]:
        """Encodes `spans`; returns the state, which is written last."""
        self._state.unlink(missing_ok=True)
        counts: Counter[str] = Counter()
        read = 0
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(IndexedWriter(self.prefix(name), dtype))
                for name, (_, dtype) in self._job.streams.items()
            }
            chunks = (chunk for span in spans for chunk in read_chunks(span, chunk_bytes))
            for chunk, encoded in workers.encode(chunks):
                for name, writer in writers.items():
                    writer.add_documents(encoded.streams[name], encoded.lengths)
                counts.update(encoded.counts)
                read += len(chunk.data)
                bar.update(chunk.size)
        state = {"identity": self._identity, "bytes": read, "counts": dict(counts)}
        manifest.write_json(self._state, state)
        return state


def _join(job: Job) -> None:
    """Gives the parts' files, joined in order, their final names; a single part is renamed."""
    parts = [Part(job, number) for number in range(job.partitions)]
    for name, (_, dtype) in job.streams.items():
        final = job.final(name)
        if len(parts) == 1:
            for path in (bin_path, idx_path):
                path(parts[0].prefix(name)).replace(path(final))
            sync_folder(final.parent)
            continue
        with IndexedWriter(final, dtype) as writer:
            for part in parts:
                writer.append(part.prefix(name))


def _describe(job: Job, counts: Counter[str]) -> dict[str, Any]:
    """The manifest's content."""
    tokens = IndexedReader(job.final("tokens"))
    return {
        "kind": job.kind,
        "identity": job.identity,
        "files": {name: job.final(name).name for name in job.streams},
        **job.described,
        "inputs": job.hashed_inputs,
        "documents": {"read": counts["read"], "kept": len(tokens), "dropped": dropped(counts)},
        "tokens": tokens.num_tokens,
        "supervised_tokens": counts.get("supervised", tokens.num_tokens),
        "longest": int(tokens.lengths.max(initial=0)),
        "notes": {name: n for name, n in counts.items() if n and name not in PROGRESS_OF and name[:9] != DROPPED},
    }


def _remove_parts(folder: Path) -> None:
    """Removes what a run puts in the folder of parts, and the folder when nothing else is in it."""
    for path in [*folder.glob("part_*"), folder / "lock"]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _report(job: Job, content: dict[str, Any], encoded: int, seconds: float) -> None:
    documents = content["documents"]
    for cause, number in documents["dropped"].items():
        if number:
            logger.info("dropped, %s: %d documents", cause, number)
    for note, number in content["notes"].items():
        logger.info("%s: %d", note, number)
    learned = f", {content['supervised_tokens']} of them learned" if "loss_mask" in job.streams else ""
    logger.info(
        "%d documents, %d tokens%s, the longest document %d; %.1f MB in %.1f s = %.2f MB/s",
        documents["kept"], content["tokens"], learned, content["longest"],
        encoded / 1e6, seconds, encoded / 1e6 / max(seconds, 1e-9),
    )  # fmt: skip
    logger.info("written: %s", ", ".join(f"{job.final(name)}.bin/.idx" for name in job.streams))
    logger.info("DATASET_PATH=%s", job.output_prefix)
