"""Checks of the installed Megatron-Core, and preparations before it is imported."""

import logging
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from common.engine.patches import add_metadata_alias, add_numpy_dtypes
from common.engine.versions import installed_engine
from common.errors import KitError


def check_installed() -> None:
    """Raises KitError unless the installed megatron-core is supported and works with the installed numpy."""
    engine, numpy = installed_engine(), metadata.version("numpy")
    if not engine.numpy_2 and int(numpy.split(".")[0]) >= 2:
        raise KitError(
            f"numpy {numpy} is installed, and megatron-core {engine.name} needs numpy before 2: pip install"
            " 'numpy<2', or the megatron-core that requirements/ names for this machine"
        )


def check_origin() -> Path:
    """The file that `import megatron.core` loads; raises KitError unless it is the installed package's.

    A Megatron-LM checkout on PYTHONPATH, as in some images, would take precedence. Imports nothing itself.
    """
    installed_engine()
    package = metadata.distribution("megatron-core")
    installed = Path(str(package.locate_file("megatron/core/__init__.py"))).resolve()
    parent = PathFinder.find_spec("megatron")
    spec = parent and PathFinder.find_spec("megatron.core", parent.submodule_search_locations)
    found = Path(spec.origin).resolve() if spec and spec.origin else None
    if found != installed:
        raise KitError(
            f"`import megatron.core` loads {found or 'nothing'}, not the installed megatron-core {package.version}"
            f" ({installed}): remove the folder of that checkout from PYTHONPATH"
        )
    return installed


def prepare(platform: Any) -> None:
    """Prepares this process for `import megatron.core`: checks versions, applies patches, prepares `platform`."""
    check_installed()
    add_numpy_dtypes()
    add_metadata_alias()
    for name in installed_engine().quiet_loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    platform.prepare()
