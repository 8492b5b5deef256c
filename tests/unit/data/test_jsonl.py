import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.sources import jsonl
from common.data.sources.bad_rows import BadRowError
from common.data.sources.chunks import Chunk, read_chunks
from common.data.sources.discovery import find_inputs
from common.data.sources.jsonl import first_row, parse, records, string_field
from common.data.sources.spans import Span, split_into_parts, whole_spans
from common.errors import KitError


def read_all(files: list[Path], parts: int = 1, size: int = 1 << 20) -> list[list[dict[str, Any]]]:
    """The records of each part."""
    return [
        [record for span in spans for chunk in read_chunks(span, size) for _, record in records(chunk, Counter())]
        for spans in split_into_parts(whole_spans(files), parts)
    ]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return read_all([path])[0]


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    TEXTS,
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
    st.integers(1, 40),
    st.booleans(),
)
def test_any_text_comes_back_however_the_file_is_written_and_cut(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    escaped: bool,
    newline: bytes,
    bom: bool,
    last_newline: bool,
    parts: int,
    size: int,
    zipped: bool,
) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=escaped).encode() for text in texts]
    data = (b"\xef\xbb\xbf" if bom else b"") + newline.join(lines) + (newline if last_newline else b"")
    path = tmp_path_factory.mktemp("data") / ("a.jsonl.gz" if zipped else "a.jsonl")
    path.write_bytes(gzip.compress(data) if zipped else data)
    found = read_all([path], parts, size)
    assert [record["text"] for part in found for record in part] == texts


def test_parts_are_of_one_size_and_keep_the_order_over_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz"):
        lines = "".join(json.dumps({"text": f"{name}{i:03d}"}) + "\n" for i in range(100)).encode()
        (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    files = find_inputs(f"{tmp_path}/b.jsonl {tmp_path}/a.jsonl {tmp_path}/c.jsonl.gz")
    parts = read_all(files, 4)
    assert [r["text"] for part in parts for r in part] == [f"{f.name}{i:03d}" for f in files for i in range(100)]
    assert {len(part) for part in parts[:4]} == {22, 23}, "512 bytes of 23 each"


def test_a_gz_file_at_the_start_of_a_part_is_read_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "%s"}\n' % name.encode(), mtime=0))
    found = read_all(find_inputs(str(tmp_path)), 2)
    assert [[record["text"] for record in part] for part in found] == [["a"], ["b"]]


def test_a_byte_order_mark_counts_only_at_the_start_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n')
    with pytest.raises(KitError, match=r"a\.jsonl, line 2: it is not JSON"):
        read_all([path], size=1)


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n \t\r\n\n{"text": "b"}\n')
    counts: Counter[str] = Counter()
    (chunk,) = read_chunks(Span(path, 0, path.stat().st_size), 1 << 20)
    assert [record["text"] for _, record in records(chunk, counts)] == ["a", "b"]
    assert counts["blank lines"] == 3


BAD_LINES = {
    "no JSON": (b'{"text": ', r"it is not JSON"),
    "array": (b'["a"]', "JSON array, not an object"),
    "string": (b'"a"', "JSON string, not an object"),
    "number": (b"1", "JSON number, not an object"),
    "null": (b"null", "JSON null, not an object"),
    "comma": (b'{"text": "a"},', "a comma follows the object"),
    "json array file": (b"[", "a JSON array is only read when it is the whole file"),
    "latin-1": (b'{"text": "caf\xe9"}', r"byte 0xe9 at column 14 is not UTF-8"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), r"byte 0xff at column 1 is not UTF-8"),
    "half a pair": (rb'{"text": "\ud800"}', "half of a surrogate pair"),
    "deep": (b"[" * 200000, "it is not JSON|nested too deeply"),
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bad_line_is_reported_with_file_line_and_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fast: bool, zipped: bool
) -> None:
    if not fast:
        monkeypatch.setattr(jsonl, "orjson", None)
    line, message = BAD_LINES[name]
    path = tmp_path / ("bad.jsonl.gz" if zipped else "bad.jsonl")
    data = b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n' + line + b"\n"
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(KitError, match=rf"bad\.jsonl(\.gz)?, line 4: .*({message})"):
        read_all([path], size=16)


SAME = {
    "64 bits": b'{"a": [18446744073709551615, -9223372036854775808]}',
    "more": b'{"a": [18446744073709551616, -9223372036854775809, 1234567890123456789012345678901234567890]}',
    "400 digits": b'{"a": ' + b"9" * 400 + b"}",
    "float": b'{"a": [0.1, 1e308, 1e-400, -0, 1E5, 0.1000000000000000055511151231257827]}',
    "infinite": b'{"a": [1e400]}',
    "no number": b'{"a": [NaN, -Infinity]}',
    "twice": b'{"a": 1, "a": 2}',
    "deep": b'{"a": ' + b"[" * 1023 + b"]" * 1023 + b"}",
}
REFUSED = {
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "an integer of more than 4300 digits"),
    "deeper": (b'{"a": ' + b"[" * 1024 + b"]" * 1024 + b"}", "nested too deeply, more than 1024 levels"),
    "objects": (b'{"a":' * 4000 + b"1" + b"}" * 4000, "nested too deeply"),
    "deep surrogate": (b'{"a": ' + b"[" * 1023 + rb'"\ud800"' + b"]" * 1023 + b"}", "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", SAME)
def test_both_parsers_give_the_record_that_the_standard_one_gives(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fast = parse(SAME[name])
    monkeypatch.setattr(jsonl, "orjson", None)
    slow = parse(SAME[name])
    if name == "deep":  # deeper than Python compares
        assert str(fast.keys()) == str(slow.keys())
    else:
        assert repr(slow) == repr(fast) == repr(json.loads(SAME[name]))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_both_parsers_refuse_alike(monkeypatch: pytest.MonkeyPatch, name: str, fast: bool) -> None:
    if not fast:
        monkeypatch.setattr(jsonl, "orjson", None)
    line, message = REFUSED[name]
    with pytest.raises(BadRowError, match=message):
        parse(line)


def test_what_the_fast_parser_refuses_the_standard_one_may_take() -> None:
    record = parse(rb'{"text": "\ud83d\ude00", "score": NaN}')
    assert record["text"] == "😀" and record["score"] != record["score"]


def test_without_the_fast_parser_records_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [b'{"text": "a\\u4f60\\ud83d\\ude00", "n": [1, 2.5, null]}', '{"text": "你好", "a": {}}'.encode()]
    fast = [parse(line) for line in lines]
    monkeypatch.setattr(jsonl, "orjson", None)
    assert [parse(line) for line in lines] == fast


def test_a_field_that_is_missing_or_no_string() -> None:
    with pytest.raises(BadRowError, match="no field 'text'; its fields are 'txt', 'id'"):
        string_field({"txt": "a", "id": 1}, "text")
    with pytest.raises(BadRowError, match="field 'text' holds a JSON number, not a string"):
        string_field({"text": 1}, "text")
    with pytest.raises(BadRowError, match="field 'text' holds a JSON null"):
        string_field({"text": None}, "text")


def test_inputs_are_a_path_a_folder_a_glob_or_words_of_them(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl", "c.jsonl.gz", "d.txt", "with space.jsonl", "[x].jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(b"{}\n") if name.endswith(".gz") else b"{}\n")

    def found(text: str) -> list[str]:
        return [path.name for path in find_inputs(text.format(tmp_path))]

    assert found("{}") == sorted(name for name in names if name != "d.txt")
    assert found("{}/?.jsonl") == ["a.jsonl", "b.jsonl"]
    assert found("{}/with space.jsonl") == ["with space.jsonl"]
    assert found("{}/[x].jsonl") == ["[x].jsonl"]
    assert found("{0}/d.txt '{0}/with space.jsonl' {0}/[ab].jsonl") == [
        "d.txt", "with space.jsonl", "a.jsonl", "b.jsonl",
    ]  # fmt: skip


def test_wrong_inputs_are_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.jsonl").touch()
    (tmp_path / "a.jsonl").write_text("{}\n")
    for text, message in {
        "{}/none.jsonl": r"none\.jsonl does not exist",
        "{0}/a.jsonl {0}/*.txt": r"\*\.txt does not exist",
        "{}/empty": r"empty holds no \.jsonl",
        "{}/nothing.jsonl": r"nothing\.jsonl is empty",
        "{}/a.jsonl 'b": "No closing quotation",
        "": "INPUT is empty",
        "{0}/a.jsonl {0}/none.jsonl": r"none\.jsonl does not exist",
    }.items():
        with pytest.raises(KitError, match=message):
            find_inputs(text.format(tmp_path))


def test_a_cut_gz_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    compressed = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(1000)))
    path.write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(KitError, match=r"a\.jsonl\.gz cannot be read"):
        rows_of(path)
    path.write_bytes(b'{"text": "not zipped"}\n')
    with pytest.raises(KitError, match=r"a\.jsonl\.gz cannot be read: Not a gzipped file"):
        rows_of(path)


def test_the_first_row_is_found_after_blank_lines_and_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(b"\n \n")
    two.write_bytes(b'\xef\xbb\xbf\n\n{"a": 1}\n{"a": 2}\n')
    chunk, offset, row = first_row([one, two])
    assert (chunk, offset, row) == (Chunk(two, 5, b'{"a": 1}\n', 9), 0, {"a": 1})
    with pytest.raises(KitError, match=r"INPUT holds no row: .*one\.jsonl"):
        first_row([one])
