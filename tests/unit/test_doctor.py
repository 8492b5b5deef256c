"""The doctor: its checks, its findings, and its exit code."""

import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.doctor import all_reduce, machine, packages, probes
from common.doctor.finding import Finding, verdict
from common.platforms import on_cpu
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "tests" / "stubs"
GIB = 1 << 30


def doctor(*flags: str, expect: int, **more: str) -> str:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1", "KIT_TEST_ON_CPU": "", **more,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "common.doctor", *flags], env=environment, cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.mark.lane
def test_a_machine_that_runs_the_kit_has_no_findings(tmp_path: Path) -> None:
    found = json.loads(doctor("--json", expect=0, KIT_PLATFORM="cpu"))
    assert {each["status"] for each in found} <= {"ok", "warn"}
    subjects = {each["subject"] for each in found}
    assert {"platform", "Python", "packages", "torch", "megatron-core", "transformers", "operation", "disk"} <= subjects
    operations = [each["found"] for each in found if each["subject"] == "operation"]
    assert len(operations) == 4 and any("all-reduce over gloo" in each for each in operations)
    (bandwidth,) = (each["found"] for each in found if each["subject"] == "all-reduce")
    assert re.fullmatch(r"2 processes over gloo, 1 MiB: \d+\.\d GB/s of bus bandwidth", bandwidth)


def test_lines_name_the_remedy_and_a_failure_exits_with_1() -> None:
    output = doctor(expect=1, KIT_PLATFORM="metax", MACA_PATH="/nowhere")
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("fail  platform"))
    assert "is not MetaX's and MACA_PATH is no folder here" in lines[first]
    assert lines[first + 1].strip().startswith("-> use the scripts of cpu/")
    assert "fail  device               torch sees none" in output and "--device=/dev/mxcd --group-add video" in output
    assert "all-reduce" not in output, "without a device its operations are not tried"


def test_the_image_of_a_platform_is_looked_at_without_its_device() -> None:
    found = json.loads(doctor("--json", "--no-device", expect=0, KIT_PLATFORM="metax", KIT_TEST_ON_CPU="true"))
    device = {"device", "operation", "all-reduce", "disk", "shared memory"}
    assert {each["subject"] for each in found} & device == set()


def test_an_extension_that_is_there_and_broken_is_a_failure(tmp_path: Path) -> None:
    # As Transformer Engine does when flash-attn or pydantic is missing: its own import succeeds, without its part.
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    output = doctor("--no-device", expect=1, KIT_PLATFORM="cpu", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "No module named 'transformer_engine.pytorch'" in output and "install the vendor's own build again" in output
    assert output.splitlines()[-1].startswith("not ready: 2 to fix, first megatron-core: install the versions ")


def probed(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> dict[str, tuple[bool, Any]]:
    """What the doctor's probes say of the extensions that lie in `folders`."""
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, [*folders, ROOT])))
    monkeypatch.setenv("KIT_PLATFORM", "cpu")
    return {name: probes.run([name])[name] for name in packages.extensions()}


def test_one_that_works_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    found = probed(monkeypatch, STUBS / "apex", STUBS / "flash_attn")
    findings = packages.check_extensions(CPU, found, no_device=False)
    assert verdict(findings) == "ready"
    lines = {each.subject: str(each) for each in findings}
    assert "fused Adam imports, no kernel for weight gradients" in lines["apex"]
    assert re.fullmatch(r"ok    flash_attn +imports", lines["flash_attn"])


def test_an_import_without_the_driver_is_accepted_without_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn").mkdir()
    message = "libmcruntime.so: cannot open shared object file: No such file or directory"
    (tmp_path / "flash_attn" / "__init__.py").write_text(f"raise ImportError({message!r})\n")
    found = probed(monkeypatch, tmp_path)
    for no_device, status, says in ((True, "ok", "not imported: it needs the driver"), (False, "fail", message)):
        each = {each.subject: each for each in packages.check_extensions(CPU, found, no_device)}["flash_attn"]
        assert each.status == status and says in each.found


def test_a_checkout_in_megatrons_place_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").touch()
    output = doctor("--no-device", expect=1, KIT_PLATFORM="cpu", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert f"loads {tmp_path}/megatron/core/__init__.py" in output and "from PYTHONPATH" in output


@pytest.mark.parametrize(
    ("torch", "megatron", "transformers", "failed"),
    [
        ("2.1.2+metax2.27.0.8", "0.11.0", "4.55.4", []),
        ("2.1.2+metax2.27.0.8", "0.14.0", "4.56.0", ["megatron-core", "transformers"]),
        ("2.1.2+metax2.27.0.8", "0.11.0", "4.46.3", ["transformers"]),
        ("2.3.0a0+40ec155e58.nv24.3", "0.14.0", "4.57.6", []),
        ("2.3.0a0+40ec155e58.nv24.3", "0.16.1", "5.0.0", ["megatron-core", "transformers"]),
        ("2.4.0", "0.14.0", "5.14.2", []),
        ("2.5.1", "0.14.0", "5.20.0", ["transformers"]),
        ("2.6.0a0+df5bbc09d1", "0.16.1", "5.24.0", []),
        ("2.13.0", "0.16.1", "6.0.0", ["transformers"]),
    ],
)
def test_versions_that_do_not_go_together_are_reported(
    torch: str, megatron: str, transformers: str, failed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"torch": torch, "megatron-core": megatron, "transformers": transformers}
    monkeypatch.setattr(packages, "version", versions.get)
    monkeypatch.setattr(packages.installation, "check_installed", lambda: None)
    monkeypatch.setattr(packages.installation, "check_origin", lambda: Path("/site/megatron/core/__init__.py"))
    found = [*packages.check_megatron((True, "imports"), False), packages.check_transformers(NVIDIA)]
    assert [each.subject for each in found if each.status != "ok"] == failed
    assert all("pip install" in each.remedy and "--no-deps" in each.remedy for each in found if each.status != "ok")
    statuses = {"megatron-core": "warn", "transformers": "fail"}  # the latter breaks, the former's import is tried
    assert all(each.status in ("ok", statuses[each.subject]) for each in found)


@pytest.mark.parametrize(("cuda", "status"), [("12.4", "ok"), ("12.10", "ok"), ("12.1", "fail"), (None, "fail")])
def test_cuda_is_required_by_platform(cuda: str | None, status: str) -> None:
    probed = (True, {"torch": "2.6.0", "cuda": cuda, "devices": []})
    (torch, found) = packages.check_torch(NVIDIA, probed, no_device=False)
    assert (torch.status, found.subject, found.status) == ("ok", "CUDA", status)
    assert [each.subject for each in packages.check_torch(METAX, probed, no_device=False)] == ["torch"]


def extensions(platform: Any, *there: str) -> dict[str, Finding]:
    probed = dict.fromkeys(there, (True, "works"))
    return {each.subject: each for each in packages.check_extensions(platform, probed, no_device=False)}


def test_what_a_platform_lacks_is_weighed_by_what_it_would_use() -> None:
    names = ["transformer_engine", "apex", "flash_attn", "flash_attn_4", "quack_kernels"]
    for platform, statuses in (
        (METAX, ["ok", "warn", "warn", "ok", "ok"]), (NVIDIA, ["warn", "warn", "ok", "ok", "ok"]),
    ):  # fmt: skip
        found = extensions(platform)
        assert {name: each.status for name, each in found.items()} == dict(zip(names, statuses, strict=True))
    with_engine = extensions(NVIDIA, "transformer_engine")
    assert with_engine["apex"].status == "ok", "Transformer Engine brings a fused Adam too"
    assert [each.status for each in extensions(on_cpu(METAX)).values()] == ["ok"] * 5


def test_devices_are_reported_with_their_memory() -> None:
    (none,) = machine.check_devices(NVIDIA, [])
    assert none.status == "fail" and "docker run --gpus all" in none.remedy
    free, full = machine.check_devices(NVIDIA, [("H100", 79 * GIB, 80 * GIB), ("H100", 10 * GIB, 80 * GIB)])
    assert (free.status, full.status) == ("ok", "warn")
    assert full.found == "H100, 10.0 of 80.0 GiB free" and "CUDA_VISIBLE_DEVICES" in full.remedy
    (memory,) = machine.check_devices(CPU, [])
    assert memory.status == "ok" and memory.found.endswith("GiB free")


@pytest.mark.parametrize(("least", "status"), [(1, "ok"), (1 << 60, "warn")])
def test_free_space_is_compared_with_what_is_needed(least: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_DISK_BYTES", least)
    shared, disk = machine.check_shared_memory(replace(CPU, shared_gib=least / GIB)), machine.check_disk()[0]
    assert (shared.status, disk.status) == (status, status)
    assert status == "ok" or ("--ipc=host" in shared.remedy and "KEEP_CHECKPOINTS" in disk.remedy)


def test_limits_are_those_of_the_process() -> None:
    program = """
import resource, sys
from common.doctor.machine import check_limits
from common.platforms.nvidia import NVIDIA
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), hard))
resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
print(*check_limits(NVIDIA), sep="\\n")
"""
    for files, status in ((1024, "warn"), (4096, "ok")):
        done = subprocess.run(
            [sys.executable, "-c", program, str(files)], cwd=ROOT, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert f"{status:<5} open files           {files}" in done.stdout
        assert "warn  locked memory        64 KiB" in done.stdout and "--ulimit memlock=-1" in done.stdout


def test_a_compiler_is_required_where_triton_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_compiler(METAX) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert machine.check_compiler(NVIDIA)[0].status == "fail"
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert machine.check_compiler(NVIDIA)[0].status == "ok"
    assert machine.check_compiler(replace(NVIDIA, fused_kernels=False)) == []


def test_a_probe_that_kills_its_process_is_reported_and_so_is_what_was_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("KIT_PLATFORM", "cpu")
    found = probes.run(["matmul", "flash_attn", "attention"])
    assert found["matmul"][0] and not found["flash_attn"][0] and not found["attention"][0]
    assert "ended with -6" in found["flash_attn"][1] and "not run" in found["attention"][1]


def test_a_probe_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("KIT_PLATFORM", "cpu")
    monkeypatch.setattr(probes, "TIMEOUT_S", 5)
    assert probes.run(["flash_attn"]) == {"flash_attn": (False, "it hung for 5 s")}


def test_a_python_without_packages_prints_what_is_missing(tmp_path: Path) -> None:
    venv.create(tmp_path, symlinks=True)
    done = subprocess.run(
        [tmp_path / "bin" / "python", "-m", "common.doctor"], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "KIT_PLATFORM": "cpu", "KIT_TEST_ON_CPU": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    (missing,) = (line for line in lines if line.startswith("fail  packages"))
    assert missing.endswith("not installed: " + ", ".join(packages.NEEDED))
    assert "bash common/shell/setup_venv.sh" in lines[lines.index(missing) + 1]
    assert "fail  torch                not installed" in lines and "operation" not in done.stdout
    assert not [line for line in lines if "<4.56" in line], "of the transformers that the oldest torch asks for"


def test_the_required_packages_are_those_of_the_lock() -> None:
    pinned = (ROOT / "requirements" / "cpu.txt").read_text()
    assert not [name for name in packages.NEEDED if f"\n{name}==" not in pinned]


def test_the_checked_disk_is_that_of_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVE_CHECKPOINT_PATH", str(tmp_path / "run" / "one"))
    assert machine.check_disk()[0].found.endswith(f"free in {tmp_path}")
    monkeypatch.setenv("SAVE_CHECKPOINT_PATH", "")
    assert machine.check_disk()[0].found.endswith(f"free in {Path.cwd()}")


def test_an_all_reduce_is_reported_by_its_bus_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    # nccl-tests: of 8 GPUs each link carries 7/4 of the data.
    assert all_reduce.bus_bandwidth(256 << 20, 8, 1e-3) == pytest.approx(469.76e9, rel=1e-4)
    calls = []
    monkeypatch.setattr(all_reduce, "run", lambda ranks: (calls.append(ranks), (1e-3, ""))[1])
    found = all_reduce.check_all_reduce(NVIDIA, 8)
    assert (found.status, found.found) == ("ok", "8 devices over nccl, 256 MiB: 469.8 GB/s of bus bandwidth")
    assert all_reduce.check_all_reduce(NVIDIA, 1).found == "one device: nothing to test"
    assert calls == [8]


def run_all_reduce(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Finding:
    for name, value in {"KIT_PLATFORM": "cpu", "KIT_TEST_ON_CPU": "", "PYTHONPATH": str(ROOT), **environment}.items():
        monkeypatch.setenv(name, value)
    found = all_reduce.check_all_reduce(CPU, 0)
    left = [each for each in psutil.Process().children(recursive=True) if "common.doctor.all_reduce" in each.cmdline()]
    assert not left
    return found


def test_a_process_of_an_all_reduce_that_fails_is_named_and_the_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "GRACE_S", 1)
    found = run_all_reduce(monkeypatch, GLOO_SOCKET_IFNAME="nowhere0")
    assert found.status == "fail" and "set GLOO_SOCKET_IFNAME" in found.remedy
    assert re.match(r"2 processes over gloo: process [01] ended with 1: .*nowhere0", found.found)


def test_the_line_of_an_error_that_names_the_cause_is_shown() -> None:
    # As torch 2.11 gives them.
    cuda = "CUDA error: invalid device ordinal\nSearch for `cudaErrorInvalidDevice'\nCompile with `TORCH_USE_CUDA_DSA`"
    assert all_reduce.cause(cuda) == "CUDA error: invalid device ordinal"
    nccl = "NCCL error in: NCCLUtils.cpp:94\nncclSystemError: System call failed.\nLast error:\nsocketPoll: refused\n"
    assert all_reduce.cause(nccl) == "socketPoll: refused"
    assert all_reduce.cause("") == "no message"


def test_an_all_reduce_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = "if 'common.doctor.all_reduce' in sys.orig_argv and sys.orig_argv[-3] == '1':"
    (tmp_path / "sitecustomize.py").write_text(f"import sys, time\n{second}\n    time.sleep(600)\n")
    monkeypatch.setattr(all_reduce, "TIMEOUT_S", 5)
    found = run_all_reduce(monkeypatch, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (found.status, found.found) == ("fail", "2 processes over gloo: it hung for 5 s")


def test_other_output_of_nccl_is_not_read_as_the_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'node0:1 NCCL INFO destroyed')\n")
    found = run_all_reduce(monkeypatch, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert found.status == "ok" and "GB/s of bus bandwidth" in found.found


def test_a_wrong_sum_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'common.doctor.all_reduce' in sys.orig_argv:\n"
        "    import torch.distributed\n    torch.distributed.all_reduce = lambda box: torch.distributed.barrier()\n"
    )
    assert "AssertionError: the sum is wrong" in run_all_reduce(monkeypatch, PYTHONPATH=f"{tmp_path}:{ROOT}").found


@pytest.mark.parametrize("lane", ["cpu", "nvidia", "metax"])
def test_the_required_versions_include_what_each_lane_pins(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The image brings torch, its Dockerfile megatron-core: NGC 24.03 and maca 2.27.
    torch = {"nvidia": "2.3.0a0+40ec155e58.nv24.3", "metax": "2.1.2+metax2.27"}
    pinned = (ROOT / "requirements" / f"{lane}.txt").read_text()
    versions = re.findall(r"(torch|megatron-core|transformers)==([\d.]+\d)", pinned)
    assert {name for name, _ in versions} >= {"megatron-core", "transformers"}
    installed = {"torch": torch[lane]} if lane in torch else {}
    monkeypatch.setattr(packages, "version", lambda name: {**dict(versions), **installed}.get(name, ""))
    ranges = {
        "megatron-core": packages.range_for_torch(packages._installed_torch()),
        "transformers": packages._transformers_range(),
    }
    for name, version in versions:
        if name in ranges:
            assert packages.fits(name, version, ranges[name], "").status == "ok", (name, version)
