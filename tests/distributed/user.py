"""Step 3 as a user runs it: by its script, with its defaults for torchrun, data workers, overlap and saves."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.distributed.launch import ROOT, forked

MARK = "KIT_TEST_RUN"  # in the environment of whatever a run starts
# Sizes, not ways: a tiny model's steps, logged one by one.
TINY = {
    "SEQ_LENGTH": 32, "GLOBAL_BATCH_SIZE": 8, "LOG_INTERVAL": 1, "LR": 1e-3, "MIN_LR": 1e-4, "OMP_NUM_THREADS": 1,
}  # fmt: skip
ENDLESS = 100_000  # steps: the run ends by what a test does to it

RUNS: list["Run"] = []  # for conftest.py, which ends those that a failed test has left


def environment(settings: Mapping[str, Any]) -> dict[str, str]:
    """This process's environment with the settings of a tiny run in it."""
    given = {name: str(value) for name, value in {**TINY, **settings}.items()}
    return {**os.environ, "PYTHON": sys.executable, **given}


class Run:
    """A running step 3; `log` takes its stdout and stderr."""

    vendor = "cpu"

    def __init__(
        self, settings: Mapping[str, Any], log: Path, flags: tuple[str, ...] = (), *, nohup: bool = False
    ) -> None:
        self.folder, self.log = Path(settings["SAVE_CHECKPOINT_PATH"]), log
        command = ["bash", str(ROOT / self.vendor / "3_run_mcore_qwen.sh"), *(("--", *flags) if flags else ())]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env={**environment(settings), MARK: str(log)}, stdout=out, stderr=out, start_new_session=True,
                # Whether or not the tests themselves run under nohup.
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL),
            )  # fmt: skip
        RUNS.append(self)

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, words: str, seconds: float = 120) -> None:
        wait_for(lambda: words in self.text() or self.process.poll() is not None, seconds)
        assert words in self.text(), f"no {words!r} in:\n{self.text()[-6000:]}"

    def end(self, code: int, seconds: float = 240) -> str:
        """The log, when the command has ended with `code` and nothing that it started is left."""
        found = self.process.wait(seconds)
        assert found == code, f"exit code {found}:\n{self.text()[-6000:]}"
        wait_for(lambda: not self.processes(), 20)
        return self.text()

    def ranks(self) -> list[psutil.Process]:
        """The run's ranks, in their order."""
        children = [each for each in psutil.Process(self.process.pid).children() if "RANK" in each.environ()]
        return sorted(children, key=lambda each: int(each.environ()["RANK"]))

    def processes(self) -> list[int]:
        """Every process that the run has started and that is still alive."""
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_ours(path)]

    def _is_ours(self, process: Path) -> bool:
        try:
            if f"{MARK}={self.log}\0".encode() not in (process / "environ").read_bytes():
                return False
            return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:  # ended meanwhile
            return False

    def kill(self) -> None:
        """Kills the launcher as a power cut would; the rest must end by itself."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        wait_for(lambda: not self.processes(), 20)

    def tracker(self) -> int:
        return int((self.folder / "latest_checkpointed_iteration.txt").read_text())


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def step3(settings: Mapping[str, Any], log: Path, code: int = 0, **more: Any) -> str:
    """The log of step 3, which must end with exit code `code`."""
    return Run({**settings, **more}, log).end(code)


def step3_words(settings: Mapping[str, Any]) -> list[str]:
    """The flags that the script gives to `python -m common.train` with these settings."""
    script = ROOT / "cpu" / "3_run_mcore_qwen.sh"
    printed = subprocess.run(
        ["bash", script, "--dry-run"], env=environment(settings), capture_output=True, text=True, check=True
    )
    given = shlex.split(printed.stdout)
    return given[given.index("common.train") + 1 :]


def step3_forked(settings: Mapping[str, Any], code: int = 0) -> str:
    """`step3`'s log without torchrun: the command that the script prints is run in forked ranks (ranks.py).

    With `code` other than 0 the command's check must exit with it, and no rank is started.
    """
    flags = step3_words(settings)
    log = forked(0, "common.train", [*flags, "--check"], code)
    return log if code else log + forked(int(flags[flags.index("--gpus") + 1]), "common.train", flags)
