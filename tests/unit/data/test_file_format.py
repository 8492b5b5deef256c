import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.sources import compression, json_array
from common.data.sources.bad_rows import BadRows
from common.data.sources.chunks import read_chunks
from common.data.sources.discovery import find_inputs
from common.data.sources.file_format import detect_layout
from common.data.sources.jsonl import first_row, records
from common.data.sources.spans import Span, split_into_parts, whole_spans
from common.errors import KitError

ROWS = b"".join(b'{"text": "row %d"}\n' % i for i in range(20000))


def zstd(data: bytes, frames: int = 1) -> bytes:
    size = -(-len(data) // frames)
    return b"".join(zstandard.ZstdCompressor().compress(data[i : i + size]) for i in range(0, len(data), size))


# A frame that readers pass over (RFC 8878, 3.1.2).
SKIPPABLE = b"\x5e\x2a\x4d\x18\x04\x00\x00\x00abcd"
COMPRESS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}


def lines_of(path: Path, size: int = 1 << 16) -> bytes:
    (spans,) = split_into_parts(whole_spans([path]), 1)
    return b"".join(chunk.data for span in spans for chunk in read_chunks(span, size))


@pytest.mark.parametrize(
    ("name", "data", "compression"),
    [
        ("a.jsonl", ROWS, ""),
        ("a.jsonl.gz", gzip.compress(ROWS), "gz"),
        ("two.jsonl.gz", gzip.compress(ROWS[:100001]) + gzip.compress(ROWS[100001:]), "gz"),
        ("a.jsonl.zst", zstd(ROWS), "zst"),
        ("many.jsonl.zst", zstd(ROWS, 7), "zst"),
        ("skip.jsonl.zst", SKIPPABLE + zstd(ROWS[:77]) + SKIPPABLE + zstd(ROWS[77:]) + SKIPPABLE, "zst"),
        ("misnamed.jsonl", zstd(ROWS), "zst"),
        ("skip_misnamed.jsonl", SKIPPABLE + zstd(ROWS), "zst"),
        ("two.jsonl.bz2", bz2.compress(ROWS[:100001]) + bz2.compress(ROWS[100001:]), "bz2"),
        ("two.jsonl.xz", lzma.compress(ROWS[:100001]) + lzma.compress(ROWS[100001:]), "xz"),
        ("misnamed.json", bz2.compress(ROWS), "bz2"),
        ("misnamed.data", lzma.compress(ROWS), "xz"),
        ("misnamed.txt", gzip.compress(ROWS), "gz"),
    ],
)
def test_plain_and_compressed_files_give_the_same_rows(
    tmp_path: Path, name: str, data: bytes, compression: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert detect_layout(path).compression == compression and not detect_layout(path).array
    assert lines_of(path) == ROWS


@pytest.mark.parametrize("lost", [1, 5, 2000])
@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("before", [b"", ROWS[:1000]])
def test_a_compressed_file_that_was_cut_short_is_an_error(
    tmp_path: Path, ending: str, lost: int, before: bytes
) -> None:
    compress = COMPRESS[ending]
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes((compress(before) if before else b"") + compress(ROWS)[:-lost])
    with pytest.raises(KitError, match=rf"a\.jsonl\.{ending} cannot be read: "):
        lines_of(path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_damage_and_a_wrong_ending_are_errors(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"plain.jsonl.{ending}"
    path.write_bytes(ROWS)
    with pytest.raises(KitError, match=rf"plain\.jsonl\.{ending} cannot be read: "):
        lines_of(path)


@pytest.mark.parametrize("without", [(), ("isal.igzip", "isal.isal_zlib")])
@pytest.mark.parametrize("ending", COMPRESS)
def test_flipped_bits_are_reported_or_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, without: tuple[str, ...]
) -> None:
    for name in without:
        monkeypatch.setitem(sys.modules, name, None)
    intact, chance = COMPRESS[ending](ROWS[:2000]), random.Random(0)
    path = tmp_path / f"a.jsonl.{ending}"
    refused = 0
    for at in range(0, 8 * len(intact), 29):
        data = bytearray(intact)
        for bit in (at, chance.randrange(8 * len(data))):
            data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            assert lines_of(path) == ROWS[:2000] or ending == "zst"  # whose checksum may be left out
        except KitError as error:
            assert str(error).startswith(f"{path} cannot be read: ") or "one JSON array" in str(error)
            refused += 1
    assert refused > len(intact) // 29


def test_a_zst_file_without_its_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(ROWS))
    monkeypatch.setattr(compression, "_zstd", lambda: None)
    with pytest.raises(KitError, match=r"needs the package backports\.zstd"):
        lines_of(path)


FOREIGN = {
    "parquet": (b"PAR1\x15\x04", "Parquet"),
    "arrow": (b"ARROW1\0\0", "Arrow"),
    "zip": (b"PK\x03\x04\x14", "zip"),
    "tar": (b"a.jsonl" + bytes(250) + b"ustar\0", "tar"),
    "lz4": (b"\x04\x22\x4d\x18abc", "lz4"),
    "utf16": ('{"text": "a"}\n'.encode("utf-16"), "text in UTF-16"),
    "utf16le": ('{"text": "a"}\n'.encode("utf-16-le"), "binary data, or text in UTF-16"),
    "bin": (bytes(100), "binary data, or"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, compress: Any) -> None:
    path = tmp_path / "a.jsonl"
    data, message = FOREIGN[name]
    path.write_bytes(compress(data))
    with pytest.raises(KitError, match=rf"a\.jsonl is {message}.*: write it as jsonl in UTF-8"):
        detect_layout(path)


def test_a_decompression_bomb_is_read_in_little_memory(tmp_path: Path) -> None:
    """A gigabyte of rows in 100 KB: neither its window nor what a block inflates to is held."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from common.data.sources.chunks import read_chunks
        from common.data.sources.spans import Span
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(sum(len(chunk.data) for chunk in read_chunks(Span(Path(sys.argv[1]), 0, None), 1 << 20)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    path = tmp_path / "a.jsonl.zst"
    row, number = b'{"text": "' + b"12 34 " * 170 + b'"}\n', 300_000
    with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as stream:
        for _ in range(300):
            stream.write(row * (number // 300))
    assert path.stat().st_size < 200_000
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    size, kib = map(int, done.stdout.split())
    assert size == len(row) * number and kib < 40 << 10


def test_a_folder_gives_its_rows_in_the_order_of_names_and_no_json_beside_them(tmp_path: Path) -> None:
    for name in ("c.jsonl.zst", "a.jsonl", "b.jsonl.gz", "d.jsonl.bz2", "e.jsonl.xz", "a.json", "data.rejects"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in find_inputs(str(tmp_path))] == [
        "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.jsonl.bz2", "e.jsonl.xz",
    ]  # fmt: skip
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
    assert detect_layout(path).array
    with patch.object(json_array, "BLOCK", block):
        lines = lines_of(path, size).split(b"\n")[:-1]
    assert [json.loads(line) for line in lines] == rows


@pytest.mark.parametrize("number", ["0.5", "-1.25e+10", "12345", "1E5"])
@pytest.mark.parametrize("after", [b",2]", b"]", b" \n]"])
def test_a_number_is_complete_wherever_a_read_ends(tmp_path: Path, number: str, after: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + number.encode() + after)
    for block in range(1, 12):
        with patch.object(json_array, "BLOCK", block):
            assert lines_of(path).split(b"\n")[0].decode() == number


def test_elements_are_numbered_over_chunks_and_the_array_stays_in_one_part(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"{i}"} for i in range(100)], indent=1))
    parts = split_into_parts(whole_spans([path]), 3)
    assert [len(part) for part in parts] == [1]
    chunks = list(read_chunks(parts[0][0], 100))
    assert len(chunks) > 10
    last = chunks[-1]
    assert str(last.error(len(last.data) - 15, "x")) == f"{path}, element 100: x"
    assert sum(chunk.size for chunk in chunks) == path.stat().st_size


ARRAYS = {
    "trailing comma": (b'[{"text": "a"},\n{"text": "b"},\n]', "a comma follows the last element, number 2"),
    "no comma": (b'[{"text": "a"} {"text": "b"}]', "element 1 is followed by .*not by a comma"),
    "cut short": (b'[{"text": "a"}, {"text": "b', "element 2 is not JSON .Unterminated string"),
    "cut between": (b'[{"text": "a"},', "element 2 is not JSON"),
    "no end": (b'[{"text": "a"}', "element 1 is followed by the end of the file"),
    "more": (b'[{"text": "a"}]\n{"text": "b"}', "the array is followed by"),
    "bad": (b'[{"text" "a"}' + b" " * 100 + b"]", 'element 1 is not JSON .*at \'{"text" "a"}'),
    "cut character": (b'["\xe4\xbd', "element 1 is not JSON .Unterminated string"),
    "deep": (b"[" * 300000, "nested too deeply|is not JSON"),
    "before": (b'\x0b[{"text": "a"}]', "it begins with .*which is not JSON"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_wrong_with_an_array_is_reported(tmp_path: Path, name: str) -> None:
    data, message = ARRAYS[name]
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(KitError, match=f"a.json is a JSON array, but .*{message}"):
        lines_of(path)


def test_an_error_in_a_long_array_is_reported_without_reading_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": 1}, {"text" 2}, ' + b'{"text": 3},' * 1_000_000)
    with path.open("rb") as stream:
        found = json_array.elements(stream, 1 << 20)
        next(found)
        with pytest.raises(json_array.ArrayError, match="element 2"):
            next(found)
        assert stream.tell() <= 2 << 20


BAD_ELEMENTS = {
    "long number": (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "it holds an integer of more than 4300 digits"),
    "deep": (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    "latin-1": (b'{"text": "caf\xe9"}', "byte 0xe9 at column 14 is not UTF-8"),
    "half a pair": (rb'{"text": "\ud800"}', "half of a surrogate pair"),
    "a number": (b"12", "it is a JSON number, not an object"),
    "long": (b'{"text": "' + b'\\\\\\"]}' * 20000 + b'"}', "it has 120012 bytes, and MAX_ROW_BYTES is 100000"),
    "long number alone": (b"1" * 120000, "it has 120000 bytes, and MAX_ROW_BYTES is 100000"),
}


@pytest.mark.parametrize("name", BAD_ELEMENTS)
@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize("fast", [True, False])
def test_a_bad_element_is_a_bad_row_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int, fast: bool
) -> None:
    if not fast:
        monkeypatch.setattr(json_array, "orjson", None)
        monkeypatch.setattr("common.data.sources.jsonl.orjson", None)
    monkeypatch.setattr(json_array, "BLOCK", block)
    element, message = BAD_ELEMENTS[name]
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"},\n' + element + b' , {"text": "b"}]')
    good, bad = [], []
    for chunk in read_chunks(Span(path, 0, None, max_row_bytes=100_000), 16):
        rows = BadRows(chunk, skip=True)
        good += [record["text"] for _, record in records(chunk, Counter(), rows)]
        bad += [(each.element, each.cause, each.whole) for each in rows.rows]
    assert good == ["a", "b"]
    ((element, cause, is_complete),) = bad
    assert element == 2 and message in cause and is_complete == ("MAX_ROW_BYTES" not in message)


def test_a_file_with_only_a_byte_order_mark_is_no_array(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"text": "[a"}\n')
    assert not detect_layout(path).array
    assert first_row([path])[2] == {"text": "[a"}
    assert Span(path, 0, None).size == path.stat().st_size
