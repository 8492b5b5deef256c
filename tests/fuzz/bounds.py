"""Bounds of every case: it raises nothing but KitError, within SECONDS of CPU time and MEMORY, and runs no code.

    python -m tests.fuzz.bounds SEED NAME=NUMBER ... [--last FILE]      prints the results of each surface as JSON

FILE holds the case that is being read, for the parent to find if the process dies.
"""

import argparse
import errno
import importlib
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import KitError, describe_os_error

ROOT = Path(__file__).parents[2]
SECONDS, MEMORY = 5, 1 << 30
WAITING_SECONDS = 60  # by the clock, for a case that waits; a busy machine gives a process a tenth of its time
Case = Callable[[bytes], None]
Surface = Callable[[Path, int, int], tuple[Iterator[bytes], Case]]
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.remove",
        "shutil.rmtree", "ctypes.dlopen", "os.putenv")  # fmt: skip
CHECKPOINT = ("rank_file", "metadata", "common", "distcp", "config", "tokenizer_config")
DATA = ("rows", "jsonl", "json_array", "gzip", "zst", "index", "safetensors")
STATES = ("manifest", "part")
MODULES = dict.fromkeys(CHECKPOINT, "tests.fuzz.surfaces") | dict.fromkeys(DATA, "tests.fuzz.data_surfaces")
MODULES |= dict.fromkeys(STATES, "tests.fuzz.states")


class SlowError(BaseException):
    """A case took longer than SECONDS, or waited for WAITING_SECONDS."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--last", type=Path)
    arguments, results = parser.parse_args(), {}
    for name, count in (word.split("=") for word in arguments.cases):
        with tempfile.TemporaryDirectory() as folder:
            given, take = surface(name)(Path(folder), arguments.seed, int(count))
            results[name] = run(_write_each(given, arguments.last) if arguments.last else given, take)
    print(json.dumps(results))


def in_a_child(counts: dict[str, int], seed: int = 1) -> dict[str, Any]:
    """The results of `counts` cases of each surface, read in a separate process."""
    cases = [f"{name}={count}" for name, count in counts.items()]
    command = [sys.executable, "-m", "tests.fuzz.bounds", str(seed), *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def surface(name: str) -> Surface:
    """The surface `name`; what it needs is imported here."""
    made: Surface = importlib.import_module(MODULES[name]).SURFACES[name]
    return made


def _write_each(given: Iterator[bytes], last: Path) -> Iterator[bytes]:
    for data in given:
        last.write_bytes(data)
        yield data


def run(given: Iterator[bytes], take: Case) -> dict[str, Any]:
    """How many cases were read and refused, and of those that escaped: the bytes in hex, and why.

    slowest: CPU seconds; memory: the peak in bytes beyond what the process had before.
    """
    result: dict[str, Any] = {"read": 0, "refused": 0, "escaped": [], "slowest": 0.0, "memory": 0}
    ran: list[str] = []
    sys.addaudithook(lambda event, _: ran.append(event) if event in RUNS else None)
    signal.signal(signal.SIGPROF, _too_slow)
    signal.signal(signal.SIGALRM, _too_slow)
    pages, resident = (int(word) for word in Path("/proc/self/statm").read_text().split()[:2])
    held = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on (proc(5))
    for data in given:
        ran.clear()
        start = time.process_time()
        why = _outcome(take, data)
        result["slowest"] = max(result["slowest"], time.process_time() - start)
        if why in ("read", "refused") and not ran:
            result[why] += 1
        else:
            result["escaped"].append([data.hex(), f"{why} {ran or ''}"])
    result["memory"] = max(0, _peak() - resident * resource.getpagesize())
    return result


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def _too_slow(*_: Any) -> None:
    raise SlowError


def _outcome(take: Case, data: bytes) -> str:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WAITING_SECONDS)
    try:
        take(data)
    except KitError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                return "took too much memory"
            cause = cause.__cause__ or cause.__context__
        return "refused"
    except BaseException as error:
        if describe_os_error(error) and isinstance(error, OSError) and error.errno != errno.ENOMEM:
            return "refused"  # by the system; the commands report it in one line
        return traceback.format_exc()[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


if __name__ == "__main__":
    main()
