"""Conversations to tokens and the mask of those that are learned.

The text is the chat template's, and `templates/answers.py` says what of it is learned. The pieces are encoded apart, so
an answer that is learned follows its header by the ids that the model has at inference, whatever the answer begins
with; and all ids of the first prompt are those of inference. Those of a later prompt are too, unless an answer before
it is learned and begins with a newline: Qwen2.5's tokenizer makes one token of that and the header's newline once both
are read as a prompt, and one sequence cannot hold the two. The log counts such answers; LOSS_TURNS=last has none.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from common.data.dataset.indexed import token_dtype
from common.data.sources.inputs import Chunk
from common.data.sources.jsonl import BadRowError, BadRows, one_row, records
from common.data.templates.answers import Answers
from common.data.templates.chat import ChatTemplate
from common.data.templates.reasoning import check_reasoning, texts_of
from common.data.templates.rendering import Glue
from common.data.templates.rows import Conversation, format_among, is_weighted, to_conversation
from common.data.tokenizer.encoded import BAD_ROWS, Encoded
from common.data.tokenizer.tokenizer import EndToken, TextTokenizer

JOINED = "answers that begin with a newline, which the prompts of answers after them join to their header at inference"


class Piece(NamedTuple):
    """A stretch of a rendered conversation, and the weight of its loss: 0 is not learned."""

    text: str
    loss: float


@dataclass(frozen=True)
class SftEncoder:
    """Encodes rows of one format by the chat template.

    loss_on: "answer" learns the answer and the end token right after it, "turn" its header too.
    loss_turns: "all" answers, or the "last", where a row's own `loss` says nothing.
    same_format: a row whose fields tell another format is an error.
    weighted: the mask is float32 and a row's `loss` may be any weight; else it is uint8.
    skip_bad_rows: a row that cannot be used is counted and kept aside, and is no error.
    glues: what the template was found to put around answers.
    """

    tokenizer: TextTokenizer
    template: ChatTemplate
    format: str
    roles: str
    loss_on: str
    loss_turns: str
    eod: EndToken | None
    same_format: bool = True
    weighted: bool = False
    skip_bad_rows: bool = False
    glues: dict[tuple[bool, str], Glue] = field(default_factory=dict, compare=False)

    @property
    def mask_dtype(self) -> np.dtype[Any]:
        """The loss mask's type on disk."""
        return np.dtype(np.float32 if self.weighted else np.uint8)

    def __call__(self, chunk: Chunk) -> Encoded:
        """The conversations of `chunk`: tokens, and a mask that holds the weight of what is learned, 0 elsewhere."""
        counts: Counter[str] = Counter()
        bad = BadRows(chunk, self.skip_bad_rows)
        conversations, offsets = [], []
        for offset, row in records(chunk, counts, bad):
            with bad.row(offset):
                conversations.append(self.pieces_of_row(row, counts))
                offsets.append(offset)
        samples = []
        for offset, pieces, sample in zip(offsets, conversations, self._encode(conversations), strict=True):
            with bad.row(offset):
                self._check(sample, pieces)
                samples.append(sample)
        counts["read"] = len(samples) + len(bad.rows)
        counts[BAD_ROWS] = len(bad.rows)
        return self._encoded(samples, counts, bad)

    def _encoded(self, samples: list[tuple[np.ndarray, np.ndarray]], counts: Counter[str], bad: BadRows) -> Encoded:
        tokens = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in samples)])
        loss_mask = np.concatenate([np.empty(0, self.mask_dtype), *(mask for _, mask in samples)])
        lengths = np.fromiter((ids.size for ids, _ in samples), np.int64, len(samples))
        if self.eod:
            ends = np.cumsum(lengths)
            tokens, loss_mask = np.insert(tokens, ends, self.eod.id), np.insert(loss_mask, ends, 0)
            lengths += 1
        counts["supervised"] = int(np.count_nonzero(loss_mask))
        tokens = tokens.astype(token_dtype(self.tokenizer.vocab_size), copy=False)
        streams = {"tokens": tokens, "loss_mask": loss_mask}
        return Encoded(streams, lengths.astype(np.int32), counts, sorted(bad.rows))

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """The conversation of `row`; raises BadRowError."""
        kind = format_among(row, self.format) if self.same_format else self.format
        talk = to_conversation(row, kind, self.roles)
        if kind != self.format:
            talk.notes.append(f"rows of format {kind} beside those of {self.format}")
        return talk

    def pieces_of_row(self, row: dict[str, Any], counts: Counter[str]) -> list[Piece]:
        """The rendered pieces of `row`; raises BadRowError."""
        talk = self.conversation(row)
        if not self.weighted and is_weighted(talk):
            raise BadRowError("its field 'loss' is a weight, and LOSS_WEIGHTS is false: set LOSS_WEIGHTS=true")
        hidden = check_reasoning(talk, {i for i, _ in self._learned(talk)}, self._render)
        pieces = list(self.pieces(talk, counts))
        if not any(piece.loss for piece in pieces):
            raise BadRowError("nothing of it is learned: LOSS_TURNS=last, and the last answer's 'loss' is 0")
        "".join(piece.text for piece in pieces).encode()  # what is no character shows here, not in a chunk's encoding
        counts.update(talk.notes)
        counts["answers that are not learned, whose reasoning the chat template does not show"] += hidden
        counts["special tokens spelled in the rows' own text, kept as special tokens"] += sum(
            self.tokenizer.count_special(text) for message in talk.messages for text in texts_of(message)
        )
        counts["empty answers"] += sum(
            not m["content"] and "tool_calls" not in m for m in talk.messages if m["role"] == "assistant"
        )
        return pieces

    def pieces(self, talk: Conversation, counts: Counter[str]) -> Iterator[Piece]:
        """The rendered conversation in pieces; raises BadRowError when what is learned cannot be told."""
        self._check_tools(talk)
        losses = dict(self._learned(talk))
        earlier = "its 'loss' to false" if self.loss_turns == "last" else "LOSS_TURNS=last"
        found = Answers(
            self.template, self.tokenizer, talk, self.loss_on == "turn",
            f"set {earlier}, or give the turns as rows of their own", self.glues,
        )  # fmt: skip
        whole, at, joins = found.whole, 0, list[bool]()
        for answer, loss in zip(found.find(list(losses)), losses.values(), strict=True):
            before = answer.header if self.loss_on == "turn" else answer.start
            yield Piece(whole[at:before] + ("" if before < answer.start else answer.opened), 0)
            if before < answer.start:
                yield Piece(whole[before : answer.start] + answer.opened, loss)
            text = whole[answer.start : answer.end] if answer.text is None else answer.text
            yield Piece(text, loss)
            at = answer.end
            joins.append(whole[answer.start - 1 : answer.start].isspace() and "\n" in text[: -len(text.lstrip())])
        if at < len(whole):
            yield Piece(whole[at:], 0)
        if any(joins[:-1]):
            found.notes[JOINED] += sum(joins[:-1])
        if found.notes:
            counts.update(found.notes)

    def _check_tools(self, talk: Conversation) -> None:
        """Raises BadRowError unless the template shows the row's tools before the first answer."""
        calls = any("tool_calls" in message for message in talk.messages)
        if (talk.tools or calls) and not self.template.own:
            raise BadRowError(
                "it has tools, which ChatML does not show: the tokenizer's folder needs its chat template"
            )
        first = next(i for i, message in enumerate(talk.messages) if message["role"] == "assistant")
        shown = self._render(talk, first) if talk.tools else ""
        for tool in talk.tools or []:
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or name not in shown:
                raise BadRowError(
                    f"the chat template does not show the tool {name!r} of field 'tools': remove the field, or put a"
                    f" chat_template.jinja of your own into {self.template.folder}"
                )

    def _render(self, talk: Conversation, turns: int) -> str:
        return self.template.render(talk.messages[:turns], False, talk.tools, talk.template_kwargs)

    def _learned(self, talk: Conversation) -> Iterator[tuple[int, float]]:
        """(number of the message, weight) of each answer that is learned."""
        answers = [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]
        for i in answers:
            own = talk.losses[i]
            loss = float(self.loss_turns == "all" or i == answers[-1]) if own is None else own
            if loss:
                yield i, loss

    def _encode(self, conversations: list[list[Piece]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32, loss mask) of each conversation."""
        pieces = [piece for talk in conversations for piece in talk]
        ids, lengths = self.tokenizer.encode_flat([piece.text for piece in pieces], parse_special=True)
        mask = np.repeat(np.array([piece.loss for piece in pieces], self.mask_dtype), lengths)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        bounds = ends[np.cumsum([0, *map(len, conversations)])].tolist()
        spans = zip(bounds[:-1], bounds[1:], strict=True)
        return [(ids[start:end].view(np.int32), mask[start:end]) for start, end in spans]

    def _check(self, sample: tuple[np.ndarray, np.ndarray], pieces: list[Piece]) -> None:
        """Raises BadRowError unless what is learned decodes to the pieces that are to be learned."""
        ids, mask = sample
        decoded = self.tokenizer.decode(ids[mask > 0].tolist())
        expected = "".join(self.tokenizer.normalize(piece.text) for piece in pieces if piece.loss)
        if decoded != expected:
            raise BadRowError(
                f"what is learned decodes to {decoded[:80]!r}, not {expected[:80]!r}: the tokenizer loses text"
            )


def sample_pieces(
    encoder: SftEncoder, rows: list[tuple[str, dict[str, Any]]], limit_bytes: int
) -> list[tuple[str, str]]:
    """(place, text) of the pieces of the first `rows`, about `limit_bytes` of them.

    Rows that cannot be used are passed over: their own turn comes.
    """
    found: list[tuple[str, str]] = []
    left = limit_bytes
    for place, row in rows:
        try:
            with one_row():
                texts = [piece.text for piece in encoder.pieces_of_row(row, Counter())]
        except BadRowError:
            continue
        found += [(place, text[:limit_bytes]) for text in texts]
        left -= sum(map(len, texts))
        if left <= 0:
            break
    return found
