"""The machine and the container: devices, memory, disk and limits."""

import os
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common.doctor.finding import Finding, judge
from common.errors import KitError
from common.folders import existing_part
from common.platforms import available_memory, check_machine, detect
from common.platforms.base import Platform

GIB = 1 << 30
LEAST_SHARED_BYTES = GIB  # what MetaX's documents require for MCCL; NCCL and data workers use it too
LEAST_DISK_BYTES = 20 * GIB  # one checkpoint of 1B parameters with its optimizer
LEAST_FILES = 4096
SHARED = Path("/dev/shm")


def check_platform(platform: Platform) -> Finding:
    """Whether the platform of the scripts in use is that of this machine."""
    try:
        check_machine(platform)
    except KitError as error:
        found, _, remedy = str(error).partition(": ")
        return Finding("platform", "fail", found, remedy)
    note = "" if platform.ran_on_hardware else "; the kit was not run on such hardware"
    return Finding("platform", "ok", f"{platform.name}{note}")


def check_devices(platform: Platform, found: list[tuple[str, int, int]]) -> list[Finding]:
    """The memory of each device, (name, free bytes, total bytes); a failure if the platform needs one and has none."""
    if platform.device == "cpu":
        return [Finding("memory", "ok", f"{available_memory() / GIB:.1f} GiB free")]
    if not found:
        remedy = f"start the container with `docker run {platform.container_flags}`, on a machine with the driver"
        if detect() != platform.name:
            remedy += f"; or use the scripts of {detect()}/, which this machine looks like"
        return [Finding("device", "fail", "torch sees none", remedy)]
    remedy = "end the process that uses it, or exclude the device with CUDA_VISIBLE_DEVICES"
    return [
        judge(
            f"device {i}", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free", free < 0.9 * total, remedy, "warn"
        )
        for i, (name, free, total) in enumerate(found)
    ]


def check_operations(results: dict[str, tuple[bool, Any]]) -> list[Finding]:
    """The small operations on the device, from `probes.run`."""
    remedy = "driver, image and device are incompatible: compare the driver's version with the image's release notes"
    return [judge("operation", f"{name}: {result}", not works, remedy) for name, (works, result) in results.items()]


def check_shared_memory() -> Finding:
    """/dev/shm, through which NCCL and the data workers communicate; Docker's default is 64 MiB."""
    total = _space(SHARED)[0]
    remedy = "start the container with --ipc=host, or --shm-size=16g"
    return judge("shared memory", f"{total / GIB:.2f} GiB", total < LEAST_SHARED_BYTES, remedy, "warn")


def check_disk() -> list[Finding]:
    """Free space at SAVE_CHECKPOINT_PATH, or in the current folder, and for temporary files."""
    findings = []
    saved = existing_part(Path(os.environ.get("SAVE_CHECKPOINT_PATH") or Path.cwd()))
    for name, folder, least in (("disk", saved, LEAST_DISK_BYTES), ("temporary", Path(tempfile.gettempdir()), GIB)):
        free = _space(folder)[1]
        remedy = (
            "a checkpoint takes 14 to 18 bytes per parameter: save to a larger disk, or keep fewer (KEEP_CHECKPOINTS)"
        )
        findings.append(judge(name, f"{free / GIB:.1f} GiB free in {folder}", free < least, remedy, "warn"))
    return findings


def check_limits(platform: Platform) -> list[Finding]:
    """Open files; with devices also locked memory, which RDMA and pinned buffers need."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files == resource.RLIM_INFINITY or files >= LEAST_FILES
    findings = [
        judge("open files", str(files), not enough, "ulimit -n 65536, or docker run --ulimit nofile=65536", "warn")
    ]
    if platform.device == "cuda":
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        found = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked >> 10} KiB"
        limited = locked != resource.RLIM_INFINITY
        findings.append(
            judge("locked memory", found, limited, "docker run --ulimit memlock=-1: RDMA fails without it", "warn")
        )
    return findings


def check_compiler(platform: Platform) -> list[Finding]:
    """The C compiler with which Triton builds its kernel launchers; only if the platform uses Triton."""
    if not platform.fused_kernels:
        return []
    name = next((each for each in (os.environ.get("CC"), "gcc", "clang") if each and shutil.which(each)), None)
    return [judge("C compiler", name or "not found", name is None, "apt-get install gcc: Triton's kernels need it")]


def _space(folder: Path) -> tuple[int, int]:
    """(total, free to this user) bytes of the file system that holds `folder`."""
    if not folder.is_dir():
        return 0, 0
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
