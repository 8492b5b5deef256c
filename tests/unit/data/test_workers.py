from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.data.encoders.encoded import EncodedChunk
from common.data.preprocessing import workers as workers_module
from common.data.preprocessing.workers import Workers
from common.data.sources.bad_rows import RejectedRow
from common.data.sources.chunks import Chunk, load_chunk, split_span
from common.data.sources.spans import Span
from common.errors import KitError


def bytes_as_documents(chunk: Chunk) -> EncodedChunk:
    """A document a line of its bytes, a mask of floats beside it, and a reject."""
    lines = chunk.data.split(b"\n")[:-1]
    tokens = np.frombuffer(b"".join(lines), np.uint8).astype(np.int32)
    lengths = np.array([len(line) for line in lines], np.int32)
    streams = {"tokens": tokens, "loss_mask": tokens.astype(np.float32) / 2}
    return EncodedChunk(streams, lengths, Counter(read=len(lines)), [RejectedRow(chunk.start, b"x", "y")])


@pytest.mark.parametrize("slot_bytes", [64, 3000, 1 << 20])
def test_arrays_are_returned_whether_they_fit_the_shared_memory_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slot_bytes: int
) -> None:
    monkeypatch.setattr(workers_module, "SLOT_BYTES", slot_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(b"x" * (i * 13 % 700) + b"\n" for i in range(300)))
    pieces = list(split_span(Span(path, 0, path.stat().st_size), 900))
    assert len(pieces) > 50
    with Workers(bytes_as_documents, 2) as two, Workers(bytes_as_documents, 1) as one:
        expected = list(one.encode(pieces))
        for (task, mine), (same, theirs) in zip(two.encode(pieces), expected, strict=True):
            assert task == same
            assert mine.counts == theirs.counts and mine.rejects == theirs.rejects
            assert np.array_equal(mine.lengths, theirs.lengths) and mine.lengths.dtype == np.int32
            for name, array in theirs.streams.items():
                assert np.array_equal(mine.streams[name], array) and mine.streams[name].dtype == array.dtype


def test_the_pieces_of_a_span_are_whole_lines_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    data = b"".join(b"x" * (i * 13 % 50) + b"\n" for i in range(200)) + b"no newline"
    path.write_bytes(data)
    for size in (1, 7, 100, 10**6):
        chunks = [load_chunk(task) for task in split_span(Span(path, 0, len(data)), size)]
        assert b"".join(chunk.data for chunk in chunks) == data
        assert all(chunk.data.endswith(b"\n") for chunk in chunks[:-1])
        assert [chunk.start for chunk in chunks] == np.cumsum([0, *(len(c.data) for c in chunks[:-1])]).tolist()
        assert all(len(chunk.data) <= size + 50 for chunk in chunks)


def test_a_file_that_shrinks_meanwhile_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"xx\n" * 100)
    (task,) = split_span(Span(path, 0, 300), 1000)
    path.write_bytes(b"xx\n" * 50)
    with pytest.raises(KitError, match="changed while it was being read"):
        load_chunk(task)
    path.unlink()
    with pytest.raises(KitError, match="cannot be read: "):
        load_chunk(task)


def test_the_next_piece_is_not_read_into_memory_in_use(tmp_path: Path) -> None:
    """The arrays of a piece are views, valid until the next piece is requested, however fast the workers are."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"".join(bytes([97 + i % 26]) * 100 + b"\n" for i in range(400)))
    with Workers(bytes_as_documents, 3) as workers:
        for number, (_, encoded) in enumerate(workers.encode(split_span(Span(path, 0, path.stat().st_size), 101))):
            before = encoded.streams["tokens"].copy()
            assert set(before.tolist()) == {97 + number % 26}
            for _ in range(50):
                assert np.array_equal(encoded.streams["tokens"], before)
