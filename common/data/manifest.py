"""What a dataset on disk is: its manifest `{OUTPUT_PREFIX}.json`, and the way from DATASET_PATH to the files."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.indexed import idx_path, sync
from common.errors import KitError

FORMAT = "qwen-kit-data"
VERSION = 1
OF_NAMES = "backslashreplace"  # a byte of a name that is not UTF-8, to Python a half surrogate, becomes JSON's \\udc..


@dataclass(frozen=True)
class DataFiles:
    """One dataset: kind "pretrain" or "sft", the prefixes of its files, its manifest where it has one."""

    kind: str
    tokens: Path
    loss_mask: Path | None = None
    manifest: dict[str, Any] | None = None


def manifest_path(output_prefix: Path) -> Path:
    """The manifest of what was written to `output_prefix`."""
    return Path(f"{output_prefix}.json")


def hash_json(value: Any) -> str:
    """sha256 of `value` as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors=OF_NAMES)).hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path`, which never holds half of it."""
    partial = Path(f"{path}.partial")
    with partial.open("w", encoding="utf-8", errors=OF_NAMES) as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    sync(path.parent)


def write(output_prefix: Path, content: dict[str, Any]) -> None:
    """Writes the manifest of `output_prefix`; raises AssertionError unless its documents reconcile."""
    documents = content["documents"]
    assert documents["read"] == documents["kept"] + sum(documents["dropped"].values()), documents
    write_json(manifest_path(output_prefix), {"format": FORMAT, "version": VERSION, **content})


def read(output_prefix: Path) -> dict[str, Any] | None:
    """The manifest of `output_prefix`, None where there is none; raises KitError when it is not readable."""
    path = manifest_path(output_prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KitError(f"{path} is no JSON ({error}): write the data again with step 1") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if content["version"] > VERSION:
        raise KitError(f"{path} has version {content['version']}, this kit reads {VERSION}: use a newer kit")
    return content


def resolve(dataset_path: str) -> DataFiles:
    """The files of DATASET_PATH, which is an OUTPUT_PREFIX of step 1 or the full `..._document` prefix.

    Data without a manifest, as Megatron-LM's own tool writes it, is "sft" where a loss mask lies beside it.
    Raises KitError when nothing is found.
    """
    given = Path(dataset_path)
    content = read(given)
    if content:
        return _from_manifest(given, content)
    if given.name.endswith("_loss_mask_document"):
        raise KitError(f"DATASET_PATH={given} is a loss mask: give the {_without(given, '_loss_mask_document')}")
    for tokens in (given, Path(f"{given}_text_document")):
        if idx_path(tokens).is_file():
            return _named_by(tokens) or _bare(tokens)
    raise KitError(
        f"DATASET_PATH={given} is no dataset: neither {given}.json nor {given}.idx nor {given}_text_document.idx"
        " exists; give the OUTPUT_PREFIX of step 1"
    )


def _without(path: Path, end: str) -> Path:
    return path.with_name(path.name.removesuffix(end))


def _from_manifest(output_prefix: Path, content: dict[str, Any]) -> DataFiles:
    files = {name: output_prefix.with_name(file) for name, file in content["files"].items()}
    return DataFiles(content["kind"], files["tokens"], files.get("loss_mask"), content)


def _named_by(tokens: Path) -> DataFiles | None:
    """The dataset whose manifest names `tokens` as its own; a JSON_KEY may hold underscores, so each cut is tried."""
    words = tokens.name.split("_")
    for end in range(len(words) - 2, 0, -1):
        prefix = tokens.with_name("_".join(words[:end]))
        content = read(prefix)
        if content and content["files"]["tokens"] == tokens.name:
            return _from_manifest(prefix, content)
    return None


def _bare(tokens: Path) -> DataFiles:
    mask = tokens.with_name(tokens.name.removesuffix("_text_document") + "_loss_mask_document")
    if mask != tokens and idx_path(mask).is_file():
        return DataFiles("sft", tokens, mask)
    return DataFiles("pretrain", tokens)
