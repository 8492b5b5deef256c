"""Where the answers are in a rendered conversation: which text is prompt, and which is trained on.

The counterpart of transformers' assistant tokens mask for templates without `{% generation %}` tags, as Qwen2.5's.
The template renders the whole conversation, and the prompt of each answer: the turns before it and the generation
prompt. When the whole starts with the prompt, followed by the answer's text up to a special token, nothing else is
needed. Templates of reasoning models do more:

- They put text in front of an answer, such as Qwen3's empty reasoning block. It is context, like the prompt.
- They put a message's reasoning between tags, or move it there from the content with other white space. Everything
  after the prompt is trained on.
- Their prompt opens the reasoning: that of R1-Distill and QwQ ends in "<think>\\n". For an answer without reasoning the
  whole lacks that opening, so the answer follows its header alone.
- They drop the reasoning of earlier answers. That would lose a part of the training target, so it is an error. When
  they drop that of the last answer too, as R1-Distill does, it is trained on as the model generates it: right after
  the prompt, without what the prompt already opened.

The affixes that a template puts around an answer are found by rendering a placeholder in its place, and then checked
character by character in the whole. Those found for one row are tried first for the next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.data.sources.bad_rows import BadRowError
from common.data.templates.rendering import REASONING, THINK_END, THINK_START, Prompt, Rendering, reasoning_of

# A conversation with more answers renders only some of its prompts in full, see `find`.
MAX_FULL_PROMPTS = 8
SHORTER_PROMPT = "answers trained on after a shorter prompt than at inference, which opens their reasoning or closes it"
RESTORED_REASONING = (
    "last answers whose reasoning the chat template drops, trained on as the model generates them after its prompt"
)


class AssistantSpan(NamedTuple):
    """The trained part of an answer: whole[start:end], or `text` in its place after the context `opened`."""

    header: int
    start: int
    end: int
    opened: str = ""
    text: str | None = None


@dataclass
class AssistantSpans(Rendering):
    """Finds the answers of one conversation."""

    _following: str = ""

    def find(self, learned: Sequence[int]) -> Iterator[AssistantSpan]:
        """The answer of each message index in `learned`, ascending; raises BadRowError that names the turn.

        Up to MAX_FULL_PROMPTS answers, all prompts are rendered in full; beyond, only the 1st, 2nd, 4th, 8th, ... and
        the last. The others are derived from the turns since the user turn before, so the time stays linear.
        """
        before: tuple[int, Prompt, int] | None = None
        for number, i in enumerate(learned):
            in_full = len(learned) <= MAX_FULL_PROMPTS or number & (number + 1) == 0 or number == len(learned) - 1
            prompt = None if in_full or not before else self.prompt_from_turn_before(i, *before)
            prompt = prompt or self.prompt_in_full(i)
            if before and prompt.header < before[2]:
                raise self.error(i, "renders what comes before")
            answer = self._answer(i, prompt)
            before = i, prompt, answer.end
            yield answer

    def _answer(self, i: int, prompt: Prompt) -> AssistantSpan:
        message = self.messages[i]
        content, reasoning = message["content"], reasoning_of(message)
        both = (reasoning, content) if reasoning else _split(content)
        answer = None if reasoning else self._plain_answer(i, prompt, content)
        if not answer and both:
            answer = self._reasoning_answer(i, prompt, *both)
        elif not answer:
            answer = self._answer_after_prefix(i, prompt, content)
        if not answer:
            raise self._lost(i, prompt, *(both or ("", content)))
        return answer

    def _plain_answer(self, i: int, prompt: Prompt, content: str) -> AssistantSpan | None:
        """The answer of message `i` when `content` follows its prompt, or when the prompt ends with its beginning."""
        if not content.strip():
            return None
        for begun in ("", f"{THINK_START}\n"):
            if content.startswith(begun) and self.whole.endswith(begun, 0, prompt.end):
                end = self._end(i, prompt.end, [("", content[len(begun) :])])
                if end:
                    return self._counted(
                        AssistantSpan(prompt.header, prompt.end, end), bool(prompt.opened) and not begun
                    )
        return None

    def _counted(self, answer: AssistantSpan, shorter_prompt: bool) -> AssistantSpan:
        if shorter_prompt:
            self.notes[SHORTER_PROMPT] += 1
        return answer

    def _answer_after_prefix(self, i: int, prompt: Prompt, content: str) -> AssistantSpan | None:
        """The answer of message `i`, which has no reasoning, after the text that the template puts in front of it."""
        for affixes in self.affixes_of(i, ""):
            prefix = "" if prompt.opened else affixes.prefix
            end = self._end(i, prompt.end, [(prefix, content)])
            if end:
                return self._counted(AssistantSpan(prompt.header, prompt.end + len(prefix), end), bool(prompt.opened))
        return None

    def _reasoning_answer(self, i: int, prompt: Prompt, reasoning: str, said: str) -> AssistantSpan | None:
        """The answer of message `i` with its reasoning; None when the whole renders it differently."""
        message = self.messages[i]
        for affixes in self.affixes_of(i, REASONING if reasoning_of(message) else THINK_START):
            parts = [(affixes.prefix, reasoning), (affixes.separator, said)]
            if not prompt.opened and (end := self._end(i, prompt.end, parts)):
                return AssistantSpan(prompt.header, prompt.end, end)
        end = self._end(i, prompt.end, [("", said)])
        if not end or reasoning_of(message):
            return None
        if not reasoning.strip():
            return AssistantSpan(prompt.header, prompt.end, end)
        if i < len(self.messages) - 1 or "tool_calls" in message:
            return None
        self.notes[RESTORED_REASONING] += 1
        content, opened = message["content"], prompt.opened
        begun = content.startswith(opened)
        text = content[len(opened) :] if begun else content.lstrip().removeprefix(opened.strip())
        return AssistantSpan(prompt.header, prompt.end, end, opened, text + (self._token_before(end) or ""))

    def _token_before(self, end: int) -> str | None:
        tokens = self.tokenizer.special_tokens
        return next((token for token in tokens if self.whole.endswith(token, 0, end)), None)

    def _end(self, i: int, at: int, parts: list[tuple[str, str]]) -> int | None:
        """Where message `i` ends, with its end token, when `parts`, (affix, row text) pairs, are at `at`; else None."""
        if not parts:
            return self._end_after(i, at)
        (affix, text), *others = parts
        if self.whole.startswith(affix, at):
            at += len(affix)
            for shown in _stripped_variants(text):
                if self.whole.startswith(shown, at) and (end := self._end(i, at + len(shown), others)):
                    return end
        return None

    def _end_after(self, i: int, at: int) -> int | None:
        """Where the end token ends that follows the text of message `i`, which ends at `at`, and its tool calls."""
        if "tool_calls" in self.messages[i]:
            return self._end_of_calls(i, at)
        token = self.tokenizer.special_at(self.whole, at)
        return at + len(token) if token else None

    def _end_of_calls(self, i: int, at: int) -> int | None:
        token = next((affixes.end_token for affixes in self.affixes_of(i, "")), None)
        if not token:
            return None
        calls = [call.get("function", call) for call in self.messages[i]["tool_calls"]]
        # The strings of the calls may contain the token as well.
        end = at
        for _ in range(1 + sum(_count_token([call["name"], call.get("arguments")], token) for call in calls)):
            found = self.whole.find(token, end)
            if found < 0:
                return None
            end = found + len(token)
        if any(call["name"] not in self.whole[at:end] for call in calls):
            raise BadRowError(f"the chat template does not render the tool calls of turn {i + 1}")
        self._check_end_of_calls(i, end)
        return end

    def _check_end_of_calls(self, i: int, end: int) -> None:
        """Raises BadRowError when the next turn begins before `end`; checked once per conversation."""
        if not self._following and i < len(self.messages) - 1:
            following = {**self.messages[i + 1], "content": self.mark}
            self._following = self.render([*self.messages[: i + 1], following])
            if 0 <= self._following.find(self.mark) < end:
                raise self.no_end_token(i)

    def _lost(self, i: int, prompt: Prompt, reasoning: str, said: str) -> BadRowError:
        """Why message `i` was not found after its prompt."""
        if reasoning.strip() and any(self.whole.startswith(text, prompt.end) for text in _stripped_variants(said)):
            return self.error(i, "drops the reasoning of")
        if any(self.whole.startswith(text, prompt.end) for text in _stripped_variants(self.messages[i]["content"])):
            return self.no_end_token(i)
        return BadRowError(
            f"the chat template changes the text of turn {i + 1}, so the answer cannot be located: {self.remedy(i)}"
        )


def _split(content: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a content that begins with reasoning in tags; the first tag may be missing. Else None."""
    reasoning, tag, said = content.partition(THINK_END)
    before, opening, inside = reasoning.rpartition(THINK_START)
    if not tag or before.strip():
        return None
    return inside if opening else reasoning, said


def _stripped_variants(text: str) -> Iterator[str]:
    """The forms in which templates render a text: unchanged, or stripped of white space."""
    yield text
    if text != text.strip():
        yield from (text.lstrip("\n"), text.strip("\n"), text.strip(), text.lstrip(), text.rstrip())


def _count_token(value: object, token: str) -> int:
    """How often the strings in `value` contain `token`."""
    if isinstance(value, str):
        return value.count(token)
    if isinstance(value, dict):
        return sum(_count_token(each, token) for pair in value.items() for each in pair)
    return sum(_count_token(each, token) for each in value) if isinstance(value, list) else 0
