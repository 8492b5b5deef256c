"""Output that already exists at OUTPUT_PREFIX: that of an equal job, or of another one."""

from typing import Any

from common.data.dataset import manifest
from common.data.dataset.indexed_dataset import bin_path, idx_path
from common.data.encoders.encoded import BAD_ROWS, DROPPED
from common.data.preprocessing.job import Job, identity_of
from common.errors import KitError


def find_finished(job: Job) -> dict[str, Any] | None:
    """The manifest of a finished run of the same job, or None; raises KitError when other files are in its place."""
    content = manifest.read(job.output_prefix)
    finals = [path for name in job.streams for path in (bin_path(job.final(name)), idx_path(job.final(name)))]
    existing = [path for path in finals if path.exists()]
    if content is None:
        if existing and not job.folder.exists():
            raise KitError(f"{existing[0]} already exists without a manifest: remove it or change OUTPUT_PREFIX")
        return None
    try:
        manifest.check_fields(content, {"identity": str, "inputs": list, "documents": dict})
    except ValueError as error:
        path = manifest.manifest_path(job.output_prefix)
        raise KitError(
            f"{path} is an incomplete manifest: {error}: remove it and its files to write them again"
        ) from error
    differs = _difference(content, job)
    if differs:
        raise KitError(
            f"{manifest.manifest_path(job.output_prefix)} has other input, tokenizer or settings"
            f" ({', '.join(differs)}): remove it and its files, or change OUTPUT_PREFIX"
        )
    if len(existing) < len(finals):
        raise KitError(f"{manifest.manifest_path(job.output_prefix)} exists without its files: remove it to continue")
    return content


def _difference(content: dict[str, Any], job: Job) -> list[str]:
    """The names of what differs between a manifest and `job`; reads the input only if nothing else differs."""
    names = []
    for section, new in job.described.items():
        old = content.get(section, {})
        names += sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    inputs = content.get("inputs", [])
    if [each["size"] for each in inputs] != [size for size, _ in job.stamps]:
        names.insert(0, "input")
    if content["version"] != manifest.VERSION:
        names.append(f"manifest version {content['version']} instead of {manifest.VERSION}")
    if not names:
        hashed = job.hashed_inputs(inputs)
        if [each.get("blocks_sha256") for each in inputs] != [each["blocks_sha256"] for each in hashed]:
            return ["input"]
        if content.get("identity") != identity_of(job.kind, hashed, job.described):
            return ["identity"]
        if BAD_ROWS.removeprefix(DROPPED) in content["documents"]["dropped"] and not job.skip_bad_rows:
            return ["rows skipped by ON_ERROR=skip"]
    return names
