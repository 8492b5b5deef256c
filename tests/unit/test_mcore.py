"""Which Megatron-Core is installed, and what follows from it; installed versions are real folders on sys.path."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from common import mcore
from common.errors import KitError

ROOT = Path(__file__).parents[2]


def install(folder: Path, version: str, monkeypatch: pytest.MonkeyPatch, name: str = "megatron-core") -> None:
    """Makes `version` the one that Python's own package metadata finds."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(folder)])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.11.0", (0, 11)),
        ("0.14.0rc7+a4306f7", (0, 14)),
        ("0.16.1", (0, 16)),
    ],
)
def test_a_supported_version_is_read(
    text: str, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    assert mcore.version() == expected


WORK = (
    "this kit works with 0.11.0 beside torch 2.1 (MetaX's maca 2.27), 0.14.0 beside torch 2.2 to 2.5 (NVIDIA's NGC"
    " 24.03) and 0.16.1 beside torch 2.6 or later (a CPU, NGC 24.12 and later): pip install --no-deps"
    " megatron-core==VERSION, the one"
)


@pytest.mark.parametrize(
    "text", ["0.9.0", "0.10.0", "0.12.3", "0.13.1", "0.15.3", "0.17.0", "0.17rc1", "1.0.0", "1.11.0", "1.16", "1", "x"]
)
def test_any_other_version_is_refused_with_those_that_work_and_where(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    with pytest.raises(KitError, match=f"^{re.escape(f'megatron-core {text} is installed, and {WORK}')}"):
        mcore.version()


def test_a_missing_megatron_core_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(KitError, match=f"^megatron-core is not installed, and {re.escape(WORK)}"):
        mcore.version()


def test_the_releases_that_are_told_are_those_that_are_locked_built_and_tried() -> None:
    told = {text.split()[0] for text in mcore.SUPPORTED.values()}
    assert {f"{major}.{minor}" for major, minor in mcore.SUPPORTED} == {text.rpartition(".")[0] for text in told}
    images = (ROOT / "docker").glob("*.Dockerfile")
    locked = [*(ROOT / "requirements").glob("*.txt"), *images]
    assert told == set(found(r"(?:megatron-core==|MEGATRON_CORE=)(\d+\.\d+\.\d+)", *locked))
    assert told == set(found(r"(?m)^[\w.-]+ +3\.\d+ +2\.\d+\.\d+ +(\S+) ", ROOT / "tests" / "lanes.sh"))


def found(pattern: str, *paths: Path) -> list[str]:
    """All that `pattern` finds in the files."""
    return [text for path in paths for text in re.findall(pattern, path.read_text())]


@pytest.mark.parametrize(
    "text, kind, those",
    [
        ("0.11.0", "fully_sharded_model_space", "megatron-core 0.14"),
        ("0.16.1", "fully_sharded_model_space", "megatron-core 0.14"),
        ("0.16.1", "of_tomorrow", "no supported version"),
    ],
)
def test_an_optimizer_that_the_version_does_not_load_is_refused(
    text: str, kind: str, those: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    told = f"/run holds the optimizer as {kind}, which {those} loads; {text[:4]} is installed: use"
    with pytest.raises(KitError, match=f"^{told} .* from the weights alone: set LOAD_CHECKPOINT_PATH"):
        mcore.check_optimizer_sharding(kind, Path("/run"), same_ranks=True)


@pytest.mark.parametrize("text", ["0.11.0", "0.14.0", "0.16.1"])
def test_the_oldest_layout_loads_everywhere_at_its_own_sizes_alone(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, text, monkeypatch)
    mcore.check_optimizer_sharding("dp_zero_gather_scatter", Path("/run"), same_ranks=True)
    with pytest.raises(KitError, match="loads at its own TP, PP and VPP alone; use those, or go on from the weights"):
        mcore.check_optimizer_sharding("dp_zero_gather_scatter", Path("/run"), same_ranks=False)
    mcore.check_optimizer_sharding(mcore.OPTIMIZER_SHARDING, Path("/run"), same_ranks=False)


@pytest.mark.parametrize("same_ranks", [True, False])
def test_what_0_14_saved_goes_on_under_0_14_at_any_sizes(
    same_ranks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "0.14.0", monkeypatch)
    mcore.check_optimizer_sharding("fully_sharded_model_space", Path("/run"), same_ranks=same_ranks)


@pytest.mark.parametrize(("text", "numpy_version"), [("0.14.0", "1.26.4"), ("0.16.1", "2.2.6")])
def test_what_fits_is_let_pass(text: str, numpy_version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, text, monkeypatch)
    install(tmp_path, numpy_version, monkeypatch, "numpy")
    mcore.check_installed()


def test_numpy_2_is_refused_before_megatron_core_0_16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "0.14.0", monkeypatch)
    install(tmp_path, "2.2.6", monkeypatch, "numpy")
    with pytest.raises(
        KitError, match="^numpy 2.2.6 is installed, and megatron-core 0.14 needs numpy before 2: pip inst"
    ):
        mcore.check_installed()


def test_numpy_without_dtypes_has_the_one_class_that_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy.dtypes", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    mcore.mend_numpy_without_dtypes()
    mended = sys.modules.pop("numpy.dtypes")
    assert mended.UInt32DType is type(numpy.dtype("uint32"))


def test_old_torch_reads_what_later_ones_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import MEM_FORMAT_ENCODING
    from torch.distributed.checkpoint import metadata

    monkeypatch.delattr(metadata, "_MEM_FORMAT_ENCODING")
    mcore.mend_metadata_of_newer_torch()
    assert metadata._MEM_FORMAT_ENCODING is MEM_FORMAT_ENCODING


@pytest.mark.parametrize("packaged", [True, False], ids=["with __init__.py", "a namespace"])
def test_a_checkout_that_stands_before_the_installed_package_is_refused(
    packaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = mcore.check_origin()
    assert installed.parts[-3:] == ("megatron", "core", "__init__.py")
    core = tmp_path / "Megatron-LM" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise SystemExit('it was run')\n")
    if packaged:
        (core.parent / "__init__.py").write_text("raise SystemExit('it was run')\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "Megatron-LM")])
    if not packaged:
        assert mcore.check_origin() == installed  # behind the package it is not what is loaded
    monkeypatch.setattr(sys, "path", [str(tmp_path / "Megatron-LM"), *sys.path])
    with pytest.raises(KitError, match=f"loads {core}/__init__.py, not the installed .* out of PYTHONPATH"):
        mcore.check_origin()


class _DecoupledAdam(torch.optim.Adam):
    """As Transformer Engine's FusedAdam with use_decoupled_grad: it reads, and clears, another attribute than grad."""

    use_decoupled_grad = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for each in group["params"]:
                self.state[each] = {"exp_avg": torch.zeros_like(each)}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                each.decoupled_grad = None


class _WatchedAdam(torch.optim.Adam):
    """Tells how much memory the gradients of its step took."""

    gradients: set[int]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.gradients = {each.grad.untyped_storage().data_ptr() for g in self.param_groups for each in g["params"]}
        self.gradient_bytes = max(g["params"][0].grad.untyped_storage().nbytes() for g in self.param_groups)
        super().step()


@pytest.mark.parametrize("adam", [_DecoupledAdam, _WatchedAdam])
def test_making_the_optimizers_state_leaves_no_gradient(adam: type[torch.optim.Adam]) -> None:
    """What stayed there made a run of 7B that fits end out of memory when it was resumed."""
    weights = [torch.nn.Parameter(torch.ones(size)) for size in ((3,), (4, 5), (2, 2))]
    optimizer = adam(weights, lr=0.0)
    mcore.make_optimizer_state(SimpleNamespace(optimizer=optimizer))
    assert [each.grad for each in weights] == [None] * 3
    assert all(torch.equal(optimizer.state[each]["exp_avg"], torch.zeros_like(each)) for each in weights)
    assert all(torch.equal(each, torch.ones_like(each)) for each in weights)
    if isinstance(optimizer, _WatchedAdam):
        assert len(optimizer.gradients) == 1, "the zeros of the largest parameter do for all"
        assert optimizer.gradient_bytes == 4 * 20
