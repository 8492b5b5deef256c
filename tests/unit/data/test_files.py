import gzip
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import json_array
from common.data.files import layout_of
from common.data.inputs import Span, cut, read_chunks, whole_spans
from common.data.jsonl import first_row
from common.data.sources import find_inputs
from common.errors import KitError

ROWS = b"".join(b'{"text": "row %d"}\n' % i for i in range(20000))


def zstd(data: bytes, frames: int = 1) -> bytes:
    size = -(-len(data) // frames)
    return b"".join(zstandard.ZstdCompressor().compress(data[i : i + size]) for i in range(0, len(data), size))


def lines_of(path: Path, size: int = 1 << 16) -> bytes:
    (spans,) = cut(whole_spans([path]), 1)
    return b"".join(chunk.data for span in spans for chunk in read_chunks(span, size))


@pytest.mark.parametrize(
    ("name", "data", "compression"),
    [
        ("a.jsonl", ROWS, ""),
        ("a.jsonl.gz", gzip.compress(ROWS), "gz"),
        ("two.jsonl.gz", gzip.compress(ROWS[:100001]) + gzip.compress(ROWS[100001:]), "gz"),
        ("a.jsonl.zst", zstd(ROWS), "zst"),
        ("many.jsonl.zst", zstd(ROWS, 7), "zst"),
        ("misnamed.jsonl", zstd(ROWS), "zst"),
        ("misnamed.txt", gzip.compress(ROWS), "gz"),
    ],
)
def test_plain_and_compressed_files_give_the_same_rows(
    tmp_path: Path, name: str, data: bytes, compression: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert layout_of(path).compression == compression and not layout_of(path).array
    assert lines_of(path) == ROWS


@pytest.mark.parametrize("lost", [1, 5, 2000])
@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_short_is_an_error(tmp_path: Path, ending: str, lost: int) -> None:
    whole = gzip.compress(ROWS) if ending == "gz" else zstd(ROWS)
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(whole[:-lost])
    with pytest.raises(KitError, match=rf"a\.jsonl\.{ending} cannot be read: "):
        lines_of(path)


def test_damage_and_a_wrong_ending_are_errors(tmp_path: Path) -> None:
    for ending in ("gz", "zst"):
        path = tmp_path / f"plain.jsonl.{ending}"
        path.write_bytes(ROWS)
        with pytest.raises(KitError, match=rf"plain\.jsonl\.{ending} cannot be read: "):
            lines_of(path)


def test_a_folder_gives_its_rows_in_the_order_of_names_and_no_json_beside_them(tmp_path: Path) -> None:
    for name in ("c.jsonl.zst", "a.jsonl", "b.jsonl.gz", "a.json", "data.rejects"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in find_inputs(str(tmp_path))] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    listed = find_inputs(f"{tmp_path}/c.jsonl.zst {tmp_path}/a.jsonl {tmp_path}/a.json")
    assert [path.name for path in listed] == ["c.jsonl.zst", "a.jsonl", "a.json"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(JSON, min_size=1, max_size=8),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 60),
    st.sampled_from(["", "gz", "zst"]),
    st.integers(1, 30),
)
def test_a_json_array_gives_its_elements_however_it_is_written(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    indent: int | None,
    escaped: bool,
    bom: bool,
    size: int,
    compression: str,
    block: int,
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=escaped)
    data = (b"\xef\xbb\xbf" if bom else b"") + b" \n" + text.replace("\n", "\r\n").encode() + b"\n\n"
    data = {"": bytes, "gz": gzip.compress, "zst": zstd}[compression](data)
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_bytes(data)
    assert layout_of(path).array
    with patch.object(json_array, "BLOCK", block):
        lines = lines_of(path, size).split(b"\n")[:-1]
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize("number", ["0.5", "-1.25e+10", "12345", "1E5"])
@pytest.mark.parametrize("after", [b",2]", b"]", b" \n]"])
def test_a_number_is_whole_wherever_a_read_ends(tmp_path: Path, number: str, after: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + number.encode() + after)
    for block in range(1, 12):
        with patch.object(json_array, "BLOCK", block):
            assert lines_of(path).split(b"\n")[0].decode() == number


def test_elements_are_numbered_over_chunks_and_the_array_stays_in_one_part(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"{i}"} for i in range(100)], indent=1))
    parts = cut(whole_spans([path]), 3)
    assert [len(part) for part in parts] == [1]
    chunks = list(read_chunks(parts[0][0], 100))
    assert len(chunks) > 10
    last = chunks[-1]
    assert str(last.error(len(last.data) - 15, "x")) == f"{path}, element 100: x"
    assert sum(chunk.size for chunk in chunks) == path.stat().st_size


ARRAYS = {
    "trailing comma": (b'[{"text": "a"},\n{"text": "b"},\n]', "a comma follows the last element, number 2"),
    "no comma": (b'[{"text": "a"} {"text": "b"}]', "after element 1 stands .*not a comma"),
    "cut short": (b'[{"text": "a"}, {"text": "b', "element 2 is no JSON .Unterminated string"),
    "cut between": (b'[{"text": "a"},', "element 2 is no JSON"),
    "no end": (b'[{"text": "a"}', "after element 1 stands the end of the file"),
    "more": (b'[{"text": "a"}]\n{"text": "b"}', "after the array's end stands"),
    "bad": (b'[{"text" "a"}' + b" " * 100 + b"]", 'element 1 is no JSON .*at \'{"text" "a"}'),
    "latin-1": (b'[{"text": "caf\xe9"}]', "byte 0xe9 at offset 14 is not UTF-8"),
    "cut character": (b'["\xe4\xbd', "byte 0xe4 at offset 2 is not UTF-8"),
    "deep": (b"[" * 300000, "nested too deeply|is no JSON"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_wrong_with_an_array_is_told(tmp_path: Path, name: str) -> None:
    data, told = ARRAYS[name]
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(KitError, match=f"a.json is one JSON array, but .*{told}"):
        lines_of(path)


def test_an_error_in_a_long_array_is_told_without_reading_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": 1}, {"text" 2}, ' + b'{"text": 3},' * 1_000_000)
    with path.open("rb") as stream:
        found = json_array.elements(stream)
        next(found)
        with pytest.raises(json_array.ArrayError, match="element 2"):
            next(found)
        assert stream.tell() <= 2 << 20


def test_a_byte_order_mark_alone_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"text": "[a"}\n')
    assert not layout_of(path).array
    assert first_row([path])[2] == {"text": "[a"}
    assert Span(path, 0, None).size == path.stat().st_size
