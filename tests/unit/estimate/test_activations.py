"""What autograd saves during a step of each kind of layers on the CPU, against the formulas, byte for byte."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.estimate.activations import Workload, final_norm_bytes, kept_by_chunk, layer_tensors, recomputed_layers
from common.estimate.memory import work_of
from common.estimate.schedule import moments
from common.estimate.weights import Chunk, chunks_of_ranks
from common.model.shape import masks
from common.model.shape.config import load_config
from common.platforms.cpu import CPU
from common.training.settings import TrainSettings
from tests.unit.estimate.ranks import batch, count, counts_attention, write_config


def peak_saved_bytes(task: dict[str, Any]) -> int:
    """The formulas' peak of saved bytes, with those of the layer that full recomputation computes again."""
    same = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 1}
    settings = TrainSettings(**same, gpus=task["world"], **task["settings"])
    qwen, stage = load_config(Path(task["folder"])), task["rank"] // (task["world"] // settings.pp)
    work = work_of(settings, replace(CPU, fused_kernels=task["fused"]), qwen)
    chunks = chunks_of_ranks(qwen, settings.sizes)[stage]
    kept = [kept_by_chunk(work, chunk) for chunk in chunks]
    number = settings.sizes.num_microbatches(settings.global_batch_size, settings.micro_batch_size)
    most = 0
    for moment in moments(settings.pp, settings.vpp, stage, number):
        held = sum(each * size for each, size in zip(moment.in_flight, kept, strict=True))
        chunk = chunks[moment.chunk]
        if not moment.forward and recomputed_layers(work, chunk) == chunk.num_layers:
            held += recomputed_layer_bytes(work, chunk)
        most = max(most, held)
    # Recomputation saves where documents begin, in int32, here a document for each chunk: on the host, not a GPU.
    most += 4 * (2 * work.cp + 1) if work.separate and work.cp > 1 and settings.recompute != "none" else 0
    # Full recomputation saves the table of angles, float32 [s, d], shared by all layers.
    return most + (4 * work.seq_length // work.cp * qwen.head_dim if settings.recompute == "full" else 0)


def recomputed_layer_bytes(work: Workload, chunk: Chunk) -> int:
    """What the last layer of a chunk keeps while it is computed again; the norm after it keeps nothing more."""
    # The norm's input is the layer's, which is already saved, unless the norm saves a float32 copy instead.
    shared = work.residual_bytes if work.fused_kernels or work.precision == "fp32" else 0
    return sum(layer_tensors(work).values()) - shared - (final_norm_bytes(work) if chunk.last else 0)


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"micro_batch_size": 3, "global_batch_size": 6, "precision": "fp32"}),
    (1, {"recompute": "selective"}),
    (1, {"recompute": "full"}),
    (1, {"reset_attention": True}),
    (1, {"reset_attention": True, "recompute": "selective"}),
    (1, {"recompute": "full", "recompute_num_layers": 1}),
    (2, {"tp": 2}),
    (2, {"tp": 2, "recompute": "full"}),
    (2, {"tp": 2, "sequence_parallel": False}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "pipeline_layers": "3,1", "recompute": "full"}),
    (4, {"pp": 4, "global_batch_size": 2}),
    (2, {"pp": 2, "vpp": 2}),
    (2, {"cp": 2, "reset_attention": True}),
    (2, {"cp": 2, "reset_attention": True, "recompute": "selective"}),
    (4, {"cp": 2, "tp": 2, "reset_attention": True, "recompute": "full"}),
    (4, {"pp": 2, "tp": 2, "vpp": 2, "recompute": "selective", "precision": "fp32"}),
]


FUSED: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"recompute": "full"}),
    (2, {"tp": 2}),
    (2, {"tp": 2, "tp_comm_overlap": "false"}),
    (2, {"tp": 2, "sequence_parallel": False}),
    (2, {"pp": 2, "vpp": 2}),
]


LONG: list[tuple[int, dict[str, Any]]] = [
    (1, {"reset_attention": True, "micro_batch_size": 2}),
    (1, {"reset_attention": True, "recompute": "selective"}),
]


def tasks_of(folder: Path, fused: bool, layouts: list[tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A task for each pipeline stage of each layout, of tensor rank 0."""
    for world, changes in layouts:
        pp = changes.get("pp", 1)
        settings = {"seq_length": 32, **batch(pp, changes.get("micro_batch_size", 1)), **changes}
        for stage in range(pp):
            task = {"folder": str(folder), "world": world, "rank": stage * (world // pp), "settings": settings}
            yield {**task, "activations": True, "fused": fused}


class Counted(NamedTuple):
    """Tasks, and the bytes that autograd kept in each."""

    tasks: list[dict[str, Any]]
    kept: list[int]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counted]:
    """Those of usual and of long rows, counted in one process.

    Fused: SwiGLU, alone or inside products, a norm and a split QKV that save what the kernels on a GPU save.
    """
    qwen2 = write_config(tmp_path_factory.mktemp("qwen2"))
    qwen3 = write_config(tmp_path_factory.mktemp("qwen3"), model_type="qwen3", head_dim=32)
    usual = [
        *tasks_of(qwen2, False, LAYOUTS),
        *tasks_of(qwen2, True, [layout for layout in LAYOUTS if layout[0] < 4]),
        *tasks_of(qwen3, True, [(1, {}), (2, {"tp": 2})]),
        *tasks_of(qwen2, True, [(world, {**changes, "fused_products": "true"}) for world, changes in FUSED]),
    ]
    long = [{**task, "long": True} for task in tasks_of(qwen2, False, LONG)]
    kept = [one["kept"] for one in count([*usual, *long])]
    return {"usual": Counted(usual, kept[: len(usual)]), "long": Counted(long, kept[len(usual) :])}


@counts_attention
def test_what_local_layers_keep_is_what_the_formulas_say(counted: dict[str, Counted]) -> None:
    tasks, found = counted["usual"]
    named = [
        f"{Path(task['folder']).name} fused {task['fused']} rank {task['rank']} {task['settings']}" for task in tasks
    ]
    formulas = [peak_saved_bytes(task) for task in tasks]
    assert len({*named}) == len(tasks) > 30
    assert dict(zip(named, found, strict=True)) == dict(zip(named, formulas, strict=True))


@counts_attention
def test_long_rows_keep_no_mask(counted: dict[str, Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, found = counted["long"]
    with_masks = [peak_saved_bytes(task) for task in tasks]
    monkeypatch.setattr(masks, "MASK_ELEMENTS", 0)
    formulas = [peak_saved_bytes(task) for task in tasks]
    assert found == formulas
    assert all(long != masked for long, masked in zip(formulas, with_masks, strict=True))


def test_rows_that_are_joined_go_without_the_kernel_of_qkv(tmp_path: Path) -> None:
    """So a checkpointed attention saves the full QKV product for its value, not the value alone."""
    qwen = load_config(write_config(tmp_path / "qwen2"))
    same = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 1, "recompute": "selective"}
    values = []
    for packing in (False, True):
        settings = TrainSettings(**same, train_mode="finetune", packing=packing, transformer_impl="transformer_engine")
        work = work_of(settings, replace(CPU, fused_kernels=True), qwen)
        values.append(layer_tensors(work)["value"])
    assert values == [work.key_bytes, work.query_bytes + 2 * work.key_bytes]
