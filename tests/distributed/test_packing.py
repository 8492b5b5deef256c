"""Samples packed into rows, as training reads them from disk, against each of them alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.dataset.builder import build_dataset
from common.data.dataset.data_loader import collate
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import DataFiles
from tests.conversion import to_megatron
from tests.distributed.launch import worker
from tests.tiny import tiny_qwen

SEQ_LENGTH = 64
BOUND = 2e-6  # of the largest value, in float32: other shapes are summed in another order
LAYOUTS = [(1, 1, True), (2, 1, True), (2, 1, False), (1, 2, True), (2, 2, True)]


def documents(seed: int) -> list[np.ndarray]:
    """Random tokens of lengths that fill rows of 64 in different ways, one alone and some of two tokens."""
    random = np.random.default_rng(seed)
    lengths = [65, 40, 25, 30, 20, 13, 2, 2, 33, 9]
    return [random.integers(0, 400, length) for length in lengths]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, packed conversations and pretraining windows of several documents."""
    folder = tmp_path_factory.mktemp("packing")
    tiny_qwen(folder / "hf", std=0.1, spread=0.1)
    with (
        IndexedDatasetBuilder(folder / "d_text_document", "<i4") as tokens,
        IndexedDatasetBuilder(folder / "d_loss_mask_document", "<u1") as masks,
    ):
        for document in documents(0):
            tokens.add_document(document)
            masks.add_document(np.arange(document.size) % 3 > 0)
    prefix, mask = folder / "d_text_document", folder / "d_loss_mask_document"
    common = {"seq_length": SEQ_LENGTH, "seed": 5}
    packed = build_dataset(DataFiles("sft", prefix, mask), train_mode="finetune", packing=True, **common)
    windows = build_dataset(DataFiles("pretrain", prefix), train_mode="pretrain", reset_attention=True, **common)
    for name, samples in (("packed", packed), ("windows", windows)):
        rows = [samples[i] for i in range(samples.samples_per_epoch)]
        rows = [{name: values for name, values in row.items() if values.shape} for row in rows]  # by position
        torch.save(collate(rows), folder / f"{name}.pt")
    return folder


def compared(work: Path, batch: str, tp: int, pp: int, sequence_parallel: bool) -> dict[str, Any]:
    target = work / f"megatron_{tp}_{pp}"
    if not target.exists():
        to_megatron(work / "hf", target, tp=tp, pp=pp, ckpt_format="torch", transformer_impl="local")
    settings = {
        "tp": tp, "pp": pp, "gpus": tp * pp, "seq_length": SEQ_LENGTH, "micro_batch_size": 1, "global_batch_size": 1,
        "precision": "fp32", "sequence_parallel": sequence_parallel,
    }  # fmt: skip
    task = {
        "settings": settings, "load": str(target), "batch": str(work / f"{batch}.pt"), "out": str(work / "out.json"),
    }  # fmt: skip
    worker(tp * pp, task, "packing_worker")
    return json.loads((work / "out.json").read_text())


@pytest.mark.parametrize(("tp", "pp", "sequence_parallel"), LAYOUTS)
def test_packed_samples_are_to_the_model_what_each_is_alone(
    work: Path, tp: int, pp: int, sequence_parallel: bool
) -> None:
    rows = torch.load(work / "packed.pt")["tokens"].shape[0]
    assert rows < len(documents(0)), "some share a row"
    found = compared(work, "packed", tp, pp, sequence_parallel)
    check(found, rows)


@pytest.mark.parametrize(("tp", "pp", "sequence_parallel"), [(1, 1, True), (2, 2, True)])
def test_documents_of_one_window_are_separated_by_the_same_means(
    work: Path, tp: int, pp: int, sequence_parallel: bool
) -> None:
    rows = torch.load(work / "windows.pt")["tokens"].shape[0]
    check(compared(work, "windows", tp, pp, sequence_parallel), rows)


def check(found: dict[str, Any], rows: int) -> None:
    kept, without = found["kept"], found["without"]
    assert found["rows"] > rows and kept["num_gradients"] > 0
    assert abs(kept["loss"] - kept["loss_alone"]) <= BOUND * kept["loss_alone"]
    assert kept["logits"] <= BOUND and kept["gradients"] <= 10 * BOUND, kept
    joined = found["joined"]
    assert abs(joined["loss"] - joined["loss_alone"]) <= BOUND * joined["loss_alone"]
    assert joined["gradients"] <= 10 * BOUND, joined
    # Rows that are not separated are far outside of these bounds, so the bounds are meaningful.
    assert without["logits"] > 1000 * BOUND and without["gradients"] > 1000 * BOUND, without
    assert abs(without["loss"] - without["loss_alone"]) > 100 * BOUND * without["loss_alone"], without
