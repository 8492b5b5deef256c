"""The manifest `{OUTPUT_PREFIX}.json` of a dataset, and how DATASET_PATH resolves to files."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.dataset.indexed_dataset import idx_path
from common.errors import KitError
from common.files import NON_UTF8_NAMES, write_json

FORMAT = "qwen-kit-data"
KINDS = ("pretrain", "sft", "preference")
NAMES: dict[type, str] = {int: "an integer", str: "a string", dict: "an object", list: "an array"}
VERSION = 2  # version 1 hashed the inputs in other blocks


@dataclass(frozen=True)
class DataFiles:
    """One dataset: kind "pretrain", "sft" or "preference", the prefixes of its files, and its manifest, if any."""

    kind: str
    tokens: Path
    loss_mask: Path | None = None
    manifest: dict[str, Any] | None = None

    @property
    def documents_per_row(self) -> int:
        """The documents that a row of the input became: those of a pair, chosen then rejected, belong together."""
        return 2 if self.kind == "preference" else 1


def manifest_path(output_prefix: Path) -> Path:
    """The manifest of what was written to `output_prefix`."""
    return Path(f"{output_prefix}.json")


def hash_json(value: Any) -> str:
    """sha256 of `value` as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors=NON_UTF8_NAMES)).hexdigest()


def write(output_prefix: Path, content: dict[str, Any]) -> None:
    """Writes the manifest of `output_prefix`; raises AssertionError unless its document counts add up."""
    documents = content["documents"]
    assert documents["read"] == documents["kept"] + sum(documents["dropped"].values()), documents
    write_json(manifest_path(output_prefix), {"format": FORMAT, "version": VERSION, **content})


def read(output_prefix: Path) -> dict[str, Any] | None:
    """The manifest of `output_prefix`, or None; raises KitError when it is malformed."""
    path = manifest_path(output_prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise KitError(f"{path} is not JSON ({error}): write the data again with step 1") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise KitError(f"{path} has version {version}, this kit reads {VERSION}: use a newer kit")
    try:
        _check(content)
    except ValueError as error:
        raise KitError(f"{path} is an incomplete manifest: {error}: write the data again with step 1") from error
    return content


FIELDS: dict[str, type] = {"version": int, "kind": str, "files": dict}
OTHER_FIELDS: dict[str, type] = {
    "identity": str, "inputs": list, "documents": dict, "notes": dict, "tokens": int, "supervised_tokens": int,
    "longest": int, "tokenizer": dict, "settings": dict, "chat_template": dict,
}  # fmt: skip


def _check(content: dict[str, Any]) -> None:
    """Raises ValueError unless `content` has the fields of a manifest."""
    check_fields(content, FIELDS)
    check_fields(content, {name: kind for name, kind in OTHER_FIELDS.items() if name in content})
    if content["kind"] not in KINDS:
        raise ValueError(f"its 'kind' is {content['kind']!r}, not {' or '.join(KINDS)}")
    if "documents" in content:
        check_fields(content["documents"], {"read": int, "kept": int, "dropped": dict})
    check_fields(content["files"], dict.fromkeys(["tokens", *content["files"]], str))
    for name in content["files"].values():
        if not name or Path(name).name != name:
            raise ValueError(f"its 'files' hold {name!r}, which is not a file name")
    for each in content.get("inputs", []):
        check_fields(each, {"path": str, "size": int})


def check_fields(value: Any, kinds: dict[str, type]) -> None:
    """Raises ValueError unless `value` is a JSON object with fields of `kinds`."""
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r} is not an object")
    for name, kind in kinds.items():
        if name not in value:
            raise ValueError(f"it has no '{name}'")
        if not isinstance(value[name], kind) or (kind is int and isinstance(value[name], bool)):
            raise ValueError(f"its '{name}' is not {NAMES[kind]}")


def resolve(dataset_path: str, setting: str = "DATASET_PATH") -> DataFiles:
    """The files of `dataset_path`, an OUTPUT_PREFIX of step 1 or the full `..._document` prefix.

    Data without a manifest, as Megatron-LM's preprocess_data.py writes it, is "sft" when a loss mask lies next to it.
    Raises KitError, which names `setting`, when nothing is found.
    """
    given = Path(dataset_path)
    content = read(given)
    if content:
        return _from_manifest(given, content)
    if given.name.endswith("_loss_mask_document"):
        raise KitError(f"{setting}={given} is a loss mask: give the {_without(given, '_loss_mask_document')}")
    for tokens in (given, Path(f"{given}_text_document")):
        if idx_path(tokens).is_file():
            return _find_manifest(tokens) or _without_manifest(tokens)
    raise KitError(
        f"{setting}={given} is not a dataset: neither {given}.json nor {given}.idx nor {given}_text_document.idx"
        " exists; give the OUTPUT_PREFIX of step 1"
    )


def _without(path: Path, end: str) -> Path:
    return path.with_name(path.name.removesuffix(end))


def _from_manifest(output_prefix: Path, content: dict[str, Any]) -> DataFiles:
    files = {name: output_prefix.with_name(file) for name, file in content["files"].items()}
    return DataFiles(content["kind"], files["tokens"], files.get("loss_mask"), content)


def _find_manifest(tokens: Path) -> DataFiles | None:
    """The dataset whose manifest names `tokens`; every split is tried, since JSON_KEY may contain underscores."""
    words = tokens.name.split("_")
    for end in range(len(words) - 2, 0, -1):
        prefix = tokens.with_name("_".join(words[:end]))
        content = read(prefix)
        if content and content["files"]["tokens"] == tokens.name:
            return _from_manifest(prefix, content)
    return None


def _without_manifest(tokens: Path) -> DataFiles:
    mask = tokens.with_name(tokens.name.removesuffix("_text_document") + "_loss_mask_document")
    if mask != tokens and idx_path(mask).is_file():
        return DataFiles("sft", tokens, mask)
    return DataFiles("pretrain", tokens)
