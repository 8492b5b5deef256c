"""Parameters, gradients and optimizer state by formula, against those of the model that is built on each rank."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.estimate.weights import chunk_parameters, chunks_of_ranks, state_bytes
from common.model.shape.config import load_config
from common.parallel import ParallelSizes, parse_pipeline_layers
from tests.unit.estimate.ranks import count, write_config

# (tp, pp, dp, further settings)
LAYOUTS: list[tuple[int, int, int, dict[str, Any]]] = [
    (1, 1, 1, {}),
    (2, 1, 1, {}),
    (1, 2, 1, {}),
    (2, 2, 1, {}),
    (1, 4, 1, {}),
    (2, 4, 1, {}),
    (1, 2, 1, {"vpp": 2}),
    (2, 2, 1, {"pipeline_layers": "3,1"}),
    (2, 1, 1, {"sequence_parallel": False}),
]
SHAPES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}
PRECISIONS, REPLICAS = ("bf16", "fp32"), 4


def tasks_of(folder: Path, tp: int, pp: int, dp: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A task for each pipeline stage and data-parallel replica, of tensor rank 0."""
    same = {"folder": str(folder), "world": tp * pp * dp}
    own = {"tp": tp, "pp": pp, "global_batch_size": 8 * dp, "micro_batch_size": 1, **settings}
    return [
        {**same, "rank": tp * (replica + dp * stage), "settings": own} for stage in range(pp) for replica in range(dp)
    ]


def expected(folder: Path, tp: int, pp: int, settings: dict[str, Any]) -> list[int]:
    """The formula's parameters of each pipeline stage."""
    qwen = load_config(folder)
    layers = parse_pipeline_layers(settings.get("pipeline_layers"))
    sizes = ParallelSizes(tp * pp, tp, pp, settings.get("vpp", 1), 1, layers)
    stages = chunks_of_ranks(qwen, sizes)
    return [sum(chunk_parameters(qwen, tp, chunk) for chunk in chunks) for chunks in stages]


def layouts_of(shape: str) -> list[tuple[int, int, int, dict[str, Any]]]:
    return LAYOUTS if shape == "tied" else LAYOUTS[:4]


class Counted(NamedTuple):
    folders: dict[str, Path]  # of each shape
    ranks: dict[str, list[dict[str, Any]]]  # what is held, by shape, and for the replicas by precision


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """All ranks of all cases, counted in one process."""
    folders = {shape: write_config(tmp_path_factory.mktemp(shape), **changes) for shape, changes in SHAPES.items()}
    cases = {
        shape: [task for layout in layouts_of(shape) for task in tasks_of(folders[shape], *layout)] for shape in SHAPES
    }
    for precision in PRECISIONS:
        cases[precision] = tasks_of(folders["tied"], 2, 2, REPLICAS, {"precision": precision})
    found = iter(count([task for tasks in cases.values() for task in tasks]))
    return Counted(folders, {name: [next(found) for _ in tasks] for name, tasks in cases.items()})


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_gradients_are_those_that_are_built(shape: str, counted: Counted) -> None:
    found, folder = counted.ranks[shape], counted.folders[shape]
    formulas = [number for tp, pp, _, settings in layouts_of(shape) for number in expected(folder, tp, pp, settings)]
    assert [one["parameters"] for one in found] == formulas
    states = [state_bytes(number, "bf16", "fp32", 1) for number in formulas]
    assert [one["weights"] for one in found] == [state.weights for state in states]
    assert [one["gradients"] for one in found] == [state.gradients for state in states]
    assert [one["optimizer"] for one in found] == [state.optimizer for state in states]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_optimizer_is_divided_over_the_replicas(precision: str, counted: Counted) -> None:
    for stage, number in enumerate(expected(counted.folders["tied"], 2, 2, {})):
        replicas = counted.ranks[precision][stage * REPLICAS : (stage + 1) * REPLICAS]
        state = state_bytes(number, precision, "fp32", REPLICAS)
        shards = [one["optimizer"] for one in replicas]
        assert sum(shards) == state_bytes(number, precision, "fp32", 1).optimizer
        # A replica has its part of the padded buffer: parameters begin at multiples of 64, buffers end at one of 128.
        most = REPLICAS * state.optimizer // number * 64 * 30
        assert all(abs(shard - state.optimizer) < most for shard in shards)
        assert all(one["weights"] == state.weights and one["gradients"] == state.gradients for one in replicas)
