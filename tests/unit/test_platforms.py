"""The platforms are data: one for each vendor's folder, told by KIT_PLATFORM."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common import platforms
from common.errors import KitError
from common.platforms import PLATFORMS, check_machine, current, detect
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA

ROOT = Path(__file__).parents[2]


def test_every_vendors_folder_has_a_platform_of_its_name() -> None:
    assert {path.parent.name for path in ROOT.glob("*/env.sh")} == set(PLATFORMS)
    assert all(name == platform.name for name, platform in PLATFORMS.items())


@pytest.mark.parametrize("name", PLATFORMS)
def test_the_environment_names_the_platform(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_PLATFORM", name)
    assert current().name == name


@pytest.mark.parametrize("name", [None, "", "NVIDIA", "tpu"])
def test_an_unknown_platform_is_refused_with_the_known_ones(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIT_PLATFORM", raising=False)
    if name is not None:
        monkeypatch.setenv("KIT_PLATFORM", name)
    with pytest.raises(KitError, match=f"KIT_PLATFORM='{name or ''}' is no platform: start a script of cpu/") as raised:
        current()
    assert all(f"{known}/" in str(raised.value) for known in PLATFORMS)


@pytest.mark.parametrize("name", PLATFORMS)
def test_facts_are_ones_the_kit_knows(name: str) -> None:
    platform = PLATFORMS[name]
    assert platform.transformer_impl in ("transformer_engine", "local")
    assert platform.checkpoint_format in ("torch_dist", "torch")
    assert (platform.device, platform.backend) in {("cuda", "nccl"), ("cpu", "gloo")}
    assert platform.device == "cuda" or not platform.peak_tflops


def test_reading_the_facts_loads_no_torch() -> None:
    program = "import sys, common.platforms; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, timeout=60).returncode == 0


def test_a_cpu_stands_in_for_a_gpu_once_it_is_prepared() -> None:
    program = """
import torch
from common.platforms import current
assert torch.zeros(1).type() == "torch.FloatTensor"
current().prepare()
made = torch.ones(3, device="cuda") + torch.ones(3).to("cuda") + torch.ones(3).cuda(torch.cuda.current_device())
assert made.device.type == "cpu" and made.tolist() == [3.0, 3.0, 3.0]
assert made.type() == "torch.cuda.FloatTensor"
torch.cuda.synchronize()
torch.cuda.Stream().wait_stream(torch.cuda.current_stream())
state = torch.cuda.get_rng_state()
first = torch.rand(4)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(4), first)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KIT_PLATFORM": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def torch_of(version: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `version` the torch that package metadata finds; None: none."""
    if version:
        metadata = folder / f"torch-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.delenv("MACA_PATH", raising=False)
    monkeypatch.setattr(platforms, "NVIDIA_DRIVER", folder / "driver")


def test_metax_is_told_by_its_torch_or_its_sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_of("2.1.2+metax2.27.0.8", tmp_path, monkeypatch)
    (tmp_path / "driver").touch()
    assert detect() == "metax"
    check_machine(METAX)
    with pytest.raises(KitError, match=r"KIT_PLATFORM=nvidia, but torch 2.1.2\+metax.* is MetaX's: use the .* metax/"):
        check_machine(NVIDIA)


def test_without_metaxs_torch_only_an_sdk_that_is_there_tells_metax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_of("2.3.0a0+40ec155e58.nv24.3", tmp_path, monkeypatch)
    monkeypatch.setenv("MACA_PATH", str(tmp_path / "maca"))  # metax/env.sh sets it whether it is there or not
    assert detect() == "cpu"
    with pytest.raises(KitError, match=r"KIT_PLATFORM=metax, but torch 2.3.0a0\S* is not MetaX's.*scripts of cpu/"):
        check_machine(METAX)
    (tmp_path / "driver").touch()
    assert detect() == "nvidia"
    check_machine(NVIDIA)
    (tmp_path / "maca").mkdir()
    assert detect() == "metax"
    check_machine(METAX)


def test_a_bare_machine_is_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_of(None, tmp_path, monkeypatch)
    assert detect() == "cpu"
    check_machine(CPU)


def test_the_tests_switch_changes_the_device_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_PLATFORM", "metax")
    monkeypatch.setenv("KIT_TEST_ON_CPU", "true")
    found = current()
    assert found == replace(METAX, name=found.name, device="cpu", backend="gloo", prepare=CPU.prepare)
    assert found.name == "metax on a CPU, for tests"
    monkeypatch.setenv("KIT_TEST_ON_CPU", "")
    assert current() is METAX


def test_no_script_and_no_image_sets_the_tests_switch() -> None:
    used = [path for pattern in ("*.sh", "*Dockerfile") for path in ROOT.rglob(pattern) if "tests" not in path.parts]
    assert len(used) > 15
    assert not [path for path in used if "KIT_TEST_ON_CPU" in path.read_text()]
