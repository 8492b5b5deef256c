"""run.json: how each start of a run began and ended: settings, versions, devices, data and weights."""

import os
import shlex
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.data.dataset.blended_dataset import read_blend
from common.data.dataset.file_hash import hash_file
from common.errors import KitError, describe_os_error
from common.files import write_json
from common.log import logger
from common.settings import KIT
from common.training.launching.nodes import versions
from common.training.launching.rank_exit import log_failure
from common.training.planning.datasets import read_validation
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings
from common.training.tracking.log_file import log_file
from common.training.tracking.records import METRICS_FILE, RUN_RECORD, read_metrics, read_run_record

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class RunRecord:
    """SAVE_CHECKPOINT_PATH/run.json, rewritten as a start begins and ends; a disk error is logged, not raised."""

    def __init__(self, plan: Plan) -> None:
        self._path = Path(plan.settings.save_checkpoint_path) / RUN_RECORD
        self._content = read_run_record(self._path.parent)
        self._content["starts"].append(describe_start(plan))
        self._write()

    @property
    def start(self) -> int:
        """The number of this start, from 0."""
        return len(self._content["starts"]) - 1

    def shared(self, name: str, new: str) -> str:
        """The value that the run has had under `name` since its first start; `new` if there is none yet."""
        if name not in self._content:
            self._content[name] = new
            self._write()
        return str(self._content[name])

    def end(self, iteration: int, reason: str) -> None:
        """Records that this start ended after `iteration`."""
        self._content["starts"][-1]["end"] = {"time": _now(), "iteration": iteration, "reason": reason}
        self._write()

    def _write(self) -> None:
        try:
            write_json(self._path, self._content)
        except OSError as error:
            logger.warning("%s cannot be written, training goes on: %s", self._path, describe_os_error(error))


class FailureRecord:
    """How the ranks of a run failed, for its log.txt and run.json; made by the launcher before it starts them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._starts_before = folder, len(read_run_record(folder)["starts"])

    def add(self, rank: int, messages: list[str]) -> None:
        """Appends what is to be said of `rank`, the first of this node that failed, to log.txt and this start's end.

        Rank 0 writes how it failed itself, if it was not killed; but where it failed because of another one, that is
        the cause. Of another node's ranks it is log.txt that has this. Nothing is written if rank 0 did not get as far
        as its record; a disk error is logged, not raised.
        """
        try:
            content = read_run_record(self._folder)
            if len(content["starts"]) == self._starts_before:
                return
            with log_file(self._folder, partial(log_failure, messages)):
                pass
            start = content["starts"][-1]
            if "end" in start and (rank == 0 or start["host"] != socket.gethostname()):
                return
            iteration = self._last_iteration(len(content["starts"]) - 1, start["iteration"])
            end = start.setdefault("end", {"time": _now(), "iteration": iteration, "reason": ""})
            end["reason"] = "\n".join([end["reason"], *messages]).strip()
            write_json(self._folder / RUN_RECORD, content)
        except (OSError, KitError) as error:
            logger.warning("%s: how the ranks failed is not recorded there: %s", self._folder, error)

    def _last_iteration(self, start: int, began: int) -> int:
        """The last one that this start logged, which it does every LOG_INTERVAL; `began` if it logged none."""
        lines = read_metrics(self._folder) if (self._folder / METRICS_FILE).exists() else []
        return max([began, *(line["iteration"] for line in lines if line["start"] == start)])


def describe_start(plan: Plan) -> dict[str, Any]:
    """What one start of the run consists of, as JSON values."""
    sizes, start = plan.sizes, plan.start
    return {
        "time": _now(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": shlex.join(["python", "-m", "common.train", *sys.argv[1:]]),
        "iteration": plan.progress.iteration,
        "train_iters": plan.train_iters,
        "start": {"kind": start.kind, "from": str(start.checkpoint.path if start.checkpoint else start.model_folder)},
        "config": hash_file(start.model_folder / "config.json"),
        "data": plan.data_identity,
        "datasets": describe_datasets(plan.settings),
        "validation": plan.valid_hashes,
        "world_size": sizes.world_size,
        "parallel": {name: getattr(sizes, name) for name in ("tp", "pp", "vpp", "cp", "dp")},
        "platform": plan.platform.name,
        "device": describe_device(plan.platform.device),
        "versions": versions(),
        "kit": git_commit(),
        "settings": asdict(plan.settings),
    }


def describe_datasets(settings: TrainSettings) -> list[dict[str, Any]]:
    """What step 1 counted in each dataset of the run; a count that its manifest lacks is empty."""
    named, validation = read_validation(settings)
    training = read_blend(settings.dataset_path) if settings.dataset_path else []
    uses = [("training", float(weight), files) for weight, files in training]
    uses += [("validation", float(weight), files) for weight, files in validation]
    uses += [(f"validation, {name}", 1.0, files) for name, files in named.items()]
    found = []
    for use, weight, files in uses:
        manifest = files.manifest or {}
        documents = manifest.get("documents", {})
        found.append(
            {"use": use, "path": str(files.tokens), "weight": weight, "documents": documents.get("kept", "")}
            | {"dropped": sum(documents.get("dropped", {}).values())}
            | {name: manifest.get(name, "") for name in ("tokens", "supervised_tokens", "longest")}
        )
    return found


def describe_device(kind: str) -> dict[str, Any]:
    """Name, memory and driver of this rank's device."""
    if kind != "cuda":
        return {"name": kind, "cores": len(os.sched_getaffinity(0))}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    device = {"name": found.name, "memory_bytes": found.total_memory, "cuda": str(torch.version.cuda)}
    with suppress(OSError):
        device["driver"] = NVIDIA_DRIVER.read_text(encoding="utf-8").splitlines()[0]
    return device


def git_commit() -> str | None:
    """The commit of the kit's checkout, with -dirty after it if files differ; None if it is no checkout."""
    command = ["git", "-C", str(KIT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        if (KIT / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
