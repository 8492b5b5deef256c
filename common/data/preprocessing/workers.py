"""Encodes tasks in worker processes, or in this one; results come back in order.

A worker reads its own input where it can, and returns arrays in shared memory, so that little goes through pipes.
"""

import hashlib
import mmap
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

import numpy as np

from common.data.encoders.encoded import EncodedChunk, FileCounts
from common.data.sources.chunks import Chunk, FileGroup, Task, load_chunk, read_chunks
from common.data.sources.row_blocks import NEWLINE
from common.errors import KitError

Encoder = Callable[[Chunk], EncodedChunk]
PREFETCH = 3  # tasks in flight per worker: keeps workers busy and memory bounded
SLOT_BYTES = 12 << 20  # shared memory for the arrays of one task; untouched pages take no memory

_encode: Encoder
_slots: list[mmap.mmap]
_stop: mmap.mmap


@dataclass(frozen=True)
class SharedChunk:
    """An EncodedChunk whose arrays are in a slot of shared memory: (dtype, size, byte offset) each."""

    rest: EncodedChunk
    lengths: tuple[Any, int, int]
    streams: dict[str, tuple[Any, int, int]]


def _pack(encoded: EncodedChunk, slot: mmap.mmap) -> SharedChunk | EncodedChunk:
    """`encoded` with its arrays moved to `slot`, or unchanged when they do not fit."""
    arrays = {"": encoded.lengths, **encoded.streams}
    starts, at = {}, 0
    for name, array in arrays.items():
        starts[name] = at
        at += -(-array.nbytes // 64) * 64
    if at > len(slot):
        return encoded
    for name, array in arrays.items():
        np.frombuffer(slot, array.dtype, array.size, starts[name])[:] = array
    places = {name: (array.dtype, array.size, starts[name]) for name, array in arrays.items()}
    return SharedChunk(replace(encoded, streams={}, lengths=np.empty(0, np.int32)), places.pop(""), places)


def _unpack(result: SharedChunk | EncodedChunk, slot: mmap.mmap) -> EncodedChunk:
    """The EncodedChunk again; its arrays are views of `slot`."""
    if not isinstance(result, SharedChunk):
        return result
    streams = {name: np.frombuffer(slot, *place) for name, place in result.streams.items()}
    return replace(result.rest, streams=streams, lengths=np.frombuffer(slot, *result.lengths))


def num_workers(workers: int | None) -> int:
    """WORKERS, or the number of cores available to this process; raises KitError when it is below 1."""
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise KitError(f"WORKERS={workers}: it must be at least 1, or empty for one per core")
    return workers


def _start(encode: Encoder, slots: list[mmap.mmap], stop: mmap.mmap) -> None:
    """Initializes a worker: it ignores Ctrl-C, which the parent handles, and exits with the parent."""
    global _encode, _slots, _stop
    _encode, _slots, _stop = encode, slots, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encoded(encode: Encoder, task: Task) -> EncodedChunk:
    if isinstance(task, FileGroup):
        return _encoded_files(encode, task)
    chunk = load_chunk(task)
    encoded = encode(chunk)
    if not isinstance(encoded, EncodedChunk):
        return encoded
    return replace(encoded, rejects=[], read=[FileCounts(len(chunk.data), chunk.data.count(NEWLINE), encoded.rejects)])


def _encoded_files(encode: Encoder, task: FileGroup) -> EncodedChunk:
    """All documents of `task`, concatenated."""
    made, read = [], []
    for span in task.spans:
        text_bytes = lines = 0
        rejects, known = [], None
        for chunk in [load_chunk(span)] if span.end is not None else read_chunks(span, SLOT_BYTES):
            made.append(encode(chunk))
            rejects += [reject._replace(line=reject.line + lines) for reject in made[-1].rejects]
            lines += chunk.data.count(NEWLINE)
            text_bytes += len(chunk.data)
            if span.end is not None and not chunk.cut:  # the chunk is the whole file
                known = hashlib.sha256(chunk.data).hexdigest()
        read.append(FileCounts(text_bytes, lines, rejects, known))
    made = made or [encode(Chunk(task.spans[0].path, 0, b"", 0))]
    counts: Counter[str] = Counter()
    for each in made:
        counts.update(each.counts)
    streams = {name: np.concatenate([each.streams[name] for each in made]) for name in made[0].streams}
    return EncodedChunk(streams, np.concatenate([each.lengths for each in made]), counts, [], read)


def _work(task: Task, slot: int) -> SharedChunk | EncodedChunk:
    encoded = _encoded(_encode, task)
    return _pack(encoded, _slots[slot]) if isinstance(encoded, EncodedChunk) else encoded


class StoppedByCallerError(Exception):
    """The caller of `Workers.call` stopped early."""


def encode_in_worker(tasks: Iterable[Task]) -> Iterator[tuple[Task, EncodedChunk]]:
    """In a worker: each task with its result; raises StoppedByCallerError when the caller has stopped."""
    for task in tasks:
        if _stop[0]:
            raise StoppedByCallerError
        yield task, _encoded(_encode, task)


@contextmanager
def _dead_worker_as_error() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise KitError(
            "a worker process was killed, perhaps because memory ran out: reduce WORKERS and run"
            " the same command again; finished parts are kept"
        ) from error


class Workers:
    """A pool of `number` encoding processes; with 1 the calling process encodes. A context manager."""

    def __init__(self, encode: Encoder, number: int) -> None:
        self._here = encode
        self._pool: ProcessPoolExecutor | None = None
        self._slots: list[mmap.mmap] = []
        self._stop = mmap.mmap(-1, 1)
        if number > 1:
            # Forked, so that the tokenizer is loaded once; none of its threads has started yet.
            context = multiprocessing.get_context("fork")
            self._slots = [mmap.mmap(-1, SLOT_BYTES) for _ in range(PREFETCH * number)]
            self._pool = ProcessPoolExecutor(number, context, _start, (encode, self._slots, self._stop))
            # Starts all workers now: forking later would copy the locks of running threads.
            self._pool.submit(os.getpid).result()

    def encode(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, EncodedChunk]]:
        """Each task with its result, in order; the arrays are valid until the next iteration.

        Raises the encoder's exceptions, and KitError when a worker died.
        """
        if self._pool is None:
            yield from ((task, _encoded(self._here, task)) for task in tasks)
            return
        free = deque(range(len(self._slots)))
        waiting: deque[tuple[Task, int, Future[SharedChunk | EncodedChunk]]] = deque()
        more = iter(tasks)
        with _dead_worker_as_error():
            while True:
                while free and (task := next(more, None)) is not None:
                    slot = free.popleft()
                    waiting.append((task, slot, self._pool.submit(_work, task, slot)))
                if not waiting:
                    return
                first, slot, result = waiting.popleft()
                yield first, _unpack(result.result(), self._slots[slot])
                free.append(slot)

    def call(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """`function`, which may use `encode_in_worker`, of each of `items`, each in one worker, in order.

        Needs more than one worker. Raises the exceptions of `function`, and KitError when a worker died; then all
        workers are stopped.
        """
        assert self._pool
        with _dead_worker_as_error():
            try:
                yield from self._pool.map(function, items)
            except BaseException:
                self._stop[0] = 1
                raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool:
            self._stop[0] = kind is not None
            self._pool.shutdown(cancel_futures=True)
