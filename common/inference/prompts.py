"""Prompts to token ids, the same ids that training saw."""

from dataclasses import dataclass, field
from itertools import chain

from common.data.sources.bad_rows import BadRowError
from common.data.templates.assistant_spans import AssistantSpans
from common.data.templates.chat_template import ChatTemplate
from common.data.templates.rendered_tools import check_tools
from common.data.templates.rendering import Affixes
from common.data.templates.row_formats import Conversation
from common.data.tokenizer.text_tokenizer import TextTokenizer
from common.errors import KitError
from common.log import logger


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes texts to complete, as step 1 does for pretraining, and conversations to answer, as for fine-tuning.

    template: the folder's, or step 1's ChatML; None where there are only texts. max_tokens: the longest prompt.
    Raises BadRowError for a prompt that is empty or longer.
    """

    tokenizer: TextTokenizer
    template: ChatTemplate | None
    max_tokens: int
    affixes: dict[tuple[bool, str], Affixes] = field(default_factory=dict, compare=False)

    def text_ids(self, text: str) -> list[int]:
        """The ids of `text`, in which special tokens are ordinary text."""
        (ids,) = self.tokenizer.encode_batch([text])
        return self._checked(ids)

    def chat_ids(self, conversation: Conversation) -> list[int]:
        """The ids of `conversation`, which ends before an answer, with the generation prompt.

        Training tokenizes an answer apart from what surrounds it, so earlier answers are tokenized apart here too.
        """
        if self.template is None:
            raise BadRowError("it is a conversation, and the model has no chat template: give texts to complete")
        self.template.check_variables(conversation.template_kwargs)
        check_tools(conversation, self.template)
        text = self.template.render(
            conversation.messages, True, conversation.tools, conversation.template_kwargs
        )  # fmt: skip
        pieces = self._pieces(text, conversation, self.template)
        return self._checked(list(chain(*self.tokenizer.encode_batch(pieces, parse_special=True))))

    def _pieces(self, text: str, conversation: Conversation, template: ChatTemplate) -> list[str]:
        """`text` cut where earlier answers begin and end."""
        messages = conversation.messages
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return [text]
        whole = Conversation(
            [*messages, {"role": "assistant", "content": "."}], [None] * (len(messages) + 1),
            conversation.tools, conversation.template_kwargs,
        )  # fmt: skip
        try:
            found = AssistantSpans(template, self.tokenizer, whole, False, "", self.affixes)
            spans = list(found.find(answers))
        except BadRowError:
            return [text]  # rendered otherwise in later turns: step 1 takes it with LOSS_TURNS=last, as one piece
        edges = [edge for span in spans for edge in (span.start, span.end)]
        if not text.startswith(found.whole[: edges[-1]]):
            return [text]
        return [text[start:end] for start, end in zip([0, *edges], [*edges, len(text)], strict=True)]

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise BadRowError("it is empty: a prompt needs at least one token")
        if len(ids) > self.max_tokens:
            raise BadRowError(
                f"it has {len(ids)} tokens, and the model's positions less MAX_NEW_TOKENS leave {self.max_tokens}:"
                " shorten it, or decrease MAX_NEW_TOKENS"
            )
        return ids


def find_template(tokenizer: TextTokenizer, mode: str) -> ChatTemplate | None:
    """The folder's chat template or step 1's ChatML; None where MODE=`mode` is complete, or auto and there is neither.

    Raises KitError where MODE is chat and there is neither.
    """
    if mode == "complete":
        return None
    try:
        return ChatTemplate(tokenizer)
    except KitError as error:
        if mode == "chat" or {"<|im_start|>", "<|im_end|>"} <= {*tokenizer.special_tokens}:
            raise
        logger.info("MODE=auto completes texts, without chat: %s", error)
        return None
