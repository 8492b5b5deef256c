"""Documents on disk as text, with the supervised tokens marked."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from common.data.dataset.builder import check_mask
from common.data.dataset.indexed_dataset import open_mask, open_tokens
from common.data.dataset.manifest import DataFiles
from common.data.tokenizer.text_tokenizer import TextTokenizer
from common.errors import KitError, visible

BOLD_GREEN, RESET = "\x1b[1;32m", "\x1b[0m"


def select_documents(number: int, first: int | None, count: int, seed: int) -> list[int]:
    """Indices of the documents to show: `count` of `number` from `first` on, or at random by `seed` when it is None."""
    if first is None:
        indices = np.random.default_rng(seed).choice(number, min(count, number), replace=False)
        return sorted(indices.tolist())
    return list(range(first, min(first + count, number)))


def show(
    files: DataFiles,
    tokenizer: TextTokenizer,
    first: int | None,
    count: int,
    colour: bool,
    show_ids: bool = False,
    seed: int = 0,
) -> Iterator[str]:
    """A heading and the text of each of `count` documents from index `first` on, or of random ones when it is None.

    Of preference data `first` and `count` are of pairs, of which both documents are shown. Supervised tokens are bold
    green with `colour`, else in brackets; `show_ids` adds the token ids. Raises KitError when the document does not
    exist, or when the data was written with another tokenizer.
    """
    known = (files.manifest or {}).get("tokenizer", {}).get("tokenizer_sha256")
    if known and known != tokenizer.sha256:
        raise KitError(
            f"{files.tokens} was written with another tokenizer than {tokenizer.folder}: give the folder of that one"
        )
    tokens = open_tokens(files.tokens)
    mask = open_mask(files.loss_mask) if files.loss_mask else None
    if mask:
        check_mask(tokens, mask)
    each, what = files.documents_per_row, "pair" if files.kind == "preference" else "document"
    total = len(tokens) // each
    if first is not None and not 0 <= first < total:
        raise KitError(f"INDEX={first}: {files.tokens} holds {what}s 0 to {total - 1}")
    before, after = (BOLD_GREEN, RESET) if colour else ("⟦", "⟧")
    selected = select_documents(total, first, count, seed)
    for number in (each * row + part for row in selected for part in range(each)):
        ids = tokens[number]
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 32:
            raise KitError(
                f"{files.tokens}: document {number} holds the numbers {ids.min()} to {ids.max()}, which are not"
                " token ids: it is damaged, or data of the legacy kit (python -m common.preprocess import-legacy)"
            )
        supervised = mask[number] > 0 if mask else np.zeros(ids.size, bool)
        summary = f", {int(supervised.sum())} supervised" if mask else ""
        answer = f", {('chosen', 'rejected')[number % each]}" if each > 1 else ""
        yield f"--- {what} {number // each} of {total}{answer}: {ids.size} tokens{summary}"
        yield mark_text(tokenizer, ids, supervised, before, after)
        if show_ids:
            yield mark_ids(ids, supervised, before, after)


def mark_ids(ids: np.ndarray, supervised: np.ndarray, before: str, after: str) -> str:
    """The token ids, marked like the text."""
    pairs = zip(ids.tolist(), supervised.tolist(), strict=True)
    return " ".join(f"{before}{number}{after}" if is_supervised else str(number) for number, is_supervised in pairs)


def mark_text(tokenizer: TextTokenizer, ids: np.ndarray, supervised: np.ndarray, before: str, after: str) -> str:
    """The `visible` text of `ids`; runs of `supervised` tokens are put between `before` and `after`."""
    text = ""
    for is_supervised, run in groupby(zip(ids.tolist(), supervised.tolist(), strict=True), key=lambda pair: pair[1]):
        piece = visible(tokenizer.decode([number for number, _ in run]))
        text += f"{before}{piece}{after}" if is_supervised else piece
    return text
