"""The supported versions of Megatron-Core, and the installed one, read from package metadata without importing it."""

import re
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata

from common.engine.base import Engine
from common.engine.v0_11 import MegatronCore011
from common.engine.v0_14 import MegatronCore014
from common.engine.v0_16 import MegatronCore016
from common.engine.v0_19 import MegatronCore019
from common.errors import KitError

ENGINES: tuple[Engine, ...] = (  # oldest first
    MegatronCore011(),
    MegatronCore014(),
    MegatronCore016(),
    MegatronCore019(),
)


def installed_engine() -> Engine:
    """The engine of the installed megatron-core; raises KitError if it is missing or not supported."""
    *others, newest = (f"{engine.release} for {engine.environment}" for engine in ENGINES)
    works = f"this kit works with {', '.join(others)} and {newest}"
    remedy = "pip install --no-deps megatron-core==VERSION, the one of these for this machine"
    try:
        text = installed_version()
    except metadata.PackageNotFoundError as error:
        raise KitError(f"megatron-core is not installed, and {works}: {remedy}") from error
    numbers = re.match(r"(\d+)\.(\d+)", text)
    for engine in ENGINES:
        if numbers and engine.version == (int(numbers[1]), int(numbers[2])):
            return engine
    raise KitError(f"megatron-core {text} is installed, and {works}: {remedy}")


@lru_cache
def installed_version() -> str:
    """Of megatron-core, read once: an estimate asks thousands of times. Raises PackageNotFoundError."""
    return metadata.version("megatron-core")


def version() -> tuple[int, int]:
    """Major and minor of the installed megatron-core; raises KitError if it is missing or not supported."""
    return installed_engine().version


def range_for_torch(torch: tuple[int, int]) -> str:
    """The supported versions that train with this torch, as a pip version range: ">=0.11,<0.15".

    For an even older torch, that of the oldest version.
    """
    fitting = [engine for engine in ENGINES if engine.oldest_torch <= torch] or ENGINES[:1]
    major, minor = fitting[-1].version
    return f">={fitting[0].name},<{major}.{minor + 1}"


def first_version_with(feature: Callable[[Engine], bool]) -> str:
    """The oldest supported version that has `feature`, for error messages: "0.14"."""
    return next(engine.name for engine in ENGINES if feature(engine))
