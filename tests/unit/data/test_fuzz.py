"""A few hundred mutants of each kind of foreign data, read as step 1 and training read it.

In a separate process: only KitError is raised, within time and memory bounds; and what is read is right.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from common.data.encoders.sft import SftEncoder
from tests.fuzz import __main__ as by_hand
from tests.fuzz import data_surfaces, files, rows
from tests.fuzz.bounds import in_a_child

COUNTS = {
    "rows": 200,
    "jsonl": 150,
    "json_array": 200,
    "gzip": 120,
    "zst": 120,
    "index": 400,
    "safetensors": 300,
    "manifest": 100,
    "part": 100,
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return in_a_child(COUNTS)


@pytest.mark.parametrize("surface", COUNTS)
def test_what_is_read_of_a_mutant_is_right(surface: str, results: dict[str, Any]) -> None:
    assert results[surface]["escaped"] == []
    assert results[surface]["read"] > COUNTS[surface] // 20 and results[surface]["refused"] > COUNTS[surface] // 4


def test_the_same_seed_gives_the_same_cases() -> None:
    for cases in (rows.cases, files.jsonl_cases, files.json_array_cases, files.gzip_cases, files.zst_cases):
        assert list(cases(3, 20)) == list(cases(3, 20)) != list(cases(4, 20))


def test_rows_that_are_lost_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, take = data_surfaces.SURFACES["gzip"](tmp_path, 0, 0)
    take(gzip.compress(files.as_lines(files.ROWS)))
    monkeypatch.setattr(data_surfaces, "read_rows", lambda _: files.ROWS[:-1])
    with pytest.raises(AssertionError):
        take(gzip.compress(files.as_lines(files.ROWS)))


def test_changed_documents_would_be_found(tmp_path: Path) -> None:
    _, take = data_surfaces.SURFACES["index"](tmp_path, 0, 0)
    tokens = IndexedDataset(tmp_path / "data")[2]
    data = (tmp_path / "data.bin").read_bytes()
    with IndexedDatasetBuilder(tmp_path / "other", "<u2") as writer:
        for document in ([5, 6], [7, 1], tokens, [0], [65499]):
            writer.add_document(np.array(document))
    index = (tmp_path / "other.idx").read_bytes()
    assert (tmp_path / "other.bin").read_bytes() == data
    with pytest.raises(AssertionError):
        take(len(index).to_bytes(8, "little") + index + data)


def test_a_row_that_is_rendered_differently_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, take = data_surfaces.SURFACES["rows"](tmp_path, 0, 0)
    case = b"qwen3 all answer whole system\n" + json.dumps(rows.SOURCES[0]).encode()
    take(case)
    pieces = SftEncoder.segments_of_row
    monkeypatch.setattr(SftEncoder, "segments_of_row", lambda *given: pieces(*given)[:-1])
    with pytest.raises(AssertionError):
        take(case)


def test_by_hand_a_case_that_escapes_is_saved_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = {"read": 3, "refused": 4, "escaped": [[b"bad".hex(), "why"]], "slowest": 1.25, "memory": 7 << 20}
    monkeypatch.setattr(by_hand, "run_chunk", lambda name, seed, number: (name, seed, part))
    monkeypatch.setattr(by_hand.tempfile, "mkdtemp", lambda **_: str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fuzz", "--number", "1500", "--surface", "gzip", "--seed", "2"])
    with pytest.raises(SystemExit) as ended:
        by_hand.main()
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["gzip", "16", "6", "8", "2", "1.25", "s", "7", "MiB"]
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["gzip_2000000_0", "gzip_2000000_0.txt", "gzip_2000001_0", "gzip_2000001_0.txt"]
    assert (tmp_path / "gzip_2000001_0").read_bytes() == b"bad" and str(tmp_path) in out


def test_by_hand_a_process_that_dies_is_a_case_that_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_hand.sys, "executable", "/bin/false")
    name, seed, part = by_hand.run_chunk("gzip", 5, 10)
    assert (name, seed, part["read"], len(part["escaped"])) == ("gzip", 5, 0, 1)
    assert "the process ended" in part["escaped"][0][1]
