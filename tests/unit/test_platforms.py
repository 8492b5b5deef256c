"""The platforms are data: one for each vendor's folder, told by KIT_PLATFORM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import KitError
from common.platforms import PLATFORMS, current

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
