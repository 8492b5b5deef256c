"""Whether a chat template renders the tools of a row."""

from common.data.sources.bad_rows import BadRowError
from common.data.templates.chat_template import ChatTemplate
from common.data.templates.row_formats import Conversation


def check_tools(conversation: Conversation, template: ChatTemplate) -> None:
    """Raises BadRowError unless `template` renders the row's tools before the first answer."""
    messages = conversation.messages
    calls = any("tool_calls" in message for message in messages)
    if (conversation.tools or calls) and not template.own:
        raise BadRowError("it has tools, which ChatML does not render: the tokenizer's folder needs its chat template")
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    shown = ""
    if conversation.tools:
        shown = template.render(messages[:first], False, conversation.tools, conversation.template_kwargs)
    for tool in conversation.tools or []:
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in shown:
            raise BadRowError(
                f"the chat template does not render the tool {name!r} of field 'tools': remove the field, or put"
                f" your own chat_template.jinja into {template.folder}"
            )
