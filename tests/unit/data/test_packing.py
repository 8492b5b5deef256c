import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.dataset.packing import pack

ROW = 4096
RANDOM = np.random.default_rng(0)
DISTRIBUTIONS = {
    "uniform": RANDOM.integers(1, ROW + 1, 20000),
    "chat": np.clip(RANDOM.lognormal(6, 1, 20000), 2, ROW).astype(int),
    "long": np.clip(RANDOM.lognormal(8, 0.5, 20000), 2, ROW).astype(int),
    "half to nine tenths": RANDOM.integers(ROW // 2, ROW * 9 // 10, 20000),
    "third to half": RANDOM.integers(ROW // 3, ROW // 2 + 2, 20000),
    "fifth to two thirds": RANDOM.integers(ROW // 5, ROW * 2 // 3, 20000),
    "equal": np.full(20000, 1000),
    "tiny and full": np.concatenate([np.full(5000, ROW), np.ones(15000, int)]),
    "one": np.array([7]),
}


def lower_bound(lengths: np.ndarray, row: int) -> int:
    """A lower bound: no packing uses fewer rows.

    A row holds k samples longer than a (k + 1)th of it at most; and (Martello and Toth's L2) samples over half a row
    are in rows of their own, beside which only what is short enough fits.
    """
    best = max(-(-int((lengths > row / (k + 1)).sum()) // k) for k in range(1, 20))
    best = max(best, -(-int(lengths.sum()) // row))
    for small in range(0, row // 2 + 1, max(1, row // 512)):
        big = lengths > row - small
        middle = (lengths > row / 2) & ~big
        rest = (lengths >= small) & (lengths <= row / 2)
        free = int(middle.sum()) * row - int(lengths[middle].sum())
        best = max(best, int(big.sum() + middle.sum()) + max(0, -(-(int(lengths[rest].sum()) - free) // row)))
    return best


def rows_of(lengths: np.ndarray, row: int) -> list[list[int]]:
    order, starts = pack(lengths, row)
    return [order[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_are_within_two_percent_of_the_lower_bound(name: str) -> None:
    lengths = DISTRIBUTIONS[name]
    assert len(rows_of(lengths, ROW)) <= 1.02 * lower_bound(lengths, ROW)


def test_chat_data_is_99_percent_full() -> None:
    lengths = DISTRIBUTIONS["chat"]
    assert lengths.sum() / (len(rows_of(lengths, ROW)) * ROW) > 0.99


def best_fit_decreasing(lengths: list[int], row: int) -> int:
    """The number of rows that the textbook's method, one sample at a time, uses."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(row - length)
    return len(rooms)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30).flatmap(lambda row: st.tuples(st.just(row), st.lists(st.integers(1, row), max_size=40))))
def test_no_sample_is_lost_none_crosses_and_rows_are_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    row, lengths = case
    rows = rows_of(np.array(lengths, np.int64), row)
    assert sorted(i for members in rows for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= row for members in rows)
    assert len(rows) == best_fit_decreasing(lengths, row)


def test_a_million_samples_in_seconds() -> None:
    lengths = np.clip(RANDOM.lognormal(6, 1, 1_000_000), 2, ROW).astype(int)
    started = time.perf_counter()
    pack(lengths, ROW)
    assert time.perf_counter() - started < 5
