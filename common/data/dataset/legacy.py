"""Imports fine-tuning data of the legacy kit: rows of twice the sequence length to tokens and a loss mask.

A legacy document has 2 S int32 values: S tokens, then S labels. Labels are already shifted, with -100 outside the loss.
The last token of each conversation is stored as -1 - id; the tokens after the last such mark are padding.
    tokens  [a b c -1-d | pad pad]      labels  [-100 c d -100 | -100 -100]      (S = 6)
    becomes the document [a b c d] with the mask [0 0 1 1].
"""

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset import manifest
from common.data.dataset.id_range import scan_id_range
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, idx_path, token_dtype
from common.data.tokenizer.text_tokenizer import TextTokenizer
from common.errors import KitError, writing

IGNORED = -100


def parse_legacy_row(row: np.ndarray, where: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens int32, loss mask uint8) of each conversation in `row`; raises KitError when it is not a legacy row."""
    if row.size % 2:
        raise KitError(f"{where} has {row.size} values, which is odd: it is not fine-tuning data of the legacy kit")
    tokens, labels = row[: row.size // 2], row[row.size // 2 :]
    ends = np.flatnonzero(tokens < 0) + 1
    found, start = [], 0
    for end in ends.tolist():
        ids = tokens[start:end].copy()
        ids[-1] = -1 - ids[-1]
        shifted = labels[start:end]
        in_loss = shifted[:-1] != IGNORED
        if shifted[-1] != IGNORED or not np.array_equal(shifted[:-1][in_loss], ids[1:][in_loss]):
            raise KitError(f"{where}: its labels are not its tokens shifted by one: it is not data of the legacy kit")
        found.append((ids, np.concatenate([[0], in_loss]).astype(np.uint8)))
        start = end
    if not found:
        raise KitError(f"{where} marks no end of a conversation: it is not fine-tuning data of the legacy kit")
    if (labels[start:] != IGNORED).any():
        raise KitError(f"{where} has labels after its last conversation: it is not data of the legacy kit")
    return found


def legacy_prefix(given: Path) -> Path:
    """The prefix of the files of `given`: the legacy kit's OUTPUT_PREFIX, or the full ..._text_document."""
    full = Path(f"{given}_text_document")
    return full if idx_path(full).is_file() and not idx_path(given).is_file() else given


def refuse_legacy(files: manifest.DataFiles) -> None:
    """Raises KitError with the import command when `files` is fine-tuning data of the legacy kit."""
    if files.manifest or files.loss_mask:
        return
    reader = IndexedDataset(files.tokens)
    if reader.dtype != np.int32 or not len(reader):
        return
    try:
        parse_legacy_row(reader[0], "")
    except KitError:
        return
    prefix = str(files.tokens).removesuffix("_text_document")
    words = ["--input", prefix, "--output-prefix", f"{prefix}_imported"]
    raise KitError(
        f"{files.tokens} is fine-tuning data of the legacy kit, rows of tokens and labels: import it, with the model"
        f" folder as TOKENIZER_PATH, by `python -m common.preprocess import-legacy {shlex.join(words)}"
        f' --tokenizer-path "$TOKENIZER_PATH"`, then set TRAIN_MODE=finetune'
        f" DATASET_PATH={shlex.quote(prefix + '_imported')}"
    )


def import_legacy(source: Path, output_prefix: Path, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Writes the legacy data `source`, see `legacy_prefix`, to `output_prefix`; returns its manifest."""
    source = legacy_prefix(source)
    reader = IndexedDataset(source)
    if reader.dtype != np.int32:
        raise KitError(f"{source} holds {reader.dtype}, but the legacy kit's rows are int32: give its fine-tuning data")
    finals = {
        "loss_mask": Path(f"{output_prefix}_loss_mask_document"),
        "tokens": Path(f"{output_prefix}_text_document"),
    }
    for path in [manifest.manifest_path(output_prefix), *map(idx_path, finals.values())]:
        if path.exists():
            raise KitError(f"{path} already exists: remove it or change OUTPUT_PREFIX")
    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    # The loss mask is renamed first: tokens alone would look like pretraining data.
    with (
        writing(output_prefix),
        IndexedDatasetBuilder(finals["tokens"], token_dtype(tokenizer.vocab_size)) as tokens,
        IndexedDatasetBuilder(finals["loss_mask"], np.uint8) as masks,
    ):
        for number in range(len(reader)):
            for ids, mask in parse_legacy_row(reader[number], f"{source}, row {number}"):
                _check_ids(ids, tokenizer, f"{source}, row {number}")
                tokens.add_document(ids)
                masks.add_document(mask)
                counts.update(documents=1, supervised=int(mask.sum()))
    content = _describe(source, finals, tokenizer, counts, len(reader))
    manifest.write(output_prefix, content)
    return content


def _check_ids(ids: np.ndarray, tokenizer: TextTokenizer, where: str) -> None:
    if ids.max() >= tokenizer.vocab_size:
        raise KitError(
            f"{where} holds the token id {ids.max()}, but {tokenizer.folder} has {tokenizer.vocab_size} tokens: give"
            " the folder of the tokenizer that wrote the data"
        )


def _describe(
    source: Path, finals: dict[str, Path], tokenizer: TextTokenizer, counts: Counter[str], rows: int
) -> dict[str, Any]:
    described = {
        "tokenizer": {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "settings": {"imported_from": str(source)},
    }
    tokens = IndexedDataset(finals["tokens"])
    return {
        "kind": "sft",
        "identity": manifest.hash_json([manifest.VERSION, "sft", described]),
        "files": {stream: path.name for stream, path in finals.items()},
        **described,
        "inputs": [],
        "documents": {"read": counts["documents"], "kept": counts["documents"], "dropped": {}},
        "tokens": tokens.num_tokens,
        "supervised_tokens": counts["supervised"],
        "longest": tokens.longest,
        "largest_id": scan_id_range(tokens)[1],
        "notes": {"rows of the legacy kit": rows},
    }
