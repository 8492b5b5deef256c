"""The layouts that are estimated: virtual pipeline chunks where they divide, and what they cost and gain."""

from pathlib import Path
from typing import Any

import pytest

from common.estimate import speed as module
from common.estimate.gpus import find_gpu
from common.estimate.layouts import Estimate, EstimateSettings, estimate_all, possible_layouts
from common.model.shape.config import QwenConfig, load_config
from tests.unit.estimate.ranks import write_config

H100 = find_gpu("H100")


def settings(**changes: Any) -> EstimateSettings:
    same = {"hf_model_path": "-", "gpu": "H100", "gpus": 8, "tp": 1, "micro_batch_size": 1, "recompute": "none"}
    return EstimateSettings(**{**same, "global_batch_size": 8, "seq_length": 512, **changes})


@pytest.fixture
def qwen(tmp_path: Path) -> QwenConfig:
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16}
    return load_config(write_config(tmp_path, **shape, num_key_value_heads=8, vocab_size=32000))


def chunks(**changes: Any) -> dict[int, list[int]]:
    """The VPP that are searched, by PP."""
    found: dict[int, list[int]] = {}
    for layout in possible_layouts(settings(**changes), 24):
        found.setdefault(int(layout["pp"]), []).append(int(layout["vpp"]))
    return found


def test_chunks_are_searched_where_they_divide_a_stages_layers() -> None:
    assert chunks() == {1: [1], 2: [1, 2, 3, 4], 4: [1, 2, 3], 8: [1, 3]}
    assert chunks(vpp=2, pp=4) == {4: [2]}
    assert chunks(pp=4, pipeline_layers="5,6,6,7") == {4: [1]}


def rates(qwen: QwenConfig, **changes: Any) -> dict[int, Estimate]:
    return {one.settings.vpp: one for one in estimate_all(settings(pp=4, **changes), qwen, H100)[0]}


def test_chunks_shorten_the_wait_and_hold_more_activations(qwen: QwenConfig) -> None:
    found = rates(qwen)
    bubbles = [found[vpp].speed.bubble for vpp in (1, 2, 3)]  # type: ignore[union-attr]
    assert bubbles == sorted(bubbles, reverse=True)
    assert found[3].ranks[0].kept > found[1].ranks[0].kept
    assert estimate_all(settings(pp=4), qwen, H100)[0][0].settings.vpp == 3, "the fastest is shown first"


def test_chunks_are_no_gain_where_sends_take_longer_than_the_wait(
    qwen: QwenConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINK_BYTES_PER_SECOND", 1e8)
    assert estimate_all(settings(pp=4), qwen, H100)[0][0].settings.vpp == 1


def test_micro_batches_that_chunks_cannot_share_are_refused_with_the_reason(qwen: QwenConfig) -> None:
    found, refused = estimate_all(settings(pp=4, global_batch_size=12), qwen, H100)
    assert {one.settings.vpp for one in found} == {1} and len(refused) == 2
    assert all("needs a number of micro-batches divisible by PP=4" in each.reason for each in refused)
