"""EXPORT_HF: step 2 follows the saves, in a process beside training, on the CPU.

SAVE_CHECKPOINT_PATH/hf/iter_0000100 is the model of that checkpoint, `hf/last` or `hf/best` a link to it, and
`hf/export.log` what step 2 printed.
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from common.checkpoint.formats.checkpoint_paths import iteration_dir
from common.errors import describe_os_error
from common.log import logger
from common.start import KIT, WORKING_DIR

FOLDER, LOG = "hf", "export.log"
# Run by the child before step 2: it ends with the rank, as everything of a run does.
CHILD = (
    "import os, runpy, sys; from common.training.launching.parent_death import set_parent_death_signal as end;"
    " end(); os.nice(10); sys.argv[0] = 'common.convert'; runpy.run_module('common.convert', run_name='__main__')"
)
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


class HfExporter:
    """Exports checkpoints one after the other; on rank 0. Errors are logged: an export never ends a run."""

    def __init__(self, policy: str, folder: Path, *, adapters: bool = False) -> None:
        self.policy, self.folder, self.adapters = policy, folder, adapters
        self._waiting: list[int] = []
        self._exporting: tuple[int, subprocess.Popen[bytes]] | None = None

    @property
    def needed(self) -> set[int]:
        """The iterations whose checkpoints are still to be read."""
        return {*self._waiting, *([self._exporting[0]] if self._exporting else [])}

    def add(self, iteration: int, *, is_best: bool) -> None:
        """Has the new checkpoint exported, if the policy is to; with `last` and `best` instead of one that waits."""
        if self.policy == "none" or (self.policy == "best" and not is_best):
            return
        if self.policy != "each":
            self._waiting.clear()
        self._waiting.append(iteration)
        self.poll()

    def poll(self) -> bool:
        """Logs an export that has ended and starts the next; returns whether none is left."""
        if self._exporting and self._exporting[1].poll() is not None:
            self._finish(*self._exporting)
            self._exporting = None
        if self._waiting and not self._exporting:
            iteration = self._waiting.pop(0)
            try:
                self._exporting = iteration, self._start(iteration)
            except OSError as error:
                logger.warning("EXPORT_HF: iteration %d is not exported: %s", iteration, describe_os_error(error))
        return not self._exporting and not self._waiting

    def stop(self) -> None:
        """Ends the export that runs, if any, and drops what waits; for a run that is to stop at once."""
        left = sorted(self.needed)
        if self._exporting:
            self._exporting[1].kill()
            self._exporting[1].wait()
        self._exporting, self._waiting = None, []
        if left:
            names = ", ".join(map(str, left))
            logger.warning("EXPORT_HF: the run stops before iterations %s are exported: run step 2 for them", names)

    def _target(self, iteration: int) -> Path:
        return iteration_dir(self.folder / FOLDER, iteration)

    def _start(self, iteration: int) -> "subprocess.Popen[bytes]":
        (self.folder / FOLDER).mkdir(exist_ok=True)
        target = self._target(iteration)
        # An export of a run that was set back to an earlier checkpoint.
        if any((target / name).exists() for name in ("config.json", "adapter_config.json")):
            shutil.rmtree(target)
        flags = ["--load-checkpoint-path", iteration_dir(self.folder, iteration), "--save-checkpoint-path", target]
        flags += ["--export", "adapter"] if self.adapters else []
        environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
        environment[WORKING_DIR] = str(Path.cwd())
        command = [sys.executable, "-c", CHILD, "megatron-to-hf", *map(str, flags)]
        with (self.folder / FOLDER / LOG).open("ab") as log:
            return subprocess.Popen(command, env=environment, cwd=KIT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _finish(self, iteration: int, process: "subprocess.Popen[bytes]") -> None:
        target = self._target(iteration)
        if process.returncode:
            log = self.folder / FOLDER / LOG
            logger.warning("EXPORT_HF: iteration %d is not exported: %s: see %s", iteration, _last_line(log), log)
            return
        link = target
        if self.policy != "each":
            link = self.folder / FOLDER / self.policy
            try:
                self._replace(link, target)
            except OSError as error:
                logger.warning("EXPORT_HF: %s does not name %s: %s", link, target.name, describe_os_error(error))
        logger.info("exported iteration %d: %s", iteration, link)

    def _replace(self, link: Path, target: Path) -> None:
        """Has `link` name `target`, and removes the export that it named before."""
        before = link.parent / link.readlink() if link.is_symlink() else None
        new = link.with_name(f"{link.name}.new")
        with suppress(FileNotFoundError):
            new.unlink()
        new.symlink_to(target.name)
        new.replace(link)
        if before and before.name != target.name and before.parent == target.parent:
            shutil.rmtree(before, ignore_errors=True)


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"
    return "its log cannot be read"
