r"""The characters that Hugging Face tokenizers and gigatoken normalize to NFC, or split, differently.

tokenizers uses the NFC tables of Unicode 9 (crate unicode-normalization-alignments 0.1.12), gigatoken current ones.
They differ in marks that got a combining class since, which NFC reorders, and in scripts whose characters compose.
For \p{L} and \p{N} in the split pattern the Unicode versions differ too. tests/bench/compare_engines.py finds them by
encoding each code point with both, alone and next to others.
"""

from collections.abc import Sequence

import numpy as np

from common.data.tokenizer.text_tokenizer import EncodeBatchFlat, TextTokenizer

# First and last of each range.
LETTERS_AND_DIGITS = (
    *((0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4)),
    *((0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9)),
    *((0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3), (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E)),
    *((0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F)),
    *((0x2CEA2, 0x2CEAD), (0x323B0, 0x33479)),
)
# A whole block where its characters compose, or where Unicode added marks over several versions.
RANGES = (
    *LETTERS_AND_DIGITS,
    *((0x07FD, 0x07FD), (0x0897, 0x089F), (0x08CA, 0x08D3), (0x09FE, 0x09FE), (0x0C3C, 0x0C3C), (0x0D3B, 0x0D3C)),
    *((0x0EBA, 0x0EBA), (0x1715, 0x1715), (0x1ABF, 0x1AFF), (0x1DF6, 0x1DFA), (0xA82C, 0xA82C)),
    *((0x105C0, 0x105FF), (0x10D24, 0x10D27), (0x10D69, 0x10D6D), (0x10EAB, 0x10EAC), (0x10EFA, 0x10EFF)),
    *((0x10F46, 0x10F50), (0x10F82, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B), (0x11380, 0x113FF)),
    *((0x1145E, 0x1145E), (0x11839, 0x1183A), (0x11900, 0x1195F), (0x119E0, 0x119E0), (0x11A34, 0x11A34)),
    *((0x11A47, 0x11A47), (0x11A99, 0x11A99), (0x11D42, 0x11D45), (0x11D97, 0x11D97), (0x11F41, 0x11F42)),
    *((0x16100, 0x1613F), (0x16D40, 0x16D7F), (0x16FF0, 0x16FF1), (0x1E08F, 0x1E08F), (0x1E130, 0x1E136)),
    *((0x1E2AE, 0x1E2AE), (0x1E2EC, 0x1E2EF), (0x1E4EC, 0x1E4EF), (0x1E5EE, 0x1E5EF), (0x1E6E3, 0x1E6F5)),
)
_DIFFERENT = np.zeros(0x110000, bool)
for _first, _last in RANGES:
    _DIFFERENT[_first : _last + 1] = True


def indices_of_differing_texts(texts: Sequence[str]) -> list[int]:
    """The indices of the `texts` that contain such a character."""
    beyond_ascii = [number for number, text in enumerate(texts) if not text.isascii()]
    if not _contains_any("".join([texts[number] for number in beyond_ascii])):
        return []
    return [number for number in beyond_ascii if _contains_any(texts[number])]


def _contains_any(text: str) -> bool:
    return bool(_DIFFERENT[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)].any())


def with_exact_ids(encode_flat: EncodeBatchFlat, tokenizer: TextTokenizer) -> EncodeBatchFlat:
    """gigatoken's `encode_flat`, but texts that it may normalize differently are encoded by tokenizers."""

    def encode(texts: Sequence[str], parse_special: bool) -> tuple[np.ndarray, np.ndarray]:
        indices = indices_of_differing_texts(texts)
        if not indices:
            return encode_flat(texts, parse_special)
        replaced = set(indices)
        ids, lengths = encode_flat(["" if n in replaced else text for n, text in enumerate(texts)], parse_special)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        own = tokenizer.encode_batch([texts[number] for number in indices], parse_special)
        for number, row in zip(indices, own, strict=True):
            rows[number], lengths[number] = np.array(row, ids.dtype), len(row)
        return np.concatenate(rows), lengths

    return encode
