"""A stopped run in FP8 with delayed scaling resumes with the same scales, digit for digit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_training import needs_transformer_engine, train, work

__all__ = ["work"]  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FP8: dict[str, Any] = {
    "train-iters": 6, "fp8-format": "hybrid", "fp8-recipe": "delayed", "deterministic": "true",
}  # fmt: skip


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_a_resumed_run_scales_as_the_uninterrupted_one(work: Path, ckpt_format: str) -> None:
    needs_transformer_engine()
    folder = work / f"fp8_{ckpt_format}"
    flags = {**FP8, "ckpt-format": ckpt_format, "save-checkpoint-path": folder / "uninterrupted"}
    uninterrupted = train(work, "transformer_engine", **flags)
    halves = {**flags, "save-checkpoint-path": folder / "halves", "exit-interval": 3}
    first = train(work, "transformer_engine", **halves)
    shutil.copytree(folder / "halves", folder / "forgotten")
    resumed = first + train(work, "transformer_engine", **halves)
    assert [iteration for iteration, _, _ in resumed] == [1, 2, 3, 4, 5, 6]
    assert resumed == uninterrupted
    if ckpt_format == "torch":
        (file,) = folder.glob("forgotten/iter_0000003/mp_rank_*/model_optim_rng.pt")
        state = torch.load(file, map_location="cpu", weights_only=False)  # written above
        assert any((scales["scaling_bwd"]["scale"] != 1).any() for scales in state.pop("fp8_state")[0].values())
        torch.save(state, file)
        forgotten = train(work, "transformer_engine", **{**halves, "save-checkpoint-path": folder / "forgotten"})
        assert forgotten != uninterrupted[3:]  # the losses show whether scales are reset
