"""Rectangular blocks of a tensor: those that a run of its elements is made of, and what two have in common."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """The elements of a tensor from `offsets` on, `sizes` of them in each dimension."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    def overlap(self, other: "Chunk") -> "Chunk | None":
        """What both hold; None where that is nothing."""
        ends = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        spans = [(max(a, b), min(a + m, b + n)) for a, m, b, n in ends]
        if any(start >= end for start, end in spans):
            return None
        return Chunk(tuple(start for start, _ in spans), tuple(end - start for start, end in spans))

    def is_within(self, outer: "Chunk") -> bool:
        """Whether it has the dimensions of `outer` and reaches nowhere out of it."""
        ends = zip(self.offsets, self.sizes, outer.offsets, outer.sizes, strict=False)
        inside = all(b <= a and m >= 0 and a + m <= b + n for a, m, b, n in ends)
        return len(self.offsets) == len(self.sizes) == len(outer.sizes) and inside

    def slices_in(self, outer: "Chunk") -> tuple[slice, ...]:
        """Where it lies in a tensor that holds `outer`."""
        return tuple(
            slice(offset - start, offset - start + size)
            for offset, size, start in zip(self.offsets, self.sizes, outer.offsets, strict=True)
        )


def coverage_error(whole: Chunk, blocks: Iterable[Chunk]) -> str | None:
    """Why `blocks` do not hold each element of `whole` once, and no others; None where they do."""
    ordered = sorted(blocks, key=lambda block: block.offsets)
    current: list[Chunk] = []  # those before, that reach as far in the first dimension
    for block in ordered:
        if not block.is_within(whole):
            return f"has a block at {list(block.offsets)} of {list(block.sizes)} that reaches out of it"
        current = [one for one in current if one.offsets[:1] == () or one.offsets[0] + one.sizes[0] > block.offsets[0]]
        if any(one.overlap(block) for one in current):
            return f"has two blocks that lie over one another at {list(block.offsets)}"
        current.append(block)
    found = sum(block.numel for block in ordered)
    return None if found == whole.numel else f"has {found} of {whole.numel} elements"


def chunks_of_range(shape: Shape, start: int, end: int) -> list[Chunk]:
    """Elements [start, end) of a tensor of `shape` in row-major order, as the fewest blocks, in that order.

    Each block's elements stand side by side in the tensor: at most 2 d - 1 blocks for d dimensions.
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
