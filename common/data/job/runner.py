"""The frame of step 1, for pretraining and fine-tuning alike.

The inputs are cut into parts, by file at fixed sizes; each is encoded into files of its own in
`{OUTPUT_PREFIX}.parts/`, with a state that says of what; then the parts are joined by copy, get their final names, and
the manifest is written last. A run that was ended at any moment is taken up again by the same command: a part is used
again wherever the same bytes would be read and encoded in the same way, by hash. Runs that share the work by
PARTITION_INDEX, on any machines that see the folder, are joined by `merge`.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common.data.dataset import manifest
from common.data.dataset.indexed import bin_path, idx_path
from common.data.job import merging
from common.data.job.job import Job, identity_of
from common.data.job.parts import Earlier, Finished, Part
from common.data.job.rejects import rejects_path
from common.data.job.workers import Workers, encode_here
from common.data.sources.inputs import RowError
from common.data.tokenizer.encoded import BAD_ROWS, DROPPED
from common.errors import KitError, writing
from common.folders import check_writable
from common.locks import lock
from common.log import listed, logger
from common.progress import Progress

__all__ = ["Job", "run"]

MAX_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 1 << 16
FEW = 4  # processes that decompress and encode are then as fast as one that decompresses for the others


def run(job: Job) -> dict[str, Any] | None:
    """The manifest of what `job` wrote, or of what lay there finished already; None when it wrote a share of it.

    Raises KitError when something else lies at the output prefix, a worker dies, or the disk refuses.
    """
    started = time.monotonic()
    with writing(job.output_prefix):
        done = find_finished(job)
        if done:
            if job.folder.exists():
                with locked(job.folder, None):
                    merging.remove_parts(job.folder)
            logger.info("%s is finished already, of the same input, tokenizer and settings", job.output_prefix)
            return done
        job.folder.mkdir(parents=True, exist_ok=True)
        with locked(job.folder, job.partition_index):
            try:
                return _run(job, started)
            except OSError:
                logger.info("finished parts are kept in %s: the same command continues from them", job.folder)
                raise


def check(job: Job) -> None:
    """Raises KitError when `run` would refuse `job` before it reads a row."""
    find_finished(job)
    check_writable(job.folder, f"OUTPUT_PREFIX={job.output_prefix}")


def find_finished(job: Job) -> dict[str, Any] | None:
    """The manifest of a finished run of the same job; raises KitError when other files lie in its place."""
    content = manifest.read(job.output_prefix)
    finals = [path for name in job.streams for path in (bin_path(job.final(name)), idx_path(job.final(name)))]
    there = [path for path in finals if path.exists()]
    if content is None:
        if there and not job.folder.exists():
            raise KitError(f"{there[0]} is there, and nothing tells what it is of: remove it or change OUTPUT_PREFIX")
        return None
    try:
        manifest.check_fields(content, {"identity": str, "inputs": list, "documents": dict})
    except ValueError as error:
        path = manifest.manifest_path(job.output_prefix)
        raise KitError(f"{path} is no whole manifest: {error}: remove it and its files to write them again") from error
    differs = _difference(content, job)
    if differs:
        raise KitError(
            f"{manifest.manifest_path(job.output_prefix)} tells of other input, tokenizer or settings"
            f" ({', '.join(differs)}): remove it and its files, or change OUTPUT_PREFIX"
        )
    if len(there) < len(finals):
        raise KitError(f"{manifest.manifest_path(job.output_prefix)} is there but not its files: remove it to go on")
    return content


def _difference(content: dict[str, Any], job: Job) -> list[str]:
    """The names of what differs between a manifest and `job`; the input is read only where nothing else does."""
    names = []
    for section, new in job.described.items():
        old = content.get(section, {})
        names += sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    inputs = content.get("inputs", [])
    if [each["size"] for each in inputs] != [size for size, _ in job.stamps]:
        names.insert(0, "input")
    if content["version"] != manifest.VERSION:
        names.append(f"the kit's version {content['version']} of a manifest, now {manifest.VERSION}")
    if not names:
        hashed = job.hashed_inputs(inputs)
        if [each.get("blocks_sha256") for each in inputs] != [each["blocks_sha256"] for each in hashed]:
            return ["input"]
        if content.get("identity") != identity_of(job.kind, hashed, job.described):
            return ["identity"]
        if BAD_ROWS.removeprefix(DROPPED) in content["documents"]["dropped"] and not job.skip_bad_rows:
            return ["ON_ERROR=skip left rows out"]
    return names


@contextmanager
def locked(folder: Path, share: int | None) -> Iterator[None]:
    """Holds the folder of parts, or one share in it, for this process; raises KitError when another one has it."""
    names = [("lock", False)] if share is None else [("lock", True), (f"lock_{share:05d}", False)]
    streams = [(folder / name).open("a+") for name, _ in names]
    taken = KitError(f"another run writes {folder}: wait for it, or change OUTPUT_PREFIX")
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
    """Whether `path` is the open file `handle`, and not removed by the run that held it before."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _run(job: Job, started: float) -> dict[str, Any] | None:
    share = {number: job.part(number) for number in job.share()}
    if job.partition_index is not None:
        merging.withdraw(job)
    done: dict[int, Finished] = {}
    with (
        Workers(job.encode, job.workers) as workers,
        ThreadPoolExecutor(job.workers, "hash") as pool,  # its threads come after the workers were forked
        Progress(sum(part.disk_bytes for part in share.values())) as progress,
    ):
        earlier = Earlier(job.folder)
        for number, part in share.items():
            if found := earlier.find(part, pool, job.skip_bad_rows):
                done[number] = found
                progress.skip(part.disk_bytes)
        if done:
            _report_earlier(sorted(done), len(job.plan))
        encoded = 0
        for number, finished in _write(job, share, done, Tools(workers, pool, progress)):
            done[number] = finished
            encoded += finished.bytes
    for part in share.values():
        part.check_unchanged()
    parts = [done[number] for number in sorted(done)]
    seconds = time.monotonic() - started
    if job.partition_index is not None:
        merging.claim(job, parts)
        _report_share(job, parts, encoded, seconds)
        return None
    content = merging.finish(job.output_prefix, job.facts, parts)
    report(job.output_prefix, content, encoded, time.monotonic() - started)
    return content


class Tools(NamedTuple):
    """What the writing of parts uses: processes that encode, threads that hash, and what tells how far it is."""

    workers: Workers
    pool: ThreadPoolExecutor
    progress: Progress


def _write(job: Job, share: dict[int, Part], done: dict[int, Finished], tools: Tools) -> Iterator[tuple[int, Finished]]:
    """The number of each part of `share` that is not `done`, and what it is when it is written.

    A part that can be read from its beginning only is decompressed by one process: where there are several of them,
    each is a worker's own, whose encoder it uses; else this process reads and all workers encode.
    """
    waiting = [number for number in share if number not in done]
    total = sum(share[number].disk_bytes for number in waiting)
    chunk_bytes = min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, total // (job.workers * 8)))
    alone = [number for number in waiting if share[number].alone]
    if job.workers == 1 or len(alone) < min(job.workers, FEW):
        alone = []
    write = partial(_write_alone, chunk_bytes)
    made = tools.workers.call(write, [share[number] for number in alone]) if alone else []
    for number, finished in zip(alone, made, strict=True):
        tools.progress.advance(share[number].disk_bytes, finished.counts["read"])
        yield number, finished
    for number in waiting:
        if number in alone:
            continue
        try:
            yield number, share[number].write(tools.workers.encode, chunk_bytes, tools.pool, tools.progress.advance)
        except RowError as error:
            raise _with_line(error, share[number], done) from None


def _write_alone(chunk_bytes: int, part: Part) -> Finished:
    with ThreadPoolExecutor(1, "hash") as pool:
        return part.write(encode_here, chunk_bytes, pool, lambda *_: None)


def _with_line(error: RowError, part: Part, done: dict[int, Finished]) -> RowError:
    """`error` with its line, where all that stands before it in its file is known."""
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
    """The manifest of the parts of `output_prefix` joined; with `check` only what they are of, if they can be."""
    folder = merging.need_folder(output_prefix)
    started = time.monotonic()
    with writing(output_prefix), locked(folder, None):
        claims = merging.read_claims(folder)
        if check:
            return claims[0].facts
        parts = [part for claim in claims for part in claim.parts]
        content = merging.finish(output_prefix, claims[0].facts, parts)
    report(output_prefix, content, sum(part.bytes for part in parts), time.monotonic() - started)
    return content


def _report_earlier(numbers: list[int], of: int) -> None:
    """Says which parts are taken up; numbered from 1."""
    told = listed([number + 1 for number in numbers])
    form = (
        "part %s of %d is there from an earlier run"
        if len(numbers) == 1
        else "parts %s of %d are there from an earlier run"
    )
    logger.info(form, told, of)


def _report_share(job: Job, parts: list[Finished], encoded: int, seconds: float) -> None:
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    _report_counts(merging.dropped(counts), merging.notes(counts))
    assert job.partition_index is not None
    logger.info(
        "part %d of %d is written: %d rows; %s; the last step is `python -m common.preprocess merge`",
        job.partition_index + 1, job.partitions, counts["read"], _speed(encoded, seconds),
    )  # fmt: skip


def _report_counts(dropped: dict[str, int], notes: dict[str, int]) -> None:
    for cause, number in dropped.items():
        if number:
            logger.info("dropped, %s: %d documents", cause, number)
    for note, number in notes.items():
        logger.info("%s: %d", note, number)


def _speed(encoded: int, seconds: float) -> str:
    return f"{encoded / 1e6:.1f} MB in {seconds:.1f} s = {encoded / 1e6 / max(seconds, 1e-9):.2f} MB/s"


def report(output_prefix: Path, content: dict[str, Any], encoded: int, seconds: float) -> None:
    """Logs what was read, dropped, written and how fast."""
    documents = content["documents"]
    _report_counts(documents["dropped"], content["notes"])
    learned = f", {content['supervised_tokens']} of them learned" if "loss_mask" in content["files"] else ""
    logger.info(
        "%d documents, %d tokens%s, the longest document %d; %s",
        documents["kept"], content["tokens"], learned, content["longest"], _speed(encoded, seconds),
    )  # fmt: skip
    rejects = rejects_path(output_prefix)
    if rejects.exists():
        logger.info("rejects: %s", rejects)
    files = (output_prefix.with_name(name) for name in content["files"].values())
    logger.info("written: %s", ", ".join(f"{file}.bin/.idx" for file in files))
    logger.info("DATASET_PATH=%s", output_prefix)
