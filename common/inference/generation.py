"""Prompts continued by transformers' generate: several at once, or one as a stream of text."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.inference.model import ModelSettings, explain_out_of_memory, load_model
from common.inference.model_folder import ModelFolder
from common.inference.sampling import Sampling
from common.log import logger


@dataclass(frozen=True)
class Answer:
    """A continuation.

    ids: its tokens, without the one that ended it. finish_reason: "stop" at such a token, "length" at MAX_NEW_TOKENS,
    "interrupted" where the user stopped it.
    """

    ids: list[int]
    text: str
    finish_reason: str


class Generator:
    """A loaded model that continues prompts of token ids."""

    def __init__(
        self, folder: ModelFolder, settings: ModelSettings, sampling: Sampling, max_new_tokens: int, seed: int
    ) -> None:
        from transformers import GenerationConfig

        self.folder, self.stop_ids = folder, frozenset(folder.stop_ids)
        self.model = load_model(folder, settings)
        if not self.stop_ids:
            logger.warning("%s names no token that ends an answer: all end at MAX_NEW_TOKENS", folder.path)
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.stop_ids) or None,
            pad_token_id=next(iter(self.stop_ids), 0),
            **sampling.fields(),
        )
        # The folder's own would replace values that equal transformers' defaults.
        self.model.generation_config = self.config
        torch.manual_seed(seed)
        logger.info("generation: %s, at most %d new tokens", sampling, max_new_tokens)

    def batch(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """The answers to `prompts`, padded on the left; in float32 and greedy, each the same as alone.

        A row is padded with its own first token: the attention mask hides it, and the repetition penalty, which sees
        no mask, counts it already.
        """
        width = max(map(len, prompts))
        ids = [prompt[:1] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with explain_out_of_memory(f"decrease BATCH_SIZE={len(prompts)} or MAX_NEW_TOKENS, or set DTYPE=bf16"):
            made = self.model.generate(**self._inputs(ids, mask), generation_config=self.config)
        return [self._answer(new) for new in made[:, width:].tolist()]

    def stream(self, prompt: list[int], stop: threading.Event, answers: list[Answer]) -> Iterator[str]:
        """The text of the answer to `prompt` in pieces; at the end the answer is appended to `answers`.

        It ends after the token at which `stop` is set. The model runs in a thread of its own.
        """
        from common.inference.streaming import AnswerStreamer, stop_at

        streamer = AnswerStreamer(self.folder.tokenizer, self.stop_ids)
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                with explain_out_of_memory("begin a new conversation (/reset), or set DTYPE=bf16"):
                    self.model.generate(
                        **self._inputs([prompt], [[1] * len(prompt)]), generation_config=self.config,
                        streamer=streamer, stopping_criteria=stop_at(stop),
                    )  # fmt: skip
            except BaseException as error:  # raised below, in the caller's thread
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failures:
            raise failures[0]
        answer = self._answer(streamer.ids)
        if answer.finish_reason == "length" and stop.is_set():
            answer = Answer(answer.ids, answer.text, "interrupted")
        answers.append(answer)

    def _inputs(self, ids: list[list[int]], mask: list[list[int]]) -> dict[str, Any]:
        """input_ids and attention_mask, int64 [b, s] on the model's device."""
        given = {"input_ids": ids, "attention_mask": mask}
        return {name: torch.tensor(rows, device=self.model.device) for name, rows in given.items()}

    def _answer(self, new: list[int]) -> Answer:
        end = next((at for at, number in enumerate(new) if number in self.stop_ids), None)
        ids = new[:end]
        return Answer(ids, self.folder.tokenizer.decode(ids), "length" if end is None else "stop")
