"""Settings that the layers or the installed packages do not support are refused before anything starts."""

import logging
import re
from importlib import metadata
from typing import Any
from unittest.mock import patch

import pytest

from common.engine.versions import ENGINES
from common.errors import KitError
from common.platforms import PLATFORMS
from common.training.planning import compatibility as fit
from common.training.planning.compatibility import check_layers, check_packages, with_packing
from common.training.settings import TrainSettings


def settings(**changes: Any) -> TrainSettings:
    given: dict[str, Any] = {"save_checkpoint_path": "s", "dataset_path": "d", "train_iters": 1, "seq_length": 32}
    return TrainSettings(**{**given, **changes})


@pytest.mark.parametrize(
    ("platform", "changes", "message"),
    [
        ("nvidia", {"gpus": 2, "cp": 2, "seq_length": 30}, "SEQ_LENGTH=30 cannot be divided by 2 x CP x TP = 4"),
        ("cpu", {"fp8_format": "hybrid"}, "FP8_FORMAT=hybrid needs TRANSFORMER_IMPL="),
        ("cpu", {"tp_comm_overlap": "true", "gpus": 2, "tp": 2}, "TP_COMM_OVERLAP=true needs TRANSFORMER_IMPL="),
        ("nvidia", {"tp_comm_overlap": "true"}, "TP_COMM_OVERLAP=true with TP=1 and SEQUENCE_PARALLEL=True: it needs"),
        (
            "nvidia",
            {"core_attention": "sdpa", "packing": True, "train_mode": "finetune"},
            "CORE_ATTENTION=sdpa does not support PACKING=true with CP=1",
        ),
        ("metax", {"fused_products": "true"}, "FUSED_PRODUCTS=true needs an NVIDIA GPU, and this is metax"),
        (
            "nvidia",
            {"fused_products": "true", "fp8_format": "hybrid"},
            "FUSED_PRODUCTS=true is not supported with FP8_FORMAT=hybrid",
        ),
        (
            "nvidia",
            {"fused_products": "true", "precision": "fp32"},
            "FUSED_PRODUCTS=true is not supported with PRECISION=fp32",
        ),
        ("cpu", {"optimizer_state": "bf16"}, "OPTIMIZER_STATE=bf16 needs Transformer Engine, and cpu has none"),
        ("cpu", {"transformer_impl": "transformer_engine"}, "cpu has no Transformer Engine: set it to local"),
    ],
    ids=str,
)
def test_refusals(platform: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=re.escape(message)):
        check_layers(settings(**changes), PLATFORMS[platform])


@pytest.mark.parametrize(
    ("platform", "changes"),
    [
        ("nvidia", {"gpus": 2, "cp": 2}),
        ("cpu", {"gpus": 2, "cp": 2}),
        ("nvidia", {"core_attention": "flash_attn_4", "gpus": 2, "cp": 2}),
        ("nvidia", {"core_attention": "sdpa", "gpus": 2, "cp": 2, "packing": True, "train_mode": "finetune"}),
        ("nvidia", {"gpus": 2, "cp": 2, "reset_attention": True}),
        ("metax", {"gpus": 2, "cp": 2, "packing": True, "train_mode": "finetune"}),
        ("nvidia", {"fp8_format": "hybrid", "optimizer_state": "bf16"}),
        ("nvidia", {"fused_products": "true", "packing": True, "train_mode": "finetune"}),
        ("nvidia", {"tp_comm_overlap": "true", "gpus": 2, "tp": 2}),
        ("cpu", {"reset_attention": True}),
    ],
    ids=str,
)
@patch("common.training.planning.compatibility.installed_engine", lambda: ENGINES[-1])
def test_valid_combinations_are_accepted(platform: str, changes: dict[str, Any]) -> None:
    check_layers(settings(**changes), PLATFORMS[platform])


def installed(monkeypatch: pytest.MonkeyPatch, engine: str | None, megatron: str, *modules: str) -> None:
    """Fakes the versions in package metadata and the modules that an import would find."""
    versions = {"transformer-engine": engine, "megatron-core": megatron}

    def version(name: str) -> str:
        found = versions[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(fit, "find_spec", lambda name: name in modules or None)


OF_NGC_24_03 = [
    ({"packing": True, "train_mode": "finetune"}, "PACKING=true needs Transformer Engine 1.7 or later, and 1.4",
     "set TRANSFORMER_IMPL=local, or PACKING=false"),
    ({"reset_attention": True}, "RESET_ATTENTION=true needs Transformer Engine 1.7 or later, and 1.4",
     "set TRANSFORMER_IMPL=local, or RESET_ATTENTION=false"),
    ({"optimizer_state": "bf16"}, "OPTIMIZER_STATE=bf16 needs Transformer Engine 2.1 or later, and 1.4",
     "set it to fp32"),
    ({"fp8_format": "hybrid"}, "FP8_RECIPE=tensorwise needs Transformer Engine 2.2 or later, and 1.4",
     "use FP8_RECIPE=delayed"),
    ({"fp8_format": "e4m3", "fp8_recipe": "blockwise"}, "FP8_RECIPE=blockwise needs Transformer Engine 2.3 or later",
     "use FP8_RECIPE=delayed"),
    ({"tp_comm_overlap": "true", "gpus": 2, "tp": 2}, "TP_COMM_OVERLAP=true needs Transformer Engine 1.9 or later",
     "set it to auto"),
    ({"fused_products": "true"}, "FUSED_PRODUCTS=true needs quack, which is not installed",
     "requirements/hopper.txt, or set"),
    ({"core_attention": "flash_attn_4"}, "CORE_ATTENTION=flash_attn_4 needs flash_attn, which is not",
     "requirements/hopper"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message", "remedy"), OF_NGC_24_03, ids=str)
def test_what_ngc_24_03_lacks_is_refused_with_the_remedy(
    changes: dict[str, Any], message: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_settings = settings(**changes)
    installed(monkeypatch, "1.4.0.dev0+0fbc76a", "0.14.0")
    with pytest.raises(KitError, match=f"{re.escape(message)}.*{re.escape(remedy)}"):
        check_packages(train_settings, PLATFORMS["nvidia"])
    installed(monkeypatch, "2.11.0", "0.16.1", "quack", "flash_attn")
    check_packages(train_settings, PLATFORMS["nvidia"])


def test_what_ngc_24_03_has_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.4.0", "0.14.0")
    check_packages(settings(), PLATFORMS["nvidia"])
    check_packages(settings(fp8_format="hybrid", fp8_recipe="delayed"), PLATFORMS["nvidia"])
    local = {"transformer_impl": "local", "packing": True, "train_mode": "finetune"}
    check_packages(settings(**local), PLATFORMS["nvidia"])


def test_layers_of_transformer_engine_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None, "0.16.1")
    with pytest.raises(KitError, match=r"TRANSFORMER_IMPL=transformer_engine needs .*none is .*set it to local"):
        check_packages(settings(), PLATFORMS["nvidia"])
    check_packages(settings(transformer_impl="local"), PLATFORMS["nvidia"])
    for platform in ("cpu", "metax"):
        check_packages(settings(), PLATFORMS[platform])


def test_an_estimate_does_not_depend_on_what_is_installed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None, "0.16.1")
    for changes, _, _ in OF_NGC_24_03:
        check_layers(settings(**changes), PLATFORMS["nvidia"])


def test_packing_is_automatic_where_layers_and_packages_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kit")
    tuning = settings(train_mode="finetune")
    assert tuning.packing is None
    installed(monkeypatch, "1.4.0", "0.14.0")
    assert with_packing(tuning, PLATFORMS["nvidia"]).packing is False
    assert caplog.messages == [
        "PACKING=auto: off; PACKING=true needs Transformer Engine 1.7 or later, and 1.4 is installed:"
        " set TRANSFORMER_IMPL=local, or PACKING=false"
    ]
    caplog.clear()
    for one, platform in (
        (settings(train_mode="finetune", transformer_impl="local"), "nvidia"), (tuning, "cpu"),
    ):  # fmt: skip
        assert with_packing(one, PLATFORMS[platform]).packing is True
    assert with_packing(tuning, PLATFORMS["metax"]).packing is False
    (said,) = caplog.messages
    assert (
        said.startswith("PACKING=auto: off; the attention of local layers within samples") and "metax hardware" in said
    )
    caplog.clear()
    installed(monkeypatch, "2.4.0", "0.16.1")
    assert with_packing(tuning, PLATFORMS["nvidia"]).packing is True
    assert with_packing(settings(), PLATFORMS["nvidia"]).packing is False, "pretraining samples are full"
    assert with_packing(settings(train_mode="finetune", packing=False), PLATFORMS["nvidia"]).packing is False
    installed(monkeypatch, "1.4.0", "0.14.0")  # under CP it is not Transformer Engine's attention that needs 1.7
    assert with_packing(settings(train_mode="finetune", gpus=2, cp=2), PLATFORMS["nvidia"]).packing is True
    assert not caplog.messages
    with pytest.raises(KitError, match="^FP8_FORMAT=hybrid needs TRANSFORMER_IMPL"):  # whether packed or not
        with_packing(settings(train_mode="finetune", fp8_format="hybrid"), PLATFORMS["cpu"])


def test_packing_that_was_asked_for_is_never_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "1.4.0", "0.14.0")
    asked = with_packing(settings(train_mode="finetune", packing=True), PLATFORMS["nvidia"])
    with pytest.raises(KitError, match="PACKING=true needs Transformer Engine 1.7"):
        check_packages(asked, PLATFORMS["nvidia"])
