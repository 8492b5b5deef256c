"""Tests of optional kernels before a run: one that fails, or is wrong, on any rank is used on none.

Optional packages and compilers may fail in any way, and on some ranks only: QuACK's import raised a TypeError on some
of four ranks, and the others hung. Such failures are caught only here, and all ranks decide together.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

TOLERANCE = 0.02  # relative to the largest value: bf16 has 8 bits of precision
PROBED = 320  # tokens: more than one tile of every kernel
REPEATS = 3  # runs that must give the same bits in torch's deterministic mode
NAMED = 8  # ranks listed in a message

Part = TypeVar("Part")


class UnusableError(Exception):
    """Why a kernel cannot be used, as text for the log."""


def outcome(attempt: Callable[[], Part]) -> tuple[Part | None, str]:
    """(the result of `attempt`, ""), or (None, the error in one line) for anything it raises but KeyboardInterrupt."""
    try:
        return attempt(), ""
    except UnusableError as error:
        return None, str(error)
    except ModuleNotFoundError as error:
        return None, f"no module {error.name}"
    except (Exception, SystemExit) as error:  # whatever a vendor's package, its kernel or its compiler raises
        text = str(error).strip()
        return None, f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def try_on_all_ranks(attempt: Callable[[], Part]) -> tuple[Part | None, str]:
    """(the result of `attempt`, "") if it succeeds on all ranks, otherwise on all ranks (None, why and on which).

    A collective call: all ranks make the same calls in the same order, those with nothing to test with an attempt that
    cannot fail.
    """
    part, failure = outcome(attempt)
    failure = agree_on_failure(failure)
    return (None, failure) if failure else (part, "")


def agree_on_failure(failure: str) -> str:
    """Empty if `failure` is on every rank; otherwise one text for all ranks that lists each failure with its ranks.

    A collective call if torch.distributed is initialized; otherwise returns `failure`.
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
    return describe_failures([str(each or "") for each in found])


def describe_failures(failures: list[str]) -> str:
    """The failures of the ranks, in rank order and empty for a rank without one, as one line."""
    ranks: dict[str, list[int]] = {}
    for rank, failure in enumerate(failures):
        if failure:
            ranks.setdefault(failure, []).append(rank)
    if [len(each) for each in ranks.values()] == [len(failures)]:
        return failures[0]
    return "; ".join(f"{failure} ({_name(failed)} of {len(failures)})" for failure, failed in ranks.items())


def _name(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:NAMED]))
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


def need(fault: str) -> None:
    """Raises UnusableError with `fault`, unless it is empty."""
    if fault:
        raise UnusableError(fault)


def find_fault(kernel: Callable[[], list[torch.Tensor]], reference: Callable[[], list[torch.Tensor]]) -> str:
    """Why `kernel` cannot be used; empty if its tensors are within TOLERANCE of the float32 ones of `reference`.

    In torch's deterministic mode it must also give the same bits REPEATS times.
    """
    return outcome(lambda: _compare(kernel, reference))[1]


def _compare(kernel: Callable[[], list[torch.Tensor]], reference: Callable[[], list[torch.Tensor]]) -> None:
    found = kernel()
    if torch.are_deterministic_algorithms_enabled():
        same = all(all(map(torch.equal, found, kernel())) for _ in range(REPEATS - 1))
        need("" if same else "its results differ from run to run")
    for actual, expected in zip(found, reference(), strict=True):
        error = float((actual.to(expected.device).float() - expected).abs().max() / expected.abs().max())
        need("" if error <= TOLERANCE else f"its results are off by {error:.1%}")  # also for NaN
