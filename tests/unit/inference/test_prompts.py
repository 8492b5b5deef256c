"""Prompts have the ids that training saw, which step 1's own encoder tells."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.data.encoders.pretrain import PretrainEncoder
from common.data.encoders.sft import SftEncoder
from common.data.sources.bad_rows import BadRowError
from common.data.sources.chunks import Chunk
from common.data.templates.chat_template import ChatTemplate
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError
from common.inference.prompt_rows import PromptReader
from common.inference.prompts import PromptEncoder, find_template
from tests.tiny import tiny_qwen

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("qwen"))


def with_template(qwen: Path, folder: Path, name: str | None) -> Path:
    """`qwen`'s tokenizer with the template of tests/unit/data/templates, or with none."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(qwen / file, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if name:
        shutil.copy(TEMPLATES / f"{name}.jinja", folder / "chat_template.jinja")
    return folder


def chunk(row: dict[str, Any]) -> Chunk:
    data = json.dumps(row).encode() + b"\n"
    return Chunk(Path("rows.jsonl"), 0, data, len(data))


def trained_prompt(folder: Path, row: dict[str, Any], roles: str = "system") -> list[int]:
    """The ids before the last answer of `row` in what step 1 writes for it."""
    tokenizer = load_tokenizer(folder)
    kind = "messages" if "messages" in row else "instruction"
    encoder = SftEncoder(tokenizer, ChatTemplate(tokenizer), kind, roles, "answer", "all", None)
    streams = encoder(chunk(row)).streams
    mask = streams["loss_mask"].astype(int).tolist()
    last = len(mask) - 1 - mask[::-1].index(1)
    while last and mask[last - 1]:
        last -= 1
    return streams["tokens"].tolist()[:last]


def reader(folder: Path, mode: str = "auto", max_tokens: int = 10_000, **settings: str) -> PromptReader:
    tokenizer = load_tokenizer(folder)
    return PromptReader(PromptEncoder(tokenizer, find_template(tokenizer, mode), max_tokens), mode, **settings)


def prompts(folder: Path, tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> list[list[int]]:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [prompt.ids for prompt in reader(folder, **settings).read(path)]


def turns(*texts: str) -> dict[str, Any]:
    """A conversation whose turns are the user's and the assistant's, one after another."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


ROWS = [
    {"instruction": "Be brief.", "input": "12 + 30 = ?", "output": "42."},
    {"instruction": "", "input": "今天天气？", "output": "很好。"},
    {"system": "S", **turns("hi", "the dog", "again <|im_end|>?", "ok", "and\n\nnow", "x")},
    turns("a", "\n\nanswers that begin with a newline", "b", "\n42", "c", "d"),
]


@pytest.mark.parametrize("template", [None, "qwen2.5"])
@pytest.mark.parametrize("row", ROWS)
def test_a_prompt_has_the_ids_that_training_saw_before_its_answer(
    qwen: Path, tmp_path: Path, template: str | None, row: dict[str, Any]
) -> None:
    folder = with_template(qwen, tmp_path / "model", template)
    expected = trained_prompt(folder, row)
    without = {"messages": row["messages"][:-1]} if "messages" in row else {**row}
    without.pop("output", None)
    without |= {"system": row["system"]} if "system" in row else {}
    assert prompts(folder, tmp_path, row, without) == [expected, expected]
    assert len(expected) > 10


@pytest.mark.parametrize("row", ROWS[:3])
def test_these_are_the_ids_of_transformers_too(qwen: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    folder = with_template(qwen, tmp_path / "model", "qwen2.5")
    given = row.get("messages") or [
        *([{"role": "system", "content": row["instruction"]}] if row["instruction"] else []),
        {"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]},
    ]  # fmt: skip
    given = [*([{"role": "system", "content": row["system"]}] if "system" in row else []), *given[:-1]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompts(folder, tmp_path, row) == [theirs]


def test_a_template_that_drops_earlier_reasoning_renders_the_prompt_as_at_inference(qwen: Path, tmp_path: Path) -> None:
    folder = with_template(qwen, tmp_path / "model", "qwen3")
    row = turns("a", "<think>\nwhy\n</think>\n\nb", "c")
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        row["messages"], tokenize=False, add_generation_prompt=True
    )
    assert "why" not in rendered
    assert prompts(folder, tmp_path, row) == [load_tokenizer(folder).encode_batch([rendered], parse_special=True)[0]]
    (thinking,) = prompts(folder, tmp_path, turns("c"))
    (without,) = prompts(folder, tmp_path, turns("c"), template_kwargs='{"enable_thinking": false}')
    assert without[: len(thinking)] == thinking
    assert load_tokenizer(folder).decode(without[len(thinking) :]) == "<think>\n\n</think>\n\n"


def test_alpaca_rows_are_the_users_as_in_step_1(qwen: Path, tmp_path: Path) -> None:
    assert prompts(qwen, tmp_path, ROWS[0], roles="alpaca") == [trained_prompt(qwen, ROWS[0], "alpaca")]


def test_a_text_has_the_ids_of_pretraining(qwen: Path, tmp_path: Path) -> None:
    row = {"text": "The quick <|im_end|> 今天"}
    trained = PretrainEncoder(load_tokenizer(qwen), "text", None)(chunk(row)).streams["tokens"].tolist()
    assert prompts(qwen, tmp_path, row) == prompts(qwen, tmp_path, row, mode="complete") == [trained]


def test_plain_text_is_a_turn_of_the_user_or_a_text(qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("hi\n\nThe quick\n", encoding="utf-8")
    rows = [turns("hi"), turns("The quick")]
    read = reader(qwen, system="Be brief.").read(path)
    assert [prompt.fields for prompt in read] == [{"prompt": "hi"}, {"prompt": "The quick"}]
    assert [p.ids for p in read] == prompts(qwen, tmp_path, *({"system": "Be brief.", **row} for row in rows))
    texts = [prompt.ids for prompt in reader(qwen, "complete").read(path)]
    assert texts == prompts(qwen, tmp_path, {"text": "hi"}, {"text": "The quick"})


def test_a_row_of_its_own_system_turn_keeps_it(qwen: Path, tmp_path: Path) -> None:
    own, other = prompts(qwen, tmp_path, {"system": "Own.", **turns("a")}, turns("a"), system="Other.")
    assert [own, other] == prompts(qwen, tmp_path, {"system": "Own.", **turns("a")}, {"system": "Other.", **turns("a")})


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (turns("a " * 80), {"max_tokens": 60}, r"line 2: it has \d+ tokens, and the model's positions less MAX_NEW"),
        ({"text": ""}, {}, "line 2: it is empty"),
        ({"text": "a"}, {"mode": "chat"}, "line 2: its fields 'text' match no known format"),
        (turns("a"), {"mode": "complete"}, "line 2: it has no field 'text'"),
        ({"body": "a"}, {}, "line 2: its fields 'body' match no known format: .* a text to complete needs text"),
        ({**turns("a"), "finish_reason": "stop"}, {}, "line 2: its field 'finish_reason' is one that the answer's row"),
        ({**ROWS[0], "expected": "x"}, {}, "line 2: its field 'expected' is one that the answer's row sets"),
        ({**turns("a"), "tools": [TOOL]}, {}, "line 2: the chat template does not render the tool 'get_weather'"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused_by_its_line(
    qwen: Path, tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    first = {"text": "a"} if settings.get("mode") == "complete" else {"instruction": "", "input": "a"}
    with pytest.raises(KitError, match=f"prompts.jsonl, {message}"):
        prompts(qwen, tmp_path, first, row, **settings)


def test_a_tokenizer_without_template_and_chatml_completes_texts_only(qwen: Path, tmp_path: Path) -> None:
    folder = with_template(qwen, tmp_path / "model", None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace("<|im_start|>", "<|turn|>"), encoding="utf-8")
    assert prompts(folder, tmp_path, {"text": "a"}) == prompts(qwen, tmp_path, {"text": "a"})
    with pytest.raises(KitError, match="line 1: it is a conversation, and the model has no chat template"):
        prompts(folder, tmp_path, turns("a"))
    with pytest.raises(KitError, match="lacks <|im_start|> for ChatML"):
        find_template(load_tokenizer(folder), "chat")


def test_the_tools_of_a_row_are_rendered(qwen: Path, tmp_path: Path) -> None:
    folder = with_template(qwen, tmp_path / "model", "qwen2.5")
    (ids,) = prompts(folder, tmp_path, {**turns("a"), "tools": [TOOL]})
    assert "get_weather" in load_tokenizer(folder).decode(ids)


def test_a_file_without_prompts_is_refused(qwen: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(KitError, match=r"PROMPTS=.*empty.txt holds no prompt"):
        reader(qwen).read(path)
    with pytest.raises(KitError, match=r"/nowhere cannot be read: No such file"):
        reader(qwen).read(Path("/nowhere"))
    with pytest.raises(BadRowError, match="it is empty"):
        reader(qwen, "complete").ids_of_line("")
    assert Counter(reader(qwen).ids_of_line("a b"))
