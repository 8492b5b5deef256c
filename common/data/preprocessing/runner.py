"""Runs a job of step 1, for pretraining and fine-tuning.

The inputs are split into parts of fixed size. Each part is encoded into its own files in `{OUTPUT_PREFIX}.parts/`, with
a state that records its input. Then the parts are merged into the final files, and the manifest is written last. The
same command resumes an interrupted run: it reuses every part that would read the same bytes, by hash, and encode them
in the same way. `merge` combines runs that share the work by PARTITION_INDEX, on any machines that see the folder.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.data.preprocessing import merging, partitions
from common.data.preprocessing.existing_output import find_finished
from common.data.preprocessing.job import Job
from common.data.preprocessing.parts import EarlierParts, FinishedPart, Part
from common.data.preprocessing.reports import report, report_partition, report_reused
from common.data.preprocessing.workers import Workers, encode_in_worker
from common.data.sources.chunks import RowError
from common.errors import KitError, writing
from common.folders import check_writable
from common.locks import lock
from common.log import logger
from common.progress import Progress

MAX_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 1 << 16
MIN_SEQUENTIAL_PARTS = 4  # from here on, workers that decompress for themselves are faster than one for all


def run(job: Job) -> dict[str, Any] | None:
    """The manifest that `job` wrote, or that an equal job wrote before; None when it wrote one partition.

    Raises KitError when other files exist at the output prefix, a worker dies, or writing fails.
    """
    started = time.monotonic()
    with writing(job.output_prefix):
        done = find_finished(job)
        if done:
            if job.folder.exists():
                with locked(job.folder, None):
                    merging.remove_parts(job.folder)
            logger.info("%s is already finished, with the same input, tokenizer and settings", job.output_prefix)
            return done
        job.folder.mkdir(parents=True, exist_ok=True)
        with locked(job.folder, job.partition_index):
            try:
                return _run(job, started)
            except OSError:
                logger.info("finished parts are kept in %s: the same command continues from them", job.folder)
                raise


def check(job: Job) -> None:
    """Raises KitError when `run` would reject `job` before reading a row."""
    find_finished(job)
    check_writable(job.folder, f"OUTPUT_PREFIX={job.output_prefix}")


@contextmanager
def locked(folder: Path, partition: int | None) -> Iterator[None]:
    """Locks the folder of parts, or one partition in it; raises KitError when another process has locked it."""
    names = [("lock", False)] if partition is None else [("lock", True), (f"lock_{partition:05d}", False)]
    streams = [(folder / name).open("a+") for name, _ in names]
    taken = KitError(f"another run is writing {folder}: wait for it, or change OUTPUT_PREFIX")
    try:
        for stream, (name, shared) in zip(streams, names, strict=True):
            lock(stream.fileno(), folder / name, shared=shared)
            if not _is_still(folder / name, stream.fileno()):
                raise taken
        yield
    except BlockingIOError as error:
        raise taken from error
    finally:
        for stream in streams:
            stream.close()


def _is_still(path: Path, handle: int) -> bool:
    """Whether `path` still is the open file `handle`, and was not removed by the run that held the lock before."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _run(job: Job, started: float) -> dict[str, Any] | None:
    share = {number: job.part(number) for number in job.own_parts()}
    if job.partition_index is not None:
        partitions.remove_record(job)
    done: dict[int, FinishedPart] = {}
    with (
        Workers(job.encode, job.workers) as workers,
        ThreadPoolExecutor(job.workers, "hash") as pool,  # created after the workers were forked
        Progress(sum(part.disk_bytes for part in share.values())) as progress,
    ):
        earlier = EarlierParts(job.folder)
        for number, part in share.items():
            if found := earlier.find(part, pool, job.skip_bad_rows):
                done[number] = found
                progress.skip(part.disk_bytes)
        if done:
            report_reused(sorted(done), len(job.plan))
        encoded = 0
        for number, finished in _write(job, share, done, WriteContext(workers, pool, progress)):
            done[number] = finished
            encoded += finished.bytes
    for part in share.values():
        part.check_unchanged()
    parts = [done[number] for number in sorted(done)]
    seconds = time.monotonic() - started
    if job.partition_index is not None:
        partitions.write_record(job, parts)
        report_partition(job, parts, encoded, seconds)
        return None
    content = merging.merge_parts(job.output_prefix, job.facts, parts)
    report(job.output_prefix, content, encoded, time.monotonic() - started)
    return content


class WriteContext(NamedTuple):
    """What writing parts needs: encoding processes, hashing threads, and the progress log."""

    workers: Workers
    pool: ThreadPoolExecutor
    progress: Progress


def _write(
    job: Job, share: dict[int, Part], done: dict[int, FinishedPart], context: WriteContext
) -> Iterator[tuple[int, FinishedPart]]:
    """Writes each part of `share` that is not `done`; yields (number, completed part).

    A sequential part is decompressed by one process. With enough of them, each is written by one worker, which also
    encodes it; otherwise this process reads and all workers encode.
    """
    waiting = [number for number in share if number not in done]
    total = sum(share[number].disk_bytes for number in waiting)
    chunk_bytes = min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, total // (job.workers * 8)))
    sequential = [number for number in waiting if share[number].sequential]
    if job.workers == 1 or len(sequential) < min(job.workers, MIN_SEQUENTIAL_PARTS):
        sequential = []
    write = partial(_write_in_worker, chunk_bytes)
    made = context.workers.call(write, [share[number] for number in sequential]) if sequential else []
    for number, finished in zip(sequential, made, strict=True):
        context.progress.advance(share[number].disk_bytes, finished.counts["read"])
        yield number, finished
    for number in waiting:
        if number in sequential:
            continue
        part = share[number]
        try:
            yield number, part.write(context.workers.encode, chunk_bytes, context.pool, context.progress.advance)
        except RowError as error:
            raise _with_line(error, part, done) from None


def _write_in_worker(chunk_bytes: int, part: Part) -> FinishedPart:
    with ThreadPoolExecutor(1, "hash") as pool:
        return part.write(encode_in_worker, chunk_bytes, pool, lambda *_: None)


def _with_line(error: RowError, part: Part, done: dict[int, FinishedPart]) -> RowError:
    """`error` with its line number, if all parts before it in its file are done."""
    if error.place:
        return error
    starts = zip(part.spans, part.ends(), strict=True)
    span = next(span for span, end in starts if span.path == error.path and span.start <= error.byte < end)
    lines = at = 0
    for number in sorted(done):
        for record in done[number].records:
            if record["file"] == span.file and record["start"] == at < span.start:
                lines, at = lines + record["lines"], record["end"]
    return error.at_line(lines + error.lines + 1) if at == span.start else error


def merge(output_prefix: Path, check: bool = False) -> dict[str, Any]:
    """Merges all partitions of `output_prefix`; returns the manifest, or with `check` only the facts of the job."""
    folder = partitions.require_parts_folder(output_prefix)
    started = time.monotonic()
    with writing(output_prefix), locked(folder, None):
        records = partitions.read_records(folder)
        if check:
            return records[0].facts
        parts = [part for record in records for part in record.parts]
        content = merging.merge_parts(output_prefix, records[0].facts, parts)
    report(output_prefix, content, sum(part.bytes for part in parts), time.monotonic() - started)
    return content
