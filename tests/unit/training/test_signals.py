"""Stop signals: recorded, counted and passed on, each sent to a separate process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.training.launching.signals import LAUNCHER_PID

ROOT = Path(__file__).parents[3]
# Each line on its input is answered with the signal it received, once the thread that waits has nothing left to take.
RANK = """
import signal, sys, time
from common.training.launching import signals
from common.training.launching.signals import block_stop_signals, listen_in_rank
signals.DEBOUNCE_S = float(sys.argv[1]) if sys.argv[1:] else signals.DEBOUNCE_S
block_stop_signals()
requests = listen_in_rank()
print("ready", flush=True)
for line in sys.stdin:
    while signal.sigpending() & requests._signals:
        time.sleep(0.01)
    time.sleep(0.1)
    print(requests.received and requests.received.name, flush=True)
"""


class Rank:
    """A process that handles signals as a rank does."""

    def __init__(self, program: str = RANK, *words: str, launcher: int = 0, nohup: bool = False) -> None:
        self.process = subprocess.Popen(
            ["nohup"] * nohup + [sys.executable, "-c", program, *words],
            cwd=ROOT, env={**os.environ, LAUNCHER_PID: str(launcher)}, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def received(self) -> str:
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        return self.line()

    def send(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def ends(self) -> int:
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()
            self.process.communicate()


def test_the_first_term_is_noted_and_one_soon_after_it_is_the_same() -> None:
    rank = Rank(RANK, "30")  # DEBOUNCE_S, half a second by itself: a busy machine may take longer between two lines
    assert rank.received() == "None"
    for _ in range(3):  # as `timeout` does: to the process, and to its group
        rank.send(signal.SIGTERM)
        assert rank.received() == "SIGTERM"
    rank.process.kill()
    rank.ends()


def test_a_later_term_ends_at_once() -> None:
    rank = Rank()
    rank.send(signal.SIGTERM)
    assert rank.received() == "SIGTERM"
    time.sleep(0.6)
    rank.send(signal.SIGTERM)
    assert rank.ends() == 128 + signal.SIGTERM


def test_only_a_repeated_signal_ends_the_process() -> None:
    rank = Rank()
    rank.send(signal.SIGUSR1)
    assert rank.received() == "SIGUSR1"
    time.sleep(0.6)
    rank.send(signal.SIGUSR1, signal.SIGHUP)  # the launcher polls each second
    assert rank.received() == "SIGUSR1"
    rank.send(signal.SIGINT)  # the first to insist, long after the request
    assert rank.received() == "SIGUSR1"
    time.sleep(0.6)
    rank.send(signal.SIGINT)
    assert rank.ends() == 128 + signal.SIGINT


def test_term_from_the_launcher_ends_at_once() -> None:
    rank = Rank(launcher=os.getpid())
    rank.send(signal.SIGUSR1)
    assert rank.received() == "SIGUSR1"
    rank.send(signal.SIGTERM)
    assert rank.ends() == 128 + signal.SIGTERM


@pytest.mark.parametrize("nohup", [True, False])
def test_a_hangup_stops_the_run_but_not_under_nohup(nohup: bool) -> None:
    rank = Rank(nohup=nohup)
    rank.send(signal.SIGHUP)
    assert rank.received() == ("None" if nohup else "SIGHUP")
    rank.send(signal.SIGTERM)
    assert rank.received() == ("SIGTERM" if nohup else "SIGHUP")
    rank.process.kill()
    rank.ends()


def test_processes_started_by_a_rank_block_its_signals() -> None:
    program = RANK.replace(
        'print("ready"',
        """
import json, os, subprocess, threading
masks = [subprocess.run([sys.executable, "-c", "import signal; print(*map(int, signal.pthread_sigmask(0, ())))"],
                        capture_output=True, text=True).stdout.split()]
read, write = os.pipe()
if not os.fork():
    os.write(write, " ".join(str(int(each)) for each in signal.pthread_sigmask(0, ())).encode())
    os._exit(0)
masks.append(os.read(read, 1000).decode().split())
thread = threading.Thread(target=lambda: masks.append([str(int(each)) for each in signal.pthread_sigmask(0, ())]))
thread.start()
thread.join()
print("ready", flush=True)
print(json.dumps(masks)""",
    )
    rank = Rank(program)
    masks = json.loads(rank.line())
    rank.process.kill()
    rank.ends()
    expected = {str(int(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}
    assert len(masks) == 3
    for mask in masks:
        assert expected <= set(mask), masks


# Has a child, which is a rank with "rank" as its word, and has it answer each line.
LAUNCHER_PROGRAM = f"""
import os, subprocess, sys
from common import log
from common.training.launching.signals import block_stop_signals, listen_in_launcher
log.setup()
block_stop_signals()
listen_in_launcher()
of_a_rank = {{"TORCHELASTIC_RUN_ID": "none"}} if sys.argv[1:] == ["rank"] else {{}}
child = subprocess.Popen([sys.executable, "-c", {RANK!r}], env=os.environ | of_a_rank, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(child.stdout.readline().strip(), flush=True)
for line in sys.stdin:
    print(file=child.stdin, flush=True)
    print(child.stdout.readline().strip(), flush=True)
"""


def test_the_launcher_stops_its_ranks_and_kills_them_at_the_second_signal() -> None:
    launcher = Rank(LAUNCHER_PROGRAM, "rank")
    launcher.send(signal.SIGTERM)
    for _ in range(100):  # its thread is on its way
        if launcher.received() != "None":
            break
    assert launcher.received() == "SIGUSR1"  # not TERM, of which a rank that its launcher ends would die
    (child,) = psutil.Process(launcher.process.pid).children()
    time.sleep(0.6)
    launcher.send(signal.SIGINT)
    assert launcher.ends() == 128 + signal.SIGINT
    assert child in psutil.wait_procs([child], 10)[0]


def test_a_launcher_without_ranks_ends_at_the_first_signal_whatever_else_it_has_started() -> None:
    launcher = Rank(LAUNCHER_PROGRAM)
    launcher.send(signal.SIGTERM)
    assert launcher.process.wait(10) == 128 + signal.SIGTERM
    assert launcher.process.stderr and launcher.process.stderr.readline() == "interrupted\n"
    launcher.ends()
