"""Statistics of a dataset: document lengths, supervised tokens, and how it fills rows of several lengths."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.dataset.indexed_dataset import open_mask, open_tokens
from common.data.dataset.manifest import DataFiles
from common.data.dataset.packing import pack
from common.errors import KitError, writing

BAR = 50
BLOCK = 1 << 24


@dataclass(frozen=True)
class Filling:
    """How samples fill rows of `seq_length`.

    too_long: samples of more than seq_length + 1 tokens, which are excluded here. full: the fraction of used positions.
    """

    seq_length: int
    too_long: int
    rows: int
    full: float
    packed_rows: int
    packed_full: float


def fill_rows(lengths: np.ndarray, seq_length: int, kind: str) -> Filling:
    """The rows of an epoch: "pretrain" documents are concatenated, "sft" ones are one per row, or packed."""
    total = int(lengths.sum(dtype=np.int64))
    if kind == "pretrain":
        rows = max(0, total - 1) // seq_length
        return Filling(seq_length, 0, rows, 1.0, rows, 1.0)
    used = lengths[(lengths > 1) & (lengths <= seq_length + 1)].astype(np.int64) - 1
    _, starts = pack(used, seq_length)
    rows, packed_rows, positions = used.size, starts.size - 1, int(used.sum())
    return Filling(
        seq_length,
        int((lengths > seq_length + 1).sum()),
        rows,
        positions / max(1, rows * seq_length),
        packed_rows,
        positions / max(1, packed_rows * seq_length),
    )


def fill_with_pairs(lengths: np.ndarray, seq_length: int, packing: bool) -> tuple[int, int, float]:
    """(samples of an epoch, pairs that are too long and left out, fraction of used positions) of "preference" data.

    Packed, a sample is a row of several pairs; otherwise two rows, an answer in each (preference_dataset.py).
    """
    positions = lengths.astype(np.int64).reshape(-1, 2) - 1
    total = positions.sum(1)
    fits = (total if packing else positions.max(1)) <= seq_length
    samples = pack(total[fits], seq_length)[1].size - 1 if packing else int(fits.sum())
    size = seq_length if packing else 2 * seq_length
    return samples, int((~fits).sum()), int(total[fits].sum()) / max(1, samples * size)


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, number of documents) for bins of powers of two, without empty bins at the ends."""
    if lengths.size == 0:
        return []
    exponents = np.frexp(np.maximum(lengths, 0).astype(np.float64))[1]  # n lies in [2^(e-1), 2^e)
    counts = np.bincount(exponents)
    first = int(np.flatnonzero(counts)[0])
    return [(1 << e - 1 if e else 0, (1 << e) - 1, int(counts[e])) for e in range(first, counts.size)]


def draw_histogram(bins: list[tuple[int, int, int]]) -> Iterator[str]:
    """A line of text with a bar for each bin."""
    most = max((number for _, _, number in bins), default=0) or 1
    for low, high, number in bins:
        bar = "#" * -(-number * BAR // most)
        yield f"{low:>9} to {high:<9} {number:>12}  {bar}"


def supervised_tokens(files: DataFiles) -> int | None:
    """The number of tokens in the loss; None for data without a loss mask, where all are."""
    if not files.loss_mask:
        return None
    mask = open_mask(files.loss_mask)
    values = np.memmap(f"{files.loss_mask}.bin", mask.dtype, "r") if mask.num_tokens else np.empty(0)
    return sum(int(np.count_nonzero(values[i : i + BLOCK])) for i in range(0, values.size, BLOCK))


def report(files: DataFiles, seq_lengths: list[int], global_batch_size: int | None) -> Iterator[str]:
    """The lines that `stats` prints."""
    lengths = open_tokens(files.tokens).lengths
    if lengths.size == 0:
        raise KitError(f"{files.tokens} holds no documents: write the data again with step 1")
    total = int(lengths.sum(dtype=np.int64))
    yield f'{files.tokens}: "{files.kind}" data, {lengths.size} documents, {total} tokens'
    if files.manifest and "documents" in files.manifest:
        counts = files.manifest["documents"]
        causes = "".join(f", {number} dropped ({cause})" for cause, number in counts["dropped"].items() if number)
        what = "pairs" if files.documents_per_row == 2 else "documents"
        yield f"read {counts['read']} {what}, kept {counts['kept']}{causes}"
    quarter, half, most = np.percentile(lengths, [25, 50, 99]).astype(int)
    yield (
        f"tokens per document: {lengths.min()} to {lengths.max()}, mean {total / lengths.size:.1f}, median {half},"
        f" 25th percentile {quarter}, 99th {most}"
    )
    supervised = supervised_tokens(files)
    if supervised is not None:
        yield f"supervised: {supervised} tokens, {100 * supervised / max(1, total):.1f}%"
    yield from draw_histogram(histogram(lengths))
    for seq_length in seq_lengths:
        if files.kind == "preference":
            yield _line_of_pairs(lengths, seq_length, global_batch_size)
        else:
            yield _line(fill_rows(lengths, seq_length, files.kind), files.kind, global_batch_size)


def _line_of_pairs(lengths: np.ndarray, seq_length: int, batch: int | None) -> str:
    parts = []
    for packing, name in ((True, "packed"), (False, "not packed")):
        samples, too_long, full = fill_with_pairs(lengths, seq_length, packing)
        steps = f" = {samples / batch:.2f} steps of {batch}" if batch else ""
        parts.append(f"{name} {samples} samples{steps}, {100 * full:.1f}% full, {too_long} pairs too long")
    return f"SEQ_LENGTH={seq_length}: {'; '.join(parts)}"


def _line(filling: Filling, kind: str, batch: int | None) -> str:
    def steps(rows: int) -> str:
        return f" = {rows / batch:.2f} steps of {batch}" if batch else ""

    if kind == "pretrain":
        return f"SEQ_LENGTH={filling.seq_length}: {filling.rows} samples per epoch{steps(filling.rows)}"
    return (
        f"SEQ_LENGTH={filling.seq_length}: {filling.too_long} too long;"
        f" packed {filling.packed_rows} rows{steps(filling.packed_rows)}, {100 * filling.packed_full:.1f}% full;"
        f" not packed {filling.rows} rows{steps(filling.rows)}, {100 * filling.full:.1f}% full"
    )


def write_png(lengths: np.ndarray, title: str, path: Path) -> None:
    """Plots the histogram of `lengths` to the file `path`; raises KitError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise KitError(f"PNG={path}: plotting needs matplotlib: install requirements/plots.txt, or omit PNG") from error
    bins = histogram(lengths)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar([f"{low}-{high}" for low, high, _ in bins], [number for _, _, number in bins])
    axes.set(title=title, xlabel="tokens per document", ylabel="documents")
    axes.tick_params(axis="x", rotation=60)
    with writing(f"PNG={path}"):
        figure.savefig(path, format="png", dpi=120)
