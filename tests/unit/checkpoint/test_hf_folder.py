"""Safetensors folders: safetensors and transformers read what is written; faults are reported."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.checkpoint.formats.hf_folder import (
    INDEX,
    SINGLE,
    HfReader,
    check_unquantized,
    check_weights,
    parse_size,
    plan_shards,
    write_safetensors,
)
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.errors import KitError
from common.model.shape.config import load_config
from tests.tiny import tiny_qwen
from tests.unit.checkpoint.small import bitwise_equal, hf_sizes, write_hf

TENSORS = {
    "b": torch.randn(3, 4),
    "a": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(2.0),
    "empty": torch.empty(0, 3),
    "half": torch.randn(2, 1, 2).half(),
}


def lazy(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: [[t]]) for name, t in tensors.items()}  # type: ignore[misc]


def write_shards(folder: Path, weights: dict[str, Tensor], count: int = 3) -> list[Path]:
    """`weights` distributed over `count` files, with an index, by safetensors itself."""
    (folder / SINGLE).unlink(missing_ok=True)
    placed: dict[str, str] = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {key: weights[key] for key in list(weights)[i::count]}
        save_file(part, folder / name)
        placed |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, change: Callable[[Any], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_tensors_of_one_file_and_of_several_are_read(tmp_path: Path) -> None:
    _, weights = write_hf(tmp_path)
    for _ in range(2):
        reader = HfReader(tmp_path)
        assert reader.names == sorted(weights)
        for name, tensor in weights.items():
            assert bitwise_equal(reader.tensor(name), tensor)
            assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), torch.float32)
        write_shards(tmp_path, weights)


def test_one_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    progress: list[int] = []
    assert write_safetensors(tmp_path, lazy(TENSORS), 10**9, progress.append) == [SINGLE]
    loaded = load_file(tmp_path / SINGLE)
    assert set(loaded) == set(TENSORS) and all(bitwise_equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert progress == [48, 10, 4, 8] and [path.name for path in tmp_path.iterdir()] == [SINGLE]
    data = (tmp_path / SINGLE).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert length % 8 == 0 and json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    assert len(data) == 8 + length + sum(progress)


def test_shards_and_index_are_what_safetensors_reads(tmp_path: Path) -> None:
    names = write_safetensors(tmp_path, lazy(TENSORS), 50, lambda size: None)
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 12 + 5 + 1 + 0 + 4, "total_size": 48 + 10 + 4 + 0 + 8}
    assert list(index["weight_map"]) == sorted(TENSORS)
    for name, file in index["weight_map"].items():
        assert bitwise_equal(load_file(tmp_path / file)[name], TENSORS[name])
    assert set(index["weight_map"].values()) == set(names[:2])


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_transformers_loads_what_was_written(tmp_path: Path, max_shard_bytes: int) -> None:
    folder = tiny_qwen(tmp_path, num_hidden_layers=1, tie_word_embeddings=False)
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = write_safetensors(folder, lazy(weights), max_shard_bytes, lambda size: None)
    assert (len(names) > 3) == (max_shard_bytes == 50_000)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(bitwise_equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=15), largest=st.integers(1, 40))
def test_shards_keep_the_order_and_the_largest_size(sizes: list[int], largest: int) -> None:
    tensors = {str(i): LazyTensor((size,), torch.float16, lambda: [[torch.empty(0)]]) for i, size in enumerate(sizes)}
    shards = plan_shards(tensors, largest)
    assert [name for shard in shards for name in shard] == list(tensors) and all(shards)
    loads = [sum(tensors[name].num_bytes for name in shard) for shard in shards]
    assert all(load <= largest or len(shard) == 1 for load, shard in zip(loads, shards, strict=True))
    firsts = [tensors[shard[0]].num_bytes for shard in shards]
    assert all(load + after > largest for load, after in zip(loads, firsts[1:], strict=False))  # none is opened early


def test_shards_are_filled_to_the_last_byte() -> None:
    tensors = lazy({name: torch.zeros(size) for name, size in (("a", 2), ("b", 2), ("c", 9), ("d", 1), ("e", 3))})
    assert plan_shards(tensors, 16) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(tensors, 15) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert plan_shards({}, 15) == [[]]


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("1.5 GB", 15 * 10**8), ("200MB", 2 * 10**8), ("3KB", 3000),
     ("5GiB", 5 * 2**30), ("1MiB", 2**20), ("0.5kib", 512)],
)  # fmt: skip
def test_sizes_are_counted_as_hugging_face_does(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "5G", "5TB", "-5GB", "0GB", "five GB", "5.GB.", "1e3MB", "nanGB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(KitError, match=r"^MAX_SHARD_SIZE=.*: give a number and one of KB, MB, GB"):
        parse_size(text)


def test_a_folder_without_weights_is_reported(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(KitError, match="holds neither model.safetensors.index.json nor model.safetensors: give"):
        HfReader(tmp_path)


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    _, weights = write_hf(tmp_path)
    write_shards(tmp_path, weights)[1].unlink()
    with pytest.raises(KitError, match=r"model-00002-of-00003\.safetensors is missing: copy it again"):
        HfReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@pytest.mark.parametrize("sharded", [True, False])
def test_a_file_cut_short_is_reported(tmp_path: Path, keep: int, sharded: bool) -> None:
    _, weights = write_hf(tmp_path)
    path = write_shards(tmp_path, weights)[2] if sharded else tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(KitError, match=rf"{path.name} is not a complete safetensors file \(.*\): copy it again"):
        HfReader(tmp_path)


def test_an_index_and_files_that_disagree_are_reported(tmp_path: Path) -> None:
    _, weights = write_hf(tmp_path)
    write_shards(tmp_path, weights)
    first = "model-00001-of-00003.safetensors"
    edit_index(tmp_path, lambda placed: placed.update({"model.layers.9.x": first}))
    with pytest.raises(KitError, match=rf"names model\.layers\.9\.x, which {first} lacks: copy"):
        HfReader(tmp_path)
    edit_index(tmp_path, lambda placed: placed.pop("model.layers.9.x"))
    edit_index(tmp_path, lambda placed: placed.pop("model.norm.weight"))
    with pytest.raises(KitError, match=r"holds model\.norm\.weight, which .* maps to another file"):
        HfReader(tmp_path)
    edit_index(tmp_path, lambda placed: placed.update({"model.norm.weight": first}))
    with pytest.raises(KitError, match=r"holds model\.norm\.weight, which .* maps to another file"):
        HfReader(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "is not a safetensors index"),
        ('{"weight_map": []}', "is not a safetensors index"),
        ('{"weight_map": null}', "is not a safetensors index"),
        ('{"weight_map": {"a": 1}}', "is not a safetensors index"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "is not valid JSON .*'a' is a duplicate key"),
    ],
)
def test_an_index_that_is_none_is_reported(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin1"))
    with pytest.raises(KitError, match=rf"model\.safetensors\.index\.json {message}"):
        HfReader(tmp_path)


def test_a_folder_with_index_and_single_file_is_not_guessed_at(tmp_path: Path) -> None:
    _, weights = write_hf(tmp_path)
    single = (tmp_path / SINGLE).read_bytes()
    write_shards(tmp_path, weights)
    (tmp_path / SINGLE).write_bytes(single)
    with pytest.raises(KitError, match=r"holds both .* and model\.safetensors: remove the one"):
        HfReader(tmp_path)


def check(folder: Path) -> None:
    qwen = load_config(folder)
    check_weights(HfReader(folder), hf_sizes(qwen), qwen)


@pytest.mark.parametrize("tied", [True, False])
def test_a_complete_model_passes(tmp_path: Path, tied: bool) -> None:
    _, weights = write_hf(tmp_path, tie_word_embeddings=tied)
    check(tmp_path)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    save_file(weights | buffers, tmp_path / SINGLE)
    check(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_reported(tmp_path: Path) -> None:
    _, weights = write_hf(tmp_path)
    save_file(weights | {"model.layers.4.mlp.up_proj.weight": torch.ones(1)}, tmp_path / SINGLE)
    with pytest.raises(KitError, match=r"holds unexpected tensors model\.layers\.4\.mlp\.up_proj\.weight: its config"):
        check(tmp_path)
    bias = "model.layers.1.self_attn.k_proj.bias"
    save_file({name: tensor for name, tensor in weights.items() if name != bias}, tmp_path / SINGLE)
    with pytest.raises(KitError, match=r"lacks model\.layers\.1\.self_attn\.k_proj\.bias: "):
        check(tmp_path)
    save_file(weights | {bias: torch.ones(5)}, tmp_path / SINGLE)
    with pytest.raises(KitError, match=r"k_proj\.bias has shape \[5\], config\.json expects \[4\]"):
        check(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_another_dtype_is_reported(tmp_path: Path, dtype: torch.dtype) -> None:
    _, weights = write_hf(tmp_path)
    save_file(weights | {"model.norm.weight": torch.ones(8).to(dtype)}, tmp_path / SINGLE)
    with pytest.raises(KitError, match=r"model\.norm\.weight is of dtype \w+, not one of BF16, F16, F32"):
        check(tmp_path)


def test_a_tied_model_may_hold_its_output_layer_when_it_is_the_embedding(tmp_path: Path) -> None:
    _, weights = write_hf(tmp_path, tie_word_embeddings=True)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, tmp_path / SINGLE)
    check(tmp_path)
    head[3, 3] += 1
    save_file(weights | {"lm_head.weight": head}, tmp_path / SINGLE)
    with pytest.raises(KitError, match=r"ties the embeddings, but lm_head\.weight differs .*: set tie_word_embeddings"):
        check(tmp_path)


def test_an_untied_model_needs_its_output_layer(tmp_path: Path) -> None:
    _, weights = write_hf(tmp_path)
    save_file({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, tmp_path / SINGLE)
    with pytest.raises(KitError, match=r"lacks lm_head\.weight"):
        check(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_a_quantized_model_is_refused_by_its_config(tmp_path: Path, method: str) -> None:
    write_hf(tmp_path)
    check_unquantized(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in (None, {}):
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
        check_unquantized(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(KitError, match=rf"is a quantized model \({method}; .*: give the model that it was quantized"):
        check_unquantized(tmp_path)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_quantizers_own_file_is_recognized_too(tmp_path: Path, name: str) -> None:
    write_hf(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(KitError, match=rf"is a quantized model .* it holds {name}"):
        check_unquantized(tmp_path)


def test_a_resized_embedding_is_reported_with_vocab_size(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path)
    weights["model.embed_tokens.weight"] = torch.randn(14, 8)
    save_file(weights, tmp_path / "model.safetensors")
    message = r"embed_tokens\.weight has shape \[14, 8\], config\.json expects \[11, 8\]: set vocab_size to 14 there"
    with pytest.raises(KitError, match=message):
        check_weights(HfReader(tmp_path), hf_sizes(qwen), qwen)


def test_a_missing_output_layer_is_reported_with_the_tie(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path)
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(KitError, match=r"lacks lm_head\.weight, .* set tie_word_embeddings to true there if"):
        check_weights(HfReader(tmp_path), hf_sizes(qwen), qwen)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        KitError, match=r"lacks lm_head\.weight, model\.norm\.weight: its config\.json belongs to another"
    ):
        check_weights(HfReader(tmp_path), hf_sizes(qwen), qwen)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "{root}/elsewhere.safetensors",
                                  "a/../../elsewhere.safetensors", "..", "", "a\\b"])  # fmt: skip
def test_an_index_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    _, weights = write_hf(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    listed = dict.fromkeys(weights, name.format(root=tmp_path))
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(KitError, match=r"index\.json names .*, which is not in its folder"):
        HfReader(tmp_path / "model")
