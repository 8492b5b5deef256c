"""How a run is asked to stop: TERM, INT, HUP and USR1, to the launcher or to a rank, wherever they come from.

Launcher and ranks keep these signals blocked in every thread, and one thread of each waits for them. Whatever a rank
starts inherits the mask, and so hears none of them: data workers, the writers of a checkpoint, Megatron-Core's manager.
torchrun sends what it is sent to all of them (os.killpg in torch/distributed/elastic/multiprocessing/
subprocess_handler), and a data worker that dies of it takes its rank along.

The launcher passes a request on as USR1, again each second, since a rank may just be starting; TERM from it means
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
INSISTENT = (signal.SIGTERM, signal.SIGINT)  # the second of these ends at once
DOUBLE_S = 0.5  # `timeout` and schedulers signal a process and its group: within so long two are one
RESEND_S = 1.0
LAUNCHER = "KIT_LAUNCHER_PID"  # in a rank's environment
STOPPED = 75  # exit code: stopped before the end, saved, the same command goes on (EX_TEMPFAIL of sysexits.h)


def handled_signals() -> set[signal.Signals]:
    """STOP_SIGNALS, without HUP where it is ignored: `nohup` asked for that."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    return set(STOP_SIGNALS) - ignored


def hold() -> None:
    """Blocks them in this thread and those that it starts; to be called before libraries start their own.

    numpy's, CUDA's and the stores' threads would take a signal else, and torchrun's handler run.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


class Requests:
    """The requests to stop that this process has heard; `on_first` and `on_second` are called by the waiting thread.

    sender of a signal: the process that sent it, 0 where it is not known.
    """

    def __init__(
        self, on_first: Callable[[signal.Signals], None], on_second: Callable[[signal.Signals], None], launcher: int = 0
    ) -> None:
        self.on_first, self.on_second, self.launcher = on_first, on_second, launcher
        self.heard: signal.Signals | None = None
        self._insisted_at: float | None = None
        self._signals = handled_signals()
        hold()
        for each in self._signals:  # for a thread that a library started before this
            signal.signal(each, lambda received, _: self.receive(signal.Signals(received)))
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            info = signal.sigwaitinfo(self._signals)
            self.receive(signal.Signals(info.si_signo), info.si_pid)

    def receive(self, number: signal.Signals, sender: int = 0) -> None:
        """Takes note of a signal."""
        if number == signal.SIGTERM and self.launcher and sender == self.launcher:
            os._exit(128 + number)  # another rank has failed, and this one may wait for it for ever
        first = self.heard is None
        self.heard = self.heard or number
        if first:
            self.on_first(number)
        if number in INSISTENT:
            now = time.monotonic()
            if self._insisted_at is not None and now - self._insisted_at > DOUBLE_S:
                self.on_second(number)
            self._insisted_at = self._insisted_at or now


def listen_in_rank() -> Requests:
    """A rank's requests: it acts on `heard` at its next step, and ends at once where it is told twice."""
    return Requests(lambda number: None, lambda number: os._exit(128 + number), int(os.environ.get(LAUNCHER, "0")))


def listen_in_launcher() -> Requests:
    """The launcher's requests: its ranks are asked to stop as it is, and end at once when it is told twice.

    While none is running, it ends at once itself.
    """
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch from 2.8 on; before, its handlers never get one

    def ask(number: signal.Signals) -> None:
        if not _ranks():
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(128 + number)
        logger.info(
            "%s: asked to stop: the run saves after its current step and ends; a second Ctrl-C or SIGTERM ends it at"
            " once, without saving", number.name,
        )  # fmt: skip
        threading.Thread(target=_keep_asking, name="ask ranks", daemon=True).start()

    def end(number: signal.Signals) -> None:
        logger.warning("%s again: ended at once; what was not saved before is lost", number.name)
        for rank in _ranks():
            rank.kill()
        sys.stderr.flush()
        os._exit(128 + number)

    return Requests(ask, end)


def _keep_asking() -> None:
    while True:
        for rank in _ranks():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGUSR1)
        time.sleep(RESEND_S)


def _ranks() -> list[psutil.Process]:
    """The ranks among the processes that this one has started: torchrun runs in it."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "TORCHELASTIC_RUN_ID" in child.environ():
                found.append(child)
    return found
