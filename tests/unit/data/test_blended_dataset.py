import json
import logging
import pickle
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.dataset.blended_dataset import BlendedDataset, read_blend
from common.data.dataset.builder import build_dataset
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import DataFiles
from common.errors import KitError


class Numbered:
    """Samples that hold their dataset and their number."""

    weighted = False
    order = "listed"

    def __init__(self, name: int, samples_per_epoch: int) -> None:
        self.name, self.samples_per_epoch = name, samples_per_epoch

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.array([self.name, global_index])}


def blended(*weights: str | Fraction, sizes: tuple[int, ...] = ()) -> BlendedDataset:
    sizes = sizes or tuple(10 * (i + 1) for i in range(len(weights)))
    members = [(Fraction(w), f"d{i}", Numbered(i, n)) for i, (w, n) in enumerate(zip(weights, sizes, strict=True))]
    return BlendedDataset(members)


WEIGHTS = st.lists(st.fractions(Fraction(1, 1000), 1000, max_denominator=1000), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 10**15))
def test_each_has_its_share_after_any_number_and_each_sample_is_used_once(weights: list[Fraction], start: int) -> None:
    made = blended(*weights)
    shares = [weight / sum(weights) for weight in weights]
    counts = made.counts(start)
    assert sum(counts) == start
    for index in range(start, start + 60):
        number, sample = made.place(index)
        assert sample == counts[number]
        counts[number] += 1
        assert counts == made.counts(index + 1)
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - share * (index + 1)) < len(weights)


@pytest.mark.parametrize("weights", [["0.7", "0.3"], ["1", "1", "1"], ["0.9", "0.05", "0.05"], ["5", "1", "2", "4"]])
def test_it_is_megatrons_blend_but_for_a_sample_or_two(weights: list[str]) -> None:
    from megatron.core.datasets import helpers

    size = 2000
    which, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    shares = np.array([float(w) for w in weights]) / sum(float(w) for w in weights)
    helpers.build_blending_indices(which, sample, shares, len(weights), size, False)
    made = blended(*weights)
    ours = np.array([made.place(i)[0] for i in range(size)])
    for number in range(len(weights)):
        deviation = np.cumsum(which == number) - np.cumsum(ours == number)
        assert np.abs(deviation).max() <= 2


def test_an_epoch_is_as_long_as_the_datasets_together_and_members_count_their_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "kit")
    made = blended("0.75", "0.25", sizes=(100, 300))
    assert made.samples_per_epoch == 400
    assert "d0: 0.7500 of the samples, 300 per epoch = 3.00 epochs of it" in caplog.text
    assert "d1: 0.2500 of the samples, 100 per epoch = 0.33 epochs of it" in caplog.text
    rows = [made[i]["tokens"].tolist() for i in range(800)]
    assert [index for name, index in rows if name == 0] == list(range(600))
    assert [index for name, index in rows if name == 1] == list(range(200))
    assert made.description == "3/4 of 100, 1/4 of 300"


def test_it_is_sent_to_the_processes_that_read_ahead(tmp_path: Path) -> None:
    members = []
    for number in range(2):
        with IndexedDatasetBuilder(tmp_path / f"{number}_text_document", "<i4") as writer:
            writer.add_document(np.arange(100) + 1000 * number)
        files = DataFiles("pretrain", tmp_path / f"{number}_text_document")
        samples = build_dataset(files, train_mode="pretrain", seq_length=10, seed=1)
        members.append((Fraction(number + 1), str(number), samples))
    made = BlendedDataset(members)
    copy = pickle.loads(pickle.dumps(made))
    for index in range(40):
        assert np.array_equal(made[index]["tokens"], copy[index]["tokens"])
    from_second = [bool(made[i]["tokens"][0] >= 1000) for i in range(30)]
    assert sum(from_second) == 20


@pytest.fixture
def data(tmp_path: Path) -> SimpleNamespace:
    for name in ("a", "b c", "0.5 odd"):
        with IndexedDatasetBuilder(tmp_path / f"{name}_text_document", "<i4") as writer:
            writer.add_document([1])
    return SimpleNamespace(folder=tmp_path, a=tmp_path / "a", b=tmp_path / "b c")


def names(text: str) -> list[tuple[Fraction, str]]:
    return [(weight, files.tokens.name) for weight, files in read_blend(text)]


def test_one_path_several_with_weights_or_a_file(data: SimpleNamespace) -> None:
    assert names(str(data.a)) == [(1, "a_text_document")]
    assert names(str(data.b)) == [(1, "b c_text_document")]
    assert names(f"{data.folder}/0.5 odd") == [(1, "0.5 odd_text_document")]
    expected = [(Fraction(7, 10), "a_text_document"), (Fraction(3, 10), "b c_text_document")]
    assert names(f"0.7 {data.a} 0.3 '{data.b}'") == expected
    path = data.folder / "blend.json"
    path.write_text(f'[{{"weight": 0.7, "path": "{data.a}"}}, {{"path": "{data.b}", "weight": 0.3}}]')
    assert names(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.7 {a} 0.3", "give one dataset, or a weight before each"),
        ("{a} 0.7", "the weight '.*/a' is not a positive number"),
        ("0 {a} 1 {a}", "the weight '0' is not a positive number"),
        ("-1 {a}", "the weight '-1' is not a positive number"),
        ("nan {a}", "the weight 'nan' is not a positive number"),
        ("0.5 {a} 0.5 {a}x", "ax is not a dataset"),
        ("{a}x", "DATASET_PATH=.*ax is not a dataset"),
    ],
)
def test_an_invalid_blend_is_reported(data: SimpleNamespace, text: str, message: str) -> None:
    with pytest.raises(KitError, match=message):
        read_blend(text.format(a=data.a))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "it is not JSON"),
        ("[]", "it must hold a list"),
        ('{"a": 1}', "it must hold a list"),
        ('[{"weight": 1}]', '"weight": "1"} is not one'),
        ('[{"weight": 1, "path": "a", "more": 1}]', "is not one"),
        ('[{"weight": true, "path": "a"}]', ": the weight True is not a positive number"),
        (json.dumps({"format": "qwen-kit-data"}), "is the manifest of a dataset: remove .json from the path"),
    ],
)
def test_a_wrong_file_is_reported(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "blend.json"
    path.write_text(content)
    with pytest.raises(KitError, match=f"VALID_DATASET_PATH.*{message}"):
        read_blend(str(path), "VALID_DATASET_PATH")
