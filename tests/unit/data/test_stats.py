import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import DataFiles
from common.data.dataset.stats import draw_histogram, fill_rows, histogram, report, supervised_tokens, write_png
from common.errors import KitError


def data(folder: Path, lengths: list[int], learned: int | None = None) -> DataFiles:
    """Documents of these lengths; with `learned`, a mask with that many tokens learned at each one's end."""
    with IndexedDatasetBuilder(folder / "d_text_document", "<i4") as writer:
        for length in lengths:
            writer.add_document([1] * length)
    if learned is None:
        return DataFiles("pretrain", folder / "d_text_document")
    with IndexedDatasetBuilder(folder / "d_loss_mask_document", "<f4") as writer:
        for length in lengths:
            writer.add_document([0] * (length - learned) + [0.5] * learned)
    return DataFiles("sft", folder / "d_text_document", folder / "d_loss_mask_document")


def test_the_histogram_has_every_document_in_its_bin() -> None:
    lengths = np.array([0, 1, 2, 3, 4, 7, 8, 1000, 1023, 1024])
    bins = histogram(lengths)
    for low, high, number in bins:
        assert number == int(((lengths >= low) & (lengths <= high)).sum())
    assert sum(number for _, _, number in bins) == lengths.size
    assert bins[0][:2] == (0, 0) and bins[-1] == (1024, 2047, 1)
    lines = list(draw_histogram([(1, 1, 3), (2, 3, 0), (4, 7, 300)]))
    assert [line.count("#") for line in lines] == [1, 0, 50]
    assert histogram(np.array([], int)) == [] and list(draw_histogram([])) == []


def test_rows_of_conversations() -> None:
    found = fill_rows(np.array([5, 5, 9, 10, 1, 3]), 8, "sft")
    # 10 tokens are 9 positions, too many for 8; one token has nothing to predict.
    assert (found.too_long, found.rows, found.packed_rows) == (1, 4, 3)
    assert (found.full, found.packed_full) == (18 / 32, 18 / 24)


def test_rows_of_documents() -> None:
    found = fill_rows(np.array([5, 12]), 8, "pretrain")
    assert (found.rows, found.too_long) == (2, 0)


def test_the_report_of_conversations(tmp_path: Path) -> None:
    files = data(tmp_path, [5, 5, 9, 10], 3)
    assert supervised_tokens(files) == 12
    lines = list(report(files, [8, 16], 2))
    assert "4 documents, 29 tokens" in lines[0] and "5 to 10, mean 7.2" in lines[1]
    assert "supervised: 12 tokens, 41.4%" in lines
    assert lines[-2] == (
        "SEQ_LENGTH=8: 1 too long; packed 2 rows = 1.00 steps of 2, 100.0% full;"
        " not packed 3 rows = 1.50 steps of 2, 66.7% full"
    )


def test_the_report_of_documents_with_a_manifest(tmp_path: Path) -> None:
    bare = data(tmp_path, [5, 12])
    manifest = {"documents": {"read": 5, "kept": 2, "dropped": {"no text": 3}}}
    lines = list(report(DataFiles("pretrain", bare.tokens, None, manifest), [8], None))
    assert "read 5 documents, kept 2, 3 dropped (no text)" in lines
    assert lines[-1] == "SEQ_LENGTH=8: 2 samples per epoch" and not any("supervised" in line for line in lines)


def test_no_document_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="holds no document"):
        list(report(data(tmp_path, []), [8], None))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_picture(tmp_path: Path) -> None:
    write_png(np.array([1, 5, 900]), "data", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KitError, match="PNG=.* cannot be written"):
        write_png(np.array([1]), "data", tmp_path / "no" / "a.png")


def test_without_matplotlib_the_remedy_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(KitError, match=r"plotting needs matplotlib: install requirements/plots\.txt"):
        write_png(np.array([1]), "data", tmp_path / "a.png")
