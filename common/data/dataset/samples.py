"""Training's samples: a dataset on disk as numbered rows of `seq_length` positions, the same for every layout.

Global sample g belongs to epoch g // samples_per_epoch. The order within an epoch depends on seed and epoch alone,
so more epochs change nothing that was. Labels are shifted here and nowhere else: the model is to give labels[i]
after tokens[0..i]. A document of n tokens fills n - 1 positions: its last token is only a label.
"""

from typing import Any, Protocol

import numpy as np

from common.data.dataset.indexed import IndexedReader, open_mask, open_tokens
from common.data.dataset.legacy import refuse_legacy
from common.data.dataset.manifest import DataFiles
from common.data.dataset.order import DocumentOrder, GroupedOrder, ListedOrder, Order, is_listed, keyed, order_name
from common.data.dataset.sft_samples import SftSamples, fit
from common.errors import KitError
from common.log import logger

KIND_OF_MODE = {"pretrain": "pretrain", "finetune": "sft"}


class Samples(Protocol):
    """Numbered samples: tokens and labels int64 [s], loss_mask float32 [s].

    `segment_ids` int32 [s] is there only when attention is to be kept within runs of equal numbers.
    weighted: whether loss_mask may hold other values than 0 and 1. order: how the epochs are ordered.
    """

    samples_per_epoch: int
    weighted: bool

    @property
    def order(self) -> str:
        """The name of the order: a position in the data means something in the same order alone."""
        ...

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        """The sample, whichever epoch it is of."""
        ...


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


def open_samples(
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
) -> Samples:
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
        return PretrainSamples(tokens, chosen, seq_length, seed, reset_attention, listed)
    assert files.loss_mask
    mask = open_mask(files.loss_mask, check)
    if check:
        check_mask(tokens, mask)
    fitted = fit(tokens, mask, chosen, seq_length, truncate)
    return SftSamples(fitted, mask, seed, packing, pad_id, listed)


def check_against_manifest(files: DataFiles, tokens: IndexedReader) -> None:
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


def check_mask(tokens: IndexedReader, mask: IndexedReader) -> None:
    """Raises KitError unless each document's mask has its length."""
    blocks = zip(tokens.length_blocks(), mask.length_blocks(), strict=True)
    if len(mask) != len(tokens) or any(not np.array_equal(one, other) for (_, one), (_, other) in blocks):
        raise KitError(f"{mask.prefix} does not fit {tokens.prefix}: write the data again with step 1")


class PretrainSamples:
    """Documents in an order of their own each epoch, back to back, cut into windows that overlap by one token.

    A window of seq_length + 1 tokens is one sample; the tail that fills no window is left out. `listed`: whether the
    orders are listed in memory (order.py); None: if they are few.
    """

    weighted = False

    def __init__(
        self,
        tokens: IndexedReader,
        documents: range,
        seq_length: int,
        seed: int,
        reset_attention: bool,
        listed: bool | None = None,
    ) -> None:
        self.tokens, self.documents, self.seq_length, self.seed = tokens, documents, seq_length, seed
        self.reset_attention = reset_attention
        first, last = tokens.token_starts(np.array([documents.start, documents.stop])).tolist()
        total = last - first
        if total < seq_length + 1:
            raise KitError(
                f"{tokens.prefix}: the {len(documents)} documents of this split hold {total} tokens, a sample needs"
                f" SEQ_LENGTH + 1 = {seq_length + 1}: use more data, another SPLIT or a smaller SEQ_LENGTH"
            )
        self.samples_per_epoch = (total - 1) // seq_length
        few = is_listed(len(documents), self.samples_per_epoch)
        self.listed = few if listed is None else listed
        if self.listed and not few:
            logger.info(
                "%s: its order takes %d MiB in each process, as the run began; one that begins now needs none",
                tokens.prefix.name, (16 * len(documents) + 8 * self.samples_per_epoch) >> 20,
            )  # fmt: skip
        logger.info(
            "%s: %d tokens make %d samples an epoch, %d at its end are left out",
            tokens.prefix.name, total, self.samples_per_epoch, total - 1 - self.samples_per_epoch * seq_length,
        )  # fmt: skip
        self._epoch = -1

    @property
    def order(self) -> str:
        """How the epochs are ordered; the same position is another sample in another order."""
        return order_name(self.listed)

    def __getitem__(self, global_index: int) -> dict[str, np.ndarray]:
        epoch, index = divmod(global_index, self.samples_per_epoch)
        self._order(epoch)
        start = int(self._windows[index]) * self.seq_length
        window, segments = self._read(start)
        sample = {
            "tokens": window[:-1],
            "labels": window[1:],
            "loss_mask": np.ones(self.seq_length, np.float32),
        }
        if self.reset_attention:
            sample["segment_ids"] = segments[:-1]
        return sample

    def _order(self, epoch: int) -> None:
        """Sets the order of documents and windows of `epoch`; the last one asked for is kept."""
        if epoch == self._epoch:
            return
        if self.listed:
            random = np.random.default_rng([self.seed, epoch])
            self._documents: DocumentOrder = ListedOrder(self.tokens, self.documents, random)
            self._windows: Order = random.permutation(self.samples_per_epoch)
        else:
            self._documents = GroupedOrder(self.tokens, self.documents, self.seed, epoch)
            self._windows = keyed(self.samples_per_epoch, self.seed, epoch)
        self._epoch = epoch

    def _read(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int64, number of the document within the window int32), [seq_length + 1] each, from `start` on."""
        size = self.seq_length + 1
        window, segments = np.empty(size, np.int64), np.empty(size, np.int32)
        filled = segment = 0
        for document, offset in self._documents.parts(start):
            part = self.tokens.get(document, offset, size - filled)
            window[filled : filled + part.size] = part
            segments[filled : filled + part.size] = segment
            filled, segment = filled + part.size, segment + (part.size > 0)
            if filled == size:
                break
        return window, segments

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epoch": -1, "_documents": None, "_windows": None}
