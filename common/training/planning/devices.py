"""The devices of this node, asked by the launcher, which must not hold one: ranks and their memory come after it."""

import json
import os
import subprocess
import sys

from common.errors import KitError
from common.platforms.base import Platform
from common.training.settings import TrainSettings

# torch makes a CUDA context to tell a device's memory, and with it some hundred MiB on the device: in a process of its
# own, which ends. The total is below the data sheet's and nvidia-smi's, and is what torch's own messages name.
ASK = """
import json, torch
of = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
print(json.dumps([[each.name, each.total_memory] for each in of]))
"""
TIMEOUT_S = 120


def check_devices(settings: TrainSettings, platform: Platform) -> None:
    """Raises KitError where torch sees fewer devices than GPUS asks for; a CPU has as many as it is asked for."""
    if platform.device != "cuda":
        return
    import torch  # the estimate reads its neighbours without it

    found = torch.cuda.device_count()  # asks NVML, or the driver; makes no context
    if found < settings.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        told = "" if hidden is None else f" with CUDA_VISIBLE_DEVICES={hidden}"
        remedy = f"set GPUS={found}, with TP, PP and CP that divide it"
        if not found:
            remedy = f"start the container with `docker run {platform.container_flags}`, on a machine with the driver"
        raise KitError(f"GPUS={settings.gpus} devices are asked for, and torch sees {found}{told}: {remedy}")


def smallest_device(num_devices: int) -> tuple[str, int] | None:
    """(name, bytes of memory) of the smallest of the first `num_devices`; None where torch cannot tell."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
            cwd="/",  # where one stands may be a file of torch's name
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])[:num_devices]
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        return None
    return min(((name, total) for name, total in found), key=lambda each: each[1], default=None)
