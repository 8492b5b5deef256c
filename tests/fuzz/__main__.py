"""Many mutants of every kind of foreign input, to be run by hand.

    python -m tests.fuzz --number 100000 [--surface NAME ...] [--seed S] [--processes 2]

Chunks of cases run in separate processes; a line for each surface gives the results. Cases that raised anything
but KitError, or read wrongly, are saved as files; then the exit code is 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.bounds import MODULES, ROOT, SECONDS

CHUNK = 1000


@dataclass
class SurfaceResult:
    """Results of a surface's cases. escaped: the files of those that escaped; slowest: seconds; memory: bytes."""

    read: int = 0
    refused: int = 0
    slowest: float = 0.0
    memory: int = 0
    escaped: list[Path] = field(default_factory=list)

    @property
    def cases(self) -> int:
        """The number of all cases."""
        return self.read + self.refused + len(self.escaped)

    def add(self, name: str, seed: int, part: dict[str, Any], folder: Path) -> None:
        """Adds the result of a chunk."""
        self.read += part["read"]
        self.refused += part["refused"]
        self.slowest = max(self.slowest, part["slowest"])
        self.memory = max(self.memory, part["memory"])
        for number, (data, why) in enumerate(part["escaped"]):
            path = folder / f"{name}_{seed}_{number}"
            path.write_bytes(bytes.fromhex(data))
            path.with_suffix(".txt").write_text(why, errors="backslashreplace")
            self.escaped.append(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--number", type=int, default=1000, help="cases of each surface")
    parser.add_argument("--surface", nargs="+", choices=MODULES, default=list(MODULES), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    results = {name: SurfaceResult() for name in arguments.surface}
    chunks = [(name, *chunk) for name in arguments.surface for chunk in chunks_of(arguments.number, arguments.seed)]
    with ThreadPoolExecutor(arguments.processes) as pool:
        for done, (name, seed, part) in enumerate(pool.map(lambda chunk: run_chunk(*chunk), chunks), 1):
            results[name].add(name, seed, part, folder)
            escaped = sum(len(each.escaped) for each in results.values())
            print(f"\r{done} of {len(chunks)} chunks, {name}, {escaped} escaped ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print("surface            cases     read  refused  escaped  slowest  memory")
    for name, each in results.items():
        print(
            f"{name:16} {each.cases:7} {each.read:8} {each.refused:8} {len(each.escaped):8}"
            f" {each.slowest:6.2f} s {each.memory >> 20:4} MiB"
        )
    if any(each.escaped for each in results.values()):
        print(f"the cases that escaped, and why, are in {folder}")
        sys.exit(1)
    folder.rmdir()


def chunks_of(number: int, seed: int) -> Iterator[tuple[int, int]]:
    """(seed, cases) of each chunk."""
    for i in range(0, number, CHUNK):
        yield seed * 1_000_000 + i // CHUNK, min(CHUNK, number - i)


def run_chunk(name: str, seed: int, number: int) -> tuple[str, int, dict[str, Any]]:
    """(name, seed, result of a chunk); a process that dies or hangs is one case that escaped, the last one."""
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder) / "last"
        command = [sys.executable, "-m", "tests.fuzz.bounds", str(seed), f"{name}={number}", "--last", str(last)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=60 + number * SECONDS, check=True
            )
            return name, seed, json.loads(done.stdout)[name]
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            data = last.read_bytes() if last.exists() else b""
            why = f"the process ended: {error}\n{str(error.stderr)[-3000:]}"
            return name, seed, {"read": 0, "refused": 0, "escaped": [[data.hex(), why]], "slowest": 0.0, "memory": 0}


if __name__ == "__main__":
    main()
