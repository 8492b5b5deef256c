"""Copies between host and device; tests/gpu runs them beside computation."""

import torch

from common.training.state.async_copy import copy_async


def test_without_a_device_copies_are_made_at_once() -> None:
    target = torch.zeros(2)
    copies = copy_async(None, [(target, torch.ones(2))])
    assert target.tolist() == [1.0, 1.0]
    copies.wait()
    copies.synchronize()
    assert not copies.pairs
