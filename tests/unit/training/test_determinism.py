"""DETERMINISTIC=true: the environment of ranks, what is refused, and that the same command gives the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import KitError
from common.training.planning import determinism
from common.training.settings import TrainSettings

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in determinism.ALLOWED:
        monkeypatch.delenv(name, raising=False)


def settings(**changes: bool) -> TrainSettings:
    return TrainSettings(save_checkpoint_path="s", dataset_path="d", train_iters=1, tp=2, gpus=2, **changes)


def test_the_environment_is_what_megatron_lm_requires() -> None:
    assert determinism.environment() == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }  # fmt: skip


def test_an_equivalent_environment_variable_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "^NVLS")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert determinism.environment() == {
        "CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "^NVLS", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("NCCL_ALGO", "NVLS"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")],
)
def test_what_is_set_to_the_opposite_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(KitError, match=f"{name}={value} with DETERMINISTIC=true: unset it"):
        determinism.check(settings(deterministic=True))
    determinism.check(settings())  # as one likes


def test_sums_without_an_order_are_refused() -> None:
    with pytest.raises(KitError, match="DETERMINISTIC=true and TP_COMM_OVERLAP=true"):
        determinism.check(settings(deterministic=True, tp_comm_overlap="true"))
    determinism.check(settings(deterministic=True))
    determinism.check(settings(tp_comm_overlap="true"))


def test_a_rank_takes_deterministic_algorithms_and_gets_the_environment() -> None:
    program = """
import json, os, torch
from common.training.planning import determinism
determinism.apply()
cudnn = torch.backends.cudnn
print(json.dumps([torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
                  cudnn.deterministic, cudnn.benchmark, *map(os.environ.get, determinism.ALLOWED)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert json.loads(done.stdout) == [True, False, True, False, ":4096:8", "Ring", "0"]
