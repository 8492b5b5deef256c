"""What `verify --logits` reports of two models' outputs, worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from common.logits import BOUND, compare


def outputs(**changed: Tensor) -> dict[str, Tensor]:
    parts = {
        "embedding": torch.tensor([[2.0, -4.0], [1.0, 1.0]]),
        "layer 0": torch.ones(2, 2),
        "layer 1": torch.ones(2, 2),
    }
    return {**parts, "logits": torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), **changed}


def test_the_same_outputs_agree() -> None:
    lines, first = compare(outputs(), outputs())
    assert first is None
    assert lines == [
        "2 tokens, 4 places; the largest difference is 0.0e+00 of the largest value, at embedding",
        "logits: largest difference 0.0e+00, KL 0.0e+00, the same most likely token at 100.0%",
    ]


def test_divergence_and_agreement_are_of_theirs_from_mine() -> None:
    # Theirs 1/4, 3/4 and 1/2, 1/2; mine 3/4, 1/4 at the first token: KL = (1/4 log(1/3) + 3/4 log 3) / 2 = log(3) / 4.
    mine = outputs(logits=torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]))
    lines, first = compare(mine, outputs())
    assert first == "logits"
    assert lines == [
        "2 tokens, 4 places; the largest difference is 1.0e+00 of the largest value, at logits",
        f"logits: largest difference {math.log(3):.1e}, KL {math.log(3) / 4:.1e}, the same most likely token at 50.0%",
    ]
    # The other way it is another: theirs 9/10, 1/10, mine 1/2, 1/2.
    theirs = outputs(logits=torch.tensor([[math.log(9), 0.0], [0.0, 0.0]]))
    lines, _ = compare(outputs(logits=torch.zeros(2, 2)), theirs)
    expected = (0.9 * math.log(1.8) + 0.1 * math.log(0.2)) / 2
    assert f"KL {expected:.1e}," in lines[1]


@pytest.mark.parametrize(("difference", "name"), [(0.9, None), (1.1, "embedding"), (-1.1, "embedding")])
def test_the_bound_is_a_share_of_the_largest_value(difference: float, name: str | None) -> None:
    theirs = outputs()
    mine = outputs(embedding=theirs["embedding"] + torch.tensor([[0.0, 0.0], [difference * BOUND * 4, 0.0]]))
    lines, first = compare(mine, theirs)
    assert first == name and f"the largest difference is {abs(difference) * BOUND:.1e}" in lines[0]


def test_the_first_is_named_in_the_models_order_and_the_worst_beside_it() -> None:
    mine = outputs(**{"layer 0": torch.ones(2, 2) + 0.01, "layer 1": torch.ones(2, 2) * 3})
    lines, first = compare(mine, outputs())
    assert first == "layer 0" and lines[0].endswith("2.0e+00 of the largest value, at layer 1")


def test_a_nan_value_is_far_off() -> None:
    mine = outputs(**{"layer 1": torch.tensor([[1.0, float("nan")], [1.0, 1.0]])})
    lines, first = compare(mine, outputs())
    assert first == "layer 1" and lines[0].endswith("inf of the largest value, at layer 1")
