"""Finished parts to the finished files: joined in order by copy, then the manifest."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common.data import manifest, rejects
from common.data.encoded import DROPPED, NOT_USED
from common.data.fingerprint import hash_of_blocks
from common.data.ids import scan
from common.data.indexed import IndexedReader, IndexedWriter, bin_path, idx_path, sync
from common.data.job import identity_of, part_name, parts_folder
from common.errors import KitError

NO_NOTES = {"read", "supervised"}
MANY = 30


def need_folder(output_prefix: Path) -> Path:
    """The folder of parts of `output_prefix`; raises KitError when there is none."""
    folder = parts_folder(output_prefix)
    if not folder.is_dir():
        if manifest.read(output_prefix):
            raise KitError(f"OUTPUT_PREFIX={output_prefix} is finished: there is nothing to merge")
        raise KitError(f"OUTPUT_PREFIX={output_prefix} has no parts ({folder} does not exist): run its parts first")
    return folder


def read_states(folder: Path) -> list[dict[str, Any]]:
    """The states of all parts in `folder`, in order; raises KitError when one is missing or of another job."""
    states: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("part_*.json")):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            states[state["number"]] = state
        except (ValueError, KeyError, TypeError) as error:
            raise KitError(f"{path} is no state of a part ({error}): remove it and run that part again") from error
    if not states:
        raise KitError(f"{folder} holds no finished part: run its parts first")
    first = next(iter(states.values()))
    partitions = first["job"]["partitions"]
    for number, state in states.items():
        if _comparable(state["job"]) != _comparable(first["job"]):
            raise KitError(
                f"part {number} in {folder} is of other input, tokenizer or settings than part {first['number']}:"
                " run it again with the same settings"
            )
    missing = [str(number) for number in range(partitions) if number not in states]
    if missing:
        raise KitError(
            f"{len(missing)} of {partitions} parts are not finished in {folder}: run PARTITION_INDEX="
            f"{', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}"
        )
    return [states[number] for number in range(partitions)]


def _comparable(job: dict[str, Any]) -> dict[str, Any]:
    """What the parts must agree on: an input may be mounted elsewhere on another machine."""
    return {**job, "inputs": [each["size"] for each in job["inputs"]]}


def finish(output_prefix: Path, states: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins all parts under their final names, writes the manifest, removes the parts; returns the manifest."""
    counts: Counter[str] = Counter()
    for state in states:
        counts.update(state["counts"])
    folder, job = parts_folder(output_prefix), states[0]["job"]
    inputs = _hashed_inputs(states)
    if counts["read"] == sum(dropped(counts).values()):
        remove_parts(folder)
        raise KitError(f"INPUT holds no document: {counts['read']} rows were read and {dropped(counts)} dropped")
    names = [part_name(number) for number in range(len(states))]
    finals = {stream: Path(f"{output_prefix}_{end}") for stream, (end, _) in job["streams"].items()}
    for stream, (_, dtype) in job["streams"].items():
        _join([folder / f"{name}_{stream}" for name in names], finals[stream], np.dtype(dtype))
    rejects.join([folder / f"{name}_rejects" for name in names], rejects.rejects_path(output_prefix))
    tokens = IndexedReader(finals["tokens"])
    content = {
        "kind": job["kind"],
        "identity": identity_of(job["kind"], inputs, job["described"]),
        "files": {stream: path.name for stream, path in finals.items()},
        **job["described"],
        "inputs": inputs,
        "documents": {"read": counts["read"], "kept": len(tokens), "dropped": dropped(counts)},
        "tokens": tokens.num_tokens,
        "supervised_tokens": counts.get("supervised", tokens.num_tokens),
        "longest": tokens.longest,
        "largest_id": _largest_id(states, tokens),
        "notes": notes(counts),
    }
    manifest.write(output_prefix, content)
    remove_parts(folder)
    return content


def _largest_id(states: list[dict[str, Any]], tokens: IndexedReader) -> int:
    """The largest id of all parts; a part that an older kit wrote does not tell, and the file is read for it."""
    told = [state["largest_id"] for state in states if "largest_id" in state]
    return max(told) if len(told) == len(states) else scan(tokens)[1]


def _hashed_inputs(states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """path, size and hash of each input; raises KitError when two parts read different bytes in one place."""
    inputs = states[0]["job"]["inputs"]
    blocks: list[dict[int, str]] = [{} for _ in inputs]
    for state in states:
        for file, number, digest in state["blocks"]:
            if blocks[file].setdefault(number, digest) != digest:
                raise KitError(
                    f"{inputs[file]['path']} was changed between two parts, of which one is {state['number']}:"
                    " run all parts again"
                )
    found = []
    for each, hashes in zip(inputs, blocks, strict=True):
        # A file that INPUT names twice was hashed once.
        same = next(b for other, b in zip(inputs, blocks, strict=True) if other["path"] == each["path"])
        found.append({**each, "blocks_sha256": hash_of_blocks(hashes or same, each["size"])})
    return found


def _join(parts: list[Path], final: Path, dtype: np.dtype[Any]) -> None:
    """Gives the parts' files, joined in order, their final names; a single part is renamed."""
    if len(parts) == 1:
        for path in (bin_path, idx_path):
            path(parts[0]).replace(path(final))
        sync(final.parent)
        return
    with IndexedWriter(final, dtype) as writer:
        for part in parts:
            writer.append(part)


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
    for path in [*folder.glob("part_*"), *folder.glob("lock*")]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
