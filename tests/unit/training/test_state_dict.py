"""Weights are loaded into the model, and the optimizer's own copies of them come with the optimizer's state."""

import pytest
import torch

from common.errors import KitError
from common.training.checkpointing.state_dict import load_model_state_dict


class MasterWeights:
    """A mixed-precision optimizer's float32 copies of a bf16 model's weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.copies = [torch.full_like(p, 1 / 3, dtype=torch.float32) for p in model.parameters()]

    def reload_model_params(self) -> None:
        for copy, p in zip(self.copies, self.model.parameters(), strict=True):
            copy.copy_(p.data)


def test_the_model_is_loaded_and_the_master_weights_keep_every_bit() -> None:
    source, target = (torch.nn.Linear(2, 3, dtype=torch.bfloat16) for _ in range(2))
    optimizer = MasterWeights(target)
    load_model_state_dict([target], {"model": source.state_dict()})
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert all((copy == torch.tensor(1 / 3)).all() for copy in optimizer.copies)


def test_a_weight_too_few_or_too_many_is_an_error_and_extra_state_is_not() -> None:
    model = torch.nn.Linear(2, 3)
    complete = model.state_dict()
    load_model_state_dict([model], {"model": {**complete, "layer._extra_state": None}})
    for wrong in ({"weight": complete["weight"]}, {**complete, "other": complete["bias"]}):
        with pytest.raises(KitError, match="bias|other"):
            load_model_state_dict([model], {"model": wrong})
