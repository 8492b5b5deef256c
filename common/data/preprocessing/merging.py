"""Merges completed parts into the final files by copying, then writes the manifest."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset import manifest
from common.data.dataset.file_hash import hash_of_blocks
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, bin_path, idx_path
from common.data.encoders.encoded import DROPPED
from common.data.preprocessing import rejects
from common.data.preprocessing.job import identity_of, parts_folder
from common.data.preprocessing.parts import FinishedPart
from common.data.templates.fields import NOT_USED
from common.errors import KitError
from common.files import sync

COUNTS_OF_ALL_ROWS = {"read", "supervised"}
MAX_UNUSED_FIELDS = 30


def merge_parts(output_prefix: Path, facts: dict[str, Any], parts: list[FinishedPart]) -> dict[str, Any]:
    """Merges `parts` into the final files, writes the manifest and removes the parts; returns the manifest.

    facts: those of the job.
    """
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
    folder = parts_folder(output_prefix)
    inputs = _hashed_inputs(parts)
    if counts["read"] == sum(dropped_of(counts).values()):
        remove_parts(folder)
        raise KitError(f"INPUT holds no documents: {counts['read']} rows were read and {dropped_of(counts)} dropped")
    finals = {stream: Path(f"{output_prefix}_{end}") for stream, (end, _) in facts["streams"].items()}
    for stream, (_, dtype) in facts["streams"].items():
        _merge_stream([folder / f"{part.name}_{stream}" for part in parts], finals[stream], np.dtype(dtype))
    rejects.merge_rejects(
        [(folder / f"{part.name}_rejects", part.records) for part in parts], rejects.rejects_path(output_prefix)
    )
    tokens = IndexedDataset(finals["tokens"])
    content = {
        "kind": facts["kind"],
        "identity": identity_of(facts["kind"], inputs, facts["described"]),
        "files": {stream: path.name for stream, path in finals.items()},
        **facts["described"],
        "inputs": inputs,
        "documents": {"read": counts["read"], "kept": _rows(facts["kind"], tokens), "dropped": dropped_of(counts)},
        "tokens": tokens.num_tokens,
        "supervised_tokens": counts.get("supervised", tokens.num_tokens),
        "longest": tokens.longest,
        "largest_id": max(part.largest_id for part in parts),
        "notes": notes_of(counts),
    }
    manifest.write(output_prefix, content)
    remove_parts(folder)
    return content


def _rows(kind: str, tokens: IndexedDataset) -> int:
    """The rows that the documents of `tokens` come from; of preferences each is a pair of documents."""
    return len(tokens) // 2 if kind == "preference" else len(tokens)


def _hashed_inputs(parts: list[FinishedPart]) -> list[dict[str, Any]]:
    """Path, size, modification time and hash of each input; raises AssertionError unless each byte was read once."""
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


def _merge_stream(parts: list[Path], final: Path, dtype: np.dtype[Any]) -> None:
    """Merges the files of `parts`, in order, into `final`; a single part is hard-linked."""
    if len(parts) == 1:
        for path in (bin_path, idx_path):
            _link(path(parts[0]), path(final))
        sync(final.parent)
        return
    with IndexedDatasetBuilder(final, dtype) as writer:
        for part in parts:
            writer.add_index(part)


def _link(path: Path, final: Path) -> None:
    """Hard-links `path` to `final`, so that a run that is killed here finds its part again; else renames it."""
    partial = Path(f"{final}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
        partial.replace(final)
    except OSError:  # the file system has no hard links
        path.replace(final)


def dropped_of(counts: Counter[str]) -> dict[str, int]:
    """Cause to number of dropped documents, without zeros."""
    return {
        cause.removeprefix(DROPPED): number
        for cause, number in sorted(counts.items())
        if number and cause.startswith(DROPPED)
    }


def notes_of(counts: Counter[str]) -> dict[str, int]:
    """The other counts, without zeros; of the unused fields the most frequent MAX_UNUSED_FIELDS by name."""
    found = {
        name: number
        for name, number in sorted(counts.items())
        if number and name not in COUNTS_OF_ALL_ROWS and not name.startswith(DROPPED)
    }
    unused = sorted((name for name in found if name.endswith(NOT_USED)), key=lambda name: -found[name])
    rest = sum(found.pop(name) for name in unused[MAX_UNUSED_FIELDS:])
    return {**found, f"other fields, {NOT_USED}": rest} if rest else found


def remove_parts(folder: Path) -> None:
    """Removes the files of runs in the folder of parts, and the folder if it is then empty."""
    for path in [*folder.glob("part_*"), *folder.glob("run_*"), *folder.glob("lock*")]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
