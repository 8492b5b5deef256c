"""Which kernels a model is built with: QuACK's where they work, else a reason in the log, or an error if asked for."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import KitError
from common.model import gated_mlp, kernels
from common.model.config import load_config
from common.model.loss import TorchKernels
from common.model.options import ModelOptions
from common.parallel import ParallelSizes
from common.platforms.cpu import CPU
from tests.tiny import tiny_qwen

ONE = ParallelSizes(1)
FUSED = replace(CPU, fused_kernels=True)
OPTIONS = ModelOptions("bf16", "local", "none")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("kit"), "propagate", True)
    caplog.set_level(logging.INFO, logger="kit")
    return caplog


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that says it is one, and computes as a CPU."""
    monkeypatch.setattr(kernels, "_device", lambda _: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    judge = gated_mlp.why_not
    monkeypatch.setattr(gated_mlp, "why_not", lambda *given: judge(*given[:3], torch.device("cpu")))


def products(folder: Path, **changes: Any) -> Any:
    qwen = load_config(tiny_qwen(folder))
    return kernels.mlp_products(qwen, ONE, replace(OPTIONS, **changes), FUSED, None)


def test_elsewhere_than_on_hopper_there_are_none(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert products(tmp_path) is None
    assert log.messages == ["SwiGLU: beside matrix products (QuACK: it is made for Hopper GPUs)"]
    with pytest.raises(KitError, match=r"FUSED_PRODUCTS=true, and QuACK has no SwiGLU inside matrix products here"):
        products(tmp_path, fused_products="true")


def test_where_quack_is_missing_its_module_is_named(
    hopper: None, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    assert products(tmp_path) is None
    assert log.messages == ["SwiGLU: beside matrix products (QuACK: no module quack)"]


def test_where_quack_works_it_is_taken(
    hopper: None, quack: Any, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert type(products(tmp_path)).__name__ == "QuackProducts"
    assert log.messages == ["SwiGLU: inside matrix products, by QuACK"]
    monkeypatch.setattr(quack, "gemm_gated", lambda *given, **how: 1 / 0)
    assert products(tmp_path) is None
    assert log.messages[1:] == ["SwiGLU: beside matrix products (QuACK: ZeroDivisionError: division by zero)"]


@pytest.mark.parametrize("changes", [{"fused_products": "false"}, {"precision": "fp32"}], ids=str)
def test_where_it_is_not_wanted_it_is_not_tried(
    changes: dict[str, Any], hopper: None, quack: Any, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    assert products(tmp_path, **changes) is None
    assert not log.messages


def test_without_triton_the_loss_is_pytorchs(tmp_path: Path) -> None:
    assert type(kernels.loss_kernels(load_config(tiny_qwen(tmp_path)), ONE, OPTIONS, CPU)) is TorchKernels
