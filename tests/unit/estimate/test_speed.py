"""Seconds of a step: the operations are those of the log's formula, the pipeline's waits and the links are counted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.estimate import speed as module
from common.estimate.gpus import Gpu, find_gpu
from common.estimate.memory import work_of
from common.estimate.speed import chunk_costs
from common.estimate.weights import Chunk
from common.model.shape.config import QwenConfig, load_config
from common.training.loop.metrics import flops_per_token
from common.training.settings import TrainSettings
from tests.unit.estimate.ranks import write_config

H100 = find_gpu("H100")


@pytest.fixture
def qwen(tmp_path: Path) -> QwenConfig:
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 16}
    return load_config(write_config(tmp_path, **shape, num_key_value_heads=8, vocab_size=32000))


def settings(**changes: Any) -> TrainSettings:
    same = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 1, "seq_length": 512}
    return TrainSettings(**{**same, "micro_batch_size": 1, "global_batch_size": 16, **changes})


def speed_of(given: TrainSettings, qwen: QwenConfig, gpu: Gpu = H100) -> module.Speed:
    return module.speed(given, work_of(given, gpu.platform, qwen), gpu)


def cost(qwen: QwenConfig, gpu: Gpu = H100, **changes: Any) -> dict[str, float]:
    train_settings = settings(**changes)
    chunk = Chunk(qwen.num_hidden_layers, True, True)
    return chunk_costs(work_of(train_settings, gpu.platform, qwen), [chunk], gpu)[chunk]


@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
def test_operations_are_those_of_the_log(qwen: QwenConfig, impl: str) -> None:
    found = cost(qwen, transformer_impl=impl)
    seconds = found["products"] + found["attention"]
    assert seconds * 989e12 == pytest.approx(512 * flops_per_token(qwen, 512))


@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
def test_operations_of_adapters_are_those_of_the_log(qwen: QwenConfig, impl: str) -> None:
    found = cost(qwen, transformer_impl=impl, tuner="lora", lora_rank=8)
    lora = settings(tuner="lora", lora_rank=8).lora
    assert (found["products"] + found["attention"]) * 989e12 == pytest.approx(512 * flops_per_token(qwen, 512, lora))
    assert found["products"] < 0.7 * cost(qwen, transformer_impl=impl)["products"]


def test_preferences_run_the_output_layer_once_more(qwen: QwenConfig) -> None:
    """And without packing a pair takes two rows, which are counted as tokens."""
    before, after = cost(qwen, train_mode="finetune", packing=True), cost(qwen, train_mode="dpo", packing=True)
    head = 2 * 512 * 32000 * 2048 / 989e12
    assert after.pop("products") - before.pop("products") == pytest.approx(head)
    assert after == pytest.approx(before)
    packed = settings(train_mode="dpo", packing=True, micro_batch_size=2, global_batch_size=32)
    apart = settings(train_mode="dpo", packing=False, micro_batch_size=1, global_batch_size=16)
    one, other = (speed_of(each, qwen).tokens_per_second for each in (packed, apart))
    assert one == pytest.approx(other)


def test_small_heads_make_attention_slower_and_nothing_else(qwen: QwenConfig) -> None:
    small = replace(qwen, head_dim=64, num_attention_heads=32, num_key_value_heads=16)
    before, after = cost(qwen), cost(small)
    assert after.pop("attention") == pytest.approx(2 * before.pop("attention"))
    assert after == pytest.approx(before)


def test_recomputation_costs_a_forward_pass(qwen: QwenConfig) -> None:
    none, selective, full = (cost(qwen, recompute=kind) for kind in ("none", "selective", "full"))
    assert full["attention"] == selective["attention"] == pytest.approx(4 / 3 * none["attention"])
    assert selective["products"] == none["products"]
    head = 3 * 2 * 512 * 32000 * 2048 / 989e12
    assert full["products"] - head == pytest.approx(4 / 3 * (none["products"] - head))


@pytest.mark.parametrize(("vpp", "waits"), [(1, 3), (2, 1.5)])
def test_stages_wait_for_each_other(qwen: QwenConfig, vpp: int, waits: float) -> None:
    few, many = (speed_of(settings(gpus=4, pp=4, vpp=vpp, global_batch_size=size), qwen) for size in (4, 64))
    microbatch = (many.step_seconds - few.step_seconds) / 60
    assert few.bubble * few.step_seconds == pytest.approx(waits * microbatch)
    assert many.bubble * many.step_seconds == pytest.approx(waits * microbatch)
    assert speed_of(settings(), qwen).bubble == 0


def test_links_cost_time_and_a_network_more(qwen: QwenConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(**changes: Any) -> float:
        return speed_of(settings(**changes), qwen).tokens_per_second

    one = rate()
    # More than twice as many: each replica has half of the optimizer.
    assert 2 * one < rate(gpus=2, global_batch_size=32) < 2.2 * one
    assert rate(gpus=2, tp=2) < rate(gpus=2, global_batch_size=32)
    assert rate(gpus=1, nnodes=2, global_batch_size=2) < rate(gpus=2, global_batch_size=2)
    monkeypatch.setattr(module, "LINK_BYTES_PER_SECOND", 1e8)
    assert rate(gpus=2, tp=2) < one


def test_gathered_keys_and_values_cost_time(qwen: QwenConfig) -> None:
    """Those of the other three quarters of a row, and their gradients; between nodes at the network's rate."""
    received = 8 * 2 * 2 * (512 * 8 * 128) * 3 // 4  # bytes: layers, keys and values, bf16
    local = {"transformer_impl": "local", "gpus": 4, "cp": 4}

    def found(**changes: Any) -> float:
        given = settings(**{**local, **changes})
        return module.context_parallel_seconds(given, work_of(given, H100.platform, qwen), 8)

    assert found() == pytest.approx(2 * received / module.LINK_BYTES_PER_SECOND)
    assert found(recompute="selective") == pytest.approx(3 * received / module.LINK_BYTES_PER_SECOND)
    assert found(gpus=2, nnodes=2) == pytest.approx(2 * received / module.NETWORK_BYTES_PER_SECOND)
    assert found(transformer_impl="transformer_engine") == 0
    assert found(transformer_impl="transformer_engine", reset_attention=True) == found()
    assert found(gpus=1, cp=1) == 0


def test_a_faster_gpu_is_faster(qwen: QwenConfig) -> None:
    rates = [speed_of(settings(), qwen, gpu).tokens_per_second for gpu in map(find_gpu, ("A100", "H100"))]
    assert rates[0] < rates[1] < 989 / 312 * rates[0]
