"""One logger for the kit: rank 0 speaks; other ranks speak only to warn, and say who they are."""

import logging
import os
import sys

logger = logging.getLogger("kit")


def setup() -> None:
    """Sends `logger` to stderr with a time; ranks above 0 keep to warnings."""
    rank = int(os.environ.get("RANK", "0"))
    name = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank else logging.INFO)
