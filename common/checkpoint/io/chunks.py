"""Chunks of a tensor (offsets and sizes, as in torch's ChunkStorageMetadata): overlap, coverage, and flat ranges."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor's elements: its `offsets` in the tensor and its `sizes`, one per dimension."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    def overlap(self, other: "Chunk") -> "Chunk | None":
        """The elements of both, or None."""
        ends = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        spans = [(max(a, b), min(a + m, b + n)) for a, m, b, n in ends]
        if any(start >= end for start, end in spans):
            return None
        return Chunk(tuple(start for start, _ in spans), tuple(end - start for start, end in spans))

    def is_within(self, outer: "Chunk") -> bool:
        """Whether `outer` has the same number of dimensions and contains this chunk."""
        ends = zip(self.offsets, self.sizes, outer.offsets, outer.sizes, strict=False)
        inside = all(b <= a and m >= 0 and a + m <= b + n for a, m, b, n in ends)
        return len(self.offsets) == len(self.sizes) == len(outer.sizes) and inside

    def slices_in(self, outer: "Chunk") -> tuple[slice, ...]:
        """The slices that select this chunk from a tensor that holds `outer`."""
        return tuple(
            slice(offset - start, offset - start + size)
            for offset, size, start in zip(self.offsets, self.sizes, outer.offsets, strict=True)
        )


def coverage_error(whole: Chunk, chunks: Iterable[Chunk]) -> str | None:
    """Why `chunks` do not cover `whole` exactly once; None where they do."""
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets)
    active: list[Chunk] = []  # earlier chunks that extend into the current one's first dimension
    for chunk in ordered:
        if not chunk.is_within(whole):
            return f"has an out-of-bounds chunk at {list(chunk.offsets)} of sizes {list(chunk.sizes)}"
        active = [one for one in active if one.offsets[:1] == () or one.offsets[0] + one.sizes[0] > chunk.offsets[0]]
        if any(one.overlap(chunk) for one in active):
            return f"has overlapping chunks at {list(chunk.offsets)}"
        active.append(chunk)
    found = sum(chunk.numel for chunk in ordered)
    return None if found == whole.numel else f"has {found} of {whole.numel} elements"


def chunks_of_range(shape: Shape, start: int, end: int) -> list[Chunk]:
    """The flat range [start, end) of a row-major tensor of `shape` as the fewest chunks, in order.

    Each chunk is contiguous in the tensor; d dimensions need up to 2 d - 1 chunks.
    """
    if start >= end:
        return []
    if not shape:
        return [Chunk((), ())]
    row = prod(shape[1:])
    if len(shape) == 1 or not (start % row or end % row):
        rest = (0,) * (len(shape) - 1)
        return [Chunk((start // row, *rest), ((end - start) // row, *shape[1:]))]
    first_end = min(end, (start // row + 1) * row)
    if start % row or first_end == end:  # within one row
        index = start // row
        inner = chunks_of_range(shape[1:], start - index * row, first_end - index * row)
        head = [Chunk((index, *each.offsets), (1, *each.sizes)) for each in inner]
        return head + chunks_of_range(shape, first_end, end)
    whole = end - end % row
    return chunks_of_range(shape, start, whole) + chunks_of_range(shape, whole, end)
