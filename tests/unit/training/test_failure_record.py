"""What the launcher adds to the records of a run whose ranks have failed."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from common.training.tracking.records import LOG_FILE, METRICS_FILE, RUN_RECORD, read_run_record
from common.training.tracking.run_record import FailureRecord

KILLED = "rank 1 failed first, killed by SIGKILL"


def write_starts(folder: Path, *starts: dict[str, Any]) -> None:
    same = {"iteration": 0, "host": socket.gethostname()}
    (folder / RUN_RECORD).write_text(json.dumps({"starts": [{**same, **start} for start in starts]}))


def write_lines(folder: Path, *lines: tuple[int, int]) -> None:
    text = "".join(json.dumps({"start": start, "iteration": iteration}) + "\n" for start, iteration in lines)
    (folder / METRICS_FILE).write_text(text)


@pytest.mark.parametrize(("lines", "iteration"), [([(0, 9), (1, 5), (1, 6)], 6), ([(0, 9)], 4), ([], 4)])
def test_a_start_that_left_no_end_gets_one(tmp_path: Path, lines: list[tuple[int, int]], iteration: int) -> None:
    write_starts(tmp_path, {})
    record = FailureRecord(tmp_path)
    write_starts(tmp_path, {}, {"iteration": 4})
    write_lines(tmp_path, *lines)
    record.add(1, [KILLED, "traceback of rank 1:\nValueError: it"])
    first, second = read_run_record(tmp_path)["starts"]
    assert "end" not in first
    assert second["end"]["iteration"] == iteration
    assert second["end"]["reason"] == f"{KILLED}\ntraceback of rank 1:\nValueError: it"
    assert KILLED in (tmp_path / LOG_FILE).read_text()


@pytest.mark.parametrize(
    ("rank", "host", "reason"),
    [(1, socket.gethostname(), f"Connection reset\n{KILLED}"), (0, socket.gethostname(), "Connection reset"),
     (1, "another", "Connection reset")],
)  # fmt: skip
def test_an_end_by_rank_0_is_completed_where_another_rank_of_its_node_is_the_cause(
    tmp_path: Path, rank: int, host: str, reason: str
) -> None:
    record = FailureRecord(tmp_path)
    end = {"time": "then", "iteration": 7, "reason": "Connection reset"}
    write_starts(tmp_path, {"host": host, "end": end})
    record.add(rank, [KILLED])
    assert read_run_record(tmp_path)["starts"][0]["end"] == {**end, "reason": reason}
    assert KILLED in (tmp_path / LOG_FILE).read_text()


def test_nothing_is_written_of_ranks_that_failed_before_the_record(tmp_path: Path) -> None:
    write_starts(tmp_path, {})
    before = (tmp_path / RUN_RECORD).read_bytes()
    FailureRecord(tmp_path).add(1, [KILLED])
    assert (tmp_path / RUN_RECORD).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [RUN_RECORD]


def test_a_record_that_cannot_be_read_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = FailureRecord(tmp_path)
    (tmp_path / RUN_RECORD).write_text("{")
    record.add(1, [KILLED])
    assert "how the ranks failed is not recorded there" in caplog.text and "is not JSON" in caplog.text
