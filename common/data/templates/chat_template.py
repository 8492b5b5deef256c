"""The model's chat template, rendered by transformers as at inference."""

import hashlib
import inspect
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from common.data.sources.bad_rows import BadRowError
from common.data.templates.messages import Message
from common.data.tokenizer.text_tokenizer import TextTokenizer
from common.errors import KitError
from common.folders import named_in_utf8
from common.log import logger

# For a tokenizer without a chat template: ChatML with the default system turn of the Qwen2.5 base models.
CHATML = (
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Files in a model folder, besides tokenizer.json, that can name tokens.
NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class ChatTemplate:
    """The chat template of the tokenizer's folder, or ChatML, which is logged."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.folder = tokenizer.folder
        self._tokenizer = _load(tokenizer)
        self.own = bool(self._tokenizer.chat_template)
        self.text: str = self._tokenizer.get_chat_template() if self.own else CHATML
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()
        _check_vocabulary(self._tokenizer, tokenizer, self.text)
        if not self.own:
            for token in ("<|im_start|>", "<|im_end|>"):
                if token not in tokenizer.special_tokens:
                    raise KitError(
                        f"{tokenizer.folder} has no chat template, and its tokenizer lacks {token} for ChatML:"
                        " add the model's chat_template.jinja to the folder"
                    )
            logger.info("%s has no chat template: using ChatML", tokenizer.folder)

    def render(
        self,
        messages: list[Message],
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The rendered text of `messages`, followed by the generation prompt with `add_generation_prompt`.

        variables: chat_template_kwargs, such as `enable_thinking`.
        Raises BadRowError with the template's own message when it rejects them or fails.
        """
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(variables or {}),
            )
        except Exception as error:  # a template is a program: any exception may depend on the row
            raise BadRowError(_why(error)) from error

    def check_variables(self, variables: dict[str, Any]) -> None:
        """Raises BadRowError unless the template reads all of `variables`, and none is one that transformers sets."""
        for name in variables:
            if name not in self._read:
                read = ", ".join(sorted(self._read)) or "none"
                raise BadRowError(
                    f"field 'chat_template_kwargs' holds {name!r}, which the chat template of {self.folder} does not"
                    f" read: it reads {read}; remove it"
                )

    @cached_property
    def _read(self) -> frozenset[str]:
        """The variables that the template reads, without those that transformers sets."""
        from jinja2 import Environment, meta

        # The tag of transformers that marks assistant tokens; plain jinja2 does not parse it.
        text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.text)
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        given = {"messages", "raise_exception", "strftime_now", *environment.globals, *self._special_tokens}
        given |= inspect.signature(self._tokenizer.apply_chat_template).parameters.keys()
        return frozenset(meta.find_undeclared_variables(environment.parse(text)) - given)

    @property
    def _special_tokens(self) -> list[str]:
        return list(self._tokenizer.SPECIAL_TOKENS_ATTRIBUTES)


def with_text_arguments(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """(`messages` with all call arguments as JSON strings, as in OpenAI's API and some templates; the strings).

    The JSON is formatted like that of transformers' `tojson` filter.
    """
    texts: list[str] = []

    def with_text(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": with_text(call["function"])}
        texts.append(json.dumps(call.get("arguments"), ensure_ascii=False))
        return {**call, "arguments": texts[-1]}

    changed = [
        {**message, "tool_calls": [with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]
    return changed, texts


def _why(error: Exception) -> str:
    from jinja2 import TemplateError, UndefinedError

    if isinstance(error, TemplateError) and not isinstance(error, UndefinedError):
        return f"the chat template rejects it: {error}"
    return f"the chat template fails on it: {type(error).__name__}: {error}"


def _load(tokenizer: TextTokenizer) -> Any:
    # Imported here: it takes seconds, and pretraining data does not need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = tokenizer.folder
    try:
        with named_in_utf8(folder) as readable:
            if (readable / "tokenizer_config.json").is_file():
                return AutoTokenizer.from_pretrained(readable, local_files_only=True, trust_remote_code=False)
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(readable / "tokenizer.json"))
        template = folder / "chat_template.jinja"
        loaded.chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
        return loaded
    except (OSError, ValueError) as error:
        raise KitError(f"{folder}: transformers cannot load its tokenizer: {error}") from error


def _check_vocabulary(loaded: Any, tokenizer: TextTokenizer, template: str) -> None:
    """Raises KitError when other files of the folder, or the template, name tokens that its tokenizer.json lacks.

    Other extra tokens are added by the transformers class itself, such as Llama's <unk> for R1-Distill-Qwen; no text
    contains them.
    """
    more = sorted(token for token in loaded.get_vocab() if tokenizer.token_id(token) is None)
    named = template + "".join(_read_text(tokenizer.folder / name) for name in NAMING_FILES)
    if len(loaded) - len(more) != tokenizer.vocab_size or any(_names(named, token) for token in more):
        raise KitError(
            f"{tokenizer.folder}: transformers has {len(loaded)} tokens, tokenizer.json"
            f" {tokenizer.vocab_size} (it lacks {', '.join(map(repr, more[:5])) or 'none of them'}): its"
            " tokenizer_config.json adds tokens; save the tokenizer again with transformers' save_pretrained"
        )


def _names(text: str, token: str) -> bool:
    return token in text or json.dumps(token)[1:-1] in text


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
