"""Pretraining rows to token ids: one text field of each row, and the end-of-document token."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from common.data.dataset.indexed_dataset import token_dtype
from common.data.encoders.encoded import BAD_ROWS, EncodedChunk
from common.data.sources.bad_rows import BadRowError, BadRows
from common.data.sources.chunks import Chunk
from common.data.sources.jsonl import fast_string_column, records, string_field
from common.data.tokenizer.eod import EodToken
from common.data.tokenizer.text_tokenizer import TextTokenizer

SPECIAL_TOKENS = ("text", "error", "parse")


@dataclass(frozen=True)
class PretrainEncoder:
    """Encodes the field `json_key` of each row.

    special_tokens: those that occur in a document are ordinary "text", an "error", or "parse"d to their ids.
    skip_bad_rows: a row that cannot be used is collected in `rejects` instead of raising an error.
    """

    tokenizer: TextTokenizer
    json_key: str
    eod: EodToken | None
    special_tokens: str = "text"
    skip_bad_rows: bool = False

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """The documents of `chunk`; empty ones are dropped, as in Megatron-LM's preprocess_data.py."""
        counts: Counter[str] = Counter()
        bad = BadRows(chunk, self.skip_bad_rows)
        texts = self._texts(chunk, counts, bad)
        ids, lengths = self.tokenizer.encode_flat(texts, self.special_tokens == "parse")
        kept = lengths[lengths > 0]
        counts["read"] = len(texts) + len(bad.rows)
        counts[BAD_ROWS] = len(bad.rows)
        counts["dropped: no text"] = lengths.size - kept.size
        if self.eod:
            ids = np.insert(ids, np.cumsum(kept), self.eod.id)
            kept = kept + 1
        tokens = ids.view(np.int32).astype(token_dtype(self.tokenizer.vocab_size), copy=False)
        return EncodedChunk({"tokens": tokens}, kept.astype(np.int32), counts, bad.rows)

    def _texts(self, chunk: Chunk, counts: Counter[str], bad: BadRows) -> list[str]:
        """The text of each row that can be used."""
        label = "special tokens spelled in documents, " + {"parse": "parsed"}.get(
            self.special_tokens, "kept as ordinary text"
        )
        texts = fast_string_column(chunk, self.json_key)
        if texts is not None:
            number = sum(map(self.tokenizer.count_special, texts))
            if self.special_tokens != "error" or not number:
                counts[label] = number
                return texts
        texts = []
        for offset, row in records(chunk, counts, bad):
            with bad.row(offset):
                text = string_field(row, self.json_key)
                number = self.tokenizer.count_special(text)
                if number and self.special_tokens == "error":
                    raise BadRowError(
                        f"it spells the special token {self.tokenizer.first_special(text)}: remove it, or set"
                        " SPECIAL_TOKENS=text or parse"
                    )
                texts.append(text)
                counts[label] += number
        return texts
