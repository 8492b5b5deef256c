"""The Dockerfiles as written: BuildKit reads them, each RUN is a valid script, nothing is lost or secret."""

import re
import subprocess
from pathlib import Path

import pytest

from common.platforms import PLATFORMS
from tests.docker.images import DOCKERFILES, ROOT, arguments, context_files, instructions

EACH = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def test_every_platform_has_an_image() -> None:
    assert {path.stem for path in DOCKERFILES} == set(PLATFORMS)


@EACH
def test_buildkit_reads_it_and_each_run_is_a_sound_script(path: Path) -> None:
    runs = [each for each in instructions(path) if each.cmd.upper() == "RUN"]
    assert len(runs) >= 3
    for each in runs:
        # Run by SHELL; the build arguments are in its environment.
        script = "#!/bin/bash\nset -euo pipefail\n" + "\n".join(each.value) + "\n"
        done = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{path.name}:{each.start_line}\n{done.stdout}"


@EACH
def test_a_step_stops_at_its_first_failure_in_every_stage(path: Path) -> None:
    shell = None
    for each in instructions(path):
        if each.cmd.upper() == "FROM":
            shell = None
        elif each.cmd.upper() == "SHELL":
            shell = list(each.value)
        elif each.cmd.upper() == "RUN":
            assert shell == ["/bin/bash", "-euo", "pipefail", "-c"], each.start_line


@EACH
def test_what_is_copied_is_there_and_reaches_the_build(path: Path) -> None:
    sent = context_files()
    copied = [each for each in instructions(path) if each.cmd.upper() == "COPY"]
    assert copied
    for each in copied:
        for source in each.value[:-1]:
            found = [name for name in sent if source == "." or Path(name).match(source)]
            assert found or any(name.startswith(f"{source}/") for name in sent), f"{path.name}: {source}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout to compare with")
def test_a_build_gets_all_of_the_kit() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()} <= set(context_files())


def test_a_build_gets_no_secret_and_no_data() -> None:
    sent = set(context_files())
    assert not [name for name in sent if name.startswith((".git/", ".venv", "work/")) or "__pycache__" in name]
    stray = [ROOT / ".env", ROOT / "docker" / "some.pem", ROOT / "model.safetensors"]
    assert not any(path.exists() for path in stray)
    try:
        for path in stray:
            path.write_text("x")
        assert set(context_files()) == sent
    finally:
        for path in stray:
            path.unlink()


@EACH
def test_no_secret_is_required_and_mirrors_are_empty(path: Path) -> None:
    found = arguments(path)
    names = {*found, *(each.value[0] for each in instructions(path) if each.cmd.upper() == "ENV")}
    assert not [name for name in names if re.search("TOKEN|PASSWORD|SECRET|KEY|CREDENTIAL", name)]
    assert {"PIP_INDEX_URL", "APT_MIRROR", "PLATFORM_PACKAGES"} <= set(found)
    assert not [name for name in found if re.search("INDEX|MIRROR|PACKAGES", name) and found[name]]


@EACH
def test_labels_user_and_entry_point(path: Path) -> None:
    steps = [(each.cmd.upper(), list(each.value)) for each in instructions(path)]
    labels = next(value for name, value in steps if name == "LABEL")
    required = ("title", "description", "licenses", "version", "revision", "base.name")
    assert {f"org.opencontainers.image.{each}" for each in required} <= set(labels)
    assert [value for name, value in steps if name == "USER"][-1] == ["${USER_ID}:${GROUP_ID}"]
    found = arguments(path)
    assert (found["USER_ID"], found["GROUP_ID"]) == ("0", "0")
    assert not [name for name, _ in steps if name == "ENTRYPOINT"], "the base's own stays"
    last, command = steps[-1]
    assert last == "CMD" and f"{path.stem}/doctor.sh" in command[-1] and command[-1].endswith("exec bash")


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("nvidia", "nvcr.io/nvidia/pytorch:24.03-py3"),
        ("metax", "cr.infini-ai.com/te-c7vnqlzlmvzffc2v/megatron-lm:maca2.27.0.7-py310"),
    ],
)
def test_the_base_is_given_by_default(name: str, base: str) -> None:
    assert arguments(ROOT / "docker" / f"{name}.Dockerfile")["BASE_IMAGE"] == base


def test_the_oldest_cuda_of_the_build_is_the_platforms() -> None:
    text = (ROOT / "docker" / "nvidia.Dockerfile").read_text()
    assert re.findall(r"OLDEST_CUDA=(\S+)", text) == [PLATFORMS["nvidia"].oldest_cuda]
