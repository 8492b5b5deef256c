"""The images' steps, run for real over this machine as the base.

In the vendors' images stubs of every package spare the downloads (test_install.py resolves the real ones), and the
doctor at the end, which needs the vendor's torch, is left out. The CPU's image is built whole.
"""

import sys
from pathlib import Path

import pytest

from tests.docker.images import MACA_2_27, MACA_3_5, NGC_24_03, ROOT, pins, python, write_base, write_wheel
from tests.docker.scratch import build, possible

pytestmark = pytest.mark.skipif(not possible(), reason="needs root and overlay mounts")

MEGATRON = {"nvidia": "0.14.0", "metax": "0.11.0", "metax-3": "0.16.1"}
NEWER = {"REQUIREMENTS": "metax-3.txt", "MEGATRON_CORE": "0.16.1", "PYTHON": "/opt/base/bin/python3"}
LOOK = """
id -u; pwd; touch made; stat -c '%u:%g %n' made README.md
python3 - <<END
from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers", "apex")), sep="\\n")
END
getent passwd "$(id -u)"; echo "PYTHON=${PYTHON:-}"; cat "$PIP_CONSTRAINT"
"""
BASE = {"PATH": "/opt/base/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


def prepare(program: str) -> str:
    # A base's Python is readable for all users; this machine's may be in root's home.
    return f"""
chmod o+rx /root
{program} -m venv /opt/base
/opt/base/bin/python -m pip install -q --no-index --no-deps /base/*.whl
"""


@pytest.mark.skipif(python("3.10") is None, reason="no Python 3.10 on this machine")
@pytest.mark.parametrize(
    ("name", "packages", "given"),
    [("nvidia", NGC_24_03, {}), ("metax", MACA_2_27, {}), ("metax-3", MACA_3_5, NEWER)],
    ids=["ngc 24.03", "maca 2.27", "maca 3.5"],
)
def test_a_vendors_image_is_built_around_its_packages(
    name: str, packages: dict[str, str], given: dict[str, str], tmp_path: Path
) -> None:
    write_base(tmp_path / "base", packages)
    for each, version in [("megatron-core", MEGATRON[name]), *pins(name)]:
        write_wheel(tmp_path / "base" / "index", each, version)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/base/index"}
    done = build(
        ROOT / "docker" / f"{name.removesuffix('-3')}.Dockerfile", tmp_path,
        {"USER_ID": "4321", "GROUP_ID": "4322", **given}, {**BASE, **offline}, prepare(str(python("3.10"))),
        skip=lambda command: "doctor.sh" in command, then=LOOK,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    end = done.stdout[-3000:].splitlines()
    assert {"4321", "/workspace/qwen-megatron", "4321:4322 made", "4321:4322 README.md"} <= set(end)
    assert f"torch {packages['torch']}" in end and f"torch=={packages['torch']}" in end
    assert f"apex {packages['apex']}" in end and f"apex=={packages['apex']}" in end
    assert f"megatron-core {MEGATRON[name]}" in end and f"transformers {dict(pins(name))['transformers']}" in end
    assert f"PYTHON={given.get('PYTHON', 'python3' if name == 'metax' else '')}" in end
    assert any(line.startswith("kit:x:4321:4322:") for line in end)


@pytest.mark.skipif(python("3.10") is None, reason="no Python 3.10 on this machine")
def test_a_base_with_an_old_cuda_stops_the_build(tmp_path: Path) -> None:
    write_base(tmp_path / "base", {**NGC_24_03, "torch": "2.1.0a0+32f93b1"}, cuda="12.2")
    done = build(
        ROOT / "docker" / "nvidia.Dockerfile", tmp_path, {}, BASE, prepare(str(python("3.10"))), then="echo built"
    )
    assert done.returncode != 0 and "built for CUDA 12.2: take a base with CUDA 12.4 or later" in done.stdout
    assert "built\n" not in done.stdout.splitlines()[-1:]


def test_the_cpus_image_passes_its_own_smoke_test(tmp_path: Path) -> None:
    write_wheel(tmp_path / "base", "unused", "1.0")
    folder = Path(sys.base_prefix) / "bin"
    look = """
id -u; pwd; stat -c '%u:%g %n' README.md
bash cpu/doctor.sh -- --no-device | grep -c '^ok'
python3 --version; readlink -f "$PYTHON"
"""
    done = build(
        ROOT / "docker" / "cpu.Dockerfile", tmp_path, {"KIT_NAME": "kit"},
        {"PATH": f"{folder}:{BASE['PATH']}", "HOME": "/root"}, "true", then=look,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert {"0", "/workspace/kit", "0:0 README.md"} <= set(done.stdout.splitlines()[-9:])
    assert "ok    megatron-core        imports, as training does (/opt/kit/venv/" in done.stdout


def test_a_platforms_packages_are_installed_from_a_mirror(tmp_path: Path) -> None:
    write_wheel(tmp_path / "base", "unused", "1.0")
    # Only apt is faked: its arguments and its sources are printed.
    fake = """
printf '#!/bin/sh\\necho "apt-get $*"\\n' >/usr/local/sbin/apt-get
chmod +x /usr/local/sbin/apt-get
printf 'deb http://archive.ubuntu.com/ubuntu jammy main\\n' >/etc/apt/sources.list
printf 'URIs: http://deb.debian.org/debian-security\\n' >/etc/apt/sources.list.d/debian.sources
"""
    given = {"PLATFORM_PACKAGES": "openssh-server sudo runit runit-systemd", "APT_MIRROR": "http://mirror.example/"}
    done = build(
        ROOT / "docker" / "cpu.Dockerfile", tmp_path, given, {}, fake,
        skip=lambda command: "platform_packages.sh" not in command,
        then="cat /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-4:] == [
        "apt-get update",
        "apt-get install -y --no-install-recommends openssh-server sudo runit runit-systemd",
        "deb http://mirror.example/ubuntu jammy main",
        "URIs: http://mirror.example/debian-security",
    ]
