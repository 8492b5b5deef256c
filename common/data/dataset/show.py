"""Documents on disk as text, with what is learned marked."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from common.data.dataset.builder import check_mask
from common.data.dataset.indexed_dataset import open_mask, open_tokens
from common.data.dataset.manifest import DataFiles
from common.data.tokenizer.text_tokenizer import TextTokenizer
from common.errors import KitError, visible

GREEN_BOLD, PLAIN = "\x1b[1;32m", "\x1b[0m"


def select_documents(number: int, first: int | None, count: int, seed: int) -> list[int]:
    """Which of `number` documents are shown: `count` from `first` on, or without it `count` at random by `seed`."""
    if first is None:
        chosen = np.random.default_rng(seed).choice(number, min(count, number), replace=False)
        return sorted(chosen.tolist())
    return list(range(first, min(first + count, number)))


def show(
    files: DataFiles,
    tokenizer: TextTokenizer,
    first: int | None,
    count: int,
    colour: bool,
    ids_too: bool = False,
    seed: int = 0,
) -> Iterator[str]:
    """A heading and a text for each of `count` documents from number `first` on, or of any where it is None.

    What fine-tuning learns is green and bold with `colour`, else between brackets; `ids_too` adds the ids. Raises
    KitError when there is no such document, or the tokenizer is not that of the data.
    """
    known = (files.manifest or {}).get("tokenizer", {}).get("tokenizer_sha256")
    if known and known != tokenizer.sha256:
        raise KitError(
            f"{files.tokens} was made with another tokenizer than {tokenizer.folder}: give that one's folder"
        )
    tokens = open_tokens(files.tokens)
    mask = open_mask(files.loss_mask) if files.loss_mask else None
    if mask:
        check_mask(tokens, mask)
    if first is not None and not 0 <= first < len(tokens):
        raise KitError(f"INDEX={first}: {files.tokens} holds documents 0 to {len(tokens) - 1}")
    before, after = (GREEN_BOLD, PLAIN) if colour else ("⟦", "⟧")
    for number in select_documents(len(tokens), first, count, seed):
        ids = tokens[number]
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 32:
            raise KitError(
                f"{files.tokens}: document {number} holds the numbers {ids.min()} to {ids.max()}, which are no ids of a"
                " tokenizer: it is damaged, or of the old kit (python -m common.preprocess import-legacy)"
            )
        learned = mask[number] > 0 if mask else np.zeros(ids.size, bool)
        told = f", {int(learned.sum())} learned" if mask else ""
        yield f"--- document {number} of {len(tokens)}: {ids.size} tokens{told}"
        yield mark_text(tokenizer, ids, learned, before, after)
        if ids_too:
            yield mark_ids(ids, learned, before, after)


def mark_ids(ids: np.ndarray, learned: np.ndarray, before: str, after: str) -> str:
    """The ids, marked as the text is."""
    pairs = zip(ids.tolist(), learned.tolist(), strict=True)
    return " ".join(f"{before}{number}{after}" if is_learned else str(number) for number, is_learned in pairs)


def mark_text(tokenizer: TextTokenizer, ids: np.ndarray, learned: np.ndarray, before: str, after: str) -> str:
    """The `visible` text of `ids`; stretches where `learned` is true stand between `before` and `after`."""
    text = ""
    for is_learned, stretch in groupby(zip(ids.tolist(), learned.tolist(), strict=True), key=lambda pair: pair[1]):
        piece = visible(tokenizer.decode([number for number, _ in stretch]))
        text += f"{before}{piece}{after}" if is_learned else piece
    return text
