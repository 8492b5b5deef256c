"""The model's own chat template, rendered by transformers' tokenizer as it is at inference."""

import hashlib
from typing import Any

from common.data.jsonl import BadRowError
from common.data.rows import Message
from common.data.tokenizer import TextTokenizer
from common.errors import KitError
from common.log import logger

# Ours, for a tokenizer that has no template: ChatML with the default system turn of Qwen2.5's base models.
CHATML = (
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


class ChatTemplate:
    """The template of the tokenizer's folder, or ChatML, which the log then says."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = _load(tokenizer)
        self.own = bool(self._tokenizer.chat_template)
        self.text: str = self._tokenizer.get_chat_template() if self.own else CHATML
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        if not self.own:
            for token in ("<|im_start|>", "<|im_end|>"):
                if token not in tokenizer.special_tokens:
                    raise KitError(
                        f"{tokenizer.folder} has no chat template, and its tokenizer no {token} for ChatML:"
                        " add the model's chat_template.jinja to the folder"
                    )
            logger.info("%s has no chat template: ChatML is used", tokenizer.folder)

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The text of `messages`, and with `add_generation_prompt` the header of an answer after it.

        Raises BadRowError with the template's own message when it refuses them.
        """
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise BadRowError(f"the chat template refuses it: {error}") from error


def _load(tokenizer: TextTokenizer) -> Any:
    # Here, not above: the import takes seconds, and pretraining data needs none of it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = tokenizer.folder
    try:
        if (folder / "tokenizer_config.json").is_file():
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        else:
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
            template = folder / "chat_template.jinja"
            loaded.chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
    except (OSError, ValueError) as error:
        raise KitError(f"{folder}: transformers cannot load its tokenizer: {error}") from error
    if len(loaded) != tokenizer.vocab_size:
        raise KitError(
            f"{folder}: transformers sees {len(loaded)} tokens, tokenizer.json holds {tokenizer.vocab_size}: its"
            " tokenizer_config.json adds tokens; save the tokenizer again with transformers' save_pretrained"
        )
    return loaded
