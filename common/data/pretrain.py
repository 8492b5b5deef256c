"""Pretraining documents to tokens: one field of each row, and the end-of-document token."""

from collections import Counter
from dataclasses import dataclass

from common.data.encoded import Encoded, join, sizes
from common.data.inputs import Chunk
from common.data.jsonl import BadRowError, records, string_field
from common.data.tokenizer import EndToken, TextTokenizer


@dataclass(frozen=True)
class PretrainEncoder:
    """Encodes the field `json_key` of each row, special tokens spelled in it as ordinary text."""

    tokenizer: TextTokenizer
    json_key: str
    eod: EndToken | None

    def __call__(self, chunk: Chunk) -> Encoded:
        """The documents of `chunk`; those of no tokens are dropped, as Megatron-LM's tool does."""
        counts: Counter[str] = Counter()
        texts = []
        for offset, row in records(chunk, counts):
            try:
                texts.append(string_field(row, self.json_key))
            except BadRowError as error:
                raise chunk.error(offset, error) from None
        counts["read"] = len(texts)
        counts["special tokens spelled in documents, kept as ordinary text"] = sum(
            map(self.tokenizer.count_special, texts)
        )
        documents = [ids for ids in self.tokenizer.encode_batch(texts) if ids]
        counts["dropped: no text"] = len(texts) - len(documents)
        if self.eod:
            for ids in documents:
                ids.append(self.eod.id)
        return Encoded({"tokens": join(documents, self.tokenizer.vocab_size)}, sizes(documents), counts)
