"""AVERAGE: the mean of a run's newest checkpoints, whose verification computes it a second time."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint.formats.checkpoint_paths import require_checkpoint, write_tracker
from common.checkpoint.verification.verify import verify
from common.errors import KitError
from common.model.shape.config import load_config
from tests.conversion import to_hf, to_megatron
from tests.tiny import tiny_qwen

ITERATIONS = (100, 200, 300)
LAYOUTS = {"torch_dist": {}, "torch": {"ckpt_format": "torch", "tp": 2, "pp": 2}}


@pytest.fixture(scope="module", params=LAYOUTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with three checkpoints in bf16; hf_100 and so on are the models beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    for iteration in ITERATIONS:
        model = tiny_qwen(folder / f"hf_{iteration}", seed=iteration)
        to_megatron(model, folder / "one", dtype="bf16", **LAYOUTS[request.param])
        shutil.copytree(folder / "one", folder / "run", ignore=shutil.ignore_patterns("release"), dirs_exist_ok=True)
        shutil.move(folder / "one" / "release", folder / "run" / f"iter_{iteration:07d}")
        shutil.rmtree(folder / "one")
    write_tracker(folder / "run", 300)
    return folder / "run"


def models(run: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(run.parent / f"hf_{iteration}" / "model.safetensors") for iteration in ITERATIONS]


@pytest.mark.parametrize("number", [2, 3])
def test_the_newest_are_averaged_in_float32_and_rounded_once(run: Path, tmp_path: Path, number: int) -> None:
    written = load_file(to_hf(run, tmp_path / "mean", average=number) / "model.safetensors")
    newest = models(run)[-number:]
    for name, tensor in written.items():
        rounded = [model[name].bfloat16().double() for model in newest]
        assert torch.equal(tensor, torch.stack(rounded).mean(0).float().bfloat16()), name
    assert len(written) == len(newest[0])


def test_an_iteration_counts_those_before_it(run: Path, tmp_path: Path) -> None:
    written = load_file(to_hf(run / "iter_0000200", tmp_path / "mean", average=2) / "model.safetensors")
    name = "model.norm.weight"
    first, second = (model[name].bfloat16().float() for model in models(run)[:2])
    assert torch.equal(written[name], ((first + second) / 2).bfloat16())


def test_the_verification_tells_a_mean_from_the_newest(run: Path, tmp_path: Path) -> None:
    folder, qwen = to_hf(run, tmp_path / "mean", average=2), load_config(run)
    older, newest = (require_checkpoint(run / f"iter_{iteration:07d}") for iteration in (200, 300))
    assert not verify(folder, newest, qwen, earlier=[older]).errors
    assert len(verify(folder, newest, qwen).errors) > 20
    assert len(verify(folder, older, qwen, earlier=[newest, newest]).errors) > 20


@pytest.mark.parametrize(
    ("path", "number", "reason"),
    [
        (".", 4, r"AVERAGE=4: .*run has fewer checkpoints .*iter_0000100, iter_0000200, iter_0000300\)"),
        ("iter_0000100", 2, r"up to iter_0000100 \(iter_0000100\): set AVERAGE to their number, or keep more"),
        (".", 0, "AVERAGE=0: it must be at least 1"),
    ],
)
def test_fewer_checkpoints_are_refused(run: Path, tmp_path: Path, path: str, number: int, reason: str) -> None:
    with pytest.raises(KitError, match=reason):
        to_hf(run / path, tmp_path / "mean", average=number)
    assert not (tmp_path / "mean").exists()


def test_weights_only_have_nothing_to_average(tmp_path: Path) -> None:
    start = to_megatron(tiny_qwen(tmp_path / "hf"), tmp_path / "start")
    with pytest.raises(KitError, match=r"AVERAGE=2: .* up to release \(none\)"):
        to_hf(start, tmp_path / "mean", average=2)


def test_checkpoints_of_other_layouts_are_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    other = to_megatron(run.parent / "hf_300", tmp_path / "other", ckpt_format="torch", tp=2, pp=1, dtype="bf16")
    shutil.rmtree(tmp_path / "run" / "iter_0000300")
    shutil.move(other / "release", tmp_path / "run" / "iter_0000300")
    with pytest.raises(KitError, match="the checkpoints to average differ in their layout"):
        to_hf(tmp_path / "run", tmp_path / "mean", average=2)
