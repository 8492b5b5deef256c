"""Conversations to tokens and the mask of those that are learned.

The chat template renders a conversation whole and, for each answer, up to its header. Where the second is the
beginning of the first, the cut between prompt and answer is known without any marker. The pieces are encoded apart,
so a prompt's ids are those that the model sees at inference, whatever the answer begins with.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from common.data.chat import ChatTemplate
from common.data.encoded import Encoded, join, sizes
from common.data.inputs import Chunk
from common.data.jsonl import BadRowError, records
from common.data.rows import Message, format_of, to_messages
from common.data.tokenizer import EndToken, TextTokenizer


class Piece(NamedTuple):
    """A stretch of a rendered conversation, and whether it is learned."""

    text: str
    learned: bool


@dataclass(frozen=True)
class SftEncoder:
    """Encodes rows of one format by the chat template.

    loss_on: "answer" learns the answer and the end token right after it, "turn" its header too.
    loss_turns: "all" answers, or the "last".
    same_format: a row whose fields tell another format is an error.
    """

    tokenizer: TextTokenizer
    template: ChatTemplate
    format: str
    roles: str
    loss_on: str
    loss_turns: str
    eod: EndToken | None
    same_format: bool = True

    def __call__(self, chunk: Chunk) -> Encoded:
        """The conversations of `chunk`: tokens, and a uint8 mask that is 1 for what is learned."""
        counts: Counter[str] = Counter()
        conversations, offsets = [], []
        for offset, row in records(chunk, counts):
            try:
                conversations.append(self._pieces_of(row, counts))
            except BadRowError as error:
                raise chunk.error(offset, error) from None
            offsets.append(offset)
        counts["read"] = len(conversations)
        documents, masks = self._encode(conversations)
        for offset, ids, mask, pieces in zip(offsets, documents, masks, conversations, strict=True):
            self._check(chunk, offset, (ids, mask), pieces)
        if self.eod:
            for ids, mask in zip(documents, masks, strict=True):
                ids.append(self.eod.id)
                mask.append(0)
        loss_mask = np.fromiter(chain.from_iterable(masks), np.uint8)
        counts["supervised"] = int(loss_mask.sum())
        streams = {"tokens": join(documents, self.tokenizer.vocab_size), "loss_mask": loss_mask}
        return Encoded(streams, sizes(documents), counts)

    def _pieces_of(self, row: dict[str, Any], counts: Counter[str]) -> list[Piece]:
        if self.same_format and (kind := format_of(row)) != self.format:
            raise BadRowError(f"it is of format {kind}, the first row of {self.format}: make data of its own of each")
        messages = to_messages(row, self.format, self.roles)
        counts["special tokens spelled in the rows' own text, kept as special tokens"] += sum(
            self.tokenizer.count_special(message["content"]) for message in messages
        )
        counts["empty answers"] += sum(not m["content"] for m in messages if m["role"] == "assistant")
        return list(self.pieces(messages))

    def pieces(self, messages: list[Message]) -> Iterator[Piece]:
        """The rendered conversation in pieces; raises BadRowError when the template's renderings disagree."""
        whole = self.template.render(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        at = 0
        for i in answers if self.loss_turns == "all" else answers[-1:]:
            prompt = self.template.render(messages[:i], add_generation_prompt=True)
            end = self._end_of_answer(whole, prompt, messages[i]["content"], i + 1)
            header = len(prompt)
            if self.loss_on == "turn":
                header = len(self.template.render(messages[:i]))
            yield Piece(whole[at:header], False)
            if header < len(prompt):
                yield Piece(whole[header : len(prompt)], True)
            yield Piece(whole[len(prompt) : end], True)
            at = end
        if at < len(whole):
            yield Piece(whole[at:], False)

    def _end_of_answer(self, whole: str, prompt: str, answer: str, turn: int) -> int:
        """Where the end token after `answer` ends in `whole`."""
        if not whole.startswith(prompt):
            raise BadRowError(
                f"the chat template renders what comes before turn {turn} otherwise once more turns follow:"
                " set LOSS_TURNS=last, or give the turns as rows of their own"
            )
        shown = answer if whole.startswith(answer, len(prompt)) else answer.strip()
        if not whole.startswith(shown, len(prompt)):
            raise BadRowError(f"the chat template changes the text of turn {turn}: what is learned cannot be told")
        end = len(prompt) + len(shown)
        token = self.tokenizer.special_at(whole, end)
        if not token:
            raise BadRowError(f"the chat template puts no special token after turn {turn}: an answer would never end")
        return end + len(token)

    def _encode(self, conversations: list[list[Piece]]) -> tuple[list[list[int]], list[list[int]]]:
        texts = [piece.text for pieces in conversations for piece in pieces]
        encoded = iter(self.tokenizer.encode_batch(texts, parse_special=True))
        documents, masks = [], []
        for pieces in conversations:
            ids: list[int] = []
            mask: list[int] = []
            for piece in pieces:
                part = next(encoded)
                ids += part
                mask += [int(piece.learned)] * len(part)
            documents.append(ids)
            masks.append(mask)
        return documents, masks

    def _check(self, chunk: Chunk, offset: int, sample: tuple[list[int], list[int]], pieces: list[Piece]) -> None:
        """Raises KitError unless what is learned decodes to the pieces that are to be learned."""
        ids, mask = sample
        decoded = self.tokenizer.decode([i for i, learned in zip(ids, mask, strict=True) if learned])
        expected = "".join(self.tokenizer.normalize(piece.text) for piece in pieces if piece.learned)
        if decoded != expected:
            raise chunk.error(
                offset, f"what is learned decodes to {decoded[:80]!r}, not {expected[:80]!r}: the tokenizer loses text"
            )
