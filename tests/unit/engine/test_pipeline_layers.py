"""PIPELINE_LAYERS: how it is read, what Megatron-Core gets, and which versions and checkpoints it fits."""

from pathlib import Path

import pytest

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.formats.common_state import check_parallel_sizes
from common.engine import versions
from common.engine.pipeline_layers import check_pipeline_layers
from common.errors import KitError
from common.model.build import pipeline_options
from common.parallel import ParallelSizes, parse_pipeline_layers
from tests.unit.checkpoint.small import write_hf, write_ranks


def test_numbers_with_commas_are_read() -> None:
    assert parse_pipeline_layers("7,7, 8,6") == (7, 7, 8, 6)
    assert parse_pipeline_layers(None) == parse_pipeline_layers("") == ()
    for text in ("7,,7", "7,x", "0,8", "-1,9", "7;7", ","):
        with pytest.raises(KitError, match=r"PIPELINE_LAYERS=.*: give the layers of each pipeline stage with commas"):
            parse_pipeline_layers(text)


def test_megatron_gets_options_only_for_uneven_stages() -> None:
    assert pipeline_options((7, 7, 7, 7), vpp=1) == pipeline_options((2,) * 8, vpp=2) == {}
    first_and_last = {"num_layers_in_first_pipeline_stage": 6, "num_layers_in_last_pipeline_stage": 8}
    assert pipeline_options((6, 7, 7, 8), vpp=1) == first_and_last
    assert pipeline_options((6, 8), vpp=1) == {"num_layers_in_first_pipeline_stage": 6}
    assert pipeline_options((1, 2, 3, 1), vpp=1) == {
        "pipeline_model_parallel_layout": [
            ["embedding", "decoder"], ["decoder"] * 2, ["decoder"] * 3, ["decoder", "loss"],
        ]
    }  # fmt: skip
    assert "pipeline_model_parallel_layout" in pipeline_options((2, 1, 1, 2), vpp=2)


def test_a_version_that_cannot_build_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_version", lambda: "0.11.0")
    check_pipeline_layers((7, 7, 7, 7), 1)
    check_pipeline_layers((6, 7, 7, 8), 1)
    for layers, vpp in (((7, 7, 8, 6), 1), ((2, 1, 1, 2), 2)):
        with pytest.raises(KitError, match=r"needs megatron-core 0\.14 or later, and 0\.11 is installed: let only"):
            check_pipeline_layers(layers, vpp)
    monkeypatch.setattr(versions, "installed_version", lambda: "0.14.0")
    check_pipeline_layers((7, 7, 8, 6), 1)


def test_a_checkpoint_of_other_stages_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, [[range(3)], [range(3, 4)]])
    checkpoint = Checkpoint(tmp_path, path, "release", "torch")
    check_parallel_sizes(checkpoint, ParallelSizes(2, pp=2, pipeline_layers=(3, 1)), qwen)
    message = r"at TP=1 PP=2 VPP=1 PIPELINE_LAYERS=3,1, this run has TP=1 PP=2 VPP=1 PIPELINE_LAYERS=2,2: use the same"
    with pytest.raises(KitError, match=message):
        check_parallel_sizes(checkpoint, ParallelSizes(2, pp=2), qwen)
    stages = [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]
    path = write_ranks(tmp_path / "iter_0000001", weights, qwen, stages)
    check_parallel_sizes(Checkpoint(tmp_path, path, 1, "torch"), ParallelSizes(2, pp=2, vpp=2), qwen)
