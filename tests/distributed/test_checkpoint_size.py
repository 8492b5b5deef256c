"""The size of a checkpoint by formula, against checkpoints that training and step 2 write."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.checkpoint.formats.checkpoint_size import checkpoint_bytes
from common.model.shape.config import load_config
from tests.conversion import to_megatron
from tests.distributed.launch import run, train_forked, words
from tests.tiny import TEXTS, tiny_qwen

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
OVERHEAD = 400_000  # names, shapes and random states, which do not grow with the tensors
FORMATS = ("torch_dist", "torch")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of 2.5 million parameters, one tied and one not, and data for both."""
    folder = tmp_path_factory.mktemp("size")
    for name, tied in (("tied", True), ("untied", False)):
        tiny_qwen(folder / name, tie_word_embeddings=tied, **SHAPE)
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": TEXTS[i % 4]}) + "\n" for i in range(64)))
        given = {"input": folder / "rows.jsonl", "output_prefix": folder / f"{name}_data", "workers": 1}
        run("-m", "common.preprocess", "pretrain", *words({**given, "tokenizer_path": folder / name}))
    return folder


def on_disk(saved: Path) -> int:
    """Bytes of the newest checkpoint in `saved`, without the model's own files."""
    checkpoint = find_checkpoint(saved)
    assert checkpoint
    return sum(path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file())


def trained(work: Path, model: str, **settings: Any) -> int:
    """Bytes of a checkpoint of a run's only step."""
    saved = work / "_".join([model, *(f"{name}{value}" for name, value in settings.items())])
    flags = {"seq_length": 16, "micro_batch_size": 1, "global_batch_size": 2, "train_iters": 1, "split": "100,0,0"}
    train_forked(hf_model_path=work / model, dataset_path=work / f"{model}_data", save_checkpoint_path=saved,
                 **flags, **settings)  # fmt: skip
    return on_disk(saved)


def assert_near(found: int, formula: int) -> None:
    assert formula <= found <= 1.02 * formula + OVERHEAD


@pytest.mark.parametrize("ckpt_format", FORMATS)
@pytest.mark.parametrize(("model", "precision"), [("tied", "bf16"), ("untied", "fp32")])
def test_a_runs_checkpoint_is_as_large_as_the_formula_says(
    work: Path, model: str, precision: str, ckpt_format: str
) -> None:
    formula = checkpoint_bytes(load_config(work / model), precision)
    assert_near(trained(work, model, precision=precision, ckpt_format=ckpt_format), formula)


@pytest.mark.parametrize("ckpt_format", FORMATS)
@pytest.mark.parametrize("layout", [{"gpus": 2}, {"gpus": 2, "pp": 2}], ids=["dp2", "pp2"])
def test_other_parallel_sizes_write_as_much_but_for_the_tied_matrix_of_torch_format(
    work: Path, layout: dict[str, int], ckpt_format: str
) -> None:
    like = {"ckpt_format": ckpt_format, "pp": layout.get("pp", 1)}
    formula = checkpoint_bytes(load_config(work / "tied"), "bf16", **like)  # type: ignore[arg-type]
    assert_near(trained(work, "tied", ckpt_format=ckpt_format, **layout), formula)


@pytest.mark.parametrize("ckpt_format", FORMATS)
def test_weights_alone_are_as_large_as_the_formula_says(work: Path, ckpt_format: str) -> None:
    saved = to_megatron(work / "untied", work / f"weights_{ckpt_format}", ckpt_format=ckpt_format, dtype="bf16")
    assert_near(on_disk(saved), checkpoint_bytes(load_config(work / "untied"), "bf16", save_optimizer=False))
