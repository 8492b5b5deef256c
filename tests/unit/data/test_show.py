import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.data.dataset import manifest
from common.data.dataset.indexed_dataset import IndexedDatasetBuilder
from common.data.dataset.manifest import resolve
from common.data.dataset.show import BOLD_GREEN, RESET, show
from common.data.tokenizer.text_tokenizer import TextTokenizer, load_tokenizer
from common.errors import KitError


@pytest.fixture
def tokenizer(qwen: Path) -> TextTokenizer:
    return load_tokenizer(qwen)


@pytest.fixture
def data(tmp_path: Path, tokenizer: TextTokenizer) -> Path:
    """Two conversations whose answers are learned."""
    with (
        IndexedDatasetBuilder(tmp_path / "a_text_document", "<u2") as tokens,
        IndexedDatasetBuilder(tmp_path / "a_loss_mask_document", "u1") as mask,
    ):
        for question, answer in (("12?", "yes<|im_end|>"), ("今天天气", "好<|im_end|>")):
            before, after = tokenizer.encode_batch([question, answer], parse_special=True)
            tokens.add_document(before + after)
            mask.add_document([0] * len(before) + [1] * len(after))
    documents = {"read": 2, "kept": 2, "dropped": {}}
    described = {"kind": "sft", "tokenizer": {"tokenizer_sha256": tokenizer.sha256}, "documents": documents}
    files = {"tokens": "a_text_document", "loss_mask": "a_loss_mask_document"}
    manifest.write(tmp_path / "a", {**described, "files": files})
    return tmp_path / "a"


def test_what_is_learned_is_marked(data: Path, tokenizer: TextTokenizer) -> None:
    lines = list(show(resolve(str(data)), tokenizer, 0, 9, colour=False))
    assert lines[1::2] == ["12?⟦yes<|im_end|>⟧", "今天天气⟦好<|im_end|>⟧"]
    sizes = [len(tokenizer.encode_batch([text], parse_special=True)[0]) for text in ("12?", "yes<|im_end|>")]
    assert lines[0] == f"--- document 0 of 2: {sum(sizes)} tokens, {sizes[1]} supervised"
    coloured = list(show(resolve(str(data)), tokenizer, 1, 1, colour=True))
    assert coloured[1:] == [f"今天天气{BOLD_GREEN}好<|im_end|>{RESET}"]


def test_pretraining_data_has_no_marks(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    with IndexedDatasetBuilder(tmp_path / "a_text_document", "<u2") as tokens:
        tokens.add_document(tokenizer.encode_batch(["12 今天"])[0])
    lines = list(show(resolve(str(tmp_path / "a")), tokenizer, 0, 1, colour=False))
    assert lines[1] == "12 今天" and "supervised" not in lines[0]


def test_another_tokenizer_and_a_number_too_high_are_reported(
    data: Path, tokenizer: TextTokenizer, tmp_path: Path, qwen: Path
) -> None:
    with pytest.raises(KitError, match="INDEX=2: .* holds documents 0 to 1"):
        list(show(resolve(str(data)), tokenizer, 2, 1, colour=False))
    (tmp_path / "tokenizer.json").write_text((qwen / "tokenizer.json").read_text() + "\n")
    with pytest.raises(KitError, match="was written with another tokenizer"):
        list(show(resolve(str(data)), load_tokenizer(tmp_path), 0, 1, colour=False))


def test_what_cannot_be_ids_and_a_mask_of_other_data_are_reported(
    data: Path, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    for name, values in (("old", [5, -7]), ("large", [2**32, 5])):
        with IndexedDatasetBuilder(tmp_path / f"{name}_text_document", "<i8") as tokens:
            tokens.add_document(values)
        with pytest.raises(KitError, match=f"{name}_text_document: document 0 holds the numbers .* not token ids"):
            list(show(resolve(str(tmp_path / name)), tokenizer, 0, 1, colour=False))
    with IndexedDatasetBuilder(tmp_path / "a_loss_mask_document", "u1") as mask:
        mask.add_document([1])
    with pytest.raises(KitError, match="a_loss_mask_document does not match"):
        list(show(resolve(str(data)), tokenizer, 0, 1, colour=False))


ROW = "a\x1b[2Jb \x1b]0;title\x07 \u202egnp\u2066 \r\x9b \U0001f600 \u4f60\t\n\U0001f469\u200d\U0001f469"


@pytest.fixture
def written(tmp_path: Path, qwen: Path) -> list[str]:
    """The command that shows many documents of ROW."""
    tokenizer = load_tokenizer(qwen)
    with IndexedDatasetBuilder(tmp_path / "a_text_document", "<u2") as tokens:
        for _ in range(3000):
            tokens.add_document(tokenizer.encode_batch([ROW])[0])
    command = [sys.executable, "-m", "common.preprocess", "show", "--data", str(tmp_path / "a")]
    return [*command, "--tokenizer-path", str(qwen), "--index", "0", "--count", "3000"]


@pytest.mark.parametrize(
    ("encoding", "wide"),
    [
        ("utf-8", "\U0001f600 \u4f60"),
        ("gbk", "\\U0001f600 \u4f60"),
        ("latin-1", "\\U0001f600 \\u4f60"),
        ("ascii", "\\U0001f600 \\u4f60"),
    ],
)
def test_control_and_unprintable_characters_are_escaped(written: list[str], encoding: str, wide: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*written[:-1], "1"], env=environment, capture_output=True, check=True)
    text = done.stdout.decode(encoding).split("\n", 1)[1]
    assert text.startswith(rf"a\x1b[2Jb \x1b]0;title\x07 \u202egnp\u2066 \r\x9b {wide}" + "\t\n")
    assert not set(text) & set("\x1b\x07\x9b\r\u202e\u2066")


def test_a_closed_pipe_ends_it_silently(written: list[str]) -> None:
    process = subprocess.Popen(written, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr and process.stdout.readline().startswith(b"--- document 0 of 3000")
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141
    process.stderr.close()
