"""Where a run happens: `current()` is the platform that KIT_PLATFORM names, `detect()` what this machine looks like."""

import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from common.errors import KitError
from common.platforms.base import Platform
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA

PLATFORMS = {platform.name: platform for platform in (CPU, METAX, NVIDIA)}
NVIDIA_DRIVER, MEMORY = Path("/proc/driver/nvidia/version"), Path("/proc/meminfo")


def current() -> Platform:
    """The platform named by the environment's KIT_PLATFORM; raises KitError when it is unset or unknown.

    For tests alone, KIT_TEST_ON_CPU=true puts its facts in force on a machine without its GPU.
    """
    name = os.environ.get("KIT_PLATFORM", "")
    if name not in PLATFORMS:
        raise KitError(
            f"KIT_PLATFORM={name!r} is no platform: start a script of {', '.join(f'{known}/' for known in PLATFORMS)}"
            " or set KIT_PLATFORM to that folder's name"
        )
    platform = PLATFORMS[name]
    return on_cpu(platform) if os.environ.get("KIT_TEST_ON_CPU") == "true" else platform


def on_cpu(platform: Platform) -> Platform:
    """`platform` with the CPU for a device and every other fact its own: what tests run, under a name that says so."""
    name = f"{platform.name} on a CPU, for tests"
    return replace(platform, name=name, device=CPU.device, backend=CPU.backend, prepare=CPU.prepare)


def detect() -> str:
    """The name of the platform that this machine looks like.

    MetaX is told by torch's version or by MACA_PATH, never by torch.version.cuda, which mcPytorch fills in too.
    """
    if "+metax" in _torch_version() or _maca_is_here():
        return METAX.name
    return NVIDIA.name if NVIDIA_DRIVER.exists() else CPU.name


def check_machine(platform: Platform) -> None:
    """Raises KitError where torch is another vendor's than the platform's scripts are for."""
    text = _torch_version()
    if platform.name == METAX.name and "+metax" not in text and not _maca_is_here():
        raise KitError(
            f"KIT_PLATFORM={METAX.name}, but torch {text or '(none)'} is not MetaX's and MACA_PATH is no folder here:"
            f" use the scripts of {detect()}/, or start MetaX's image"
        )
    if platform.name == NVIDIA.name and "+metax" in text:
        raise KitError(f"KIT_PLATFORM={NVIDIA.name}, but torch {text} is MetaX's: use the scripts of {METAX.name}/")


def available_memory() -> int:
    """Bytes of this machine's memory that can still be taken."""
    kib = next(int(line.split()[1]) for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * kib


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _maca_is_here() -> bool:
    path = os.environ.get("MACA_PATH")
    return bool(path) and Path(str(path)).is_dir()
