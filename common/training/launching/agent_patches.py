"""What of torchrun's elastic agent is done otherwise here."""

from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext


def limit_shutdown(seconds: int) -> None:
    """Makes torchrun kill ranks `seconds` after its SIGTERM where a rank has failed too.

    Its variable counts only when it is stopped itself (_stop_workers in elastic/agent/server/local_elastic_agent.py):
    after a failure, or before a restart, it waits 30 s for a rank that hangs. torch 2.11 does not know the variable.
    """
    close = PContext.close

    def close_soon(self: Any, death_sig: Any = None, timeout: int = 30) -> None:
        close(self, death_sig, min(timeout, seconds))

    PContext.close = close_soon  # type: ignore[method-assign]


def keep_rendezvous() -> None:
    """Lets ranks restart with torch 2.3.0, whose agent closes the rendezvous whenever it stops ranks.

    A restart then ends in a RendezvousClosedError (pytorch/pytorch issue 123678). At its own end the agent still closes
    it (`run` in elastic/agent/server/api.py).
    """
    stop = LocalElasticAgent._stop_workers

    def stop_ranks(self: Any, *given: Any, **named: Any) -> None:
        handler = getattr(self, "_rdzv_handler", None)
        self._rdzv_handler = None
        try:
            stop(self, *given, **named)
        finally:
            self._rdzv_handler = handler

    LocalElasticAgent._stop_workers = stop_ranks  # type: ignore[method-assign]
