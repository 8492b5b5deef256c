"""Runs of a tensor's elements as blocks: they hold those elements, in order, and are few."""

import random

import pytest
import torch

from common.checkpoint.io.chunks import Chunk, chunks_of_range, coverage_error


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_elements_is_a_few_blocks_in_order(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(1, 4)))
        numel = torch.Size(shape).numel()
        start = rng.randint(0, numel)
        end = rng.randint(start, numel)
        values, found = torch.arange(numel).view(shape), []
        blocks = chunks_of_range(shape, start, end)
        for block in blocks:
            found += values[block.slices_in(Chunk((0,) * len(shape), shape))].flatten().tolist()
        assert found == list(range(start, end)) and len(blocks) <= 2 * len(shape) - 1


def test_a_scalar_is_a_block_without_dimensions() -> None:
    assert chunks_of_range((), 0, 1) == [Chunk((), ())]
    assert chunks_of_range((3,), 2, 2) == []


def test_the_overlap_of_two_blocks() -> None:
    one = Chunk((0, 2), (4, 3))
    assert one.overlap(Chunk((3, 0), (5, 4))) == Chunk((3, 2), (1, 2))
    assert one.overlap(Chunk((4, 0), (1, 9))) is None
    assert Chunk((3, 2), (1, 2)).slices_in(one) == (slice(3, 4), slice(0, 2))


@pytest.mark.parametrize(
    ("blocks", "fault"),
    [
        ([((0, 0), (2, 3)), ((2, 0), (2, 3))], None),
        ([((0, 0), (4, 1)), ((0, 2), (4, 1)), ((0, 1), (4, 1))], None),
        ([((1, 0), (3, 3)), ((0, 0), (1, 2)), ((0, 2), (1, 1))], None),
        ([((0, 0), (2, 3)), ((0, 0), (2, 3))], "has overlapping chunks at [0, 0]"),
        ([((0, 0), (3, 3)), ((1, 0), (1, 3))], "has overlapping chunks at [1, 0]"),
        ([((0, 0), (4, 2)), ((3, 1), (1, 2)), ((0, 2), (2, 1))], "has overlapping chunks at [3, 1]"),
        ([((0, 0), (2, 3)), ((3, 0), (1, 3))], "has 9 of 12 elements"),
        ([], "has 0 of 12 elements"),
        ([((0, 0), (2, 3)), ((2, 0), (3, 2))], "has an out-of-bounds chunk at [2, 0] of sizes [3, 2]"),
        ([((0,), (12,))], "has an out-of-bounds chunk at [0] of sizes [12]"),
    ],
)
def test_chunks_that_do_not_cover_each_element_once_are_reported(
    blocks: list[tuple[tuple[int, ...], tuple[int, ...]]], fault: str | None
) -> None:
    assert coverage_error(Chunk((0, 0), (4, 3)), [Chunk(*block) for block in blocks]) == fault


def test_a_random_cover_is_complete_and_each_change_of_it_is_not() -> None:
    rng = random.Random(5)
    for _ in range(300):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(1, 3)))
        ends = sorted({0, torch.Size(shape).numel(), *(rng.randint(0, torch.Size(shape).numel()) for _ in range(3))})
        full = Chunk((0,) * len(shape), shape)
        blocks = [block for a, b in zip(ends, ends[1:], strict=False) for block in chunks_of_range(shape, a, b)]
        rng.shuffle(blocks)
        assert coverage_error(full, blocks) is None
        assert coverage_error(full, blocks[1:]) is not None
        assert coverage_error(full, [*blocks, rng.choice(blocks)]) is not None
        if len(blocks) > 1:  # one twice, another missing
            assert coverage_error(full, [*blocks[1:], blocks[1]]) is not None
