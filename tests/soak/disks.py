"""Faults of the disk: python -m tests.soak.disks --folder /tmp/soak --number 5

Full, read-only, another disk in its place, the folder removed, EIO at fsync (by strace), in turn, in one run. It
continues through all of them, saves after each, and the checkpoint that it names is complete.
"""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.test_disks import fill
from tests.distributed.user import Run, wait_for
from tests.soak.small import Soak, arguments


def call(*command: str | Path) -> None:
    """Runs a command that must succeed."""
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def fault(kind: str, disk: Path, run: Run) -> Iterator[None]:
    """Applies the fault within the block."""
    if kind == "full":
        path = fill(disk)
        yield
        path.unlink()
    elif kind == "read-only":
        call("mount", "-o", "remount,ro", disk)
        yield
        call("mount", "-o", "remount,rw", disk)
    elif kind == "gone":
        call("mount", "-t", "tmpfs", "-o", "size=20m", "other", disk)
        yield
        call("umount", "-l", disk)
    elif kind == "removed":
        call("mv", run.folder, f"{run.folder}.away")
        (disk / "run").write_text("in the way")
        yield
        (disk / "run").unlink()
        call("mv", f"{run.folder}.away", run.folder)
    else:
        inject = ["-e", "trace=fsync", "-e", "inject=fsync:error=EIO", "-o", "/dev/null"]
        tracer = subprocess.Popen(["strace", "-f", "-p", str(run.ranks()[0].pid), *inject], stderr=subprocess.DEVNULL)
        yield
        tracer.send_signal(signal.SIGINT)
        tracer.wait()


def main() -> None:
    """Breaks the disk, repairs it, and prints the result."""
    given = arguments(__doc__ or "", 5)
    disk = given.folder / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    call("mount", "-t", "tmpfs", "-o", "size=20m", "soak", disk)
    try:
        soak = Soak(given.folder / "disks", given.layout, TRAIN_ITERS=100_000)
        run = soak.start("run", SAVE_CHECKPOINT_PATH=disk / "run")
        kinds = ("full", "read-only", "gone", "removed", "EIO") * given.number
        for number, kind in enumerate(kinds):
            wait_for(lambda: run.text().count("saved ") > number, 300)  # noqa: B023
            warned, began = run.text().count("NOT SAVED"), time.monotonic()
            with fault(kind, disk, run):
                wait_for(lambda: run.text().count("NOT SAVED") > warned, 120)  # noqa: B023
            saved = run.text().count("saved ")
            wait_for(lambda: run.text().count("saved ") > saved, 120)  # noqa: B023
            print(
                f"fault {number + 1}: {kind}; saved again {time.monotonic() - began:.1f} s after it began", flush=True
            )
            checkpoint = run.folder / f"iter_{run.tracker():07d}"
            assert (checkpoint / "metadata.json").is_file() and (checkpoint / ".metadata").is_file()
        run.process.send_signal(signal.SIGTERM)
        log = run.end(75)
        assert "Traceback" not in log
        print(
            f"{len(kinds)} faults, {log.count('NOT SAVED')} warnings, one run; the last checkpoint is {run.tracker()}"
        )
    finally:
        call("umount", "-l", disk)


if __name__ == "__main__":
    main()
