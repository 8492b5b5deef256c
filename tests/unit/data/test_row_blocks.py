"""Rows longer than MAX_ROW_BYTES: each is one bad row in its place, however the file is cut, and memory stays small."""

import gzip
import hashlib
import json
import lzma
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.encoders.encoded import EncodedChunk
from common.data.preprocessing.rejects import RejectsWriter
from common.data.preprocessing.workers import Workers
from common.data.sources import json_array, row_blocks
from common.data.sources.bad_rows import BadRows
from common.data.sources.chunks import Chunk, FileGroup, read_chunks, split_into_tasks
from common.data.sources.jsonl import fast_string_column, records
from common.data.sources.spans import split_into_parts, whole_spans
from common.errors import KitError

LIMIT = 100


def write(path: Path, lines: list[str], kind: str) -> Path:
    """`lines` as a file of that kind."""
    text = f"[{','.join(lines)}]" if "array" in kind else "\n".join(lines) + "\n" * (kind != "no end")
    data = text.encode()
    data = gzip.compress(data) if "gz" in kind else zstandard.compress(data) if "zst" in kind else data
    path.write_bytes(data)
    return path


def read(path: Path, parts: int, size: int, limit: int) -> tuple[list[str], list[tuple[str, str, bytes]]]:
    """(the texts, (place, cause, what is recorded) of each bad row)."""
    texts, bad, lines = [], [], 0
    for spans in split_into_parts(whole_spans([path], limit), parts):
        for chunk in (chunk for span in spans for chunk in read_chunks(span, size)):
            rows = BadRows(chunk, skip=True)
            found = [record["text"] for _, record in records(chunk, Counter(), rows)]
            assert fast_string_column(chunk, "text") in (None, found) and not (
                rows.rows and fast_string_column(chunk, "text")
            )
            texts += found
            for each in rows.rows:
                place = f"element {each.element}" if each.element else f"line {lines + each.line + 1}"
                bad.append((place, each.cause.partition(":")[0], each.row))
            lines += chunk.data.count(row_blocks.NEWLINE)
    return texts, bad


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 3 * LIMIT) | st.integers(LIMIT - 15, LIMIT + 3), min_size=1, max_size=12),
    st.sampled_from(["x", "\\u00e9", "é", "]", "\\\\", '\\"', "\t"]),
    st.sampled_from(["plain", "no end", "gz", "zst", "array", "array gz"]),
    st.integers(1, 4),
    st.integers(1, 400),
    st.integers(1, 300),
)
def test_a_long_row_is_one_bad_row_however_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    unit: str,
    kind: str,
    parts: int,
    size: int,
    block: int,
) -> None:
    lines = [f'{{"text": "{number}{unit.strip() * (length // len(unit))}"}}' for number, length in enumerate(lengths)]
    path = write(tmp_path_factory.mktemp("rows") / "a", lines, kind)
    # As in a real run, a piece is smaller than what is read at once.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_array, "BLOCK", block)
        patched.setattr(row_blocks, "READ_AHEAD_BYTES", 400)
        texts, bad = read(path, parts, size, LIMIT)
    long = [number for number, line in enumerate(lines) if len(line.encode()) > LIMIT]
    assert texts == [json.loads(line)["text"] for number, line in enumerate(lines) if number not in long]
    word = "element" if "array" in kind else "line"
    expected = [
        (f"{word} {number + 1}", f"it has {len(lines[number].encode())} bytes, and MAX_ROW_BYTES is {LIMIT}")
        for number in long
    ]
    assert [row[:2] for row in bad] == expected
    kept = [row_blocks.head_of_row(lines[number].encode(), LIMIT) for number in long]
    assert [row[2] for row in bad] == kept


@pytest.mark.parametrize("kind", ["plain", "gz", "zst", "array gz"])
def test_a_row_of_120_mb_takes_no_memory(tmp_path: Path, kind: str) -> None:
    code = """if True:
        import resource, sys
        from collections import Counter
        from pathlib import Path
        from common.data.sources.chunks import load_chunk, split_into_tasks
        from common.data.sources.spans import whole_spans
        from common.data.sources.jsonl import BadRows, records
        from common.data.sources.row_blocks import NEWLINE
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        lines = 0
        for chunk in (load_chunk(task) for task, _ in split_into_tasks(whole_spans([Path(sys.argv[1])]), 1 << 20)):
            bad = BadRows(chunk, skip=True)
            for offset, record in records(chunk, Counter(), bad):
                print(lines + chunk.data.count(NEWLINE, 0, offset) + 1, record["text"])
            for each in bad.rows:
                assert each.element in (None, lines + each.line + 1)
                print(lines + each.line + 1, each.cause.partition(":")[0], len(each.row))
            lines += chunk.data.count(NEWLINE)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    long = '{"text": "' + "12 34 " * 20_000_000 + '"}'
    path = write(tmp_path / "a", ['{"text": "a"}', long, '{"text": "b"}'], kind)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    *lines, kib = done.stdout.splitlines()
    middle = f"2 it has 120000012 bytes, and MAX_ROW_BYTES is {16 << 20} 1024"
    assert lines == ["1 a", middle, "3 b"] and int(kib) < 80 << 10


def test_a_limit_may_be_higher_and_a_reject_holds_the_start_of_its_row(tmp_path: Path) -> None:
    lines = ['{"text": "' + "é" * 3000 + '"}', '{"text": "b"}', '{"text": 5}']
    path = write(tmp_path / "a.jsonl", lines, "plain")
    assert read(path, 1, 10, 6012)[0] == ["é" * 3000, "b", 5]
    (span,) = whole_spans([path], 6011)
    with pytest.raises(
        KitError, match="line 1: it has 6012 bytes, and MAX_ROW_BYTES is 6011: split it, or increase MAX_ROW"
    ):
        list(records(next(read_chunks(span, 10)), Counter()))
    (chunk,) = read_chunks(span, 1 << 20)
    bad = BadRows(chunk, skip=True)
    assert len(list(records(chunk, Counter(), bad))) == 2
    with RejectsWriter(tmp_path / "rejects") as writer:
        writer.add(0, 0, bad.rows)
    (reject,) = map(json.loads, (tmp_path / "rejects").read_text(encoding="utf-8").splitlines())
    assert reject["line"] == 1 and lines[0].encode().startswith(reject["row_start"].encode()) and "row" not in reject


def test_long_rows_of_short_files_that_go_to_a_worker_together(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', '{"text": "' + "é" * LIMIT + '"}', '{"text": 5}', '{"text": "b"}']
    kinds = ["plain", "gz", "zst", "array", "no end"]
    paths = [write(tmp_path / kind, lines, kind) for kind in kinds]
    ((task, numbers),) = split_into_tasks(whole_spans(paths, LIMIT), 1 << 20)
    assert isinstance(task, FileGroup) and numbers == [0, 1, 2, 3, 4]

    def encode(chunk: Chunk) -> EncodedChunk:
        bad = BadRows(chunk, skip=True)
        texts = [record["text"] for _, record in records(chunk, Counter(), bad)]
        return EncodedChunk({"tokens": np.zeros(len(texts), np.int32)}, np.ones(len(texts), np.int32), rejects=bad.rows)

    with Workers(encode, 1) as workers:
        ((_, encoded),) = workers.encode([task])
    assert encoded.lengths.size == 3 * len(kinds)
    start = row_blocks.head_of_row(lines[1].encode(), LIMIT)
    for kind, path, piece in zip(kinds, paths, encoded.read, strict=True):
        ((line, row, _, element, is_complete),) = piece.rejects
        assert (line, row, element, is_complete) == (1, start, 2 if kind == "array" else None, False), kind
        assert piece.sha256 in (None, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("ending", ["zst", "xz"])
def test_a_short_file_that_inflates_to_much_is_read_in_pieces(tmp_path: Path, ending: str) -> None:
    data = b'{"text": "' + b"12 34 " * 170 + b'"}\n'
    compress = zstandard.compress if ending == "zst" else lzma.compress
    paths = [tmp_path / f"{name}.jsonl.{ending}" for name in ("a", "b", "c")]
    for path, rows in zip(paths, (20_000, 3, 4), strict=True):
        path.write_bytes(compress(data * rows))
        assert path.stat().st_size < 8000
    found = list(split_into_tasks(whole_spans(paths), 1 << 20))
    assert [numbers for _, numbers in found] == [[0]] * (len(found) - 1) + [[1, 2]]
    for task, _ in found[:-1]:
        assert isinstance(task, Chunk) and len(task.data) < 3 << 20
    assert sum(len(task.data) for task, _ in found[:-1] if isinstance(task, Chunk)) == 20_000 * len(data)
