"""Durations as text, and what the upkeep of a run takes from training's own settings."""

from dataclasses import fields

import pytest

from common.estimate.layouts import EstimateSettings
from common.estimate.upkeep import span
from common.training.settings import TrainSettings


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.25, "0.25 s"), (53.31, "53.3 s"), (89.9, "89.9 s"), (90, "1.5 min"), (600, "10 min"), (5400, "1.5 h"),
        (49273, "13.7 h"), (129600, "1.5 days"), (22804650, "264 days"), (182437200, "2,112 days"),
    ],
)  # fmt: skip
def test_a_duration_is_shown_in_a_fitting_unit(seconds: float, expected: str) -> None:
    assert span(seconds) == expected


def test_what_training_has_a_default_for_has_it_here_too() -> None:
    own = {field.name: field.default for field in fields(TrainSettings)}
    for name in ("save_interval", "keep_checkpoints", "precision", "optimizer_state", "global_batch_size"):
        assert getattr(EstimateSettings, name) == own[name]
    assert EstimateSettings.detection_s == 60 * TrainSettings.distributed_timeout_min
