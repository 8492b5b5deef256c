"""Weights and optimizer go from one layout of ranks to any other without a bit changed, to and from Megatron-Core too.

Unlike by default, ranks are forked and not started by torchrun: a checkpoint does not depend on that.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.ports import free_port
from tests.conversion import to_megatron
from tests.distributed.launch import forked, run, steps, train_forked, words
from tests.tiny import tiny_qwen

FLAGS = {
    "seq_length": 32, "micro_batch_size": 1, "global_batch_size": 8, "log_interval": 1, "lr": 1e-3, "min_lr": 1e-4,
    "split": "100,0,0", "train_iters": 6, "eval_interval": 0, "precision": "bf16",
}  # fmt: skip
WIDE = {"tp": 2, "pp": 2, "gpus": 8}  # DP 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {"gpus": 4}, "tp4": {"tp": 4, "gpus": 4}, "pp4": {"pp": 4, "gpus": 4}, "one": {"gpus": 1},
    "vpp2": {"pp": 2, "vpp": 2, "gpus": 2}, "dp3_tp2": {"tp": 2, "gpus": 4},
    "uneven": {"pp": 2, "gpus": 2, "pipeline_layers": "3,1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(work: Path) -> Path:
    """The run at TP2 x PP2 x DP2, stopped after its third step; its vocabulary is padded at TP 4 and not at TP 1."""
    shape: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 4}
    tiny_qwen(work / "four", std=0.05, spread=0.05, **shape)
    to_megatron(work / "four", work / "four_start", ckpt_format="torch_dist")
    train_forked(**flags(work, work / "wide"), **WIDE, exit_interval=3)
    return work / "wide"


def flags(work: Path, folder: Path) -> dict[str, Any]:
    paths = {"dataset_path": work / "pretrain", "load_checkpoint_path": work / "four_start"}
    return {**FLAGS, **paths, "save_checkpoint_path": folder}


def resaved(work: Path, saved: Path, name: str, layout: dict[str, int], how: str = "ours") -> Path:
    """The checkpoint of a copy of `saved`, loaded and written anew at `layout`."""
    shutil.copytree(saved, work / name)
    given = words({**flags(work, work / name), **layout, "master_port": free_port()})
    forked(layout["gpus"], "tests.distributed.resaver", given, more={"RESAVER": how})
    return work / name / "iter_0000003"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(checkpoint)
    return {key: reader.read(key) for key in reader.tensors}


def assert_same(found: Path, expected: Path) -> None:
    mine, theirs = tensors(found), tensors(expected)
    assert mine.keys() == theirs.keys() and len(mine) == 36  # 9 weights, master weights and two moments
    for key, value in theirs.items():
        rows = min(len(value), len(mine[key]))  # of a vocabulary that is padded for another TP
        assert rows >= 300 or mine[key].shape == value.shape, key
        assert torch.equal(mine[key][:rows].view(torch.uint8), value[:rows].view(torch.uint8)), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_holds_the_same_bits(work: Path, saved: Path, name: str) -> None:
    checkpoint = resaved(work, saved, f"at_{name}", LAYOUTS[name])
    assert_same(checkpoint, saved / "iter_0000003")
    files = sorted(checkpoint.glob("__*.distcp"))
    assert len(files) == LAYOUTS[name]["gpus"]
    share = sum(file.stat().st_size for file in files) / len(files)
    assert max(file.stat().st_size for file in files) < 1.6 * share  # every rank wrote its part


def test_the_next_steps_are_those_of_the_uninterrupted_run(work: Path, saved: Path) -> None:
    shutil.copytree(saved, work / "goes_on")
    uninterrupted = steps(train_forked(**flags(work, work / "goes_on"), **WIDE))
    assert [i for i, _, _ in uninterrupted] == [4, 5, 6]
    shutil.copytree(saved, work / "moves")
    found = steps(train_forked(**flags(work, work / "moves"), gpus=1))
    for (i, loss, norm), (j, its_loss, its_norm) in zip(found, uninterrupted, strict=True):
        assert i == j and abs(loss - its_loss) < 2e-3 * its_loss and abs(norm - its_norm) < 3e-2 * its_norm  # bf16


@pytest.mark.parametrize("layout", [{"gpus": 2}, {"tp": 2, "pp": 2, "gpus": 4}], ids=["dp2", "tp2_pp2"])
def test_megatron_core_loads_what_this_kit_saves(work: Path, saved: Path, layout: dict[str, int]) -> None:
    checkpoint = resaved(work, saved, f"theirs_{len(layout)}", layout, "theirs_load")
    assert_same(checkpoint, saved / "iter_0000003")


def test_what_megatron_core_saved_is_loaded_as_before(work: Path, saved: Path) -> None:
    theirs = resaved(work, saved, "saved_by_theirs", {"tp": 2, "gpus": 4}, "theirs_save")
    assert_same(theirs, saved / "iter_0000003")
    again = resaved(work, theirs.parent, "theirs_again", {"pp": 2, "gpus": 2})
    assert_same(again, saved / "iter_0000003")


def test_a_flipped_bit_is_found_by_resume_and_by_verify(work: Path, saved: Path) -> None:
    shutil.copytree(saved, work / "flipped")
    file = max((work / "flipped" / "iter_0000003").glob("__*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    given = words({**flags(work, work / "flipped"), **WIDE, "master_port": free_port()})
    log = forked(8, "common.train", given, expect=2)
    assert f"{file} is damaged: the CRC-32 of a chunk does not match" in log
    output = run(
        "-m", "common.convert", "verify", f"--hf-model-path={work / 'four'}",
        f"--load-checkpoint-path={work / 'flipped'}", expect=2,
    )  # fmt: skip
    assert f"{file} is damaged: its CRC-32 is" in output
