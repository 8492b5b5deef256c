"""The platforms: `current()` is the one that KIT_PLATFORM names, `detect()` the one that this machine looks like."""

import os
import posixpath
from collections.abc import Iterator
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
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# A control group's limit, what is taken of it, and the line of its memory.stat that counts what the kernel gives back
# at once, of the page cache: cgroup v2, then v1 (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst).
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def current() -> Platform:
    """The platform named by the environment's KIT_PLATFORM; raises KitError when it is unset or unknown.

    For tests only, KIT_TEST_ON_CPU=true applies its facts on a machine without its GPU.
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

    MetaX is recognized by torch's version or by MACA_PATH, never by torch.version.cuda, which mcPytorch fills in too.
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
    """Bytes of memory that this process can still allocate: of the machine, and of each control group it is in.

    Containers and batch jobs are limited by control groups, of which /proc/meminfo knows nothing.
    """
    kib = next(int(line.split()[1]) for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable"))
    return min([1024 * kib, *(left for folder in own_cgroups("memory") if (left := _left(folder)) is not None)])


def own_cgroups(controller: str) -> Iterator[Path]:
    """Folders of the control groups that may limit this process: its own and those above, of v2 and of v1.

    In a container a path may be the host's, of which nothing but the top is seen here.
    """
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS  # v1 has a tree for each controller
        own = root / posixpath.normpath(path).lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def _left(cgroup: Path) -> int | None:
    """Bytes that `cgroup` leaves; None if it sets no limit or does not exist."""
    for limit, taken, cache in MEMORY_FILES:
        try:
            most, used = (cgroup / limit).read_text().strip(), int((cgroup / taken).read_text())
            counts = dict(line.split(maxsplit=1) for line in (cgroup / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        return None if most == "max" else max(int(most) - used + int(counts.get(cache, 0)), 0)
    return None


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def _maca_is_here() -> bool:
    path = os.environ.get("MACA_PATH")
    return bool(path) and Path(str(path)).is_dir()
