"""Whether a chat template renders the reasoning that rows have in a separate field."""

from collections.abc import Callable, Collection
from dataclasses import replace

from common.data.sources.bad_rows import BadRowError
from common.data.templates.fields import REASONING
from common.data.templates.messages import Message
from common.data.templates.row_formats import Conversation


def message_texts(message: Message) -> list[str]:
    """The texts of a message: its reasoning, if any, and its content."""
    return [message[name] for name in (REASONING[0], "content") if name in message]


def check_reasoning(
    conversation: Conversation, learned: Collection[int], render: Callable[[Conversation, int], str]
) -> int:
    """How many messages outside `learned` have reasoning that the template does not render.

    Templates drop the reasoning of earlier turns, at inference too. Raises BadRowError when the reasoning of a message
    in `learned` is not rendered whole. render: the text of the first n messages of a conversation. Each reasoning is
    rendered as a unique marker as well, since the answer may repeat its words.
    """
    if not conversation.reasoning:
        return 0
    mark = "\ue000"
    while any(mark in message["content"] for message in conversation.messages):
        mark += "\ue000"
    marks = {i: f"{mark}{i}\ue001" for i in conversation.reasoning}
    messages = [
        {**message, REASONING[0]: marks[i]} if i in marks else message
        for i, message in enumerate(conversation.messages)
    ]
    shown = render(replace(conversation, messages=messages), len(messages))
    whole = render(conversation, len(messages))
    hidden = [
        i
        for i, each in marks.items()
        if each not in shown or conversation.messages[i][REASONING[0]].strip() not in whole
    ]
    for i in hidden:
        if i in learned:
            last = (
                ""
                if i == max(conversation.reasoning)
                else "; if it renders that of the last answer, set LOSS_TURNS=last"
            )
            raise BadRowError(
                f"the chat template does not render field '{conversation.reasoning[i]}' of turn {i + 1}: write it into"
                f" the answer's text as the model does, or remove it{last}"
            )
    return len(hidden)
