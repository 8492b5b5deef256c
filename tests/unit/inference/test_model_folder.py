"""A folder that is no exported model is refused by name, with what to do; the folder names what ends an answer."""

import json
import re
import shutil
from pathlib import Path

import pytest

from common.errors import KitError
from common.inference.model import find_device
from common.inference.model_folder import open_model_folder
from tests.conversion import to_hf, to_megatron
from tests.tiny import tiny_qwen


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
@pytest.mark.parametrize("part", ["", "release"])
def test_a_megatron_checkpoint_is_refused_with_the_command_that_exports_it(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt_format: str, part: str
) -> None:
    monkeypatch.setenv("KIT_PLATFORM", "nvidia")
    folder = to_megatron(qwen, tmp_path / "my run", tp=1, pp=1, ckpt_format=ckpt_format, transformer_impl="local")
    if not part:
        (folder / "latest_checkpointed_iteration.txt").unlink()  # it is recognized without, too
    export = f"LOAD_CHECKPOINT_PATH='{folder / part}' SAVE_CHECKPOINT_PATH=NEW_FOLDER bash nvidia/2_convert_between"
    with pytest.raises(KitError, match=f"is a Megatron checkpoint, not an exported .*{re.escape(export)}"):
        open_model_folder(folder / part)


def test_an_exported_checkpoint_is_taken(qwen: Path, tmp_path: Path) -> None:
    start = to_megatron(qwen, tmp_path / "start", tp=1, pp=1, transformer_impl="local")
    folder = open_model_folder(to_hf(start, tmp_path / "exported"))
    assert folder.room(12) == 500
    with pytest.raises(KitError, match="MAX_NEW_TOKENS=512: the model has 512 positions .*: set it below 512"):
        folder.room(512)


def test_other_folders_are_refused_by_what_they_lack(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="HF_MODEL_PATH=/nowhere is not a folder: give the folder that step 2 wrote"):
        open_model_folder(Path("/nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(KitError, match="empty is an empty folder: give the folder that step 2 wrote"):
        open_model_folder(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(KitError, match=r"no exported model, since it has no config.json, no tokenizer.json, no safe"):
        open_model_folder(tmp_path)
    copy = shutil.copytree(qwen, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    with pytest.raises(KitError, match="copy is no exported model, since it has no safetensors: give"):
        open_model_folder(copy)
    data = (copy / "weights.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(KitError, match="model.safetensors is not a complete safetensors file"):
        open_model_folder(copy)


def test_weights_of_another_model_are_refused(qwen: Path, tmp_path: Path) -> None:
    other = tiny_qwen(tmp_path / "other", num_hidden_layers=2)
    shutil.copy(qwen / "config.json", other)
    with pytest.raises(KitError, match="model.layers.2"):
        open_model_folder(other)


def test_what_ends_an_answer_is_chatmls_and_what_the_folder_names(qwen: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen, tmp_path / "copy")
    tokenizer = open_model_folder(folder).tokenizer
    chatml = [tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<|im_end|>")]
    assert open_model_folder(folder).stop_ids == chatml
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert open_model_folder(folder).stop_ids == [5, 6, *chatml]
    (folder / "generation_config.json").unlink()
    assert open_model_folder(folder).stop_ids == chatml
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 512}))
    with pytest.raises(KitError, match="generation_config.json: eos_token_id=512 is not a token of the model"):
        assert open_model_folder(folder).stop_ids


def test_a_device_that_is_not_there_is_refused() -> None:
    assert find_device("cpu").type == "cpu"
    with pytest.raises(KitError, match="DEVICE=gpu is unknown: set it to auto, cpu, cuda or cuda:N"):
        find_device("gpu")
    with pytest.raises(KitError, match=r"DEVICE=cuda:99: torch sees \d+ GPUs here: set DEVICE to auto or cpu"):
        find_device("cuda:99")
