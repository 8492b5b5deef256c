"""The images as their tests read them: instructions by BuildKit's parser, stubs for a vendor's packages."""

import atexit
import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import dockerfile
import pathspec

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))

# What the base images contain, by their documentation and users; only names and versions matter here.
NGC_24_03 = {
    "torch": "2.3.0a0+40ec155e58.nv24.3", "torchvision": "0.18.0a0", "triton": "2.2.0+e28a256d7", "numpy": "1.24.4",
    "transformer-engine": "1.4.0", "apex": "0.1", "flash-attn": "2.4.2", "packaging": "23.2",
}  # fmt: skip
NGC_25_06 = {
    "torch": "2.8.0a0+5228986c39.nv25.6", "numpy": "1.26.4", "transformer-engine": "2.4.0", "apex": "0.1",
    "flash-attn": "2.7.4", "packaging": "24.2",
}  # fmt: skip
MACA_2_27 = {
    "torch": "2.1.2+metax2.27.0.8", "triton": "2.1.0+metax2.27.0.8", "numpy": "1.24.4", "apex": "0.1+metax2.27.0.8",
    "flash-attn": "2.5.3+metax2.27.0.8torch2.1", "transformers": "4.46.3", "packaging": "24.1",
}  # fmt: skip
# As users report them of MetaX's images; Transformer Engine is what some of 3.5 to 3.7 have, none with torch 2.10.
MACA_3_5 = {
    "torch": "2.8.0+metax3.5.3.9", "triton": "3.0.0+metax3.5.3.9", "numpy": "1.26.4", "apex": "0.1+metax3.5.3.9",
    "transformer-engine": "2.8.0+4a002bf5.maca3.5.3.105.torch2.8", "flash-attn": "2.6.3+metax3.5.3.9torch2.8",
    "transformers": "4.57.6", "packaging": "24.2",
}  # fmt: skip
MACA_3_8 = {
    "torch": "2.10.0+metax3.8.0.7", "triton": "3.6.0+metax3.8.0.7", "numpy": "1.26.4", "apex": "0.1+metax3.8.0.7",
    "flash-attn": "2.6.3+metax3.8.0.7torch2.10", "packaging": "24.2",
}  # fmt: skip


def instructions(path: Path) -> list[Any]:
    return list(dockerfile.parse_file(str(path)))


def arguments(path: Path) -> dict[str, str]:
    """ARG names with the default that they have somewhere in the file."""
    found: dict[str, str] = {}
    for each in instructions(path):
        if each.cmd.upper() == "ARG":
            for word in each.value:
                name, _, default = word.partition("=")
                found[name] = default or found.get(name, "")
    return found


def context_files() -> list[str]:
    """What `docker build .` sends: the files of the kit's folder, except those that .dockerignore names."""
    # A pattern of .dockerignore begins at the root, unlike one of .gitignore.
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    anchored = [line if line.startswith(("**/", "#")) or not line else f"/{line}" for line in lines]
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", anchored)
    sent = []
    for folder, folders, files in os.walk(ROOT):
        place = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored.match_file(f"{place / name}")]
        sent += [f"{place / name}" for name in files if not ignored.match_file(f"{place / name}")]
    return sorted(sent)


def python(version: str) -> str | None:
    """An interpreter of this version, or None where the machine has none."""
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))
    return str(installed[-1]) if installed else shutil.which(f"python{version}")


def write_wheel(
    folder: Path, name: str, version: str, requires: tuple[str, ...] = (), files: dict[str, str] | None = None
) -> Path:
    """A wheel of metadata and `files`, by their paths."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    contents = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {each}\n" for each in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        **(files or {}),
    }
    rows = []
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text.encode())}\n")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "".join(rows) + f"{info}/RECORD,,\n")
    return target


def write_base(folder: Path, packages: dict[str, str], cuda: str | None = "12.4") -> list[Path]:
    """Stub wheels of a base image's packages."""
    source = f"from typing import Optional\n\n__version__ = {packages.get('torch')!r}\ncuda: Optional[str] = {cuda!r}\n"
    torch = {"torch/__init__.py": "from . import version\n", "torch/version.py": source}
    return [write_wheel(folder, *each, files=torch if each[0] == "torch" else None) for each in packages.items()]


@lru_cache
def empty_environment(program: str) -> Path:
    """A folder made by `python -m venv`, to be copied: making one takes seconds."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    subprocess.run([program, "-m", "venv", folder / "venv"], env=environment(), check=True)
    return folder / "venv"


def make_base(folder: Path, packages: dict[str, str], cuda: str | None = "12.4", program: str = sys.executable) -> Path:
    """The Python of an environment that has pip and stubs for `packages`."""
    shutil.copytree(empty_environment(program), folder / "venv", symlinks=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for wheel in write_base(folder / "base", packages, cuda):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return folder / "venv" / "bin" / "python"


def environment(**more: str) -> dict[str, str]:
    """This process's environment, without what would affect another Python."""
    return {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")} | more


def pins(image: str) -> list[tuple[str, str]]:
    """(name, version) of each line of an image's requirements."""
    lines = (ROOT / "requirements" / f"{image}.txt").read_text().splitlines()
    pairs = [line.split()[0].split("==") for line in lines if line[:1].isalpha()]
    return [(name, version) for name, version in pairs]


def would_install(output: str) -> dict[str, str]:
    """Version by name that pip's dry runs say they would install."""
    words = " ".join(re.findall(r"^Would install (.*)$", output, re.M)).split()
    return {name.lower().replace("_", "-"): version for name, version in (word.rsplit("-", 1) for word in words)}
