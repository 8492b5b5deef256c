"""The tokenizer of a Hugging Face folder (`tokenizer.json`): text to token ids and back."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from common.errors import KitError

EncodeBatchFlat = Callable[[Sequence[str], bool], tuple[np.ndarray, np.ndarray]]
INT32_VOCAB_SIZE = 65500  # vocabularies from this size on are written as int32


class TextTokenizer:
    """A `tokenizers.Tokenizer` without padding, truncation or added special tokens; its ids are < vocab_size."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, sha256: str) -> None:
        self.folder, self.sha256 = folder, sha256
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.vocab_size = _id_bound(tokenizer)
        added = tokenizer.get_added_tokens_decoder().values()
        # Longest first: of two tokens with a common beginning, the longer one matches.
        self.special_tokens = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")
        # encode_batch_fast skips offsets, which are not needed; tokenizers before 0.20 lacks it.
        self._encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        self.engine = "tokenizers"
        self._flat: EncodeBatchFlat = self._encode_flat

    def use(self, encode_flat: EncodeBatchFlat, engine: str) -> None:
        """Replaces the implementation of `encode_flat` by that of `engine`."""
        self.engine, self._flat = engine, encode_flat

    def encode_flat(self, texts: Sequence[str], parse_special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(token ids of all texts, concatenated; int64 [texts] number of ids in each), by the selected engine."""
        return self._flat(texts, parse_special)

    def _encode_flat(self, texts: Sequence[str], parse_special: bool) -> tuple[np.ndarray, np.ndarray]:
        rows = self.encode_batch(texts, parse_special)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.uint32, int(lengths.sum())), lengths

    def encode_batch(self, texts: Sequence[str], parse_special: bool = False) -> list[list[int]]:
        """The token ids of each text; special tokens in a text are ordinary text unless `parse_special`."""
        self._tokenizer.encode_special_tokens = not parse_special
        return [encoding.ids for encoding in self._encode(list(texts), add_special_tokens=False)]

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of ids, including special tokens."""
        return self._tokenizer.decode_batch([list(row) for row in ids], skip_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, including special tokens."""
        return self.decode_batch([ids])[0]

    def normalize(self, text: str) -> str:
        """`text` as its tokens decode: in NFC for Qwen2.5."""
        normalizer = self._tokenizer.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def token_id(self, token: str) -> int | None:
        """The id of `token`, or None when the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def special_at(self, text: str, position: int) -> str | None:
        """The special token at `position` in `text`, or None."""
        found = self._special.match(text, position)
        return found.group() if found else None

    def first_special(self, text: str) -> str | None:
        """The first special token in `text`, or None."""
        found = self._special.search(text)
        return found.group() if found else None

    def last_special_end(self, text: str) -> int:
        """The end of the last special token in `text`; 0 without one."""
        return max((found.end() for found in self._special.finditer(text)), default=0)

    def count_special(self, text: str) -> int:
        """The number of special tokens in `text`."""
        return sum(1 for _ in self._special.finditer(text))


def _id_bound(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which may exceed the number of tokens."""
    bound = max(
        [tokenizer.get_vocab_size(with_added_tokens=True), *(i + 1 for i in tokenizer.get_added_tokens_decoder())]
    )
    if bound < INT32_VOCAB_SIZE:  # takes half a second for 150,000 tokens, and larger ones fit int32 anyway
        bound = max([bound, *(i + 1 for i in tokenizer.get_vocab(with_added_tokens=True).values())])
    return bound


def load_tokenizer(folder: Path) -> TextTokenizer:
    """The tokenizer of `folder`; raises KitError when its tokenizer.json is missing or invalid.

    Turns off the threads of the library: WORKERS counts processes, which are forked.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # overrides the user: forking a process whose threads have run hangs
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        raise KitError(f"TOKENIZER_PATH={folder} is not a folder: give the Hugging Face model folder")
    if not path.is_file():
        raise KitError(
            f"{folder} has no tokenizer.json: give the Hugging Face model folder; if it only has vocab.json and"
            ' merges.txt, make it with python -c "from transformers import AutoTokenizer as T;'
            f" T.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    data = path.read_bytes()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises no narrower type
        raise KitError(f"{path} is not a tokenizer ({error}): copy it again from the model") from error
    return TextTokenizer(folder, tokenizer, hashlib.sha256(data).hexdigest())
