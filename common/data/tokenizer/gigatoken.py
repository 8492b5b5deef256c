"""The gigatoken engine, and which tokenizers it is known to encode like Hugging Face tokenizers."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# Features in which both engines were found to agree, over all code points and many texts; others go to tokenizers.
SUPPORTED_NORMALIZERS = (None, {"type": "NFC"})
SUPPORTED_ADDED_TOKEN_FIELDS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
_CLASS = re.compile(r"\\[pP]\{?\^?(\w+)|(\\[wWdDbBhHX]|\[:)")
SUPPORTED_CLASSES = ("L", "N")


class EngineUnavailableError(Exception):
    """An engine cannot be used, and why."""


class Gigatoken:
    """gigatoken with the tokenizer of a tokenizer.json; raises EngineUnavailableError when it cannot be used."""

    def __init__(self, data: bytes) -> None:
        try:
            from gigatoken import Tokenizer
        except ModuleNotFoundError:
            raise EngineUnavailableError("it is not installed") from None
        self._load, self._data = Tokenizer.from_json, data
        if reason := unsupported_reason(json.loads(data)):
            raise EngineUnavailableError(reason)
        self._loaded: dict[bool, Any] = {}

    def _tokenizer(self, parse_special: bool) -> Any:
        if parse_special not in self._loaded:
            content = json.loads(self._data)
            if not parse_special:
                # It parses every added token that it knows, so the special ones are removed.
                content["added_tokens"] = [each for each in content.get("added_tokens") or [] if not each["special"]]
            try:
                self._loaded[parse_special] = self._load(json.dumps(content).encode())
            except Exception as error:  # the library raises nothing narrower
                reason = str(error).split("\n", 1)[0]
                raise EngineUnavailableError(f"it cannot load the tokenizer ({reason})") from error
        return self._loaded[parse_special]

    def encode_flat(self, texts: Sequence[str], parse_special: bool) -> tuple[np.ndarray, np.ndarray]:
        """As TextTokenizer.encode_flat."""
        tokenizer = self._tokenizer(parse_special)
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        # Single-threaded: its thread pool would not survive a fork, and each worker has its own core.
        rows = tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


def unsupported_reason(content: dict[str, Any]) -> str | None:
    """The feature of a tokenizer.json that gigatoken may handle differently from tokenizers, or None."""
    added = content.get("added_tokens") or []
    for token in added:
        if token["single_word"] or set(token) - SUPPORTED_ADDED_TOKEN_FIELDS:
            return f"it does not support the options of the added token {token['content']!r} (single_word)"
    special = [token["content"] for token in added if token["special"]]
    for token in added:
        # Even when special tokens are text, tokenizers matches them, and then no other token inside them.
        if not token["special"] and any(overlap(token["content"], other) for other in special):
            return f"it matches the added token {token['content']!r} inside a special token"
    if content.get("normalizer") not in SUPPORTED_NORMALIZERS:
        return f"it is not verified for the normalizer {content['normalizer'].get('type')}"
    for name, other in _CLASS.findall(" ".join(_strings(content.get("pre_tokenizer")))):
        if other or name not in SUPPORTED_CLASSES:
            return f"it is not verified for {other or name} in the split pattern"
    return None


def overlap(one: str, other: str) -> bool:
    """Whether occurrences of both in a text can overlap."""
    if one in other or other in one:
        return True
    return any(a.endswith(b[:n]) for a, b in ((one, other), (other, one)) for n in range(1, min(len(a), len(b))))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
