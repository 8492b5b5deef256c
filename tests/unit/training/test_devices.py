"""Checks for as many devices as a run requests, and for their memory, without initializing one."""

import socket
import tempfile
from multiprocessing import connection, process
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import KitError
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA
from common.training.planning import devices
from common.training.settings import TrainSettings

# What the probing process imports instead of torch.
FAKE_TORCH = """
class cuda:
    device_count = staticmethod(lambda: 3)
    @staticmethod
    def get_device_properties(index):
        return type("Properties", (), {"name": f"GPU {index}", "total_memory": [80, 40, 20][index] << 30})
"""


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    devices.smallest_device.cache_clear()


def settings_for(gpus: int) -> TrainSettings:
    return TrainSettings(save_checkpoint_path="-", dataset_path="-", train_iters=1, gpus=gpus)


@pytest.mark.parametrize(
    ("platform", "hidden", "message"),
    [
        (NVIDIA, None, r"^GPUS=8, but torch sees 2 devices: set GPUS=2, with TP, PP and CP that"),
        (METAX, "0,1", r"torch sees 2 devices with CUDA_VISIBLE_DEVICES=0,1: set GPUS=2"),
    ],
)
def test_fewer_devices_than_requested_are_refused(
    platform: Any, hidden: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(KitError, match=message):
        devices.check_devices(settings_for(8), platform)
    devices.check_devices(settings_for(2), platform)
    devices.check_devices(settings_for(8), CPU)


def test_where_there_is_no_device_the_containers_flags_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(KitError, match=r"GPUS=1, but torch sees 0 devices.*`docker run --gpus all`"):
        devices.check_devices(settings_for(1), NVIDIA)
    assert not torch.cuda.is_initialized()


def test_the_smallest_of_the_devices_that_are_used_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert devices.smallest_device(2) == ("GPU 1", 40 << 30)
    assert devices.smallest_device(3) == ("GPU 2", 20 << 30)
    (tmp_path / "torch.py").write_text("raise RuntimeError('no driver')")
    assert devices.smallest_device(2) == ("GPU 1", 40 << 30), "a run asks once: it takes seconds"
    assert devices.smallest_device(1) is None


def test_without_a_device_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.smallest_device(1) is None


def test_a_process_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(devices, "TIMEOUT_S", 1)
    assert devices.smallest_device(1) is None


def test_a_temporary_folder_too_long_for_the_workers_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is as long as Python's own, and Linux takes a socket at the longest folder that is allowed."""
    longest = "/tmp/" + "x" * 70
    monkeypatch.setattr(tempfile, "tempdir", longest)
    devices.check_temporary_folder(2)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        made = tempfile.mkdtemp(prefix="pymp-")  # as multiprocessing.util.get_temp_dir makes it, and removes it at exit
        monkeypatch.setitem(process.current_process()._config, "tempdir", made)  # type: ignore[attr-defined]
        assert len(connection.arbitrary_address("AF_UNIX")) == len(short) + len(devices.SOCKET_NAME)
        folder = Path(short) / ("x" * (len(longest) - len(short) - 1))
        folder.mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}{devices.SOCKET_NAME.replace('/pymp-xxxxxxxx/', '/pymp-xxxxxxxx-')}")
    monkeypatch.setattr(tempfile, "tempdir", f"{longest}x")
    devices.check_temporary_folder(0)
    with pytest.raises(KitError, match=r"^TMPDIR=/tmp/x+: .* may have 75 bytes, and has 76: set TMPDIR to a shorter"):
        devices.check_temporary_folder(2)
