"""A kernel's trial before a run: whether what it gives is there, and right, on every rank; else no rank takes it.

Optional packages and compilers fail in any way, and on some ranks alone: QuACK's import raised a TypeError on some of
four, which then waited for each other. What fails is caught here and nowhere else, and all ranks decide together.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

TOLERANCE = 0.02  # of the largest value: bf16 has 8 bits
PROBED = 320  # tokens: more than one tile of every kernel
REPEATS = 3  # runs that must give the same bits, where torch is to be deterministic
NAMED = 8  # ranks that a message names

Part = TypeVar("Part")


class UnusableError(Exception):
    """Why a kernel cannot be used, as it is to be logged."""


def outcome(attempt: Callable[[], Part]) -> tuple[Part | None, str]:
    """(what `attempt` gives, "") or, whatever it raised but Ctrl-C, (None, why in one line)."""
    try:
        return attempt(), ""
    except UnusableError as error:
        return None, str(error)
    except ModuleNotFoundError as error:
        return None, f"no module {error.name}"
    except (Exception, SystemExit) as error:  # whatever a vendor's package, its kernel or its compiler raises
        text = str(error).strip()
        return None, f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def tried(attempt: Callable[[], Part]) -> tuple[Part | None, str]:
    """(what `attempt` gives, "") where it succeeds on all ranks, else on all of them (None, why, and on which).

    A collective call: each rank makes as many in the same order, one that has nothing to try with an attempt that
    cannot fail.
    """
    part, failure = outcome(attempt)
    failure = agreed(failure)
    return (None, failure) if failure else (part, "")


def agreed(failure: str) -> str:
    """Empty where it is on every rank, else the same text on all: each failure, with the ranks if it is not all ranks'.

    A collective call where torch.distributed has begun; alone, `failure` itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return failure
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    works = torch.tensor([not failure], dtype=torch.int32, device=device)
    dist.all_reduce(works, op=dist.ReduceOp.MIN)
    if works.item():
        return ""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, failure)
    return tell_ranks([str(each or "") for each in found])


def tell_ranks(failures: list[str]) -> str:
    """The failures of the ranks, in their order and empty where there is none, as one line."""
    ranks: dict[str, list[int]] = {}
    for rank, failure in enumerate(failures):
        if failure:
            ranks.setdefault(failure, []).append(rank)
    if [len(each) for each in ranks.values()] == [len(failures)]:
        return failures[0]
    return "; ".join(f"{failure} ({_name(given)} of {len(failures)})" for failure, given in ranks.items())


def _name(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:NAMED]))
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


def need(fault: str) -> None:
    """Raises UnusableError with `fault`, unless it is empty."""
    if fault:
        raise UnusableError(fault)


def find_fault(kernel: Callable[[], list[torch.Tensor]], exact: Callable[[], list[torch.Tensor]]) -> str:
    """Why `kernel` cannot be used; empty where its tensors are within TOLERANCE of those of `exact`, in float32.

    Where torch is to be deterministic, it must give the same bits REPEATS times.
    """
    return outcome(lambda: _compare(kernel, exact))[1]


def _compare(kernel: Callable[[], list[torch.Tensor]], exact: Callable[[], list[torch.Tensor]]) -> None:
    found = kernel()
    if torch.are_deterministic_algorithms_enabled():
        same = all(all(map(torch.equal, found, kernel())) for _ in range(REPEATS - 1))
        need("" if same else "its results differ from run to run")
    for mine, right in zip(found, exact(), strict=True):
        off = float((mine.to(right.device).float() - right).abs().max() / right.abs().max())
        need("" if off <= TOLERANCE else f"its results are off by {off:.1%}")  # and where `off` is no number
