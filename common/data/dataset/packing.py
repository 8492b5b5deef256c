"""Sequence packing: samples of different lengths into rows of one length, by best-fit decreasing.

Hand-written: bin-packing libraries place samples one by one in Python; this places all samples of a length at once.
"""

from bisect import bisect_left, insort

import numpy as np


class _OpenRows:
    """Rows that are not full, by their remaining room."""

    def __init__(self) -> None:
        self.rooms: list[int] = []
        self.rows: dict[int, list[np.ndarray]] = {}

    def add(self, room: int, rows: np.ndarray) -> None:
        """Adds `rows` with `room` left."""
        if room and rows.size:
            if room not in self.rows:
                insort(self.rooms, room)
            self.rows.setdefault(room, []).append(rows)

    def take(self, length: int) -> tuple[int, np.ndarray] | None:
        """Removes and returns (room, rows) of the smallest room that fits `length`; None when there is none."""
        at = bisect_left(self.rooms, length)
        if at == len(self.rooms):
            return None
        room = self.rooms.pop(at)
        return room, np.concatenate(self.rows.pop(room))


def pack(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts): row r holds the samples order[starts[r]:starts[r + 1]], whose total is within `row_length`.

    Samples of one length are placed together: the row with the smallest room that fits takes room // length of them.
    So the cost is one sort of the samples, and a loop over the distinct lengths and rooms. Each length must lie
    between 1 and `row_length`.
    """
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= row_length)
    # The smallest type that fits: numpy radix-sorts 16 bits, and memory limits the number of samples.
    longest_first = np.argsort((row_length - lengths).astype(np.min_scalar_type(row_length)), kind="stable")
    row_of = np.empty(lengths.size, np.uint32 if lengths.size < 1 << 32 else np.int64)
    open_rows, num_rows = _OpenRows(), 0
    sizes, counts = np.unique(lengths, return_counts=True)
    done = 0
    for length, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = done + count
        while done < end:
            found = open_rows.take(length)
            if found:
                room, rows = found
            else:
                room, rows = row_length, num_rows + np.arange(-(-(end - done) // (row_length // length)))
                num_rows += rows.size
            done = _fill(open_rows, rows, room, length, row_of[done:end]) + done
    order = longest_first[np.argsort(row_of, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))]).astype(np.int64)
    return order, starts


def _fill(open_rows: _OpenRows, rows: np.ndarray, room: int, length: int, row_of: np.ndarray) -> int:
    """Fills `rows` with samples of `length`, writes their row numbers to `row_of`, and returns how many fit."""
    fit = room // length
    number = min(row_of.size, fit * rows.size)
    row_of[:number] = np.repeat(rows, fit)[:number]
    full, rest = divmod(number, fit)
    open_rows.add(room - fit * length, rows[:full])
    if rest:
        open_rows.add(room - rest * length, rows[full : full + 1])
        full += 1
    open_rows.add(room, rows[full:])
    return number
