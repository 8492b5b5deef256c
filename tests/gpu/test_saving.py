"""What reaches the disk from a GPU, at tensors of a real size: the embedding alone is 17 blocks of the pinned ring."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data.dataset.builder import build_dataset, split_documents
from common.data.dataset.indexed_dataset import open_tokens
from common.data.dataset.manifest import resolve
from common.training.checkpointing.staging import StagingBuffer, iter_blocks
from tests.conversion import to_hf
from tests.distributed.launch import run, words
from tests.gpu.test_life import GpuRun
from tests.tiny import TEXTS, tiny_qwen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 2, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 4096,
}  # fmt: skip
SIZES = (5, 1 << 20, 300_000_001, 17 << 20, 64, 200 << 20)  # bytes: below a block, of one, and of many
VALIDATION = re.compile(r"validation at iteration (\d+) +loss ([\d.]+)")


def device_tensors() -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    return [torch.randint(0, 255, (n,), dtype=torch.uint8, device="cuda", generator=generator) for n in SIZES]


def test_every_block_is_the_gpus() -> None:
    tensors = device_tensors()
    assert b"".join(bytes(block) for block in iter_blocks(tensors)) == torch.cat(tensors).cpu().numpy().tobytes()


def test_a_staged_copy_is_the_gpus() -> None:
    tensors = device_tensors()
    assert all(map(torch.equal, StagingBuffer().stage(tensors), [tensor.cpu() for tensor in tensors]))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Qwen2.5-0.5B with its vocabulary, random, and text."""
    folder = tmp_path_factory.mktemp("saving")
    tiny_qwen(folder / "qwen", std=0.02, **SHAPE)
    rows = (json.dumps({"text": f"{i} " + f"{TEXTS[i % 4]} " * (20 + i % 30)}) + "\n" for i in range(2000))
    (folder / "rows.jsonl").write_text("".join(rows))
    flags = {"input": folder / "rows.jsonl", "output_prefix": folder / "text", "tokenizer_path": folder / "qwen"}
    run("-m", "common.preprocess", "pretrain", *words({**flags, "workers": 1}))
    return folder


@pytest.mark.parametrize("asynchronous", ["false", "true"])
@pytest.mark.parametrize("state", ["fp32", "bf16", "cpu", "cpu_bf16"])
def test_the_exported_model_has_the_validation_loss_that_training_logged(
    work: Path, asynchronous: str, state: str
) -> None:
    """The run resumes, too: its next validation loss is not above the last one, and no warning compares them."""
    from transformers import Qwen2ForCausalLM

    name = f"{state}_{asynchronous}"
    settings: dict[str, Any] = {
        "DATASET_PATH": work / "text", "HF_MODEL_PATH": work / "qwen", "SAVE_CHECKPOINT_PATH": work / name, "GPUS": 1,
        "TP": 1, "PP": 1, "SEQ_LENGTH": 2048, "MICRO_BATCH_SIZE": 4, "GLOBAL_BATCH_SIZE": 8, "LR": 1e-3,
        "SPLIT": "90,10,0",
        "TRAIN_ITERS": 60, "EXIT_INTERVAL": 30, "EVAL_INTERVAL": 30, "EVAL_ITERS": 2, "LOG_INTERVAL": 1,
        "ASYNC_SAVE": asynchronous, "OPTIMIZER_STATE": state,
    }  # fmt: skip
    first = GpuRun(settings, work / f"{name}.log").end(0, 200)
    to_hf(work / name, work / f"{name}_hf")
    (logged,) = (float(loss) for _, loss in VALIDATION.findall(first))
    data = resolve(str(work / "text"))
    _, held_out = split_documents(len(open_tokens(data.tokens)), "90,10,0")
    samples = build_dataset(data, train_mode="pretrain", seq_length=2048, seed=1234, documents=held_out)
    tokens, labels = (
        torch.stack([torch.from_numpy(samples[i][key]) for i in range(16)]) for key in ("tokens", "labels")
    )
    model = Qwen2ForCausalLM.from_pretrained(work / f"{name}_hf", dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(row[None].cuda()).logits[0].float(), label.cuda())
            for row, label in zip(tokens, labels, strict=True)
        ]
    exported = float(torch.stack(losses).mean())
    assert logged < 0.8 * math.log(SHAPE["vocab_size"]) and abs(exported - logged) < 0.01 * logged
    second = GpuRun(settings, work / f"{name}_rest.log").end(0, 200)
    assert "start: resume" in second and "before iteration" not in second
    assert float(VALIDATION.findall(second)[-1][1]) < logged
