import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.data.dataset import manifest
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import DataFiles, resolve
from common.errors import KitError


def files(*prefixes: Path) -> None:
    for prefix in prefixes:
        with IndexedDatasetBuilder(prefix, "u1") as writer:
            writer.add_document([1])


def content(kind: str, **names: str) -> dict[str, Any]:
    return {"kind": kind, "files": names, "documents": {"read": 3, "kept": 1, "dropped": {"no text": 2}}}


@pytest.mark.parametrize("key", ["text", "my_long_key"])
def test_pretraining_data_by_prefix_and_by_full_name(tmp_path: Path, key: str) -> None:
    prefix = tmp_path / "a_b.c"
    tokens = Path(f"{prefix}_{key}_document")
    files(tokens)
    manifest.write(prefix, content("pretrain", tokens=tokens.name))
    for given in (prefix, tokens):
        found = resolve(str(given))
        assert (found.kind, found.tokens, found.loss_mask) == ("pretrain", tokens, None)
        assert found.manifest and found.manifest["documents"]["kept"] == 1


def test_fine_tuning_data_and_a_folder_that_was_moved(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    prefix = tmp_path / "old" / "chat"
    files(Path(f"{prefix}_text_document"), Path(f"{prefix}_loss_mask_document"))
    manifest.write(prefix, content("sft", tokens="chat_text_document", loss_mask="chat_loss_mask_document"))
    (tmp_path / "old").rename(tmp_path / "new")
    for given in ("chat", "chat_text_document"):
        found = resolve(str(tmp_path / "new" / given))
        assert found.kind == "sft" and found.loss_mask == tmp_path / "new" / "chat_loss_mask_document"


def test_data_without_a_manifest(tmp_path: Path) -> None:
    plain, tuned = tmp_path / "plain_text_document", tmp_path / "tuned_text_document"
    mask, other = tmp_path / "tuned_loss_mask_document", tmp_path / "other_content_document"
    files(plain, tuned, mask, other)
    assert resolve(str(plain)) == resolve(str(tmp_path / "plain")) == DataFiles("pretrain", plain)
    assert resolve(str(tuned)) == resolve(str(tmp_path / "tuned")) == DataFiles("sft", tuned, mask)
    assert resolve(str(other)) == DataFiles("pretrain", other)


def test_a_foreign_json_file_is_no_manifest(tmp_path: Path) -> None:
    files(tmp_path / "a_text_document")
    (tmp_path / "a.json").write_text('{"kind": "sft"}')
    assert resolve(str(tmp_path / "a")).manifest is None


def test_a_prefix_without_a_dataset_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"DATASET_PATH=.*none is not a dataset: neither .*none\.json nor .*none\.idx"):
        resolve(str(tmp_path / "none"))
    files(tmp_path / "a_text_document", tmp_path / "a_loss_mask_document")
    with pytest.raises(KitError, match=r"a_loss_mask_document is a loss mask: give the .*/a$"):
        resolve(str(tmp_path / "a_loss_mask_document"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(KitError, match=r"a\.json is not JSON"):
        resolve(str(tmp_path / "a"))
    (tmp_path / "a.json").write_text(json.dumps({"format": manifest.FORMAT, "version": manifest.VERSION + 1}))
    with pytest.raises(KitError, match="version 3, this kit reads 2"):
        resolve(str(tmp_path / "a"))


def test_counts_that_do_not_add_up_are_an_internal_error(tmp_path: Path) -> None:
    wrong = content("pretrain", tokens="a")
    wrong["documents"]["dropped"] = {"no text": 1}
    with pytest.raises(AssertionError):
        manifest.write(tmp_path / "a", wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "its 'version' is not an integer"),
        ({"kind": "other"}, "its 'kind' is 'other', not pretrain or sft"),
        ({"kind": []}, "its 'kind' is not a string"),
        ({"files": []}, "its 'files' is not an object"),
        ({"files": {}}, "it has no 'tokens'"),
        ({"files": {"tokens": 1}}, "its 'tokens' is not a string"),
        ({"files": {"tokens": "../other"}}, "its 'files' hold '../other', which is not a file name"),
        ({"documents": {"read": 1}}, "it has no 'kept'"),
        ({"inputs": [1]}, "'1' is not an object"),
        ({"tokenizer": "x"}, "its 'tokenizer' is not an object"),
    ],
)
def test_a_manifest_with_odd_fields_is_reported(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    files(tmp_path / "a_text_document")
    manifest.write(tmp_path / "a", content("pretrain", tokens="a_text_document"))
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(KitError, match=re.escape(f"a.json is an incomplete manifest: {message}")):
        resolve(str(tmp_path / "a"))
    path.write_text('{"format": "qwen-kit-data"}')
    with pytest.raises(KitError, match=r"a\.json is an incomplete manifest: it has no 'version'"):
        resolve(str(tmp_path / "a"))
