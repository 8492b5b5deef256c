"""What several tests of checkpoints begin with."""

import logging

import pytest

from common.log import logger


@pytest.fixture
def kit_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the kit's logger says, from INFO on."""
    caplog.set_level(logging.INFO, logger.name)
    return caplog
