"""Graceful stop: SIGTERM, SIGINT, SIGHUP or SIGUSR1, to the launcher or to a rank, requests a save and an exit.

The launcher and the ranks block these signals in every thread, and one thread in each process waits for them. Child
processes of a rank inherit the mask and so ignore them: data workers, checkpoint writers, Megatron-Core's manager.
torchrun forwards what it receives to all of them (os.killpg in torch/distributed/elastic/multiprocessing/
subprocess_handler), and a data worker that dies of a signal takes its rank down with it.

The launcher forwards a request as SIGUSR1, once a second, since a rank may still be starting; a SIGTERM from it means
that torchrun ends the rank because another one has failed.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from common.log import logger

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
FORCING = (signal.SIGTERM, signal.SIGINT)  # the second of these ends the process immediately
DEBOUNCE_S = 0.5  # `timeout` and schedulers signal a process and its group: two within this time count as one
RESEND_S = 1.0
LAUNCHER_PID = "KIT_LAUNCHER_PID"  # in a rank's environment


def handled_signals() -> set[signal.Signals]:
    """STOP_SIGNALS, without SIGHUP where it is ignored, as under `nohup`."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return set(STOP_SIGNALS) - ignored


def block_stop_signals() -> None:
    """Blocks STOP_SIGNALS in this thread and those that it starts; to be called before libraries start their own.

    Otherwise a thread of numpy, CUDA or a TCPStore could receive a signal, and torchrun's handler would run.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


class StopRequests:
    """The requests to stop that this process has received; the waiting thread calls `on_first` and `on_second`.

    received: the first signal, None before. launcher_pid: 0 in the launcher itself.
    """

    def __init__(
        self,
        on_first: Callable[[signal.Signals], None],
        on_second: Callable[[signal.Signals], None],
        launcher_pid: int = 0,
    ) -> None:
        self.on_first, self.on_second, self.launcher_pid = on_first, on_second, launcher_pid
        self.received: signal.Signals | None = None
        self._forced_at: float | None = None
        self._signals = handled_signals()
        block_stop_signals()
        for each in self._signals:  # for threads that a library has started before
            signal.signal(each, lambda number, _: self.receive(signal.Signals(number)))
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            info = signal.sigwaitinfo(self._signals)
            self.receive(signal.Signals(info.si_signo), info.si_pid)

    def receive(self, number: signal.Signals, sender_pid: int = 0) -> None:
        """Handles a signal; sender_pid: 0 if unknown."""
        if number == signal.SIGTERM and self.launcher_pid and sender_pid == self.launcher_pid:
            os._exit(128 + number)  # another rank has failed, and this one may wait for it forever
        first = self.received is None
        self.received = self.received or number
        if first:
            self.on_first(number)
        if number in FORCING:
            now = time.monotonic()
            if self._forced_at is not None and now - self._forced_at > DEBOUNCE_S:
                self.on_second(number)
            self._forced_at = self._forced_at or now


def listen_in_rank() -> StopRequests:
    """A rank's requests: training checks `received` after each step; a second request ends the process immediately."""
    launcher_pid = int(os.environ.get(LAUNCHER_PID, "0"))
    return StopRequests(lambda number: None, lambda number: os._exit(128 + number), launcher_pid)


def listen_in_launcher() -> StopRequests:
    """The launcher's requests: the first is forwarded to the ranks, the second kills them.

    While no rank is running, the first ends the launcher.
    """
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # since torch 2.8; earlier, its handlers receive nothing

    def forward(number: signal.Signals) -> None:
        if not _ranks():
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(128 + number)
        logger.info(
            "%s: stop requested: the run saves after its current step and exits; a second Ctrl-C or SIGTERM ends it"
            " immediately, without saving", number.name,
        )  # fmt: skip
        threading.Thread(target=_keep_forwarding, name="forward stop request", daemon=True).start()

    def kill(number: signal.Signals) -> None:
        logger.warning("%s again: ended immediately; progress since the last checkpoint is lost", number.name)
        for rank in _ranks():
            rank.kill()
        sys.stderr.flush()
        os._exit(128 + number)

    return StopRequests(forward, kill)


def _keep_forwarding() -> None:
    while True:
        for rank in _ranks():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)
        time.sleep(RESEND_S)


def _ranks() -> list[psutil.Process]:
    """The ranks among this process's children: torchrun runs in this process."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "TORCHELASTIC_RUN_ID" in child.environ():
                found.append(child)
    return found
