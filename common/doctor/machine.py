"""The machine and the container: devices, memory, disk and limits."""

import os
import resource
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.doctor.finding import Finding, judge
from common.errors import KitError
from common.folders import existing_part
from common.platforms import available_memory, check_machine, detect, own_cgroups
from common.platforms.base import Platform

GIB = 1 << 30
LEAST_DISK_BYTES = 20 * GIB  # one checkpoint of 1B parameters with its optimizer
LEAST_FILES = 4096
LEAST_CORES = 4  # of a rank, its data workers and NCCL
LEAST_TASKS = 4096
CLOCK_S = 60.0
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
        missing = [path for path in platform.device_files if not Path(path).exists()]
        without = f", and {', '.join(missing)} is missing" if missing else ""
        return [Finding("device", "fail", f"torch sees none{without}", remedy)]
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


def check_shared_memory(platform: Platform) -> Finding:
    """/dev/shm, through which NCCL and the data workers communicate; Docker's default is 64 MiB."""
    total = _space(SHARED)[0]
    remedy = "start the container with --ipc=host, or --shm-size=16g"
    return judge("shared memory", f"{total / GIB:.2f} GiB", total < platform.shared_gib * GIB, remedy, "warn")


def check_disk() -> list[Finding]:
    """Free space at SAVE_CHECKPOINT_PATH, or in the current folder, and for temporary files; that they can be written.

    Also the clock: that of SAVE_CHECKPOINT_PATH's file system, another machine's where it is shared, may differ.
    """
    findings = []
    saved = existing_part(Path(os.environ.get("SAVE_CHECKPOINT_PATH") or Path.cwd()))
    for name, folder, least in (("disk", saved, LEAST_DISK_BYTES), ("temporary", Path(tempfile.gettempdir()), GIB)):
        free = _space(folder)[1]
        remedy = (
            "a checkpoint takes 14 to 18 bytes per parameter: save to a larger disk, or keep fewer (KEEP_CHECKPOINTS)"
        )
        findings.append(judge(name, f"{free / GIB:.1f} GiB free in {folder}", free < least, remedy, "warn"))
        if (ahead_s := _clock_ahead_s(folder)) is None:
            remedy = "set SAVE_CHECKPOINT_PATH (or TMPDIR) to a folder that this user can write to"
            findings.append(Finding(name, "fail", f"{folder} cannot be written to", remedy))
        elif name == "disk":
            findings.append(check_clock(ahead_s))
    return findings


def check_clock(ahead_s: float) -> Finding:
    """This machine's clock: not before the kit's own files, nor `ahead_s` far from the disk's."""
    age_s = time.time() - Path(__file__).stat().st_mtime
    remedy = "set the clock (chronyc makestep, timedatectl): certificates, Slurm and the order of logs depend on it"
    wrong = age_s < -CLOCK_S or abs(ahead_s) > CLOCK_S
    found = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if abs(ahead_s) > CLOCK_S:
        found += f", {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the disk's"
    return judge("clock", found, wrong, remedy, "warn")


def check_cgroup() -> list[Finding]:
    """What the control group leaves of the machine's cores and processes, of which nproc and ulimit know nothing."""
    findings, cores = [], len(os.sched_getaffinity(0))
    quota = _cgroup_value("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        allowed = int(quota[0]) / int(quota[1])
        found = f"{allowed:.1f} of {cores} cores by the control group"
        remedy = "docker run without --cpus, or a larger request: data workers and NCCL wait for each other"
        findings.append(judge("cores", found, allowed < min(cores, LEAST_CORES), remedy, "warn"))
    else:
        findings.append(Finding("cores", "ok", str(cores)))
    most = _cgroup_value("pids.max")
    if most.isdigit():
        remedy = f"docker run --pids-limit=-1, or {LEAST_TASKS} and more: each rank has dozens of threads"
        findings.append(judge("processes", f"{most} by the control group", int(most) < LEAST_TASKS, remedy, "warn"))
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


def _cgroup_value(name: str) -> str:
    """The content of a file of this process's own control group (v2); empty where there is none."""
    for folder in own_cgroups(name.split(".")[0]):
        with suppress(OSError):
            return (folder / name).read_text(encoding="utf-8").strip()
    return ""


def _clock_ahead_s(folder: Path) -> float | None:
    """How far this machine's clock is ahead of the file system's; None where `folder` cannot be written to."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            return time.time() - os.fstat(stream.fileno()).st_mtime
    except OSError:
        return None


def _space(folder: Path) -> tuple[int, int]:
    """(total, free to this user) bytes of the file system that holds `folder`."""
    if not folder.is_dir():
        return 0, 0
    found = os.statvfs(folder)
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
