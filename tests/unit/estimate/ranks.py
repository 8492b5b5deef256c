"""What tests/unit/estimate/worker.py counts, for tests that compare the formulas with it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from common.platforms.cuda_shim import TORCH

ROOT = Path(__file__).parents[3]
SHAPE: dict[str, Any] = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 301, "tie_word_embeddings": True, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6,
}  # fmt: skip


def attention_keeps_no_more_than_on_a_gpu() -> bool:
    """Whether this torch has one kernel for grouped heads on a CPU, which keeps neither scores nor copies of heads."""
    if TORCH < (2, 5):  # the heads of keys and values are repeated
        return False
    query, key = (torch.ones(1, heads, 2, 16, requires_grad=True) for heads in (4, 2))
    out = scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    return out.grad_fn is not None and "Flash" in out.grad_fn.name()


counts_attention = pytest.mark.skipif(
    not attention_keeps_no_more_than_on_a_gpu(), reason="this torch's attention on a CPU keeps its scores, or copies"
)


def write_config(folder: Path, **changes: Any) -> Path:
    """`folder`, with nothing but a config.json in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, **changes}))
    return folder


def batch(pp: int, micro_batch_size: int = 1) -> dict[str, int]:
    """Batch sizes of a short step: micro-batches that begin, go on and end, on `pp` stages."""
    return {"micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size * (2 if pp == 1 else 2 * pp)}


def count(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each task's rank holds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KIT_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    # Megatron-Core's compiled functions keep and make the same tensors, and take most of the time to compile.
    environment["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.estimate.worker", json.dumps(tasks)], env=environment, cwd=ROOT,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
