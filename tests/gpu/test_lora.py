"""Adapters on the GPU: Transformer Engine's layers beside local ones and PEFT, whole runs by nvidia/'s own defaults."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from tests.conversion import to_megatron
from tests.distributed.launch import run, steps, words
from tests.gpu.test_life import GPUS, GpuRun
from tests.gpu.test_training import needs_transformer_engine
from tests.tiny import TEXTS, tiny_qwen

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of Qwen2.5-0.5B's width, its checkpoint, conversations, and an adapter in which nothing is zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("lora")
    tiny_qwen(folder / "qwen", std=0.02, **SHAPE)
    rows = ({"input": f"{i} {TEXTS[i % 4]}", "output": f"{i} " + TEXTS[i % 3] * (1 + i % 30)} for i in range(2000))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"input": folder / "rows.jsonl", "output_prefix": folder / "sft", "tokenizer_path": folder / "qwen"}
    run("-m", "common.preprocess", "sft", *words({**flags, "workers": 1}))
    to_megatron(folder / "qwen", folder / "start", ckpt_format="torch_dist", dtype="bf16")
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(Qwen2ForCausalLM.from_pretrained(folder / "qwen"), config)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.02)
    model.save_pretrained(folder / "peft")
    return folder


def trained(work: Path, name: str, **more: Any) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of a run by the script."""
    settings: dict[str, Any] = {
        "DATASET_PATH": work / "sft", "LOAD_CHECKPOINT_PATH": work / "start", "SAVE_CHECKPOINT_PATH": work / name,
        "TRAIN_MODE": "finetune", "TUNER": "lora", "GPUS": 1, "TP": 1, "PP": 1, "SEQ_LENGTH": 2048,
        "MICRO_BATCH_SIZE": 2, "GLOBAL_BATCH_SIZE": 8, "LR": 1e-3, "MIN_LR": 1e-4, "TRAIN_ITERS": 20, "LOG_INTERVAL": 1,
        "EVAL_INTERVAL": 0, "LORA_ADAPTER": work / "peft", **more,
    }  # fmt: skip
    return steps(GpuRun(settings, work / f"{name}.log").end(0, 300))


def test_transformer_engines_layers_train_as_local_ones(work: Path) -> None:
    """From the same adapter on the same batches; they round in other places."""
    needs_transformer_engine()
    engine, local = trained(work, "engine", PACKING="true"), trained(work, "local", TRANSFORMER_IMPL="local")
    packed = trained(work, "local_packed", TRANSFORMER_IMPL="local", PACKING="true")
    assert engine[-1][1] < 0.7 * engine[0][1] and local[-1][1] < 0.7 * local[0][1]
    for one, other in zip(engine[:5], packed[:5], strict=True):
        assert math.isclose(one[1], other[1], rel_tol=5e-3) and math.isclose(one[2], other[2], rel_tol=5e-2)


def test_fp8_on_a_frozen_base_trains(work: Path) -> None:
    needs_transformer_engine()
    wide, narrow = trained(work, "bf16"), trained(work, "fp8", FP8_FORMAT="hybrid")
    assert math.isclose(wide[-1][1], narrow[-1][1], rel_tol=3e-2) and narrow[-1][1] < 0.7 * narrow[0][1]


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", [{"TP": 2}, {"PP": 2}, {}, {"TP": 2, "RECOMPUTE": "full"}], ids=str)
def test_two_gpus_train_as_one(work: Path, layout: dict[str, Any]) -> None:
    one = trained(work, f"one_{layout}", TRAIN_ITERS=5)
    two = trained(work, f"two_{layout}", TRAIN_ITERS=5, GPUS=2, **layout)
    for alone, together in zip(one, two, strict=True):
        assert math.isclose(alone[1], together[1], rel_tol=5e-3) and math.isclose(alone[2], together[2], rel_tol=5e-2)


def test_the_exported_adapter_has_the_loss_of_the_next_step(work: Path) -> None:
    """By PEFT in bf16, and by the merged model; the checkpoint holds the adapter alone."""
    from peft import PeftModel
    from transformers import Qwen2ForCausalLM

    from common.data.dataset.builder import build_dataset, split_documents
    from common.data.dataset.manifest import resolve

    logged = trained(work, "whole", SAVE_INTERVAL=10, TRAIN_ITERS=11, ASYNC_SAVE="true")[-1][1]
    checkpoint = work / "whole" / "iter_0000010"
    assert all(".adapters." in key for key in TorchDistReader(checkpoint).tensors)
    for kind in ("adapter", "merged"):
        flags = {"load_checkpoint_path": checkpoint, "save_checkpoint_path": work / f"whole_{kind}", "export": kind}
        run("-m", "common.convert", "megatron-to-hf", *words(flags))
    documents, _ = split_documents(2000, "98,2,0")
    data = resolve(str(work / "sft"))
    samples = build_dataset(data, train_mode="finetune", seq_length=2048, seed=1234, documents=documents)
    base: Any = Qwen2ForCausalLM.from_pretrained(work / "qwen", dtype=torch.bfloat16)
    models = {
        "adapter": PeftModel.from_pretrained(base, work / "whole_adapter"),
        "merged": Qwen2ForCausalLM.from_pretrained(work / "whole_merged", dtype=torch.bfloat16),
    }
    for kind, model in models.items():
        total, number, model = 0.0, 0.0, model.cuda()
        for index in range(80, 88):
            tokens, labels, mask = (
                torch.from_numpy(samples[index][key]).cuda() for key in ("tokens", "labels", "loss_mask")
            )
            with torch.no_grad():
                logits = model(tokens[None]).logits[0].float()
            total += float((torch.nn.functional.cross_entropy(logits, labels, reduction="none") * mask).sum())
            number += float(mask.sum())
        assert math.isclose(total / number, logged, rel_tol=1e-2), kind
