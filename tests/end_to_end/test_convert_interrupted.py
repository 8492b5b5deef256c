"""`python -m common.convert` on a machine that fails: kill -9 at any moment, a disk that is full."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.conversion import hf_to_megatron, megatron_to_hf
from common.checkpoint.conversion.output_folder import check_disk_space
from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.platforms.cuda_shim import TORCH
from tests.conversion import to_megatron
from tests.end_to_end.converting import TRACKER, run_main, tree, words
from tests.tiny import tiny_qwen

ROOT = Path(__file__).parents[2]
# A file system of its own, seen by one process alone, needs the right to make a namespace.
MOUNT = ["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"]
CAN_MOUNT = shutil.which("unshare") is not None and subprocess.run(MOUNT, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """This file as two programs at once, which fail where a command does not end as expected."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    commands = {"kill": [sys.executable, __file__, "kill"]}
    if CAN_MOUNT:
        commands["disk"] = ["unshare", "-rm", sys.executable, __file__, "disk"]
    pipe = subprocess.PIPE
    started = {
        name: subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
        for name, command in commands.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


def num_failures(program: subprocess.Popen[str]) -> int:
    """How often it made a command fail."""
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, out + err
    return len(out.splitlines())


def test_a_run_killed_at_any_moment_can_be_repeated(programs: dict[str, subprocess.Popen[str]]) -> None:
    assert num_failures(programs["kill"]) == sum(map(len, MOMENTS.values()))


@pytest.mark.skipif(not CAN_MOUNT, reason="a small file system cannot be mounted here")
def test_a_full_disk_is_reported_and_leaves_nothing(programs: dict[str, subprocess.Popen[str]]) -> None:
    assert num_failures(programs["disk"]) > 3 * 6


# When a process is killed: as a file of this name is opened, or moved to, for the nth time; or in the midst of one.
MIDST = ("midst", "", 0)
MOMENTS = {
    "torch": (
        MIDST,
        ("open", "mp_rank_00_001/model_optim_rng.pt", 1),
        ("open", f"{TRACKER}.partial", 1),
        ("open", "mp_rank_00_000/model_optim_rng.pt", 2),  # the verification
        ("os.rename", "target/release", 1),
        ("os.rename", "target/config.json", 1),
        ("os.rename", f"target/{TRACKER}", 1),
    ),
    "torch_dist": (MIDST, ("open", "release/.metadata", 1), ("open", "release/.metadata", 2)),
    "hf": (
        MIDST,
        ("open", "model-00002-of-00005.safetensors", 1),
        ("open", "model.safetensors.index.json", 2),
        ("os.rename", "target/model-00003-of-00005.safetensors", 1),
        ("os.rename", "target/config.json", 1),
    ),
}


def kill_me(event: str, name: str, count: int) -> None:
    """Sends SIGKILL to this process at that moment; in the middle of a file the kernel ends it."""
    if event == "midst":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        return
    met = 0

    def look(found: str, arguments: tuple[Any, ...]) -> None:
        nonlocal met
        if found == event and str(arguments[event == "os.rename"]).endswith(name):
            met += 1
            if met == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def run_forked(arguments: list[str], stderr: Path, moment: tuple[str, str, int] | None = None) -> int:
    """The exit code of a separate process that runs the command; a signal's number as a negative."""
    process = os.fork()  # everything that is costly is imported already
    if not process:
        status = 1
        try:
            with stderr.open("w") as sys.stderr:
                if moment:
                    kill_me(*moment)
                status = run_main(arguments)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def directions(root: Path, target: Path) -> dict[str, list[str]]:
    """Each command that writes, from a Hugging Face folder or a Megatron checkpoint made of it."""
    source = tiny_qwen(root / "source")
    there = {"load_checkpoint_path": source, "save_checkpoint_path": target}
    back = {"load_checkpoint_path": to_megatron(source, root / "megatron", pp=2), "save_checkpoint_path": target}
    return {
        "torch": words("hf-to-megatron", **there, pp=2),
        "torch_dist": words("hf-to-megatron", **there, ckpt_format="torch_dist"),
        "hf": words("megatron-to-hf", **back, max_shard_size="180KB"),
    }


def kill(root: Path) -> None:
    """Kills each command at its moments; fails unless the same command then ends as one that was never killed."""
    target, stderr = root / "target", root / "stderr"
    for name, command in directions(root, target).items():
        assert run_forked(command, stderr) == 0, stderr.read_text()
        complete = tree(target)
        shutil.rmtree(target)
        for moment in MOMENTS[name]:
            assert run_forked(command, stderr, moment) in (-signal.SIGKILL, -signal.SIGXFSZ), (
                moment,
                stderr.read_text(),
            )
            assert (target / ".unfinished").is_dir() and find_checkpoint(target) is None
            assert name != "hf" or not (target / "config.json").exists()
            print(name, moment)
        assert run_forked(command, stderr) == 0, stderr.read_text()
        assert tree(target) == complete
        shutil.rmtree(target)


def fill(root: Path) -> None:
    """Runs each command on file systems that are too small by many pages, by a few and by one."""
    disk, stderr = root / "disk", root / "stderr"
    for name, command in directions(root, disk / "target").items():
        assert run_forked(command, stderr) == 0, stderr.read_text()
        needed = sum(-(-len(content) // 4096) for content in tree(disk).values())
        shutil.rmtree(disk / "target")
        sizes = [*range(2, needed - 5, 50), *range(needed - 5, needed + 20)]
        for number, pages in enumerate(sizes):
            # What is known beforehand to have no room is not begun; here every second one is, and finds out.
            for direction in (hf_to_megatron, megatron_to_hf):
                direction.check_disk_space = check_disk_space if number % 2 else lambda *_: None
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "x", str(disk)], check=True)
            status, output = run_forked(command, stderr), stderr.read_text()
            left = [path.name for path in disk.rglob("*")]
            subprocess.run(["umount", str(disk)], check=True)
            if status == 0:
                break
            assert status == 2 and "Traceback" not in output, (name, pages, status, output)
            named = re.search(r" cannot be written: .*No space left on device.*: free some space", output)
            assert named, (name, pages, output)
            assert left in ([], ["target"]), (name, pages, left)
            print(name, pages)
        assert status == 0, (name, needed, output)


if __name__ == "__main__":
    unwanted = {"megatron", "transformers"} if TORCH >= (2, 4) else {"megatron"}  # torch 2.3 imports the other itself
    assert not unwanted & set(sys.modules), "common.convert needs neither"
    with tempfile.TemporaryDirectory() as place:
        {"kill": kill, "disk": fill}[sys.argv[1]](Path(place))
