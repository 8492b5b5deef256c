"""A conversation rendered by its chat template: where each prompt ends, and the affixes around each answer."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from common.data.sources.bad_rows import BadRowError
from common.data.templates.chat_template import ChatTemplate, with_text_arguments
from common.data.templates.messages import Message
from common.data.templates.row_formats import Conversation
from common.data.tokenizer.text_tokenizer import TextTokenizer

THINK_START, THINK_END = "<think>", "</think>"
REASONING = "reasoning_content"


class Prompt(NamedTuple):
    """Where an answer's header begins and its prompt ends in the whole; `opened` is what the prompt has beyond that."""

    header: int
    end: int
    opened: str = ""


class Affixes(NamedTuple):
    """The text that a template puts after the prompt, between reasoning and content, and after the content.

    opened: what the prompt has beyond the whole, as in `Prompt`.
    """

    prefix: str
    opened: str
    separator: str
    end_token: str


@dataclass
class Rendering:
    """The rendered conversation, `whole`, and the prompt of each answer in it.

    with_headers: also find where headers begin.
    earlier: the remedy when only earlier turns are rendered differently.
    affixes: those found in other conversations, by (is the last message, how it has its reasoning).
    notes: counts for the log.
    Raises BadRowError when the template rejects the messages.
    """

    template: ChatTemplate
    tokenizer: TextTokenizer
    conversation: Conversation
    with_headers: bool
    earlier: str
    affixes: dict[tuple[bool, str], Affixes]
    notes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.messages = self.conversation.messages
        self.template.check_variables(self.conversation.template_kwargs)
        self.last = max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        self.whole = self._render_whole()
        self._probed: set[tuple[bool, str]] = set()

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The text of `messages` with the conversation's tools and template variables."""
        return self.template.render(
            messages, add_generation_prompt, self.conversation.tools, self.conversation.template_kwargs
        )

    def _render_whole(self) -> str:
        """The rendering of all messages; call arguments become JSON strings if the template concatenates them."""
        try:
            return self.render(self.messages)
        except BadRowError as error:
            messages, texts = with_text_arguments(self.messages)
            if not texts or not isinstance(error.__cause__, TypeError):
                raise
            whole = self.render(messages)
            if not all(text in whole for text in texts):
                raise
            self.messages = messages
            return whole

    def prompt_in_full(self, i: int) -> Prompt:
        """The prompt of message `i`, rendered from all turns before; raises BadRowError when the whole differs."""
        text = self.render(self.messages[:i], True)
        header = len(text)
        if self.with_headers:
            before = self.render(self.messages[:i])
            if not text.startswith(before):
                raise self.error(i, "renders what comes before")
            header = len(before)
        if self.whole.startswith(text):
            return Prompt(header, len(text))
        for affixes in self.affixes_of(i, ""):
            end = len(text) - len(affixes.opened)
            if text.endswith(affixes.opened) and self.whole.startswith(text[:end]):
                return Prompt(min(header, end), end, affixes.opened)
        raise self.error(i, "renders what comes before")

    def prompt_from_turn_before(self, i: int, j: int, prompt: Prompt, end_before: int) -> Prompt | None:
        """The prompt of message `i`, derived from the turns since the last user turn before answer `j`; or None.

        prompt, end_before: the prompt of `j`, and where `j` ends in the whole.
        """
        start = max((n for n in range(j) if self.messages[n]["role"] == "user"), default=0)
        first = self.messages[:1] if start and self.messages[0]["role"] == "system" else []
        shorter = self.render([*first, *self.messages[start:j]], True)
        longer = self.render([*first, *self.messages[start:i]], True)
        known = shorter.removesuffix(prompt.opened) + self.whole[prompt.end : end_before]
        if not longer.startswith(known) or (prompt.opened and not shorter.endswith(prompt.opened)):
            return None
        header = len(longer)
        if self.with_headers:
            before = self.render([*first, *self.messages[start:i]])
            if not longer.startswith(before) or len(before) < len(known):
                return None
            header = len(before)
        for opened in ("", *{affixes.opened for affixes in self.affixes.values()}):
            rest = longer[len(known) : len(longer) - len(opened)]
            if longer.endswith(opened) and self.whole.startswith(rest, end_before):
                end = end_before + len(rest)
                return Prompt(min(end, end_before + header - len(known)), end, opened)
        return None

    def affixes_of(self, i: int, reasoning: str) -> Iterator[Affixes]:
        """The affixes of message `i`: without reasoning, or with it in its own field or in the content.

        They are the same for all last answers and for all others, so a row probes the template once for each.
        """
        kind = (i == len(self.messages) - 1, reasoning)
        known = self.affixes.get(kind)
        if known:
            yield known
        if kind not in self._probed:
            self._probed.add(kind)
            affixes = self._find_affixes(i, reasoning)
            if affixes and affixes != known:
                self.affixes[kind] = affixes
                yield affixes

    @cached_property
    def mark(self) -> str:
        """A string that no text of the conversation contains."""
        mark = "\ue000answer"
        own = [message["content"] + reasoning_of(message) for message in self.messages]
        while any(mark in text for text in (self.whole, *own)):
            mark += "\ue000"
        return mark

    def _find_affixes(self, i: int, reasoning: str) -> Affixes | None:
        reasoning_mark, content_mark = f"{self.mark}reasoning", f"{self.mark}content"
        placeholder = {"role": "assistant", "content": content_mark}
        if reasoning == REASONING:
            placeholder[REASONING] = reasoning_mark
        elif reasoning:
            placeholder["content"] = f"{THINK_START}\n{reasoning_mark}\n{THINK_END}\n\n{content_mark}"
        prompt = self.render(self.messages[:i], True)
        try:
            rendered = self.render([*self.messages[:i], placeholder, *self.messages[i + 1 : i + 2]])
        except BadRowError:
            return None  # for example, the template requires a tool response next
        head, found, tail = rendered.partition(content_mark)
        separator = ""
        if reasoning:
            head, found_reasoning, separator = head.partition(reasoning_mark)
            found = found and found_reasoning
        if not found or self.mark in head + separator + tail:
            return None
        end_token = self.tokenizer.special_at(tail, 0)
        if not end_token:
            raise self.no_end_token(i)
        if head.startswith(prompt):
            return Affixes(head[len(prompt) :], "", separator, end_token)
        if prompt.startswith(head):
            return Affixes("", prompt[len(head) :], separator, end_token)
        return None

    def no_end_token(self, i: int) -> BadRowError:
        """The error when no special token ends message `i`."""
        return BadRowError(f"the chat template puts no special token after turn {i + 1}: generation would never stop")

    def error(self, i: int, does: str) -> BadRowError:
        """The error when the template `does` so with message `i`, with the remedy."""
        later = " when more turns follow" if i < len(self.messages) - 1 else ""
        how = f" differently{later or ' from inference'}" if does.startswith("renders") else later
        return BadRowError(f"the chat template {does} turn {i + 1}{how}: {self.remedy(i)}")

    def remedy(self, i: int) -> str:
        """What a user can do when message `i` is not rendered as training needs it."""
        field_way = f"write field '{REASONING}' into the content, between {THINK_START} and {THINK_END}"
        if reasoning_of(self.messages[i]) and REASONING not in self.template.text:
            return field_way
        if i < self.last:
            return self.earlier
        if i < len(self.messages) - 1:
            return "remove the turns after it, which have no answer"
        if self.conversation.template_kwargs:
            return "remove its chat_template_kwargs, or the reasoning that they disable"
        if reasoning_of(self.messages[i]):
            return field_way
        return (
            f"put your own chat_template.jinja into {self.template.folder}, which renders each turn as it is to be"
            " trained on"
        )


def reasoning_of(message: Message) -> str:
    """The message's reasoning_content, or ""."""
    reasoning = message.get(REASONING) or ""
    return reasoning if reasoning.strip() else ""
