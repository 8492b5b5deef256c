"""A run that its devices' memory cannot hold is refused before it starts, as far as the estimate is sure of it."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import KitError
from common.estimate import check
from common.estimate.constants import GIB
from common.estimate.memory import rank_memories
from common.model.shape.config import load_config
from common.platforms.base import Platform
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA
from common.training.settings import TrainSettings
from tests.unit.estimate.ranks import write_config

H100 = 79.1 * GIB


def plan(folder: Path, platform: Platform = NVIDIA, **changes: Any) -> Any:
    """A plan of a model of 3B's shape; without a change it is the layout that was measured on an H100: 66.9 GiB."""
    shape = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    more = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    qwen = load_config(write_config(folder, **shape, **more, max_position_embeddings=32768))
    given = {"seq_length": 4096, "micro_batch_size": 1, "global_batch_size": 8, "save_checkpoint_path": "-"}
    settings = TrainSettings(**{**given, "dataset_path": "-", "train_iters": 1, **changes})
    return SimpleNamespace(
        frozen=frozenset(), settings=settings, platform=platform, qwen=qwen, start=SimpleNamespace(model_folder=folder)
    )


@pytest.fixture(autouse=True)
def _log_at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kit")


def test_what_was_measured_to_fit_is_logged_with_both_figures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check.compare_memory(plan(tmp_path), "NVIDIA H100 80GB HBM3", int(H100))
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.message == "memory: about 66.9 GiB per GPU, and NVIDIA H100 80GB HBM3 has 79.1"


def test_what_cannot_go_in_is_refused_with_what_takes_less(tmp_path: Path) -> None:
    message = (
        r"^MICRO_BATCH_SIZE=2, SEQ_LENGTH=4096, TP=1, PP=1, CP=1, RECOMPUTE=none, OPTIMIZER_STATE=fp32 need about"
        r" 8\d\.\d GiB per GPU, and H100 has 79\.1: to use less memory: a MICRO_BATCH_SIZE below 2, RECOMPUTE=full,"
        r" .*--gpu"
    )
    with pytest.raises(KitError, match=message):
        check.compare_memory(plan(tmp_path, micro_batch_size=2), "H100", int(H100))
    check.compare_memory(plan(tmp_path, micro_batch_size=2, recompute="full"), "H100", int(H100))


def test_what_is_near_the_memory_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of = plan(tmp_path)
    peak = rank_memories(of.settings, NVIDIA, of.qwen)[0].peak
    for total, level in ((peak, "WARNING"), (peak / check.NEAR - 1, "WARNING"), (peak / check.NEAR + 1, "INFO")):
        caplog.clear()
        check.compare_memory(of, "H100", int(total))
        assert [record.levelname for record in caplog.records] == [level]
    with pytest.raises(KitError):
        check.compare_memory(of, "H100", peak - 1)


def test_the_stage_that_needs_the_most_counts(tmp_path: Path) -> None:
    of = plan(tmp_path, gpus=4, pp=4)
    peaks = [rank.peak for rank in rank_memories(of.settings, NVIDIA, of.qwen)]
    assert check.needed(of).peak == max(peaks) > min(peaks)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"gpus": 2, "pp": 2}, 0.07),
        ({"gpus": 2, "cp": 2}, 1.0),
        ({"fp8_format": "hybrid"}, 1.0),
        ({"recompute": "selective"}, 1.0),
        ({"reset_attention": True, "transformer_impl": "local"}, 1.0),
        ({"reset_attention": True}, 0.0),
        ({"recompute": "full"}, 0.0),
    ],
    ids=str,
)
def test_where_activations_were_not_measured_their_error_is_a_warning(
    changes: dict[str, Any], share: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of = plan(tmp_path, **changes)
    assert check.activation_error(of.settings, NVIDIA) == share
    need = check.needed(of)
    ranks = rank_memories(of.settings, NVIDIA, of.qwen)
    assert need.least == max(
        each.state.total + each.workspace + max(int((1 - share) * each.activations), each.step) for each in ranks
    )
    check.compare_memory(of, "H100", need.least)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(KitError, match=re.escape("OPTIMIZER_STATE=fp32 need about")):
        check.compare_memory(of, "H100", need.least - 1)


def test_products_of_quack_count_where_they_are_installed_and_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, without = plan(tmp_path), plan(tmp_path, fused_products="false")
    assert check.needed(of) == check.needed(without), "it is not installed here"
    monkeypatch.setattr(check, "find_spec", lambda name: name == "quack")
    assert check.needed(of).peak < check.needed(without).peak
    fp8 = plan(tmp_path, fp8_format="hybrid")
    assert check.needed(fp8).peak == check.needed(plan(tmp_path, fp8_format="hybrid", fused_products="false")).peak


def test_devices_are_queried_only_where_the_estimate_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check, "smallest_device", lambda num_devices: pytest.fail("asked"))
    check.check_memory(plan(tmp_path, CPU))
    check.check_memory(plan(tmp_path, train_or_convert_ckpt="convert", load_checkpoint_path="/a"))
    assert not caplog.records
    check.check_memory(plan(tmp_path, METAX))
    assert caplog.messages == ["memory: not checked, since the estimate was not validated on metax"]
    monkeypatch.setattr(check, "smallest_device", lambda num_devices: None)
    check.check_memory(plan(tmp_path))
    assert caplog.messages[1].startswith("memory: not checked, since torch cannot query the devices")
    monkeypatch.setattr(check, "smallest_device", lambda num_devices: ("A10", num_devices * 24 * GIB))
    with pytest.raises(KitError, match=r"A10 has 24\.0"):
        check.check_memory(plan(tmp_path))


@pytest.mark.parametrize(
    ("changes", "gib", "parts", "remedy"),
    [
        ({"optimizer_state": "cpu"}, 12, "12 GiB for OPTIMIZER_STATE=cpu",
         "use more nodes, or OPTIMIZER_STATE=cpu_bf16, which keeps half of it"),
        ({"optimizer_state": "cpu", "precision": "fp32"}, 8, "8 GiB for OPTIMIZER_STATE=cpu", "use more nodes"),
        ({"optimizer_state": "cpu_bf16", "async_save": True}, 16,
         "6 GiB for OPTIMIZER_STATE=cpu_bf16 and 10 GiB for the copies of ASYNC_SAVE=true",
         "use more nodes, SAVE_OPTIMIZER=false, or ASYNC_SAVE=false, which copies nothing"),
        ({"async_save": True, "nnodes": 2, "gpus": 2, "global_batch_size": 8}, 7,
         "7 GiB for the copies of ASYNC_SAVE=true",
         "use more nodes, SAVE_OPTIMIZER=false, or ASYNC_SAVE=false, which copies nothing"),
    ],
)  # fmt: skip
def test_what_this_machines_memory_cannot_hold_is_refused_with_all_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: dict[str, Any],
    gib: int, parts: str, remedy: str,
) -> None:  # fmt: skip
    of = plan(tmp_path, **changes)
    of.sizes, of.ckpt_format, of.adapters = of.settings.sizes, "torch_dist", None
    monkeypatch.setattr(check, "num_parameters", lambda qwen: 2**30)
    num_bytes = 14 if of.settings.optimizer_state == "fp32" else 10
    monkeypatch.setattr(check, "bytes_of_checkpoint", lambda of: num_bytes * 2**30)
    parts = re.sub(r"(\d+) GiB", r"\1.0 GiB", parts)
    monkeypatch.setattr(check, "available_memory", lambda: gib * 2**30)
    check.check_host_memory(of)
    assert caplog.records[-1].message == f"host memory: {parts}, and {gib}.0 GiB are free on this machine"
    monkeypatch.setattr(check, "available_memory", lambda: gib * 2**30 - 1)
    with pytest.raises(KitError) as raised:
        check.check_host_memory(of)
    assert str(raised.value) == f"{caplog.records[-1].message}: {remedy}"


def test_a_run_that_keeps_nothing_in_host_memory_does_not_look_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "available_memory", lambda: pytest.fail("looked"))
    check.check_host_memory(plan(tmp_path))
