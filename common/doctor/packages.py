"""The packages: which are there, whether their versions go together, and whether they are the ones meant."""

import re
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from common.doctor.finding import Finding, judge
from common.engine import installation
from common.engine.versions import range_for_torch
from common.errors import KitError
from common.platforms.base import Platform

# From this torch on: the transformers that imports, trains and saves there. Found by running them; transformers' own
# floors are 2.2 (4.56), 2.4 (5.1), 2.5 (5.15) and 2.6 (5.20).
TRANSFORMERS = (
    ((2, 6), ">=4.47,<6"),
    ((2, 5), ">=4.47,<5.20"),
    ((2, 4), ">=4.47,<5.15"),
    ((2, 2), ">=4.47,<5"),
    ((2, 1), ">=4.47,<4.56"),
)
# What the kit and megatron-core import besides; torch, megatron-core and transformers are told by themselves.
NEEDED = ("numpy", "packaging", "tokenizers", "safetensors", "jinja2", "tqdm", "psutil", "pydantic")
KEEP_TORCH = "with `--no-deps`, or with the image's versions as constraints, so that pip leaves torch alone"


def look_at_python() -> Finding:
    """Python 3.10 or later."""
    return judge("Python", sys.version.split()[0], sys.version_info < (3, 10), "use Python 3.10 or later")


def look_at_needed(platform: Platform) -> Finding:
    """The packages without which a step ends at its first import."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    told = f"not there: {', '.join(missing)}" if missing else ", ".join(NEEDED)
    return judge("packages", told, bool(missing), how_to_install(platform))


def how_to_install(platform: Platform) -> str:
    """Where all packages of the platform come from."""
    if platform.device == "cpu":
        return "bash common/shell/setup_venv.sh makes .venv with all of them; or set PYTHON to a Python that has them"
    return f"start the kit's image; or pip install -r requirements/{platform.name}.txt {KEEP_TORCH}"


def look_at_torch(platform: Platform, told: tuple[bool, Any], no_device: bool) -> list[Finding]:
    """torch, and the CUDA it was built for; `told` is the probe `devices`."""
    works, said = _excused(told, no_device)
    if not version("torch"):
        return [Finding("torch", "fail", "not there", how_to_install(platform))]
    if isinstance(said, str):
        remedy = "start the image whose torch fits this machine"
        return [judge("torch", f"{version('torch')} {said}", not works, remedy)]
    findings = [fits("torch", said["torch"], ">=2.1", "start an image with torch 2.1 or later")]
    if platform.oldest_cuda:
        cuda = said["cuda"] or "none"
        wrong = said["cuda"] is None or _numbers(cuda) < _numbers(platform.oldest_cuda)
        remedy = f"use an image whose torch was built for CUDA {platform.oldest_cuda} or later"
        findings.append(judge("CUDA", f"torch's is {cuda}", wrong, remedy))
    return findings


def look_at_megatron(told: tuple[bool, Any], no_device: bool) -> list[Finding]:
    """megatron-core: its version, where it is imported from, and that all training needs of it imports."""
    try:
        installation.check_installed()
        origin = installation.check_origin()
    except KitError as error:
        found, _, remedy = str(error).partition(": ")
        return [Finding("megatron-core", "fail", found, remedy)]
    except metadata.PackageNotFoundError as error:
        return [Finding("megatron-core", "fail", f"it needs {error.name}, which is not there", f"install {error.name}")]
    # A warning: its own import, below, tells whether it works; what it declares and what was tried may be narrower.
    wanted = range_for_torch(_installed_torch())
    remedy = f"pip install 'megatron-core{wanted}' {KEEP_TORCH}"
    findings = [fits("megatron-core", version("megatron-core"), wanted, remedy, "warn")]
    works, said = _excused(told, no_device)
    found = f"{said} ({origin.parent})" if works else str(said)
    remedy = "install the versions that requirements/ and docker/ name for this machine"
    return [*findings, judge("megatron-core", found, not works, remedy)]


def look_at_transformers(platform: Platform) -> Finding:
    """transformers in the range that torch allows: one outside breaks at import, or refuses torch."""
    text, wanted = version("transformers"), _transformers_range()
    remedy = f"pip install 'transformers{wanted}' {KEEP_TORCH}" if version("torch") else how_to_install(platform)
    return fits("transformers", text, wanted, remedy)


def look_at_extensions(platform: Platform, told: dict[str, tuple[bool, Any]], no_device: bool) -> list[Finding]:
    """Transformer Engine, apex, the flash_attns and QuACK: each is optional, one that is there and broken is not."""
    lacking = {
        "transformer_engine": (platform.transformer_engine, "TRANSFORMER_IMPL=local runs without it, more slowly"),
        "apex": (not any(works for works, _ in told.values()), "torch's own Adam is used, in more and smaller steps"),
        "flash_attn": ("flash_attn" in platform.core_attention, "PyTorch's attention is used"),
        "flash_attn_4": (False, "on Hopper GPUs its attention is faster than cuDNN's"),
        "quack_kernels": (False, "on Hopper GPUs SwiGLU and the loss are faster inside its matrix products"),
    }
    findings = []
    for name, (wanted, remedy) in lacking.items():
        if name not in told:
            status = "warn" if wanted and platform.device == "cuda" else "ok"
            findings.append(Finding(name, status, "not there", remedy))
            continue
        works, said = _excused(told[name], no_device)
        broken = "install the vendor's own build again: it was compiled for another torch, or lacks a package"
        findings.append(judge(name, f"{version(name)} {said}", not works, broken))
    return findings


def extensions() -> list[str]:
    """Those that are there to be probed; flash-attn-4 alone makes `flash_attn` a folder without a module."""
    specs = {name: find_spec(name) for name in ("transformer_engine", "apex", "flash_attn")}
    found = [name for name, spec in specs.items() if spec and spec.origin]
    return [*found, *(name for name in ("flash_attn_4", "quack_kernels") if version(name))]


def _excused(told: tuple[bool, Any], no_device: bool) -> tuple[bool, Any]:
    """`told`, but for an import that failed for the driver's library, which a machine that builds an image has not."""
    if no_device and "cannot open shared object file" in str(told[1]):
        return True, "not imported: it needs the driver"
    return told


def fits(subject: str, text: str, wanted: str, remedy: str, status: str = "fail") -> Finding:
    """Whether the version `text` lies in the range `wanted`; a vendor's pre-release counts as what it leads to."""
    there = bool(text) and all(_within(text, bound) for bound in wanted.split(","))
    return judge(subject, text or "not there", not there, remedy, status)


def _within(text: str, bound: str) -> bool:
    """Whether a version keeps to `bound`, as >=2.1 or <5; without `packaging`, which may be what is missing."""
    release, limit = (tuple(map(int, re.findall(r"\d+", re.split(r"[a-z+-]", each.lstrip("<>="))[0])))
                      for each in (text, bound))  # fmt: skip
    return release >= limit if bound.startswith(">=") else release < limit


def version(name: str) -> str:
    """The installed version of a package, or nothing."""
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return ""


def _transformers_range() -> str:
    """The range in TRANSFORMERS for the installed torch; the oldest row's where it is older still."""
    torch = _installed_torch()
    return next((text for oldest, text in TRANSFORMERS if torch >= oldest), TRANSFORMERS[-1][1])


def _installed_torch() -> tuple[int, int]:
    """Its major and minor version; above all versions where it is not installed."""
    major, minor = _numbers(version("torch") or "99.0")
    return major, minor


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")[:2]]
