"""Datasets by name: every sample once, and fillers that have no loss."""

from types import SimpleNamespace

import numpy as np
import pytest

from common.data.dataset.named_datasets import NamedDatasets


class Ramp:
    """`size` samples, number i of which is i."""

    weighted, order = False, "listed"

    def __init__(self, size: int, first: int) -> None:
        self.samples_per_epoch, self.first = size, first

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        assert 0 <= index < self.samples_per_epoch
        return {"tokens": np.full(4, self.first + index), "loss_mask": np.ones(4, np.float32)}


@pytest.mark.parametrize(("sizes", "positions"), [((3, 4, 1), (4, 4, 4)), ((8, 5), (8, 8)), ((1,), (4,))])
def test_each_sample_is_read_once_and_fillers_are_of_their_own_dataset(
    sizes: tuple[int, ...], positions: tuple[int, ...]
) -> None:
    members = {f"set{number}": Ramp(size, 100 * number) for number, size in enumerate(sizes)}
    data = NamedDatasets(members, 4)
    assert tuple(data.positions.values()) == positions and data.samples_per_epoch == sum(sizes)
    start = 0
    for number, size in enumerate(sizes):
        read = [SimpleNamespace(**data[start + i]) for i in range(positions[number])]
        start += positions[number]
        assert [each.tokens[0] for each in read[:size]] == [100 * number + i for i in range(size)]
        assert all(each.loss_mask.all() for each in read[:size])
        assert all(each.tokens[0] == 100 * number and not each.loss_mask.any() for each in read[size:])
    assert not data[start + 1000]["loss_mask"].any()  # read ahead by the data loader
    assert data[0]["loss_mask"].all()  # the filler is a copy
