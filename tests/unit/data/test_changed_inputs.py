"""A run of step 1 that is resumed after its inputs changed: every row is there once, and what matches is reused."""

import gzip
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset.indexed_dataset import IndexedDataset
from common.data.encoders.encoded import EncodedChunk
from common.data.preprocessing import parts, runner
from common.data.preprocessing.job import Job
from common.data.sources import spans
from common.data.sources.bad_rows import BadRowError, BadRows
from common.data.sources.chunks import Chunk
from common.data.sources.discovery import find_inputs
from common.errors import KitError


def encode(chunk: Chunk) -> EncodedChunk:
    """A line is the document of its bytes; one that begins with "bad" ends the run."""
    lines, offset = chunk.data.split(b"\n")[:-1], 0
    for line in lines:
        if line.startswith(b"bad"):
            BadRows(chunk).add(offset, BadRowError("no"))
        offset += len(line) + 1
    tokens = np.frombuffer(b"".join(lines), np.uint8).astype(np.uint16)
    made = EncodedChunk({"tokens": tokens}, np.array([len(line) for line in lines], np.int32))
    made.counts["read"] = len(lines)
    return made


def job(folder: Path, partitions: int = 4, index: int | None = None, workers: int = 1) -> Job:
    return Job(
        kind="pretrain",
        output_prefix=folder / "out" / "data",
        inputs=find_inputs(str(folder / "in")),
        streams={"tokens": ("text_document", np.dtype("<u2"))},
        encode=encode,
        described={"settings": {}},
        workers=workers,
        partitions=partitions,
        partition_index=index,
    )


def write(path: Path, rows: list[str]) -> int:
    path.parent.mkdir(exist_ok=True)
    data = "".join(row + "\n" for row in rows).encode()
    return path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def rows(letter: str, number: int) -> list[str]:
    return [f"{letter} {i:06d}" for i in range(number)]


def expected(folder: Path) -> list[str]:
    files = find_inputs(str(folder / "in"))
    data = [gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files]
    return [line for each in data for line in each.decode().splitlines()]


def written(folder: Path) -> list[str]:
    data = IndexedDataset(folder / "out" / "data_text_document")
    return [bytes(ids.tolist()).decode() for ids in map(data.get, range(len(data)))]


CHANGES: dict[str, Callable[[Path], object]] = {
    "grown": lambda folder: write(folder / "b.jsonl", [*rows("b", 300), "mended " + "x" * 4000]),
    "shrunk": lambda folder: write(folder / "b.jsonl", rows("b", 100)),
    "mended": lambda folder: write(folder / "b.jsonl", [*rows("b", 300), "god"]),
    "new file": lambda folder: [write(folder / "b.jsonl", rows("b", 300)), write(folder / "c.jsonl", rows("c", 300))],
    "new first file": lambda folder: [write(folder / "b.jsonl", rows("b", 9)), write(folder / "0.jsonl", rows("0", 9))],
    "removed": lambda folder: (folder / "b.jsonl").unlink(),
    "other order": lambda folder: [
        write(folder / "b.jsonl", rows("b", 300)), (folder / "a.jsonl").rename(folder / "z.jsonl"),
    ],
    "changed in place": lambda folder: [
        write(folder / "a.jsonl", [*rows("a", 2999), "A 002999"]), write(folder / "b.jsonl", rows("b", 300)),
    ],
    "compressed": lambda folder: [write(folder / "b.jsonl", rows("b", 3)), write(folder / "c.jsonl.gz", rows("c", 9))],
}  # fmt: skip


@pytest.mark.parametrize("partitions", [1, 4, 7])
@pytest.mark.parametrize("change", CHANGES)
def test_every_row_is_there_once_however_the_inputs_changed(tmp_path: Path, change: str, partitions: int) -> None:
    write(tmp_path / "in" / "a.jsonl", rows("a", 3000))
    write(tmp_path / "in" / "b.jsonl", [*rows("b", 300), "bad"])
    with pytest.raises(KitError, match=r"b\.jsonl, line 301: no"):
        runner.run(job(tmp_path))
    CHANGES[change](tmp_path / "in")
    runner.run(job(tmp_path, partitions))
    assert written(tmp_path) == expected(tmp_path) and not (tmp_path / "out" / "data.parts").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_shares_are_joined_when_all_are_of_the_present_input(tmp_path: Path, change: str) -> None:
    write(tmp_path / "in" / "a.jsonl", rows("a", 3000))
    write(tmp_path / "in" / "b.jsonl", rows("b", 300))
    for index in range(4):
        runner.run(job(tmp_path, 4, index))
    CHANGES[change](tmp_path / "in")
    for index in range(2):
        runner.run(job(tmp_path, 2, index))
    runner.merge(tmp_path / "out" / "data")
    assert written(tmp_path) == expected(tmp_path) and not (tmp_path / "out" / "data.parts").exists()


def test_appended_data_uses_the_finished_parts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "PART_BYTES", 4096)
    write(tmp_path / "in" / "a.jsonl", rows("a", 3000))
    write(tmp_path / "in" / "b.jsonl", [*rows("b", 3000), "bad"])
    with pytest.raises(KitError):
        runner.run(job(tmp_path, 1))
    before = len(list((tmp_path / "out" / "data.parts").glob("part_*.json")))
    write(tmp_path / "in" / "b.jsonl", rows("b", 6000))
    write(tmp_path / "in" / "c.jsonl", rows("c", 3000))
    made: list[int] = []
    real = parts.Part.write

    def watched(self: parts.Part, *words: object) -> parts.FinishedPart:
        made.append(self.number)
        return real(self, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(parts.Part, "write", watched)
    again = job(tmp_path, 1)
    runner.run(again)
    assert written(tmp_path) == expected(tmp_path)
    assert before >= 12 and len(made) == len(again.plan) - before


@pytest.mark.parametrize("workers", [1, 3])
def test_short_files_and_whole_ones_by_workers_are_all_rows_in_order(tmp_path: Path, workers: int) -> None:
    for i in range(600):
        write(tmp_path / "in" / f"{i:03d}.jsonl{'.gz' if i % 7 == 0 else ''}", rows(f"f{i}", i % 5 + 1))
    write(tmp_path / "in" / "0000.jsonl", rows("long", 20000))
    for partitions in (1, 40):
        runner.run(job(tmp_path, partitions, workers=workers))
        assert written(tmp_path) == expected(tmp_path)
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def test_compressed_files_are_parts_that_workers_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "PART_BYTES", 1)
    for letter in "abcdef":
        write(tmp_path / "in" / f"{letter}.jsonl.gz", rows(letter, 2000))
    runner.run(job(tmp_path, 1, workers=3))
    assert written(tmp_path) == expected(tmp_path)
    (tmp_path / "out" / "data.json").unlink()
    write(tmp_path / "in" / "d.jsonl.gz", [*rows("d", 50), "bad"])
    (tmp_path / "out" / "data.parts").mkdir()
    with pytest.raises(KitError, match=r"d\.jsonl\.gz, line 51: no"):
        runner.run(job(tmp_path, 1, workers=3))


def test_a_finished_run_answers_by_size_and_time_or_by_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    write(tmp_path / "in" / "a.jsonl", rows("a", 100))
    path = tmp_path / "in" / "a.jsonl"
    runner.run(job(tmp_path))
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.data.dataset.file_hash.hash_bytes", None)  # nothing is read
        runner.run(job(tmp_path))
    os.utime(path, (1, 1))
    runner.run(job(tmp_path))  # it is read, and is the same
    path.write_bytes(path.read_bytes().replace(b"a 000007", b"b 000007"))
    os.utime(path, ns=times)
    with pytest.raises(KitError, match=r"\(input\)"):
        runner.run(replace(job(tmp_path), verify_input=True))


def test_a_check_refuses_what_the_run_would(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", rows("a", 100))
    runner.check(job(tmp_path))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.parts").write_text("")
    for refused in (runner.check, runner.run):
        with pytest.raises(KitError, match="cannot be written"):
            refused(job(tmp_path))
    (tmp_path / "out" / "data.parts").unlink()
    runner.run(job(tmp_path))
    runner.check(job(tmp_path))
    write(tmp_path / "in" / "a.jsonl", rows("a", 99))
    for refused in (runner.check, runner.run):
        with pytest.raises(KitError, match=r"has other input, tokenizer or settings \(input\)"):
            refused(job(tmp_path))
