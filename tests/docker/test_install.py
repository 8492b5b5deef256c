"""docker/install.sh and base.py with stubs for a vendor's packages: these are not replaced, or the build fails."""

import subprocess
from pathlib import Path

import pytest

from tests.docker.images import (
    MACA_2_27,
    MACA_3_5,
    MACA_3_8,
    NGC_24_03,
    NGC_25_06,
    ROOT,
    environment,
    make_base,
    pins,
    python,
    would_install,
    write_wheel,
)

INSTALL, BASE = ROOT / "docker" / "install.sh", ROOT / "docker" / "base.py"


def install(base: Path, folder: Path, *words: str, expect: int = 0, **more: str) -> str:
    """What install.sh prints; it must exit with `expect`."""
    done = subprocess.run(
        ["bash", INSTALL, *words], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        env=environment(PYTHON=str(base), CONSTRAINTS=str(folder / "constraints.txt"), **more),
    )  # fmt: skip
    assert done.returncode == expect, done.stdout
    return done.stdout


def version_of(base: Path, name: str) -> str:
    program = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    return subprocess.run([base, "-c", program, name], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def wheelhouse(tmp_path: Path) -> Path:
    """Where pip finds everything: the kit's stubs, and a torch that is newer than the base's."""
    folder = tmp_path / "shelf"
    write_wheel(folder, "torch", "2.14.1")
    write_wheel(folder, "megatron-core", "0.14.0", ("torch>=2.6",))
    write_wheel(folder, "modest", "1.0", ("torch>=2.1",))
    write_wheel(folder, "greedy", "1.0", ("torch>=2.14",))
    return folder


def offline(wheelhouse: Path) -> dict[str, str]:
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheelhouse)}


def test_the_vendors_packages_become_constraints_and_are_not_replaced(tmp_path: Path, wheelhouse: Path) -> None:
    packages = {**NGC_24_03, "built-by-the-vendor": "1.0+nv24.3"}  # recognized by its version alone
    base = make_base(tmp_path, packages)
    (tmp_path / "kit.txt").write_text("modest==1.0\n")
    install(base, tmp_path, "0.14.0", str(tmp_path / "kit.txt"), OLDEST_CUDA="12.4", **offline(wheelhouse))
    held = {**packages}
    del held["packaging"]  # no vendor's build: a newer one may be installed
    lines = (tmp_path / "constraints.txt").read_text().splitlines()
    assert lines == [f"{name}=={text}" for name, text in sorted(held.items())]
    assert version_of(base, "torch") == NGC_24_03["torch"]
    assert (version_of(base, "modest"), version_of(base, "megatron-core")) == ("1.0", "0.14.0")


def test_a_package_that_would_replace_torch_fails_the_build_and_torch_survives(
    tmp_path: Path, wheelhouse: Path
) -> None:
    for name, packages in (("ngc", NGC_24_03), ("maca", MACA_2_27)):
        base = make_base(tmp_path / name, packages)
        (tmp_path / "kit.txt").write_text("greedy==1.0\n")
        output = install(base, tmp_path, "0.14.0", str(tmp_path / "kit.txt"), expect=1, **offline(wheelhouse))
        assert "greedy" in output and "pip could not install" in output and "constraint" in output
        assert version_of(base, "torch") == packages["torch"]


def test_a_torch_that_was_replaced_all_the_same_is_noticed(tmp_path: Path, wheelhouse: Path) -> None:
    base = make_base(tmp_path, MACA_2_27)
    held = tmp_path / "held.txt"
    held.write_text(subprocess.run([base, BASE, "constraints"], capture_output=True, text=True, check=True).stdout)
    compare = [base, BASE, "compare", held]
    assert subprocess.run(compare, check=False).returncode == 0
    pip = [base, "-m", "pip", "install", "-q", "greedy"]  # as pip does it, without our constraints
    subprocess.run(pip, env=environment(**offline(wheelhouse)), check=True)
    subprocess.run([base, "-m", "pip", "uninstall", "-q", "-y", "apex"], check=True)
    done = subprocess.run(compare, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch 2.1.2+metax2.27.0.8 -> 2.14.1" in done.stderr and "apex 0.1+metax2.27.0.8 -> gone" in done.stderr
    assert "pin the package that asked for it" in done.stderr


def test_wheels_that_a_stage_built_are_installed_and_held(tmp_path: Path, wheelhouse: Path) -> None:
    base = make_base(tmp_path, {"torch": "2.11.0", "numpy": "2.4.6"}, "13.0")
    write_wheel(tmp_path / "built", "apex", "0.1")
    write_wheel(tmp_path / "built", "transformer-engine", "2.11.0", ("torch", "modest"))
    (tmp_path / "kit.txt").write_text("\n")
    install(base, tmp_path, "0.14.0", str(tmp_path / "kit.txt"), WHEELS=str(tmp_path / "built"), **offline(wheelhouse))
    assert (tmp_path / "constraints.txt").read_text().splitlines() == [
        "apex==0.1", "numpy==2.4.6", "torch==2.11.0", "transformer-engine==2.11.0",
    ]  # fmt: skip
    assert version_of(base, "modest") == "1.0"


@pytest.mark.parametrize(
    ("cuda", "message"),
    [("12.1", "built for CUDA 12.1: take a base with CUDA 12.4"), (None, "without CUDA: take"), ("9.2", "CUDA 9.2")],
)
def test_an_old_cuda_is_refused_before_anything_is_installed(
    cuda: str | None, message: str, tmp_path: Path, wheelhouse: Path
) -> None:
    base = make_base(tmp_path, {"torch": "2.2.0"}, cuda)
    kit = str(tmp_path / "kit.txt")
    Path(kit).write_text("modest==1.0\n")
    assert message in install(base, tmp_path, "0.14.0", kit, expect=1, OLDEST_CUDA="12.4", **offline(wheelhouse))
    with pytest.raises(subprocess.CalledProcessError):
        version_of(base, "modest")


@pytest.mark.parametrize("cuda", ["12.4", "12.10", "13.0"])
def test_cuda_is_compared_as_numbers(cuda: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, {"torch": "2.9.0"}, cuda)
    assert subprocess.run([base, BASE, "cuda", "12.4"], check=False).returncode == 0


def test_a_base_without_torch_is_refused(tmp_path: Path, wheelhouse: Path) -> None:
    base = make_base(tmp_path, {"numpy": "1.24.4"})
    output = install(base, tmp_path, "0.14.0", str(tmp_path / "kit.txt"), expect=1, **offline(wheelhouse))
    assert "the base image has no torch: take one that brings it" in output


@pytest.mark.skipif(python("3.9") is None, reason="no Python 3.9 on this machine")
def test_an_old_python_is_refused(tmp_path: Path) -> None:
    base = Path(str(python("3.9")))
    output = install(base, tmp_path, "0.14.0", "kit.txt", expect=1)
    assert "Python 3.9" in output and "take a base with Python 3.10 or later" in output


@pytest.mark.parametrize(
    ("image", "packages", "program", "megatron"),
    [
        ("nvidia", NGC_24_03, python("3.10"), "0.14.0"),
        ("nvidia", NGC_25_06, python("3.12"), "0.19.2"),
        ("metax", MACA_2_27, python("3.10"), "0.11.0"),
        ("metax-3", MACA_3_5, python("3.10"), "0.16.1"),
        ("metax-3", MACA_3_8, python("3.12"), "0.19.2"),
    ],
    ids=["ngc 24.03", "ngc 25.06", "maca 2.27", "maca 3.5", "maca 3.8"],
)
def test_the_pinned_packages_go_together_with_the_vendors(
    image: str, packages: dict[str, str], program: str | None, megatron: str, tmp_path: Path
) -> None:
    if program is None:
        pytest.skip("no such Python on this machine")
    base = make_base(tmp_path, packages, program=program)
    requirements = str(ROOT / "requirements" / f"{image}.txt")
    found = would_install(install(base, tmp_path, megatron, requirements, PIP_DRY_RUN="1"))
    assert found["megatron-core"] == megatron and len(pins(image)) > 8
    assert all(found.get(name, packages.get(name)) == text for name, text in pins(image))
    assert not {*packages} - {"transformers", "packaging"} & {*found}, "the vendor's stay"
