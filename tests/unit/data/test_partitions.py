"""Parts that are written by separate runs, and the counts of rows that are left out."""

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.dataset import file_hash
from common.data.encoders.encoded import BAD_ROWS, EncodedChunk
from common.data.preprocessing import runner
from common.data.preprocessing.job import Job
from common.data.preprocessing.rejects import rejects_path
from common.data.sources.bad_rows import BadRowError, BadRows
from common.data.sources.chunks import Chunk
from common.errors import KitError


def encode(chunk: Chunk, skip: bool = True) -> EncodedChunk:
    """A line of n bytes is the document [n] * n; a line that begins with "bad" is no row."""
    bad, kept, offset = BadRows(chunk, skip), [], 0
    lines = chunk.data.split(b"\n")[:-1]
    for line in lines:
        if line.startswith(b"bad"):
            bad.add(offset, BadRowError(f"{len(line)} bytes"))
        else:
            kept.append(len(line))
        offset += len(line) + 1
    counts = Counter({"read": len(lines), BAD_ROWS: len(bad.rows), "note": len(kept)})
    tokens = np.repeat(np.array(kept, np.uint16), kept)
    return EncodedChunk({"tokens": tokens}, np.array(kept, np.int32), counts, bad.rows)


def strict(chunk: Chunk) -> EncodedChunk:
    return encode(chunk, skip=False)


def job(folder: Path, partitions: int = 1, index: int | None = None, workers: int = 1, **changes: object) -> Job:
    inputs = [folder / "b.txt", folder / "a.txt"]
    for number, path in enumerate(inputs):
        if not path.exists():
            lines = (b"bad" if i % 997 == 5 else b"" for i in range(9000))
            path.write_bytes(b"".join(line + b"x" * (i * 7 % 40 + number) + b"\n" for i, line in enumerate(lines)))
    values: dict[str, object] = {
        "kind": "pretrain", "output_prefix": folder / "out" / "data", "inputs": inputs,
        "streams": {"tokens": ("text_document", np.dtype("<u2"))}, "encode": encode, "described": {"settings": {}},
        "workers": workers, "partitions": partitions, "partition_index": index, "skip_bad_rows": True,
    }  # fmt: skip
    return Job(**{**values, **changes})  # type: ignore[arg-type]


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.is_file()}


@pytest.fixture
def uninterrupted(tmp_path: Path) -> dict[str, bytes]:
    runner.run(job(tmp_path))
    found = written(tmp_path)
    shutil.rmtree(tmp_path / "out")
    assert set(found) == {"data.json", "data_text_document.bin", "data_text_document.idx", "data.rejects"}
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("partitions", [1, 2, 5])
def test_parts_joined_in_any_order_are_the_uninterrupted_run(
    tmp_path: Path, uninterrupted: dict[str, bytes], partitions: int, workers: int
) -> None:
    for index in reversed(range(partitions)):
        assert runner.run(job(tmp_path, partitions, index, workers)) is None
        assert written(tmp_path) == {}
    content = runner.merge(tmp_path / "out" / "data")
    assert written(tmp_path) == uninterrupted and not (tmp_path / "out" / "data.parts").exists()
    assert content["documents"] == {"read": 18000, "kept": 17980, "dropped": {BAD_ROWS[9:]: 20}}


def test_a_run_of_all_reuses_the_parts_of_others(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    runner.run(job(tmp_path, 3, 1))
    seen = []

    def watched(chunk: Chunk) -> EncodedChunk:
        seen.append((chunk.path.name, chunk.start))
        return encode(chunk)

    runner.run(job(tmp_path, 3, encode=watched))
    assert written(tmp_path) == uninterrupted
    size = (tmp_path / "b.txt").stat().st_size
    assert not [start for name, start in seen if name == "b.txt" and size * 0.7 < start < size]


def test_merge_reports_what_is_missing_and_what_does_not_fit(tmp_path: Path) -> None:
    prefix = tmp_path / "out" / "data"
    with pytest.raises(KitError, match=r"has no parts .*: run its parts first"):
        runner.merge(prefix)
    for index in (0, 2):
        runner.run(job(tmp_path, 4, index))
    with pytest.raises(KitError, match=r"2 of 4 partitions are not finished .*: run PARTITION_INDEX=1, 3"):
        runner.merge(prefix)
    runner.run(job(tmp_path, 4, 1, described={"settings": {"other": True}}))
    runner.run(job(tmp_path, 4, 3))
    with pytest.raises(
        KitError, match=r"1 of 4 partitions .* PARTITION_INDEX=1 of PARTITIONS=4; other runs .* settings"
    ):
        runner.merge(prefix)
    runner.run(job(tmp_path, 4, 1))
    runner.merge(prefix, check=True)
    assert not list((tmp_path / "out").glob("data_*"))
    runner.merge(prefix)
    with pytest.raises(KitError, match="is finished: there is nothing to merge"):
        runner.merge(prefix)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"partitions": 10**12}, r"999999999999 of 1000000000000 .*: run PARTITION_INDEX=1, 2, .* 20, \.\.\. of"),
        ({"index": 4}, "its index 4 is not one of 4"),
        ({"index": -1}, "its index -1 is not one of 4"),
    ],
)
def test_a_record_with_impossible_numbers_is_refused_at_once(
    tmp_path: Path, changes: dict[str, int], reason: str
) -> None:
    runner.run(job(tmp_path, 4, 0))
    (record,) = tmp_path.rglob("run_*.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))
    with pytest.raises(KitError, match=reason):
        runner.merge(tmp_path / "out" / "data", check=True)


def test_an_input_that_changed_between_two_parts_is_reported(tmp_path: Path) -> None:
    for index in range(4):
        runner.run(job(tmp_path, 4, index))
        if index == 0:
            data = (tmp_path / "b.txt").read_bytes()
            (tmp_path / "b.txt").write_bytes(data[:100] + b"y" + data[101:])
    with pytest.raises(KitError, match=r"b\.txt changed after partition 0 was written: run PARTITION_INDEX=0 of"):
        runner.merge(tmp_path / "out" / "data")
    runner.run(job(tmp_path, 4, 0))
    runner.merge(tmp_path / "out" / "data")


def test_a_file_that_was_only_touched_is_joined_and_so_is_a_missing_one(tmp_path: Path) -> None:
    for index in range(2):
        runner.run(job(tmp_path, 2, index))
    os.utime(tmp_path / "b.txt", (1, 1))
    (tmp_path / "a.txt").unlink()
    assert runner.merge(tmp_path / "out" / "data")["documents"]["read"] == 18000


def test_a_part_knows_its_own_share_of_the_input_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hash, "BLOCK_BYTES", 1000)
    hashed: list[tuple[str, int, int]] = []
    real = file_hash.hash_bytes

    def watched(path: Path, start: int, end: int) -> str:
        hashed.append((path.name, start, end))
        return real(path, start, end)

    monkeypatch.setattr(file_hash, "hash_bytes", watched)
    runner.run(job(tmp_path, 4, 3))
    size = (tmp_path / "a.txt").stat().st_size
    assert {name for name, _, _ in hashed} == {"a.txt"} and min(start for _, start, _ in hashed) >= size * 0.4
    assert sum(end - start for _, start, end in hashed) < size * 0.7 + 8000, "little is read twice"
    states = {path: path.read_text() for path in tmp_path.glob("out/data.parts/part_*.json")}
    data = bytearray((tmp_path / "b.txt").read_bytes())
    data[100] ^= 1
    (tmp_path / "b.txt").write_bytes(data)
    runner.run(job(tmp_path, 4, 3, encode=never))  # another file's change is nothing to this part
    assert {path: path.read_text() for path in tmp_path.glob("out/data.parts/part_*.json")} == states != {}


def never(chunk: Chunk) -> EncodedChunk:
    raise AssertionError


def test_the_hash_of_a_file_is_of_its_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(file_hash, "BLOCK_BYTES", 10)
    path = tmp_path / "a"
    path.write_bytes(bytes(range(25)))
    blocks = [hashlib.sha256(bytes(range(a, b))).digest() for a, b in ((0, 10), (10, 20), (20, 25))]
    assert file_hash.hash_file(path) == "sha256:" + hashlib.sha256(b"".join(blocks)).hexdigest()
    part = [hashlib.sha256(bytes(range(a, b))).hexdigest() for a, b in ((3, 10), (20, 22), (22, 25), (3, 9), (11, 12))]
    hashes = [block.hex() for block in blocks]
    with ThreadPoolExecutor(2) as pool:

        def of(start: int, end: int) -> dict[str, Any]:
            return file_hash.SpanHash(pool, path, start, end, 25).result()

        assert of(0, 25) == {"blocks": hashes}
        assert of(0, 22) == {"blocks": hashes, "tail": part[1]} and of(22, 25) == {"blocks": [], "head": part[2]}
        assert of(3, 22) == {"head": part[0], "blocks": hashes[1:], "tail": part[1]}
        assert of(3, 9) == {"head": part[3], "blocks": []} and of(11, 12) == {"head": part[4], "blocks": []}
        assert of(3, 10) == {"head": part[0], "blocks": []} and of(10, 20) == {"blocks": hashes[1:2]}


def test_two_runs_of_one_part_and_a_run_of_all_do_not_mix(tmp_path: Path) -> None:
    import subprocess
    import sys

    made = job(tmp_path, 2, 0)
    made.folder.mkdir(parents=True)
    program = (
        "import sys; from pathlib import Path; from common.data.preprocessing.runner import locked\n"
        "with locked(Path(sys.argv[1]), 0):\n    print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(made.folder)]
    root = str(Path(__file__).parents[3])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": root}) as other:
        assert other.stdout and other.stdout.readline()
        for refused in (made, job(tmp_path, 2)):
            with pytest.raises(KitError, match="another run is writing"):
                runner.run(refused)
        with pytest.raises(KitError, match="another run is writing"):
            runner.merge(made.output_prefix)
        runner.run(job(tmp_path, 2, 1))
        other.communicate(b"\n")
    runner.run(job(tmp_path, 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_rejects_file_holds_file_line_cause_and_row(tmp_path: Path, workers: int) -> None:
    runner.run(job(tmp_path, 3, workers=workers))
    found = [json.loads(line) for line in rejects_path(tmp_path / "out" / "data").read_text().splitlines()]
    expected = []
    for path in (tmp_path / "b.txt", tmp_path / "a.txt"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.startswith("bad"):
                expected.append({"file": str(path), "line": number, "cause": f"{len(line)} bytes", "row": line})
    assert found == expected and len(found) == 20


def test_a_row_that_is_no_text_is_recorded_in_base64_and_an_element_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_bytes(b"good\nbad\xff\n")
    other = tmp_path / "a.txt"
    other.write_text('["good",\n "x"]')
    runner.run(job(tmp_path, encode=all_bad_but_first))
    found = [json.loads(line) for line in rejects_path(tmp_path / "out" / "data").read_text().splitlines()]
    assert found == [
        {"file": str(path), "line": 2, "cause": "no", "row_base64": "YmFk/w=="},
        {"file": str(other), "element": 2, "cause": "no", "row": '"x"'},
    ]


def all_bad_but_first(chunk: Chunk) -> EncodedChunk:
    bad, first = BadRows(chunk, True), chunk.data.index(b"\n") + 1
    bad.add(first, BadRowError("no"))
    counts = Counter({"read": 2, BAD_ROWS: 1})
    return EncodedChunk({"tokens": np.array([1], np.uint16)}, np.array([1], np.int32), counts, bad.rows)


def test_a_run_that_a_bad_row_stopped_resumes_with_skip_and_not_the_other_way(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"x" * 20 + b"\n" + b"x" * 20 + b"\n")
    (tmp_path / "a.txt").write_bytes(b"x" * 20 + b"\nbad\n")
    with pytest.raises(KitError, match=r"a\.txt, line 2: 3 bytes"):
        runner.run(job(tmp_path, 2, encode=strict, skip_bad_rows=False))
    seen = []

    def watched(chunk: Chunk) -> EncodedChunk:
        seen.append(chunk.path.name)
        return encode(chunk)

    runner.run(job(tmp_path, 2, 1))
    with pytest.raises(KitError, match=r"a\.txt, line 2"):  # the part with a row left out is not reused
        runner.run(job(tmp_path, 2, encode=strict, skip_bad_rows=False))
    content = runner.run(job(tmp_path, 2, encode=watched))
    assert seen == ["a.txt"] and content and content["documents"]["kept"] == 3
    with pytest.raises(KitError, match="rows skipped by ON_ERROR=skip"):
        runner.run(job(tmp_path, 2, encode=strict, skip_bad_rows=False))
    assert runner.run(job(tmp_path, 2, encode=never)) is not None


def test_a_file_that_is_given_twice_is_read_twice(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"xx\n")
    (tmp_path / "a.txt").write_bytes(b"x\n")
    twice = [tmp_path / "b.txt", tmp_path / "a.txt", tmp_path / "b.txt"]
    content = runner.run(job(tmp_path, 2, inputs=twice))
    assert content and content["tokens"] == 5 and len(content["inputs"]) == 3
    assert content["inputs"][0] == content["inputs"][2]
