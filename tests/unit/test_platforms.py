"""The platforms are data: one for each vendor's folder, selected by KIT_PLATFORM."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common import platforms
from common.errors import KitError
from common.platforms import PLATFORMS, available_memory, check_machine, current, detect
from common.platforms.cpu import CPU
from common.platforms.cuda_shim import TORCH
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


def test_a_cpu_replaces_a_gpu_once_it_is_prepared() -> None:
    program = """
import torch
from common.engine.installation import prepare
from common.platforms import current
assert torch.zeros(1).type() == "torch.FloatTensor"
prepare(current())
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


@pytest.mark.skipif(TORCH < (2, 4), reason="Megatron-Core then gives its functions to torch.jit, or torch imports more")
def test_a_rank_on_a_cpu_imports_no_compiler_and_collects_garbage_again() -> None:
    program = """
import gc, sys
from common.start import importing
import torch
import torch.distributed.checkpoint
compile, of_torch = torch.compile, {*sys.modules}  # until 2.8 it imports the compiler itself
with importing():
    assert not gc.isenabled()
    from common.engine.installation import prepare
    from common.platforms import current
    prepare(current())
    import common.training.loop.run
    from megatron.core.fusions.fused_bias_swiglu import swiglu
assert torch.compile is compile and gc.isenabled() and gc.get_freeze_count() > 10_000
assert not {"torch._inductor", "torch._dynamo"} & ({*sys.modules} - of_torch)
assert swiglu(torch.ones(2, 4)).shape == (2, 2)
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


def test_metax_is_detected_by_its_torch_or_its_sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_of("2.1.2+metax2.27.0.8", tmp_path, monkeypatch)
    (tmp_path / "driver").touch()
    assert detect() == "metax"
    check_machine(METAX)
    with pytest.raises(KitError, match=r"KIT_PLATFORM=nvidia, but torch 2.1.2\+metax.* is MetaX's: use the .* metax/"):
        check_machine(NVIDIA)


def test_without_metaxs_torch_only_an_existing_sdk_identifies_metax(
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


def put(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n", encoding="utf-8")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the control groups of a machine that has 9 GiB left."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {9 << 20} kB\n", encoding="utf-8")
    monkeypatch.setattr(platforms, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(platforms, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(platforms, "CGROUPS", tmp_path / "cgroup")
    return tmp_path / "cgroup"


def test_memory_is_what_the_machine_has_where_no_control_group_limits_it(machine: Path) -> None:
    assert available_memory() == 9 << 30  # no /proc/self/cgroup at all
    (machine.parent / "own").write_text("0::/job\n", encoding="utf-8")
    assert available_memory() == 9 << 30  # nothing is mounted
    put(machine / "job", memory__max="max", memory__current=5 << 30, memory__stat="inactive_file 0")
    put(machine, memory__stat="inactive_file 7")
    assert available_memory() == 9 << 30
    put(machine / "job", memory__max=100 << 30)
    assert available_memory() == 9 << 30


def test_memory_is_what_the_tightest_control_group_above_the_process_leaves(machine: Path) -> None:
    (machine.parent / "own").write_text("0::/job/step/rank\n", encoding="utf-8")
    put(machine / "job/step/rank", memory__max=8 << 30, memory__current=1 << 30, memory__stat="anon 5")
    put(machine / "job/step", memory__max="max", memory__current=6 << 30, memory__stat="anon 5")
    assert available_memory() == 7 << 30
    # 6 of 8 GiB are taken, and half a GiB of that is cache that is given back.
    put(machine / "job", memory__max=8 << 30, memory__current=6 << 30)
    put(machine / "job", memory__stat=f"anon 5\ninactive_file {1 << 29}\nactive_file {1 << 30}")
    assert available_memory() == (2 << 30) + (1 << 29)
    put(machine / "other", memory__max=1, memory__current=0, memory__stat="anon 5")
    assert available_memory() == (2 << 30) + (1 << 29)
    put(machine / "job", memory__current=20 << 30)  # a limit may be lowered below current usage
    assert available_memory() == 0


@pytest.mark.parametrize("path", ["/", "/../../pod", "/kubepods/pod/of/the/host"])
def test_a_container_with_the_hosts_path_is_limited_by_what_it_sees(machine: Path, path: str) -> None:
    (machine.parent / "own").write_text(f"0::{path}\n", encoding="utf-8")
    put(machine, memory__max=3 << 30, memory__current=1 << 30, memory__stat="inactive_file 4096")
    assert available_memory() == (2 << 30) + 4096


def test_the_older_control_groups_count_too(machine: Path) -> None:
    lines = ["9:name=systemd:/", "5:cpu,cpuacct:/tight", "4:hugetlb,memory:/docker/it", "0::/"]
    (machine.parent / "own").write_text("\n".join(lines) + "\n", encoding="utf-8")
    unlimited = {"memory__limit_in_bytes": (1 << 63) - 4096, "memory__usage_in_bytes": 8 << 30}
    put(machine / "memory", **unlimited, memory__stat="total_inactive_file 0")
    assert available_memory() == 9 << 30
    limited = {"memory__limit_in_bytes": 4 << 30, "memory__usage_in_bytes": 3 << 30}
    put(machine / "memory/docker/it", **limited, memory__stat="inactive_file 1\ntotal_inactive_file 8192")
    assert available_memory() == (1 << 30) + 8192
