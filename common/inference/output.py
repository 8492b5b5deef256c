"""OUTPUT: a file that does not exist yet."""

import os
from pathlib import Path

from common.errors import KitError
from common.folders import check_writable


def check_new_file(path: Path) -> None:
    """Raises KitError, which names OUTPUT, unless `path` is a new file that can be written."""
    if os.path.lexists(path):
        raise KitError(f"OUTPUT={path} exists: remove it, or give another path")
    check_writable(path.absolute().parent, f"OUTPUT={path}")
