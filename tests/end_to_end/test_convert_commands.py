"""`inspect`, `--plan`, the report, `verify --logits`, and two conversions into one folder."""

import fcntl
import json
import os
import zlib
from pathlib import Path

import pytest
import torch

from common import convert
from common.checkpoint.conversion import hf_to_megatron
from common.checkpoint.conversion.output_folder import REPORT
from common.errors import KitError
from tests.conversion import to_hf, to_megatron
from tests.end_to_end.converting import run_main, tree, weights, words
from tests.tiny import tiny_qwen


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"), tie_word_embeddings=False)


def test_inspect_describes_both_formats(tmp_path: Path, qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    megatron = to_megatron(qwen, tmp_path / "megatron", tp=2, pp=2, transformer_impl="local")
    dist = to_megatron(qwen, tmp_path / "dist", ckpt_format="torch_dist")
    capsys.readouterr()
    for folder, expected in (
        (qwen, ["format: Hugging Face, safetensors", "weights: 214,080 parameters in 51 tensors,"]),
        (megatron, ["layout: TP=2 PP=2 VPP=1, layers per chunk 2,2", "names: local",
                    "weights: 214,080 parameters in 62", "written by: this kit, step 2", "optimizer: no",
                    "config.json: beside it"]),
        (dist / "release", ["layout: whole tensors, layers stacked;", "weights: 214,080 parameters in 10 tensors",
                            "written by: this kit, step 2", "iteration: release"]),
    ):  # fmt: skip
        assert run_main(["inspect", str(folder)]) == 0
        out = capsys.readouterr().out
        assert all(any(line.startswith(each) for line in out.splitlines()) for each in expected), out
    common_file = dist / "release" / "common.pt"  # Megatron-Core 0.11 holds the optimizer's tensors as objects
    (dist / "release" / "checksums.json").unlink()  # and has none of these
    torch.save({**torch.load(common_file), "optimizer": {}}, common_file)
    assert run_main(["inspect", str(dist)]) == 0 and "optimizer: yes" in capsys.readouterr().out
    assert run_main(["inspect", str(tmp_path)]) == 2 and "is neither a Hugging Face folder" in capsys.readouterr().err


def test_a_plan_shows_what_is_then_done(tmp_path: Path, qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = {"load_checkpoint_path": qwen, "save_checkpoint_path": tmp_path / "new", "tp": 2, "pp": 2}
    assert run_main([*words("hf-to-megatron", **there), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "new").exists()
    megatron = to_megatron(qwen, tmp_path / "new", tp=2, pp=2)
    for path in megatron.glob("release/*/*.pt"):
        state = torch.load(path, weights_only=False)["model"]
        file = str(path.relative_to(megatron))
        size = sum(tensor.nbytes for tensor in state.values())
        assert f"{file}: {len(state)} tensors, {size:,} bytes" in lines
        planned = {line.split("  ")[3] for line in lines if f"  {file}  " in line}
        assert planned == {f"model/{name}" for name in state}
    back = {"load_checkpoint_path": megatron, "save_checkpoint_path": tmp_path / "hf", "max_shard_size": "300KB"}
    assert run_main([*words("megatron-to-hf", **back), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    to_hf(megatron, tmp_path / "hf", max_shard_size="300KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {
        line.split("  ")[1]: line.split("  ")[0] for line in lines if line.endswith(" bytes") and "  " in line
    }


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_a_report_is_written_beside_what_was_converted(tmp_path: Path, qwen: Path, ckpt_format: str) -> None:
    megatron = to_megatron(qwen, tmp_path / "megatron", tp=2, ckpt_format=ckpt_format)
    back = to_hf(megatron, tmp_path / "hf")
    there, again = (json.loads((folder / REPORT).read_text()) for folder in (megatron, back))
    assert there["hugging_face"] == again["hugging_face"] and there["megatron"] == again["megatron"]
    assert there["settings"]["tp"] == 2 and there["result"].endswith("all bits agree")
    assert {each["name"]: each["crc32"] for each in there["hugging_face"]} == {
        name: f"{zlib.crc32(tensor.numpy().tobytes()):08x}" for name, tensor in weights(qwen).items()
    }
    size = sum(tensor.nbytes for tensor in weights(qwen).values())
    assert there["totals"] == {"tensors": 51, "bytes": size, "non_finite": 0}
    held = sum(each["bytes"] for each in there["megatron"] if "norm" not in each["name"] or not each["tensor_rank"])
    assert held == size
    assert (
        run_main(words("verify", hf_model_path=qwen, load_checkpoint_path=megatron, report=tmp_path / "own.json")) == 0
    )
    assert json.loads((tmp_path / "own.json").read_text())["megatron"] == there["megatron"]


def test_values_that_are_not_finite_are_counted_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_qwen(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3:6] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    there = {"load_checkpoint_path": source, "save_checkpoint_path": tmp_path / "new"}
    assert run_main(words("hf-to-megatron", **there)) == 0
    err = capsys.readouterr().err
    assert "all bits agree; 3 values are NaN or infinite\n" in err
    assert err.count("3 values are NaN or infinite: they are written unchanged\n") == 1


def test_two_conversions_into_one_folder_are_refused(tmp_path: Path, qwen: Path) -> None:
    target = tmp_path / "megatron"
    target.mkdir()
    handle = os.open(target, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(KitError, match="is being written by another conversion: wait for it, or choose another"):
        to_megatron(qwen, target)
    assert not list(target.iterdir())
    os.close(handle)
    to_megatron(qwen, target)


def test_a_folder_that_was_filled_in_the_meantime_is_refused(
    tmp_path: Path, qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "megatron"
    to_megatron(qwen, target)
    before = tree(target)
    monkeypatch.setattr(hf_to_megatron, "check_output_folder", lambda *_: None)  # it was empty then
    with pytest.raises(KitError, match="is not empty"):
        to_megatron(qwen, target, tp=2)
    assert tree(target) == before


def test_verify_runs_both_models_and_names_the_first_layer_that_differs(
    tmp_path: Path, qwen: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    megatron = to_megatron(qwen, tmp_path / "megatron", tp=2, pp=2)
    command = words("verify", hf_model_path=qwen, load_checkpoint_path=megatron, logits="true")
    assert run_main([*command, "--text", "Hello, 你好"]) == 0
    out = capfd.readouterr().out
    assert out.endswith("the models agree\n") and "KL" in out and "the same most likely token at 100.0%" in out
    path = megatron / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"]["decoder.layers.0.self_attention.linear_qkv.bias"][:16] = 0
    torch.save(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "check_report", lambda *_: None)  # which would report it first
        assert run_main(command) == 2
    assert "error: layer 2 is the first that differs" in capfd.readouterr().err
