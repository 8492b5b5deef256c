"""Prints `name==version` of each package that a vendor's base image brings and pip must not replace.

The Dockerfiles write it to a constraint file before the first pip, and compare it with what is there after the last.
"""

from importlib.metadata import PackageNotFoundError, version

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

for name in NAMES:
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        continue
