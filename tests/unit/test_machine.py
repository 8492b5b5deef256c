"""What the doctor sees of a container and its disk: cores, processes, the clock, what can be written to."""

from pathlib import Path

import pytest

from common import platforms
from common.doctor import machine


@pytest.mark.parametrize(("quota", "tasks", "statuses"), [
    ("max 100000", "max", ["ok"]),
    ("800000 100000", "20000", ["ok", "ok"]),
    ("50000 100000", "512", ["warn", "warn"]),
])  # fmt: skip
def test_what_a_control_group_takes_of_cores_and_processes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, tasks: str, statuses: list[str]
) -> None:
    (tmp_path / "own").write_text("0::/job\n")
    (tmp_path / "cgroup" / "job").mkdir(parents=True)
    (tmp_path / "cgroup" / "job" / "cpu.max").write_text(quota + "\n")
    (tmp_path / "cgroup" / "job" / "pids.max").write_text(tasks + "\n")
    monkeypatch.setattr(platforms, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(platforms, "CGROUPS", tmp_path / "cgroup")
    found = machine.check_cgroup()
    assert [each.status for each in found] == statuses
    if statuses[0] == "warn":
        assert found[0].found.startswith("0.5 of ") and "512" in found[1].found


def test_a_clock_that_is_not_the_disks_or_before_the_kit_is_named() -> None:
    assert machine.check_clock(0.5).status == "ok"
    assert machine.check_clock(300.0).found.endswith("300 s ahead of the disk's")
    late = machine.check_clock(-300.0)
    assert late.status == "warn" and late.found.endswith("300 s behind the disk's") and "chronyc" in late.remedy


def test_a_machine_of_the_past_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.time, "time", lambda: 86400.0)  # 1970, as without a battery
    assert machine.check_clock(0.0).status == "warn"


def test_a_folder_that_cannot_be_written_to_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVE_CHECKPOINT_PATH", "/proc/save")  # not even root can
    found = machine.check_disk()
    failures = [each for each in found if each.status == "fail"]
    assert [each.found for each in failures] == ["/proc cannot be written to"]
    assert "set SAVE_CHECKPOINT_PATH" in failures[0].remedy
