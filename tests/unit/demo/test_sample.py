"""The sample on disk is a Qwen2.5 that transformers loads, with a tokenizer that spends few tokens on its rows."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.demo.corpus import CHATS, QUESTIONS, TEXTS
from common.demo.sample import SHAPE, write_sample


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, 1)
    return folder


def test_the_same_seed_gives_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "same", 1)
    write_sample(tmp_path / "other", 2)
    files = [path.relative_to(sample) for path in sorted(sample.rglob("*")) if path.is_file()]
    assert {path.name for path in files} >= {TEXTS, CHATS, QUESTIONS, "model.safetensors", "tokenizer.json"}
    assert all((tmp_path / "same" / path).read_bytes() == (sample / path).read_bytes() for path in files)
    for name in (TEXTS, CHATS, QUESTIONS, "model/model.safetensors"):
        assert (tmp_path / "other" / name).read_bytes() != (sample / name).read_bytes()


def test_the_model_has_what_qwen_has(sample: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(sample / "model")
    config, attention = model.config, model.model.layers[0].self_attn
    assert config.model_type == "qwen2" and config.tie_word_embeddings
    assert config.num_attention_heads > config.num_key_value_heads > 1
    assert attention.q_proj.bias is not None and attention.o_proj.bias is None
    tokenizer = AutoTokenizer.from_pretrained(sample / "model")
    assert len(tokenizer) <= SHAPE.vocab_size == config.vocab_size
    ids = tokenizer("九只红猫", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_what_transformers_tokenizes_goes_to_its_model_as_it_is(sample: Path) -> None:
    tokenizer, model = (kind.from_pretrained(sample / "model") for kind in (AutoTokenizer, AutoModelForCausalLM))
    given = tokenizer("What is 1+1?", return_tensors="pt")
    assert set(given) == {"input_ids", "attention_mask"}
    made = model.generate(**given, max_new_tokens=2, min_new_tokens=2)
    assert made.shape == (1, given["input_ids"].shape[1] + 2)


def test_roles_are_one_token_each(sample: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sample / "model")
    assert [len(tokenizer(role).input_ids) for role in ("system", "user", "assistant")] == [1, 1, 1]
