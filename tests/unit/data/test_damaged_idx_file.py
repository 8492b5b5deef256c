"""Damaged data files: refused with the file and a remedy, or read as they were, never as anything else."""

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import idx_file
from common.data.dataset.builder import build_dataset
from common.data.dataset.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    bin_path,
    idx_path,
    open_mask,
    open_tokens,
)
from common.data.dataset.manifest import DataFiles
from common.errors import KitError

DOCUMENTS = [[5, 6, 7], [1], [], [64000] * 20, [0, 65499], [3] * 9]
EXTREMES = [0, 1, 2, 3, 6, 7, 8, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def write(prefix: Path, dtype: str = "<u2", documents: list[list[int]] = DOCUMENTS) -> Path:
    with IndexedDatasetBuilder(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content` with a fault of one kind, at a place and of a size by `chance`."""
    data, kind = bytearray(content), chance.randrange(7)
    at = chance.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        data[at] = chance.randrange(256)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data += chance.randbytes(chance.choice([1, 4, 8, 12, 20]))
    elif kind == 4:
        size = chance.choice([1, 4, 8])
        del data[at : at + size]
    else:  # an integer of the file: the type, a count, or an element of an array
        n = len(DOCUMENTS)
        places = [(9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q")]
        places += [(34 + 4 * i, "<i") for i in range(n)] + [(34 + 4 * n + 8 * i, "<q") for i in range(2 * n + 1)]
        offset, kind_of = chance.choice(places)
        bits = 8 * struct.calcsize(kind_of)
        (old,) = struct.unpack_from(kind_of.upper(), data, offset)
        new = chance.choice([chance.choice(EXTREMES), old + chance.randrange(-3, 4)])
        struct.pack_into(kind_of.upper(), data, offset, new % (1 << bits))
    return bytes(data)


@pytest.mark.parametrize("dtype, seed", [("<u2", 1), ("<i4", 2), ("<i8", 3)])
def test_a_mutated_index_is_refused_or_is_the_same_data(tmp_path: Path, dtype: str, seed: int) -> None:
    prefix, chance = write(tmp_path / "a", dtype), random.Random(seed)
    index, refused = idx_path(prefix).read_bytes(), 0
    for _ in range(1000):
        changed = mutated(index, chance)
        idx_path(prefix).write_bytes(changed)
        try:
            reader = open_tokens(prefix)
        except KitError as error:
            refused += 1
            assert str(prefix) in str(error)
            continue
        found = [reader[i].tolist() for i in range(len(reader))]
        assert found == DOCUMENTS and changed == index, changed
    assert refused > 800


def test_two_faults_that_mask_each_other_are_refused_too(tmp_path: Path) -> None:
    """Lengths with the sum they had, and their offsets with them: the documents' bounds in the data would be others."""
    prefix = write(tmp_path / "a")
    index = idx_path(prefix).read_bytes()
    lengths = np.frombuffer(index, "<i4", 6, 34).copy()
    lengths[[0, 1]] += [1000, -1000]
    idx_path(prefix).write_bytes(index[:34] + lengths.tobytes() + index[58:])
    with pytest.raises(KitError, match=r"a\.idx is damaged: sequence 1 has a length of -999: copy it again, or write"):
        IndexedDataset(prefix)
    lengths[[0, 1]] = [2, 2]
    idx_path(prefix).write_bytes(index[:34] + lengths.tobytes() + index[58:])
    with pytest.raises(KitError, match=r"sequence 1 begins at byte 6, but the one before it ends at 4"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("block", [1, 2, 4, 1 << 20])
def test_a_fault_is_found_in_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(idx_file, "BLOCK", block)
    prefix = write(tmp_path / "a")
    index = idx_path(prefix).read_bytes()
    IndexedDataset(prefix)
    for offset, size in [*((34 + 4 * i, 4) for i in range(6)), *((58 + 8 * i, 8) for i in range(13))]:
        changed = bytearray(index)
        changed[offset : offset + size] = (int.from_bytes(index[offset : offset + size], "little") + 1).to_bytes(
            size, "little"
        )
        idx_path(prefix).write_bytes(changed)
        with pytest.raises(KitError):
            IndexedDataset(prefix)


def test_a_bin_of_any_other_size_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a")
    data = bin_path(prefix).read_bytes()
    for size in [*range(len(data)), len(data) + 1, len(data) + 2, 2 * len(data)]:
        bin_path(prefix).write_bytes((data * 2)[:size])
        for check in (True, False):
            with pytest.raises(KitError, match=r"a\.bin has \d+ bytes"):
                IndexedDataset(prefix, check)


def test_types_that_are_no_ids_and_no_mask_are_refused(tmp_path: Path) -> None:
    for dtype in ("i1", "<i2", "<f4", "<f8"):
        with pytest.raises(KitError, match="tokens have uint8 or uint16 or int32 or int64: it is damaged"):
            open_tokens(write(tmp_path / "a", dtype, [[1, 2]]))
    for dtype in ("i1", "<i4", "<u2", "<f8"):
        with pytest.raises(KitError, match="loss masks have uint8 or float32: it is damaged"):
            open_mask(write(tmp_path / "a", dtype, [[1, 2]]))


def test_an_index_of_a_kind_that_is_not_text_alone_is_refused(tmp_path: Path) -> None:
    """Megatron-Core's multimodal index ends in a mode for each sequence."""
    prefix = write(tmp_path / "a")
    with idx_path(prefix).open("ab") as stream:
        stream.write(bytes(len(DOCUMENTS)))
    with pytest.raises(KitError, match="damaged or holds multimodal data"):
        IndexedDataset(prefix)


def test_unreadable_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "a")
    opened = Path.open

    def refuse(path: Path, *words: str, **more: int) -> object:
        if path == bin_path(prefix):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", refuse)  # permissions alone do not stop root
    with pytest.raises(KitError, match=r"a\.bin: Permission denied"):
        IndexedDataset(prefix)


def test_training_refuses_files_that_do_not_match_their_manifest(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a_text_document", documents=[[1] * 50])
    manifest = {"documents": {"read": 1, "kept": 1, "dropped": {}}, "tokens": 50}
    common = {"train_mode": "pretrain", "seq_length": 8, "seed": 1}
    assert build_dataset(DataFiles("pretrain", prefix, None, manifest), **common).samples_per_epoch == 6  # type: ignore[arg-type]
    write(prefix, documents=[[1] * 30, [1] * 19])
    with pytest.raises(KitError, match=r"records 1 documents instead of 2; 50 tokens instead of 49"):
        build_dataset(DataFiles("pretrain", prefix, None, manifest), **common)  # type: ignore[arg-type]
