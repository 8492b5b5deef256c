"""Fixtures of the tests of training."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conversion import to_megatron
from tests.distributed.launch import run, words
from tests.distributed.user import RUNS
from tests.tiny import TEXTS, tiny_qwen


@pytest.fixture(autouse=True)
def _no_run_is_left() -> Iterator[None]:
    yield
    while RUNS:
        for pid in RUNS.pop().processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its checkpoint in torch_dist, data of both kinds."""
    folder = tmp_path_factory.mktemp("training")
    qwen = tiny_qwen(folder / "qwen", std=0.05, spread=0.05)
    texts = [{"text": f"{i} " + TEXTS[i % 4] * (1 + i % 3)} for i in range(200)]
    chats = [
        {"instruction": "Be brief." * (i % 2), "input": f"What is {i}+1?", "output": f"{i + 1}" * (1 + i % 3)}
        for i in range(200)
    ]
    for kind, rows in (("pretrain", texts), ("sft", chats)):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        run("-m", "common.preprocess", kind, *words(
            {"input": path, "output_prefix": folder / kind, "tokenizer_path": qwen, "workers": 1}
        ))  # fmt: skip
    to_megatron(qwen, folder / "start", ckpt_format="torch_dist")
    _write_variants(folder)
    return folder


@pytest.fixture(scope="module")
def work(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `inputs`, for the tests of one file to write into."""
    return shutil.copytree(inputs, tmp_path_factory.mktemp("work") / "inputs")


def _write_variants(folder: Path) -> None:
    """Data beside that of `inputs`: 105 conversations, the same with one row edited to equal counts, a copy."""
    rows = (folder / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    texts = (folder / "pretrain.jsonl").read_text(encoding="utf-8")
    for kind, name, text in (
        ("sft", "sft_105", "".join(rows[:105])),
        ("pretrain", "pretrain_mended", texts.replace("lazy dog", "lazy cat", 1)),
        ("pretrain", "pretrain_copied", texts),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text(text, encoding="utf-8")
        run("-m", "common.preprocess", kind, *words(
            {"input": path, "output_prefix": folder / name, "tokenizer_path": folder / "qwen", "workers": 1}
        ))  # fmt: skip
