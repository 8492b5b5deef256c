"""Finished parts to the finished files: joined in order by copy, then the manifest.

Runs that share the work by PARTITION_INDEX leave a claim each, `run_{index}_of_{partitions}_{plan}.json`: which parts
make up its share. `merge` joins the claims of one plan, which is a hash over the inputs' sizes, where they are cut, the
tokenizer and the settings.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.dataset import manifest
from common.data.dataset.file_hash import SpanHash
from common.data.preprocessing.job import Job, parts_folder
from common.data.preprocessing.parts import FinishedPart, is_complete, read_state, read_value
from common.errors import KitError
from common.log import logger

FORMAT, VERSION = "qwen-kit-run", 1
RECORD_FIELDS: dict[str, type] = {"plan": str, "partitions": int, "index": int, "facts": dict, "parts": list}


@dataclass(frozen=True)
class PartitionRecord:
    """The share of the work that one run has done."""

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
    """Removes the claim of this run's share while it is written."""
    _record_path(job).unlink(missing_ok=True)


def write_record(job: Job, parts: list[FinishedPart]) -> None:
    """Says that `parts` are this run's share."""
    content = {
        "format": FORMAT, "version": VERSION, "plan": job.plan_sha256, "partitions": job.partitions,
        "index": job.partition_index, "facts": job.facts, "parts": [part.to_json() for part in parts],
    }  # fmt: skip
    manifest.write_json(_record_path(job), content, indent=None)


def _read_record(path: Path) -> PartitionRecord:
    try:
        value = read_value(path)
        manifest.check_fields(value, RECORD_FIELDS)
        if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is of another version than {VERSION}")
        manifest.check_fields(value["facts"], {"kind": str, "streams": dict, "described": dict})
        parts = [FinishedPart.from_json(part) for part in value["parts"]]
    except ValueError as error:
        raise KitError(f"{path} tells of no run ({error}): remove it and run that PARTITION_INDEX again") from error
    return PartitionRecord(path, value["plan"], value["partitions"], value["index"], value["facts"], parts)


def require_parts_folder(output_prefix: Path) -> Path:
    """The folder of parts of `output_prefix`; raises KitError when there is none."""
    folder = parts_folder(output_prefix)
    if not folder.is_dir():
        if manifest.read(output_prefix):
            raise KitError(f"OUTPUT_PREFIX={output_prefix} is finished: there is nothing to merge")
        raise KitError(f"OUTPUT_PREFIX={output_prefix} has no parts ({folder} does not exist): run its parts first")
    return folder


def read_records(folder: Path) -> list[PartitionRecord]:
    """The claims that together are one whole plan, in order, the newest where several are whole.

    Raises KitError when there is none, or a part is not there as it was claimed, or an input has changed since.
    """
    plans: dict[str, dict[int, PartitionRecord]] = {}
    for path in sorted(folder.glob("run_*.json"), key=lambda path: path.stat().st_mtime_ns):
        found = _read_record(path)
        plans[found.plan] = {**plans.pop(found.plan, {}), found.index: found}  # the newest is the last
    if not plans:
        raise KitError(f"{folder} holds no finished run: run each PARTITION_INDEX first, or the whole again")
    whole = [plan for plan in plans.values() if len(plan) == next(iter(plan.values())).partitions]
    if not whole:
        raise _missing_partitions(folder, list(plans.values()))
    if len(plans) > 1:
        logger.info("%s holds runs of other input, settings or PARTITIONS too: those that are newer are joined", folder)
    claims = [whole[-1][index] for index in sorted(whole[-1])]
    for each in claims:
        _check_record(folder, each)
    return claims


def _missing_partitions(folder: Path, plans: list[dict[int, PartitionRecord]]) -> KitError:
    newest = plans[-1]
    partitions = next(iter(newest.values())).partitions
    missing = [str(index) for index in range(partitions) if index not in newest]
    told = f"{', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}"
    older = (
        "; other runs there were of other input, settings or PARTITIONS: what still fits of their parts is used again"
        if len(plans) > 1
        else ""
    )
    return KitError(
        f"{len(missing)} of {partitions} parts are not finished in {folder}: run PARTITION_INDEX={told}"
        f" of PARTITIONS={partitions}{older}"
    )


def _check_record(folder: Path, found: PartitionRecord) -> None:
    again = f"run PARTITION_INDEX={found.index} of PARTITIONS={found.partitions} again, then merge"
    for part in found.parts:
        try:
            same = read_state(folder / f"{part.name}.json").proof() == part.proof()
        except (OSError, ValueError):
            same = False
        if not same or not is_complete(folder / part.name, found.facts["streams"]):
            raise KitError(f"{folder / part.name} is not as it was when its run ended: {again}")
    changed = _changed_input(found.parts)
    if changed:
        raise KitError(f"{changed} was changed after part {found.index} was written of it: {again}")


def _changed_input(parts: list[FinishedPart]) -> str | None:
    """A file that no longer holds what was read of it, where it can be seen from here."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hash") as pool:
        for part in parts:
            for record in part.records:
                path = Path(record["path"])
                try:
                    now = path.stat()
                except OSError:
                    continue  # it was mounted elsewhere
                if (now.st_size, now.st_mtime_ns) == (record["size"], record["mtime_ns"]):
                    continue
                if now.st_size != record["size"] or _hash_span(pool, record) != {
                    name: record[name] for name in ("head", "blocks", "tail") if name in record
                }:
                    return str(path)
    return None


def _hash_span(pool: ThreadPoolExecutor, record: dict[str, Any]) -> dict[str, Any]:
    return SpanHash(pool, Path(record["path"]), record["start"], record["end"], record["size"]).result()
