import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.data.dataset import manifest
from common.data.dataset.indexed_dataset import IndexedDataset
from common.data.encoders.encoded import EncodedChunk
from common.data.preprocessing import runner
from common.data.preprocessing.job import Job
from common.data.preprocessing.workers import Encoder, Workers, num_workers
from common.data.sources.chunks import Chunk
from common.errors import KitError


def lengths_of_lines(chunk: Chunk) -> EncodedChunk:
    """An encoder without a tokenizer: a line of n bytes is the document [n] * n; empty lines are dropped."""
    sizes = [len(line) for line in chunk.data.split(b"\n")[:-1]]
    kept = [n for n in sizes if n]
    tokens = np.array([n for n in kept for _ in range(n)], np.uint16)
    counts = Counter({"read": len(sizes), "dropped: empty": len(sizes) - len(kept), "note": len(kept)})
    return EncodedChunk({"tokens": tokens}, np.array(kept, np.int32), counts)


def job(
    folder: Path, encode: Encoder = lengths_of_lines, partitions: int = 1, workers: int = 1, **settings: int
) -> Job:
    path = folder / "in.txt"
    if not path.exists():
        path.write_bytes(b"".join(b"x" * (i * 7 % 40) + b"\n" for i in range(20000)))
    return Job(
        kind="pretrain",
        output_prefix=folder / "out" / "data",
        inputs=[path],
        streams={"tokens": ("text_document", np.dtype("<u2"))},
        encode=encode,
        described={"settings": settings},
        workers=workers,
        partitions=partitions,
    )


def output(made: Job) -> bytes:
    return b"".join(Path(f"{made.final('tokens')}{end}").read_bytes() for end in (".bin", ".idx"))


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    (tmp_path / "plain").mkdir()
    made = job(tmp_path / "plain")
    runner.run(made)
    return output(made)


@pytest.mark.parametrize("partitions", [1, 3, 50])
@pytest.mark.parametrize("workers", [1, 3])
def test_partitions_and_workers_change_nothing(tmp_path: Path, expected: bytes, partitions: int, workers: int) -> None:
    made = job(tmp_path, partitions=partitions, workers=workers)
    content = runner.run(made)
    assert output(made) == expected
    assert {path.name for path in made.output_prefix.parent.iterdir()} == {
        "data.json", "data_text_document.bin", "data_text_document.idx",
    }  # fmt: skip
    lines = made.inputs[0].read_bytes().split(b"\n")[:-1]
    kept = [len(line) for line in lines if line]
    assert content["documents"] == {"read": 20000, "kept": len(kept), "dropped": {"empty": 20000 - len(kept)}}
    assert (content["tokens"], content["longest"], content["notes"]) == (sum(kept), max(kept), {"note": len(kept)})
    assert content["largest_id"] == max(kept)  # a document of n bytes is n times the id n
    assert IndexedDataset(made.final("tokens")).lengths.tolist() == kept


class Failing:
    """Encodes up to the line after `at` bytes; then does what `how` says."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        if chunk.start <= self.at < chunk.start + len(chunk.data):
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise chunk.error(0, "a bad row") if self.how == "error" else RuntimeError("a bug")
        return lengths_of_lines(chunk)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("die", KitError, "a worker process was killed.*reduce WORKERS"),
        ("error", KitError, "in.txt, line .*: a bad row"),
        ("bug", RuntimeError, "a bug"),
    ],
)
def test_a_worker_that_fails_ends_the_run_and_finished_parts_are_kept(
    tmp_path: Path, expected: bytes, how: str, kind: type[Exception], message: str
) -> None:
    size = job(tmp_path).inputs[0].stat().st_size
    with pytest.raises(kind, match=message):
        runner.run(job(tmp_path, Failing(size * 7 // 10, how), partitions=4, workers=2))
    assert not list((tmp_path / "out").glob("data_*")) and not (tmp_path / "out" / "data.json").exists()
    assert not list((tmp_path / "out").glob("*/*.partial"))
    read = []

    def watched(chunk: Chunk) -> EncodedChunk:
        read.append(chunk.start)
        return lengths_of_lines(chunk)

    made = job(tmp_path, watched, partitions=4)
    runner.run(made)
    assert output(made) == expected and min(read) >= size * 0.49, "the first two parts were there"


@pytest.mark.parametrize("change", ["input", "setting", "truncated", "state"])
def test_a_part_of_anything_else_is_not_used_again(tmp_path: Path, change: str) -> None:
    size = job(tmp_path).inputs[0].stat().st_size
    with pytest.raises(RuntimeError):
        runner.run(job(tmp_path, Failing(size - 10, "bug"), partitions=4, workers=2, a=1))
    if change == "input":
        data = job(tmp_path).inputs[0].read_bytes()
        job(tmp_path).inputs[0].write_bytes(data.replace(b"x", b"y", 1))
    if change == "truncated":
        (part,) = tmp_path.glob("out/data.parts/part_00000_*_tokens.bin")
        part.write_bytes(part.read_bytes()[:-2])
    if change == "state":
        (state,) = tmp_path.glob("out/data.parts/part_00000_????????.json")
        state.write_text("[]")
    read = []

    def watched(chunk: Chunk) -> EncodedChunk:
        read.append(chunk.start)
        return lengths_of_lines(chunk)

    runner.run(job(tmp_path, watched, 4, a=2 if change == "setting" else 1))
    assert min(read) == 0


def test_a_second_run_finds_it_done_and_another_is_refused(tmp_path: Path) -> None:
    first = runner.run(job(tmp_path, a=1))

    def never(chunk: Chunk) -> EncodedChunk:
        raise AssertionError

    assert runner.run(job(tmp_path, never, 7, 2, a=1)) == manifest.read(tmp_path / "out" / "data")
    assert manifest.read(tmp_path / "out" / "data") == {"format": manifest.FORMAT, "version": 2, **first}
    with pytest.raises(KitError, match=r"data\.json has other input, tokenizer or settings \(a\): remove it"):
        runner.run(job(tmp_path, a=2))
    with job(tmp_path).inputs[0].open("ab") as stream:
        stream.write(b"x\n")
    with pytest.raises(KitError, match=r"\(input\)"):
        runner.run(job(tmp_path, a=1))


def test_files_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    made = job(tmp_path)
    made.output_prefix.parent.mkdir()
    foreign = Path(f"{made.final('tokens')}.idx")
    foreign.write_bytes(b"theirs")
    with pytest.raises(KitError, match=r"data_text_document\.idx already exists without a manifest"):
        runner.run(made)
    assert foreign.read_bytes() == b"theirs"


def test_a_manifest_without_its_files_is_reported(tmp_path: Path) -> None:
    made = job(tmp_path)
    runner.run(made)
    Path(f"{made.final('tokens')}.bin").unlink()
    with pytest.raises(KitError, match=r"data\.json exists without its files"):
        runner.run(job(tmp_path))


def test_no_document_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"\n\n\n")
    with pytest.raises(KitError, match="INPUT holds no documents: 3 rows were read"):
        runner.run(job(tmp_path))
    assert not list((tmp_path / "out").iterdir())


def test_an_input_that_changes_meanwhile_is_reported(tmp_path: Path) -> None:
    def changing(chunk: Chunk) -> EncodedChunk:
        os.utime(chunk.path, (1, 1))
        return lengths_of_lines(chunk)

    with pytest.raises(KitError, match=r"in\.txt changed while it was being read"):
        runner.run(job(tmp_path, changing))
    assert not list((tmp_path / "out").glob("data_*"))


def test_two_runs_at_once_are_reported(tmp_path: Path) -> None:
    made = job(tmp_path)
    made.folder.mkdir(parents=True)
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", program, str(made.folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(KitError, match="another run is writing"):
            runner.run(job(tmp_path))
        other.communicate(b"\n")
    runner.run(job(tmp_path))


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    made = job(tmp_path)
    made.output_prefix.parent.mkdir()
    made.folder.write_text("a file where the folder of parts would be")
    with pytest.raises(KitError, match="cannot be written"):
        runner.run(made)


def test_workers_keep_the_order_and_bound_what_is_in_flight(tmp_path: Path) -> None:
    chunks = [Chunk(tmp_path, i, b"x" * (50 - i) + b"\n", 1) for i in range(50)]
    submitted = 0

    def counted() -> list[Chunk]:
        nonlocal submitted
        for chunk in chunks:
            submitted += 1
            yield chunk

    done = 0
    with Workers(slow, 2) as workers:
        for chunk, encoded in workers.encode(counted()):
            assert encoded.lengths.tolist() == [50 - done] and chunk.start == done
            done += 1
            assert submitted - done <= 6
    assert done == 50


def slow(chunk: Chunk) -> EncodedChunk:
    time.sleep(len(chunk.data) % 3 / 1000)
    return lengths_of_lines(chunk)


def test_number_of_workers() -> None:
    assert num_workers(3) == 3
    assert num_workers(None) == len(os.sched_getaffinity(0))
    with pytest.raises(KitError, match="WORKERS=0"):
        num_workers(0)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from common.data.sources.chunks import Chunk\n"
        "from common.data.preprocessing.workers import Workers\n"
        "def encode(chunk):\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(0.2)\n    return 0\n"
        "with Workers(encode, 3) as workers:\n"
        "    for _ in workers.encode(Chunk(Path('a'), i, b'', 0) for i in range(1000)): pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout
        pids: set[int] = set()
        while len(pids) < 3:
            pids.add(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while (left := [pid for pid in pids if runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, "a worker outlived its parent"


def runs(pid: int) -> bool:
    """Whether process `pid` exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
