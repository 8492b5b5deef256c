"""Rectangular blocks of a tensor: those that a run of its elements is made of, and what two have in common."""

from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rectangle:
    """The elements of a tensor from `offsets` on, `sizes` of them in each dimension."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    def common(self, other: "Rectangle") -> "Rectangle | None":
        """What both hold; None where that is nothing."""
        ends = zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        spans = [(max(a, b), min(a + m, b + n)) for a, m, b, n in ends]
        if any(start >= end for start, end in spans):
            return None
        return Rectangle(tuple(start for start, _ in spans), tuple(end - start for start, end in spans))

    def within(self, outer: "Rectangle") -> tuple[slice, ...]:
        """Where it lies in a tensor that holds `outer`."""
        return tuple(
            slice(offset - start, offset - start + size)
            for offset, size, start in zip(self.offsets, self.sizes, outer.offsets, strict=True)
        )


def rectangles(shape: Shape, start: int, end: int) -> list[Rectangle]:
    """Elements [start, end) of a tensor of `shape` in row-major order, as the fewest blocks, in that order.

    Each block's elements stand side by side in the tensor: at most 2 d - 1 blocks for d dimensions.
    """
    if start >= end:
        return []
    if not shape:
        return [Rectangle((), ())]
    row = prod(shape[1:])
    if len(shape) == 1 or not (start % row or end % row):
        rest = (0,) * (len(shape) - 1)
        return [Rectangle((start // row, *rest), ((end - start) // row, *shape[1:]))]
    first_end = min(end, (start // row + 1) * row)
    if start % row or first_end == end:  # within one row
        index = start // row
        inner = rectangles(shape[1:], start - index * row, first_end - index * row)
        head = [Rectangle((index, *each.offsets), (1, *each.sizes)) for each in inner]
        return head + rectangles(shape, first_end, end)
    whole = end - end % row
    return rectangles(shape, start, whole) + rectangles(shape, whole, end)
