"""Features of Transformer Engine are used only with versions that have them; a refusal names those versions."""

import re
from typing import Any

import pytest
import torch

from common.engine import transformer_engine, versions
from common.errors import KitError


def installed(monkeypatch: pytest.MonkeyPatch, engine: str | None, megatron: str = "0.16.1") -> None:
    def version(name: str) -> str:
        found = {"transformer-engine": engine, "megatron-core": megatron}[name]
        if found is None:
            raise versions.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(versions.metadata, "version", version)


@pytest.mark.parametrize(
    ("engine", "megatron", "requested", "given"),
    [
        ("2.11.0", "0.16.1", ("none", "tensorwise"), {}),
        ("2.11.0", "0.16.1", ("hybrid", "tensorwise"), {"fp8": "hybrid", "fp8_recipe": "tensorwise"}),
        ("2.11.0", "0.19.2", ("hybrid", "blockwise"), {"fp8": "hybrid", "fp8_recipe": "blockwise"}),
        ("1.4.0+abc", "0.14.0", ("e4m3", "delayed"), {"fp8": "e4m3", "fp8_recipe": "delayed"}),
        ("1.4.0", "0.11.0", ("hybrid", "delayed"), {"fp8": "hybrid"}),
    ],
)
def test_fp8(
    monkeypatch: pytest.MonkeyPatch, engine: str, megatron: str, requested: tuple[str, str], given: dict[str, Any]
) -> None:
    installed(monkeypatch, engine, megatron)
    assert transformer_engine.fp8_options(*requested) == given


@pytest.mark.parametrize(
    ("engine", "megatron", "recipe", "message"),
    [
        ("2.1.0", "0.16.1", "tensorwise", "FP8_RECIPE=tensorwise needs Transformer Engine 2.2 or later, and 2.1 is"),
        ("2.2.0", "0.16.1", "blockwise", "FP8_RECIPE=blockwise needs Transformer Engine 2.3 or later, and 2.2 is"),
        ("1.4.0", "0.14.0", "tensorwise", "FP8_RECIPE=tensorwise needs Transformer Engine 2.2 or later, and 1.4 is"),
        (None, "0.14.0", "delayed", "FP8_RECIPE=delayed needs Transformer Engine 1.0 or later, and none is installed"),
        ("2.11.0", "0.11.0", "tensorwise", "FP8_RECIPE=tensorwise needs megatron-core 0.14 or later, and 0.11 is"),
    ],
)
def test_fp8_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, engine: str | None, megatron: str, recipe: str, message: str
) -> None:
    installed(monkeypatch, engine, megatron)
    for ask in (transformer_engine.fp8_options, transformer_engine.check_fp8):
        with pytest.raises(KitError, match=re.escape(message)):
            ask("hybrid", recipe)


def test_moments_in_bf16_keep_the_bits_that_weights_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "2.11.0")
    given = transformer_engine.optimizer_state_options("bf16")
    assert given["exp_avg_dtype"] is given["exp_avg_sq_dtype"] is torch.bfloat16
    assert given["use_precision_aware_optimizer"] and given["store_param_remainders"] is True
    assert transformer_engine.optimizer_state_options("fp32") == {}


@pytest.mark.parametrize(
    ("engine", "megatron", "message"),
    [
        ("2.11.0", "0.11.0", "megatron-core 0.14 or later, and 0.11 is installed: set it to fp32"),
        ("2.0.1", "0.16.1", "Transformer Engine 2.1 or later, and 2.0 is installed: set it to fp32"),
        (None, "0.16.1", "Transformer Engine 2.1 or later, and none is installed: set it to fp32"),
    ],
)
def test_moments_in_bf16_where_they_cannot_be(
    monkeypatch: pytest.MonkeyPatch, engine: str | None, megatron: str, message: str
) -> None:
    installed(monkeypatch, engine, megatron)
    for ask in (transformer_engine.optimizer_state_options, transformer_engine.check_optimizer_state):
        with pytest.raises(KitError, match=re.escape(f"OPTIMIZER_STATE=bf16 needs {message}")):
            ask("bf16")
        ask("fp32")


def test_packed_sequences_need_an_engine_that_masks_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.4.0")
    with pytest.raises(KitError, match=re.escape("PACKING=true needs Transformer Engine 1.7 or later, and 1.4 is")):
        transformer_engine.check_packed_sequences("PACKING")
    installed(monkeypatch, "1.7.0")
    transformer_engine.check_packed_sequences("PACKING")


def test_overlapped_sends_need_an_engine_that_works_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.8.0")
    with pytest.raises(KitError, match=r"TP_COMM_OVERLAP=true needs Transformer Engine 1\.9 or later, and 1\.8 is"):
        transformer_engine.check_tp_comm_overlap()
    installed(monkeypatch, "1.9.0")
    transformer_engine.check_tp_comm_overlap()


@pytest.mark.parametrize(
    ("text", "version"), [("2.11.0", (2, 11)), ("1.4.0.dev0+0fbc76a", (1, 4)), ("2.0rc1", (2, 0)), ("main", (0, 0))]
)
def test_a_vendors_version_is_read_by_its_first_two_numbers(
    text: str, version: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, text)
    assert transformer_engine.transformer_engine_version() == version
