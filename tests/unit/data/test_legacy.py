from pathlib import Path

import numpy as np
import pytest

from common.data.indexed import IndexedReader, IndexedWriter
from common.data.legacy import import_legacy, split_row
from common.data.manifest import resolve
from common.data.tokenizer import load_tokenizer
from common.errors import KitError

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
    with IndexedWriter(path, dtype) as writer:
        for row in rows:
            writer.add_document(row)
    return path


def test_conversations_come_back_with_their_masks(qwen: Path, tmp_path: Path) -> None:
    full = ([7] * S, [0] + [1] * (S - 1))
    source = write(tmp_path / "old", [old_row(A, B), old_row(C), old_row(A, C, B), old_row(full)])
    content = import_legacy(source, tmp_path / "new" / "data", load_tokenizer(qwen))
    files = resolve(str(tmp_path / "new" / "data"))
    assert files.kind == "sft" and files.loss_mask
    tokens, mask = IndexedReader(files.tokens), IndexedReader(files.loss_mask)
    found = [(tokens[i].tolist(), mask[i].tolist()) for i in range(len(tokens))]
    assert found == [A, B, C, A, C, B, full]
    assert mask.dtype == np.uint8 and content["notes"] == {"rows of the old kit": 4}
    assert content["documents"] == {"read": 7, "kept": 7, "dropped": {}}
    assert content["supervised_tokens"] == sum(sum(m) for _, m in found) and content["longest"] == S
    with pytest.raises(KitError, match=r"data\.json is there already"):
        import_legacy(source, tmp_path / "new" / "data", load_tokenizer(qwen))


def test_it_is_what_the_old_kit_trains_on() -> None:
    """The old kit's own reading: tokens with the marks undone, labels where they are not -100."""
    row = np.array(old_row(A, C), np.int32)
    tokens, labels = row[:S], row[S:]
    undone = np.where(tokens < 0, -tokens - 1, tokens)
    positions = [(int(undone[i]), int(labels[i])) for i in range(S) if labels[i] != -100]
    ours = [
        (int(ids[i]), int(ids[i + 1])) for ids, mask in split_row(row, "x") for i in range(len(ids) - 1) if mask[i + 1]
    ]
    assert ours == positions


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([1, 2, 3], "row 0 has 3 values, which is odd"),
        ([1, 2, 3, 4], "row 0 marks no end of a conversation"),
        ([1, -3, 2, 2], "row 0: its labels are not its tokens shifted by one"),
        ([1, -3, 7, -100], "row 0: its labels are not its tokens shifted by one"),
        ([1, -3, 5, 2, -100, 9], "row 0 learns what follows its last conversation"),
        ([600, -3, -100, -100], "row 0 holds the id 600, and .* has 400 tokens"),
    ],
)
def test_what_is_no_old_data_is_told(qwen: Path, tmp_path: Path, row: list[int], told: str) -> None:
    source = write(tmp_path / "old", [row])
    with pytest.raises(KitError, match=told):
        import_legacy(source, tmp_path / "data", load_tokenizer(qwen))
    assert not list(tmp_path.glob("data*"))


def test_data_of_another_type_is_told(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(KitError, match="holds uint16, the old kit's rows int32"):
        import_legacy(write(tmp_path / "old", [[1, 2]], "<u2"), tmp_path / "data", load_tokenizer(qwen))
