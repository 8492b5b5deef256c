"""TRAINABLE and FREEZE: the weights that they freeze keep their bits, the others train as in one process."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from tests.distributed.hf_loss import hf_loss
from tests.distributed.launch import forked, steps, words
from tests.distributed.user import step3_forked


def settings(work: Path, name: str, **more: Any) -> dict[str, Any]:
    return {
        "TRAIN_MODE": "finetune", "DATASET_PATH": work / "sft", "LOAD_CHECKPOINT_PATH": work / "start",
        "SAVE_CHECKPOINT_PATH": work / name, "SEQ_LENGTH": 96, "EVAL_INTERVAL": 0, "PRECISION": "fp32", **more,
    }  # fmt: skip


def changed(work: Path, name: str) -> set[str]:
    """The Hugging Face tensors that the run changed, after its export."""
    flags = {"load_checkpoint_path": work / name, "save_checkpoint_path": work / f"{name}_hf"}
    forked(0, "common.convert", ["megatron-to-hf", *words(flags)])
    before, after = (load_file(work / folder / "model.safetensors") for folder in ("qwen", f"{name}_hf"))
    return {key for key in before if not torch.equal(before[key], after[key])}


LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "pp_dp": {"PP": 2, "GPUS": 4, "RECOMPUTE": "full"},  # with buckets, and each stage's copy of frozen embeddings
    "vpp_tp": {"PP": 2, "VPP": 2, "TP": 2, "GPUS": 4},  # with chunks in which nothing is trained
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainable_trains_these_weights_alone(work: Path, layout: str) -> None:
    given = settings(work, layout, TRAINABLE="model.layers.[03].mlp.*, model.norm.*", TRAIN_ITERS=3, CLIP_GRAD=0)
    found = steps(step3_forked({**given, **LAYOUTS[layout]}))
    expected = {f"model.layers.{i}.mlp.{kind}_proj.weight" for i in (0, 3) for kind in ("gate", "up", "down")}
    assert changed(work, layout) == {*expected, "model.norm.weight"}
    assert np.allclose(found, steps((work / "one" / "log.txt").read_text()), rtol=1e-5)
    keys = TorchDistReader(work / layout / "iter_0000003").tensors
    moments = {key.split("exp_avg.")[1] for key in keys if key.startswith("optimizer.state.exp_avg.")}
    assert moments == {"decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight",
                       "decoder.final_layernorm.weight"}  # fmt: skip


@pytest.mark.lane
def test_adapters_train_alike_at_several_layouts(work: Path) -> None:
    """Without PEFT, which the lanes lack (test_lora.py); a tied model's stages cannot all freeze there."""
    found = {}
    for name, layout in {"lora": {}, "lora_tp_dp": {"TP": 2, "GPUS": 4}, "lora_full": {"RECOMPUTE": "full"}}.items():
        log = step3_forked(settings(work, name, TUNER="lora", LORA_DROPOUT=0, TRAIN_ITERS=3, **layout))
        found[name] = np.array(steps(log))
        keys = TorchDistReader(work / name / "iter_0000003").tensors
        assert len(keys) == 4 * 14 and all(".adapters." in key for key in keys)
    assert np.allclose(found["lora"], found["lora_tp_dp"], rtol=2e-5)
    assert np.allclose(found["lora"], found["lora_full"], rtol=2e-5)
    assert found["lora"][-1, 1] < found["lora"][0, 1] - 0.1


def test_the_gradients_are_hugging_faces(work: Path) -> None:
    """Adam's first moment after one step."""
    step3_forked(settings(work, "first", TRAINABLE="model.layers.2.self_attn.[qkv]_proj.*", TRAIN_ITERS=1, CLIP_GRAD=0))
    model = Qwen2ForCausalLM.from_pretrained(work / "qwen").float()
    hf_loss(model, work, 0).backward()
    attention: Any = model.model.layers[2].self_attn
    q, k, v = (getattr(attention, f"{name}_proj").weight.grad for name in "qkv")
    expected = torch.cat([q[:32], k[:16], v[:16], q[32:], k[16:], v[16:]])  # 2 groups of 2 query heads of 16
    reader = TorchDistReader(work / "first" / "iter_0000001")
    found = reader.read("optimizer.state.exp_avg.decoder.layers.self_attention.linear_qkv.weight", 2) / (1 - 0.9)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_freezing_the_embeddings_resumes_bit_for_bit(work: Path) -> None:
    given = settings(work, "six", FREEZE="model.embed_tokens.* *norm*", SAVE_INTERVAL=3, TRAIN_ITERS=6, GPUS=2)
    step3_forked(given)
    shutil.copytree(work / "six", work / "again")
    (work / "again" / "latest_checkpointed_iteration.txt").write_text("3\n")
    step3_forked({**given, "SAVE_CHECKPOINT_PATH": work / "again"})
    before, after = (TorchDistReader(work / name / "iter_0000006") for name in ("six", "again"))
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(before.read(key), after.read(key)) for key in before.tensors)
    assert not {name for name in changed(work, "six") if "norm" in name or "embed" in name}
    log = step3_forked({**given, "FREEZE": "model.embed_tokens.*", "TRAIN_ITERS": 7}, code=2)
    assert "trained other weights" in log


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"FREEZE": "*q_proj*"}, "choose model.layers.0.self_attn.q_proj.weight"),
        ({"FREEZE": "lm_head.*"}, "FREEZE: the pattern lm_head.* matches no weight"),
        ({"FREEZE": "*"}, "leave nothing to train"),
        ({"TRAINABLE": "model.layers.[23].*", "PP": 2, "GPUS": 2}, "leave stage 0 nothing to train"),
        ({"TRAINABLE": "*norm*", "TUNER": "lora"}, "TRAINABLE=*norm* is for TUNER=full"),
    ],
)
def test_what_cannot_be_frozen_is_refused_by_name(work: Path, more: dict[str, Any], message: str) -> None:
    assert message in step3_forked(settings(work, "refused", TRAIN_ITERS=1, **more), code=2)
