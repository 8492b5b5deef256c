"""The identity of a checkpoint's weights, wherever it lies: what an adapter or a reference was computed from."""

import hashlib
from pathlib import Path

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE
from common.data.dataset.file_hash import HASHED, hash_samples

FILE_SAMPLES = 64  # of each file, so that 72B's take a second


def weights_hash(path: Path) -> str:
    """The hash of names, sizes and samples of the weight files in `path`, a checkpoint of either format.

    The same weights in another format or layout have another hash. An edit between the samples goes unnoticed.
    """
    files = sorted([*path.glob("*.distcp"), *path.glob(f"mp_rank_*/{MODEL_FILE}")])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path)} {hash_samples(file, FILE_SAMPLES)}\n".encode())
    return f"{HASHED}{digest.hexdigest()}"
