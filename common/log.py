"""One logger for the kit: rank 0 speaks; other ranks speak only to warn, and say who they are."""

import logging
import os
import sys
import warnings

logger = logging.getLogger("kit")


def setup() -> None:
    """Sends `logger` to stderr with a time; ranks above 0 keep to warnings."""
    rank = int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # some schedulers set RANK
    name = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank else logging.INFO)


def quiet_libraries() -> None:
    """Drops the warnings that torch, Megatron-Core and others give at every start and that no user can act on.

    PYTHONWARNINGS brings them back: what it says is left as it is.
    """
    if not os.environ.get("PYTHONWARNINGS"):
        warnings.filterwarnings("ignore", module=r"(torch|megatron|apex|transformer_engine|cutlass)(\.|$)")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="Please use DTensor instead")


def listed(numbers: list[int], most: int = 16) -> str:
    """`numbers` with commas, at most so many of them, and how many more there are."""
    shown = ", ".join(map(str, numbers[:most])) or "none"
    return f"{shown} and {len(numbers) - most} more" if len(numbers) > most else shown
