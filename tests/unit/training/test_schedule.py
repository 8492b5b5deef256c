"""A schedule that does not fit into its run, or into what is left of it, is refused; the others are described."""

import re
from typing import Any

import pytest

from common.engine.versions import ENGINES
from common.errors import KitError
from common.training.planning.schedule import check_resumed_decay, check_schedule, describe_schedule
from common.training.settings import TrainSettings

STEPS, BATCH = 26, 4
WSD = {"lr_decay_style": "WSD", "lr_warmup_iters": 5}
ROOT = {"lr_decay_style": "inverse-square-root"}


def settings(**changes: Any) -> TrainSettings:
    given = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": STEPS, "global_batch_size": BATCH}
    return TrainSettings(**{**given, "lr": 1e-3, **changes})


def check(**changes: Any) -> None:
    check_schedule(settings(**changes), STEPS, STEPS * BATCH)


def test_a_decay_may_take_all_but_the_warm_up_and_no_more() -> None:
    check(**WSD, lr_wsd_decay_iters=20)
    with pytest.raises(KitError, match=re.escape("warm-up of 5 steps: the run has 26 steps, the last at MIN_LR: use at"
                                                 " most 20 decay steps, or a longer run")):  # fmt: skip
        check(**WSD, lr_wsd_decay_iters=21)


def test_an_inverse_square_root_needs_a_step_of_warm_up() -> None:
    check(**ROOT, lr_warmup_iters=1)
    with pytest.raises(KitError, match="inverse-square-root with a warm-up of 0.25 steps"):
        check(**ROOT)  # 0.01 of the run
    with pytest.raises(KitError, match="inverse-square-root with a warm-up of 0 steps"):
        check(**ROOT, lr_warmup_iters=0)


def test_a_shape_that_the_installed_engine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wsd = {**WSD, "lr_wsd_decay_iters": 9, "lr_wsd_decay_style": "minus_sqrt"}
    for engine in ENGINES[1:]:
        monkeypatch.setattr("common.training.planning.schedule.installed_engine", lambda each=engine: each)
        check(**wsd)
    monkeypatch.setattr("common.training.planning.schedule.installed_engine", lambda: ENGINES[0])
    check(**{**wsd, "lr_wsd_decay_style": "exponential"})
    with pytest.raises(KitError, match="minus_sqrt needs megatron-core 0.14 or later, this is 0.11.0: use exponential"):
        check(**wsd)


@pytest.mark.parametrize(
    ("decay", "saved", "most"),
    [
        (6, {"lr_decay_style": "cosine"}, None),  # the first of 6 steps left is the first of the decay
        (7, {"lr_decay_style": "cosine"}, 6),
        (7, {"wsd_decay_steps": 6 * BATCH, "lr_decay_steps": 25 * BATCH}, 6),  # whose decay is next
        (9, {"wsd_decay_steps": 7 * BATCH, "lr_decay_steps": 25 * BATCH}, None),  # in its decay
    ],
)
def test_a_decay_begins_after_the_step_that_is_resumed(decay: int, saved: dict[str, Any], most: int | None) -> None:
    resumed = settings(**WSD, lr_wsd_decay_iters=decay), STEPS * BATCH, 20 * BATCH, saved
    if most is None:
        check_resumed_decay(*resumed)
        return
    with pytest.raises(KitError, match=f"LR_WSD_DECAY_ITERS={decay}: 6 steps are left .* use at most {most},"):
        check_resumed_decay(*resumed)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr_warmup_iters": 0, "lr_decay_style": "constant"}, "constant at 0.001"),
        ({"lr_warmup_iters": 5}, "warm-up of 5 steps to 0.001, then cosine to 0.0001 in step 26"),
        ({"lr_warmup_iters": 5, **ROOT}, "warm-up of 5 steps to 0.001, then inverse-square-root, not below 0.0001"),
        (
            {**WSD, "lr_wsd_decay_iters": 8},
            "warm-up of 5 steps to 0.001, then constant at 0.001, and exponential to 0.0001 in the last 8 of 26 steps",
        ),
    ],
)
def test_a_schedule_is_a_line_of_the_log(changes: dict[str, Any], text: str) -> None:
    assert describe_schedule(settings(**changes), STEPS, STEPS * BATCH) == text
