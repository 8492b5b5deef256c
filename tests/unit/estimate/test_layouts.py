"""The layouts that are estimated: virtual pipeline chunks where they divide, context parallelism of long rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.estimate import speed as module
from common.estimate.constants import CONTEXT_BYTES, NCCL_BYTES, RESERVED_SHARE
from common.estimate.gpus import Gpu, find_gpu
from common.estimate.layouts import (
    LONG_ROW,
    Estimate,
    EstimateSettings,
    estimate_all,
    possible_layouts,
    without_needless_context,
)
from common.estimate.memory import rank_memories
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


@pytest.fixture
def wordy(tmp_path: Path) -> QwenConfig:
    """A model whose output layer is worth three to four of its layers."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16}
    more = {"num_key_value_heads": 8, "vocab_size": 128000, "max_position_embeddings": 2048}
    return load_config(write_config(tmp_path, **shape, **more))


def splits(qwen: QwenConfig, gpu: Gpu = H100, even: bool = False, **changes: Any) -> dict[tuple[int, int], Estimate]:
    """By PP and VPP."""
    found = estimate_all(settings(**{"seq_length": 2048, "global_batch_size": 64, **changes}), qwen, gpu, even=even)[0]
    return {(one.settings.pp, one.settings.vpp): one for one in found}


def test_searched_layouts_have_the_layers_that_balance_their_stages(wordy: QwenConfig) -> None:
    found, given, even = splits(wordy), splits(wordy, pp=4), splits(wordy, even=True)
    layers = {sizes: one.settings.pipeline_layers for sizes, one in found.items()}
    assert layers[1, 1] is None and (layers[2, 1], layers[2, 2]) == ("13,11", "6,7,7,4")
    assert layers[4, 1] == "6,7,7,4" and layers[8, 3] is None, "each of its chunks has one layer already"
    assert {one.settings.pipeline_layers for one in (*given.values(), *even.values())} == {None}
    for sizes in ((2, 1), (4, 1)):
        one, other = found[sizes], even[sizes]
        assert other.rank_seconds > 1.01 * one.rank_seconds and one.speed and one.speed.step_seconds == one.rank_seconds
        assert one.ranks == rank_memories(one.settings, H100.platform, wordy)
        assert one.ranks[-1].parameters < other.ranks[-1].parameters


def test_even_stages_stay_where_others_would_not_fit(wordy: QwenConfig) -> None:
    """With memory between that of the two, and where that is scarce for both the one that needs less."""
    even, split = (splits(wordy, even=each)[2, 1] for each in (True, False))
    assert even.largest.peak < split.largest.peak
    needs = [(one.largest.peak * RESERVED_SHARE + CONTEXT_BYTES + NCCL_BYTES) / 2**30 for one in (even, split)]
    for memory, layers in ((needs[1] + 0.01, "13,11"), (needs[1] - 0.01, None), (1.0, None)):
        assert splits(wordy, replace(H100, memory_gib=memory))[2, 1].settings.pipeline_layers == layers


def test_layers_of_ones_own_are_kept(wordy: QwenConfig) -> None:
    found = splits(wordy, pipeline_layers="7,7,7,3")
    assert {sizes: one.settings.pipeline_layers for sizes, one in found.items()} == {(4, 1): "7,7,7,3"}


def contexts(**changes: Any) -> dict[int, dict[int, set[int]]]:
    """The PP that are searched, by CP and TP."""
    found: dict[int, dict[int, set[int]]] = {}
    for layout in possible_layouts(settings(**{"seq_length": LONG_ROW, "tp": None, "vpp": 1, **changes}), 24):
        found.setdefault(int(layout["cp"]), {}).setdefault(int(layout["tp"]), set()).add(int(layout["pp"]))
    return found


def test_context_parallelism_is_searched_for_long_rows_where_it_divides_the_gpus() -> None:
    whole = {1: {1, 2, 4, 8}, 2: {1, 2, 4}, 4: {1, 2}, 8: {1}}
    assert contexts(seq_length=LONG_ROW - 1) == {1: whole}
    assert contexts() == {
        1: whole,
        2: {1: {1, 2, 4}, 2: {1, 2}, 4: {1}},
        4: {1: {1, 2}, 2: {1}},
        8: {1: {1}},
    }
    assert {cp: {*sizes} for cp, sizes in contexts(gpus=12).items()} == {1: {1, 2, 4, 8}, 2: {1, 2}, 4: {1}}
    assert {cp: {*sizes} for cp, sizes in contexts(nnodes=4, tp=2).items()} == {cp: {2} for cp in (1, 2, 4, 8, 16)}
    assert {*contexts(cp=4)} == {4} and {*contexts(cp=2, seq_length=512)} == {2}


def test_long_rows_begin_where_context_parallelism_first_gains(tmp_path: Path) -> None:
    """14B on 8 H100 is the smallest of Qwen2.5 that gains at LONG_ROW."""
    shape = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40}
    more = {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False}
    qwen = load_config(write_config(tmp_path, **shape, **more, max_position_embeddings=LONG_ROW))
    wanted = settings(seq_length=LONG_ROW, global_batch_size=64, tp=None, micro_batch_size=None, recompute=None)
    best = estimate_all(wanted, qwen, H100)[0][0]
    assert (best.settings.cp, best.fits) == (2, "yes")
    short = replace(wanted, seq_length=LONG_ROW // 2, global_batch_size=128)
    whole, divided = (estimate_all(replace(short, cp=cp), qwen, H100)[0][0] for cp in (1, 2))
    assert whole.fits == "yes" and whole.rank_seconds <= divided.rank_seconds


@pytest.fixture
def divided(tmp_path: Path) -> list[Estimate]:
    """Every CP and micro-batch of four long rows on two GPUs, the best first."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 16}
    qwen = load_config(write_config(tmp_path, **shape, num_key_value_heads=8, max_position_embeddings=LONG_ROW))
    wanted = settings(gpus=2, pp=1, micro_batch_size=None, seq_length=LONG_ROW, global_batch_size=4)
    return estimate_all(wanted, qwen, H100)[0]


def sizes(found: list[Estimate]) -> list[tuple[int, int]]:
    return [(one.settings.cp, one.settings.micro_batch_size) for one in found]


def test_context_parallelism_that_half_of_it_replaces_is_left_out(divided: list[Estimate]) -> None:
    assert sizes(divided) == [(1, 2), (2, 4), (1, 1), (2, 2), (2, 1)]
    assert sizes(without_needless_context(divided)) == [(1, 2), (1, 1), (2, 1)]


def test_it_stays_where_the_half_is_slower_needs_more_memory_or_is_not_estimated(divided: list[Estimate]) -> None:
    half = divided[0]
    for worse in (replace(half, fits="tight"), replace(half, rank_seconds=2 * half.rank_seconds)):
        assert (2, 4) in sizes(without_needless_context([worse, *divided[1:]]))
    assert sizes(without_needless_context(divided[1:])) == [(2, 4), (1, 1), (2, 1)]
