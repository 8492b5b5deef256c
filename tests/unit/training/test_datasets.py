import json
from pathlib import Path

import pytest

from common.data.blend import BlendedSamples, read_blend
from common.data.indexed import IndexedWriter
from common.data.manifest import FORMAT
from common.errors import KitError
from common.training.config import TrainSettings
from common.training.datasets import check_tokenizer, open_data

SHA_OF_AB = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"  # sha256 of b"ab"


def dataset(folder: Path, name: str, documents: int, sha: str | None = SHA_OF_AB, length: int = 33) -> Path:
    with IndexedWriter(folder / f"{name}_text_document", "<i4") as writer:
        for number in range(documents):
            writer.add_document([number] * length)
    if sha:
        content = {
            "format": FORMAT, "version": 1, "kind": "pretrain", "files": {"tokens": f"{name}_text_document"},
            "tokenizer": {"tokenizer_sha256": sha},
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / name


def settings(**changes: object) -> TrainSettings:
    values = {"save_checkpoint_path": "/nowhere", "epochs": 1, "seq_length": 16, "eval_interval": 1, **changes}
    return TrainSettings(**values)  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"ab")
    return tmp_path / "model"


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, other = dataset(tmp_path, "good", 3), dataset(tmp_path, "other", 3, "0" * 64)
    check_tokenizer(read_blend(str(good)), model)
    told = "other_text_document was made with another tokenizer than .*model/tokenizer.json: .*TOKENIZER_PATH"
    with pytest.raises(KitError, match=told):
        check_tokenizer(read_blend(f"1 {good} 1 {other}"), model)
    for flags in ({"dataset_path": str(other)}, {"dataset_path": str(good), "valid_dataset_path": str(other)}):
        with pytest.raises(KitError, match=told):
            open_data(settings(**flags), model)


def test_where_it_cannot_be_known_the_log_says_so(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.log import logger

    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", "kit")
    check_tokenizer(read_blend(str(dataset(tmp_path, "bare", 3, None))), model)
    assert "is not known: " in caplog.text and "bare_text_document has no manifest" in caplog.text
    (model / "tokenizer.json").unlink()
    check_tokenizer(read_blend(str(dataset(tmp_path, "good", 3))), model)
    assert "tokenizer.json is not there" in caplog.text


def test_each_dataset_of_a_blend_is_split_and_blended(tmp_path: Path, model: Path) -> None:
    first, second = dataset(tmp_path, "a", 100), dataset(tmp_path, "b", 50)
    train, valid = open_data(settings(dataset_path=f"0.5 {first} 0.5 {second}", split="80,20"), model)
    assert isinstance(train, BlendedSamples) and isinstance(valid, BlendedSamples)
    assert [m.samples_per_epoch for m in train.members] == [(80 * 33 - 1) // 16, (40 * 33 - 1) // 16]
    assert [m.samples_per_epoch for m in valid.members] == [(20 * 33 - 1) // 16, (10 * 33 - 1) // 16]
    train, valid = open_data(settings(dataset_path=str(first), valid_dataset_path=f"1 {second} 2 {first}"), model)
    assert train.samples_per_epoch == (3300 - 1) // 16 and isinstance(valid, BlendedSamples)


def test_a_dataset_too_small_to_validate_on_is_left_out_of_the_validation(tmp_path: Path, model: Path) -> None:
    first, second = dataset(tmp_path, "a", 100), dataset(tmp_path, "b", 20, length=15)
    train, valid = open_data(settings(dataset_path=f"0.5 {first} 0.5 {second}", split="95,5"), model)
    assert isinstance(train, BlendedSamples)
    assert valid is not None and valid.samples_per_epoch == (5 * 33 - 1) // 16
