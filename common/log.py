"""The kit's logger: rank 0 logs everything, other ranks only warnings, with their rank."""

import logging
import os
import sys
import warnings

logger = logging.getLogger("kit")


def setup() -> None:
    """Sends `logger` to stderr with timestamps; ranks above 0 log warnings only."""
    rank = int(os.environ.get("RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # some schedulers set RANK
    name = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if rank else logging.INFO)


def quiet_libraries() -> None:
    """Filters warnings that torch, Megatron-Core and others raise at every start and that no user can act on.

    PYTHONWARNINGS, where it is set, decides instead.
    """
    if not os.environ.get("PYTHONWARNINGS"):
        warnings.filterwarnings("ignore", module=r"(torch|megatron|apex|transformer_engine|cutlass)(\.|$)")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", message="Please use DTensor instead")


def listed(numbers: list[int], limit: int = 16) -> str:
    """`1, 2, 3`; `none` for an empty list; `1, 2 and 40 more` above `limit` numbers."""
    shown = ", ".join(map(str, numbers[:limit])) or "none"
    return f"{shown} and {len(numbers) - limit} more" if len(numbers) > limit else shown
