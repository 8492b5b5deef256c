"""transformers' streamer and stopping criterion, for an answer that appears as it is generated."""

import threading
from collections.abc import Collection
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from common.data.tokenizer.text_tokenizer import TextTokenizer


class _Decoder:
    """What the streamer needs of a tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def decode(self, ids: int | list[int]) -> str:
        """The text of one id or several, special tokens included."""
        return self._tokenizer.decode([ids] if isinstance(ids, int) else ids)


class AnswerStreamer(TextIteratorStreamer):
    """Yields the text of an answer as it is generated, without the token that ends it; `ids` holds all its tokens."""

    def __init__(self, tokenizer: TextTokenizer, stop_ids: Collection[int]) -> None:
        super().__init__(_Decoder(tokenizer), skip_prompt=True)
        self.ids: list[int] = []
        self._stop_ids = stop_ids

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt [1, s], then each new token [1]."""
        if not self.next_tokens_are_prompt:
            new = value.reshape(-1).tolist()
            self.ids += new
            if new[-1] in self._stop_ids:
                return
        super().put(value)


class _StopAt(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), dtype=torch.bool, device=input_ids.device)


def stop_at(event: threading.Event) -> Any:
    """Criteria that end a generation after the token at which `event` is set."""
    return StoppingCriteriaList([_StopAt(event)])
