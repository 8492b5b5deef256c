"""A rank's file is what `torch.save` makes of the same state, and is read without running code."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint.formats.torch_format import load_rank_file, save_rank_files
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.errors import KitError
from tests.unit.checkpoint.small import bitwise_equal


def test_torch_loads_a_ranks_file(tmp_path: Path) -> None:
    path, progress = tmp_path / "mp_rank_00" / "model_optim_rng.pt", []
    weight = torch.randn(3, 2).bfloat16()
    model = {"w": LazyTensor((3, 2), torch.bfloat16, lambda: [[weight]]), "v": torch.ones(2)}
    save_rank_files({path: {"args": Namespace(a=1), "iteration": 0, "model": model}}, progress.append)
    loaded = torch.load(path, weights_only=False)
    assert list(loaded) == ["args", "iteration", "model"] and loaded["args"] == Namespace(a=1)
    assert bitwise_equal(loaded["model"]["w"], weight) and progress == [12, 8]
    assert bitwise_equal(load_rank_file(path)["model"]["w"], weight)


def test_what_torch_saves_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    state: dict[str, Any] = {"model": {"w": torch.randn(3)}, "optimizer": {0: torch.tensor(3.0)}, "iteration": 5}
    torch.save(state, path)
    loaded = load_rank_file(path)
    assert bitwise_equal(loaded["model"]["w"], state["model"]["w"]) and loaded["iteration"] == 5
    assert loaded["optimizer"][0] == 3


def test_an_unrelated_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "model_optim_rng.pt"
    with pytest.raises(KitError, match=r"model_optim_rng\.pt cannot be read \(No such file"):
        load_rank_file(path)
    for content in ([1], {1: 2}):
        torch.save(content, path)
        with pytest.raises(KitError, match=r"model_optim_rng\.pt holds no dict with str keys: it is not a Megatron"):
            load_rank_file(path)
    for weights in (1, {1: torch.ones(2)}):
        torch.save({"model0": weights}, path)
        with pytest.raises(KitError, match=r"model_optim_rng\.pt: its model0 is no dict with str keys: it is not"):
            load_rank_file(path)
