"""Orders without memory per element: each element once, uniformly, by the key alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import shuffle
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from common.data.dataset.shuffle import GroupedDocumentOrder, KeyedPermutation, ListedDocumentOrder, keyed_shuffle


def listed(permutation: KeyedPermutation) -> list[int]:
    found: list[int] = permutation[np.arange(len(permutation), dtype=np.uint64)].tolist()
    return found


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 4095, 4096, 4097, 100_003])
def test_each_element_has_one_position_whichever_way_it_is_queried(size: int) -> None:
    permutation = keyed_shuffle(size, 1, 0)
    places = listed(permutation)
    assert sorted(places) == list(range(size))
    assert [permutation[i] for i in range(min(size, 300))] == places[:300]


def test_a_position_among_a_trillion_is_found_without_a_list() -> None:
    permutation = keyed_shuffle(10**12, 1234, 7)
    indices = np.random.default_rng(0).integers(0, 10**12, 10_000).astype(np.uint64)
    places = permutation[indices]
    assert places.max() < 10**12 and np.unique(places).size == np.unique(indices).size
    assert int(places[0]) == permutation[int(indices[0])]


def test_seeds_and_epochs_have_orders_of_their_own_that_stay() -> None:
    orders = {
        key: tuple(listed(keyed_shuffle(1000, *key))) for key in itertools.product((0, 1, 2**32, 2**40), (0, 1, 2))
    }
    assert len(set(orders.values())) == len(orders)
    assert listed(keyed_shuffle(1000, 1, 2)) == list(orders[1, 2])
    # Pinned: a run that is resumed by a later kit must find the same samples.
    assert listed(keyed_shuffle(1000, 1234, 0))[:5] == PINNED


PINNED = [908, 756, 904, 649, 614]


def unevenness(counts: np.ndarray) -> float:
    """Chi-square of `counts` against equal ones, in standard deviations above its mean (Wilson and Hilferty, 1931)."""
    freedom = counts.size - 1
    chi_square = float(((counts - counts.mean()) ** 2).sum() / counts.mean())
    share = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - share)) / share**0.5


@pytest.mark.parametrize("size", [8, 37])
def test_over_the_keys_each_element_is_anywhere_as_often_as_elsewhere(size: int) -> None:
    """Chi-square of the place of an element, and of that of the next one when the first's is known."""
    keys = 5_000
    places = np.array([listed(keyed_shuffle(size, key, 0)) for key in range(keys)])
    for element in (0, 1, size - 1):
        assert unevenness(np.bincount(places[:, element], minlength=size)) < 4
    steps = (places[:, 1] - places[:, 0]) % size
    assert unevenness(np.bincount(steps, minlength=size)[1:]) < 4


def test_one_order_has_no_drift_no_runs_and_no_trace_of_the_previous_epoch() -> None:
    size = 1_000_003
    first, second = (np.array(listed(keyed_shuffle(size, 5, epoch)), np.int64) for epoch in (0, 1))
    elements = np.arange(size)
    for one, other in ((first, elements), (second, elements), (first, second), (first[:-1], first[1:])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.005
        assert (one == other).sum() < 12  # one on average
    steps = np.diff(first) % size
    assert unevenness(np.bincount(steps * 1000 // size, minlength=1000)) < 4
    # Each thousandth of the order has a thousandth of each thousandth of the elements.
    cells = np.bincount((elements * 100 // size) * 100 + first * 100 // size, minlength=10_000)
    assert unevenness(cells) < 4


LENGTHS = np.random.default_rng(3).integers(0, 9, 500)


@pytest.fixture
def tokens(tmp_path: Path) -> IndexedDataset:
    with IndexedDatasetBuilder(tmp_path / "a", "<i4") as writer:
        writer.add_documents(np.arange(LENGTHS.sum()), LENGTHS)
    return IndexedDataset(tmp_path / "a")


def stream(documents: GroupedDocumentOrder | ListedDocumentOrder) -> list[int]:
    """The documents in their order; those without tokens have no position and may come between or not."""
    return [document for document, _ in documents.parts(0)]


@pytest.mark.parametrize("group", [2, 7, 64, 499, 500, 4096])
@pytest.mark.parametrize("subset", [range(500), range(20, 333), range(7, 8)])
def test_groups_hold_each_document_once_and_a_position_leads_into_it(
    tokens: IndexedDataset, monkeypatch: pytest.MonkeyPatch, group: int, subset: range
) -> None:
    monkeypatch.setattr(shuffle, "GROUP", group)
    documents = GroupedDocumentOrder(tokens, subset, 1, 0)
    order = [each for each in stream(documents) if LENGTHS[each]]
    assert sorted(order) == [each for each in subset if LENGTHS[each]]
    places = [(document, offset) for document in order for offset in range(LENGTHS[document])]
    for position in range(0, len(places), 37):
        assert next(documents.parts(position)) == places[position]
        after = [each for each, _ in documents.parts(position) if LENGTHS[each]]
        assert after == order[order.index(places[position][0]) :]


def test_neighbours_in_one_epoch_are_not_neighbours_in_the_next(
    tokens: IndexedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "GROUP", 50)
    first, again, second = (stream(GroupedDocumentOrder(tokens, range(500), 1, epoch)) for epoch in (0, 0, 1))
    assert first == again != second
    pairs = [set(itertools.pairwise(each)) for each in (first, second)]
    assert len(pairs[0] & pairs[1]) < 60  # 500 x 1/50 by chance, and where the groups are the same a few more
    edges = [GroupedDocumentOrder(tokens, range(500), 1, epoch)._edges.tolist() for epoch in range(10)]
    assert len({tuple(each) for each in edges}) > 5


def test_over_the_seeds_a_document_is_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "GROUP", 20)
    with IndexedDatasetBuilder(tmp_path / "a", "<i4") as writer:
        writer.add_documents(np.arange(200), np.ones(200, int))
    tokens = IndexedDataset(tmp_path / "a")
    where = np.array([np.argsort(stream(GroupedDocumentOrder(tokens, range(200), seed, 0))) for seed in range(1000)])
    for document in (0, 100, 199):
        assert unevenness(np.bincount(where[:, document] // 20, minlength=10)) < 4
