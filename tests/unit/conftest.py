"""Fixtures of every unit test."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def fresh_kit_logger() -> Iterator[logging.Logger]:
    """The kit's logger as in a new process, whatever commands ran in this one before: caplog captures it."""
    logger = logging.getLogger("kit")
    before = list(logger.handlers), logger.propagate, logger.level
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
