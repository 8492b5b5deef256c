"""One step of the quickstart: a command that is printed, run, logged, and skipped once its result exists.

    WORK_DIR/steps/NAME.json     written when the command has succeeded: the command, its input files, its seconds
    WORK_DIR/steps/lock          held by the running quickstart
    WORK_DIR/logs/NAME.log       the output

A step is done if that file exists and its result is complete; a file of another command or input is an error.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
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
from common.ports import free_port

KIT = Path(__file__).parents[2]
WIDTH = 100
PORT = "MASTER_PORT"  # the scripts' default may be in use, for example by another run
# The kit's log lines begin with a time; those of libraries do not.
OUR_LINE = re.compile(r"\d\d-\d\d \d\d:\d\d:\d\d (?P<text>.*)")
TRAINING_LINE = re.compile(
    r"iteration (?P<at>\d+)/(?P<of>\d+) +(?P<loss>[\d.]+) .*?  (?P<left>(\d+ d )?\d+:\d\d:\d\d)$"
)
HEADING = re.compile(r" +loss  ")  # of the columns of these lines
DECLARED = re.compile(r'^: "\$\{([A-Z0-9_]+):=', re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """A command, run from the kit's folder, and the folder that it writes.

    settings: the script's settings; those in the user's environment are not passed to it.
    is_complete: whether `output` is complete.
    resumes: whether the command itself resumes an interrupted run from `output`.
    uses_port: whether its processes rendezvous at MASTER_PORT.
    reads: the user's files; a change is detected by size and time.
    """

    name: str
    title: str
    command: tuple[str, ...]
    output: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    is_complete: Callable[[Path], bool] = Path.is_dir
    resumes: bool = False
    uses_port: bool = False
    reads: tuple[Path, ...] = ()

    @property
    def parts(self) -> list[str]:
        """The command for a shell, in parts: each setting, the program with its script, each flag with its value."""
        given = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        begins = [0, *(i for i, word in enumerate(self.command) if word.startswith("--")), len(self.command)]
        return [*given, *(shlex.join(self.command[begin:end]) for begin, end in pairwise(begins))]

    def identity(self) -> dict[str, Any]:
        """What determines the result: the command, without the Python that runs it, and the input files."""
        stats = {str(path): path.stat() for path in self.reads}
        times = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
        settings = [f"{name}={value}" for name, value in self.settings.items()]
        return {"command": [*settings, *self.command[1:]], "reads": times}


def shown(path: Path) -> str:
    """`path` relative to the kit's folder if it is inside, otherwise absolute."""
    return str(path.relative_to(KIT)) if path.is_relative_to(KIT) else str(path)


def wrap(parts: Sequence[str], indent: str) -> str:
    """The parts as one shell command, on lines of at most WIDTH characters unless a part is longer."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(indent) + len(lines[-1]) + len(part) + 3 > WIDTH:
            lines.append(part)
        else:
            lines[-1] += " " + part
    return " \\\n".join(indent + line for line in lines)


def displayed(line: str) -> str | None:
    """The text to display for a line of output: the kit's own lines, shortened for training; None for the rest."""
    ours = OUR_LINE.match(line)
    if ours and HEADING.match(ours["text"]):
        return None
    if not ours:
        return line if line.startswith("error: ") else None
    training = TRAINING_LINE.match(ours["text"])
    if not training:
        return ours["text"]
    return f"step {training['at']} of {training['of']} | loss {float(training['loss']):.3f} | {training['left']} left"


def environment(step: Step) -> dict[str, str]:
    """The caller's environment with the step's settings, and without others that its script declares."""
    declared: set[str] = set()
    for word in step.command:
        if word.endswith(".sh"):
            declared |= set(DECLARED.findall((KIT / word).read_text(encoding="utf-8")))
    declared |= {"PYTHONPATH"} if step.command[0] == "bash" else set()  # the scripts set it
    inherited = {name: value for name, value in os.environ.items() if name not in declared or name == PORT}
    inherited["PYTHONIOENCODING"] = "utf-8"  # as `_execute` reads it, independent of the locale
    if step.uses_port:
        inherited.setdefault(PORT, str(free_port()))
    return {**inherited, **step.settings}


class Runner:
    """Runs steps in WORK_DIR; prints their progress with `print_line`."""

    def __init__(self, work_dir: Path, steps: Sequence[Step], print_line: Callable[[str], None]) -> None:
        self.work_dir, self.steps, self.print_line = work_dir, steps, print_line

    def mark(self, step: Step) -> Path:
        """The file whose existence marks `step` as done."""
        return self.work_dir / "steps" / f"{step.name}.json"

    def log(self, step: Step) -> Path:
        """The log of `step`, with the output of all its runs."""
        return self.work_dir / "logs" / f"{step.name}.log"

    def run(self) -> None:
        """Runs each step that is not done.

        Raises KitError if one fails or was done with other settings before, or another run is active in WORK_DIR.
        """
        with self._locked():
            self._run()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Locks WORK_DIR against other runs; the system releases the lock when the process ends in any way."""
        path = self.work_dir / "steps" / "lock"  # NFS locks neither folders nor files that are opened read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                lock(handle, f"WORK_DIR={self.work_dir}", fcntl.flock)
            except BlockingIOError as error:
                raise KitError(
                    f"another quickstart is running in WORK_DIR={self.work_dir}: wait for it, or use another WORK_DIR"
                ) from error
            yield
        finally:
            os.close(handle)

    def _run(self) -> None:
        for step in self.steps:
            self._check_same(step)
        for number, step in enumerate(self.steps, 1):
            self.print_line(f"\n[{number}/{len(self.steps)}] {step.title}")
            self.print_line(wrap(step.parts, "    "))
            if self._is_done(step):
                self.print_line("    done already")
                continue
            self._clear(step, self.steps[number:])
            began = time.monotonic()
            self._execute(step)
            seconds = time.monotonic() - began
            self.mark(step).parent.mkdir(parents=True, exist_ok=True)
            write_json(self.mark(step), {**step.identity(), "seconds": round(seconds, 1)})
            self.print_line(f"    done in {seconds:.0f} s")

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
            f"WORK_DIR={self.work_dir} holds a quickstart with other settings or data ({step.name}:"
            f" {', '.join(different)}): use another WORK_DIR, or remove this one to start over"
        )

    def _is_done(self, step: Step) -> bool:
        return self._marked(step) is not None and step.is_complete(step.output)

    def _clear(self, step: Step, later: Sequence[Step]) -> None:
        """Removes the output of an interrupted `step` that cannot resume, and of the steps after it."""
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
                    if text := displayed(line.rstrip("\n")):
                        self.print_line(f"    {text}")
            except BaseException:
                process.terminate()  # training saves and stops
                process.wait()
                raise
        if process.returncode:
            last = log.read_text(encoding="utf-8").splitlines()[-12:]
            self.print_line("\n".join(f"    | {line}" for line in last))
            raise KitError(
                f"step {step.name} ended with exit code {process.returncode}: its output is in {shown(log)}; the same"
                " command resumes from here"
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
