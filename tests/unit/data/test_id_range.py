"""The ids of data against those of a model: known from the manifest, from an earlier scan, or from a scan."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from common.data.dataset import id_range
from common.data.dataset.id_range import check_ids, scan_id_range, warn_if_vocab_exceeds_model
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, open_tokens, token_dtype
from common.data.dataset.manifest import DataFiles
from common.data.tokenizer.text_tokenizer import TextTokenizer
from common.errors import KitError


def data(prefix: Path, values: list[int], dtype: str = "<i4") -> IndexedDataset:
    with IndexedDatasetBuilder(prefix, dtype) as writer:
        writer.add_document(values)
        assert writer.largest == max(values, default=0) or min(values) < 0
    return open_tokens(prefix)


def check(tokens: IndexedDataset, vocab_size: int, manifest: dict[str, object] | None = None) -> None:
    check_ids(DataFiles("pretrain", tokens.prefix, None, manifest), tokens, vocab_size, Path("model/config.json"))


def test_the_largest_id_must_be_under_the_models_vocab_size(tmp_path: Path) -> None:
    tokens = data(tmp_path / "a", [3, 419, 0])
    message = (
        r"a\.bin holds the token id 419, but the model's largest id is 399 \(vocab_size=400 in model/config\.json\)"
    )
    check(tokens, 420)
    for vocab_size in (400, 419):
        with pytest.raises(KitError, match=message.replace("399", f"{vocab_size - 1}").replace("400", f"{vocab_size}")):
            check(tokens, vocab_size)
    check(tokens, 1, {"largest_id": 0})  # a manifest is believed, and the file not read
    with pytest.raises(KitError, match=message):
        check(data(tmp_path / "a", [3]), 400, {"largest_id": 419})
    with pytest.raises(KitError, match=r"a\.bin holds the token id -5, which is negative: .*import-legacy"):
        check(data(tmp_path / "a", [3, -5, 9]), 400)
    check(data(tmp_path / "a", []), 1)


@pytest.mark.parametrize("dtype, values", [("u1", [255]), ("<u2", [65535]), ("<i4", [2**31 - 1]), ("<i8", [2**40])])
def test_a_scan_finds_the_one_that_is_larger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, values: list[int]
) -> None:
    monkeypatch.setattr(id_range, "READ_BYTES", 64)
    for place in (0, 31, 99):
        many = [1] * 100
        many[place] = values[0]
        assert scan_id_range(data(tmp_path / "a", many, dtype)) == (0, values[0])


def test_a_long_scan_is_done_once_for_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    monkeypatch.setattr(id_range, "CACHE_BYTES", 1)
    caplog.set_level("INFO", "kit")
    scans: list[Path] = []
    monkeypatch.setattr(id_range, "scan_id_range", lambda tokens: scans.append(tokens.prefix) or scan_id_range(tokens))
    tokens = data(tmp_path / "a", [7, 8])
    files = DataFiles("pretrain", tokens.prefix)
    assert [id_range.id_range(files, tokens) for _ in range(3)] == [(0, 8)] * 3 and len(scans) == 1
    assert "a.bin (0.0 GB) once: it has no manifest" in caplog.text and "its token ids are 0 to 8" in caplog.text
    os.utime(tmp_path / "a.bin", ns=(1, 1))
    assert id_range.id_range(files, data(tmp_path / "a", [7, 9])) == (0, 9) and len(scans) == 2
    for damaged in ("", "{}", "[]", '{"of": null}', json.dumps({"of": 1, "largest": 3}), "[" * 100_000):
        (tmp_path / "a.ids.json").write_text(damaged)
        assert id_range.id_range(files, tokens) == (0, 9)
    monkeypatch.setattr(id_range, "write_json", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    (tmp_path / "a.ids.json").unlink()
    assert id_range.id_range(files, tokens) == (0, 9)
    assert "a.ids.json cannot be written (Read-only file system): the next start will scan again" in caplog.text


def test_ids_of_a_tokenizer_with_holes_fit_their_type() -> None:
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    made = TextTokenizer(Path(), tokenizer, "")
    assert made.vocab_size == 70_001 and token_dtype(made.vocab_size) == np.int32


def test_a_model_with_fewer_ids_than_the_tokenizer_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:

    tokenizer = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_tokens([AddedToken(f"<{i}>") for i in range(419)])
    assert TextTokenizer(tmp_path, tokenizer, "").vocab_size == 420
    for config in (None, "{", "[]", "{}", '{"vocab_size": "400"}', '{"vocab_size": true}', '{"vocab_size": 420}'):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        warn_if_vocab_exceeds_model(tmp_path, 420)
    assert not caplog.records
    (tmp_path / "config.json").write_text('{"vocab_size": 400}')
    warn_if_vocab_exceeds_model(tmp_path, 420)
    assert "largest id is 419, that of" in caplog.text and "is 399 (vocab_size=400)" in caplog.text
