"""Installed packages: what is missing, whether versions are compatible, and whether imports find the right ones."""

import os
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.doctor.finding import Finding, judge
from common.engine import installation
from common.engine.versions import range_for_torch
from common.errors import KitError
from common.platforms.base import Platform

# Oldest torch -> the versions of transformers that import, train and save with it, as tested. The lower bounds on torch
# that transformers declares are 2.2 (4.56), 2.4 (5.1), 2.5 (5.15) and 2.6 (5.20).
TRANSFORMERS = (
    ((2, 6), ">=4.47,<6"),
    ((2, 5), ">=4.47,<5.20"),
    ((2, 4), ">=4.47,<5.15"),
    ((2, 2), ">=4.47,<5"),
    ((2, 1), ">=4.47,<4.56"),
)
# Other packages that the kit and megatron-core import; torch, megatron-core and transformers have separate checks.
NEEDED = ("numpy", "packaging", "tokenizers", "safetensors", "jinja2", "tqdm", "psutil", "pydantic")
KEEP_TORCH = "with `--no-deps`, or with the image's versions as constraints, so that pip leaves torch alone"


def check_python() -> Finding:
    """Python 3.10 or later."""
    return judge("Python", sys.version.split()[0], sys.version_info < (3, 10), "use Python 3.10 or later")


def check_needed(platform: Platform) -> Finding:
    """The packages that every step imports."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    found = f"not installed: {', '.join(missing)}" if missing else ", ".join(NEEDED)
    return judge("packages", found, bool(missing), how_to_install(platform))


def how_to_install(platform: Platform) -> str:
    """How to install all packages of the platform."""
    if platform.device == "cpu":
        return "bash common/shell/setup_venv.sh makes .venv with all of them; or set PYTHON to a Python that has them"
    return f"start the kit's image; or pip install -r requirements/{platform.name}.txt {KEEP_TORCH}"


def check_torch(platform: Platform, probed: tuple[bool, Any], no_device: bool) -> list[Finding]:
    """torch and the CUDA version it was built for; `probed` is the result of the probe `devices`."""
    works, result = _excused(probed, no_device)
    if not version("torch"):
        return [Finding("torch", "fail", "not installed", how_to_install(platform))]
    if isinstance(result, str):
        remedy = "start the image whose torch supports this machine"
        return [judge("torch", f"{version('torch')} {result}", not works, remedy)]
    findings = [fits("torch", result["torch"], ">=2.1", "start an image with torch 2.1 or later")]
    if platform.oldest_cuda:
        cuda = result["cuda"] or "none"
        wrong = result["cuda"] is None or _numbers(cuda) < _numbers(platform.oldest_cuda)
        remedy = f"use an image whose torch was built for CUDA {platform.oldest_cuda} or later"
        findings.append(judge("CUDA", f"torch was built for {cuda}", wrong, remedy))
    return findings


def check_version_file(platform: Platform) -> list[Finding]:
    """The version of the vendor's software on this machine, with which torch's own (+metax3.5.3.9) has to agree."""
    if not platform.version_file:
        return []
    path = Path(os.path.expandvars(platform.version_file))
    here = re.search(r"\d+\.[\d.]+", path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    if here is None:
        remedy = f"set the folder in {platform.version_file} to the vendor's software, or start the vendor's image"
        return [Finding("software", "warn", f"no version in {path}", remedy)]
    built = re.search(r"\+[a-z]+(\d+\.[\d.]+)", version("torch"))
    differ = built is not None and _numbers(built[1]) != _numbers(here[0])
    remedy = f"torch {version('torch')} is of another version: start an image whose torch was built for this one"
    return [judge("software", f"{here[0]} ({path})", differ, remedy, "warn")]


def check_megatron(probed: tuple[bool, Any], no_device: bool) -> list[Finding]:
    """megatron-core: its version, where it is imported from, and whether the modules that training needs import."""
    try:
        installation.check_installed()
        origin = installation.check_origin()
    except KitError as error:
        found, _, remedy = str(error).partition(": ")
        return [Finding("megatron-core", "fail", found, remedy)]
    except metadata.PackageNotFoundError as error:
        return [
            Finding("megatron-core", "fail", f"it needs {error.name}, which is not installed", f"install {error.name}")
        ]
    # Only a warning: the import below shows whether it works, and the declared and tested ranges may be too narrow.
    required = range_for_torch(_installed_torch())
    remedy = f"pip install 'megatron-core{required}' {KEEP_TORCH}"
    findings = [fits("megatron-core", version("megatron-core"), required, remedy, "warn")]
    works, result = _excused(probed, no_device)
    found = f"{result} ({origin.parent})" if works else str(result)
    remedy = "install the versions that requirements/ and docker/ name for this machine"
    return [*findings, judge("megatron-core", found, not works, remedy)]


def check_transformers(platform: Platform) -> Finding:
    """transformers, in the range for the installed torch; others fail at import or reject that torch."""
    text, required = version("transformers"), _transformers_range()
    remedy = f"pip install 'transformers{required}' {KEEP_TORCH}" if version("torch") else how_to_install(platform)
    return fits("transformers", text, required, remedy)


def check_extensions(platform: Platform, probed: dict[str, tuple[bool, Any]], no_device: bool) -> list[Finding]:
    """Transformer Engine, apex, flash_attn, flash-attn-4 and QuACK: each is optional, but must work if installed."""
    by_default = platform.transformer_impl == "transformer_engine"
    lacking = {
        "transformer_engine": (by_default, "TRANSFORMER_IMPL=local runs without it, more slowly"),
        "apex": (not any(works for works, _ in probed.values()), "torch's own Adam is used, in more and smaller steps"),
        "flash_attn": ("flash_attn" in platform.core_attention, "PyTorch's attention is used"),
        "flash_attn_4": (False, "on Hopper GPUs its attention is faster than cuDNN's"),
        "quack_kernels": (False, "on Hopper GPUs SwiGLU and the loss are faster inside its matrix products"),
    }
    findings = []
    for name, (required, remedy) in lacking.items():
        if name not in probed:
            status = "warn" if required and platform.device == "cuda" else "ok"
            findings.append(Finding(name, status, "not installed", remedy))
            continue
        works, result = _excused(probed[name], no_device)
        broken = "install the vendor's own build again: it was compiled for another torch, or lacks a package"
        findings.append(judge(name, f"{version(name)} {result}", not works, broken))
    return findings


def extensions() -> list[str]:
    """The installed extensions, to be probed; flash-attn-4 alone makes `flash_attn` a namespace package."""
    specs = {name: find_spec(name) for name in ("transformer_engine", "apex", "flash_attn")}
    found = [name for name, spec in specs.items() if spec and spec.origin]
    return [*found, *(name for name in ("flash_attn_4", "quack_kernels") if version(name))]


def _excused(probed: tuple[bool, Any], no_device: bool) -> tuple[bool, Any]:
    """`probed`, unless an import failed for lack of the driver's library, as on a machine that builds an image."""
    if no_device and "cannot open shared object file" in str(probed[1]):
        return True, "not imported: it needs the driver"
    return probed


def fits(subject: str, text: str, required: str, remedy: str, status: str = "fail") -> Finding:
    """Whether the version `text` is in the range `required`; a vendor's pre-release counts as the release."""
    in_range = bool(text) and all(_within(text, bound) for bound in required.split(","))
    return judge(subject, text or "not installed", not in_range, remedy, status)


def _within(text: str, bound: str) -> bool:
    """Whether a version satisfies `bound`, as >=2.1 or <5; without `packaging`, which may be missing."""
    release, limit = (tuple(map(int, re.findall(r"\d+", re.split(r"[a-z+-]", each.lstrip("<>="))[0])))
                      for each in (text, bound))  # fmt: skip
    return release >= limit if bound.startswith(">=") else release < limit


def version(name: str) -> str:
    """The installed version of a package, or an empty string."""
    try:
        return metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return ""


def _transformers_range() -> str:
    """The range in TRANSFORMERS for the installed torch; the last one for an even older torch."""
    torch = _installed_torch()
    return next((text for oldest, text in TRANSFORMERS if torch >= oldest), TRANSFORMERS[-1][1])


def _installed_torch() -> tuple[int, int]:
    """Its major and minor version; newer than any if torch is not installed."""
    major, minor = _numbers(version("torch") or "99.0")
    return major, minor


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")[:2]]
