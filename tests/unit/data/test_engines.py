import json
import logging
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.sources.spans import Span, whole_spans
from common.data.tokenizer.engines import sample_texts, select_engine
from common.data.tokenizer.gigatoken import EngineUnavailableError, Gigatoken
from common.data.tokenizer.text_tokenizer import TextTokenizer, load_tokenizer
from common.errors import KitError
from tests.tiny import TEXTS

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """The text of the log."""
    caplog.set_level(logging.INFO, "kit")
    return lambda: caplog.text


def changed(folder: Path, copy: Path, change: Callable[[dict], None]) -> Path:
    """A copy of `folder` whose tokenizer.json is changed."""
    shutil.copytree(folder, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    change(content)
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return copy


@pytest.fixture(scope="module")
def pair(qwen: Path) -> tuple[TextTokenizer, Gigatoken]:
    return load_tokenizer(qwen), Gigatoken((qwen / "tokenizer.json").read_bytes())


@settings(max_examples=150, deadline=None)
@given(st.lists(ANY | st.sampled_from([*TEXTS, "<|im_end|>", "a<|endoftext|>b", "<tool_call>x"])), st.booleans())
def test_any_text_gets_the_same_ids_from_both_engines(
    pair: tuple[TextTokenizer, Gigatoken], texts: list[str], parse_special: bool
) -> None:
    tokenizer, engine = pair
    ids, lengths = engine.encode_flat(texts, parse_special)
    expected = tokenizer.encode_batch(texts, parse_special)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [number for row in expected for number in row]


def test_special_tokens_are_text_unless_they_are_enabled(pair: tuple[TextTokenizer, Gigatoken]) -> None:
    tokenizer, engine = pair
    number = tokenizer.token_id("<|im_end|>")
    assert engine.encode_flat(["a<|im_end|>"], True)[0].tolist()[-1] == number
    assert number not in engine.encode_flat(["a<|im_end|>"], False)[0].tolist()


def test_gigatoken_is_selected_and_logged_and_agrees_with_tokenizers(qwen: Path, log: Callable[[], str]) -> None:
    tokenizer, other = load_tokenizer(qwen), load_tokenizer(qwen)
    select_engine(tokenizer, "auto", False, [("a", TEXTS[0]), ("b", TEXTS[1])])
    select_engine(other, "tokenizers", False, [("a", TEXTS[0])])
    assert "tokenizer engine: gigatoken; same ids as tokenizers, which is slower, on 2 documents of the input" in log()
    assert "tokenizer engine: tokenizers, set by TOKENIZER_ENGINE" in log()
    assert (tokenizer.engine, other.engine) == ("gigatoken", "tokenizers")
    for ours, theirs in zip(tokenizer.encode_flat(TEXTS), other.encode_flat(TEXTS), strict=True):
        assert np.array_equal(ours, theirs)
    assert tokenizer.encode_flat([])[0].size == 0


def test_a_tokenizer_that_it_cannot_load_is_left_to_tokenizers(
    qwen: Path, tmp_path: Path, log: Callable[[], str]
) -> None:
    def to_words(content: dict) -> None:
        content["model"] = {"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "!"}

    tokenizer = load_tokenizer(changed(qwen, tmp_path / "words", to_words))
    with pytest.raises(EngineUnavailableError):
        Gigatoken((tmp_path / "words" / "tokenizer.json").read_bytes()).encode_flat([], False)
    select_engine(tokenizer, "auto", False, [])
    assert (
        tokenizer.engine == "tokenizers"
        and "tokenizer engine: tokenizers; gigatoken is not used: it cannot load" in log()
    )
    with pytest.raises(KitError, match="TOKENIZER_ENGINE=gigatoken: it cannot load .*: set TOKENIZER_ENGINE=auto or"):
        select_engine(tokenizer, "gigatoken", False, [])


def add_token(tokenizer: dict, **how: Any) -> None:
    number = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": number, "content": "<loc>", **plain, **how})


def set_pattern(content: dict, pattern: str) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}


OTHERWISE = {
    "single_word": (lambda c: add_token(c, single_word=True), "options of the added token '<loc>'"),
    "special single_word": (
        lambda c: add_token(c, single_word=True, special=True),
        "options of the added token '<loc>'",
    ),
    "unknown field": (lambda c: add_token(c, greedy=True), "options of the added token '<loc>'"),
    "within a special": (lambda c: add_token(c, content="im_end"), "'im_end' inside a special token"),
    "across a special": (lambda c: add_token(c, content="|>x"), "'\\|>x' inside a special token"),
    "normalizer": (lambda c: c.update(normalizer={"type": "NFKC"}), "the normalizer NFKC"),
    "marks": (lambda c: set_pattern(c, r"\p{L}+|\p{M}+"), "M in the split pattern"),
    "words": (lambda c: set_pattern(c, r"\w+"), r"\\w in the split pattern"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_gigatoken_does_differently_is_left_to_tokenizers(
    qwen: Path, tmp_path: Path, log: Callable[[], str], name: str
) -> None:
    change, message = OTHERWISE[name]
    tokenizer = load_tokenizer(changed(qwen, tmp_path / "other", change))
    select_engine(tokenizer, "auto", False, [])
    assert tokenizer.engine == "tokenizers" and re.search(f"gigatoken is not used: .*{message}", log())


@pytest.mark.parametrize("how", [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}])
def test_other_added_tokens_get_the_same_ids(qwen: Path, tmp_path: Path, how: dict[str, bool]) -> None:
    folder = changed(qwen, tmp_path / "added", lambda content: add_token(content, **how))
    tokenizer, chance = load_tokenizer(folder), random.Random(0)
    words = ["<loc>", "<LOC>", " ", "\n", "a", "1", "!", "\u4e00", "\u3000", "e\u0301", "_", "<|im_end|>"]
    texts = ["".join(chance.choices(words, k=6)) for _ in range(2000)]
    for parse_special in (True, False):
        ids, lengths = Gigatoken((folder / "tokenizer.json").read_bytes()).encode_flat(texts, parse_special)
        expected = tokenizer.encode_batch(texts, parse_special)
        assert ids.tolist() == [number for row in expected for number in row]
        assert lengths.tolist() == list(map(len, expected))


def test_without_the_package_tokenizers_is_used(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, log: Callable[[], str]
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load_tokenizer(qwen)
    select_engine(tokenizer, "auto", False, [])
    assert tokenizer.engine == "tokenizers" and "it is not installed" in log()


@pytest.mark.parametrize("engine", ["auto", "gigatoken"])
def test_a_difference_on_the_users_text_stops_the_run(qwen: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    real = Gigatoken.encode_flat

    def wrong(self: Gigatoken, texts: list[str], parse_special: bool) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = real(self, texts, parse_special)
        if "公园" in texts[0]:
            ids = ids.copy()
            ids[7] += 1
        return ids, lengths

    monkeypatch.setattr(Gigatoken, "encode_flat", wrong)
    tokenizer = load_tokenizer(qwen)
    select_engine(tokenizer, engine, False, [("a", TEXTS[0])])
    with pytest.raises(
        KitError, match=r"differ on line 5, from token 7 on, near '.*': set TOKENIZER_ENGINE=tokenizers"
    ):
        select_engine(tokenizer, engine, False, [("line 4", TEXTS[0]), ("line 5", TEXTS[1])])


def test_what_a_sample_lacks_is_tried_with_texts_of_the_kits_own(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that parsed special tokens would differ on no ordinary sample."""
    monkeypatch.setattr(Gigatoken, "encode_flat", lambda self, texts, _: engines_parsing(self, texts), raising=True)
    with pytest.raises(KitError, match="differ on a built-in probe text, from token 0"):
        select_engine(load_tokenizer(qwen), "auto", False, [("a", TEXTS[0])])


def engines_parsing(engine: Gigatoken, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    rows = engine._load(engine._data).encode_batch(texts, parallel=False).layout
    return np.asarray(rows.content.data), np.diff(np.asarray(rows.offsets.data))


def test_the_sample_comes_from_all_over_the_input_and_is_bounded(tmp_path: Path) -> None:
    files = []
    for name in "ab":
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name}{i} " + "x" * 50}) + "\n" for i in range(1000)))
        files.append(path)
    sample = sample_texts(whole_spans(files), "text", 16 * 200)
    numbers = [(text[0], int(text[1:].split()[0])) for _, text in sample]
    assert numbers == sorted(numbers) and len(numbers) == len(set(numbers))
    assert {name for name, _ in numbers} == {"a", "b"}
    assert numbers[0] == ("a", 0) and max(number for _, number in numbers) > 850
    assert sum(len(text) for _, text in sample) <= 16 * 200
    place, text = sample[-1]
    row = next(
        i for i, line in enumerate(files[1].read_text().splitlines()) if json.loads(line)["text"].startswith(text)
    )
    start = len("\n".join(files[1].read_text().splitlines()[:row])) + 1
    assert place == f"the document at byte {start} of {files[1]}"


def test_unusable_rows_are_skipped_in_the_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xff\n{"no": 1}\n[1]\n{"text": 5}\n{"text": "good"}\n')
    sample = sample_texts([Span(path, 0, path.stat().st_size)], "text")
    assert {text for _, text in sample} == {"good"}
