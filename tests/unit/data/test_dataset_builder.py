import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.dataset import shuffle
from common.data.dataset.builder import build_dataset, split_documents
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import DataFiles
from common.data.dataset.sample_dataset import SampleDataset
from common.errors import KitError

LENGTHS = [7, 1, 30, 4, 4, 2, 55, 9, 12, 3, 0, 17]
PAD = 9999


def token(document: int, position: int) -> int:
    """A different token at each place, never the padding."""
    return 1 + document * 100 + position


def pretrain_data(folder: Path, lengths: list[int] = LENGTHS) -> DataFiles:
    with IndexedDatasetBuilder(folder / "p_text_document", "<i4") as writer:
        for document, length in enumerate(lengths):
            writer.add_document([token(document, i) for i in range(length)])
    return DataFiles("pretrain", folder / "p_text_document")


def sft_data(folder: Path, lengths: list[int], masks: list[list[int]] | None = None) -> DataFiles:
    """Every third token is learned unless `masks` say otherwise."""
    pretrain_data(folder, lengths)
    with IndexedDatasetBuilder(folder / "p_loss_mask_document", "u1") as writer:
        for document, length in enumerate(lengths):
            writer.add_document(masks[document] if masks else [int(i % 3 == 1) for i in range(length)])
    return DataFiles("sft", folder / "p_text_document", folder / "p_loss_mask_document")


def pretrain(files: DataFiles, seq_length: int = 8, seed: int = 1, **more: object) -> SampleDataset:
    return build_dataset(files, train_mode="pretrain", seq_length=seq_length, seed=seed, **more)  # type: ignore[arg-type]


def finetune(files: DataFiles, seq_length: int = 16, **more: object) -> SampleDataset:
    more = {"seed": 1, "pad_id": PAD, **more}
    return build_dataset(files, train_mode="finetune", seq_length=seq_length, **more)  # type: ignore[arg-type]


def epoch(samples: SampleDataset, number: int = 0) -> list[dict[str, np.ndarray]]:
    start = number * samples.samples_per_epoch
    return [samples[i] for i in range(start, start + samples.samples_per_epoch)]


# --- the split


@pytest.mark.parametrize("number", [0, 1, 10, 99, 1001])
@pytest.mark.parametrize("split", ["98,2,0", "1,0,0", "969,30,1", "1,1", "7", "0.5,0.25,0.25", "1,1,1"])
def test_split_is_megatrons(number: int, split: str) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    theirs = [range(0) if part is None else range(*(int(round(x * number)) for x in part)) for part in matrix[:2]]
    assert [list(part) for part in split_documents(number, split)] == [list(part) for part in theirs]


@pytest.mark.parametrize("split", ["", "a,b", "98,2,0,1", "-1,2", "0,0,0", "0,1", "nan,1", "inf,1"])
def test_wrong_splits_are_reported(split: str) -> None:
    with pytest.raises(KitError, match=f"SPLIT={split}: give one to three non-negative numbers"):
        split_documents(10, split)


# --- pretraining


@pytest.mark.parametrize("listed", [True, False])
def test_windows_hold_the_documents_in_the_epochs_order_and_the_rest_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:

    monkeypatch.setattr(shuffle, "GROUP", 5)
    with caplog.at_level("INFO", "kit"):
        samples = pretrain(pretrain_data(tmp_path), listed=listed)
    assert samples.order == ("listed" if listed else "keyed")
    total = sum(LENGTHS)
    assert samples.samples_per_epoch == (total - 1) // 8 == 17
    assert f"{total} tokens make 17 samples per epoch, dropping the last {total - 1 - 17 * 8} tokens" in caplog.text
    rows = epoch(samples)
    # Windows overlap by one token, so labels show which window comes next.
    after = {int(row["labels"][-1]): row for row in rows}
    by_start = {int(row["tokens"][0]): row for row in rows}
    (first,) = set(by_start) - set(after)
    stream = [first]
    while stream[-1] in by_start:
        stream += by_start[stream[-1]]["labels"].tolist()
    assert len(stream) == 17 * 8 + 1
    documents = [(value - 1) // 100 for value in stream]
    changes = [documents[0]] + [b for a, b in zip(documents, documents[1:], strict=False) if a != b]
    assert len(changes) == len(set(changes)) and changes != sorted(changes)
    for document in changes[:-1]:
        own = [value for value in stream if (value - 1) // 100 == document]
        assert own == [token(document, i) for i in range(LENGTHS[document])]


def test_a_sample_has_its_arrays(tmp_path: Path) -> None:
    sample = pretrain(pretrain_data(tmp_path), seq_length=20)[0]
    assert sorted(sample) == ["labels", "loss_mask", "tokens"]
    assert [sample[name].dtype.name for name in ("tokens", "labels", "loss_mask")] == ["int64", "int64", "float32"]
    assert all(array.shape == (20,) for array in sample.values())
    assert sample["loss_mask"].all() and (sample["labels"][:-1] == sample["tokens"][1:]).all()


def test_reset_attention_numbers_the_documents_of_a_window(tmp_path: Path) -> None:
    for sample in epoch(pretrain(pretrain_data(tmp_path), seq_length=20, reset_attention=True)):
        segments, documents = sample["segment_ids"], (sample["tokens"] - 1) // 100
        assert segments.dtype == np.int32 and segments[0] == 0
        assert ((np.diff(segments) == 1) == (np.diff(documents) != 0)).all()
        assert set(np.diff(segments)) <= {0, 1}


def same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> bool:
    return all((a[name] == b[name]).all() for a, b in zip(one, other, strict=True) for name in a)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("kind", ["pretrain", "finetune", "packed"])
def test_the_order_depends_on_seed_and_epoch_alone(tmp_path: Path, kind: str, listed: bool) -> None:
    def opened(seed: int = 1) -> SampleDataset:
        if kind == "pretrain":
            return pretrain(pretrain_data(tmp_path), seed=seed, listed=listed)
        files = sft_data(tmp_path, list(range(2, 40)))
        return finetune(files, 64, seed=seed, packing=kind == "packed", listed=listed)

    samples = opened()
    first, second = epoch(samples, 0), epoch(samples, 1)
    assert not same(first, second) and same(epoch(samples, 0), first)
    fresh = opened()
    assert same(epoch(fresh, 1), second), "an epoch must not depend on those before it"
    assert not same(epoch(opened(seed=2), 0), first)
    assert same(epoch(pickle.loads(pickle.dumps(samples)), 1), second)


def test_many_samples_are_listed_only_where_an_older_run_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "MAX_LISTED", 29)  # 12 documents and 17 samples
    files = pretrain_data(tmp_path)
    few = pretrain(files)
    monkeypatch.setattr(shuffle, "MAX_LISTED", 28)
    many, of_before = pretrain(files), pretrain(files, listed=True)
    assert [each.order for each in (few, many, of_before)] == ["listed", "keyed", "listed"]
    assert same(epoch(few), epoch(of_before)) and not same(epoch(few), epoch(many))


def test_only_the_splits_documents_are_used(tmp_path: Path) -> None:
    files = pretrain_data(tmp_path)
    seen = {(t - 1) // 100 for row in epoch(pretrain(files, documents=range(2, 7))) for t in row["tokens"].tolist()}
    assert seen <= set(range(2, 7)) and len(seen) >= 3
    files = sft_data(tmp_path, list(range(2, 14)))
    rows = epoch(finetune(files, documents=range(3, 6)))
    assert sorted((int(row["tokens"][0]) - 1) // 100 for row in rows) == [3, 4, 5]


def test_too_little_data_and_the_other_kind_are_reported(tmp_path: Path) -> None:
    files = pretrain_data(tmp_path)
    total = sum(LENGTHS)
    assert pretrain(files, seq_length=total - 1).samples_per_epoch == 1
    with pytest.raises(KitError, match=rf"12 documents of this split hold {total} tokens.* = {total + 1}"):
        pretrain(files, seq_length=total)
    with pytest.raises(KitError, match='is "pretrain" data, but TRAIN_MODE=finetune needs "sft" data'):
        finetune(files)
    with pytest.raises(KitError, match='is "sft" data, but TRAIN_MODE=pretrain needs "pretrain" data'):
        pretrain(sft_data(tmp_path, [5, 5]))
    with pytest.raises(KitError, match="SEED=-1"):
        pretrain(files, seed=-1)


def test_an_epoch_of_a_million_documents_is_ordered_in_about_a_second(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "p_text_document", "<u2") as writer:
        writer.add_documents(np.ones(20_000_000, np.uint16), np.full(1_000_000, 20))
    samples = pretrain(DataFiles("pretrain", tmp_path / "p_text_document"), seq_length=64)
    started = time.perf_counter()
    samples[0]
    assert time.perf_counter() - started < 3
    started = time.perf_counter()
    for i in range(1, 101):
        samples[i]
    assert time.perf_counter() - started < 0.5


# --- fine-tuning


def test_a_padded_sample(tmp_path: Path) -> None:
    (sample,) = epoch(finetune(sft_data(tmp_path, [6], [[0, 0, 1, 1, 0, 1]]), 8))
    assert sorted(sample) == ["labels", "loss_mask", "num_padding", "tokens"] and sample["num_padding"] == 3
    assert sample["tokens"].tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD]
    assert sample["labels"].tolist() == [2, 3, 4, 5, 6, PAD, PAD, PAD]
    assert sample["loss_mask"].tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert [sample[name].dtype.name for name in ("tokens", "labels", "loss_mask")] == ["int64", "int64", "float32"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 17), min_size=1, max_size=20), st.integers(1, 3))
def test_packed_rows_hold_every_sample_once_and_never_cross(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int
) -> None:
    samples = finetune(sft_data(tmp_path_factory.mktemp("data"), lengths), 16, packing=True, seed=seed)
    seen = []
    for row in epoch(samples):
        segments = row["segment_ids"]
        assert segments.dtype == np.int32 and set(np.diff(segments)) <= {0, 1} and segments[0] == 0
        for segment in range(segments.max() + 1):
            at = segments == segment
            tokens, labels, mask = (row[name][at] for name in ("tokens", "labels", "loss_mask"))
            if (tokens == PAD).any():
                assert segment == segments.max() and (tokens == PAD).all() and (labels == PAD).all() and not mask.any()
                continue
            document = (int(tokens[0]) - 1) // 100
            seen.append(document)
            size = lengths[document]
            assert tokens.tolist() == [token(document, i) for i in range(size - 1)]
            assert labels.tolist() == [token(document, i) for i in range(1, size)]
            assert mask.tolist() == [float(i % 3 == 1) for i in range(1, size)]
    assert sorted(seen) == list(range(len(lengths)))


def firsts(samples: SampleDataset) -> list[tuple[int, int]]:
    """(first token, last label) of each sample of an epoch."""
    rows = epoch(samples)
    return sorted((int(row["tokens"][0]), int(row["labels"][row["labels"] != PAD][-1])) for row in rows)


def test_too_long_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:

    # 17 tokens fill 16 positions; 18 do not fit.
    files = sft_data(tmp_path, [17, 18, 5])
    with pytest.raises(KitError, match=r"1 of 3 samples have more than SEQ_LENGTH \+ 1 = 17 tokens, the longest 18"):
        finetune(files)
    with caplog.at_level("INFO", "kit"):
        assert firsts(finetune(files, truncate="drop")) == [(1, 17), (201, 205)]
        assert firsts(finetune(files, truncate="right")) == [(1, 17), (101, 117), (201, 205)]
        assert firsts(finetune(files, truncate="left")) == [(1, 17), (102, 118), (201, 205)]
    log = caplog.text
    assert "dropped" in log and "truncated from the right" in log and "truncated from the left" in log
    with pytest.raises(KitError, match="TRUNCATE=middle is unknown"):
        finetune(files, truncate="middle")


def test_a_cut_that_leaves_nothing_to_learn_drops_the_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:

    # The first remaining token is no label.
    at_end, at_start = [0] * 19 + [1], [1, 1, 0, 1] + [0] * 16
    files = sft_data(tmp_path, [20, 20, 4], [at_end, at_start, [0, 1, 1, 1]])
    with caplog.at_level("INFO", "kit"):
        assert firsts(finetune(files, truncate="right")) == [(101, 117), (201, 204)]
        assert firsts(finetune(files, truncate="left")) == [(4, 20), (201, 204)]
    assert caplog.text.count("dropped 1 samples that have nothing to train on after truncation") == 2


def test_samples_of_one_token_are_dropped_and_none_left_is_an_error(tmp_path: Path) -> None:
    assert finetune(sft_data(tmp_path, [1, 5])).samples_per_epoch == 1
    with pytest.raises(KitError, match="none of the 1 samples"):
        finetune(sft_data(tmp_path, [1]))


def test_a_mask_of_other_data_is_reported(tmp_path: Path) -> None:
    files = sft_data(tmp_path, [5, 6])
    (tmp_path / "other").mkdir()
    other = sft_data(tmp_path / "other", [6, 5])
    with pytest.raises(KitError, match="does not match"):
        finetune(DataFiles("sft", files.tokens, other.loss_mask))
