"""The printed numbers: operations, rates, the time left."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from common.model.shape.config import load_config
from common.model.shape.lora import MODULES, LoraConfig, adapter_parameters
from common.platforms.cpu import CPU
from common.platforms.nvidia import NVIDIA
from common.training.loop.metrics import Interval, Meter, Stopwatch, clock, flops_per_token, peak_tflops, short
from tests.tiny import tiny_qwen


def test_flops_of_a_token_are_those_counted_by_hand(tmp_path: Path) -> None:
    # h 64, 4 heads and 2 groups of 16, f 128, 4 layers, 512 rows of vocabulary; multiply-adds of one token at s = 32:
    qkv = 64 * (64 + 32 + 32)
    output = 64 * 64
    mlp = 3 * 64 * 128
    attention = 2 * 16 * 64  # scores and their sum, over the 16 keys that a query sees on average
    head = 64 * 512
    forward = 2 * (4 * (qkv + output + mlp + attention) + head)
    qwen = load_config(tiny_qwen(tmp_path, num_hidden_layers=4, vocab_size=512))
    assert flops_per_token(qwen, 32) == 3 * forward == 3 * 376832


def without_rotary(counter: FlopCounterMode, model: Any, seq_length: int) -> int:
    """The counted operations but those of the table of angles, which transformers 4 makes by a product."""
    (rotary,) = (module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    with FlopCounterMode(display=False) as table:
        rotary(torch.ones(1), torch.arange(seq_length)[None])
    return int(counter.get_total_flops() - table.get_total_flops())


@pytest.mark.parametrize("tie", [True, False])
def test_flops_are_those_that_torch_counts_in_the_original_model(tie: bool, tmp_path: Path) -> None:
    seq_length = 64
    folder = tiny_qwen(tmp_path, num_hidden_layers=2, tie_word_embeddings=tie)
    qwen = load_config(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, seq_length, dtype=torch.long))
    # There the full square of scores is multiplied; here only its causal half.
    half = 2 * qwen.num_hidden_layers * seq_length * qwen.num_attention_heads * qwen.head_dim
    assert seq_length * (flops_per_token(qwen, seq_length) / 3 + half) == without_rotary(counter, model, seq_length)


@pytest.mark.parametrize("targets", [MODULES, ("q_proj", "down_proj")])
def test_flops_of_adapters_are_those_that_torch_counts_in_pefts_model(targets: tuple[str, ...], tmp_path: Path) -> None:
    seq_length = 64
    folder = tiny_qwen(tmp_path, num_hidden_layers=2, tie_word_embeddings=False)
    qwen, lora = load_config(folder), LoraConfig(4, 8.0, targets)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float()
    model.enable_input_require_grads()  # as training does
    model = get_peft_model(model, PeftConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM"))
    tokens = torch.zeros(1, seq_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    half = 3 * 2 * qwen.num_hidden_layers * seq_length * qwen.num_attention_heads * qwen.head_dim
    assert seq_length * (flops_per_token(qwen, seq_length, lora) + half) == without_rotary(counter, model, seq_length)
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    assert trained == 2 * adapter_parameters(lora, qwen)


@pytest.mark.parametrize(
    "device, expected",
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_a_devices_peak_is_found_by_the_longest_name(device: str, expected: float | None) -> None:
    assert peak_tflops(NVIDIA, device) == expected
    assert peak_tflops(CPU, device) is None


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00:00"),
        (59.9, "0:00:59"),
        (3723, "1:02:03"),
        (86399, "23:59:59"),
        (86400, "1 d 0:00:00"),
        (2 * 86400 + 3723, "2 d 1:02:03"),
    ],
)
def test_seconds_are_shown_as_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# 10 steps of 16 samples of 1000 tokens in 4 s on 8 devices: 40,000 tokens/s, 5 GFLOP a token: 25 TFLOP/s a device.
METER = Meter(train_iters=1210, global_batch_size=16, seq_length=1000, world_size=8, flops_per_token=5e9)
INTERVAL = Interval(loss=2.5, grad_norm=0.75, learning_rate=1.5e-5, iterations=10, seconds=4.0, supervised_tokens=6e4)


def test_rates_are_of_all_devices_of_one_device_and_of_one_step() -> None:
    assert METER.rates(INTERVAL) == {
        "tokens_per_s": 40000.0, "supervised_tokens_per_s": 15000.0, "tflops_per_gpu": 25.0, "ms_per_iteration": 400.0,
    }  # fmt: skip


def test_a_log_line_holds_every_number() -> None:
    meter = replace(METER, shows_padding=True)
    assert [meter.header, meter.row(1210, INTERVAL), meter.row(9, replace(INTERVAL, loss=1.25, padding=0.4567))] == [
        "                         loss  grad norm        lr  tokens/s  TFLOP/s    pad     left",
        "iteration 1210/1210  2.500000     0.7500  1.50e-05    40,000     25.0         0:00:00",
        "iteration 9/1210     1.250000     0.7500  1.50e-05    40,000     25.0  45.7%  0:08:00",
    ]
    assert METER.header.split() == ["loss", "grad", "norm", "lr", "tokens/s", "TFLOP/s", "left"]


def test_a_line_with_its_date_fits_a_terminal() -> None:
    usual = {"grad_norm": 12.3456, "padding": 0.5}
    meter = replace(METER, train_iters=9999, global_batch_size=256, seq_length=4096, shows_padding=True)
    row = meter.row(1000, replace(INTERVAL, seconds=30.0, **usual))
    assert len("11-30 12:00:00 " + row) == len("11-30 12:00:00 " + meter.header) == 100


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0, "0.00"), (0.000211, "2.1e-04"), (0.000997, "1.0e-03"), (0.001, "0.00100"), (0.00177, "0.00177"),
     (5.0, "5.00"), (590.4, "590"), (999.7, "1,000"), (2345.6, "2,346")],
)  # fmt: skip
def test_a_rate_keeps_its_column(rate: float, text: str) -> None:
    assert short(rate) == text and len(text) <= 7


def test_the_time_left_counts_evaluation_and_saving() -> None:
    interval = replace(INTERVAL, other_seconds_per_iteration=0.6)
    assert METER.row(110, interval).endswith(" 0:18:20")  # 1,100 steps of a second


def test_a_lap_leaves_out_what_ran_while_the_watch_was_paused() -> None:
    watch = Stopwatch()
    began = time.perf_counter()
    time.sleep(0.02)
    watch.pause("saving")
    time.sleep(0.3)
    watch.resume()
    watch.resume()  # not paused: nothing changes
    first = watch.lap()
    total = time.perf_counter() - began
    assert 0.02 <= first <= total - 0.3
    assert watch.lap() < first
    assert [*watch.pauses] == ["saving"] and 0.3 <= watch.pauses["saving"] <= total
