"""docker/build_extensions.sh: builds what the base lacks, with compilers that are new enough, and imports it."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.docker.images import NGC_24_03, ROOT, environment, make_base

BUILD = ROOT / "docker" / "build_extensions.sh"
EXTENSIONS = ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")


def compiler(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\necho {version}\n")
    (folder / name).chmod(0o755)


def build(base: Path, folder: Path, expect: int = 0, **more: str) -> str:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", BUILD, folder / "wheels"], env=environment(PATH=path, PYTHON=str(base), **more),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout
    return done.stdout


def source(folder: Path, *modules: str) -> str:
    """A project named apex with these modules, as pip takes it."""
    folder.mkdir()
    for name in modules:
        (folder / f"{name}.py").touch()
    (folder / "setup.py").write_text(
        "import os, setuptools, torch\n"  # as apex's own: without isolation, with its flags in the environment
        "assert os.environ['APEX_CPP_EXT'] == os.environ['APEX_CUDA_EXT'] == '1'\n"
        f"setuptools.setup(name='apex', version='0.1', py_modules={list(modules)!r})\n"
    )
    return str(folder)


def test_nothing_is_built_and_no_compiler_is_needed_when_both_are_installed(tmp_path: Path) -> None:
    base = make_base(tmp_path, NGC_24_03)
    output = build(base, tmp_path, TRANSFORMER_ENGINE="2.11.0", APEX_SOURCE="/nowhere", CC="/nowhere", CXX="/nowhere")
    assert output.splitlines() == ["transformer-engine 1.4.0", "apex 0.1"]
    assert not list((tmp_path / "wheels").iterdir())


@pytest.mark.parametrize(("gcc", "gxx"), [("9.4.0", "11.4.0"), ("11.4.0", "9.4.0"), ("4.8.5", "4.8.5")])
def test_an_old_compiler_is_refused_with_its_version(gcc: str, gxx: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, {"torch": "2.11.0"})
    compiler(tmp_path / "bin", "gcc", gcc)
    compiler(tmp_path / "bin", "g++", gxx)
    output = build(base, tmp_path, expect=1, APEX_SOURCE="/nowhere")
    name, version = ("gcc", gcc) if gcc != "11.4.0" else ("g++", gxx)
    assert f"{name} is version {version}, and what is built here needs gcc and g++ 10 or later" in output
    assert not list((tmp_path / "wheels").iterdir())


def test_a_base_without_a_compiler_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path, {"torch": "2.11.0"})
    assert "/nowhere/cc is no compiler here" in build(
        base, tmp_path, expect=1, APEX_SOURCE="/nowhere", CC="/nowhere/cc"
    )


def test_what_is_built_must_import(tmp_path: Path) -> None:
    base = make_base(tmp_path, {"torch": "2.11.0", "numpy": "2.4.6"})
    for name in ("gcc", "g++"):
        compiler(tmp_path / "bin", name, "10.2.1")
    build(base, tmp_path, APEX_SOURCE=source(tmp_path / "whole", *EXTENSIONS))
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == ["apex-0.1-py3-none-any.whl"]

    subprocess.run([base, "-m", "pip", "uninstall", "-q", "-y", "apex"], check=True)
    # As apex builds by itself when its flags are lost: the package, without what was to be compiled.
    output = build(base, tmp_path, expect=1, APEX_SOURCE=source(tmp_path / "hollow", *EXTENSIONS[:2]))
    assert "No module named 'fused_weight_gradient_mlp_cuda'" in output
    assert "built, but one of amp_C fused_layer_norm_cuda fused_weight_gradient_mlp_cuda cannot be imported" in output
