"""The lock on a run's folder: a second run is refused, and names the first."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import KitError
from common.training.checkpointing import folder_lock
from common.training.checkpointing.folder_lock import LOCK_FILE, check_lock, take_lock

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from pathlib import Path
from common.training.checkpointing.folder_lock import take_lock
take_lock(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another run that holds the lock on `tmp_path / "run"`."""
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_by_name_until_the_first_one_has_died(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    named = rf"another run \(process {holder.pid} on {socket.gethostname()}, since .*\): wait for it, stop it, or"
    with pytest.raises(KitError, match=named):
        take_lock(tmp_path / "run", timeout_s=0)
    (tmp_path / "run" / LOCK_FILE).write_text("{}")
    with pytest.raises(KitError, match=r"another run \(unknown\)"):
        take_lock(tmp_path / "run", timeout_s=0)
    holder.kill()
    handle = take_lock(tmp_path / "run", timeout_s=10)
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    os.close(handle)


def test_looking_for_a_lock_makes_nothing_and_holds_nothing(tmp_path: Path) -> None:
    check_lock(tmp_path / "nowhere")
    check_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK_FILE).touch()
    check_lock(tmp_path)
    os.close(take_lock(tmp_path, timeout_s=0))


def test_without_locks_a_run_continues_and_logs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    os.close(take_lock(tmp_path))
    assert "the file system does not support locks (No locks available): nothing keeps a second run out" in caplog.text
