"""Checks of this node: its devices, without a CUDA context in the launcher, and the folder of temporary files."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache

from common.errors import KitError
from common.platforms.base import Platform
from common.training.settings.parallel import ParallelSettings

# Reading a device's memory makes torch create a CUDA context of some hundred MiB, so a separate process does it. The
# total is lower than the data sheet's and nvidia-smi's; it is the one in torch's own messages.
QUERY = """
import json, torch
of = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
print(json.dumps([[each.name, each.total_memory] for each in of]))
"""
TIMEOUT_S = 120
SOCKET_PATH_BYTES = 107  # the longest path of a Unix socket (unix(7): sun_path, without its final 0)
SOCKET_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"  # as Python's multiprocessing names them in the temporary folder


def check_devices(settings: ParallelSettings, platform: Platform) -> None:
    """Raises KitError if torch sees fewer devices than GPUS; a CPU run has no limit."""
    if platform.device != "cuda":
        return
    import torch  # the estimate imports this room without it

    found = torch.cuda.device_count()  # by NVML or the driver; creates no context
    if found < settings.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = "" if hidden is None else f" with CUDA_VISIBLE_DEVICES={hidden}"
        remedy = f"set GPUS={found}, with TP, PP and CP that divide it"
        if not found:
            remedy = f"start the container with `docker run {platform.container_flags}`, on a machine with the driver"
        raise KitError(f"GPUS={settings.gpus}, but torch sees {found} devices{visible}: {remedy}")


def check_temporary_folder(num_workers: int) -> None:
    """Raises KitError where the data workers' sockets would have too long a path: the ranks would wait for them."""
    folder = tempfile.gettempdir()
    most, length = SOCKET_PATH_BYTES - len(SOCKET_NAME), len(os.fsencode(folder))
    if num_workers and length > most:
        raise KitError(
            f"TMPDIR={folder}: data workers send rows through sockets there, so its path may have {most} bytes, and has"
            f" {length}: set TMPDIR to a shorter folder, such as /tmp, or NUM_WORKERS=0"
        )


@cache  # it takes seconds
def smallest_device(num_devices: int) -> tuple[str, int] | None:
    """(name, bytes of memory) of the smallest of the first `num_devices`; None if the query fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", QUERY], capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
            cwd="/",  # the working directory may hold a torch.py
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])[:num_devices]
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None
    return min(((name, total) for name, total in found), key=lambda each: each[1], default=None)
