"""All files of a model's folder are copied, except weights, leftovers, hidden and very large files."""

from pathlib import Path

import pytest

from common.checkpoint.formats import model_files as module
from common.checkpoint.formats.model_files import copy_model_files, model_files

OURS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "qwen.tiktoken", "tokenizer.model",
    "README.md", "LICENSE", "sparse_attention_config.json", "modeling_qwen.py",
    "additional_chat_templates/tool_use.jinja", "additional_chat_templates/deep/rag.jinja", "1_Pooling/config.json",
    "assets/logo.png",
)  # fmt: skip
LEFT_OUT = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "adapter_model.safetensors", "optimizer.pt",
    "adapter_config.json", "trainer_state.json", "training_args.bin", "checkpoint-100/config.json", "wandb/run.json",
    "onnx/config.json", "onnx/model.onnx", "original/params.json", "original/consolidated.00.pth", "train.log",
    "runs/a/events.out.tfevents.1", "__pycache__/a.py",
)  # fmt: skip
NOT_LOGGED = (
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", ".gitattributes",
    ".cache/x.json", "iter_0000100/common.pt", "release/.metadata", "latest_checkpointed_iteration.txt",
    "conversion_report.json", "tokenizer.json.partial",
)  # fmt: skip


def make(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_that_is_no_weight_is_copied_byte_for_byte(tmp_path: Path, kit_log: pytest.LogCaptureFixture) -> None:
    source = make(tmp_path / "source", *OURS, *LEFT_OUT, *NOT_LOGGED)
    (source / "vocab.json").write_bytes(b"\xff\r\n")
    target = make(tmp_path / "new" / "target", "config.json", "notes.txt")
    copy_model_files(source, target)
    assert content(target) == {name: (source / name).read_bytes() for name in OURS} | {"notes.txt": b"notes.txt"}
    (message,) = [record.getMessage() for record in kit_log.records]
    assert message.startswith(
        f"not copied from {source}: __pycache__, adapter_config.json, adapter_model.safetensors, "
    )
    assert "and 7 more (weights, training files" in message
    tops = {Path(name).parts[0] for name in LEFT_OUT}
    assert set(model_files(source).skipped) - {Path(name).parts[0] for name in NOT_LOGGED} == tops


def test_a_folder_copied_to_itself_is_not_changed(tmp_path: Path) -> None:
    copy_model_files(make(tmp_path, *OURS), tmp_path)
    assert content(tmp_path) == {name: name.encode() for name in OURS}


def test_nothing_is_logged_where_all_files_are_copied(tmp_path: Path, kit_log: pytest.LogCaptureFixture) -> None:
    copy_model_files(make(tmp_path / "source", *OURS, *NOT_LOGGED), tmp_path / "target")
    assert not kit_log.records


def test_links_to_files_are_copied_as_files_and_those_to_folders_are_not(tmp_path: Path) -> None:
    make(tmp_path, "blobs/0", "elsewhere/x.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to("../blobs/0")  # as in Hugging Face's cache
    (tmp_path / "model" / "more").symlink_to("../elsewhere")
    (tmp_path / "model" / "gone.json").symlink_to("nowhere")
    copy_model_files(tmp_path / "model", tmp_path / "target")
    assert content(tmp_path / "target") == {"config.json": b"blobs/0"}
    assert not (tmp_path / "target" / "config.json").is_symlink()
    assert model_files(tmp_path / "model").skipped == ["gone.json", "more"]


def test_what_is_very_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "config.json", *(f"data/{i}.txt" for i in range(5)), "few/a.txt", "large.txt")
    (tmp_path / "large.txt").write_bytes(bytes(101))
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(module, "MAX_FOLDER_FILES", 4)
    found = model_files(tmp_path)
    assert [str(name) for name in found.files] == ["config.json", "few/a.txt"]
    assert found.skipped == ["data", "large.txt"]
