import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset.blended_dataset import BlendedDataset, read_blend
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import FORMAT
from common.data.encoders.encoded import EncodedChunk
from common.data.preprocessing import runner
from common.data.preprocessing.job import Job
from common.data.sources.chunks import Chunk
from common.errors import KitError
from common.training.planning.datasets import check_tokenizer, content_hash, open_data
from common.training.settings import TrainSettings

SHA_OF_AB = "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603"  # sha256 of b"ab"


def dataset(folder: Path, name: str, documents: int, sha: str | None = SHA_OF_AB, length: int = 33) -> Path:
    with IndexedDatasetBuilder(folder / f"{name}_text_document", "<i4") as writer:
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
    message = "other_text_document was made with another tokenizer than .*model/tokenizer.json: .*TOKENIZER_PATH"
    with pytest.raises(KitError, match=message):
        check_tokenizer(read_blend(f"1 {good} 1 {other}"), model)
    for flags in ({"dataset_path": str(other)}, {"dataset_path": str(good), "valid_dataset_path": str(other)}):
        with pytest.raises(KitError, match=message):
            open_data(settings(**flags), model, 400)


def test_where_it_is_unknown_the_log_says_so(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:

    caplog.set_level("INFO", "kit")
    check_tokenizer(read_blend(str(dataset(tmp_path, "bare", 3, None))), model)
    assert (
        "cannot check that the data was made with the model's tokenizer: " in caplog.text
        and "bare_text_document has no manifest" in caplog.text
    )
    (model / "tokenizer.json").unlink()
    check_tokenizer(read_blend(str(dataset(tmp_path, "good", 3))), model)
    assert "tokenizer.json does not exist" in caplog.text


def test_each_dataset_of_a_blend_is_split_and_blended(tmp_path: Path, model: Path) -> None:
    first, second = dataset(tmp_path, "a", 100), dataset(tmp_path, "b", 50)
    train, valid = open_data(settings(dataset_path=f"0.5 {first} 0.5 {second}", split="80,20"), model, 400)
    assert isinstance(train, BlendedDataset) and isinstance(valid, BlendedDataset)
    assert [m.samples_per_epoch for m in train.members] == [(80 * 33 - 1) // 16, (40 * 33 - 1) // 16]
    assert [m.samples_per_epoch for m in valid.members] == [(20 * 33 - 1) // 16, (10 * 33 - 1) // 16]
    train, valid = open_data(settings(dataset_path=str(first), valid_dataset_path=f"1 {second} 2 {first}"), model, 400)
    assert train.samples_per_epoch == (3300 - 1) // 16 and isinstance(valid, BlendedDataset)


def test_a_dataset_too_small_to_validate_on_is_left_out_of_the_validation(tmp_path: Path, model: Path) -> None:
    first, second = dataset(tmp_path, "a", 100), dataset(tmp_path, "b", 20, length=15)
    train, valid = open_data(settings(dataset_path=f"0.5 {first} 0.5 {second}", split="95,5"), model, 400)
    assert isinstance(train, BlendedDataset)
    assert valid is not None and valid.samples_per_epoch == (5 * 33 - 1) // 16


def bytes_of_lines(chunk: Chunk) -> EncodedChunk:
    """An encoder without a tokenizer: a line is the document of its bytes."""
    lines = chunk.data.split(b"\n")[:-1]
    tokens = np.frombuffer(b"".join(lines), np.uint8).astype("<u2")
    return EncodedChunk({"tokens": tokens}, np.array([len(line) for line in lines], np.int32), Counter(read=len(lines)))


def preprocessed(folder: Path, rows: list[bytes], manifest: bool) -> Path:
    """What step 1 writes of `rows`."""
    folder.mkdir()
    (folder / "in.jsonl").write_bytes(b"".join(row + b"\n" for row in rows))
    runner.run(Job(
        kind="pretrain", output_prefix=folder / "out" / "data", inputs=[folder / "in.jsonl"],
        streams={"tokens": ("text_document", np.dtype("<u2"))}, encode=bytes_of_lines, described={"settings": {}},
        workers=1, partitions=1,
    ))  # fmt: skip
    if not manifest:
        (folder / "out" / "data.json").unlink()
    return folder / "out" / "data"


@pytest.mark.parametrize("manifest", [True, False])
def test_a_copy_is_the_same_data_and_one_edited_row_is_not(tmp_path: Path, manifest: bool) -> None:
    rows = [b"row %03d" % number for number in range(300)]
    data = preprocessed(tmp_path / "a", rows, manifest)
    shutil.copytree(data.parent, tmp_path / "elsewhere")
    edited = preprocessed(tmp_path / "b", [*rows[:150], b"row l50", *rows[151:]], manifest)
    again = preprocessed(tmp_path / "c", rows, manifest)
    expected = content_hash(str(data))
    assert content_hash(str(tmp_path / "elsewhere" / "data")) == content_hash(str(again)) == expected
    assert content_hash(str(edited)) != expected
    blends = [f"1 {data} 2 {edited}", f"2 {data} 1 {edited}", f"1 {edited} 2 {data}", f"1 {data} 2 {again}"]
    assert len({expected, *map(content_hash, blends)}) == 5
    assert content_hash(f"1 {again} 2 {edited}") == content_hash(blends[0])


def test_an_edited_mask_is_other_data(tmp_path: Path) -> None:
    for name, weight in (("a", 1.0), ("b", 0.5)):
        (tmp_path / name).mkdir()
        for stream, value, kind in (("text", 7, "<u2"), ("loss_mask", weight, "<f4")):
            with IndexedDatasetBuilder(tmp_path / name / f"d_{stream}_document", kind) as writer:
                writer.add_document([value] * 5)
    assert content_hash(str(tmp_path / "a" / "d")) != content_hash(str(tmp_path / "b" / "d"))
