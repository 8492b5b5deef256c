"""Answers are those of transformers' own generate, however many are generated at once."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import KitError
from common.inference.generation import Answer, Generator
from common.inference.model import ModelSettings, explain_out_of_memory
from common.inference.model_folder import open_model_folder
from common.inference.sampling import Sampling, SamplingSettings, effective_sampling
from tests.tiny import TEXTS, tiny_qwen

GREEDY = Sampling(0, 1, 0, 1)
NEW = 24


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model one of whose usual tokens ends an answer, so that answers of a batch end apart."""
    folder = tiny_qwen(tmp_path_factory.mktemp("qwen"))
    generator = Generator(open_model_folder(folder), ModelSettings(str(folder)), GREEDY, NEW, 0)
    answers = generator.batch(prompts(generator))
    counts = [[answer.ids.index(number) for answer in answers if number in answer.ids] for number in range(512)]
    end = max(range(512), key=lambda number: len({*counts[number]}) * (0 not in counts[number]))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return folder


def prompts(generator: Generator) -> list[list[int]]:
    texts = [text[:length] for text in TEXTS for length in (3, 9, 40)]
    return generator.folder.tokenizer.encode_batch(texts)


def generator_of(folder: Path, sampling: Sampling = GREEDY) -> Generator:
    return Generator(open_model_folder(folder), ModelSettings(str(folder), "fp32", "cpu"), sampling, NEW, 0)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_batch_is_answered_as_each_prompt_alone_and_as_by_transformers(qwen: Path, penalty: float) -> None:
    generator = generator_of(qwen, Sampling(0, 1, 0, penalty))
    given = prompts(generator)
    together = generator.batch(given)
    assert together == [answer for prompt in given for answer in generator.batch([prompt])]
    model = AutoModelForCausalLM.from_pretrained(qwen).float()
    stops = generator.stop_ids
    for prompt, answer in zip(given, together, strict=True):
        ids = torch.tensor([prompt])
        kind: dict[str, Any] = {"do_sample": False, "repetition_penalty": penalty, "eos_token_id": sorted(stops)}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0, **kind)
        new = made[0, len(prompt) :].tolist()
        assert answer.ids == (new[:-1] if new[-1] in stops else new)
        assert answer.finish_reason == ("stop" if new[-1] in stops else "length")
    assert {answer.finish_reason for answer in together} == {"stop", "length"}
    assert len({len(answer.ids) for answer in together}) > 2


def test_a_stream_is_the_same_answer_in_pieces(qwen: Path) -> None:
    generator = generator_of(qwen)
    for prompt in prompts(generator):
        answers: list[Answer] = []
        pieces = list(generator.stream(prompt, threading.Event(), answers))
        assert answers == generator.batch([prompt])
        # A character whose bytes are in several tokens may be begun at the end.
        assert "".join(pieces).rstrip("\ufffd") == answers[0].text.rstrip("\ufffd")


def test_a_stream_ends_when_it_is_told_to(qwen: Path) -> None:
    generator = generator_of(qwen)
    given = prompts(generator)
    (longest,) = [prompt for prompt in given if generator.batch([prompt])[0].finish_reason == "length"][:1]
    stop, answers = threading.Event(), list[Answer]()
    stop.set()
    list(generator.stream(longest, stop, answers))
    assert answers[0].finish_reason == "interrupted" and len(answers[0].ids) == 1


def test_an_error_of_the_model_reaches_the_reader_of_the_stream(qwen: Path) -> None:
    generator = generator_of(qwen)
    with pytest.raises(IndexError):
        list(generator.stream([9999], threading.Event(), []))


def test_sampling_is_repeated_by_its_seed(qwen: Path) -> None:
    warm = Sampling(1.0, 0.9, 40, 1.0)
    first, again = (generator_of(qwen, warm).batch([[5, 6, 7]] * 4) for _ in range(2))
    assert first == again and len({answer.text for answer in first}) > 1


def test_what_is_not_set_is_the_models_own() -> None:
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    assert effective_sampling(SamplingSettings(), own) == Sampling(0.7, 0.8, 20, 1.05)
    assert effective_sampling(SamplingSettings(temperature=0), own).fields() == {
        "do_sample": False, "repetition_penalty": 1.05,
    }  # fmt: skip
    assert effective_sampling(SamplingSettings(repetition_penalty=1.0, top_k=0), own) == Sampling(0.7, 0.8, 0, 1.0)
    assert effective_sampling(SamplingSettings(), {**own, "do_sample": False}).temperature == 0
    assert effective_sampling(SamplingSettings(), {}) == GREEDY
    assert effective_sampling(SamplingSettings(temperature=0.5), {}) == Sampling(0.5, 1, 0, 1)


@pytest.mark.parametrize(
    ("settings", "own", "message"),
    [
        ({"temperature": -1.0}, {}, "TEMPERATURE=-1.0: it must be 0"),
        ({"top_p": 0.0}, {}, "TOP_P=0.0: it must be above 0"),
        ({"top_k": -1}, {}, "TOP_K=-1: it must be 0"),
        ({"repetition_penalty": 0.0}, {}, "REPETITION_PENALTY=0.0: it must be above 0"),
        ({"max_new_tokens": 0}, {}, "MAX_NEW_TOKENS=0: it must be at least 1"),
        ({"temperature": 0.0, "top_p": 0.5}, {}, "TOP_P=0.5 has no effect: TEMPERATURE=0 makes it greedy"),
        ({"top_k": 5}, {}, "TOP_K=5 has no effect: generation_config.json makes it greedy"),
        ({}, {"do_sample": True, "top_p": 7}, "generation_config.json: top_p=7: it must be above 0, .* set TOP_P"),
        ({}, {"repetition_penalty": "high"}, "generation_config.json: repetition_penalty='high': it must"),
    ],
)
def test_values_out_of_range_or_without_effect_are_refused(settings: dict, own: dict, message: str) -> None:
    with pytest.raises(KitError, match=message):
        effective_sampling(SamplingSettings(**settings), own)


def test_out_of_memory_is_explained() -> None:
    text = r"out of memory \(CUDA out of memory. Tried to allocate 2 GiB\): use less"
    with pytest.raises(KitError, match=text), explain_out_of_memory("use less"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.  See documentation for")
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory("use less"):
        raise RuntimeError("another")
