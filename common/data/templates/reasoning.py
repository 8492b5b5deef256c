"""Whether a chat template shows what a model thinks before it answers, where rows have it in a field of its own."""

from collections.abc import Callable, Collection
from dataclasses import replace

from common.data.sources.jsonl import BadRowError
from common.data.templates.fields import REASONING
from common.data.templates.rows import Conversation
from common.data.templates.turns import Message


def texts_of(message: Message) -> list[str]:
    """The texts of a message: its reasoning, if it has any, and its content."""
    return [message[name] for name in (REASONING[0], "content") if name in message]


def check_reasoning(talk: Conversation, learned: Collection[int], render: Callable[[Conversation, int], str]) -> int:
    """Raises BadRowError unless `render` shows the whole reasoning of each of the messages `learned` of `talk`.

    render: the text of the first so many messages of a conversation. Returns how many other messages have reasoning
    that is not shown: templates leave it out of earlier turns, and so it is at inference.

    A marker is rendered in the place of each, since the reasoning's own words may well stand in the answer too.
    """
    if not talk.reasoning:
        return 0
    mark = "\ue000"
    while any(mark in message["content"] for message in talk.messages):
        mark += "\ue000"
    marks = {i: f"{mark}{i}\ue001" for i in talk.reasoning}
    messages = [
        {**message, REASONING[0]: marks[i]} if i in marks else message for i, message in enumerate(talk.messages)
    ]
    shown = render(replace(talk, messages=messages), len(messages))
    whole = render(talk, len(messages))
    hidden = [
        i for i, each in marks.items() if each not in shown or talk.messages[i][REASONING[0]].strip() not in whole
    ]
    for i in hidden:
        if i in learned:
            last = "" if i == max(talk.reasoning) else "; where it shows that of the last answer, set LOSS_TURNS=last"
            raise BadRowError(
                f"the chat template does not show field '{talk.reasoning[i]}' of turn {i + 1}: write it into the"
                f" answer's text as the model does, or remove it{last}"
            )
    return len(hidden)
