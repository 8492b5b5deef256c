"""Before any test: Megatron-Core can be imported at the top of a file, as after the kit's own `prepare`."""

from collections.abc import Iterator

import pytest

from common.engine import versions
from common.engine.patches import add_numpy_dtypes

add_numpy_dtypes()


@pytest.fixture(autouse=True)
def _no_version_of_another_test() -> Iterator[None]:
    """A test may replace the package's metadata."""
    versions.installed_version.cache_clear()
    yield
    versions.installed_version.cache_clear()
