"""Builds the training and validation datasets from `.bin`/`.idx` files, after checking them."""

import numpy as np

from common.data.dataset.gpt_dataset import GPTDataset
from common.data.dataset.indexed_dataset import IndexedDataset, open_mask, open_tokens
from common.data.dataset.legacy import refuse_legacy
from common.data.dataset.manifest import DataFiles
from common.data.dataset.preference_dataset import PreferenceDataset, build_pair_index
from common.data.dataset.sample_dataset import SampleDataset
from common.data.dataset.sft_dataset import SFTDataset, build_sample_index
from common.errors import KitError

KIND_OF_MODE = {"pretrain": "pretrain", "finetune": "sft", "dpo": "preference"}


def split_documents(num_documents: int, split: str) -> tuple[range, range]:
    """(training documents, validation documents), contiguous, by a split such as "98,2,0"; the test share is unused.

    Boundaries are rounded as in Megatron-Core's blended_megatron_dataset_builder. Raises KitError.
    """
    rule = f"SPLIT={split}: give one to three non-negative numbers, as 98,2,0"
    try:
        shares = [float(word) for word in split.split(",")]
    except ValueError as error:
        raise KitError(rule) from error
    if len(shares) > 3 or not all(0 <= share < float("inf") for share in shares) or shares[0] <= 0:
        raise KitError(f"{rule}, the first above 0")
    ends = np.cumsum(shares) / sum(shares)
    train = round(float(ends[0]) * num_documents)
    valid = round(float(ends[min(1, len(shares) - 1)]) * num_documents)
    return range(train), range(train, valid)


def build_dataset(
    files: DataFiles,
    *,
    train_mode: str,
    seq_length: int,
    seed: int,
    documents: range | None = None,
    packing: bool = False,
    truncate: str = "error",
    reset_attention: bool = False,
    pad_id: int = 0,
    check: bool = True,
    listed: bool | None = None,
) -> SampleDataset:
    """The dataset of `documents` (None: all); raises KitError for data of the other kind, or for too little data.

    documents: of preference data, the pairs. check: check the whole index files, see IndexedDataset. listed: see
    GPTDataset.
    """
    refuse_legacy(files)
    if files.kind != KIND_OF_MODE[train_mode]:
        raise KitError(
            f'{files.tokens} is "{files.kind}" data, but TRAIN_MODE={train_mode} needs "{KIND_OF_MODE[train_mode]}"'
            " data: change TRAIN_MODE, or DATASET_PATH"
        )
    if seed < 0:
        raise KitError(f"SEED={seed}: it must not be negative")
    tokens = open_tokens(files.tokens, check)
    check_against_manifest(files, tokens)
    documents = range(len(tokens) // files.documents_per_row) if documents is None else documents
    if train_mode == "pretrain":
        return GPTDataset(tokens, documents, seq_length, seed, reset_attention, listed)
    assert files.loss_mask
    mask = open_mask(files.loss_mask, check)
    if check:
        check_mask(tokens, mask)
    if train_mode == "dpo":
        pairs = build_pair_index(tokens, mask, documents, seq_length, truncate, packing)
        return PreferenceDataset(
            pairs, tokens, mask,
            seq_length=seq_length, seed=seed, packing=packing, pad_id=pad_id, identity=identity_of(files),
            listed=listed,
        )  # fmt: skip
    sample_index = build_sample_index(tokens, mask, documents, seq_length, truncate)
    return SFTDataset(sample_index, mask, seed, packing, pad_id, listed)


def identity_of(files: DataFiles) -> str:
    """What tells the data from any other: its manifest's; raises KitError where it has none."""
    identity = (files.manifest or {}).get("identity")
    if not identity:
        raise KitError(
            f"the manifest of {files.tokens} has no 'identity', by which a reference's log-probabilities are of this"
            " data: write the data again with step 1"
        )
    return str(identity)


def check_against_manifest(files: DataFiles, tokens: IndexedDataset) -> None:
    """Raises KitError unless `tokens` has as many documents and tokens as its manifest, if any, records."""
    manifest = files.manifest or {}
    documents = manifest.get("documents")
    kept = documents.get("kept") if isinstance(documents, dict) else None
    found = {"documents": len(tokens), "tokens": tokens.num_tokens}
    recorded = {
        "documents": kept * files.documents_per_row if isinstance(kept, int) else kept,
        "tokens": manifest.get("tokens"),
    }
    wrong = [
        f"{recorded[name]} {name} instead of {found[name]}"
        for name in found
        if recorded[name] not in (None, found[name])
    ]
    if wrong:
        raise KitError(
            f"the manifest of {files.tokens} records {'; '.join(wrong)}: the files are not from one run of step 1;"
            " copy all of them again, or write the data again"
        )


def check_mask(tokens: IndexedDataset, mask: IndexedDataset) -> None:
    """Raises KitError unless the loss mask of each document has its length."""
    blocks = zip(tokens.length_blocks(), mask.length_blocks(), strict=True)
    if len(mask) != len(tokens) or any(not np.array_equal(one, other) for (_, one), (_, other) in blocks):
        raise KitError(f"{mask.prefix} does not match {tokens.prefix}: write the data again with step 1")
