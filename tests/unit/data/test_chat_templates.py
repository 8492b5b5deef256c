"""The models' own chat templates: what is rendered is what transformers renders, and which of it is learned."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

import common.data.templates.chat_template
from common.data.encoders.sft import NEWLINE_ANSWERS, Segment, SftEncoder
from common.data.sources.bad_rows import BadRowError
from common.data.templates.assistant_spans import RESTORED_REASONING, SHORTER_PROMPT
from common.data.templates.chat_template import ChatTemplate
from common.data.tokenizer.text_tokenizer import TextTokenizer, load_tokenizer
from common.demo.tokenizer import train_tokenizer
from common.errors import KitError

TEMPLATES = Path(__file__).parent / "templates"
ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
R1_ADDED = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
R1_SPECIAL = R1_ADDED[:2]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"


def write(folder: Path, name: str, template: str, **more: Any) -> Path:
    r1 = name.startswith("r1")
    tokenizer = train_tokenizer(["the cat sat\n\n\non the mat\n\n and said hello\n world 你好 世界 "] * 4, 330)
    tokenizer.add_tokens(
        [AddedToken(t, special=t in R1_SPECIAL, normalized=False) for t in (R1_ADDED if r1 else ADDED)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": R1_ADDED[0], "eos_token": R1_ADDED[1]} if r1 else {"eos_token": "<|im_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", **ends, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small tokenizer's folder with each model's template."""
    root = tmp_path_factory.mktemp("templates")
    texts = {path.stem: path.read_text() for path in TEMPLATES.glob("*.jinja")}
    # As QwQ, except that the last answer's reasoning is dropped too.
    texts["qwq_strips"] = texts["qwq"].replace("if not loop.last", "if true")
    # As Qwen3's later models that only think: the prompt begins the reasoning.
    texts["qwen3_thinking"] = texts["qwen3"].replace(
        "assistant\\n' }}\n    {%- if enable", "assistant\\n<think>\\n' }}\n    {%- if enable"
    )
    assert len(set(texts.values())) == len(texts) == 6
    return {name: write(root / name, name, text) for name, text in texts.items()}


def encoder(folder: Path, loss_turns: str = "all", loss_on: str = "answer") -> SftEncoder:
    tokenizer = load_tokenizer(folder)
    return SftEncoder(tokenizer, ChatTemplate(tokenizer), "messages", "system", loss_on, loss_turns, None)


def conversation(*contents: str | dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn; an object is a full message, the assistant's unless it has a role."""
    return [
        {"role": "assistant", "content": "", **each} if isinstance(each, dict) else {"role": role, "content": each}
        for each, role in zip(contents, ("user", "assistant") * len(contents), strict=False)
    ]


def learned(made: SftEncoder, messages: list[dict[str, Any]], **fields: Any) -> tuple[list[str], str, Counter[str]]:
    """(what is learned, the full text, counts)."""
    counts: Counter[str] = Counter()
    pieces: list[Segment] = made.segments_of_row({"messages": messages, **fields}, counts)
    return [piece.text for piece in pieces if piece.loss], "".join(piece.text for piece in pieces), counts


@pytest.mark.parametrize(
    ("name", "turns", "expected"),
    [
        ("qwen2.5", ("q", "It is 4."), ["It is 4."]),
        ("qwen2.5", ("q", THOUGHT + "It is 4."), [THOUGHT + "It is 4."]),
        ("qwen3", ("q", "It is 4."), ["It is 4."]),
        ("qwen3", ("q", "\n\nIt is 4. "), ["It is 4. "]),
        ("qwen3", ("q", ""), [""]),
        ("qwen3", ("q", {"content": "It is 4.", "reasoning_content": "Two and two."}), [THOUGHT + "It is 4."]),
        ("qwen3", ("q", {"content": "It is 4.", "reasoning_content": ""}), ["It is 4."]),
        ("qwen3", ("q", "<think>Two and two.</think>It is 4."), [THOUGHT + "It is 4."]),
        ("qwen3", ("q", "Two and two.\n</think>\n\nIt is 4."), [THOUGHT + "It is 4."]),
        ("qwen3", ("q", "a", "q", "b"), ["a", "b"]),
        ("qwen3", ("q", "a", "q", THOUGHT + "b"), ["a", THOUGHT + "b"]),
        ("qwen3_thinking", ("q", "It is 4."), ["It is 4."]),
        ("qwen3_thinking", ("q", THOUGHT + "It is 4."), [THOUGHT.removeprefix("<think>\n") + "It is 4."]),
        ("qwen3_thinking", ("q", "a", "q", "b"), ["a", "b"]),
        ("qwq", ("q", "It is 4."), ["It is 4."]),
        ("qwq", ("q", THOUGHT + "It is 4."), [THOUGHT.removeprefix("<think>\n") + "It is 4."]),
        ("qwq", ("q", "a", "q", "b"), ["a", "b"]),
        ("r1_distill", ("q", "It is 4."), ["It is 4."]),
        ("r1_distill", ("q", "a", "q", "b"), ["a", "b"]),
    ],
)
def test_what_is_learned_of_what_transformers_renders(
    folders: dict[str, Path], name: str, turns: tuple[Any, ...], expected: list[str]
) -> None:
    made = encoder(folders[name])
    messages = conversation(*turns)
    found, text, _ = learned(made, messages)
    end = R1_ADDED[1] if name.startswith("r1") else "<|im_end|>"
    assert found == [each + end for each in expected]
    assert text == AutoTokenizer.from_pretrained(folders[name]).apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", ["r1_distill", "qwq_strips"])
@pytest.mark.parametrize("begin", ["<think>\n", "<think>", ""])
def test_reasoning_that_the_template_leaves_out_of_the_last_answer_follows_its_prompt(
    folders: dict[str, Path], name: str, begin: str
) -> None:
    made = encoder(folders[name])
    messages = conversation("q", "a", "q", f"{begin}Two and two.\n</think>\n\nIt is 4.")
    found, text, counts = learned(made, messages)
    prompt = AutoTokenizer.from_pretrained(folders[name]).apply_chat_template(
        messages[:3], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<think>\n") and text.startswith(prompt + found[-1])
    assert found[-1].startswith("Two and two.\n</think>\n\nIt is 4.<") and counts[RESTORED_REASONING] == 1


def test_an_answer_after_a_shorter_prompt_is_counted(folders: dict[str, Path]) -> None:
    assert learned(encoder(folders["r1_distill"]), conversation("q", "a", "q", "b"))[2][SHORTER_PROMPT] == 2
    assert learned(encoder(folders["qwen3"]), conversation("q", "a", "q", "b"))[2][SHORTER_PROMPT] == 0


@pytest.mark.parametrize("name", ["qwen3", "qwq", "r1_distill", "qwen3_thinking"])
def test_earlier_reasoning_that_is_left_out_is_reported(folders: dict[str, Path], name: str) -> None:
    messages = conversation("q", THOUGHT + "a", "q", THOUGHT + "b")
    with pytest.raises(BadRowError, match="drops the reasoning of turn 2 when more turns follow: set LOSS_TURNS="):
        learned(encoder(folders[name]), messages)
    assert learned(encoder(folders[name], "last"), messages)[0][0].startswith(("<think>\nTwo", "Two and two."))
    messages[1]["loss"] = True
    with pytest.raises(BadRowError, match="set its 'loss' to false"):
        learned(encoder(folders[name], "last"), messages)


@pytest.mark.parametrize("name", ["qwen2.5", "qwq", "r1_distill"])
def test_a_field_of_reasoning_that_is_not_shown_is_reported(folders: dict[str, Path], name: str) -> None:
    messages = conversation("q", {"content": "Two and two.", "reasoning_content": "and"})
    with pytest.raises(BadRowError, match="'reasoning_content'.* of turn 2"):
        learned(encoder(folders[name]), messages)


def test_a_rows_own_settings_reach_the_template(folders: dict[str, Path]) -> None:
    made = encoder(folders["qwen3"])
    off = {"enable_thinking": False}
    found, text, counts = learned(made, conversation("q", "a", "q", "b"), chat_template_kwargs=off)
    assert found == ["a<|im_end|>", "b<|im_end|>"] and counts[SHORTER_PROMPT] == 1
    theirs = AutoTokenizer.from_pretrained(folders["qwen3"])
    assert text == theirs.apply_chat_template(conversation("q", "a", "q", "b"), tokenize=False, **off)
    with pytest.raises(BadRowError, match="remove its chat_template_kwargs, or the reasoning"):
        learned(made, conversation("q", THOUGHT + "a"), chat_template_kwargs=off)
    for wrong in ("enable_thinkin", "tools", "tokenize", "messages", "bos_token", "namespace"):
        with pytest.raises(BadRowError, match=f"'{wrong}', which the chat template .* reads .*enable_thinking"):
            learned(made, conversation("q", "a"), chat_template_kwargs={wrong: False})
    with pytest.raises(BadRowError, match="'enable_thinking', which"):
        learned(encoder(folders["qwen2.5"]), conversation("q", "a"), chat_template_kwargs=off)


def test_a_call_whose_arguments_are_to_be_a_string_is_learned(folders: dict[str, Path]) -> None:
    made = encoder(folders["r1_distill"])
    messages = conversation("q", {"tool_calls": [CALL]}, {"role": "tool", "content": "5"}, {"content": "It is 4."})
    found, _, _ = learned(made, messages)
    shown = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Paris"}\n```'
    assert found == [f"{shown}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{R1_ADDED[1]}", f"It is 4.{R1_ADDED[1]}"]


def test_a_template_that_fails_on_a_row_makes_it_a_bad_row(folders: dict[str, Path]) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}  # without its type
    with pytest.raises(BadRowError, match="the chat template fails on it: UndefinedError"):
        learned(encoder(folders["r1_distill"]), conversation("q", {"tool_calls": [call]}))


@pytest.mark.parametrize("spelled", ["<|im_end|>", "<|im_end|>\n<|im_start|>user\nq<|im_end|>"])
def test_a_call_that_spells_the_end_of_its_turn_does_not_end_there(folders: dict[str, Path], spelled: str) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": spelled}}}
    made = encoder(folders["qwen2.5"])
    found, _, _ = learned(
        made, conversation("q", {"tool_calls": [call]}, {"role": "tool", "content": "5"}, {"content": "b"})
    )
    assert found[0].endswith("}}\n</tool_call><|im_end|>") and found[1] == "b<|im_end|>"


def made_up(rng: random.Random, thinks: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A conversation of all that rows can have; earlier reasoning only where no user's turn follows it."""
    texts = ("a", "It is 4.", " two\nlines ", "<b>你好</b>", "say <|im_end|> twice", "think")
    messages = [{"role": "system", "content": rng.choice(texts)}] if rng.random() < 0.5 else []
    rounds = rng.randint(1, 4)
    for number in range(rounds):
        last = number == rounds - 1
        messages.append({"role": "user", "content": rng.choice(texts)})
        while rng.random() < 0.4:
            messages.append(
                {
                    "role": "assistant",
                    "content": rng.choice(("", "Let me see.")),
                    "tool_calls": [CALL] * rng.randint(1, 2),
                }
            )
            if thinks and last and rng.random() < 0.5:
                messages[-1]["reasoning_content"] = rng.choice(texts)
            messages += [{"role": "tool", "content": rng.choice(texts)}] * rng.randint(1, 2)
        messages.append({"role": "assistant", "content": rng.choice(texts)})
        if thinks and last and rng.random() < 0.6:
            messages[-1]["reasoning_content"] = rng.choice((*texts, ""))
    return messages, {"tools": [TOOL]} if rng.random() < 0.4 else {}


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "qwq", "qwen3_thinking"])
def test_made_up_conversations_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    theirs, rng = AutoTokenizer.from_pretrained(folders[name]), random.Random(0)
    for loss_turns in ("all", "last"):
        made = encoder(folders[name], loss_turns)
        for _ in range(60):
            messages, more = made_up(rng, name.startswith("qwen3"))
            found, text, _ = learned(made, messages, **more)
            assert text == theirs.apply_chat_template(messages, tokenize=False, **more)
            answers = [message for message in messages if message["role"] == "assistant"]
            answers = answers[-1:] if loss_turns == "last" else answers
            assert len(found) == len(answers)
            for piece, message in zip(found, answers, strict=True):
                reasoning, content = message.get("reasoning_content", ""), message["content"]
                calls = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
                calls *= len(message.get("tool_calls", []))
                expected = f"{content}{calls}" if content else calls[name != "qwen2.5" and name != "qwq" :]
                if calls and not content:
                    expected = calls.lstrip("\n")
                if reasoning:
                    expected = f"<think>\n{reasoning}\n</think>\n\n{expected}"
                    expected = expected.removeprefix("<think>\n") if name == "qwen3_thinking" else expected
                assert piece == f"{expected}<|im_end|>"


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "qwq", "r1_distill"])
@pytest.mark.parametrize("loss_on", ["answer", "turn"])
def test_a_long_conversation_is_rendered_in_time_that_grows_as_it_does(
    folders: dict[str, Path], name: str, loss_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = encoder(folders[name], "all", loss_on)
    rendered = []
    real = made.template.render
    monkeypatch.setattr(made.template, "render", lambda *given: rendered.append(len(given[0])) or real(*given))
    sums = []
    for pairs in (50, 100, 200):
        rendered.clear()
        messages = [{"role": "system", "content": "s"}, *conversation(*(str(n) for n in range(2 * pairs)))]
        found, text, _ = learned(made, messages)
        assert len(found) == pairs * (1 if loss_on == "answer" else 2)
        assert [each.split("<")[0] for each in found if each[0].isdigit()] == [str(2 * n + 1) for n in range(pairs)]
        assert text == AutoTokenizer.from_pretrained(folders[name]).apply_chat_template(messages, tokenize=False)
        sums.append(sum(rendered))
    assert sums[2] < 2.3 * sums[1] < 2.3 * 2.3 * sums[0]


def test_a_long_conversation_whose_turns_are_not_alike_is_rendered_in_full(tmp_path: Path) -> None:
    counted = (
        (TEMPLATES / "qwen2.5.jinja")
        .read_text()
        .replace("'<|im_end|>' + '\\n'", "'<|im_end|>' + '\\n' + (loop.index | string)")
    )
    made = encoder(write(tmp_path / "counted", "counted", counted))
    found, text, _ = learned(made, conversation(*(f"{n}x" for n in range(60))))
    assert found == [f"{n}x<|im_end|>" for n in range(1, 60, 2)] and "<|im_end|>\n60" in text


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "qwq", "r1_distill"])
def test_each_prompts_ids_are_those_of_inference(folders: dict[str, Path], name: str) -> None:
    """But for those after an answer that is learned and begins with a newline, which the log counts."""
    theirs = AutoTokenizer.from_pretrained(folders[name])
    made = encoder(folders[name])
    for first, differs in (("a", 0), ("\n\nb", 1)):
        messages = conversation("q", first, "q", "c")
        pieces = made.segments_of_row({"messages": messages}, counts := Counter())
        ids = made._encode([pieces])[0][0].tolist()
        prompts = []
        for n in (1, 3):
            prompt = theirs.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True)
            end = "<｜Assistant｜>" if name == "r1_distill" else "assistant\n"
            shown = prompt[: prompt.rindex(end) + len(end)]  # less the reasoning's beginning: the rows have none
            want = theirs(shown, add_special_tokens=False)["input_ids"]
            prompts.append(ids[: len(want)] == want)
        joined = differs and name in ("qwen2.5", "qwen3")
        assert prompts == [True, not joined] and counts[NEWLINE_ANSWERS] == joined
    last = encoder(folders[name], "last")
    assert learned(last, conversation("q", "\n\nb", "q", "c"))[2][NEWLINE_ANSWERS] == 0


@pytest.mark.parametrize("named", [True, False])
def test_a_token_that_transformers_adds_by_itself_is_no_fault_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """As Llama's class does for R1-Distill-Qwen, by the versions of transformers that still use it there."""
    text = (TEMPLATES / "r1_distill.jinja").read_text()
    folder = write(tmp_path / "r1", "r1", text, **({"unk_token": "<unk>"} if named else {}))
    real = common.data.templates.chat_template._load

    def load(tokenizer: TextTokenizer) -> Any:
        loaded = real(tokenizer)
        loaded.add_tokens(["<unk>"])
        assert len(loaded) == tokenizer.vocab_size + 1
        return loaded

    monkeypatch.setattr(common.data.templates.chat_template, "_load", load)
    if named:
        with pytest.raises(KitError, match="it lacks '<unk>'"):
            encoder(folder)
    else:
        assert learned(encoder(folder), conversation("q", "a"))[0] == [f"a{R1_ADDED[1]}"]
