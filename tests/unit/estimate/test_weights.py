"""Parameters, gradients and optimizer state by formula, against those of the model that is built on each rank."""

from pathlib import Path
from typing import Any

import pytest

from common.estimate.weights import chunk_parameters, chunks_of_rank, state_bytes
from common.model.config import load_config
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
    stages = [chunks_of_rank(qwen, sizes, stage) for stage in range(pp)]
    return [sum(chunk_parameters(qwen, tp, chunk) for chunk in chunks) for chunks in stages]


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_gradients_are_those_that_are_built(shape: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path, **SHAPES[shape])
    layouts = LAYOUTS if shape == "tied" else LAYOUTS[:4]
    tasks = [task for layout in layouts for task in tasks_of(folder, *layout)]
    found = count(tasks)
    formulas = [number for tp, pp, _, settings in layouts for number in expected(folder, tp, pp, settings)]
    assert [one["parameters"] for one in found] == formulas
    states = [state_bytes(number, "bf16", "fp32", 1) for number in formulas]
    assert [one["weights"] for one in found] == [state.weights for state in states]
    assert [one["gradients"] for one in found] == [state.gradients for state in states]
    assert [one["optimizer"] for one in found] == [state.optimizer for state in states]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_optimizer_is_divided_over_the_replicas(precision: str, tmp_path: Path) -> None:
    folder, dp = write_config(tmp_path), 4
    found = count(tasks_of(folder, 2, 2, dp, {"precision": precision}))
    for stage, number in enumerate(expected(folder, 2, 2, {})):
        shards = [one["optimizer"] for one in found[stage * dp : (stage + 1) * dp]]
        state = state_bytes(number, precision, "fp32", dp)
        assert sum(shards) == state_bytes(number, precision, "fp32", 1).optimizer
        # A replica has its part of the padded buffer: parameters begin at multiples of 64, buffers end at one of 128.
        most = dp * state.optimizer // number * 64 * 30
        assert all(abs(shard - state.optimizer) < most for shard in shards)
        assert found[stage * dp]["weights"] == state.weights and found[stage * dp]["gradients"] == state.gradients
