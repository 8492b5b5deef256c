"""Checkpoints that others wrote, with their own libraries in another process: their description, and their weights."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.formats.parallel_layout import model_tensors
from common.checkpoint.verification.inspection import inspect_folder
from common.checkpoint.verification.pickle_scan import check_pickles
from common.checkpoint.verification.verify import verify
from common.errors import KitError
from common.model.shape.config import load_config
from tests.unit.checkpoint.small import bitwise_equal, joined, write_hf, write_ranks

ROOT = Path(__file__).parents[3]
KINDS = ("megatron-lm", "pai", "stacked", "numbered")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model in `hf`, and a checkpoint of each kind."""
    root = tmp_path_factory.mktemp("foreign")
    write_hf(root / "hf")

    def write(kind: str) -> None:
        command = [sys.executable, "-m", "tests.unit.checkpoint.foreign", kind, str(root / "hf"), str(root / kind)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, KINDS))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_checkpoints_give_their_weights(foreign: Path, kind: str) -> None:
    qwen, checkpoint = load_config(foreign / "hf"), find_checkpoint(foreign / kind)
    assert checkpoint
    with pytest.raises(KitError, match=r"has 128 rows, .* vocab_size=11: the 117 extra rows are .* --drop-rows true"):
        open_megatron(checkpoint, qwen)  # it cannot distinguish them from vocabulary rows
    reader = open_megatron(checkpoint, qwen, drop_rows=True)
    expected = load_file(foreign / "hf" / "model.safetensors")
    found = {
        name: joined(reader.hf_parts(row, layer, part))
        for row, layer in model_tensors(qwen)
        for part, name in enumerate(row.hf_names(layer))
    }
    assert set(found) == set(expected) and all(bitwise_equal(found[name], expected[name]) for name in found)
    assert len(verify(foreign / "hf", checkpoint, qwen).errors) == 2
    report = verify(foreign / "hf", checkpoint, qwen, drop_rows=True)
    assert (report.errors, report.num_tensors, report.dropped_rows) == ([], len(expected), 2 * 117)
    assert report.line().endswith("all bits agree; 234 rows above vocab_size were dropped")


def test_classes_of_their_own_are_refused_before_torch_loads_them(foreign: Path) -> None:
    for kind in KINDS:
        checkpoint = find_checkpoint(foreign / kind)
        assert checkpoint
        if checkpoint.format == "torch":  # the kit alone reads it
            check_pickles(checkpoint)
            continue
        with pytest.raises(
            KitError,
            match=r"/(common\.pt|__0_0\.distcp) references torch\.nn\.functional\.silu, .* convert it to Hugging",
        ):
            check_pickles(checkpoint)


def test_inspect_describes_them(foreign: Path) -> None:
    found = {kind: inspect_folder(foreign / kind) for kind in KINDS}
    assert [found[kind]["format"] for kind in KINDS] == ["Megatron, torch"] * 2 + ["Megatron, torch_dist"] * 2
    assert [found[kind]["optimizer"] for kind in KINDS] == ["yes", "no", "yes", "yes"]
    assert [found[kind]["iteration"] for kind in KINDS] == ["20", "release (weights only)", "20", "20"]
    assert found["pai"]["layout"] == "TP=2 PP=2 VPP=1, layers per chunk 2,2"
    assert "layers stacked" in found["stacked"]["layout"] and "layers numbered" in found["numbered"]["layout"]
    assert found["pai"]["written by"].startswith("the converter of Pai-Megatron-Patch or of the kit before this one (")
    for kind in ("megatron-lm", "stacked", "numbered"):
        assert found[kind]["written by"].startswith("Megatron-LM or the like (num_layers 4, hidden_size 8,")
    numel = sum(tensor.numel() for tensor in load_file(foreign / "hf" / "model.safetensors").values())
    padded = numel + 2 * (128 - 11) * 8
    assert all(found[kind]["weights"].startswith(f"{padded:,} parameters in ") for kind in KINDS)
    assert all(found[kind]["config.json"].startswith("missing") for kind in KINDS)


def test_a_hugging_face_folder_is_described(foreign: Path) -> None:
    found = inspect_folder(foreign / "hf")
    numel = sum(tensor.numel() for tensor in load_file(foreign / "hf" / "model.safetensors").values())
    assert found["format"] == "Hugging Face, safetensors" and found["files"] == "1"
    assert found["weights"] == f"{numel:,} parameters in 51 tensors, 0.00 GB ({numel * 4:,} bytes) (float32 x 51)"
    assert found["model"].startswith("qwen2, num_hidden_layers 4, hidden_size 8,") and "not tied" in found["model"]


def test_virtual_chunks_and_local_names_are_described(tmp_path: Path) -> None:
    qwen, weights = write_hf(tmp_path / "hf", tie_word_embeddings=True)
    stages = [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]
    write_ranks(tmp_path / "release", weights, qwen, stages, impl="local")
    found = inspect_folder(tmp_path / "release")
    assert found["layout"] == "TP=1 PP=2 VPP=2, layers per chunk 1,1,1,1" and found["names"] == "local"
    assert found["written by"] == "unknown: it holds no arguments"


def test_an_unknown_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="is neither a Hugging Face folder .* nor a Megatron checkpoint"):
        inspect_folder(tmp_path)
    with pytest.raises(KitError, match="nowhere is not a folder: give the folder of a model or checkpoint"):
        inspect_folder(tmp_path / "nowhere")


def test_legacy_models_are_refused_by_name(tmp_path: Path) -> None:
    qwen, _ = write_hf(tmp_path / "hf")
    (tmp_path / "release" / "mp_rank_00").mkdir(parents=True)
    state = {"model": {"language_model": {"encoder": {"layers.0.x": torch.ones(1)}}}, "checkpoint_version": 3.0}
    torch.save(state, tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt")
    checkpoint = find_checkpoint(tmp_path / "release")
    assert checkpoint
    with pytest.raises(KitError, match="holds a 'language_model', a legacy Megatron-LM model"):
        open_megatron(checkpoint, qwen)
