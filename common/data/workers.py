"""Chunks through an encoder, in order, in this process or in several."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import TracebackType

from common.data.encoded import Encoded
from common.data.inputs import Chunk
from common.errors import KitError

Encoder = Callable[[Chunk], Encoded]
AHEAD = 3  # chunks in flight for each worker: none waits, and memory stays bounded

_encode: Encoder


def count_workers(workers: int | None) -> int:
    """WORKERS, or one a core that this process may use; raises KitError when it is under 1."""
    if workers is None:
        return len(os.sched_getaffinity(0))
    if workers < 1:
        raise KitError(f"WORKERS={workers}: it must be at least 1, or empty for one a core")
    return workers


def _start(encode: Encoder) -> None:
    """Makes this process a worker: Ctrl-C is the parent's, and a parent that is gone ends it."""
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(chunk: Chunk) -> Encoded:
    return _encode(chunk)


class Workers:
    """`number` processes that encode; with 1 it is done in the caller's. A context manager."""

    def __init__(self, encode: Encoder, number: int) -> None:
        self._here, self._ahead = encode, AHEAD * number
        self._pool: ProcessPoolExecutor | None = None
        if number > 1:
            # Forked, so that the tokenizer is loaded once; no thread of it has run yet.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(number, context, _start, (encode,))

    def encode(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
        """Each chunk with what it encodes to, in order.

        Raises what an encoder raises, and KitError when a worker died.
        """
        if self._pool is None:
            yield from ((chunk, self._here(chunk)) for chunk in chunks)
            return
        waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, self._pool.submit(_work, chunk)))
                if len(waiting) >= self._ahead:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        except BrokenProcessPool as error:
            raise KitError(
                "a worker process was ended from outside, perhaps for lack of memory: set a smaller WORKERS and run"
                " the same command again; finished parts are kept"
            ) from error

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
