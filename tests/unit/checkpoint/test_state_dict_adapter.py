"""The tensors of both formats as they are about to be written."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint.conversion.state_dict_adapter import (
    MegatronTensors,
    hf_shapes,
    hf_state_dict,
    rank_state_dict,
    torch_dist_shards,
)
from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.formats.hf_folder import HfReader
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.formats.parallel_layout import ParallelLayout
from common.errors import KitError
from tests.unit.checkpoint.small import bitwise_equal, hf_sizes, megatron_state, write_hf, write_ranks


@pytest.mark.parametrize("family", [{}, {"model_type": "qwen3", "head_dim": 4}])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "stages",
    [
        [[range(4)]],
        [[range(2)], [range(2, 4)]],
        [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]],
        [[range(1)], [range(1, 3)], [range(3, 4)]],
        [[range(3)], [range(3, 4)]],
    ],
)
def test_a_ranks_file_is_the_one_put_together_by_hand(
    tmp_path: Path, tied: bool, impl: str, tp: int, stages: list[list[range]], family: dict[str, Any]
) -> None:
    qwen, weights = write_hf(tmp_path, tie_word_embeddings=tied, **family)
    source = MegatronTensors(HfReader(tmp_path), qwen, None)
    pp, vpp = len(stages), len(stages[0])
    each = tuple(len(stages[stage][v]) for v in range(vpp) for stage in range(pp))
    for stage, tp_rank, v in ((stage, tp_rank, v) for stage in range(pp) for tp_rank in range(tp) for v in range(vpp)):
        made = rank_state_dict(source, ParallelLayout(tp, pp, vpp, impl, each), stage, tp_rank)
        assert list(made) == (["model"] if vpp == 1 else ["model0", "model1"])
        first, last = stage == v == 0, stage == pp - 1 and v == vpp - 1
        expected = megatron_state(
            weights, qwen, stages[stage][v], first=first, last=last, impl=impl, tp_rank=tp_rank, tp=tp
        )
        chunk = list(made.values())[v]
        assert set(chunk) == set(expected)
        assert all(bitwise_equal(tensor.materialize(), expected[name]) for name, tensor in chunk.items())
        assert all(tensor.shape == tuple(expected[name].shape) for name, tensor in chunk.items())


def test_torch_dist_stacks_the_layers(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path)
    state = megatron_state(weights, qwen, range(4), first=True, last=True)
    for block in torch_dist_shards(MegatronTensors(HfReader(tmp_path), qwen, None)):
        tensor = block.tensor.materialize()
        if block.key.startswith("decoder.layers."):
            layer, *rest = block.global_offset
            assert block.global_shape == (4, *tensor.shape[1:]) and not any(rest) and tensor.shape[0] == 1
            assert bitwise_equal(tensor[0], state.pop(block.key.replace("decoder.layers.", f"decoder.layers.{layer}.")))
        else:
            assert block.global_shape == tuple(tensor.shape) and not any(block.global_offset)
            assert bitwise_equal(tensor, state.pop(block.key))
    assert not state


def test_hugging_face_shapes_in_the_models_order(tmp_path: Path) -> None:
    qwen, _ = write_hf(tmp_path)
    names = list(hf_shapes(qwen))
    assert hf_shapes(qwen) == hf_sizes(qwen) and names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"] and names[1].startswith("model.layers.0.")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_both_directions_cast_to_a_given_dtype(tmp_path: Path, dtype: torch.dtype | None) -> None:
    qwen, weights = write_hf(tmp_path)
    source = MegatronTensors(HfReader(tmp_path), qwen, dtype)
    target = dtype or torch.float32
    state = megatron_state(weights, qwen, range(4), first=True, last=True)
    made = rank_state_dict(source, ParallelLayout(1, 1, 1, "transformer_engine"), 0, 0)["model"]
    assert all(bitwise_equal(made[name].materialize(), tensor.to(target)) for name, tensor in state.items())
    path = write_ranks(tmp_path / "release", weights, qwen, [[range(4)]])
    reader = open_megatron(Checkpoint(tmp_path, path, "release", "torch"), qwen)
    tensors = hf_state_dict(reader, qwen, dtype)
    assert list(tensors) == list(hf_shapes(qwen))
    assert all(bitwise_equal(tensors[name].materialize(), tensor.to(target)) for name, tensor in weights.items())
    assert {tensor.dtype for tensor in tensors.values()} == {target}


def test_parts_of_one_tensor_in_two_dtypes_are_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path)
    norms = {name: tensor.half() for name, tensor in weights.items() if name.endswith("norm.weight")}
    save_file(weights | norms, tmp_path / "model.safetensors")
    MegatronTensors(HfReader(tmp_path), qwen, None)  # a kind of its own
    for name in ("model.layers.0.self_attn.k_proj.bias", "model.layers.2.mlp.down_proj.weight"):
        save_file(weights | {name: weights[name].bfloat16()}, tmp_path / "model.safetensors")
        with pytest.raises(KitError, match=rf"{name} is of torch\.bfloat16 and .* of torch\.float32, .*: set DTYPE"):
            MegatronTensors(HfReader(tmp_path), qwen, None)
        MegatronTensors(HfReader(tmp_path), qwen, torch.bfloat16)


def test_a_dtype_that_weights_never_have_is_reported(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path)
    doubles = {name: tensor.double() for name, tensor in weights.items()}
    path = write_ranks(tmp_path / "release", doubles, qwen, [[range(4)]])
    reader = open_megatron(Checkpoint(tmp_path, path, "release", "torch"), qwen)
    with pytest.raises(KitError, match=r"word_embeddings\.weight is of torch\.float64: set DTYPE to bf16, fp16"):
        hf_state_dict(reader, qwen, None)
    assert len(hf_state_dict(reader, qwen, torch.float32)) == len(weights)
