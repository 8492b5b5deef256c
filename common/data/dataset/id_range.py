"""The range of token ids in a dataset: from its manifest, or from one scan of the file."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset.file_hash import DATA_SAMPLES, hash_samples
from common.data.dataset.indexed_dataset import IndexedDataset, bin_path
from common.data.dataset.manifest import DataFiles
from common.errors import KitError, reading
from common.files import write_json
from common.log import logger

READ_BYTES = 16 << 20
CACHE_BYTES = 1 << 30  # the range of larger files is cached next to them


def check_ids(files: DataFiles, tokens: IndexedDataset, vocab_size: int, source: Path) -> None:
    """Raises KitError unless every id in `tokens` is below `vocab_size`, which comes from `source`.

    A tensor-parallel embedding treats a larger id as one of another rank and silently returns zeros
    (VocabParallelEmbedding in Megatron-Core's tensor_parallel/layers.py).
    """
    smallest, largest = id_range(files, tokens)
    if smallest < 0:
        raise KitError(
            f"{bin_path(tokens.prefix)} holds the token id {smallest}, which is negative: give data of step 1"
            " (`python -m common.preprocess import-legacy` imports fine-tuning data of the legacy kit)"
        )
    if largest >= vocab_size:
        raise KitError(
            f"{bin_path(tokens.prefix)} holds the token id {largest}, but the model's largest id is {vocab_size - 1}"
            f" (vocab_size={vocab_size} in {source}): run step 1 with the tokenizer of the model, or resize the"
            " model's embedding to the tokenizer (resize_token_embeddings in transformers) and convert it again"
        )


def warn_if_vocab_exceeds_model(folder: Path, num_ids: int) -> None:
    """Logs a warning when the config.json next to the tokenizer has a smaller vocab_size than `num_ids`."""
    with suppress(OSError, ValueError, RecursionError):  # step 1 does not need config.json
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size") if isinstance(config, dict) else None
        if type(size) is int and size < num_ids:
            logger.warning(
                "the tokenizer's largest id is %d, that of %s is %d (vocab_size=%d): training rejects such data;"
                " resize the model's embedding first (resize_token_embeddings in transformers)",
                num_ids - 1, folder / "config.json", size - 1, size,
            )  # fmt: skip


def id_range(files: DataFiles, tokens: IndexedDataset) -> tuple[int, int]:
    """(smallest, largest) id in `tokens`, (0, 0) when it is empty.

    Comes from the manifest, whose data has no negative ids, else from a cached scan, else from a scan of the file.
    """
    recorded = (files.manifest or {}).get("largest_id")
    if type(recorded) is int and recorded >= 0:
        return 0, recorded
    data = bin_path(tokens.prefix)
    size = tokens.num_tokens * tokens.dtype.itemsize
    if size < CACHE_BYTES:
        return scan_id_range(tokens)
    state, cache = _state_of(data), Path(f"{tokens.prefix}.ids.json")
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(cache.read_text(encoding="utf-8"))
        if found["of"] == state:
            return int(found["smallest"]), int(found["largest"])
    reason = "its manifest was written by an earlier version" if files.manifest else "it has no manifest"
    logger.info("scanning the token ids of %s (%.1f GB) once: %s", data, size / 1e9, reason)
    started = time.monotonic()
    smallest, largest = scan_id_range(tokens)
    logger.info("its token ids are %d to %d, scanned in %.0f s", smallest, largest, time.monotonic() - started)
    try:
        write_json(cache, {"of": state, "smallest": smallest, "largest": largest})
    except OSError as error:
        logger.info("%s cannot be written (%s): the next start will scan again", cache, error.strerror)
    return smallest, largest


def scan_id_range(tokens: IndexedDataset) -> tuple[int, int]:
    """(smallest, largest) id in the file, (0, 0) when it is empty; reads it block by block, without mapping it."""
    data, number = bin_path(tokens.prefix), READ_BYTES // tokens.dtype.itemsize
    smallest, largest = 0, 0
    with reading(data), data.open("rb") as stream:
        while (block := np.fromfile(stream, tokens.dtype, number)).size:
            if tokens.dtype.kind == "i":
                smallest = min(smallest, int(block.min()))
            largest = max(largest, int(block.max()))
    return smallest, largest


def _state_of(data: Path) -> dict[str, Any]:
    """What identifies an unchanged file: its size, modification time and a hash of samples."""
    found = data.stat()
    return {"bytes": found.st_size, "changed_ns": found.st_mtime_ns, "samples": hash_samples(data, DATA_SAMPLES)}
