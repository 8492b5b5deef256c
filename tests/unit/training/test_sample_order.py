"""Which order of samples a run has: by their number, or the one that it began with."""

from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import shuffle
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.errors import KitError
from tests.tiny import tiny_qwen
from tests.unit.training.test_plan import RUN, plan, write_run


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """The prefix of 100 documents of 17 tokens, and a model."""
    with IndexedDatasetBuilder(tmp_path / "a_text_document", np.dtype("<u2")) as writer:
        writer.add_documents(np.ones(1700, np.uint16), np.full(100, 17))
    return tmp_path / "a_text_document", tiny_qwen(tmp_path / "qwen")


def test_a_run_keeps_the_order_that_it_began_with(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large MAX_LISTED is now; each of two datasets keeps its own."""
    data, qwen = made
    monkeypatch.setattr(shuffle, "MAX_LISTED", 10)
    blend = f"1 {data} 1 {data}"
    assert plan(data, qwen).data_identity["order"] == "keyed"
    assert plan(data, qwen, dataset_path=blend).data_identity["order"] == "keyed, keyed"
    for saved, path in ((None, data), ("listed", data), ("keyed", data), ("keyed, listed", blend)):
        noted = {"order": saved} if saved else {}
        resumed = {"save_checkpoint_path": tmp_path / f"{saved}", "hf_model_path": None, "epochs": 7.0}
        meaning = {**RUN["data"], "samples_per_epoch": 104 if path == data else 208}
        write_run(tmp_path / f"{saved}", qwen, {"run": {**RUN, "data": {**meaning, **noted}}})
        now = plan(data, qwen, **{**resumed, "dataset_path": str(path), "split": "98,2,0"})
        assert now.data_identity["order"] == (saved or "listed")
    write_run(tmp_path / "later", qwen, {"run": {**RUN, "data": {**RUN["data"], "order": "of a later kit"}}})
    with pytest.raises(KitError, match=r"other samples \(order of a later kit -> keyed\), so its position"):
        plan(data, qwen, save_checkpoint_path=str(tmp_path / "later"), hf_model_path=None, epochs=7.0)
