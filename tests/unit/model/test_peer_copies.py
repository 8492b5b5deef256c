"""The exchange by copy engines, on the CPU: ranks are threads, and a rank's copies run late, in a thread of their own.

What a rank's current stream does is done at once, so a wait that is missing, or too early, reads what is not there yet.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import Queue
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.model.kernels import peer_copies
from common.model.kernels.peer_copies import FREE, READY, PeerCopies

SECONDS = 5.0  # after which a wait has failed


class Local(threading.local):
    rank = 0
    stream: Any = None  # None: the current stream, whose work is done at once


LOCAL = Local()


class Event(threading.Event):
    def await_(self) -> None:
        assert self.wait(SECONDS), "an event that never came"


class CurrentStream:
    @staticmethod
    def wait_event(event: Event) -> None:
        event.await_()


class Copies:
    """A stream whose work a thread does in order, each item a while after it was given."""

    def __init__(self, **_: Any) -> None:
        self.work: Queue[Callable[[], Any]] = Queue()
        self.failures: list[str] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            item = self.work.get()
            time.sleep(random.uniform(0, 2e-3))
            try:
                item()
            except Exception as error:
                self.failures.append(repr(error))

    def wait_stream(self, _: CurrentStream) -> None:
        """What the current stream does is done."""

    def record_event(self) -> Event:
        event = Event()
        self.work.put(event.set)
        return event


@contextmanager
def on(stream: Copies) -> Iterator[None]:
    LOCAL.stream = stream
    yield
    LOCAL.stream = None


def do(item: Callable[[], Any]) -> None:
    LOCAL.stream.work.put(item) if LOCAL.stream else item()


class Host:
    """The memory of all ranks."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=SECONDS)
        self.flags: dict[tuple[Any, ...], int] = {}
        self.slots: dict[tuple[Any, ...], torch.Tensor] = {}
        self.changed = threading.Condition()


class Memory:
    """As PeerMemory."""

    host: Any = None
    number = 0

    def __init__(self, _: Any, slot_bytes: int, __: Any) -> None:
        self.slot_bytes, self.rank = slot_bytes, LOCAL.rank
        self.host.barrier.wait()
        if not self.rank:
            Memory.number += 1
        self.host.barrier.wait()
        self.this = Memory.number

    def slot(self, owner: int, kind: str, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self.host.changed:
            key = (self.this, owner, kind, number)
            slot = self.host.slots.setdefault(key, torch.full((self.slot_bytes // dtype.itemsize,), float("nan")))
        return slot[: torch.Size(shape).numel()].view(shape)

    def tell(self, peer: int, kind: str, number: int, what: int, use: int) -> None:
        do(partial(self._set, (self.this, peer, kind, number, what, self.rank), use))

    def _set(self, key: tuple[Any, ...], use: int) -> None:
        with self.host.changed:
            self.host.flags[key] = use
            self.host.changed.notify_all()

    def wait(self, peer: int, kind: str, number: int, what: int, use: int) -> None:
        do(partial(self._wait, (self.this, self.rank, kind, number, what, peer), use))

    def _wait(self, key: tuple[Any, ...], use: int) -> None:
        with self.host.changed:
            assert self.host.changed.wait_for(lambda: self.host.flags.get(key, 0) >= use, SECONDS), f"{key}, {use}"

    @staticmethod
    def copy(values: torch.Tensor, place: torch.Tensor) -> None:
        do(partial(place.copy_, values))


def values(rank: int, step: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + rank))


def use(exchange: PeerCopies, steps: int, size: int) -> None:
    """Gathers and sums by turns; two gatherings are in use at a time, as in a backward pass."""
    before: Any = None
    for step in range(steps):
        shape = (2 + (step > steps // 2), 3)  # the second half needs larger slots
        everyone = [values(rank, step, shape) for rank in range(size)]
        part = everyone[exchange.rank].clone()
        gathering = exchange.gather(part)
        for found, expected in [(gathering, everyone), before or (gathering, everyone)]:
            pieces = [*found.pieces(), *found.blocks()]
            assert sum(len(piece) for _, piece in pieces) == 2 * len(torch.cat(expected))
            for rows, piece in pieces:
                time.sleep(random.choice([0, 0, 0, 8e-3]))
                torch.testing.assert_close(piece, torch.cat(expected)[rows], rtol=0, atol=0)
        before = (gathering, everyone) if step != steps // 2 else None
        if step % 3 == 0:
            continue
        whole = [values(rank, 1000 + step, (size * shape[0], 3)) for rank in range(size)]
        scattering = exchange.scatter(len(whole[0]), 3, part)
        for rows, place in scattering.pieces():
            place.copy_(whole[exchange.rank][rows])
        total = scattering.total()
        torch.testing.assert_close(total, sum(whole).chunk(size)[exchange.rank])  # type: ignore[union-attr]
        for sent in scattering._parts.values():
            sent.fill_(float("nan"))  # as if their memory was used again


def run(size: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was wrong on any rank."""
    random.seed(size)
    host, wrong = Host(size), list[str]()
    monkeypatch.setattr(Memory, "host", host)
    monkeypatch.setattr(peer_copies, "PeerMemory", Memory)
    monkeypatch.setattr(peer_copies, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "Stream", Copies)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", CurrentStream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(dist, "get_rank", lambda _: LOCAL.rank)
    monkeypatch.setattr(dist, "get_world_size", lambda _: size)
    monkeypatch.setattr(dist, "barrier", lambda _: host.barrier.wait())

    def rank(number: int) -> None:
        LOCAL.rank = number
        try:
            exchange = PeerCopies(None)
            use(exchange, steps, size)
            wrong.extend(exchange.copies.failures)  # type: ignore[attr-defined]
        except Exception as error:
            wrong.append(f"rank {number}: {error!r}")

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.mark.parametrize("least", [0, 4096])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_gets_what_the_others_sent(size: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's rows by themselves, or those of the ranks before and after a rank together."""
    monkeypatch.setattr(peer_copies, "LEAST_ROWS", least)
    assert run(size, 24, monkeypatch) == []


def no_wait_for(what: int) -> Callable[..., None]:
    right = peer_copies.Turn.await_
    return lambda self, peer, asked: None if asked == what else right(self, peer, asked)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "reads before it was written": (peer_copies.Turn, "await_", no_wait_for(READY)),
    "writes before it was read": (peer_copies.Turn, "await_", no_wait_for(FREE)),
    "one slot": (peer_copies, "SLOTS", 1),
    "memory used again while it is sent": (CurrentStream, "wait_event", staticmethod(lambda _: None)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    assert run(2, 24, monkeypatch)
