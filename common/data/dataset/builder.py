"""Training's samples: a dataset on disk as numbered rows of `seq_length` positions, the same for every layout.

Global sample g belongs to epoch g // samples_per_epoch. The order within an epoch depends on seed and epoch alone,
so more epochs change nothing that was. Labels are shifted here and nowhere else: the model is to give labels[i]
after tokens[0..i]. A document of n tokens fills n - 1 positions: its last token is only a label.
"""

import numpy as np

from common.data.dataset.gpt_dataset import GPTDataset
from common.data.dataset.indexed_dataset import IndexedDataset, open_mask, open_tokens
from common.data.dataset.legacy import refuse_legacy
from common.data.dataset.manifest import DataFiles
from common.data.dataset.sample_dataset import SampleDataset
from common.data.dataset.sft_dataset import SFTDataset, build_sample_index
from common.errors import KitError

KIND_OF_MODE = {"pretrain": "pretrain", "finetune": "sft"}


def split_documents(num_documents: int, split: str) -> tuple[range, range]:
    """(training's documents, validation's), contiguous, by shares such as "98,2,0"; the third share is for nothing.

    The bounds are rounded as Megatron-Core's blended_megatron_dataset_builder does. Raises KitError.
    """
    rule = f"SPLIT={split}: give one to three numbers that are not negative, as 98,2,0"
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
    """The samples of `documents` (None: all); raises KitError for data of the other kind, or too little of it.

    check: hold the whole of the index files against each other, see IndexedReader. listed: see PretrainSamples.
    """
    refuse_legacy(files)
    if files.kind != KIND_OF_MODE[train_mode]:
        raise KitError(
            f'{files.tokens} is "{files.kind}" data, but TRAIN_MODE={train_mode} learns "{KIND_OF_MODE[train_mode]}"'
            " data: change TRAIN_MODE, or DATASET_PATH"
        )
    if seed < 0:
        raise KitError(f"SEED={seed}: it must not be negative")
    tokens = open_tokens(files.tokens, check)
    check_against_manifest(files, tokens)
    chosen = documents if documents is not None else range(len(tokens))
    if train_mode == "pretrain":
        return GPTDataset(tokens, chosen, seq_length, seed, reset_attention, listed)
    assert files.loss_mask
    mask = open_mask(files.loss_mask, check)
    if check:
        check_mask(tokens, mask)
    fitted = build_sample_index(tokens, mask, chosen, seq_length, truncate)
    return SFTDataset(fitted, mask, seed, packing, pad_id, listed)


def check_against_manifest(files: DataFiles, tokens: IndexedDataset) -> None:
    """Raises KitError unless `tokens` holds as many documents and tokens as the manifest tells, where there is one."""
    manifest = files.manifest or {}
    documents = manifest.get("documents")
    there = {"documents": len(tokens), "tokens": tokens.num_tokens}
    told = {
        "documents": documents.get("kept") if isinstance(documents, dict) else None,
        "tokens": manifest.get("tokens"),
    }
    wrong = [
        f"{told[name]} {name}, and {there[name]} are there" for name in there if told[name] not in (None, there[name])
    ]
    if wrong:
        raise KitError(
            f"the manifest of {files.tokens} tells of {'; '.join(wrong)}: they are not of one run of step 1;"
            " copy all of its files again, or write the data again"
        )


def check_mask(tokens: IndexedDataset, mask: IndexedDataset) -> None:
    """Raises KitError unless each document's mask has its length."""
    blocks = zip(tokens.length_blocks(), mask.length_blocks(), strict=True)
    if len(mask) != len(tokens) or any(not np.array_equal(one, other) for (_, one), (_, other) in blocks):
        raise KitError(f"{mask.prefix} does not fit {tokens.prefix}: write the data again with step 1")
