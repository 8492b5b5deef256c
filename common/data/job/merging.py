"""Finished parts to the finished files: joined in order by copy, then the manifest.

Runs that share the work by PARTITION_INDEX leave a claim each, `run_{index}_of_{partitions}_{plan}.json`: which parts
make up its share. `merge` joins the claims of one plan, which is a hash over the inputs' sizes, where they are cut, the
tokenizer and the settings.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset import manifest
from common.data.dataset.fingerprint import SpanHash, hash_of_blocks
from common.data.dataset.indexed import IndexedReader, IndexedWriter, bin_path, idx_path, sync
from common.data.job import rejects
from common.data.job.job import Job, identity_of, parts_folder
from common.data.job.parts import Finished, is_whole, read_state, read_value
from common.data.tokenizer.encoded import DROPPED, NOT_USED
from common.errors import KitError
from common.log import logger

NO_NOTES = {"read", "supervised"}
MANY = 30
FORMAT, VERSION = "qwen-kit-run", 1
CLAIM: dict[str, type] = {"plan": str, "partitions": int, "index": int, "facts": dict, "parts": list}


@dataclass(frozen=True)
class Claim:
    """The share of the work that one run has done."""

    path: Path
    plan: str
    partitions: int
    index: int
    facts: dict[str, Any]
    parts: list[Finished]


def _claim_path(job: Job) -> Path:
    name = f"run_{job.partition_index:05d}_of_{job.partitions:05d}_{job.plan_sha256[:8]}.json"
    return job.folder / name


def withdraw(job: Job) -> None:
    """Removes the claim of this run's share while it is written."""
    _claim_path(job).unlink(missing_ok=True)


def claim(job: Job, parts: list[Finished]) -> None:
    """Says that `parts` are this run's share."""
    content = {
        "format": FORMAT, "version": VERSION, "plan": job.plan_sha256, "partitions": job.partitions,
        "index": job.partition_index, "facts": job.facts, "parts": [part.to_json() for part in parts],
    }  # fmt: skip
    manifest.write_json(_claim_path(job), content, indent=None)


def _read_claim(path: Path) -> Claim:
    try:
        value = read_value(path)
        manifest.check_fields(value, CLAIM)
        if (value.get("format"), value.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is of another version than {VERSION}")
        manifest.check_fields(value["facts"], {"kind": str, "streams": dict, "described": dict})
        parts = [Finished.from_json(part) for part in value["parts"]]
    except ValueError as error:
        raise KitError(f"{path} tells of no run ({error}): remove it and run that PARTITION_INDEX again") from error
    return Claim(path, value["plan"], value["partitions"], value["index"], value["facts"], parts)


def need_folder(output_prefix: Path) -> Path:
    """The folder of parts of `output_prefix`; raises KitError when there is none."""
    folder = parts_folder(output_prefix)
    if not folder.is_dir():
        if manifest.read(output_prefix):
            raise KitError(f"OUTPUT_PREFIX={output_prefix} is finished: there is nothing to merge")
        raise KitError(f"OUTPUT_PREFIX={output_prefix} has no parts ({folder} does not exist): run its parts first")
    return folder


def read_claims(folder: Path) -> list[Claim]:
    """The claims that together are one whole plan, in order, the newest where several are whole.

    Raises KitError when there is none, or a part is not there as it was claimed, or an input has changed since.
    """
    plans: dict[str, dict[int, Claim]] = {}
    for path in sorted(folder.glob("run_*.json"), key=lambda path: path.stat().st_mtime_ns):
        found = _read_claim(path)
        plans[found.plan] = {**plans.pop(found.plan, {}), found.index: found}  # the newest is the last
    if not plans:
        raise KitError(f"{folder} holds no finished run: run each PARTITION_INDEX first, or the whole again")
    whole = [plan for plan in plans.values() if len(plan) == next(iter(plan.values())).partitions]
    if not whole:
        raise _missing(folder, list(plans.values()))
    if len(plans) > 1:
        logger.info("%s holds runs of other input, settings or PARTITIONS too: those that are newer are joined", folder)
    claims = [whole[-1][index] for index in sorted(whole[-1])]
    for each in claims:
        _check_claim(folder, each)
    return claims


def _missing(folder: Path, plans: list[dict[int, Claim]]) -> KitError:
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


def _check_claim(folder: Path, found: Claim) -> None:
    again = f"run PARTITION_INDEX={found.index} of PARTITIONS={found.partitions} again, then merge"
    for part in found.parts:
        try:
            same = read_state(folder / f"{part.name}.json").proof() == part.proof()
        except (OSError, ValueError):
            same = False
        if not same or not is_whole(folder / part.name, found.facts["streams"]):
            raise KitError(f"{folder / part.name} is not as it was when its run ended: {again}")
    changed = _changed_input(found.parts)
    if changed:
        raise KitError(f"{changed} was changed after part {found.index} was written of it: {again}")


def _changed_input(parts: list[Finished]) -> str | None:
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
                if now.st_size != record["size"] or _hashed(pool, record) != {
                    name: record[name] for name in ("head", "blocks", "tail") if name in record
                }:
                    return str(path)
    return None


def _hashed(pool: ThreadPoolExecutor, record: dict[str, Any]) -> dict[str, Any]:
    return SpanHash(pool, Path(record["path"]), record["start"], record["end"], record["size"]).result()


def finish(output_prefix: Path, facts: dict[str, Any], parts: list[Finished]) -> dict[str, Any]:
    """Joins `parts` under their final names, writes the manifest, removes the parts; returns the manifest.

    facts: those of the job.
    """
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    folder = parts_folder(output_prefix)
    inputs = _hashed_inputs(parts)
    if counts["read"] == sum(dropped(counts).values()):
        remove_parts(folder)
        raise KitError(f"INPUT holds no document: {counts['read']} rows were read and {dropped(counts)} dropped")
    finals = {stream: Path(f"{output_prefix}_{end}") for stream, (end, _) in facts["streams"].items()}
    for stream, (_, dtype) in facts["streams"].items():
        _join([folder / f"{part.name}_{stream}" for part in parts], finals[stream], np.dtype(dtype))
    rejects.join(
        [(folder / f"{part.name}_rejects", part.records) for part in parts], rejects.rejects_path(output_prefix)
    )
    tokens = IndexedReader(finals["tokens"])
    content = {
        "kind": facts["kind"],
        "identity": identity_of(facts["kind"], inputs, facts["described"]),
        "files": {stream: path.name for stream, path in finals.items()},
        **facts["described"],
        "inputs": inputs,
        "documents": {"read": counts["read"], "kept": len(tokens), "dropped": dropped(counts)},
        "tokens": tokens.num_tokens,
        "supervised_tokens": counts.get("supervised", tokens.num_tokens),
        "longest": tokens.longest,
        "largest_id": max(part.largest_id for part in parts),
        "notes": notes(counts),
    }
    manifest.write(output_prefix, content)
    remove_parts(folder)
    return content


def _hashed_inputs(parts: list[Finished]) -> list[dict[str, Any]]:
    """path, size, time of change and hash of each input; raises AssertionError unless each byte was read once."""
    files: dict[int, dict[str, Any]] = {}
    blocks: dict[int, list[str]] = {}
    ends: Counter[int] = Counter()
    for part in parts:
        for record in part.records:
            file = record["file"]
            assert record["start"] == ends[file], (record["path"], record["start"], ends[file])
            ends[file] = record["end"]
            files.setdefault(file, {name: record[name] for name in ("path", "size", "mtime_ns")})
            blocks.setdefault(file, []).extend(record["blocks"])
    assert sorted(files) == list(range(len(files))), "an input is missing"
    assert all(ends[file] == each["size"] for file, each in files.items()), (ends, files)
    return [{**files[file], "blocks_sha256": hash_of_blocks(blocks[file])} for file in sorted(files)]


def _join(parts: list[Path], final: Path, dtype: np.dtype[Any]) -> None:
    """Gives the parts' files, joined in order, their final names; a single part gets a second name."""
    if len(parts) == 1:
        for path in (bin_path, idx_path):
            _link(path(parts[0]), path(final))
        sync(final.parent)
        return
    with IndexedWriter(final, dtype) as writer:
        for part in parts:
            writer.append(part)


def _link(path: Path, final: Path) -> None:
    """Gives `path` the name `final` too, so that a run that is killed here finds its part; else moves it."""
    partial = Path(f"{final}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
        partial.replace(final)
    except OSError:  # a file system without hard links
        path.replace(final)


def dropped(counts: Counter[str]) -> dict[str, int]:
    """Cause to number of the documents that were not kept, where there are any."""
    return {
        cause.removeprefix(DROPPED): number
        for cause, number in sorted(counts.items())
        if number and cause.startswith(DROPPED)
    }


def notes(counts: Counter[str]) -> dict[str, int]:
    """What else was counted, where it is not zero; of fields that are not used the commonest MANY by name."""
    found = {
        name: number
        for name, number in sorted(counts.items())
        if number and name not in NO_NOTES and not name.startswith(DROPPED)
    }
    unused = sorted((name for name in found if name.endswith(NOT_USED)), key=lambda name: -found[name])
    rest = sum(found.pop(name) for name in unused[MANY:])
    return {**found, f"other fields, {NOT_USED}": rest} if rest else found


def remove_parts(folder: Path) -> None:
    """Removes what runs put in the folder of parts, and the folder when nothing else is in it."""
    for path in [*folder.glob("part_*"), *folder.glob("run_*"), *folder.glob("lock*")]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
