"""Runs that share the work by PARTITION_INDEX.

Each run leaves a record, `run_{index}_of_{partitions}_{plan}.json`, of the parts in its partition. `merge` takes the
records of one plan, which is a hash of the input sizes, their split into parts, the tokenizer and the settings.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from common.data.dataset import manifest
from common.data.dataset.file_hash import SpanHash
from common.data.preprocessing.job import Job, parts_folder
from common.data.preprocessing.parts import FinishedPart, is_complete, read_state, read_value
from common.errors import KitError
from common.files import write_json
from common.log import logger

FORMAT, VERSION = "qwen-kit-run", 1
RECORD_FIELDS: dict[str, type] = {"plan": str, "partitions": int, "index": int, "facts": dict, "parts": list}
SHOWN_PARTITIONS = 20  # in an error


@dataclass(frozen=True)
class PartitionRecord:
    """The parts that one run has written."""

    path: Path
    plan: str
    partitions: int
    index: int
    facts: dict[str, Any]
    parts: list[FinishedPart]


def _record_path(job: Job) -> Path:
    name = f"run_{job.partition_index:05d}_of_{job.partitions:05d}_{job.plan_sha256[:8]}.json"
    return job.folder / name


def remove_record(job: Job) -> None:
    """Removes the record of this run, before its parts are written again."""
    _record_path(job).unlink(missing_ok=True)


def write_record(job: Job, parts: list[FinishedPart]) -> None:
    """Records that `parts` make up the partition of this run."""
    content = {
        "format": FORMAT, "version": VERSION, "plan": job.plan_sha256, "partitions": job.partitions,
        "index": job.partition_index, "facts": job.facts, "parts": [part.to_json() for part in parts],
    }  # fmt: skip
    write_json(_record_path(job), content, indent=None)


def _read_record(path: Path) -> PartitionRecord:
    try:
        value = read_value(path)
        manifest.check_fields(value, RECORD_FIELDS)
        if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"its version is not {VERSION}")
        if not 0 <= value["index"] < value["partitions"]:
            raise ValueError(f"its index {value['index']} is not one of {value['partitions']}")
        manifest.check_fields(value["facts"], {"kind": str, "streams": dict, "described": dict})
        parts = [FinishedPart.from_json(part) for part in value["parts"]]
    except ValueError as error:
        raise KitError(
            f"{path} is not a valid record ({error}): remove it and run that PARTITION_INDEX again"
        ) from error
    return PartitionRecord(path, value["plan"], value["partitions"], value["index"], value["facts"], parts)


def require_parts_folder(output_prefix: Path) -> Path:
    """The folder with the parts of `output_prefix`; raises KitError when it does not exist."""
    folder = parts_folder(output_prefix)
    if not folder.is_dir():
        if manifest.read(output_prefix):
            raise KitError(f"OUTPUT_PREFIX={output_prefix} is finished: there is nothing to merge")
        raise KitError(f"OUTPUT_PREFIX={output_prefix} has no parts ({folder} does not exist): run its parts first")
    return folder


def read_records(folder: Path) -> list[PartitionRecord]:
    """The records of one complete plan, in order; of several complete plans the newest.

    Raises KitError when no plan is complete, when a part differs from its record, or when an input has changed since.
    """
    plans: dict[str, dict[int, PartitionRecord]] = {}
    for path in sorted(folder.glob("run_*.json"), key=lambda path: path.stat().st_mtime_ns):
        record = _read_record(path)
        plans[record.plan] = {**plans.pop(record.plan, {}), record.index: record}  # newest last
    if not plans:
        raise KitError(f"{folder} holds no finished partition: run each PARTITION_INDEX first, or run again without it")
    complete = [plan for plan in plans.values() if len(plan) == next(iter(plan.values())).partitions]
    if not complete:
        raise _missing_partitions(folder, list(plans.values()))
    if len(plans) > 1:
        logger.info("%s also holds runs with other input, settings or PARTITIONS: merging the newest", folder)
    records = [complete[-1][index] for index in sorted(complete[-1])]
    for record in records:
        _check_record(folder, record)
    return records


def _missing_partitions(folder: Path, plans: list[dict[int, PartitionRecord]]) -> KitError:
    newest = plans[-1]
    partitions = next(iter(newest.values())).partitions
    number = partitions - sum(index < partitions for index in newest)
    shown = islice((str(index) for index in range(partitions) if index not in newest), SHOWN_PARTITIONS)
    indices = f"{', '.join(shown)}{', ...' if number > SHOWN_PARTITIONS else ''}"
    older = (
        "; other runs had other input, settings or PARTITIONS; their matching parts will be reused"
        if len(plans) > 1
        else ""
    )
    return KitError(
        f"{number} of {partitions} partitions are not finished in {folder}: run PARTITION_INDEX={indices}"
        f" of PARTITIONS={partitions}{older}"
    )


def _check_record(folder: Path, record: PartitionRecord) -> None:
    again = f"run PARTITION_INDEX={record.index} of PARTITIONS={record.partitions} again, then merge"
    for part in record.parts:
        try:
            same = read_state(folder / f"{part.name}.json").proof() == part.proof()
        except (OSError, ValueError):
            same = False
        if not same or not is_complete(folder / part.name, record.facts["streams"]):
            raise KitError(f"{folder / part.name} has changed since its run ended: {again}")
    changed = _changed_input(record.parts)
    if changed:
        raise KitError(f"{changed} changed after partition {record.index} was written: {again}")


def _changed_input(parts: list[FinishedPart]) -> str | None:
    """A file whose content has changed since it was read; files that this machine cannot see are not checked."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hash") as pool:
        for part in parts:
            for span in part.records:
                path = Path(span["path"])
                try:
                    now = path.stat()
                except OSError:
                    continue  # mounted elsewhere
                if (now.st_size, now.st_mtime_ns) == (span["size"], span["mtime_ns"]):
                    continue
                hashes = {name: span[name] for name in ("head", "blocks", "tail") if name in span}
                if now.st_size != span["size"] or _hash_span(pool, span) != hashes:
                    return str(path)
    return None


def _hash_span(pool: ThreadPoolExecutor, span: dict[str, Any]) -> dict[str, Any]:
    return SpanHash(pool, Path(span["path"]), span["start"], span["end"], span["size"]).result()
