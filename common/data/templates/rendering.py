"""A conversation rendered by its chat template: where each answer's prompt ends, and what stands around the answer."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from common.data.sources.jsonl import BadRowError
from common.data.templates.chat import ChatTemplate, with_text_arguments
from common.data.templates.rows import Conversation
from common.data.templates.turns import Message
from common.data.tokenizer.tokenizer import TextTokenizer

OPEN, CLOSE = "<think>", "</think>"
REASONING = "reasoning_content"


class Prompt(NamedTuple):
    """Where in the whole an answer's header begins and its prompt ends; and what the prompt has beyond that."""

    header: int
    end: int
    opened: str = ""


class Glue(NamedTuple):
    """What a template puts around an answer's texts: after its prompt, between reasoning and content, at the end."""

    front: str
    opened: str
    middle: str
    token: str


@dataclass
class Rendering:
    """A conversation as the template renders it, `whole`, with each prompt in it and what stands around each answer.

    headers: where headers begin is asked for too.
    earlier: the way out where earlier turns alone are rendered otherwise.
    glues: what was found around the texts of other conversations' answers, by what they are like.
    notes: counts of what the log should tell.
    Raises BadRowError where the template refuses the messages.
    """

    template: ChatTemplate
    tokenizer: TextTokenizer
    talk: Conversation
    headers: bool
    earlier: str
    glues: dict[tuple[bool, str], Glue]
    notes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.messages = self.talk.messages
        self.template.check_variables(self.talk.template_kwargs)
        self.last = max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        self.whole = self._render_whole()
        self._asked: set[tuple[bool, str]] = set()

    def render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The text of `messages` with the conversation's tools and settings."""
        return self.template.render(messages, add_generation_prompt, self.talk.tools, self.talk.template_kwargs)

    def _render_whole(self) -> str:
        """The rendering of all messages; where the template adds a call's arguments to its text, of them as strings."""
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
        """The prompt of message `i`, told by all turns before; raises BadRowError where the whole has another."""
        text = self.render(self.messages[:i], True)
        header = len(text)
        if self.headers:
            before = self.render(self.messages[:i])
            if not text.startswith(before):
                raise self.error(i, "renders what comes before")
            header = len(before)
        if self.whole.startswith(text):
            return Prompt(header, len(text))
        for glue in self.glues_of(i, ""):
            end = len(text) - len(glue.opened)
            if text.endswith(glue.opened) and self.whole.startswith(text[:end]):
                return Prompt(min(header, end), end, glue.opened)
        raise self.error(i, "renders what comes before")

    def prompt_from_turn_before(self, i: int, j: int, prompt: Prompt, end_before: int) -> Prompt | None:
        """The prompt of message `i`, told by the turns since the user's before answer `j`; None where it cannot be.

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
        if self.headers:
            before = self.render([*first, *self.messages[start:i]])
            if not longer.startswith(before) or len(before) < len(known):
                return None
            header = len(before)
        for opened in ("", *{glue.opened for glue in self.glues.values()}):
            rest = longer[len(known) : len(longer) - len(opened)]
            if longer.endswith(opened) and self.whole.startswith(rest, end_before):
                end = end_before + len(rest)
                return Prompt(min(end, end_before + header - len(known)), end, opened)
        return None

    def glues_of(self, i: int, reasoning: str) -> Iterator[Glue]:
        """What may stand around the texts of message `i`: without reasoning, or with it in a field or in the content.

        It is the same for all answers that are last, and for all that are not, so the template is asked once a row.
        """
        kind = (i == len(self.messages) - 1, reasoning)
        known = self.glues.get(kind)
        if known:
            yield known
        if kind not in self._asked:
            self._asked.add(kind)
            glue = self._ask_glue(i, reasoning)
            if glue and glue != known:
                self.glues[kind] = glue
                yield glue

    @cached_property
    def mark(self) -> str:
        """What no text of the conversation holds."""
        mark = "\ue000answer"
        own = [message["content"] + reasoning_of(message) for message in self.messages]
        while any(mark in text for text in (self.whole, *own)):
            mark += "\ue000"
        return mark

    def _ask_glue(self, i: int, reasoning: str) -> Glue | None:
        thought, said = f"{self.mark}thought", f"{self.mark}said"
        stand_in = {"role": "assistant", "content": said}
        if reasoning == REASONING:
            stand_in[REASONING] = thought
        elif reasoning:
            stand_in["content"] = f"{OPEN}\n{thought}\n{CLOSE}\n\n{said}"
        prompt = self.render(self.messages[:i], True)
        try:
            shown = self.render([*self.messages[:i], stand_in, *self.messages[i + 1 : i + 2]])
        except BadRowError:
            return None  # as where an answer to a tool's call must follow
        head, found, tail = shown.partition(said)
        middle = ""
        if reasoning:
            head, found_thought, middle = head.partition(thought)
            found = found and found_thought
        if not found or self.mark in head + middle + tail:
            return None
        token = self.tokenizer.special_at(tail, 0)
        if not token:
            raise self.endless(i)
        if head.startswith(prompt):
            return Glue(head[len(prompt) :], "", middle, token)
        if prompt.startswith(head):
            return Glue("", prompt[len(head) :], middle, token)
        return None

    def endless(self, i: int) -> BadRowError:
        """What is said where nothing ends message `i`."""
        return BadRowError(f"the chat template puts no special token after turn {i + 1}: an answer would never end")

    def error(self, i: int, does: str) -> BadRowError:
        """What is said where the template `does` so with message `i`, and the way out."""
        later = " once more turns follow" if i < len(self.messages) - 1 else ""
        how = f" otherwise{later or ' than at inference'}" if does.startswith("renders") else later
        return BadRowError(f"the chat template {does} turn {i + 1}{how}: {self.way_out(i)}")

    def way_out(self, i: int) -> str:
        """What a user can do where message `i` is not shown as it would have to be."""
        field_way = f"write field '{REASONING}' into the content, between {OPEN} and {CLOSE}"
        if reasoning_of(self.messages[i]) and REASONING not in self.template.text:
            return field_way
        if i < self.last:
            return self.earlier
        if i < len(self.messages) - 1:
            return "remove the turns after it, which no answer follows"
        if self.talk.template_kwargs:
            return "remove its chat_template_kwargs, or the reasoning that they rule out"
        if reasoning_of(self.messages[i]):
            return field_way
        return (
            f"put a chat_template.jinja of your own into {self.template.folder}, which shows each turn as it is to be"
            " learned"
        )


def reasoning_of(message: Message) -> str:
    """The reasoning in a field of its own, "" where there is none."""
    thought = message.get(REASONING) or ""
    return thought if thought.strip() else ""
