"""Before a run starts it is told the PIPELINE_LAYERS that are faster, if they are and it can use them."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common import train
from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.estimate import suggestion
from common.estimate.balance import Split, faster_split
from common.estimate.check import NEAR
from common.estimate.gpus import find_gpu
from common.estimate.memory import rank_memories, work_of
from common.platforms.base import Platform
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA
from common.training.planning.adapters import AdapterPlan
from common.training.planning.plan import Plan, Start
from common.training.settings import TrainSettings
from tests.recipes import write_config

ALMOST_ALL = 10**15  # bytes


def plan(folder: Path, platform: Platform = NVIDIA, start: str = "torch_dist", **changes: Any) -> Plan:
    """Of 3B at PP=2, from a checkpoint in that format."""
    given = {"seq_length": 4096, "global_batch_size": 32, "save_checkpoint_path": "-", "gpus": 2, "pp": 2}
    settings = TrainSettings(**{**given, "dataset_path": "-", "train_iters": 1, "micro_batch_size": 1, **changes})
    checkpoint = Checkpoint(folder, folder, "release", start)  # type: ignore[arg-type]
    return Plan(
        settings, platform, settings.sizes, write_config(folder, "3B"), Start("weights", folder, checkpoint),
        "transformer_engine", "torch_dist", None, None, 1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _log_at_info(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "kit")
    monkeypatch.setattr(suggestion, "smallest_device", lambda gpus: ("NVIDIA H200", gpus * ALMOST_ALL))


def test_one_line_has_the_value_the_gain_and_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of = plan(tmp_path)
    suggestion.suggest_layers(of)
    split = faster_split(of.settings, work_of(of.settings, NVIDIA, of.qwen), find_gpu("H200"))
    assert split and caplog.messages == [
        "PIPELINE_LAYERS is empty, so all stages have the same number of layers: PIPELINE_LAYERS=19,17 would be about"
        f" {100 * split.gain:.0f}% faster by the estimate, as the last stage also computes the output layer"
    ]
    suggestion.suggest_layers(plan(tmp_path, METAX))
    assert re.search("PIPELINE_LAYERS=20,16 would be about", caplog.messages[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"pp": 1},
        {"pipeline_layers": "18,18"},
        {"platform": CPU},
        {"start": "torch"},
    ],
    ids=["one stage", "layers given", "CPU", "torch format"],
)
def test_a_run_that_cannot_use_them_asks_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(suggestion, "smallest_device", lambda gpus: pytest.fail("asked"))
    suggestion.suggest_layers(plan(tmp_path, **changes))


def test_nor_do_frozen_weights_and_adapters_on_a_base_in_torch_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = plan(tmp_path)
    base = replace(of.start.checkpoint, format="torch")  # type: ignore[type-var]
    adapters = AdapterPlan(None, base, "")  # type: ignore[arg-type]
    monkeypatch.setattr(suggestion, "smallest_device", lambda gpus: pytest.fail("asked"))
    for each in (replace(of, adapters=adapters), replace(of, frozen=frozenset({"embedding"}))):  # type: ignore[arg-type]
        suggestion.suggest_layers(each)


def test_without_a_device_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(suggestion, "smallest_device", lambda gpus: None)
    suggestion.suggest_layers(plan(tmp_path))
    assert not caplog.records


@pytest.mark.parametrize(("gain", "told"), [(0.029, False), (0.031, True)])
def test_a_small_gain_is_not_worth_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gain: float, told: bool
) -> None:
    monkeypatch.setattr(suggestion, "faster_split", lambda *given: Split("19,17", gain))
    suggestion.suggest_layers(plan(tmp_path))
    assert bool(caplog.records) == told


def test_layers_that_do_not_fit_are_not_suggested(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of = plan(tmp_path)
    split = replace(of.settings, pipeline_layers="19,17")
    pair = (of.settings, split)
    now, then = (max(rank.peak for rank in rank_memories(each, NVIDIA, of.qwen)) for each in pair)
    assert now < then
    suggestion.compare_layers(of, "H200", int(then / NEAR) - 1)
    assert not caplog.records
    suggestion.compare_layers(of, "H200", int(then / NEAR) + 1)
    assert len(caplog.records) == 1


def test_the_command_tells_it_before_the_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With every check of machine and folders passed."""
    for name in (
        "estimate.check.check_memory", "training.checkpointing.run_folder.check_folder", "train.check_machine",
        "training.checkpointing.folder_lock.check_lock", "training.planning.compatibility.check_packages",
        "training.planning.devices.check_devices", "training.tracking.tracker.check_tracking",
    ):  # fmt: skip
        monkeypatch.setattr(f"common.{name}", lambda *given: None)
    of = replace(plan(tmp_path), train=SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr("common.training.planning.plan.plan_run", lambda *given: of)
    assert train.checked_plan(of.settings, NVIDIA) is of
    assert "PIPELINE_LAYERS=19,17 would be about" in caplog.text
    caplog.clear()
    monkeypatch.setattr("common.training.planning.plan.plan_run", lambda *given: plan(tmp_path))
    train.checked_plan(of.settings, NVIDIA)
    assert not caplog.records, "a conversion has no layers to move"
