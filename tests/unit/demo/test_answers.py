"""Prompts from rows, and a model's answers to them: a batch gives the same as one prompt at a time."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.demo.answers import Answer, Prompt, ask, generate, kind_of, load_answers, read_prompts, save_answers
from common.errors import KitError
from tests.tiny import tiny_qwen

INSTRUCTION = {"instruction": "Be brief.", "input": "1+1?", "output": "2"}
MESSAGES = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
}
TEXT = {"text": "0123456789" * 20}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


def rows(folder: Path, *given: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    return str(path)


def test_the_first_row_decides_the_kind_of_training(tmp_path: Path) -> None:
    assert kind_of(rows(tmp_path, TEXT)) == "pretrain"
    assert kind_of(rows(tmp_path, INSTRUCTION, TEXT)) == "sft"
    assert kind_of(rows(tmp_path, {**MESSAGES, "text": "a"})) == "sft"
    with pytest.raises(KitError, match="holds preferences, which the quickstart does not train on"):
        kind_of(rows(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}))
    with pytest.raises(KitError, match=r"rows.jsonl, line 1: its fields 'body' match no known format: .* text"):
        kind_of(rows(tmp_path, {"body": "a"}))


def test_the_last_answer_is_left_to_the_model(tmp_path: Path) -> None:
    (first,) = read_prompts(rows(tmp_path, MESSAGES), 5, "system")
    assert [message["content"] for message in first.given] == ["a", "b", "c"]  # type: ignore[index]
    assert (first.question, first.expected) == ("c", "d")
    (first,) = read_prompts(rows(tmp_path, INSTRUCTION, INSTRUCTION), 1, "system")
    assert first.given == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    (first,) = read_prompts(rows(tmp_path, INSTRUCTION), 1, "alpaca")
    assert first.given == [{"role": "user", "content": "Be brief.\n1+1?"}]


def test_a_long_text_is_quoted_in_part(tmp_path: Path) -> None:
    long, short = read_prompts(rows(tmp_path, TEXT, {"text": "abcd"}), 2, "system")
    assert (long.given, long.expected) == (TEXT["text"][:60], TEXT["text"][60:120])
    assert (short.given, short.expected) == ("ab", "cd")


def test_an_unusable_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="rows.jsonl, line 2: its fields 'text' match no known format"):
        read_prompts(rows(tmp_path, INSTRUCTION, TEXT), 2, "system")
    with pytest.raises(KitError, match="rows.jsonl, line 2: it has no field 'text'"):
        read_prompts(rows(tmp_path, TEXT, INSTRUCTION), 2, "system")


def alone(folder: Path, text: str, count: int) -> str:
    """The likeliest continuation of `text`, with a full forward pass for each token."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    new: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new, skip_special_tokens=True)


def test_a_batch_of_prompts_of_several_lengths_is_answered_as_each_alone(qwen: Path) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("hi", "今天天气很好，我们去公园散步吧。", "12+30?" * 3)]
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    expected = [alone(qwen, text, 12) for text in texts]
    assert generate(qwen, [Prompt(chat, "") for chat in chats], 12) == expected
    assert len(set(expected)) > 1
    with pytest.raises(KitError, match="HF_MODEL_PATH=/nowhere is not a folder: give"):
        generate(Path("/nowhere"), [Prompt("a", "")], 1)
    plain = ["The quick", "def add"]
    assert generate(qwen, [Prompt(text, "") for text in plain], 12) == [alone(qwen, text, 12) for text in plain]


def test_answers_of_two_models_come_back_from_the_disk(tmp_path: Path, qwen: Path) -> None:
    other = tiny_qwen(tmp_path / "other", seed=1)
    prompts = [Prompt("The quick", "fox"), Prompt("def", "add")]
    answers = ask(qwen, other, prompts, 4)
    assert answers == [
        Answer(prompt.question, prompt.expected, before, after)
        for prompt, before, after in zip(prompts, generate(qwen, prompts, 4), generate(other, prompts, 4), strict=True)
    ]
    save_answers(tmp_path / "new" / "answers.json", answers)
    assert load_answers(tmp_path / "new" / "answers.json") == answers
    (tmp_path / "half.json").write_text('{"answers": [{"question": "')
    with pytest.raises(KitError, match="half.json holds no answers .*: remove it"):
        load_answers(tmp_path / "half.json")
