"""FP8 in the estimate: the measured steps of 3B and 7B on one H200, and what is counted."""

import json
from dataclasses import replace
from typing import Any

import pytest

from common.errors import KitError
from common.estimate.gpus import find_gpu
from common.estimate.layouts import Estimate, estimate
from common.estimate.memory import fp8_weight_bytes, work_of
from common.estimate.speed import chunk_costs
from common.estimate.weights import Chunk
from common.model.shape.config import QwenConfig, parse_config
from common.model.shape.parameters import layer_parameters
from common.platforms.nvidia import NVIDIA
from common.training.settings import TrainSettings
from tests.bench.fit_estimate import DATA

H200 = find_gpu("H200")
GIB = 2**30
MEASURED = json.loads(DATA.read_text())["shapes"]


def shape(name: str) -> QwenConfig:
    return parse_config(MEASURED[name], DATA)


def settings(**changes: Any) -> TrainSettings:
    same = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 1, "seq_length": 4096}
    return TrainSettings(**{**same, "micro_batch_size": 4, "global_batch_size": 48, "fp8_format": "hybrid", **changes})


def found(name: str, **changes: Any) -> Estimate:
    return estimate(settings(**changes), shape(name), H200)


@pytest.mark.parametrize(
    ("recipe", "gib", "tokens_per_s"), [("tensorwise", 101.8, 37_800), ("delayed", 103.0, 39_200)]
)  # docs/benchmarks.md
def test_a_measured_step_of_3b_is_estimated(recipe: str, gib: float, tokens_per_s: float) -> None:
    one = found("3B", fp8_recipe=recipe)
    assert one.largest.peak / GIB == pytest.approx(gib, rel=0.02)
    assert one.speed and one.speed.tokens_per_second == pytest.approx(tokens_per_s, rel=0.01)


def test_blocks_have_their_measured_share_of_tensorwises_rate() -> None:
    rates = {recipe: found("3B", fp8_recipe=recipe).speed for recipe in ("tensorwise", "blockwise")}
    assert rates["blockwise"] and rates["tensorwise"]
    share = rates["blockwise"].tokens_per_second / rates["tensorwise"].tokens_per_second
    assert share == pytest.approx(0.92, abs=0.01)


def test_what_fits_of_7b_is_what_was_seen_to_fit() -> None:
    # bf16 moments, FP8 delayed: 130.4 GiB with micro-batch 8 at sequence 1024, and with 2 at 4096 (docs/benchmarks.md)
    same = {"optimizer_state": "bf16", "fp8_recipe": "delayed", "global_batch_size": 128}
    for seq_length, micro_batch_size, rate in ((1024, 8, 20_930), (4096, 2, 19_130)):
        one = found("7B", seq_length=seq_length, micro_batch_size=micro_batch_size, **same)
        assert one.largest.peak / GIB == pytest.approx(130.4, rel=0.01) and one.fits == "yes"
        assert one.speed and one.speed.tokens_per_second == pytest.approx(rate, rel=0.1)
    assert found("7B", seq_length=1024, micro_batch_size=16, **same).fits == "no"


@pytest.mark.parametrize(
    ("name", "state", "samples", "gib", "tokens_per_s"),
    [("7B", "cpu", 32, 59.0, 10_970), ("7B", "cpu_bf16", 32, 59.0, 12_000)],
)  # docs/benchmarks.md
def test_a_measured_step_with_the_optimizer_on_the_host_is_estimated(
    name: str, state: str, samples: int, gib: float, tokens_per_s: float
) -> None:
    plain = {"fp8_format": "none", "fused_products": "true", "micro_batch_size": 1, "global_batch_size": samples}
    one = found(name, optimizer_state=state, **plain)
    assert one.largest.peak / GIB == pytest.approx(gib, rel=0.01)
    assert one.speed and one.speed.tokens_per_second == pytest.approx(tokens_per_s, rel=0.15)


def test_weights_are_copied_twice_and_the_products_inputs_take_a_byte() -> None:
    qwen = shape("3B")
    chunk = Chunk(qwen.num_hidden_layers, True, True)
    work = work_of(settings(), NVIDIA, qwen)
    copies = fp8_weight_bytes(work, chunk)
    norms_and_biases = 2 * qwen.hidden_size + qwen.qkv_rows
    assert copies == 2 * qwen.num_hidden_layers * (layer_parameters(qwen, 1) - norms_and_biases)
    assert fp8_weight_bytes(replace(work, tp=2), chunk) == copies // 2
    plain, fp8 = (found("3B", fp8_format=kind).largest for kind in ("none", "hybrid"))
    assert fp8.workspace - plain.workspace == copies
    saved = 4 * 4096 * (2 * qwen.hidden_size + qwen.intermediate_size - qwen.num_attention_heads * qwen.head_dim)
    assert plain.kept - fp8.kept == saved * qwen.num_hidden_layers


def test_only_the_layers_products_are_faster() -> None:
    qwen = shape("3B")
    whole, inner = (Chunk(qwen.num_hidden_layers, last, last) for last in (True, False))
    bf16, fp8 = (work_of(settings(fp8_format=kind), NVIDIA, qwen) for kind in ("none", "hybrid"))
    costs = [[chunk_costs(work, [chunk], H200)[chunk] for work in (bf16, fp8)] for chunk in (whole, inner)]
    head = [one["products"] - other["products"] for one, other in zip(*costs, strict=True)]
    assert head[0] == pytest.approx(head[1])
    assert costs[1][1].pop("products") == pytest.approx(0.64 * costs[1][0].pop("products"))
    assert costs[1][0] == costs[1][1]


def test_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(KitError, match="^FP8_FORMAT=hybrid: A100 has none, .*: set it to none"):
        estimate(settings(), shape("3B"), find_gpu("A100"))
