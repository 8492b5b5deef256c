"""Where a run happens: `current()` is the platform that KIT_PLATFORM names."""

import os

from common.errors import KitError
from common.platforms.base import Platform
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA

PLATFORMS = {platform.name: platform for platform in (CPU, METAX, NVIDIA)}


def current() -> Platform:
    """The platform named by the environment's KIT_PLATFORM; raises KitError when it is unset or unknown."""
    name = os.environ.get("KIT_PLATFORM", "")
    if name not in PLATFORMS:
        raise KitError(
            f"KIT_PLATFORM={name!r} is no platform: start a script of {', '.join(f'{known}/' for known in PLATFORMS)}"
            " or set KIT_PLATFORM to that folder's name"
        )
    return PLATFORMS[name]
