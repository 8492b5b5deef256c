"""A run whose weights are not the expected ones stops or warns at its first loss."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import KitError
from common.training.loop.first_loss import check_first_loss
from common.training.planning.plan import Progress


def plan(kind: str, most: float | None, before: float | None = None, mode: str = "pretrain") -> Any:
    return SimpleNamespace(
        progress=Progress(862, 27584, before),
        settings=SimpleNamespace(max_first_loss=most, train_mode=mode),
        qwen=SimpleNamespace(vocab_size=151936),
        start=SimpleNamespace(kind=kind),
    )


def test_the_run_stops_over_the_bound() -> None:
    check_first_loss(plan("weights", 3.0), 2.99)
    with pytest.raises(KitError, match=r"the first loss is 3\.0100, above MAX_FIRST_LOSS=3: .* rms_norm_eps"):
        check_first_loss(plan("weights", 3.0), 3.01)


@pytest.mark.parametrize(
    ("kind", "loss", "warns"), [("weights", 11.5, True), ("weights", 4.0, False), ("random", 11.9, False)]
)
def test_weights_with_the_loss_of_random_ones_are_reported(
    kind: str, loss: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kit")
    check_first_loss(plan(kind, None), loss)
    assert ("random weights give 11.93" in caplog.text) == warns
    caplog.clear()
    check_first_loss(plan(kind, None, mode="dpo"), loss)  # IPO's begins at 25 with DPO_BETA=0.1
    assert caplog.text == ""


def test_an_error_of_all_ranks_is_reported_by_one_process_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        check_first_loss(plan("weights", 3.0), 3.01)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("before", "loss", "warns"), [(2.53, 10.75, True), (2.53, 3.4, False), (0.2, 1.3, True), (9.0, 11.0, False)]
)
def test_a_resumed_run_that_lost_what_it_had_learned_is_reported(
    before: float, loss: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_first_loss(plan("resume", None, before), loss)
    expected = f"the loss was {before:.2f} before iteration 862 was saved, and is {loss:.2f} now"
    assert (expected in caplog.text) == warns


def test_a_checkpoint_without_a_loss_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    check_first_loss(plan("resume", 3.0), 10.75)
    assert not caplog.text
