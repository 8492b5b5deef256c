"""Pairs as samples: whole in every row, split, blend and order, and truncated alike."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.dataset import manifest
from common.data.dataset.builder import build_dataset
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import DataFiles, resolve
from common.data.dataset.preference_dataset import NO_PAIR, PreferenceDataset
from common.data.dataset.show import show
from common.data.dataset.stats import fill_with_pairs, report
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError
from common.training.planning.datasets import open_data
from common.training.settings import TrainSettings

# (prompt, chosen, rejected) tokens of each pair; the lengths tell every document from the others.
SIZES = [(5, 3, 4), (2, 9, 1), (7, 2, 6), (3, 3, 5), (1, 12, 8), (6, 1, 2), (4, 4, 7), (2, 2, 3)]


def write(prefix: Path, sizes: list[tuple[int, int, int]] = SIZES) -> DataFiles:
    """Pair k has the prompt 100 k + 0, 1, ..., and answers from 100 k + 50 (chosen) and 100 k + 70 (rejected) on."""
    with (
        IndexedDatasetBuilder(Path(f"{prefix}_text_document"), "<i4") as tokens,
        IndexedDatasetBuilder(Path(f"{prefix}_loss_mask_document"), "u1") as masks,
    ):
        for k, (prompt, *answers) in enumerate(sizes):
            for first, size in zip((50, 70), answers, strict=True):
                tokens.add_document(
                    [*range(100 * k, 100 * k + prompt), *range(100 * k + first, 100 * k + first + size)]
                )
                masks.add_document([0] * prompt + [1] * size)
    documents = {"read": len(sizes), "kept": len(sizes), "dropped": {}}
    files = {"tokens": f"{prefix.name}_text_document", "loss_mask": f"{prefix.name}_loss_mask_document"}
    manifest.write(prefix, {"kind": "preference", "documents": documents, "files": files, "identity": prefix.name})
    return resolve(str(prefix))


def dataset(files: DataFiles, **more: Any) -> PreferenceDataset:
    given = {"train_mode": "dpo", "seq_length": 32, "seed": 3, **more}
    found = build_dataset(files, **given)
    assert isinstance(found, PreferenceDataset)
    return found


def answers_of(sample: dict[str, np.ndarray], seq_length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, labels, supervised labels) of each answer of a sample, without padding."""
    segments = sample.get("segment_ids")
    if segments is None:
        segments = np.repeat([0, 1], seq_length)
    found = []
    for number in range(2 * int((sample["pairs"] != NO_PAIR).sum())):
        there = np.flatnonzero(segments == number)
        end = int(np.flatnonzero(sample["loss_mask"][there])[-1]) + 1
        there = there[:end]
        labels = sample["labels"][there]
        found.append(
            (sample["tokens"][there].tolist(), labels.tolist(), labels[sample["loss_mask"][there] > 0].tolist())
        )
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_a_sample_holds_whole_pairs_and_an_epoch_each_pair_once(tmp_path: Path, packing: bool) -> None:
    samples = dataset(write(tmp_path / "a"), packing=packing)
    seen = []
    for i in range(samples.samples_per_epoch):
        sample = samples[i]
        pairs = sample["pairs"][sample["pairs"] != NO_PAIR].tolist()
        seen += pairs
        used = 0
        for number, (tokens, labels, learned) in enumerate(answers_of(sample, 32)):
            prompt, *sizes = SIZES[pairs[number // 2]]
            first = 100 * pairs[number // 2]
            answer = [*range(first + (50, 70)[number % 2], first + (50, 70)[number % 2] + sizes[number % 2])]
            document = [*range(first, first + prompt), *answer]
            assert (tokens, labels, learned) == (document[:-1], document[1:], answer)
            used += len(tokens)
        assert sample["num_padding"] == sample["tokens"].size - used
        if packing:
            assert (sample["segment_ids"] == 2 * len(pairs)).sum() == sample["num_padding"]
    assert sorted(seen) == list(range(len(SIZES)))
    assert samples.samples_per_epoch < len(SIZES) if packing else samples.samples_per_epoch == len(SIZES)


LONG = (4, 10, 14)  # 13 and 17 positions, 30 together


@pytest.mark.parametrize(
    ("truncate", "packing", "expected"),
    [
        ("left", False, ([[2, 3], 10], [[2, 3], 14])),  # 16 tokens: 2 of the prompt are cut from both
        ("right", False, ([[0, 1, 2, 3], 10], [[0, 1, 2, 3], 12])),
        ("left", True, ([[3], 10], [[3], 14])),  # 24 positions: 3 are cut from both
        ("right", True, ([[0, 1, 2, 3], 9], [[0, 1, 2, 3], 9])),
    ],
)  # fmt: skip
def test_truncation_keeps_the_same_prompt(
    tmp_path: Path, truncate: str, packing: bool, expected: tuple[list[Any], list[Any]]
) -> None:
    seq_length = 24 if packing else 15
    samples = dataset(write(tmp_path / "a", [LONG]), truncate=truncate, packing=packing, seq_length=seq_length)
    found = [([*tokens, labels[-1]], learned) for tokens, labels, learned in answers_of(samples[0], seq_length)]
    for (document, learned), (prompt, size), first in zip(found, expected, (50, 70), strict=True):
        assert document == [*prompt, *range(first, first + size)]
        assert learned == [*range(first, first + size)]
    assert samples.pair_index.truncation == f"TRUNCATE={truncate} SEQ_LENGTH={seq_length} PACKING={packing}"


def test_a_pair_that_is_too_long_is_an_error_or_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write(tmp_path / "a", [*SIZES, LONG])
    with pytest.raises(KitError, match=r"1 of 9 pairs have more than SEQ_LENGTH=15 positions in an answer with its"):
        dataset(files, seq_length=15)
    with pytest.raises(KitError, match=r"1 of 9 pairs have more than SEQ_LENGTH=29 .*both their answers.*longest 30"):
        dataset(files, seq_length=29, packing=True)
    with caplog.at_level(logging.INFO, "kit"):
        samples = dataset(files, seq_length=15, truncate="drop")
    assert samples.samples_per_epoch == len(SIZES) and samples.pair_index.truncation == ""
    with pytest.raises(KitError, match="none of the 1 pairs of this split can be used"):
        dataset(write(tmp_path / "b", [(20, 3, 3)]), seq_length=15, truncate="right")


@pytest.mark.parametrize("split", ["50,50", "70,30", "1,7", "95,5"])
def test_a_split_is_of_pairs(tmp_path: Path, split: str) -> None:
    write(tmp_path / "a")
    given = {"dataset_path": str(tmp_path / "a"), "save_checkpoint_path": "/nowhere", "train_iters": 1}
    (tmp_path / "config.json").write_text("{}")
    settings = TrainSettings(train_mode="dpo", seq_length=32, split=split, **given)
    train, valid = open_data(settings, tmp_path, 1000)
    assert isinstance(train, PreferenceDataset)
    found = [each.pair_index.pairs.tolist() for each in (train, valid) if isinstance(each, PreferenceDataset)]
    assert sum(found, []) == list(range(len(SIZES))) and train.num_pairs == len(SIZES)


def test_pairs_of_several_datasets_have_numbers_of_their_own(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    settings = TrainSettings(
        train_mode="dpo", seq_length=32, split="75,25", dataset_path=f"0.5 {tmp_path}/a 0.5 {tmp_path}/b",
        save_checkpoint_path="/nowhere", train_iters=1,
    )  # fmt: skip
    train, valid = open_data(settings, tmp_path, 1000)
    assert valid
    numbers = [int(each[i]["pairs"][0]) for each in (train, valid) for i in range(each.samples_per_epoch)]
    assert sorted(numbers) == list(range(2 * len(SIZES)))
    for each in (train, valid):
        for i in range(each.samples_per_epoch):
            sample = each[i]
            assert sample["tokens"][0] == 100 * (sample["pairs"][0] % len(SIZES)), "another dataset's number"


def test_show_and_stats_keep_pairs_together(tmp_path: Path, qwen: Path) -> None:
    files = write(tmp_path / "a", [(3, 2, 4)] * 3)
    lines = list(show(files, load_tokenizer(qwen), 1, 1, colour=False))
    assert lines[0] == "--- pair 1 of 3, chosen: 5 tokens, 2 supervised"
    assert lines[2] == "--- pair 1 of 3, rejected: 7 tokens, 4 supervised" and len(lines) == 4
    with pytest.raises(KitError, match="INDEX=3: .* holds pairs 0 to 2"):
        list(show(files, load_tokenizer(qwen), 3, 1, colour=False))
    # 4 and 6 positions a pair: two fit into 20, none into 9, where each answer has a row of its own.
    lengths = np.array([5, 7] * 3)
    assert fill_with_pairs(lengths, 20, True) == (2, 0, 30 / 40)
    assert fill_with_pairs(lengths, 9, True) == (0, 3, 0.0)
    assert fill_with_pairs(lengths, 9, False) == (3, 0, 30 / 54)
    assert fill_with_pairs(lengths, 5, False) == (0, 3, 0.0)
    text = "\n".join(report(files, [20], 2))
    assert '"preference" data, 6 documents' in text and "read 3 pairs, kept 3" in text
    assert "packed 2 samples = 1.00 steps of 2, 75.0% full, 0 pairs too long; not packed 3 samples = 1.50" in text


def test_a_manifest_of_another_number_of_pairs_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path / "a")
    assert files.manifest
    files.manifest["documents"]["kept"] = 7
    with pytest.raises(KitError, match="records 14 documents instead of 16"):
        dataset(files)
    del files.manifest["documents"], files.manifest["identity"]
    with pytest.raises(KitError, match="has no 'identity'"):
        dataset(files)
