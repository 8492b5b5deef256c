"""Where the answers of a rendered conversation stand: what is their prompt, and what of them is learned.

The template renders the conversation whole, and each answer's prompt: the turns before it and the header that it gives
a model to answer after. Where the prompt is the beginning of the whole, and the answer's own text follows it up to a
special token, all is known without any marker. Templates of models that think do more:

- They put text in front of an answer: Qwen3 an empty block of reasoning. It is context, as the prompt is.
- They put a message's reasoning into tags, or take it from the content and put it there in other words. All from the
  prompt on is learned.
- Their prompt opens the reasoning, as that of R1-Distill and QwQ, which ends in "<think>\\n". Where an answer has none,
  the whole goes on without that opening, and so the answer follows its header alone.
- They leave out the reasoning of earlier answers. What is to be learned would be lost, so it is an error. Where they
  leave out that of the last answer too, as R1-Distill's does, it is learned as the model says it: right after the
  prompt, less what that opened.

What a template puts around the texts of an answer is found by rendering a stand-in in its place; and that it is so in
the whole, letter by letter, is then checked. What was found for one row is tried first for the next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from common.data.sources.jsonl import BadRowError
from common.data.templates.rendering import CLOSE, OPEN, REASONING, Prompt, Rendering, reasoning_of

# So many prompts of a conversation are rendered in full; then each second one of those before.
MANY = 8
SHORTER = "answers learned after a shorter prompt than at inference, where it begins their reasoning or ends it"
RESTORED = "last answers whose reasoning the chat template leaves out, learned as the model says them after its prompt"


class Answer(NamedTuple):
    """What is learned of an answer: whole[start:end], or `text` in its place, which `opened` precedes as context."""

    header: int
    start: int
    end: int
    opened: str = ""
    text: str | None = None


@dataclass
class Answers(Rendering):
    """The answers of one conversation."""

    _following: str = ""

    def find(self, learned: Sequence[int]) -> Iterator[Answer]:
        """The answer of each message `learned`, which are numbers in order; raises BadRowError naming the turn.

        All prompts are rendered in full up to MANY; of more the 1st, 2nd, 4th, 8th ... and the last. Those between are
        told from a rendering of the turns since the user's one before: so time grows as the conversation does.
        """
        before: tuple[int, Prompt, int] | None = None
        for number, i in enumerate(learned):
            in_full = len(learned) <= MANY or number & (number + 1) == 0 or number == len(learned) - 1
            prompt = None if in_full or not before else self.prompt_from_turn_before(i, *before)
            prompt = prompt or self.prompt_in_full(i)
            if before and prompt.header < before[2]:
                raise self.error(i, "renders what comes before")
            answer = self._answer(i, prompt)
            before = i, prompt, answer.end
            yield answer

    def _answer(self, i: int, prompt: Prompt) -> Answer:
        message = self.messages[i]
        content, thought = message["content"], reasoning_of(message)
        both = (thought, content) if thought else _split(content)
        answer = None if thought else self._plain_answer(i, prompt, content)
        if not answer and both:
            answer = self._thinking_answer(i, prompt, *both)
        elif not answer:
            answer = self._answer_behind_front(i, prompt, content)
        if not answer:
            raise self._lost(i, prompt, *(both or ("", content)))
        return answer

    def _plain_answer(self, i: int, prompt: Prompt, content: str) -> Answer | None:
        """The answer of message `i` where `content` stands right after its prompt, or was begun by it."""
        if not content.strip():
            return None
        for begun in ("", f"{OPEN}\n"):
            if content.startswith(begun) and self.whole.endswith(begun, 0, prompt.end):
                end = self._end(i, prompt.end, [("", content[len(begun) :])])
                if end:
                    return self._noted(Answer(prompt.header, prompt.end, end), bool(prompt.opened) and not begun)
        return None

    def _noted(self, answer: Answer, shorter: bool) -> Answer:
        if shorter:
            self.notes[SHORTER] += 1
        return answer

    def _answer_behind_front(self, i: int, prompt: Prompt, content: str) -> Answer | None:
        """The answer of message `i`, which has no reasoning, behind what the template puts in front of it."""
        for glue in self.glues_of(i, ""):
            front = "" if prompt.opened else glue.front
            end = self._end(i, prompt.end, [(front, content)])
            if end:
                return self._noted(Answer(prompt.header, prompt.end + len(front), end), bool(prompt.opened))
        return None

    def _thinking_answer(self, i: int, prompt: Prompt, thought: str, said: str) -> Answer | None:
        """The answer of message `i` with its reasoning; None where the whole shows it otherwise."""
        message = self.messages[i]
        for glue in self.glues_of(i, REASONING if reasoning_of(message) else OPEN):
            end = None if prompt.opened else self._end(i, prompt.end, [(glue.front, thought), (glue.middle, said)])
            if end:
                return Answer(prompt.header, prompt.end, end)
        end = self._end(i, prompt.end, [("", said)])
        if not end or reasoning_of(message):
            return None
        if not thought.strip():
            return Answer(prompt.header, prompt.end, end)
        if i < len(self.messages) - 1 or "tool_calls" in message:
            return None
        self.notes[RESTORED] += 1
        content, opened = message["content"], prompt.opened
        begun = content.startswith(opened)
        text = content[len(opened) :] if begun else content.lstrip().removeprefix(opened.strip())
        return Answer(prompt.header, prompt.end, end, opened, text + (self._token_before(end) or ""))

    def _token_before(self, end: int) -> str | None:
        tokens = self.tokenizer.special_tokens
        return next((token for token in tokens if self.whole.endswith(token, 0, end)), None)

    def _end(self, i: int, at: int, parts: list[tuple[str, str]]) -> int | None:
        """Where message `i` ends, its end token too, when `parts` stand at `at`: (template's text, row's)."""
        if not parts:
            return self._end_after(i, at)
        (glue, text), *others = parts
        if self.whole.startswith(glue, at):
            at += len(glue)
            for shown in _shown(text):
                if self.whole.startswith(shown, at) and (end := self._end(i, at + len(shown), others)):
                    return end
        return None

    def _end_after(self, i: int, at: int) -> int | None:
        """Where the end token ends that follows the text of message `i`, which ends at `at`, and its calls."""
        if "tool_calls" in self.messages[i]:
            return self._end_of_calls(i, at)
        token = self.tokenizer.special_at(self.whole, at)
        return at + len(token) if token else None

    def _end_of_calls(self, i: int, at: int) -> int | None:
        token = next((glue.token for glue in self.glues_of(i, "")), None)
        if not token:
            return None
        calls = [call.get("function", call) for call in self.messages[i]["tool_calls"]]
        # The calls' own strings may spell the token too.
        end = at
        for _ in range(1 + sum(_spelled([call["name"], call.get("arguments")], token) for call in calls)):
            found = self.whole.find(token, end)
            if found < 0:
                return None
            end = found + len(token)
        if any(call["name"] not in self.whole[at:end] for call in calls):
            raise BadRowError(f"the chat template does not show the calls of turn {i + 1}")
        self._check_end_of_calls(i, end)
        return end

    def _check_end_of_calls(self, i: int, end: int) -> None:
        """Raises BadRowError when the text of the next turn begins before `end`; asked once of a conversation."""
        if not self._following and i < len(self.messages) - 1:
            following = {**self.messages[i + 1], "content": self.mark}
            self._following = self.render([*self.messages[: i + 1], following])
            if 0 <= self._following.find(self.mark) < end:
                raise self.endless(i)

    def _lost(self, i: int, prompt: Prompt, thought: str, said: str) -> BadRowError:
        """Why message `i` was not found after its prompt."""
        if thought.strip() and any(self.whole.startswith(text, prompt.end) for text in _shown(said)):
            return self.error(i, "leaves out the reasoning of")
        if any(self.whole.startswith(text, prompt.end) for text in _shown(self.messages[i]["content"])):
            return self.endless(i)
        return BadRowError(
            f"the chat template changes the text of turn {i + 1}: what is learned cannot be told; {self.way_out(i)}"
        )


def _split(content: str) -> tuple[str, str] | None:
    """(reasoning, answer) of a content that begins with reasoning in tags, whose first one may lack; else None."""
    thought, tag, said = content.partition(CLOSE)
    before, opening, inside = thought.rpartition(OPEN)
    if not tag or before.strip():
        return None
    return inside if opening else thought, said


def _shown(text: str) -> Iterator[str]:
    """The ways in which templates show a text: as it is, or without white space around it."""
    yield text
    if text != text.strip():
        yield from (text.lstrip("\n"), text.strip("\n"), text.strip(), text.lstrip(), text.rstrip())


def _spelled(value: object, token: str) -> int:
    """How often the strings within `value` spell `token`."""
    if isinstance(value, str):
        return value.count(token)
    if isinstance(value, dict):
        return sum(_spelled(each, token) for pair in value.items() for each in pair)
    return sum(_spelled(each, token) for each in value) if isinstance(value, list) else 0
