import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import preprocess
from common.data.dataset.builder import build_dataset
from common.data.dataset.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from common.data.dataset.legacy import import_legacy, parse_legacy_row, refuse_legacy
from common.data.dataset.manifest import DataFiles, resolve
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError

ROOT = Path(__file__).parents[3]
PAD, S = 500, 12


def old_row(*conversations: tuple[list[int], list[int]], length: int = S) -> list[int]:
    """As the old kit writes it: tokens with each end as -1 - id, then labels shifted by one; (ids, mask) each."""
    tokens: list[int] = []
    labels: list[int] = []
    for ids, mask in conversations:
        tokens += [*ids[:-1], -1 - ids[-1]]
        labels += [token if learned else -100 for token, learned in zip(ids[1:], mask[1:], strict=True)] + [-100]
    rest = length - len(tokens)
    return tokens + [PAD] * rest + labels + [-100] * rest


A = ([5, 6, 7, 8], [0, 0, 1, 1])
B = ([9, 0], [0, 1])  # the id 0 is stored as -1
C = ([3, 4, 3, 4, 3, 4], [0, 0, 1, 0, 0, 1])


def write(path: Path, rows: list[list[int]], dtype: str = "<i4") -> Path:
    with IndexedDatasetBuilder(path, dtype) as writer:
        for row in rows:
            writer.add_document(row)
    return path


def test_conversations_come_back_with_their_masks(qwen: Path, tmp_path: Path) -> None:
    full = ([7] * S, [0] + [1] * (S - 1))
    source = write(tmp_path / "old", [old_row(A, B), old_row(C), old_row(A, C, B), old_row(full)])
    content = import_legacy(source, tmp_path / "new" / "data", load_tokenizer(qwen))
    files = resolve(str(tmp_path / "new" / "data"))
    assert files.kind == "sft" and files.loss_mask
    tokens, mask = IndexedDataset(files.tokens), IndexedDataset(files.loss_mask)
    found = [(tokens[i].tolist(), mask[i].tolist()) for i in range(len(tokens))]
    assert found == [A, B, C, A, C, B, full]
    assert mask.dtype == np.uint8 and content["notes"] == {"rows of the legacy kit": 4}
    assert content["documents"] == {"read": 7, "kept": 7, "dropped": {}}
    assert content["supervised_tokens"] == sum(sum(m) for _, m in found) and content["longest"] == S
    with pytest.raises(KitError, match=r"data\.json already exists"):
        import_legacy(source, tmp_path / "new" / "data", load_tokenizer(qwen))


def test_it_is_what_the_old_kit_trains_on() -> None:
    """The old kit's own reading: tokens with the marks undone, labels where they are not -100."""
    row = np.array(old_row(A, C), np.int32)
    tokens, labels = row[:S], row[S:]
    undone = np.where(tokens < 0, -tokens - 1, tokens)
    positions = [(int(undone[i]), int(labels[i])) for i in range(S) if labels[i] != -100]
    ours = [
        (int(ids[i]), int(ids[i + 1]))
        for ids, mask in parse_legacy_row(row, "x")
        for i in range(len(ids) - 1)
        if mask[i + 1]
    ]
    assert ours == positions


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2, 3], "row 0 has 3 values, which is odd"),
        ([1, 2, 3, 4], "row 0 marks no end of a conversation"),
        ([1, -3, 2, 2], "row 0: its labels are not its tokens shifted by one"),
        ([1, -3, 7, -100], "row 0: its labels are not its tokens shifted by one"),
        ([1, -3, 5, 2, -100, 9], "row 0 has labels after its last conversation"),
        ([600, -3, -100, -100], "row 0 holds the token id 600, but .* has 400 tokens"),
    ],
)
def test_invalid_legacy_data_is_reported(qwen: Path, tmp_path: Path, row: list[int], message: str) -> None:
    source = write(tmp_path / "old", [row])
    with pytest.raises(KitError, match=message):
        import_legacy(source, tmp_path / "data", load_tokenizer(qwen))
    assert not list(tmp_path.glob("data*"))


def test_data_of_another_type_is_reported(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="holds uint16, but the legacy kit's rows are int32"):
        import_legacy(write(tmp_path / "old", [[1, 2]], "<u2"), tmp_path / "data", load_tokenizer(qwen))


@pytest.mark.parametrize("given", ["an old one", "an old one_text_document"])
def test_commands_that_read_it_name_the_command_that_imports_it(
    qwen: Path, tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "an old one_text_document", [old_row(A, B), old_row(C)])
    files = resolve(str(tmp_path / given))
    messages = []
    for train_mode in ("pretrain", "finetune"):
        with pytest.raises(KitError) as error:
            build_dataset(files, train_mode=train_mode, seq_length=4, seed=0)
        messages.append(str(error.value))
    words = ["--data", str(files.tokens), "--tokenizer-path", str(qwen)]
    for command in (["show", *words], ["stats", *words[:2]]):
        monkeypatch.setattr("sys.argv", ["preprocess", *command])
        with pytest.raises(KitError) as error:
            preprocess.main()
        messages.append(str(error.value))
    assert len(set(messages)) == 1, messages
    command, settings = messages[0].split("`")[1], messages[0].split("TRAIN_MODE=finetune ")[1]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(
        ["bash", "-c", f"{command} && {settings} && echo $DATASET_PATH"],
        env={**os.environ, "TOKENIZER_PATH": str(qwen), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    samples = build_dataset(resolve(done.stdout.strip()), train_mode="finetune", seq_length=8, seed=0)
    assert samples.samples_per_epoch == 3


def test_pretraining_data_is_not_accepted_as_legacy_data(tmp_path: Path) -> None:
    for name, rows in {"odd": [[1, 2, 3]], "plain": [[1, 2, 3, 4]], "empty": []}.items():
        refuse_legacy(DataFiles("pretrain", write(tmp_path / name, rows)))
