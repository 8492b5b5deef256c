import json
from pathlib import Path
from typing import Any

import pytest

from common.data.encoders.encoded import BAD_ROWS, EncodedChunk
from common.data.encoders.pretrain import PretrainEncoder
from common.data.sources import jsonl
from common.data.sources.chunks import Chunk
from common.data.tokenizer.eod import find_eod
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError

SPELLED = "special tokens spelled in documents, "


def encode(
    qwen: Path, rows: list[Any], path: Path = Path("a"), **settings: Any
) -> tuple[list[list[int]], EncodedChunk]:
    """(the documents' ids, what the encoder gave)."""
    tokenizer = load_tokenizer(qwen)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"\n".join(lines) + b"\n"
    if path != Path("a"):
        path.write_bytes(data)
    settings = {"eod": find_eod(tokenizer, "auto"), **settings}
    encoded = PretrainEncoder(tokenizer, "text", **settings)(Chunk(path, 0, data, len(data)))
    documents, start = [], 0
    for length in encoded.lengths.tolist():
        documents.append(encoded.streams["tokens"][start : start + length].tolist())
        start += length
    assert start == encoded.streams["tokens"].size and encoded.streams["tokens"].dtype == "<u2"
    return documents, encoded


@pytest.mark.parametrize("fast", [True, False])
def test_documents_end_with_the_end_token_and_empty_ones_are_counted(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    if not fast:
        monkeypatch.setattr(jsonl, "orjson", None)
    texts = ["", "12 + 30", "", "", "你好", ""]
    documents, encoded = encode(qwen, [{"text": text} for text in texts])
    tokenizer = load_tokenizer(qwen)
    end = tokenizer.token_id("<|endoftext|>")
    assert documents == [[*ids, end] for ids in tokenizer.encode_batch(["12 + 30", "你好"])]
    assert encoded.counts["read"] == 6 and encoded.counts["dropped: no text"] == 4
    assert encode(qwen, [{"text": text} for text in texts], eod=None)[0] == tokenizer.encode_batch(["12 + 30", "你好"])
    assert encode(qwen, [{"text": ""}])[0] == []


@pytest.mark.parametrize("value", [1, None, ["a"], {"a": "b"}, True])
def test_a_field_that_is_no_string_is_reported_where_all_else_is_well(qwen: Path, tmp_path: Path, value: Any) -> None:
    with pytest.raises(KitError, match=r"a\.jsonl, line 2: field 'text' holds a JSON"):
        encode(qwen, [{"text": "a"}, {"text": value}, {"text": "b"}], tmp_path / "a.jsonl")


@pytest.mark.parametrize("fast", [True, False])
def test_special_tokens_spelled_in_a_document(qwen: Path, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    if not fast:
        monkeypatch.setattr(jsonl, "orjson", None)
    tokenizer = load_tokenizer(qwen)
    rows = [{"text": "a<|im_end|>b<|im_start|>"}, {"text": "plain"}]
    special = {tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|im_start|>")}
    documents, encoded = encode(qwen, rows, eod=None)
    assert not special & set(documents[0]) and tokenizer.decode(documents[0]) == rows[0]["text"]
    assert encoded.counts[SPELLED + "kept as ordinary text"] == 2
    documents, encoded = encode(qwen, rows, eod=None, special_tokens="parse")
    assert special <= set(documents[0]) and tokenizer.decode(documents[0]) == rows[0]["text"]
    assert encoded.counts[SPELLED + "parsed"] == 2


def test_special_tokens_may_be_an_error_with_its_place_or_a_reject(qwen: Path, tmp_path: Path) -> None:
    rows = [{"text": "plain"}, {"text": "a<|im_end|>"}]
    with pytest.raises(
        KitError, match=r"a\.jsonl, line 2: it spells the special token <\|im_end\|>: .*SPECIAL_TOKENS=text"
    ):
        encode(qwen, rows, tmp_path / "a.jsonl", special_tokens="error")
    documents, encoded = encode(qwen, rows, special_tokens="error", skip_bad_rows=True)
    assert len(documents) == 1 and encoded.counts[BAD_ROWS] == 1
    assert encode(qwen, rows[:1], special_tokens="error")[0] == documents


def test_bad_rows_are_set_aside_with_their_bytes_and_cause(qwen: Path) -> None:
    bad = [b'{"text": ', b'{"text": "caf\xe9"}', b'{"txt": "a"}', b'{"text": 1}', b'["a"]', b'{"text": "a"},']
    rows: list[Any] = [{"text": "first"}]
    for line in bad:
        rows += [line, b"", {"text": "good"}]
    documents, encoded = encode(qwen, rows, skip_bad_rows=True)
    assert len(documents) == 7
    assert [reject.row for reject in encoded.rejects] == bad
    assert [reject.cause.split(":")[0] for reject in encoded.rejects] == [
        "it is not JSON (Expecting value", "byte 0xe9 at column 14 is not UTF-8",
        "it has no field 'text'; its fields are 'txt'", "field 'text' holds a JSON number, not a string",
        "it is a JSON array, not an object", "a comma follows the object",
    ]  # fmt: skip
    counts = encoded.counts
    assert counts["read"] == 13 and counts[BAD_ROWS] == 6 and counts["blank lines"] == 6
    with pytest.raises(KitError, match="line 2"):
        encode(qwen, rows, path=qwen / "rows.jsonl")
