"""The clients of the services that a run logs to, which are installed where they are used."""

import importlib
from typing import Any

from common.errors import KitError


def import_client(name: str, setting: str) -> Any:
    """The package `name`; raises KitError, which names the setting that asks for it, if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise KitError(
            f"{setting} is set, but {name} is not installed: pip install {name}, or leave it empty"
        ) from error
