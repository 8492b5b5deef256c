"""Validation losses of runs that share a GPU, each against Hugging Face on the same samples.

Micro-batches here are small and many, so that a wrong one in a hundred shows.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data.dataset.builder import build_dataset, split_documents
from common.data.dataset.indexed_dataset import open_tokens
from common.data.dataset.manifest import resolve
from tests.conversion import to_hf
from tests.distributed.launch import run, words
from tests.gpu.test_life import GpuRun
from tests.gpu.test_saving import SHAPE, VALIDATION
from tests.tiny import TEXTS, tiny_qwen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SAMPLES, LENGTH = 512, 1024
RUNS: dict[str, dict[str, str]] = {"bf16": {}, "fp8": {"FP8_FORMAT": "hybrid"}}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of Qwen2.5-0.5B with its vocabulary, random, and documents of unlike kinds."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_qwen(folder / "qwen", std=0.02, **{**SHAPE, "num_hidden_layers": 4})
    rows = (json.dumps({"text": f"{i} " + f"{TEXTS[i % 4]} " * (20 + i % 300)}) + "\n" for i in range(4000))
    (folder / "rows.jsonl").write_text("".join(rows))
    flags = {"input": folder / "rows.jsonl", "output_prefix": folder / "text", "tokenizer_path": folder / "qwen"}
    run("-m", "common.preprocess", "pretrain", *words({**flags, "workers": 1}))
    return folder


def hugging_faces(folder: Path, samples: Any) -> float:
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    total = 0.0
    with torch.no_grad():
        for i in range(SAMPLES):
            tokens, labels = (torch.from_numpy(samples[i][key]).cuda() for key in ("tokens", "labels"))
            total += float(torch.nn.functional.cross_entropy(model(tokens[None]).logits[0].float(), labels))
    return total / SAMPLES


def test_every_validation_loss_is_hugging_faces(work: Path) -> None:
    settings: dict[str, Any] = {
        "DATASET_PATH": work / "text", "HF_MODEL_PATH": work / "qwen", "GPUS": 1, "TP": 1, "PP": 1,
        "SEQ_LENGTH": LENGTH, "MICRO_BATCH_SIZE": 8, "GLOBAL_BATCH_SIZE": 8, "LR": 1e-3, "SPLIT": "70,30,0",
        "TRAIN_ITERS": 40, "EVAL_INTERVAL": 20, "EVAL_ITERS": SAMPLES // 8, "SAVE_INTERVAL": 20, "KEEP_CHECKPOINTS": 0,
    }  # fmt: skip
    both = {
        name: GpuRun({**settings, **more, "SAVE_CHECKPOINT_PATH": work / name}, work / f"{name}.log")
        for name, more in RUNS.items()
    }
    logged = {name: dict(VALIDATION.findall(each.end(0, 300))) for name, each in both.items()}
    data = resolve(str(work / "text"))
    _, held_out = split_documents(len(open_tokens(data.tokens)), "70,30,0")
    samples = build_dataset(data, train_mode="pretrain", seq_length=LENGTH, seed=1234, documents=held_out)
    assert all(list(losses) == ["20", "40"] for losses in logged.values()), logged
    for name, losses in logged.items():
        for iteration, loss in losses.items():
            exported = work / f"{name}_{iteration}"
            to_hf(work / name / f"iter_{int(iteration):07}", exported)
            expected = hugging_faces(exported, samples)
            bound = 5e-3 if name == "bf16" else 2e-2  # FP8 rounds the products of the forward pass
            assert abs(float(loss) - expected) < bound * expected, (name, iteration, loss, expected)
