"""Nodes on one machine: network namespaces joined by a bridge, with addresses, host names and mounts of their own."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PREFIX = f"kit{os.getpid()}"
HUB = f"{PREFIX}-hub"
PORT = 29500  # a port of its own in each namespace


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    """Why this machine cannot have such nodes; None where it can."""
    try:
        ip("netns", "add", HUB)
    except FileNotFoundError:
        return "no `ip` here (package iproute2)"
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    ip("netns", "del", HUB)
    return None


class Run:
    """A command on a node; `log` takes its stdout and stderr."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log, self.began = process, log, time.monotonic()

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for(self, words: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while words not in self.text():
            assert time.monotonic() < end and self.process.poll() is None, f"no {words!r} in:\n{self.text()[-6000:]}"
            time.sleep(0.1)

    def end(self, code: int, seconds: float = 400) -> str:
        """The log, when the command has exited with `code` within `seconds` of its start."""
        try:
            found = self.process.wait(max(1.0, self.began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text()[-6000:]}") from None
        assert found == code, f"exit code {found}:\n{self.text()[-6000:]}"
        return self.text()


class Node:
    """Number `index` of a network."""

    def __init__(self, index: int, logs: Path) -> None:
        self.name, self.namespace = f"node{index}", f"{PREFIX}-node{index}"
        self.address, self.link, self.logs = f"10.77.0.{index + 1}", f"v{index}", logs
        self.runs = 0

    def plug(self) -> None:
        ip("netns", "add", self.namespace)
        ip("link", "add", self.link, "netns", HUB, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("-n", HUB, "link", "set", self.link, "master", "bridge", "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")

    def cut(self) -> None:
        """Cuts the connection: packets are dropped silently."""
        ip("-n", HUB, "link", "set", self.link, "down")

    def kill(self) -> None:
        """Cuts the power: every process of the node is killed at once."""
        for pid in ip("netns", "pids", self.namespace).split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def start(
        self, command: Sequence[str], settings: Mapping[str, Any], mounts: Mapping[Path, Path] | None = None
    ) -> Run:
        """Starts `command` with the settings in its environment; `mounts` are target: source, visible only here."""
        self.runs += 1
        log = self.logs / f"{self.name}.{self.runs}.log"
        lines = [f"hostname {self.name}"]
        for target, source in (mounts or {}).items():
            lines.append(f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(target))}")
        inside = ["unshare", "--uts", "--mount", "bash", "-ec", "\n".join([*lines, 'exec "$@"']), "bash"]
        given = {name: str(value) for name, value in settings.items()}
        environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **given}
        with log.open("w") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *inside, *command], env=environment, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Run(process, log)

    def train(self, mounts: Mapping[Path, Path] | None = None, kit: Path = ROOT, **settings: Any) -> Run:
        """Starts step 3 there, as a user does."""
        named = {name.upper(): value for name, value in settings.items()}
        return self.start(["bash", str(kit / "cpu" / "3_run_mcore_qwen.sh")], named, mounts)


@contextmanager
def network(num_nodes: int, logs: Path) -> Iterator[list[Node]]:
    """`count` nodes that reach each other; at the end all processes on them are killed."""
    nodes = [Node(index, logs) for index in range(num_nodes)]
    logs.mkdir(parents=True, exist_ok=True)
    try:
        ip("netns", "add", HUB)
        ip("-n", HUB, "link", "add", "bridge", "type", "bridge")
        ip("-n", HUB, "link", "set", "bridge", "up")
        for node in nodes:
            node.plug()
        yield nodes
    finally:
        existing = {line.split()[0] for line in ip("netns", "list").splitlines() if line}
        for node in nodes:
            if node.namespace in existing:
                node.kill()
                ip("netns", "del", node.namespace)
        if HUB in existing:
            ip("netns", "del", HUB)
