import logging
import os
from pathlib import Path

import pytest

from common.data.sources.discovery import find_inputs
from common.errors import KitError


def names(text: object) -> list[str]:
    return [path.name for path in find_inputs(str(text))]


def test_a_folder_gives_its_row_files_and_the_rest_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kit")
    (tmp_path / "sub").mkdir()
    others = ("._a.jsonl", ".x", "d.json", "e.jsonl.lz4", "README")
    for name in ("a.jsonl", "c.JSONL", "sub/b.jsonl", *others):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert names(tmp_path) == ["a.jsonl", "c.JSONL"]
    (message,) = caplog.messages
    for each in ("2 hidden (._a.jsonl, .x)", "1 folders (sub)", "1 .json (d.json)", "1 .lz4", "1 without an extension"):
        assert each in message
    assert names(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/** ") == ["README", "a.jsonl", "c.JSONL", "d.json", "e.jsonl.lz4", "b.jsonl"]


def test_a_file_that_is_given_twice_is_recognized_by_any_of_its_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.jsonl"
    path.write_text("1\n")
    (tmp_path / "link.jsonl").symlink_to(path)
    os.link(path, tmp_path / "hard.jsonl")
    for other in (path, tmp_path / "link.jsonl", tmp_path / "hard.jsonl"):
        caplog.clear()
        assert len(names(f"{tmp_path}/in {other}")) == 2
        assert len(caplog.messages) == 1 and "INPUT names 1 file more than once" in caplog.text


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(KitError, match=r"pipe\.jsonl is not a regular file"):
        find_inputs(str(tmp_path / "pipe.jsonl"))
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / ".a.jsonl").write_text("1")
    with pytest.raises(KitError, match=r"holds no \.jsonl.* but 1 hidden"):
        find_inputs(str(tmp_path / "only"))
