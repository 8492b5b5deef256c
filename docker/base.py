"""What a vendor's base image brings, and that it stays: docker/install.sh asks before its first pip and after its last.

    python3 base.py constraints      name==version of each package that pip must not replace
    python3 base.py compare FILE     exits 1 unless each of FILE's is there in that version still
    python3 base.py cuda OLDEST      exits 1 unless torch was built for CUDA OLDEST or later

Standard library alone, and nothing is imported from the packages: torch may want a driver, which a build has not.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

# Built by the vendor against its own CUDA or MACA, or compiled against by what is.
NAMES = (
    "torch",
    "torchvision",
    "torchaudio",
    "triton",
    "pytorch-triton",
    "numpy",
    "transformer-engine",
    "apex",
    "flash-attn",
    "xformers",
)


def kept() -> dict[str, str]:
    """Version by name: NAMES, and every package whose version says who built it (2.1.2+metax2.27.0.8)."""
    found = {}
    for name in NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for each in distributions():
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower()
        if name and "+" in each.version:
            found[name] = version(name)  # of several copies, the one that Python takes
    return dict(sorted(found.items()))


def compare(file: Path) -> str:
    """What is no longer as `file` says, and the way out; empty when nothing changed."""
    now = kept()
    lines = (line.split("==") for line in file.read_text(encoding="utf-8").splitlines())
    changed = [f"{name} {old} -> {now.get(name, 'gone')}" for name, old in lines if now.get(name) != old]
    if not changed:
        return ""
    return (
        f"pip changed what the base image brings ({', '.join(changed)}): pin the package that asked for it to a version"
        " that takes the base's, or take a newer base image"
    )


def cuda(oldest: str) -> str:
    """Why torch's CUDA will not do, or nothing."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "the base image has no torch: take one that brings it"
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.M)
    if found is None:
        return f"the base image's torch was built without CUDA: take a base with CUDA {oldest} or later"
    if _numbers(found[1]) < _numbers(oldest):
        return f"the base image's torch was built for CUDA {found[1]}: take a base with CUDA {oldest} or later"
    return ""


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")[:2]]


def main(words: list[str]) -> None:
    """Does what the module's docstring says."""
    if words == ["constraints"]:
        print(*(f"{name}=={text}" for name, text in kept().items()), sep="\n")
        return
    command, argument = words
    wrong = {"compare": lambda: compare(Path(argument)), "cuda": lambda: cuda(argument)}[command]()
    if wrong:
        sys.exit(f"docker/base.py: {wrong}")


if __name__ == "__main__":
    main(sys.argv[1:])
