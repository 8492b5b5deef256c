"""A port of this machine for the processes of one run to meet at."""

import contextlib
import random
import socket

from common.errors import KitError

# Below Linux's ephemeral ports, which a connection out of this machine may take at any time, and MASTER_PORT's default.
PORTS = range(20000, 29000)


def free_port() -> int:
    """A free port of PORTS, at random, so that runs which start at once take different ones; KitError without any.

    Nothing keeps it until it is used.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise KitError(f"no free port found from {PORTS[0]} to {PORTS[-1]}: set MASTER_PORT to a free one")
