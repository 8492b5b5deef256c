"""How unevenly packed rows divide under context parallelism: the slowest rank's work over the mean, computed.

    python -m tests.bench.context_parallel_balance

Conversations of log-normal lengths (sigma 0.8) around a median, packed by the kit; operations of 7B: 6 for each weight
of the layers and token, and attention's within documents. "mirrored" orders a row's conversations by length, from both
ends to the middle.
"""

from collections.abc import Callable

import numpy as np

from common.data.dataset.packing import pack
from common.model.layers.context_parallel import chunk_numbers

WEIGHTS, LAYERS, WIDTH = 6.5e9, 28, 3584
ROWS = 60


def rank_work(lengths: np.ndarray, row_length: int, cp_size: int) -> np.ndarray:
    """Operations of each rank on a row of documents of these lengths."""
    ends = np.cumsum(np.append(lengths, row_length - lengths.sum()))
    begins = np.concatenate([[0], ends[:-1]])
    positions = np.arange(row_length)
    keys = positions - begins[np.searchsorted(ends, positions, side="right")] + 1
    chunks = keys.reshape(2 * cp_size, -1).sum(1)
    attention = np.array([sum(chunks[number] for number in chunk_numbers(cp_size, rank)) for rank in range(cp_size)])
    return 6 * WEIGHTS * row_length / cp_size + 12 * LAYERS * WIDTH * attention


def mirrored(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([lengths[0::2], lengths[1::2][::-1]])


def slowest(rows: list[np.ndarray], row_length: int, cp_size: int, order: Callable[[np.ndarray], np.ndarray]) -> float:
    """The mean over rows of the slowest rank's work over the mean rank's."""
    works = [rank_work(order(row), row_length, cp_size) for row in rows]
    return float(np.mean([work.max() / work.mean() for work in works]))


def main() -> None:
    """Prints a line for each row length and median."""
    random = np.random.default_rng(0)
    print("| row | median | CP=2 | CP=4 | CP=8 | CP=8, mirrored |\n|---|---|---|---|---|---|")
    for row_length in (32768, 131072):
        for median in (500, 3000, 12000, 40000):
            lengths = random.lognormal(np.log(median), 0.8, ROWS * row_length // median).astype(int)
            lengths = lengths.clip(2, row_length)
            order, starts = pack(lengths, row_length)
            rows = [lengths[order[start:end]] for start, end in zip(starts[:ROWS], starts[1:], strict=False)]
            found = [slowest(rows, row_length, cp_size, lambda row: row) for cp_size in (2, 4, 8)]
            found.append(slowest(rows, row_length, 8, mirrored))
            print(f"| {row_length:,} | {median:,} | {' | '.join(f'{each:.2f}' for each in found)} |")


if __name__ == "__main__":
    main()
