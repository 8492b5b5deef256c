"""Conversations to token ids and the loss mask.

The chat template renders the text, and templates/assistant_spans.py finds the parts of it that are trained on. Segments
are tokenized separately. So a trained answer follows its header with the ids that the model sees at inference, whatever
the answer begins with, and all ids of the first prompt equal those at inference. So do those of later prompts, unless
an earlier trained answer begins with a newline: as part of a prompt, Qwen2.5's tokenizer merges that newline with the
header's, and one sequence cannot hold both. The log counts such answers; LOSS_TURNS=last has none.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from common.data.dataset.indexed_dataset import token_dtype
from common.data.encoders.encoded import BAD_ROWS, EncodedChunk
from common.data.sources.bad_rows import BadRowError, BadRows, ignore_bad_row
from common.data.sources.chunks import Chunk
from common.data.sources.jsonl import records
from common.data.templates.assistant_spans import AssistantSpans
from common.data.templates.chat_template import ChatTemplate
from common.data.templates.reasoning import check_reasoning, message_texts
from common.data.templates.rendered_tools import check_tools
from common.data.templates.rendering import Affixes
from common.data.templates.row_formats import Conversation, check_format, is_weighted, to_conversation
from common.data.tokenizer.eod import EodToken
from common.data.tokenizer.text_tokenizer import TextTokenizer

NEWLINE_ANSWERS = (
    "answers that begin with a newline, which later prompts merge with the newline of their header at inference"
)


class Segment(NamedTuple):
    """A part of a rendered conversation, and its loss weight; 0 is not trained on."""

    text: str
    loss: float


@dataclass(frozen=True)
class SftEncoder:
    """Encodes rows of one format with the chat template.

    loss_on: "answer" trains on the answer and its end token, "turn" on its header too.
    loss_turns: "all" answers or the "last" one, unless a row sets `loss` itself.
    same_format: a row of another format is an error.
    weighted: the loss mask is float32 and a row's `loss` may be any weight; otherwise it is uint8.
    skip_bad_rows: a row that cannot be used is collected in `rejects` instead of raising an error.
    affixes: what the template was found to put around answers, cached.
    """

    tokenizer: TextTokenizer
    template: ChatTemplate
    format: str
    roles: str
    loss_on: str
    loss_turns: str
    eod: EodToken | None
    same_format: bool = True
    weighted: bool = False
    skip_bad_rows: bool = False
    affixes: dict[tuple[bool, str], Affixes] = field(default_factory=dict, compare=False)

    @property
    def mask_dtype(self) -> np.dtype[Any]:
        """The dtype of the loss mask on disk."""
        return np.dtype(np.float32 if self.weighted else np.uint8)

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """The tokens of the conversations in `chunk`, and a mask with the loss weight of each, 0 outside answers."""
        counts: Counter[str] = Counter()
        bad = BadRows(chunk, self.skip_bad_rows)
        conversations, offsets = [], []
        for offset, row in records(chunk, counts, bad):
            with bad.row(offset):
                conversations.append(self.segments_of_row(row, counts))
                offsets.append(offset)
        samples = []
        for offset, segments, sample in zip(offsets, conversations, self._encode(conversations), strict=True):
            with bad.row(offset):
                self._check(sample, segments)
                samples.append(sample)
        counts["read"] = len(samples) + len(bad.rows)
        counts[BAD_ROWS] = len(bad.rows)
        return self._encoded(samples, counts, bad)

    def _encoded(
        self, samples: list[tuple[np.ndarray, np.ndarray]], counts: Counter[str], bad: BadRows
    ) -> EncodedChunk:
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
        return EncodedChunk(streams, lengths.astype(np.int32), counts, sorted(bad.rows))

    def conversation(self, row: dict[str, Any]) -> Conversation:
        """The conversation of `row`; raises BadRowError."""
        kind = check_format(row, self.format) if self.same_format else self.format
        conversation = to_conversation(row, kind, self.roles)
        if kind != self.format:
            conversation.notes.append(f"rows of format {kind} among those of {self.format}")
        return conversation

    def segments_of_row(self, row: dict[str, Any], counts: Counter[str]) -> list[Segment]:
        """The rendered segments of `row`; raises BadRowError."""
        return self.segments_of(self.conversation(row), counts)

    def segments_of(self, conversation: Conversation, counts: Counter[str]) -> list[Segment]:
        """The rendered segments of `conversation`, which are counted in `counts`; raises BadRowError."""
        if not self.weighted and is_weighted(conversation):
            raise BadRowError("its field 'loss' is a weight, but LOSS_WEIGHTS is false: set LOSS_WEIGHTS=true")
        hidden = check_reasoning(conversation, {i for i, _ in self._learned(conversation)}, self._render)
        segments = list(self.segments(conversation, counts))
        if not any(segment.loss for segment in segments):
            raise BadRowError("there is nothing to train on: LOSS_TURNS=last, and the last answer's 'loss' is 0")
        "".join(segment.text for segment in segments).encode()  # a lone surrogate raises here, not for the whole chunk
        counts.update(conversation.notes)
        counts["answers outside the loss, whose reasoning the chat template does not render"] += hidden
        counts["special tokens spelled in the rows' own text, kept as special tokens"] += sum(
            self.tokenizer.count_special(text) for message in conversation.messages for text in message_texts(message)
        )
        counts["empty answers"] += sum(
            not m["content"] and "tool_calls" not in m for m in conversation.messages if m["role"] == "assistant"
        )
        return segments

    def segments(self, conversation: Conversation, counts: Counter[str]) -> Iterator[Segment]:
        """The rendered conversation in segments; raises BadRowError when an answer cannot be located in it."""
        check_tools(conversation, self.template)
        losses = dict(self._learned(conversation))
        earlier = "its 'loss' to false" if self.loss_turns == "last" else "LOSS_TURNS=last"
        found = AssistantSpans(
            self.template, self.tokenizer, conversation, self.loss_on == "turn",
            f"set {earlier}, or split the turns into separate rows", self.affixes,
        )  # fmt: skip
        whole, at, joins = found.whole, 0, list[bool]()
        for answer, loss in zip(found.find(list(losses)), losses.values(), strict=True):
            before = answer.header if self.loss_on == "turn" else answer.start
            yield Segment(whole[at:before] + ("" if before < answer.start else answer.opened), 0)
            if before < answer.start:
                yield Segment(whole[before : answer.start] + answer.opened, loss)
            text = whole[answer.start : answer.end] if answer.text is None else answer.text
            yield Segment(text, loss)
            at = answer.end
            joins.append(whole[answer.start - 1 : answer.start].isspace() and "\n" in text[: -len(text.lstrip())])
        if at < len(whole):
            yield Segment(whole[at:], 0)
        if any(joins[:-1]):
            found.notes[NEWLINE_ANSWERS] += sum(joins[:-1])
        if found.notes:
            counts.update(found.notes)

    def _render(self, conversation: Conversation, turns: int) -> str:
        return self.template.render(
            conversation.messages[:turns], False, conversation.tools, conversation.template_kwargs
        )

    def _learned(self, conversation: Conversation) -> Iterator[tuple[int, float]]:
        """(message index, loss weight) of each answer that is trained on."""
        answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        for i in answers:
            own = conversation.losses[i]
            loss = float(self.loss_turns == "all" or i == answers[-1]) if own is None else own
            if loss:
                yield i, loss

    def _encode(self, conversations: list[list[Segment]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids int32, loss mask) of each conversation."""
        segments = [segment for conversation in conversations for segment in conversation]
        ids, lengths = self.tokenizer.encode_flat([segment.text for segment in segments], parse_special=True)
        mask = np.repeat(np.array([segment.loss for segment in segments], self.mask_dtype), lengths)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        bounds = ends[np.cumsum([0, *map(len, conversations)])].tolist()
        spans = zip(bounds[:-1], bounds[1:], strict=True)
        return [(ids[start:end].view(np.int32), mask[start:end]) for start, end in spans]

    def _check(self, sample: tuple[np.ndarray, np.ndarray], segments: list[Segment]) -> None:
        """Raises BadRowError unless the tokens in the loss decode to the text of their segments."""
        ids, mask = sample
        decoded = self.tokenizer.decode(ids[mask > 0].tolist())
        expected = "".join(self.tokenizer.normalize(segment.text) for segment in segments if segment.loss)
        if decoded != expected:
            raise BadRowError(
                f"the trained tokens decode to {decoded[:80]!r}, not {expected[:80]!r}: the tokenizer loses text"
            )


def sample_segments(
    encoder: SftEncoder, rows: list[tuple[str, dict[str, Any]]], limit_bytes: int
) -> list[tuple[str, str]]:
    """(place, text) of the segments of the first `rows`, about `limit_bytes` in total.

    Rows that cannot be used are skipped: encoding reports them.
    """
    found: list[tuple[str, str]] = []
    left = limit_bytes
    for place, row in rows:
        texts: list[str] = []
        with ignore_bad_row():
            texts = [segment.text for segment in encoder.segments_of_row(row, Counter())]
        found += [(place, text[:limit_bytes]) for text in texts]
        left -= sum(map(len, texts))
        if left <= 0:
            break
    return found
