import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from common.data.tokenizer.eod import find_eod
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n", "今天", "e\u0301", "1"]) | st.text(max_size=5), max_size=8))
def test_ids_are_transformers_ids_with_special_tokens_and_without(qwen: Path, words: list[str]) -> None:
    text = "".join(word for word in words if word.isascii() or word.encode("utf-8", "ignore"))
    text = text.encode("utf-8", "ignore").decode()
    ours, theirs = load_tokenizer(qwen), AutoTokenizer.from_pretrained(qwen)
    parsed = theirs(text, add_special_tokens=False).input_ids
    plain = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.encode_batch([text], parse_special=True) == [parsed]
    assert ours.encode_batch([text]) == [plain]
    assert ours.decode(plain) == ours.decode(parsed) == ours.normalize(text)
    assert ours.count_special(text) == sum(text.count(token) for token in SPECIAL)


def test_sizes_and_special_tokens(qwen: Path) -> None:
    tokenizer = load_tokenizer(qwen)
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(qwen))
    assert sorted(tokenizer.special_tokens) == sorted(SPECIAL)
    assert tokenizer.special_at("ab<|im_end|>", 2) == "<|im_end|>"
    assert tokenizer.special_at("ab<|im_end|>", 1) is None


def test_padding_and_truncation_of_the_file_are_off(qwen: Path, tmp_path: Path) -> None:
    original = Tokenizer.from_file(str(qwen / "tokenizer.json"))
    original.enable_padding(length=50)
    original.enable_truncation(3)
    original.save(str(tmp_path / "tokenizer.json"))
    texts = ["a b c d e f g", "a"]
    assert load_tokenizer(tmp_path).encode_batch(texts) == load_tokenizer(qwen).encode_batch(texts)


def test_missing_and_broken_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="TOKENIZER_PATH=.*none is not a folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(KitError, match=r"has no tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(KitError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def without_endoftext(folder: Path, config: dict, generation: dict) -> Path:
    words = {"a": 0, "<end>": 1, "b": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_end_of_document_by_rule(qwen: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(qwen)
    # The folder's own end token is <|im_end|>, as in Instruct models.
    assert find_eod(tokenizer, "auto").id == tokenizer.token_id("<|endoftext|>")
    assert find_eod(tokenizer, "<|im_end|>").id == tokenizer.token_id("<|im_end|>")
    other = load_tokenizer(without_endoftext(tmp_path, {"eos_token": "<end>"}, {}))
    assert (find_eod(other, "auto").id, find_eod(other, "auto").source) == (1, "tokenizer_config.json")
    other = load_tokenizer(without_endoftext(tmp_path, {"eos_token": {"content": "<end>"}}, {"eos_token_id": 2}))
    assert find_eod(other, "auto").id == 1
    other = load_tokenizer(without_endoftext(tmp_path, {}, {"eos_token_id": [2, 1]}))
    assert (find_eod(other, "auto").token, find_eod(other, "auto").source) == ("b", "generation_config.json")


@pytest.mark.parametrize("token", [3, ["<end>"], {"content": 5}, True])
def test_an_end_token_of_another_type_is_reported(token: object, tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"tokenizer_config\.json: eos_token=.* is not a token: set EOD_TOKEN"):
        find_eod(load_tokenizer(without_endoftext(tmp_path, {"eos_token": token}, {})), "auto")


@pytest.mark.parametrize("number", [-1, 3, 1 << 40, True, "1", 1.0, [None], [[1]], {"a": 1}])
def test_an_end_tokens_id_that_is_none_is_reported(number: object, tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"generation_config\.json: eos_token_id=.* is not a token of the tokenizer"):
        find_eod(load_tokenizer(without_endoftext(tmp_path, {}, {"eos_token_id": number})), "auto")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_file_beside_the_tokenizer_that_is_no_json_object_is_reported(name: str, tmp_path: Path) -> None:
    folder = without_endoftext(tmp_path, {}, {})
    for text in ("[]", "{", "1", "[" * 10**5):
        (folder / name).write_text(text)
        with pytest.raises(KitError, match=rf"{name} (is not valid JSON|is not a JSON object|is nested deeper)"):
            find_eod(load_tokenizer(folder), "auto")


def test_no_end_of_document_is_reported(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="EOD_TOKEN=<eod> is .* tokens"):
        find_eod(load_tokenizer(qwen), "<eod>")
    with pytest.raises(KitError, match="set EOD_TOKEN"):
        find_eod(load_tokenizer(without_endoftext(tmp_path, {"eos_token": None}, {})), "auto")
