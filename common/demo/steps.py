"""One step of the quickstart: a command that is printed, run, logged, and skipped once its result exists.

    WORK_DIR/steps/NAME.json     written when the command has ended well: the command, what it read, its seconds
    WORK_DIR/steps/lock          held by the run that is at work
    WORK_DIR/logs/NAME.log       all that it said

A step is done when it has that mark and its result is whole; a mark of another command or input is an error.
"""

import contextlib
import fcntl
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.errors import KitError
from common.files import write_json
from common.locks import lock

KIT = Path(__file__).parents[2]
WIDTH = 100
PORT = "MASTER_PORT"  # the scripts' default may be taken, as by a run of one's own
# The kit's own lines begin with a time; libraries' do not.
OUR_LINE = re.compile(r"\d\d:\d\d:\d\d (?P<text>.*)")
TRAINING_LINE = re.compile(r"iteration (?P<at>\d+)/(?P<of>\d+) .*\| loss (?P<loss>[\d.]+) .*\| (?P<left>[^|]* left)$")
DECLARED = re.compile(r'^: "\$\{([A-Z0-9_]+):=', re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """What is run, from the kit's folder, and the folder that it writes.

    settings: a script's environment; what the user's own environment says of the script's settings does not reach it.
    whole: whether `output` holds all that is to be there.
    resumes: the command itself goes on from what an interrupted run left in `output`.
    listens: its processes meet at a port.
    reads: the user's files; a change is seen by their size and time.
    """

    name: str
    title: str
    command: tuple[str, ...]
    output: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    whole: Callable[[Path], bool] = Path.is_dir
    resumes: bool = False
    listens: bool = False
    reads: tuple[Path, ...] = ()

    @property
    def parts(self) -> list[str]:
        """The command for a shell: each setting, the program with its script, and each flag with its value."""
        given = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        begins = [0, *(i for i, word in enumerate(self.command) if word.startswith("--")), len(self.command)]
        return [*given, *(shlex.join(self.command[begin:end]) for begin, end in pairwise(begins))]

    def identity(self) -> dict[str, Any]:
        """What decides the result; which Python runs it does not."""
        stats = {str(path): path.stat() for path in self.reads}
        times = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        return {"command": [*settings, *self.command[1:]], "reads": times}


def shown(path: Path) -> str:
    """`path` as it is written in a command that is run from the kit's folder."""
    return str(path.relative_to(KIT)) if path.is_relative_to(KIT) else str(path)


def wrap(parts: Sequence[str], indent: str) -> str:
    """The parts as one shell command over lines of at most WIDTH characters, where a part is no longer."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(indent) + len(lines[-1]) + len(part) + 3 > WIDTH:
            lines.append(part)
        else:
            lines[-1] += " " + part
    return " \\\n".join(indent + line for line in lines)


def said(line: str) -> str | None:
    """What a stranger is shown of a line of output: our own lines, those of training cut short; None for the rest."""
    ours = OUR_LINE.match(line)
    if not ours:
        return line if line.startswith("error: ") else None
    training = TRAINING_LINE.match(ours["text"])
    if not training:
        return ours["text"]
    return f"step {training['at']} of {training['of']} | loss {float(training['loss']):.3f} | {training['left']}"


def environment(step: Step) -> dict[str, str]:
    """The caller's environment, without the settings that the step's script declares, and with those of the step."""
    declared: set[str] = set()
    for word in step.command:
        if word.endswith(".sh"):
            declared |= set(DECLARED.findall((KIT / word).read_text(encoding="utf-8")))
    declared |= {"PYTHONPATH"} if step.command[0] == "bash" else set()  # the scripts set it
    kept = {name: value for name, value in os.environ.items() if name not in declared or name == PORT}
    kept["PYTHONIOENCODING"] = "utf-8"  # in which `_execute` reads, whatever the locale
    if step.listens:
        kept.setdefault(PORT, str(free_port()))
    return {**kept, **step.settings}


def free_port() -> int:
    """A port of this machine that nothing listens at, under those that the system gives to whoever asks for any."""
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise KitError("no port from 20000 to 29999 is free: set MASTER_PORT to one that is")


class Runner:
    """Runs steps in WORK_DIR, telling of each as `tell` prints it."""

    def __init__(self, work_dir: Path, steps: Sequence[Step], tell: Callable[[str], None]) -> None:
        self.work_dir, self.steps, self.tell = work_dir, steps, tell

    def mark(self, step: Step) -> Path:
        """The file that says that `step` is done."""
        return self.work_dir / "steps" / f"{step.name}.json"

    def log(self, step: Step) -> Path:
        """What `step` said, in all its runs."""
        return self.work_dir / "logs" / f"{step.name}.log"

    def run(self) -> None:
        """Runs each step that is not done.

        Raises KitError when one fails or was done with other settings before, or another run is at work in WORK_DIR.
        """
        with self._alone():
            self._run()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other runs out of WORK_DIR; the system lets it go when the process ends, however it does."""
        path = self.work_dir / "steps" / "lock"  # NFS locks no folder, and no file that is opened read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                lock(handle, f"WORK_DIR={self.work_dir}", fcntl.flock)
            except BlockingIOError as error:
                raise KitError(
                    f"another quickstart is at work in WORK_DIR={self.work_dir}: wait for it, or give another WORK_DIR"
                ) from error
            yield
        finally:
            os.close(handle)

    def _run(self) -> None:
        for step in self.steps:
            self._check_same(step)
        for number, step in enumerate(self.steps, 1):
            self.tell(f"\n[{number}/{len(self.steps)}] {step.title}")
            self.tell(wrap(step.parts, "    "))
            if self._is_done(step):
                self.tell("    done already")
                continue
            self._clear(step, self.steps[number:])
            began = time.monotonic()
            self._execute(step)
            seconds = time.monotonic() - began
            self.mark(step).parent.mkdir(parents=True, exist_ok=True)
            write_json(self.mark(step), {**step.identity(), "seconds": round(seconds, 1)})
            self.tell(f"    done in {seconds:.0f} s")

    def _marked(self, step: Step) -> dict[str, Any] | None:
        try:
            return json.loads(self.mark(step).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _check_same(self, step: Step) -> None:
        marked = self._marked(step)
        now = step.identity()
        if marked is None or all(marked.get(name) == value for name, value in now.items()):
            return
        different = sorted(set(now["command"]) ^ set(marked.get("command", [])))
        different += [path for path, stat in now["reads"].items() if marked.get("reads", {}).get(path) != stat]
        raise KitError(
            f"WORK_DIR={self.work_dir} holds a quickstart of other settings or data ({step.name}:"
            f" {', '.join(different)}): give another WORK_DIR, or remove this one to begin again"
        )

    def _is_done(self, step: Step) -> bool:
        return self._marked(step) is not None and step.whole(step.output)

    def _clear(self, step: Step, later: Sequence[Step]) -> None:
        """Removes what is left of a run of `step` that does not go on by itself, and what was made from it later."""
        for each in (step, *later):
            self.mark(each).unlink(missing_ok=True)
            if each is step and step.resumes:
                continue
            self.log(each).unlink(missing_ok=True)
            assert each.output.is_relative_to(self.work_dir)
            shutil.rmtree(each.output, ignore_errors=True)

    def _execute(self, step: Step) -> None:
        log = self.log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file, self._started(step) as process:
            assert process.stdout
            try:
                for line in process.stdout:
                    file.write(line)
                    if text := said(line.rstrip("\n")):
                        self.tell(f"    {text}")
            except BaseException:
                process.terminate()  # training saves, and stops
                process.wait()
                raise
        if process.returncode:
            last = log.read_text(encoding="utf-8").splitlines()[-12:]
            self.tell("\n".join(f"    | {line}" for line in last))
            raise KitError(
                f"step {step.name} ended with exit code {process.returncode}: all that it said is in {shown(log)};"
                " the same command goes on from here"
            )

    @staticmethod
    def _started(step: Step) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            step.command,
            cwd=KIT,
            env=environment(step),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
