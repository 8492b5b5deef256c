"""Both engines on every code point, alone and where NFC would move or join it: the ids must be the same."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from common.data.tokenizer.gigatoken import Gigatoken
from common.data.tokenizer.text_tokenizer import EncodeBatchFlat, TextTokenizer, load_tokenizer
from common.data.tokenizer.unicode_differences import LETTERS_AND_DIGITS, indices_of_differing_texts, with_exact_ids
from tests.bench.compare_engines import show_splits

# Plane 0 without surrogates, plane 1, and of plane 2 what decomposes; above are no marks and nothing that composes.
CODE_POINTS = [*range(0x80, 0xD800), *range(0xE000, 0x20000), *range(0x2F800, 0x2FA20)]
# Of the highest class, of the lowest, and of the commonest.
HIGHEST, LOWEST, COMMON = "\u0345", "\u0334", "\u0301"
# Pairs that compose since Unicode 9 (UnicodeData.txt 13.0 and 16.0).
NEW_PAIRS = [
    "\U00011935\U00011930",
    *("\U000105d2\u0307", "\U000105da\u0307", "\U00011382\U000113c9", "\U00011384\U000113bb", "\U0001138b\U000113c2"),
    *("\U00011390\U000113c9", "\U000113c2\U000113c2", "\U000113c2\U000113b8", "\U000113c2\U000113c9"),
    *("\U0001611e\U0001611e", "\U0001611e\U00016129", "\U0001611e\U0001611f", "\U00016129\U0001611f"),
    *("\U00016d67\U00016d67", "\U00016d63\U00016d67", "\U00016d69\U00016d67"),
]


@pytest.fixture(scope="module")
def engines(qwen: Path) -> tuple[TextTokenizer, EncodeBatchFlat, EncodeBatchFlat]:
    tokenizer = load_tokenizer(qwen)
    engine = Gigatoken((qwen / "tokenizer.json").read_bytes()).encode_flat
    return tokenizer, engine, with_exact_ids(engine, tokenizer)


def differing(tokenizer: TextTokenizer, encode_flat: EncodeBatchFlat, texts: Sequence[str]) -> list[str]:
    expected = tokenizer.encode_batch(texts)
    ids, lengths = encode_flat(texts, False)
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    return [text for text, row, own in zip(texts, rows, expected, strict=True) if row.tolist() != own]


@pytest.mark.parametrize("form", ["{}", HIGHEST + "{}", "{}" + LOWEST, "a{}" + COMMON])
def test_every_code_point(engines: tuple[TextTokenizer, EncodeBatchFlat, EncodeBatchFlat], form: str) -> None:
    tokenizer, engine, corrected = engines
    texts = [form.format(chr(c)) for c in CODE_POINTS]
    found = differing(tokenizer, engine, texts)
    assert bool(found) == (form != "{}")  # without the remedy there is what to remedy
    assert set(found) <= {texts[number] for number in indices_of_differing_texts(texts)}
    assert differing(tokenizer, corrected, [*found, "plain", *found[:1]]) == []


@pytest.mark.parametrize("form", ["a{}", "{}\n", "'{}a"])
def test_letters_and_digits_of_another_unicode(qwen: Path, tmp_path: Path, form: str) -> None:
    """With their neighbours, and all up to the Chinese: with a vocabulary that shows where the pattern splits."""
    show_splits(qwen, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    engine = Gigatoken((tmp_path / "tokenizer.json").read_bytes()).encode_flat
    near = {c for first, last in LETTERS_AND_DIGITS for c in range(first - 20, last + 20)}
    texts = [form.format(chr(c)) for c in sorted({*near, *range(0x80, 0x3400)})]
    found = set(differing(tokenizer, engine, texts))
    ours = {form.format(chr(c)) for first, last in LETTERS_AND_DIGITS for c in range(first, last + 1)}
    assert found and (ours <= found or form == "a{}")  # which does not distinguish digits
    assert found <= {texts[number] for number in indices_of_differing_texts(texts)}
    assert differing(tokenizer, with_exact_ids(engine, tokenizer), texts) == []


def test_every_pair_that_composes(engines: tuple[TextTokenizer, EncodeBatchFlat, EncodeBatchFlat]) -> None:
    tokenizer, engine, corrected = engines
    pairs = [unicodedata.normalize("NFD", chr(c)) for c in CODE_POINTS]
    texts = [pair for pair in pairs if len(pair) > 1 and pair.isprintable()] + NEW_PAIRS
    assert differing(tokenizer, engine, NEW_PAIRS)
    assert differing(tokenizer, corrected, texts) == []


def test_each_text_keeps_its_place(engines: tuple[TextTokenizer, EncodeBatchFlat, EncodeBatchFlat]) -> None:
    tokenizer, _, corrected = engines
    odd = "x \u07f3\u07fd y"
    texts = ["", odd, "Hello", odd + odd, "", "世界", odd]
    ids, lengths = corrected(texts, False)
    expected = tokenizer.encode_batch(texts)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [number for row in expected for number in row]
    assert indices_of_differing_texts(texts) == [1, 3, 6]
