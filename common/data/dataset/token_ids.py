"""The largest id that a dataset holds: what its manifest tells, else what its file holds when it is read once."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset.fingerprint import DATA_SAMPLES, hash_samples
from common.data.dataset.indexed import IndexedReader, bin_path
from common.data.dataset.manifest import DataFiles, write_json
from common.errors import KitError, reading
from common.log import logger

READ_BYTES = 16 << 20
KEEP_BYTES = 1 << 30  # of files from this size on the answer is kept beside them


def check_ids(files: DataFiles, tokens: IndexedReader, vocab_size: int, source: Path) -> None:
    """Raises KitError unless every id of `tokens` is one of `vocab_size`, which `source` tells.

    An embedding that is split over ranks takes a larger id for one of another rank's rows and gives zeros, without a
    word (VocabParallelEmbedding in Megatron-Core's tensor_parallel/layers.py).
    """
    smallest, largest = id_range(files, tokens)
    if smallest < 0:
        raise KitError(
            f"{bin_path(tokens.prefix)} holds the id {smallest}: ids are not negative; give data of step 1"
            " (fine-tuning data of the old kit is taken over by `python -m common.preprocess import-legacy`)"
        )
    if largest >= vocab_size:
        raise KitError(
            f"{bin_path(tokens.prefix)} holds the id {largest}, and the model's ids end at {vocab_size - 1}"
            f" (vocab_size={vocab_size} in {source}): run step 1 with the tokenizer that the model has, or resize the"
            " model's embedding to the tokenizer (resize_token_embeddings in transformers) and convert it again"
        )


def tell_smaller_model(folder: Path, num_ids: int) -> None:
    """Logs it where the config.json beside a tokenizer of so many ids is of a model with fewer."""
    with suppress(OSError, ValueError, RecursionError):  # step 1 needs no config.json
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size") if isinstance(config, dict) else None
        if type(size) is int and size < num_ids:
            logger.warning(
                "the tokenizer's ids go up to %d, those of %s to %d (vocab_size=%d): training refuses such data:"
                " resize the model's embedding first (resize_token_embeddings in transformers)",
                num_ids - 1, folder / "config.json", size - 1, size,
            )  # fmt: skip


def id_range(files: DataFiles, tokens: IndexedReader) -> tuple[int, int]:
    """(smallest, largest) id of `tokens`, (0, 0) where there is none; the smallest may be lower in truth than told.

    From the manifest that step 1 wrote, else from what an earlier scan left, else by a scan of the file.
    """
    told = (files.manifest or {}).get("largest_id")
    if type(told) is int and told >= 0:
        return 0, told
    data = bin_path(tokens.prefix)
    size = tokens.num_tokens * tokens.dtype.itemsize
    if size < KEEP_BYTES:
        return scan(tokens)
    state, kept = _state_of(data), Path(f"{tokens.prefix}.ids.json")
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["of"] == state:
            return int(found["smallest"]), int(found["largest"])
    missing = "its manifest is of an earlier kit" if files.manifest else "it has no manifest"
    logger.info("the largest id of %s is not known, %s: its %.1f GB are read once", data, missing, size / 1e9)
    started = time.monotonic()
    smallest, largest = scan(tokens)
    logger.info("its ids are %d to %d, read in %.0f s", smallest, largest, time.monotonic() - started)
    try:
        write_json(kept, {"of": state, "smallest": smallest, "largest": largest})
    except OSError as error:
        logger.info("%s cannot be written (%s): the next start reads them again", kept, error.strerror)
    return smallest, largest


def scan(tokens: IndexedReader) -> tuple[int, int]:
    """(smallest, largest) id of the file, (0, 0) where it holds none; read block by block, not mapped."""
    data, number = bin_path(tokens.prefix), READ_BYTES // tokens.dtype.itemsize
    smallest, largest = 0, 0
    with reading(data), data.open("rb") as stream:
        while (block := np.fromfile(stream, tokens.dtype, number)).size:
            if tokens.dtype.kind == "i":
                smallest = min(smallest, int(block.min()))
            largest = max(largest, int(block.max()))
    return smallest, largest


def _state_of(data: Path) -> dict[str, Any]:
    """By which a file is known again: its size and time of change, and samples of its bytes."""
    told = data.stat()
    return {"bytes": told.st_size, "changed_ns": told.st_mtime_ns, "samples": hash_samples(data, DATA_SAMPLES)}
