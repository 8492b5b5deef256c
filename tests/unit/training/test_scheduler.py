"""The schedule ends at MIN_LR, and the command's settings override a checkpoint's."""

from types import SimpleNamespace
from typing import Any

import pytest

from common.engine.versions import ENGINES
from common.errors import KitError
from common.training.settings import TrainSettings
from common.training.state.scheduler import (
    build_scheduler,
    override_checkpoint_settings,
    restore_schedule,
    schedule_state,
)


def settings(**changes: Any) -> TrainSettings:
    given = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 10, "lr": 1e-3, "min_lr": 1e-4, **changes}
    return TrainSettings(**given)


def rates(settings: TrainSettings) -> list[float]:
    """The learning rate of each of ten steps."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    scheduler = build_scheduler(optimizer, settings, 10 * settings.global_batch_size)
    taken = []
    for _ in range(10):
        taken.append(optimizer.param_groups[0]["lr"])
        scheduler.step(settings.global_batch_size)
    return taken


@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_the_first_step_has_lr_and_the_last_one_min_lr(style: str, batch: int) -> None:
    found = rates(settings(lr_decay_style=style, global_batch_size=batch, lr_warmup_iters=0))
    assert found[0] == pytest.approx(1e-3) and found[-1] == pytest.approx(1e-4)
    assert found == sorted(found, reverse=True) and found[-2] > 1.01e-4
    if style == "linear":
        assert found == pytest.approx([1e-3 - number * 1e-4 for number in range(10)])


def test_a_warm_up_begins_at_0_and_reaches_lr_after_its_steps() -> None:
    found = rates(settings(lr_warmup_iters=4))
    assert found[:5] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert found[5] < 1e-3 and found[-1] == pytest.approx(1e-4)


def test_a_warm_up_may_be_a_fraction_of_the_run() -> None:
    assert rates(settings(lr_warmup_fraction=4 / 9)) == rates(settings(lr_warmup_iters=4))
    assert rates(settings(lr_warmup_fraction=0.05))[:2] == pytest.approx([0, 1e-3], rel=0.01)


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", [0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.853553, 0.5, 0.146447, 0.0]),
        ("exponential", [0.681793, 0.414214, 0.189207, 0.0]),
        ("minus_sqrt", [0.5, 0.292893, 0.133975, 0.0]),
    ],
)
def test_wsd_stays_at_lr_up_to_its_last_steps(shape: str, left: list[float]) -> None:
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": shape, "lr_warmup_iters": 2}
    falls = [1e-4 + share * 9e-4 for share in left]
    assert rates(settings(**wsd)) == pytest.approx([0, 5e-4, *[1e-3] * 4, *falls], rel=1e-5)


def test_a_conversion_takes_the_checkpoints_decay_unless_the_engine_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_wsd_decay_style": "minus_sqrt"}
    scheduler = build_scheduler(optimizer, settings(**wsd), 160)
    scheduler.step(16 * 6)
    saved, rate = schedule_state(scheduler), optimizer.param_groups[0]["lr"]
    convert = settings(train_or_convert_ckpt="convert", load_checkpoint_path="-", lr=1e-3)
    restore_schedule(build_scheduler(optimizer, convert, 0), saved)
    assert optimizer.param_groups[0]["lr"] == rate == pytest.approx(1e-4 + 9e-4 * 0.5)
    monkeypatch.setattr("common.training.planning.schedule.installed_engine", lambda: ENGINES[0])
    with pytest.raises(KitError, match="minus_sqrt needs megatron-core 0.14"):
        restore_schedule(build_scheduler(optimizer, convert, 0), saved)


def test_a_run_of_one_step_has_a_schedule() -> None:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    build_scheduler(optimizer, settings(), 16)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_the_commands_settings_override_a_checkpoints_and_changes_are_logged() -> None:
    saved = {"max_lr": 5e-3, "min_lr": 1e-4, "eps": 1e-8, "betas": [0.9, 0.999], "lr": 5e-3, "weight_decay": 0.0}
    optimizer = SimpleNamespace(param_groups=[dict(saved), dict(saved)])
    train_settings = settings(lr_warmup_iters=0)
    scheduler = build_scheduler(optimizer, train_settings, 160)
    assert override_checkpoint_settings(optimizer, scheduler, train_settings) == [
        "LR 0.005 -> 0.001", "ADAM_BETA1, ADAM_BETA2 (0.9, 0.999) -> (0.9, 0.95)",
    ]  # fmt: skip
    for group in optimizer.param_groups:
        assert (group["max_lr"], group["betas"]) == (1e-3, (0.9, 0.95)) and group["lr"] == pytest.approx(1e-3)
    assert override_checkpoint_settings(optimizer, scheduler, train_settings) == []
