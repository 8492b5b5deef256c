import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import indexed_dataset as megatron_indexed_dataset

from common.data.dataset import indexed_dataset
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, bin_path, idx_path, token_dtype
from common.errors import KitError

DOCUMENTS = [[5, 6, 7], [1], [399] * 50, [0, 65499]]


def write(prefix: Path, documents: list[list[int]], dtype: str = "<i4") -> Path:
    with IndexedDatasetBuilder(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: type) -> Path:
    builder = megatron_indexed_dataset.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for document in documents:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))
    return prefix


def same_bytes(one: Path, other: Path) -> bool:
    return all(path(one).read_bytes() == path(other).read_bytes() for path in (bin_path, idx_path))


@pytest.mark.parametrize("name", ["uint8", "int32", "uint16", "int64", "float32"])
def test_bytes_are_those_of_megatrons_builder(tmp_path: Path, name: str) -> None:
    documents = [[1, 2, 3], [250], [7, 8]]
    ours = write(tmp_path / "ours", documents, np.dtype(name).newbyteorder("<").str)
    theirs = write_with_megatron(tmp_path / "theirs", documents, getattr(np, name))
    assert same_bytes(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65000), min_size=1, max_size=20), min_size=1, max_size=20))
def test_megatron_reads_what_was_written(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    prefix = write(tmp_path_factory.mktemp("data") / "a.b_document", documents)
    theirs, ours = megatron_indexed_dataset.IndexedDataset(str(prefix)), IndexedDataset(prefix)
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert [ours[i].tolist() for i in range(len(ours))] == documents
    assert ours.lengths.tolist() == [len(document) for document in documents] and ours.lengths.dtype == np.int32


def test_index_longer_than_a_block_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[i] * (i % 5 + 1) for i in range(100)]
    theirs = write_with_megatron(tmp_path / "theirs", documents, np.int32)
    monkeypatch.setattr(indexed_dataset, "BLOCK", 7)
    assert same_bytes(write(tmp_path / "ours", documents), theirs)


def test_many_documents_at_once_equal_one_by_one(tmp_path: Path) -> None:
    one = write(tmp_path / "one", DOCUMENTS)
    with IndexedDatasetBuilder(tmp_path / "two", "<i4") as writer:
        lengths = np.array([len(document) for document in DOCUMENTS])
        writer.add_documents(np.concatenate([np.array(document, np.int32) for document in DOCUMENTS]), lengths)
    assert same_bytes(one, tmp_path / "two")


def test_append_equals_writing_all(tmp_path: Path) -> None:
    complete = write(tmp_path / "whole", DOCUMENTS)
    parts = [write(tmp_path / f"part{i}", part) for i, part in enumerate((DOCUMENTS[:1], [], DOCUMENTS[1:]))]
    with IndexedDatasetBuilder(tmp_path / "joined", "<i4") as writer:
        for part in parts:
            writer.add_index(part)
    assert same_bytes(complete, tmp_path / "joined")


def test_append_refuses_another_dtype(tmp_path: Path) -> None:
    other = write(tmp_path / "other", [[1]], "<u2")
    with pytest.raises(KitError, match="uint16.*int32"), IndexedDatasetBuilder(tmp_path / "joined", "<i4") as writer:
        writer.add_index(other)


@pytest.mark.parametrize("vocab_size", [400, 65499, 65500, 151665])
def test_dtype_is_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) == np.dtype(megatron_indexed_dataset.DType.optimal_dtype(vocab_size))


def test_slices(tmp_path: Path) -> None:
    reader = IndexedDataset(write(tmp_path / "a", DOCUMENTS))
    assert reader.get(0, 1, 1).tolist() == [6]
    assert reader.get(0, 1).tolist() == [6, 7]
    assert reader.get(0, 2, 99).tolist() == [7]


def test_reader_survives_pickling_without_its_data(tmp_path: Path) -> None:
    data = pickle.dumps(IndexedDataset(write(tmp_path / "a", [[3] * 10000])))
    assert len(data) < 1000
    assert pickle.loads(data)[0].tolist() == [3] * 10000


def test_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    prefix = tmp_path / "split"
    builder = megatron_indexed_dataset.IndexedDatasetBuilder(str(bin_path(prefix)), dtype=np.int32)
    for document in ([[1, 2], [3]], [], [[4]], []):
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))
    reader = IndexedDataset(prefix)
    assert [reader[i].tolist() for i in range(len(reader))] == [[1, 2, 3], [], [4], []]


def test_nothing_has_its_final_name_before_close(tmp_path: Path) -> None:
    writer = IndexedDatasetBuilder(tmp_path / "a", "<i4")
    writer.add_document([1])
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin.partial", "a.idx.partial"}
    writer.finalize()
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}


def test_an_error_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), IndexedDatasetBuilder(tmp_path / "a", "<i4") as writer:
        writer.add_document([1 // 0])
    assert not list(tmp_path.iterdir())


def test_missing_truncated_and_foreign_files_are_reported(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", DOCUMENTS)
    index, data = idx_path(prefix).read_bytes(), bin_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(index[:-1])
    with pytest.raises(KitError, match="truncated"):
        IndexedDataset(prefix)
    idx_path(prefix).write_bytes(b"PK" + index[2:])
    with pytest.raises(KitError, match="is not a Megatron index"):
        IndexedDataset(prefix)
    idx_path(prefix).write_bytes(index[:20])
    with pytest.raises(KitError, match="is not a Megatron index"):
        IndexedDataset(prefix)
    idx_path(prefix).write_bytes(index)
    bin_path(prefix).write_bytes(data[:-4])
    with pytest.raises(KitError, match="do not belong together"):
        IndexedDataset(prefix)
    bin_path(prefix).unlink()
    with pytest.raises(KitError, match=r"a\.bin does not exist"):
        IndexedDataset(prefix)


def test_memory_does_not_grow_with_documents(tmp_path: Path) -> None:
    program = (
        "import sys, resource, numpy as np; from pathlib import Path\n"
        "from common.data.dataset.indexed_dataset import IndexedDatasetBuilder\n"
        "with IndexedDatasetBuilder(Path(sys.argv[1]), '<u2') as writer:\n"
        "    for _ in range(int(sys.argv[2])):\n"
        "        writer.add_documents(np.ones(200000, np.uint16), np.ones(200000, np.int64))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )

    def peak_kib(batches: int) -> int:
        command = [sys.executable, "-c", program, str(tmp_path / "a"), str(batches)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        return int(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)

    # 9 million more documents: 36 MB of lengths and 72 MB of offsets, were they kept.
    assert peak_kib(60) - peak_kib(15) < 24 * 1024


def test_early_writeback_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small documents and those larger than the buffer, with writeback started after every few bytes, or never."""
    written = []
    for name, size in (("often", 10), ("never", 1 << 40)):
        monkeypatch.setattr(indexed_dataset, "WRITEBACK_BYTES", size)
        with IndexedDatasetBuilder(tmp_path / name, "<i4") as writer:
            for length in (1, 3, 400_000, 2, 300_000, 1):
                writer.add_document(np.arange(length))
        written.append([Path(f"{tmp_path / name}{end}").read_bytes() for end in (".bin", ".idx")])
    assert written[0] == written[1] and len(written[0][0]) == 4 * 700_007
