"""Each fact of a platform is used: changing it, here MetaX's on a CPU, changes what is done."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from common.doctor import machine, packages
from common.errors import KitError
from common.estimate.gpus import find_gpu
from common.model.build import transformer_config
from common.model.kernels.selection import core_attention
from common.model.layers.attention import FlashAttention, SdpaAttention
from common.model.shape.options import ModelOptions
from common.platforms import PLATFORMS, on_cpu
from common.platforms.base import Platform
from common.platforms.metax import METAX
from common.training.loop.metrics import peak_tflops
from common.training.planning.description import describe
from common.training.planning.plan import Plan, plan_run
from common.training.settings import TrainSettings
from tests.tiny import tiny_qwen, write_ramps

ROOT = Path(__file__).parents[2]
PLATFORM = on_cpu(METAX)
TESTED: set[str] = set()


def fact(name: str) -> Callable[[Any], Any]:
    """Marks the test of the fact `name`."""
    TESTED.add(name)
    return lambda test: test


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facts")
    tiny_qwen(folder / "qwen")
    write_ramps(folder / "d_text_document", 40, 33)
    return folder


def plan(work: Path, platform: Platform, **changes: Any) -> Plan:
    settings = {
        "save_checkpoint_path": str(work / "save"), "hf_model_path": str(work / "qwen"),
        "dataset_path": str(work / "d"), "seq_length": 32, "train_iters": 2, "split": "100,0,0",
    }  # fmt: skip
    return plan_run(TrainSettings(**{**settings, **changes}), platform)


def logged(work: Path, platform: Platform, caplog: pytest.LogCaptureFixture, **changes: Any) -> str:
    """The log of a plan."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="kit"):
        describe(plan(work, platform, **changes))
    return caplog.text


def config(work: Path, platform: Platform) -> Any:
    run_plan = plan(work, platform)
    options = ModelOptions("bf16", run_plan.transformer_impl, "none")
    return transformer_config(run_plan.qwen, run_plan.sizes, options, platform)


def python(program: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_every_fact_is_tested_here() -> None:
    assert {field.name for field in fields(Platform)} == TESTED


@fact("name")
def test_the_name_is_the_one_that_is_logged(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "other: 1 processes" in logged(work, replace(PLATFORM, name="other"), caplog)
    assert "metax on a CPU, for tests: 1 processes" in logged(work, PLATFORM, caplog)


@fact("device")
def test_weights_are_made_where_the_device_is(work: Path) -> None:
    assert config(work, PLATFORM).use_cpu_initialization is True
    assert config(work, METAX).use_cpu_initialization is False


@fact("backend")
def test_the_process_group_is_of_the_platforms_backend() -> None:
    program = """
import os
from dataclasses import replace
from common.engine.installation import prepare
from common.parallel import ParallelSizes
from common.platforms import on_cpu
from common.platforms.metax import METAX
platform = on_cpu(METAX)
prepare(platform)
from common.training.launching.process_group import process_group
import torch.distributed as dist
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0")
with process_group(platform, ParallelSizes(1), 1, 1):
    print(dist.get_backend())
with process_group(replace(platform, backend="mpi"), ParallelSizes(1), 1, 1):
    pass
"""
    done = python(program)
    assert done.stdout.splitlines()[-1] == "gloo" and done.returncode != 0  # torch 2.8 prints lines before
    assert "MPI" in done.stderr.splitlines()[-1]


@fact("prepare")
def test_the_machine_is_prepared_as_the_platform_requires() -> None:
    program = """
from dataclasses import replace
from common.engine.installation import prepare
from common.platforms import current
from common.platforms.base import nothing_to_prepare
import torch
prepare(replace(current(), prepare=nothing_to_prepare))
try:
    torch.zeros(1, device="cuda")
except Exception as error:
    print("unprepared")
prepare(current())
print(torch.zeros(1, device="cuda").device)
"""
    done = python(program, KIT_PLATFORM="metax", KIT_TEST_ON_CPU="true")
    assert done.stdout.split() == ["unprepared", "cpu"], done.stderr


@fact("transformer_impl")
def test_the_layers_are_the_platforms_unless_set_otherwise(work: Path) -> None:
    assert plan(work, PLATFORM).transformer_impl == "local"
    engine = replace(PLATFORM, transformer_impl="transformer_engine", transformer_engine=True)
    assert plan(work, engine).transformer_impl == "transformer_engine"
    assert plan(work, engine, transformer_impl="local").transformer_impl == "local"


@fact("transformer_engine")
def test_layers_that_the_platform_has_not_are_refused(work: Path) -> None:
    without = replace(PLATFORM, transformer_engine=False)
    with pytest.raises(KitError, match="metax on a CPU, for tests has no Transformer Engine: set it to local"):
        plan(work, without, transformer_impl="transformer_engine")
    assert plan(work, PLATFORM, transformer_impl="transformer_engine").transformer_impl == "transformer_engine"


@fact("checkpoint_format")
def test_checkpoints_are_in_the_platforms_format_unless_set_otherwise(work: Path) -> None:
    assert plan(work, PLATFORM).ckpt_format == "torch"
    assert plan(work, replace(PLATFORM, checkpoint_format="torch_dist")).ckpt_format == "torch_dist"
    assert plan(work, PLATFORM, ckpt_format="torch_dist").ckpt_format == "torch_dist"


@fact("unproven_formats")
def test_a_format_that_was_not_run_there_is_warned_of(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    warning = "CKPT_FORMAT=torch_dist was not run on metax on a CPU, for tests hardware"
    assert warning in logged(work, PLATFORM, caplog, ckpt_format="torch_dist")
    assert warning not in logged(work, PLATFORM, caplog)
    assert warning not in logged(work, replace(PLATFORM, unproven_formats=()), caplog, ckpt_format="torch_dist")


@fact("ran_on_hardware")
def test_what_was_not_run_there_is_logged(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "this kit was not run on metax on a CPU, for tests hardware" in logged(work, PLATFORM, caplog)
    assert "was not run" not in logged(work, replace(PLATFORM, ran_on_hardware=True), caplog)


@fact("fused_kernels")
def test_fused_kernels_are_used_where_they_work(work: Path) -> None:
    plain, fused = config(work, PLATFORM), config(work, replace(PLATFORM, fused_kernels=True))
    names = ("bias_activation_fusion", "bias_dropout_fusion")
    assert [getattr(plain, name) for name in names] == [False, False]
    assert [getattr(fused, name) for name in names] == [True, True]


@fact("core_attention")
def test_core_attention_is_the_first_that_works_of_the_platforms(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_plan = plan(work, PLATFORM)
    options = ModelOptions("bf16", "local", "none")
    assert core_attention(run_plan.qwen, run_plan.sizes, options, PLATFORM) is SdpaAttention  # nothing else is here
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "stubs" / "flash_attn"))
    assert core_attention(run_plan.qwen, run_plan.sizes, options, PLATFORM) is FlashAttention
    other = replace(PLATFORM, core_attention=("sdpa",))
    assert core_attention(run_plan.qwen, run_plan.sizes, options, other) is SdpaAttention
    with_sdpa = replace(options, core_attention="sdpa")
    assert core_attention(run_plan.qwen, run_plan.sizes, with_sdpa, PLATFORM) is SdpaAttention
    engine = replace(options, transformer_impl="transformer_engine")
    assert core_attention(run_plan.qwen, run_plan.sizes, engine, PLATFORM) is None  # it has its own
    float32 = replace(options, precision="fp32")
    assert core_attention(run_plan.qwen, run_plan.sizes, float32, PLATFORM) is SdpaAttention
    del sys.modules["flash_attn"]


@fact("masked_attention")
def test_samples_share_a_row_only_where_attention_takes_a_mask(work: Path) -> None:
    assert plan(work, PLATFORM, reset_attention=True).settings.reset_attention
    with pytest.raises(
        KitError, match="RESET_ATTENTION=true: attention on .* takes no mask, .* set RESET_ATTENTION=false"
    ):
        plan(work, replace(PLATFORM, masked_attention=False), reset_attention=True)


@fact("oldest_cuda")
def test_an_old_cuda_is_refused_where_it_matters() -> None:
    found = (True, {"torch": "2.1.2+metax2.27.0.8", "cuda": "11.6", "devices": []})
    assert [each.status for each in packages.check_torch(PLATFORM, found, False)] == ["ok"]
    strict = replace(PLATFORM, oldest_cuda="12.4")
    assert [each.status for each in packages.check_torch(strict, found, False)] == ["ok", "fail"]


@fact("container_flags")
def test_a_missing_device_is_reported_with_the_platforms_flags() -> None:
    for flags in (METAX.container_flags, "--other"):
        (found,) = machine.check_devices(replace(METAX, container_flags=flags), [])
        assert f"docker run {flags}`" in found.remedy


@fact("shared_gib")
def test_little_shared_memory_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for size_gib, status in ((7.9, "warn"), (8.0, "ok")):
        monkeypatch.setattr(machine, "_space", lambda folder, size=size_gib: (int(size * 2**30), 0))
        found = machine.check_shared_memory(METAX)
        assert found.status == status and "--ipc=host" in (found.remedy or "--ipc=host")
        assert machine.check_shared_memory(replace(METAX, shared_gib=1.0)).status == "ok"


@fact("version_file")
def test_the_vendors_software_is_compared_with_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MACA_PATH", str(tmp_path))
    monkeypatch.setattr(packages, "version", lambda name: "2.8.0+metax3.5.3.9")
    (missing,) = packages.check_version_file(METAX)
    assert (missing.status, missing.found) == ("warn", f"no version in {tmp_path}/Version.txt")
    for text, status in (("Version:3.5.3.20\n", "ok"), ("3.5.2\n", "ok"), ("Version:3.7.2.0\n", "warn")):
        (tmp_path / "Version.txt").write_text(text)
        (found,) = packages.check_version_file(METAX)
        assert found.status == status and found.found.startswith(text.split(":")[-1].strip())
    assert "torch 2.8.0+metax3.5.3.9 is of another version" in found.remedy
    assert packages.check_version_file(replace(METAX, version_file="")) == []


@fact("device_files")
def test_a_missing_device_names_the_drivers_files_that_are_not_here() -> None:
    for files, said in ((("/dev/null", "/dev/mxcd"), ", and /dev/mxcd is missing"), (("/dev/null",), "")):
        (found,) = machine.check_devices(replace(METAX, device_files=files), [])
        assert found.found == f"torch sees none{said}"


@fact("peak_tflops")
def test_the_share_of_the_peak_is_reported_where_the_peak_is_known() -> None:
    assert peak_tflops(PLATFORM, "MetaX C500") is None
    assert peak_tflops(replace(PLATFORM, peak_tflops={"C500": 1.0}), "MetaX C500") == 1.0


@fact("memory_gib")
def test_a_gpu_type_is_estimated_once_its_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KitError, match="X1"):
        find_gpu("X1")
    known = replace(METAX, memory_gib={"X1": 64.0}, peak_tflops={"X1": 240.0})
    monkeypatch.setitem(PLATFORMS, METAX.name, known)
    assert (find_gpu("x1").memory_gib, find_gpu("x1").platform) == (64.0, known)


@fact("bandwidth_tb_s")
def test_its_bandwidth_is_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    for bandwidth in (1.6, 1.8):
        known = replace(METAX, memory_gib={"X1": 64.0}, peak_tflops={"X1": 240.0}, bandwidth_tb_s={"X1": bandwidth})
        monkeypatch.setitem(PLATFORMS, METAX.name, known)
        assert find_gpu("X1").bandwidth == pytest.approx(1e12 * bandwidth)
