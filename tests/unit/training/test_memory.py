"""A run that is out of memory names the settings that take less."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from common.engine import transformer_engine
from common.errors import KitError
from common.platforms.base import Platform
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA
from common.training.loop.memory import explain_out_of_memory
from common.training.settings import TrainSettings

# Seen on an H100 with torch 2.11, micro-batch 4 of 2,048 tokens, 3B.
OF_TORCH = (
    "CUDA out of memory. Tried to allocate 344.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which 191.19 MiB is"
    " free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to"
    " avoid fragmentation.  See documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes)"
)


@pytest.fixture(autouse=True)
def _rank_3_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(transformer_engine, "transformer_engine_version", lambda: (2, 11))


def plan(platform: Platform, **settings: Any) -> Any:
    given = {"save_checkpoint_path": "/nowhere", "dataset_path": "/nowhere", "train_iters": 1, **settings}
    start = SimpleNamespace(model_folder=Path("/models/3B"))
    return SimpleNamespace(settings=TrainSettings(**given), platform=platform, start=start)


def explanation(of: Any, error: RuntimeError) -> str:
    with pytest.raises(KitError) as raised, explain_out_of_memory(of):
        raise error
    assert raised.value.__cause__ is error
    return str(raised.value)


def test_each_setting_that_takes_less_is_named_with_what_it_is() -> None:
    of = plan(NVIDIA, micro_batch_size=4, global_batch_size=8, seq_length=2048, gpus=2, tp=2)
    assert explanation(of, torch.cuda.OutOfMemoryError(OF_TORCH)) == (
        "rank 3 is out of memory (CUDA out of memory. Tried to allocate 344.00 MiB. GPU 0 has a total capacity of 79.18"
        " GiB of which 191.19 MiB is free. If reserved but unallocated memory is large try setting"
        " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation): to use less memory: a"
        " MICRO_BATCH_SIZE below 4, RECOMPUTE=full, OPTIMIZER_STATE=bf16, OPTIMIZER_STATE=cpu or cpu_bf16, a SEQ_LENGTH"
        " below 2048, more GPUs, with TP over 2 or PP over 1; `python -m common.estimate --hf-model-path /models/3B"
        " --gpu TYPE --gpus 2 --seq-length 2048` shows what fits"
    )


@pytest.mark.parametrize(
    ("platform", "settings", "left"),
    [
        (NVIDIA, {"recompute": "full", "optimizer_state": "bf16"},
         "OPTIMIZER_STATE=cpu or cpu_bf16, a SEQ_LENGTH below 2048, more GPUs"),
        (NVIDIA, {"recompute": "full", "precision": "fp32"}, "OPTIMIZER_STATE=cpu, a SEQ_LENGTH below 2048, more GPUs"),
        (NVIDIA, {"recompute": "full", "recompute_num_layers": 2, "optimizer_state": "cpu"},
         "RECOMPUTE_NUM_LAYERS empty, a SEQ_LENGTH below 2048, more GPUs"),
        (METAX, {"recompute": "full", "optimizer_state": "cpu_bf16"}, "a SEQ_LENGTH below 2048, more GPUs"),
        (METAX, {"recompute": "selective"},
         "RECOMPUTE=full, OPTIMIZER_STATE=bf16, OPTIMIZER_STATE=cpu or cpu_bf16, a SEQ_LENGTH below 2048, more GPUs"),
        (NVIDIA, {"train_or_convert_ckpt": "convert", "load_checkpoint_path": "/a"}, "more GPUs"),
    ],
)  # fmt: skip
def test_settings_that_already_take_less_are_not_named(platform: Platform, settings: dict[str, Any], left: str) -> None:
    text = explanation(
        plan(platform, micro_batch_size=1, **settings), RuntimeError("CUDA error: out of memory\nlines of C++")
    )
    assert f"(CUDA error: out of memory): to use less memory: {left}, with TP over 1" in text
    needs = {"cpu": 12, "cpu_bf16": 6}.get(settings.get("optimizer_state", ""))
    assert f"{needs} bytes of host memory a parameter" in text if needs else "bytes of host memory" not in text


def test_context_parallelism_is_named_for_long_rows() -> None:
    texts = [explanation(plan(NVIDIA, seq_length=n), torch.cuda.OutOfMemoryError(OF_TORCH)) for n in (4096, 8192)]
    assert "CP over" not in texts[0] and "TP over 1 or PP over 1, with CP over 1; `python -m" in texts[1]


def test_moments_in_bf16_are_not_named_where_transformer_engine_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ((1, 4), None):
        monkeypatch.setattr(transformer_engine, "transformer_engine_version", lambda version=version: version)
        assert "OPTIMIZER_STATE=bf16" not in explanation(plan(NVIDIA), torch.cuda.OutOfMemoryError(OF_TORCH))


def test_running_out_of_memory_on_a_cpu_is_explained_too() -> None:
    message = r"rank 3 is out of memory \(.*can't allocate memory.*PP over 1$"
    with pytest.raises(KitError, match=message), explain_out_of_memory(plan(CPU)):
        torch.empty(2**60)


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), explain_out_of_memory(plan(CPU)):
        raise RuntimeError("shapes")
