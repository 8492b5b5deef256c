"""What is reported of a kernel that fails, on one rank or on many."""

import pytest
import torch

from common.model.probe import UnusableError, describe_failures, find_fault, need, outcome, try_on_all_ranks


def raised(error: BaseException) -> str:
    def attempt() -> None:
        raise error

    part, failure = outcome(attempt)
    assert part is None
    return failure


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UnusableError("it is made for Hopper GPUs"), "it is made for Hopper GPUs"),
        (ModuleNotFoundError("No module named 'quack'", name="quack"), "no module quack"),
        (ImportError("libcute.so: no such file"), "ImportError: libcute.so: no such file"),
        (TypeError("\n takes 1 argument\n  at line 3"), "TypeError: takes 1 argument"),
        (AssertionError(), "AssertionError: no message"),
        (SystemExit(3), "SystemExit: 3"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_every_exception_becomes_one_line(error: BaseException, line: str) -> None:
    assert raised(error) == line


def test_ctrl_c_is_no_failure_of_a_kernel() -> None:
    with pytest.raises(KeyboardInterrupt):
        raised(KeyboardInterrupt())


def test_without_a_process_group_this_process_decides() -> None:
    assert try_on_all_ranks(lambda: 7) == (7, "")
    assert try_on_all_ranks(lambda: need("no such tile")) == (None, "no such tile")
    assert try_on_all_ranks(lambda: need("")) == (None, "")


@pytest.mark.parametrize(
    ("failures", "line"),
    [
        (["no module quack"] * 4, "no module quack"),
        (["", "E: a", "", ""], "E: a (rank 1 of 4)"),
        (["E: a", "", "E: b", "E: a"], "E: a (ranks 0, 3 of 4); E: b (rank 2 of 4)"),
        (["E: a", "E: b"], "E: a (rank 0 of 2); E: b (rank 1 of 2)"),
        ([""] + ["E: a"] * 1023, "E: a (ranks 1, 2, 3, 4, 5, 6, 7, 8 and 1015 more of 1024)"),
    ],
)
def test_the_line_names_the_ranks_unless_all_fail_alike(failures: list[str], line: str) -> None:
    assert describe_failures(failures) == line


def test_nan_results_are_a_fault_wherever_they_are() -> None:
    one = torch.ones(3)
    assert find_fault(lambda: [one, one], lambda: [one, one]) == ""
    assert find_fault(lambda: [one, one * float("nan")], lambda: [one, one]) == "its results are off by nan%"
