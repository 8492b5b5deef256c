"""Rows longer than MAX_ROW_BYTES: each is one bad row in its place, however the file is cut, and memory stays small."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import json_array, reading
from common.data.inputs import cut, read_chunks
from common.data.jsonl import BadRows, records, strings_at_once
from common.data.rejects import RejectsWriter
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
    """(the texts, (place, cause, what is kept) of each bad row)."""
    texts, bad = [], []
    for spans in cut([path], parts, limit):
        for chunk in (chunk for span in spans for chunk in read_chunks(span, size)):
            rows = BadRows(chunk, skip=True)
            found = [record["text"] for _, record in records(chunk, Counter(), rows)]
            assert strings_at_once(chunk, "text") in (None, found) and not (
                rows.rows and strings_at_once(chunk, "text")
            )
            texts += found
            bad += [(chunk.place(each.offset), each.cause.partition(":")[0], each.row) for each in rows.rows]
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
        patched.setattr(reading, "AT_ONCE", 400)
        texts, bad = read(path, parts, size, LIMIT)
    long = [number for number, line in enumerate(lines) if len(line.encode()) > LIMIT]
    assert texts == [json.loads(line)["text"] for number, line in enumerate(lines) if number not in long]
    word = "element" if "array" in kind else "line"
    wanted = [
        (f"{word} {number + 1}", f"it has {len(lines[number].encode())} bytes, and MAX_ROW_BYTES is {LIMIT}")
        for number in long
    ]
    assert [row[:2] for row in bad] == wanted
    kept = [reading.beginning(lines[number].encode(), LIMIT) for number in long]
    assert [row[2] for row in bad] == kept


@pytest.mark.parametrize("kind", ["plain", "gz", "zst", "array gz"])
def test_a_row_of_120_mb_takes_no_memory(tmp_path: Path, kind: str) -> None:
    code = """if True:
        import resource, sys
        from collections import Counter
        from pathlib import Path
        from common.data.inputs import cut, load, tasks
        from common.data.jsonl import BadRows, records
        from common.data.reading import MAX_ROW_BYTES
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for span in cut([Path(sys.argv[1])], 1)[0]:
            for chunk in map(load, tasks(span, 1 << 20)):
                bad = BadRows(chunk, skip=True)
                for offset, record in records(chunk, Counter(), bad):
                    print(chunk.place(offset), record["text"])
                for each in bad.rows:
                    print(chunk.place(each.offset), each.cause.partition(":")[0], len(each.row))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    long = '{"text": "' + "12 34 " * 20_000_000 + '"}'
    path = write(tmp_path / "a", ['{"text": "a"}', long, '{"text": "b"}'], kind)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    *told, kib = done.stdout.splitlines()
    word = "element" if "array" in kind else "line"
    middle = f"{word} 2 it has 120000012 bytes, and MAX_ROW_BYTES is {16 << 20} 1024"
    assert told == [f"{word} 1 a", middle, f"{word} 3 b"] and int(kib) < 80 << 10


def test_a_limit_may_be_higher_and_a_reject_says_that_it_is_a_beginning(tmp_path: Path) -> None:
    lines = ['{"text": "' + "é" * 3000 + '"}', '{"text": "b"}', '{"text": 5}']
    path = write(tmp_path / "a.jsonl", lines, "plain")
    assert read(path, 1, 10, 6012)[0] == ["é" * 3000, "b", 5]
    (span,) = cut([path], 1, 6011)[0]
    with pytest.raises(
        KitError, match="line 1: it has 6012 bytes, and MAX_ROW_BYTES is 6011: split it, or set MAX_ROW"
    ):
        list(records(next(read_chunks(span, 10)), Counter()))
    (chunk,) = read_chunks(span, 1 << 20)
    bad = BadRows(chunk, skip=True)
    assert len(list(records(chunk, Counter(), bad))) == 2
    with RejectsWriter(tmp_path / "rejects") as writer:
        writer.add(span, bad.rows)
    (told,) = map(json.loads, (tmp_path / "rejects").read_text(encoding="utf-8").splitlines())
    assert told["line"] == 1 and lines[0].encode().startswith(told["row_start"].encode()) and "row" not in told
