"""A run whose weights are not the expected ones stops or warns at its first loss."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import KitError
from common.training.loop.first_loss import check_first_loss


def plan(kind: str, most: float | None) -> Any:
    return SimpleNamespace(
        settings=SimpleNamespace(max_first_loss=most),
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


def test_an_error_of_all_ranks_is_reported_by_one_process_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        check_first_loss(plan("weights", 3.0), 3.01)
    assert ended.value.code == 2
