"""Which library turns text to ids: gigatoken where it gives what Hugging Face's tokenizers gives, else that one."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from common.data.sources.inputs import Span, line_start, read_chunks
from common.data.sources.jsonl import BadRowError, BadRows, records, string_field
from common.data.tokenizer.tokenizer import EncodeFlat, TextTokenizer
from common.data.tokenizer.unicode_gap import exact
from common.errors import KitError
from common.log import logger

ENGINES = ("auto", "gigatoken", "tokenizers")
NAME = "TOKENIZER_ENGINE"
SAMPLE_BYTES = 1 << 19
SAMPLE_PLACES = 16
SAMPLE_READ_BYTES = 1 << 16  # at a time
# Beside the special tokens: what a sample of the user's own text may lack. Composed and not, marks alone, NUL,
# line ends, digits, contractions, spaces at an end, right-to-left text, characters of four bytes and joined ones.
PROBES = (
    "e\u0301\u00e9 \u0301\u0327a \u1100\u1161 \uac00 \u212b\ufb01",
    "a\x00b\r\n\r\n\t \u3000\u00a0\u2028 \ufeff x  ",
    "I'LL we've 12345 1.5e-3 \u0664\u0665 \u00bd \u2167",
    "\u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 \u4eca\u5929",
    "\U0001f469\u200d\U0001f469 \U00020000",
)


# What both engines were found to do alike, by code point and by many texts; all else is left to tokenizers.
ALIKE_NORMALIZERS = (None, {"type": "NFC"})
ALIKE_FIELDS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
_CLASS = re.compile(r"\\[pP]\{?\^?(\w+)|(\\[wWdDbBhHX]|\[:)")
ALIKE_CLASSES = ("L", "N")


class UnusableError(Exception):
    """Why an engine cannot be used."""


class Gigatoken:
    """gigatoken with the tokenizer of a tokenizer.json; raises UnusableError where it cannot be had or load it."""

    def __init__(self, data: bytes) -> None:
        try:
            from gigatoken import Tokenizer
        except ModuleNotFoundError:
            raise UnusableError("it is not installed") from None
        self._load, self._data = Tokenizer.from_json, data
        if reason := why_not(json.loads(data)):
            raise UnusableError(reason)
        self._loaded: dict[bool, Any] = {}

    def _tokenizer(self, parse_special: bool) -> Any:
        if parse_special not in self._loaded:
            content = json.loads(self._data)
            if not parse_special:
                # It parses every added token that it knows of, so those marked special are kept from it.
                content["added_tokens"] = [each for each in content.get("added_tokens") or [] if not each["special"]]
            try:
                self._loaded[parse_special] = self._load(json.dumps(content).encode())
            except Exception as error:  # the library raises nothing narrower
                reason = str(error).split("\n", 1)[0]
                raise UnusableError(f"it cannot load the tokenizer ({reason})") from error
        return self._loaded[parse_special]

    def encode_flat(self, texts: Sequence[str], parse_special: bool) -> tuple[np.ndarray, np.ndarray]:
        """As TextTokenizer.encode_flat."""
        tokenizer = self._tokenizer(parse_special)
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        # On this thread alone: its pool of threads would not outlive a fork, and each worker has a core.
        rows = tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def why_not(content: dict[str, Any]) -> str | None:
    """What in a tokenizer.json gigatoken may do otherwise than tokenizers; None where nothing is known."""
    added = content.get("added_tokens") or []
    for token in added:
        if token["single_word"] or set(token) - ALIKE_FIELDS:
            return f"it does not know how the added token {token['content']!r} is to be found (single_word)"
    special = [token["content"] for token in added if token["special"]]
    for token in added:
        # Where special tokens are text, tokenizers finds them all the same, and then no other token within them.
        if not token["special"] and any(overlap(token["content"], other) for other in special):
            return f"it finds the added token {token['content']!r} within a special one"
    if content.get("normalizer") not in ALIKE_NORMALIZERS:
        return f"it was not compared for the normalizer {content['normalizer'].get('type')}"
    for name, other in _CLASS.findall(" ".join(_strings(content.get("pre_tokenizer")))):
        if other or name not in ALIKE_CLASSES:
            return f"it was not compared for {other or name} in the split pattern"
    return None


def overlap(one: str, other: str) -> bool:
    """Whether a text can spell both so that they share characters."""
    if one in other or other in one:
        return True
    return any(a.endswith(b[:n]) for a, b in ((one, other), (other, one)) for n in range(1, min(len(a), len(b))))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def choose(tokenizer: TextTokenizer, wanted: str, parse_special: bool, sample: list[tuple[str, str]]) -> None:
    """Gives `tokenizer` the engine that TOKENIZER_ENGINE asks for, and says in the log which.

    `sample` is (place, text) of the user's own documents: both engines encode them, and a difference is a KitError.
    """
    if wanted == "tokenizers":
        logger.info("encoded by tokenizers, as %s says", NAME)
        return
    data = (tokenizer.folder / "tokenizer.json").read_bytes()
    probes = [" ".join(tokenizer.special_tokens), *PROBES]
    try:
        encode_flat = exact(Gigatoken(data).encode_flat, tokenizer)
        for place, text in [*sample, *(("a text of the kit's own", text) for text in probes)]:
            _compare(tokenizer, encode_flat, place, text, parse_special)
    except UnusableError as error:
        if wanted == "gigatoken":
            raise KitError(f"{NAME}=gigatoken: {error}: set {NAME}=auto or tokenizers") from error
        logger.info("encoded by tokenizers: gigatoken is not used, %s", error)
        return
    tokenizer.use(encode_flat, "gigatoken")
    logger.info(
        "encoded by gigatoken; on %d documents of the input it gives the same ids as tokenizers, which is far slower",
        len(sample),
    )


def _compare(tokenizer: TextTokenizer, encode_flat: EncodeFlat, place: str, text: str, parse_special: bool) -> None:
    expected = tokenizer.encode_batch([text], parse_special)[0]
    found = encode_flat([text], parse_special)[0].tolist()
    if found == expected:
        return
    at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(expected))
    around = tokenizer.decode(expected[max(0, at - 5) : at + 5])
    raise KitError(
        f"gigatoken and tokenizers differ on {place}, from token {at} on, near {around!r}:"
        f" set {NAME}=tokenizers, which is exact by definition"
    )


def sample_texts(spans: list[Span], json_key: str, limit_bytes: int = SAMPLE_BYTES) -> list[tuple[str, str]]:
    """(place, text) of documents from places spread evenly over `spans`, about `limit_bytes` of them together.

    Rows that are not as they should be are passed over: their own turn comes.
    """
    found = []
    each = limit_bytes // SAMPLE_PLACES
    for span, offset in _places(spans):
        left = each
        for text, place in _texts_from(span, offset, json_key):
            found.append((place, text[:left]))
            left -= len(text)
            if left <= 0:
                break
    return found


def _places(spans: list[Span]) -> list[tuple[Span, int]]:
    """SAMPLE_PLACES of (span, byte offset in it); a file that is read whole is sampled at its beginning."""
    total = sum(span.size for span in spans)
    places, before = [], 0
    for span in spans:
        size = span.size
        here = [i * total // SAMPLE_PLACES - before for i in range(SAMPLE_PLACES)]
        offsets = [offset for offset in here if 0 <= offset < size]
        places += [(span, 0)] if span.end is None and offsets else [(span, offset) for offset in offsets]
        before += size
    return places


def _texts_from(span: Span, offset: int, json_key: str) -> Iterator[tuple[str, str]]:
    """(text, place) of the rows of `span` from the first that begins at or after `offset`."""
    rows = span if span.end is None else replace(span, start=line_start(span.path, span.start + offset))
    if rows.end is not None and rows.start >= rows.end:
        return
    for chunk in read_chunks(rows, SAMPLE_READ_BYTES):
        for at, row in records(chunk, Counter(), BadRows(chunk, skip=True)):
            try:
                text = string_field(row, json_key)
            except BadRowError:
                continue
            yield text, f"the document of {chunk.path} at byte {chunk.start + at}"
