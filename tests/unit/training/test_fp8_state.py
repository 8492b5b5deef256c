"""FP8's scales and amax histories, saved as plain tensors and restored into modules that create them when first used.

The modules are fakes of Transformer Engine's, which need a GPU: with `fp8_meta`, made in the first forward pass, whose
tensors the quantizers and the global buffers point to (pytorch/module/base.py and quantization.py of 2.11).
"""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.checkpoint.formats.torch_format import load_rank_file
from common.errors import KitError
from common.training.settings import TrainSettings
from common.training.state import fp8_state as module
from common.training.state.fp8_state import fp8_state, has_fp8_state, restore_fp8_state

LENGTH, FP8_MAX = 2, 448.0
INPUTS = (1, 2, 9, 1, 3, 5, 4, 8)  # the fourth step scales by the third's


class Linear(torch.nn.Module):
    """One FP8 tensor forward and one backward, scaled by what the last LENGTH steps had."""

    def __init__(self, buffers: list[Any], old: bool = False) -> None:
        super().__init__()
        self.buffers_of_all, self.old = buffers, old
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": object()}
        self.quantizers: dict[str, Any] = {}

    def init_fp8_meta_tensors(self, *recipes: str) -> None:
        for direction in ("scaling_fwd", "scaling_bwd"):
            state = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(LENGTH, 3))
            if self.old:
                state.scale_inv = torch.ones(3)
            self.fp8_meta[direction] = state if recipes != ("tensorwise",) else SimpleNamespace(dtype="e4m3")
            self.quantizers[direction] = state.scale, state.amax_history[0]

    def forward(self, value: torch.Tensor, *recipes: str) -> torch.Tensor:
        if "scaling_fwd" not in self.fp8_meta:
            self.init_fp8_meta_tensors(*recipes)
            if recipes != ("tensorwise",):
                self.buffers_of_all += self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"]
        if recipes != ("tensorwise",):
            for scale, amax in self.quantizers.values():
                amax.copy_(value.abs() * 3)
                value = (value * scale).clamp(-FP8_MAX, FP8_MAX).round() / scale
        return value


class Run:
    """Two layers, the second in a nested module, with the wrappers of chunks on a rank."""

    def __init__(self, old: bool = False) -> None:
        self.buffers: list[Any] = []
        inner = torch.nn.ModuleDict({"first": Linear(self.buffers, old), "norm": torch.nn.LayerNorm(2)})
        inner["deep"] = torch.nn.Sequential(Linear(self.buffers, old))
        self.layers = [inner["first"], inner["deep"][0]]
        wrapped = torch.nn.Module()
        wrapped.module = inner
        self.model = [wrapped]

    def step(self, number: int, *recipes: str) -> list[float]:
        value = torch.tensor([0.011, -0.3, 1.7]) * INPUTS[number]
        for layer in self.layers:
            value = layer(value, *recipes)
        for state in self.buffers:
            amax = state.amax_history.max(dim=0).values
            state.scale.copy_(torch.where(amax > 0, FP8_MAX / amax, state.scale))
            state.amax_history.copy_(torch.roll(state.amax_history, -1, 0))
            state.amax_history[0].fill_(0.0)
        return value.tolist()


def through_a_file(saved: Any, folder: Path) -> Any:
    """What is read of it without running code."""
    torch.save({"fp8_state": saved}, folder / "model_optim_rng.pt")
    return load_rank_file(folder / "model_optim_rng.pt")["fp8_state"]


@pytest.mark.parametrize("old", [False, True], ids=["Transformer Engine 2", "1"])
def test_a_resumed_run_scales_as_the_uninterrupted_one(old: bool, tmp_path: Path) -> None:
    recipes = () if old else ("delayed",)
    uninterrupted, first, resumed, anew = (Run(old) for _ in range(4))
    expected = [uninterrupted.step(number, *recipes) for number in range(6)]
    for number in range(3):
        first.step(number, *recipes)
    saved = through_a_file(fp8_state(first.model), tmp_path)
    assert [list(chunk) for chunk in saved] == [["first", "deep.0"]]
    restore_fp8_state(resumed.model, saved)
    assert [resumed.step(number, *recipes) for number in range(3, 6)] == expected[3:]
    assert anew.step(3, *recipes) != expected[3]
    assert all("init_fp8_meta_tensors" not in layer.__dict__ for layer in resumed.layers)


def test_what_was_loaded_is_saved_again_before_a_step(tmp_path: Path) -> None:
    first, between, last = Run(), Run(), Run()
    expected = [first.step(number, "delayed") for number in range(2)]
    restore_fp8_state(between.model, fp8_state(first.model))
    restore_fp8_state(between.model, fp8_state(between.model))  # twice is as once
    restore_fp8_state(last.model, through_a_file(fp8_state(between.model), tmp_path))
    expected.append(first.step(2, "delayed"))
    assert last.step(2, "delayed") == between.step(2, "delayed") == expected[2]


def test_a_module_that_ran_already_is_filled_in_place() -> None:
    first, other = Run(), Run()
    first.step(0, "delayed")
    other.step(7, "delayed")
    places = [state.scale.data_ptr() for state in other.buffers]
    restore_fp8_state(other.model, fp8_state(first.model))
    assert [state.scale.data_ptr() for state in other.buffers] == places
    assert other.step(1, "delayed") == first.step(1, "delayed")


def test_what_is_saved_is_a_copy_that_later_steps_leave_alone() -> None:
    run = Run()
    run.step(0, "delayed")
    saved = fp8_state(run.model)
    before = io.BytesIO()
    torch.save(saved, before)
    run.step(5, "delayed")
    after = io.BytesIO()
    torch.save(saved, after)
    assert before.getvalue() == after.getvalue()


def test_other_recipes_have_none() -> None:
    run = Run()
    run.step(0, "tensorwise")
    assert fp8_state(run.model) == [{}]
    required = {"save_checkpoint_path": "-", "dataset_path": "-", "train_iters": 1}
    found = {
        (form, recipe): has_fp8_state(TrainSettings(**required, fp8_format=form, fp8_recipe=recipe))
        for form in ("none", "hybrid")
        for recipe in ("delayed", "tensorwise")
    }
    assert [key for key, has in found.items() if has] == [("hybrid", "delayed")]


@pytest.mark.parametrize("engine", [None, (1, 6), (1, 5)])
def test_a_run_without_it_logs_that_scales_are_reset(
    engine: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, other = Run(), Run()
    first.step(0, "delayed")
    saved = fp8_state(first.model)
    monkeypatch.setattr(module, "transformer_engine_version", lambda: engine)
    caplog.set_level("INFO")
    assert bool(fp8_state(first.model)) == (engine != (1, 5))
    restore_fp8_state(other.model, saved)
    assert ("are reset" in caplog.text) == (engine == (1, 5))
    restore_fp8_state(other.model, None)
    restore_fp8_state(other.model, [])
    assert caplog.text.count("are reset") == (3 if engine == (1, 5) else 2)


def test_another_model_is_refused() -> None:
    first, other = Run(), Run()
    first.step(0, "delayed")
    (saved,) = fp8_state(first.model)
    with pytest.raises(
        KitError, match=r"has 2 chunk\(s\) per rank, and this model has 1; modules missing in this model: none"
    ):
        restore_fp8_state(other.model, [saved, saved])
    with pytest.raises(KitError, match=r"modules missing in this model: second: use"):
        restore_fp8_state(other.model, [{"second": saved["first"]}])
    wider = {"scaling_fwd": {"scale": torch.ones(6)}}
    restore_fp8_state(other.model, [{"first": wider}])
    with pytest.raises(
        KitError, match=r"FP8 scale of first \(scaling_fwd\) has the shape \[6\], and this run has one of"
    ):
        other.step(0, "delayed")
    restore_fp8_state(another := Run().model, [{"deep.0": saved["deep.0"]}])
    with pytest.raises(KitError, match=r"\(scaling_fwd\) has the shape \[3\], and this run has none: use"):
        another[0].module["deep"][0](torch.ones(3), "tensorwise")
