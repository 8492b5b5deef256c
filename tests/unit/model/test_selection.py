"""Which kernels a model is built with: QuACK's where they work, else a reason in the log, or an error if requested."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import KitError
from common.model.build import transformer_config
from common.model.kernels import selection as kernels
from common.model.layers import gated_mlp
from common.model.layers.attention import KINDS
from common.model.layers.loss import TorchKernels
from common.model.shape.config import load_config
from common.model.shape.options import ModelOptions
from common.parallel import ParallelSizes
from common.platforms.base import Platform
from common.platforms.cpu import CPU
from tests.distributed.launch import forked
from tests.tiny import tiny_qwen
from tests.unit.model import plain_kernels

ONE = ParallelSizes(1)
FUSED = replace(CPU, fused_kernels=True)
OPTIONS = ModelOptions("bf16", "local", "none")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="kit")
    return caplog


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends to be a Hopper GPU; computes on the CPU."""
    monkeypatch.setattr(kernels, "_device", lambda _: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    judge = gated_mlp.unusable_reason
    monkeypatch.setattr(gated_mlp, "unusable_reason", lambda *given: judge(*given[:3], torch.device("cpu")))


def products(folder: Path, **changes: Any) -> Any:
    qwen = load_config(tiny_qwen(folder))
    return kernels.mlp_products(qwen, ONE, replace(OPTIONS, **changes), FUSED, None)


def test_there_are_none_except_on_hopper(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert products(tmp_path) is None
    assert log.messages == ["SwiGLU: not fused into matrix products (QuACK: it needs a Hopper GPU)"]
    with pytest.raises(KitError, match=r"FUSED_PRODUCTS=true, but QuACK cannot fuse SwiGLU into matrix products here"):
        products(tmp_path, fused_products="true")


def test_where_quack_is_missing_its_module_is_named(
    hopper: None, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    assert products(tmp_path) is None
    assert log.messages == ["SwiGLU: not fused into matrix products (QuACK: no module quack)"]


def test_where_quack_works_it_is_used(
    hopper: None, quack: Any, tmp_path: Path, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert type(products(tmp_path)).__name__ == "QuackProducts"
    assert log.messages == ["SwiGLU: fused into matrix products (QuACK)"]
    monkeypatch.setattr(quack, "gemm_gated", lambda *given, **how: 1 / 0)
    assert products(tmp_path) is None
    assert log.messages[1:] == ["SwiGLU: not fused into matrix products (QuACK: ZeroDivisionError: division by zero)"]


@pytest.mark.parametrize("changes", [{"fused_products": "false"}, {"precision": "fp32"}], ids=str)
def test_where_it_is_disabled_it_is_not_tried(
    changes: dict[str, Any], hopper: None, quack: Any, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    assert products(tmp_path, **changes) is None
    assert not log.messages


def test_without_triton_the_loss_is_pytorchs(tmp_path: Path) -> None:
    assert type(kernels.loss_kernels(load_config(tiny_qwen(tmp_path)), ONE, OPTIONS, CPU)) is TorchKernels


def test_where_triton_fails_none_of_its_kernels_is_used(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "common.model.kernels.qkv_rope", raising=False)
    platform = kernels.with_working_kernels(FUSED, OPTIONS)
    assert platform == replace(FUSED, fused_kernels=False)
    assert log.messages == ["Triton kernels: not used, PyTorch's and Megatron-Core's are slower (no module triton)"]
    with pytest.raises(
        KitError, match="FUSED_PRODUCTS=true, but QuACK cannot fuse SwiGLU and loss .*Triton: no module tri"
    ):
        kernels.with_working_kernels(FUSED, replace(OPTIONS, fused_products="true"))


@pytest.mark.parametrize(
    ("swiglu", "reason"),
    [
        (plain_kernels.bias_swiglu, ""),
        (lambda x, _: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], "its results are off by "),
        (lambda x, _: plain_kernels.bias_swiglu(x, None) * float("nan"), "its results are off by nan%"),
        (lambda x, _: int("no compiler"), "ValueError: invalid literal for int"),
    ],
    ids=["right", "wrong", "no number", "failing"],
)
def test_tritons_kernels_are_tried(swiglu: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "common.model.kernels.swiglu", SimpleNamespace(bias_swiglu=swiglu))
    monkeypatch.setitem(sys.modules, "common.model.kernels.qkv_rope", SimpleNamespace(split_and_rotate=None))
    put: list[Any] = []
    monkeypatch.setattr(kernels, "use_kernels", lambda *given: put.extend(given))
    monkeypatch.setattr(kernels, "fuse_rotary_embedding", lambda: None)
    found, failure = kernels.try_on_all_ranks(lambda: kernels._triton_kernels(torch.device("cpu")))
    assert failure.startswith(reason) and bool(failure) == bool(reason)
    assert kernels.with_working_kernels(FUSED, OPTIONS).fused_kernels is (not reason)
    assert put == ([] if reason else [swiglu, None])


def test_fused_products_without_norms_under_transformer_engine_are_refused(tmp_path: Path) -> None:
    assert products(tmp_path, transformer_impl="transformer_engine") is None
    with pytest.raises(KitError, match="it needs the fused residual norms"):
        products(tmp_path, transformer_impl="transformer_engine", fused_products="true")


@pytest.mark.parametrize(
    ("changes", "local", "reason"),
    [
        ({"sequence_parallel": False}, 2, "SEQUENCE_PARALLEL=false"),
        ({"precision": "fp32"}, 2, "PRECISION=fp32"),
        ({"fp8_format": "hybrid"}, 2, "FP8's products are Transformer Engine's: TP_COMM_OVERLAP=true"),
        ({"transformer_impl": "transformer_engine"}, 2, "Transformer Engine's layers need the fused residual"),
        ({}, 1, "TP=2 spans nodes"),
    ],
)
def test_why_tensor_parallel_communication_is_not_overlapped_is_said(
    changes: dict[str, Any], local: int, reason: str, tmp_path: Path, log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    sizes, options = ParallelSizes(2, tp=2), replace(OPTIONS, **changes)
    assert kernels.tp_exchange(load_config(tiny_qwen(tmp_path)), sizes, options, FUSED, None) is None
    assert log.messages[0].startswith(f"TP communication: not overlapped with matrix products ({reason}")


@pytest.mark.parametrize(
    ("overlap", "tp", "platform"), [("false", 2, FUSED), ("true", 2, FUSED), ("auto", 1, FUSED), ("auto", 2, CPU)]
)
def test_where_no_copies_are_asked_for_nothing_is_said(
    overlap: str, tp: int, platform: Platform, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    options = replace(OPTIONS, tp_comm_overlap=overlap)
    qwen = load_config(tiny_qwen(tmp_path))
    assert kernels.tp_exchange(qwen, ParallelSizes(tp, tp=tp), options, platform, None) is None
    assert not log.messages


def attention(folder: Path, cp: int, **changes: Any) -> Any:
    """The core attention of a run at that CP, with Transformer Engine's layers where nothing else is said."""
    options = replace(OPTIONS, **{"transformer_impl": "transformer_engine", **changes})
    return kernels.core_attention(load_config(tiny_qwen(folder)), ParallelSizes(cp, cp=cp), options, CPU)


def test_transformer_engines_attention_takes_rows_of_several_documents_only_without_context_parallelism(
    tmp_path: Path,
) -> None:
    sdpa = KINDS["sdpa"]
    several: dict[str, Any] = {"separate_documents": True}
    assert attention(tmp_path, 1, **several, packed_sequences=True) is None
    assert attention(tmp_path, 2) is None
    assert attention(tmp_path, 2, **several) is sdpa
    assert attention(tmp_path, 2, **several, precision="fp32") is sdpa
    assert attention(tmp_path, 2, core_attention="sdpa") is sdpa
    assert attention(tmp_path, 2, transformer_impl="local") is sdpa


def test_a_kernel_faster_than_transformer_engines_is_used_with_context_parallelism_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cp in (1, 2):
        assert attention(tmp_path, cp) is None
    monkeypatch.setattr(KINDS["sdpa"], "faster_than_engine", True)
    for cp in (1, 2):
        assert attention(tmp_path, cp) is KINDS["sdpa"]


def test_a_deterministic_run_logs_what_it_replaces(
    tmp_path: Path, log: pytest.LogCaptureFixture, deterministic: None
) -> None:
    qwen, options = load_config(tiny_qwen(tmp_path)), replace(OPTIONS, deterministic=True)
    kernels.select_kernels(qwen, ONE, options, CPU)
    assert log.messages[-1] == "deterministic: torch's deterministic algorithms, the default on a CPU"
    assert transformer_config(qwen, ONE, options, CPU).deterministic_mode is True
    assert transformer_config(qwen, ONE, OPTIONS, CPU).deterministic_mode is False
    cuda = replace(CPU, device="cuda")
    replacements = {kind: kernels.deterministic_replacements(kind, cuda)[0] for kind in (None, *KINDS.values())}
    assert "Transformer Engine" in replacements[None] and "without cuDNN" in replacements[KINDS["sdpa"]]
    assert (
        replacements[KINDS["flash_attn"]]
        == replacements[KINDS["flash_attn_4"]]
        == ("attention gradients accumulated in a fixed order, without atomics")
    )


def test_deterministic_kernels_are_not_selected_while_torch_is_not_deterministic(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        kernels.select_kernels(load_config(tiny_qwen(tmp_path)), ONE, replace(OPTIONS, deterministic=True), CPU)


def test_a_deterministic_model_leaves_its_embedding_to_torch(tmp_path: Path) -> None:
    """Which adds a token's gradients in float32 on a GPU; Megatron-Core's, by index, adds them in bf16."""
    tiny_qwen(tmp_path)
    result = json.loads(forked(1, "tests.unit.model.test_selection", [str(tmp_path)]).splitlines()[-1])
    assert result == {"config": True, "embedding": False}


if __name__ == "__main__":
    from common.model.build import build_model
    from common.training.launching.process_group import process_group

    torch.use_deterministic_algorithms(True)
    with process_group(CPU, ONE, 1234, 1):
        (built,) = build_model(load_config(Path(sys.argv[1])), ONE, replace(OPTIONS, deterministic=True), CPU, 32)
        model: Any = built.module
        flags = model.config.deterministic_mode, model.embedding.word_embeddings.deterministic_mode
        print(json.dumps(dict(zip(("config", "embedding"), flags, strict=True))))


@pytest.mark.parametrize(
    ("sizes", "changes", "reason"),
    [
        (ParallelSizes(2, tp=2), {}, "TP=2 divides the softmax"),
        (ONE, {"weighted": True}, "loss weights other than 0 and 1"),
        (ONE, {"per_token_gradients": True}, "preferences need the gradient of each token"),
    ],
)
def test_the_log_says_why_the_loss_is_not_fused(
    sizes: ParallelSizes, changes: dict[str, Any], reason: str, quack: Any, hopper: None, tmp_path: Path,
    log: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    qwen = load_config(tiny_qwen(tmp_path))
    kernels.loss_kernels(qwen, sizes, replace(OPTIONS, **changes), FUSED)
    assert log.messages[-1] == f"loss: not fused into matrix products ({reason})"


def test_the_log_says_why_the_mlp_is_not_fused(hopper: None, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    assert products(tmp_path, fp8_format="hybrid") is None
    assert products(tmp_path, transformer_impl="transformer_engine") is None
    assert log.messages == [
        "SwiGLU: not fused into matrix products (FP8's are Transformer Engine's)",
        "SwiGLU: not fused into matrix products (with Transformer Engine's layers it needs the fused residual norms)",
    ]
