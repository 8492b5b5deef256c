"""What `inspect` prints about folders put together by hand: every line of it."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.checkpoint.formats.torch_dist_writer import TensorShard, write_torch_dist
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.checkpoint.verification.inspection import inspect_folder
from common.errors import KitError
from common.model.shape.config import QwenConfig
from tests.unit.checkpoint.small import dist_state, write_hf, write_ranks

HEAD = "output_layer.weight"

# h 8, ffn 8, 4 heads, 2 groups of 2 numbers, 4 layers: qkv 64 + 16, proj 64, fc1 128, fc2 64, two norms 16.
A_LAYER = 8 * 8 + 8 + 8 * 8 + 4 * 8 + 4 * 8 + 4 + 4 + 3 * 8 * 8 + 2 * 8
PARAMETERS = 2 * 11 * 8 + 8 + 4 * A_LAYER


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def change(path: Path, change: dict[str, Any]) -> None:
    torch.save(torch.load(path, weights_only=False) | change, path)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    write_hf(tmp_path)
    assert inspect_folder(tmp_path) == {
        "format": "Hugging Face, safetensors",
        "model": "qwen2, num_hidden_layers 4, hidden_size 8, num_attention_heads 4, num_key_value_heads 2, vocab_size"
        " 11, embeddings not tied",
        "weights": f"{PARAMETERS:,} parameters in 51 tensors, 0.00 GB ({4 * PARAMETERS:,} bytes) (float32 x 51)",
        "files": "1",
        "on disk": f"0.00 GB ({on_disk(tmp_path):,} bytes)",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert inspect_folder(tmp_path)["model"].endswith(", embeddings tied")


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_a_folder_of_rank_files(tmp_path: Path, impl: str) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    half = {name: tensor.bfloat16() if name == "lm_head.weight" else tensor for name, tensor in weights.items()}
    folder = tmp_path / "m"
    for name in ("iter_0000007", "iter_0000020"):
        write_ranks(folder / name, half, qwen, [[range(1), range(1, 3)], [range(3, 4), range(0)]], tp=2, impl=impl)
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    # 2 ranks hold 11 rows as 6 each, one of zeros; every rank the norms: 4 layers of 2, and the last.
    padded = PARAMETERS + 2 * 8
    held = 4 * (padded + 9 * 8) - 2 * 2 * 6 * 8
    found = inspect_folder(folder)
    assert found == {
        "format": "Megatron, torch",
        "read": str(folder / "iter_0000020"),
        "iteration": "20",
        "iterations": "7, 20",
        "config.json": "missing: set HF_MODEL_PATH to convert it",
        "written by": "unknown: it holds no arguments",
        "layout": "TP=2 PP=2 VPP=2, layers per chunk 1,1,2,0",
        "names": impl,
        "weights": f"{padded:,} parameters in 62 tensors, 0.00 GB ({held:,} bytes) (bfloat16 x 2, float32 x 60)",
        "optimizer": "no",
        "on disk": f"0.00 GB ({on_disk(folder / 'iter_0000020'):,} bytes)",
    }
    (folder / "config.json").write_text("{}")
    assert inspect_folder(folder)["config.json"] == "beside it"
    first = folder / "iter_0000020" / "mp_rank_00_000"
    (first / "distrib_optim.pt").write_bytes(b"1")
    assert inspect_folder(folder)["optimizer"] == "yes"
    (first / "distrib_optim.pt").unlink()
    change(first / "model_optim_rng.pt", {"optimizer": {}})
    assert inspect_folder(folder)["optimizer"] == "yes"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"run": {"step": 3}, "written_by": "x"}, "this kit, step 3"),
        ({"written_by": "this kit, step 2", "args": Namespace(num_layers=4)}, "this kit, step 2"),
        ({"args": Namespace(num_layers=4, consumed_train_samples=0, hidden_size=None, other=1)},
         "Megatron-LM or the like (num_layers 4, consumed_train_samples 0)"),
        ({"args": Namespace(hf_ckpt_path="/q", num_layers=4)},
         "the converter of Pai-Megatron-Patch or of the kit before this one (num_layers 4, hf_ckpt_path /q)"),
        ({"args": Namespace(target_tensor_model_parallel_size=2)},
         "the converter of Pai-Megatron-Patch or of the kit before this one ()"),
        ({"args": {"num_layers": 4}}, "unknown: it holds no arguments"),
    ],
)  # fmt: skip
def test_what_wrote_it(tmp_path: Path, content: dict[str, Any], expected: str) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    path = write_ranks(tmp_path / "release", weights, qwen, [[range(4)]])
    change(path / "mp_rank_00" / "model_optim_rng.pt", content)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    for folder in (tmp_path, path):
        assert inspect_folder(folder)["written by"] == expected
        assert inspect_folder(folder)["iteration"] == "release (weights only)"


def dist_folder(path: Path, qwen: QwenConfig, weights: dict[str, Tensor], stacked: bool, **more: Tensor) -> None:
    state = {**dist_state(weights, qwen, stacked=stacked), **more}
    blocks = [
        TensorShard(name, tuple(tensor.shape), (0,) * tensor.dim(),
              LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: [[tensor]]))  # type: ignore[misc]
        for name, tensor in state.items()
    ]  # fmt: skip
    write_torch_dist(path, blocks, {"iteration": 5}, lambda size: None)


@pytest.mark.parametrize(("stacked", "tensors"), [(True, 10), (False, 31)])
def test_a_torch_dist_folder(tmp_path: Path, stacked: bool, tensors: int) -> None:
    qwen, weights = write_hf(tmp_path / "hf")
    dist_folder(tmp_path / "iter_0000005", qwen, weights, stacked)
    found = inspect_folder(tmp_path / "iter_0000005")
    weighs = f"{PARAMETERS:,} parameters in {tensors} tensors, 0.00 GB ({4 * PARAMETERS:,} bytes) (float32 x {tensors})"
    assert found["format"] == "Megatron, torch_dist" and found["iteration"] == "5" and found["weights"] == weighs
    kind = "stacked" if stacked else "numbered"
    assert found["layout"] == f"whole tensors, layers {kind}; loads at any TP, PP and VPP"
    assert found["optimizer"] == "no"
    moment = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(8)}
    dist_folder(tmp_path / "iter_0000006", qwen, weights, stacked, **moment)
    found = inspect_folder(tmp_path / "iter_0000006")
    assert found["optimizer"] == "yes" and found["weights"] == weighs


@pytest.mark.parametrize("told_by", ["config.json", "arguments"])
def test_a_tied_copy_is_counted_once(tmp_path: Path, told_by: str) -> None:
    qwen, weights = write_hf(tmp_path / "hf", tie_word_embeddings=True)
    path = write_ranks(tmp_path / "a" / "release", weights, qwen, [[range(2)], [range(2, 4)]], tp=2)
    dist_folder(tmp_path / "b" / "release", qwen, weights, True, **{HEAD: weights["model.embed_tokens.weight"]})
    state = torch.load(path / "mp_rank_00_001" / "model_optim_rng.pt", weights_only=False)
    assert HEAD in state["model"]
    if told_by == "arguments":
        for folder in path.iterdir():
            change(folder / "model_optim_rng.pt", {"args": Namespace(untie_embeddings_and_output_weights=False)})
    else:
        for folder in (tmp_path / "a", tmp_path / "b"):
            (folder / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
        numel = sum(tensor.numel() for tensor in weights.values())
        assert inspect_folder(tmp_path / "b" / "release")["weights"].startswith(f"{numel:,} parameters")
    more = 8  # a row that pads the vocabulary to what TP=2 divides
    numel = sum(tensor.numel() for tensor in weights.values()) + more
    assert inspect_folder(path)["weights"].startswith(f"{numel:,} parameters")


def test_anything_else_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=re.escape(f"{tmp_path} is neither a Hugging Face folder (model.safetensors or")):
        inspect_folder(tmp_path)
    with pytest.raises(KitError, match="a is not a folder: give the folder of a model or checkpoint"):
        inspect_folder(tmp_path / "a")
