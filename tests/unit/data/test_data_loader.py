import itertools
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from common.data.dataset.builder import build_dataset
from common.data.dataset.data_loader import MicroBatchLoader
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import DataFiles
from common.data.dataset.sample_dataset import SampleDataset

SEQ = 4


@pytest.fixture
def samples(tmp_path: Path) -> SampleDataset:
    with IndexedDatasetBuilder(tmp_path / "a_text_document", "<i4") as writer:
        writer.add_document(range(SEQ * 40 + 1))
    files = DataFiles("pretrain", tmp_path / "a_text_document")
    return build_dataset(files, train_mode="pretrain", seq_length=SEQ, seed=1)


def taken(samples: SampleDataset, count: int, **more: int) -> list[dict[str, torch.Tensor]]:
    reader = MicroBatchLoader(samples, **more).read_from(more["start_sample"])
    return list(itertools.islice(reader, count))


def test_a_batch_is_stacked_samples(samples: SampleDataset) -> None:
    (batch,) = taken(samples, 1, start_sample=3, global_batch_size=2, micro_batch_size=2, dp_rank=0, dp_size=1)
    assert sorted(batch) == ["labels", "loss_mask", "tokens"]
    assert batch["tokens"].dtype == torch.int64 and batch["loss_mask"].dtype == torch.float32
    for name, tensor in batch.items():
        assert np.array_equal(tensor.numpy(), np.stack([samples[3][name], samples[4][name]]))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("start_sample", [0, 8, 36])
def test_over_all_ranks_each_global_batch_holds_its_samples_once(
    samples: SampleDataset, dp_size: int, micro_batch_size: int, start_sample: int
) -> None:
    steps, num = 3, 8 // (dp_size * micro_batch_size)
    ranks = [
        taken(
            samples, steps * num, start_sample=start_sample, global_batch_size=8, micro_batch_size=micro_batch_size,
            dp_rank=rank, dp_size=dp_size,
        )
        for rank in range(dp_size)
    ]  # fmt: skip
    for step in range(steps):
        for m in range(num):
            rows = [row for rank in ranks for row in rank[step * num + m]["tokens"].tolist()]
            first = start_sample + step * 8 + m * micro_batch_size * dp_size
            assert rows == [samples[first + i]["tokens"].tolist() for i in range(micro_batch_size * dp_size)]


def test_a_later_start_continues_where_an_earlier_one_would_be(samples: SampleDataset) -> None:
    def tokens(start_sample: int, count: int) -> list[list[list[int]]]:
        made = taken(
            samples, count, start_sample=start_sample, global_batch_size=8, micro_batch_size=2, dp_rank=1, dp_size=2
        )
        return [batch["tokens"].tolist() for batch in made]

    assert tokens(0, 12)[4:] == tokens(16, 8)


def test_reading_ahead_in_processes_changes_nothing(samples: SampleDataset) -> None:
    def made(num_workers: int) -> list[list[list[int]]]:
        found = taken(
            samples, 45, start_sample=2, global_batch_size=2, micro_batch_size=2, dp_rank=0, dp_size=1,
            num_workers=num_workers,
        )  # fmt: skip
        return [batch["tokens"].tolist() for batch in found]

    assert made(2) == made(0)


def workers(others: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if process not in others]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_restarts_with_the_same_processes(samples: SampleDataset, num_workers: int) -> None:
    sizes = {"global_batch_size": 2, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "num_workers": num_workers}
    others = psutil.Process().children()  # of tests before
    batches = MicroBatchLoader(samples, start_sample=0, **sizes)
    before = workers(others)
    assert len(before) == num_workers
    first = batches.read_from(0)
    expected = [next(first)["tokens"].tolist() for _ in range(3)]
    for start in (0, 2):
        again = batches.read_from(start)
        assert [next(again)["tokens"].tolist() for _ in range(3 - start // 2)] == expected[start // 2 :]
    assert workers(others) == before


def test_a_batch_has_only_the_fields_that_are_asked_for(samples: SampleDataset) -> None:
    sizes = {"global_batch_size": 2, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}
    batch = next(MicroBatchLoader(samples, start_sample=0, **sizes, fields={"labels", "pairs"}).read_from(0))
    assert list(batch) == ["labels"]
