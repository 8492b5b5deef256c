"""The frame of step 1, for pretraining and fine-tuning alike.

The inputs are cut into parts; each is encoded into files of its own in `{OUTPUT_PREFIX}.parts/`, with a state that
says of what; then the parts are joined by copy, get their final names, and the manifest is written last. A run that
was ended at any moment is taken up again by the same command: a part is used again only if the inputs, the tokenizer
and the settings are the same by hash. Parts may also be written by runs of their own, on any machines that share the
folder, and joined by `merge`.
"""

import fcntl
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.data import manifest, merging
from common.data.encoded import BAD_ROWS, DROPPED
from common.data.indexed import bin_path, idx_path
from common.data.inputs import cut
from common.data.job import Job, Part, identity_of
from common.data.rejects import rejects_path
from common.data.workers import Workers
from common.errors import KitError
from common.log import logger

__all__ = ["Job", "run"]

MAX_CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 1 << 16


def run(job: Job) -> dict[str, Any] | None:
    """The manifest of what `job` wrote, or of what lay there finished already; None when it wrote one part of it.

    Raises KitError when something else lies at the output prefix, a worker dies, or the disk refuses.
    """
    started = time.monotonic()
    try:
        done = find_finished(job)
        if done:
            if job.folder.exists():
                merging.remove_parts(job.folder)
            logger.info("%s is finished already, of the same input, tokenizer and settings", job.output_prefix)
            return done
        job.folder.mkdir(parents=True, exist_ok=True)
        with locked(job.folder, job.partition_index):
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
    hashed = job.hashed_inputs
    rejected = BAD_ROWS.removeprefix(DROPPED) in content["documents"]["dropped"] and not job.skip_bad_rows
    if content["identity"] != identity_of(job.kind, hashed, job.described) or rejected:
        raise KitError(
            f"{manifest.manifest_path(job.output_prefix)} tells of other input, tokenizer or settings"
            f" ({_difference(content, job, hashed)}): remove it and its files, or change OUTPUT_PREFIX"
        )
    if len(there) < len(finals):
        raise KitError(f"{manifest.manifest_path(job.output_prefix)} is there but not its files: remove it to go on")
    return content


def _difference(content: dict[str, Any], job: Job, hashed: list[dict[str, Any]]) -> str:
    """The names of what differs between a manifest and `job`."""
    names = []
    for section, new in job.described.items():
        old = content.get(section, {})
        names += sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if [each.get("blocks_sha256") for each in content["inputs"]] != [each["blocks_sha256"] for each in hashed]:
        names.insert(0, "input")
    if not names:
        names = ["ON_ERROR=skip left rows out"]
    return ", ".join(names)


@contextmanager
def locked(folder: Path, part: int | None) -> Iterator[None]:
    """Holds the folder of parts, or one part in it, for this process; raises KitError when another one has it."""
    names = (
        [("lock", fcntl.LOCK_EX)] if part is None else [("lock", fcntl.LOCK_SH), (f"lock_{part:05d}", fcntl.LOCK_EX)]
    )
    streams = [(folder / name).open("a+") for name, _ in names]
    try:
        for stream, (_, kind) in zip(streams, names, strict=True):
            fcntl.lockf(stream, kind | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise KitError(f"another run writes {folder}: wait for it, or change OUTPUT_PREFIX") from error
    finally:
        for stream in streams:
            stream.close()


def _run(job: Job, started: float) -> dict[str, Any] | None:
    before = [path.stat() for path in job.inputs]
    spans = cut(job.inputs, job.partitions, job.max_row_bytes)
    numbers = range(job.partitions) if job.partition_index is None else [job.partition_index]
    total = sum(span.size for number in numbers for span in spans[number])
    chunk_bytes = min(MAX_CHUNK_BYTES, max(MIN_CHUNK_BYTES, total // (job.workers * 8)))
    states, encoded = [], 0
    with Workers(job.encode, job.workers) as workers, _progress(total) as bar:
        for number in numbers:
            part = Part(job, number, spans[number])
            state = part.finished()
            if state:
                logger.info("part %d of %d is there from an earlier run", number + 1, job.partitions)
                bar.update(sum(span.size for span in spans[number]))
            else:
                state = part.write(chunk_bytes, workers, bar)
                encoded += state["bytes"]
            states.append(state)
    _check_unchanged(job.inputs, before)
    seconds = time.monotonic() - started
    if job.partition_index is not None:
        _report_part(job, states[0], encoded, seconds)
        return None
    content = merging.finish(job.output_prefix, states)
    report(job.output_prefix, content, encoded, time.monotonic() - started)
    return content


def merge(output_prefix: Path, check: bool = False) -> dict[str, Any]:
    """The manifest of the parts of `output_prefix` joined; with `check` only looks whether they can be."""
    folder = merging.need_folder(output_prefix)
    started = time.monotonic()
    try:
        with locked(folder, None):
            states = merging.read_states(folder)
            if check:
                return states[0]["job"]
            content = merging.finish(output_prefix, states)
    except OSError as error:
        raise KitError(f"{output_prefix} cannot be written: {error}: mend it and run the same command again") from error
    report(output_prefix, content, sum(state["bytes"] for state in states), time.monotonic() - started)
    return content


def _check_unchanged(paths: list[Path], before: list[os.stat_result]) -> None:
    for path, old in zip(paths, before, strict=True):
        new = path.stat()
        if (new.st_size, new.st_mtime_ns) != (old.st_size, old.st_mtime_ns):
            raise KitError(f"{path} was changed while it was read: run the same command again")


def _progress(total: int) -> tqdm:
    """A bar over the inputs' bytes when a person watches."""
    return tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())


def _report_part(job: Job, state: dict[str, Any], encoded: int, seconds: float) -> None:
    counts = Counter(state["counts"])
    _report_counts(merging.dropped(counts), merging.notes(counts))
    logger.info(
        "part %d of %d is written: %d rows; %s; the last step is `python -m common.preprocess merge`",
        state["number"] + 1, job.partitions, counts["read"], _speed(encoded, seconds),
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
