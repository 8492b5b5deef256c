"""Runs of a tensor's elements as blocks: they hold those elements, in order, and are few."""

import random

import pytest
import torch

from common.checkpoint.rectangles import Rectangle, rectangles


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_elements_is_a_few_blocks_in_order(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(100):
        shape = tuple(dice.randint(1, 5) for _ in range(dice.randint(1, 4)))
        numel = torch.Size(shape).numel()
        start = dice.randint(0, numel)
        end = dice.randint(start, numel)
        values, found = torch.arange(numel).view(shape), []
        blocks = rectangles(shape, start, end)
        for block in blocks:
            found += values[block.within(Rectangle((0,) * len(shape), shape))].flatten().tolist()
        assert found == list(range(start, end)) and len(blocks) <= 2 * len(shape) - 1


def test_a_number_is_a_block_without_dimensions() -> None:
    assert rectangles((), 0, 1) == [Rectangle((), ())]
    assert rectangles((3,), 2, 2) == []


def test_what_two_have_in_common() -> None:
    one = Rectangle((0, 2), (4, 3))
    assert one.common(Rectangle((3, 0), (5, 4))) == Rectangle((3, 2), (1, 2))
    assert one.common(Rectangle((4, 0), (1, 9))) is None
    assert Rectangle((3, 2), (1, 2)).within(one) == (slice(3, 4), slice(0, 2))
