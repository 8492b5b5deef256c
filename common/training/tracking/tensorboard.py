"""TensorBoard event files in SAVE_CHECKPOINT_PATH/tensorboard.

Each record is one append: tensorboardX's own writer keeps the file open, and its thread ends on a full disk.
"""

import os
import socket
import struct
import time
from importlib.util import find_spec
from pathlib import Path

from common.errors import KitError
from common.log import logger
from common.training.settings import TrainSettings
from common.training.tracking.records import TENSORBOARD_FOLDER
from common.training.tracking.run_file import RunFile

FILE_VERSION = "brain.Event:2"


class TensorBoardTracker:
    """Writes metrics as scalars; what earlier starts wrote for `first_iteration` and later is hidden."""

    def __init__(self, folder: Path, first_iteration: int) -> None:
        self._folder, self._first_iteration = folder / TENSORBOARD_FOLDER, first_iteration
        self._file: RunFile | None = None
        self._has_header = False

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of `iteration`."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self._file = self._file or self._new_file()
        if self._file is None:
            return
        self._has_header = self._has_header or self._file.append_bytes(self._header())
        if self._has_header:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            event = Event(wall_time=time.time(), step=iteration, summary=Summary(value=values))
            self._file.append_bytes(_record(event.SerializeToString()))

    def _new_file(self) -> RunFile | None:
        """This start's event file; None if the folder cannot be made."""
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        try:
            self._folder.mkdir(exist_ok=True)
            return RunFile(self._folder / name)
        except OSError as error:
            logger.debug("%s: %s", self._folder, error)  # log.txt in the folder above has warned already
            return None

    def _header(self) -> bytes:
        """The records that begin a file: its version, and that what follows replaces later iterations before it."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        version = Event(wall_time=time.time(), file_version=FILE_VERSION)
        restart = Event(
            wall_time=time.time(), step=self._first_iteration, session_log=SessionLog(status=SessionLog.START)
        )
        return _record(version.SerializeToString()) + _record(restart.SerializeToString())


def _record(content: bytes) -> bytes:
    """`content` as a TFRecord: length, its checksum, content, its checksum (tensorboardX/record_writer.py)."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc32c(length)) + content + struct.pack("<I", masked_crc32c(content))


def writes_tensorboard(settings: TrainSettings) -> bool:
    """Whether the run writes event files; raises KitError if TENSORBOARD=true and the package is missing."""
    installed = find_spec("tensorboardX") is not None
    if settings.tensorboard == "true" and not installed:
        raise KitError(
            "TENSORBOARD=true, but tensorboardX is not installed: pip install tensorboardX, or TENSORBOARD=auto"
        )
    return installed and settings.tensorboard != "false"
