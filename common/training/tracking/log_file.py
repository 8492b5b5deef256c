"""log.txt: rank 0's log lines with their date, of all starts of a run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.log import logger
from common.training.tracking.records import LOG_FILE
from common.training.tracking.run_file import RunFile


class LogFile(logging.Handler):
    """Appends each log record to SAVE_CHECKPOINT_PATH/log.txt."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        self._file = RunFile(folder / LOG_FILE)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record; a disk error is logged elsewhere and not raised."""
        self._file.append(self.format(record) + "\n")


@contextmanager
def log_file(folder: Path, describe: Callable[[], None]) -> Iterator[LogFile]:
    """Also logs to `folder`/log.txt in the block, beginning with what `describe` logs, which goes nowhere else."""
    handler, others = LogFile(folder), list(logger.handlers)
    logger.handlers[:] = [handler]
    describe()
    logger.handlers[:] = [*others, handler]
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
