"""EXPORT_HF: step 2 follows the saves of a run, and the run follows none of step 2's faults."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conversion import to_hf
from tests.distributed.launch import run, words
from tests.distributed.user import ENDLESS, Run, wait_for
from tests.tiny import tiny_qwen


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    tiny_qwen(folder / "qwen")
    rows = "".join(json.dumps({"text": f"{i} " + "the quick brown fox " * (i % 9 + 2)}) + "\n" for i in range(300))
    (folder / "rows.jsonl").write_text(rows)
    flags = {"input": folder / "rows.jsonl", "output_prefix": folder / "text", "tokenizer_path": folder / "qwen"}
    run("-m", "common.preprocess", "pretrain", *words({**flags, "workers": 1}))
    return folder


def settings(work: Path, name: str, **more: Any) -> dict[str, Any]:
    paths = {"DATASET_PATH": work / "text", "HF_MODEL_PATH": work / "qwen", "SAVE_CHECKPOINT_PATH": work / name}
    return {**paths, "GPUS": 2, "TP": 2, "PP": 1, "SAVE_INTERVAL": 10, "EVAL_INTERVAL": 10, "EVAL_ITERS": 1, **more}


def same(folder: Path, checkpoint: Path, scratch: Path) -> bool:
    """Whether `folder` is what step 2 makes of `checkpoint`."""
    found, expected = (load_file(each / "model.safetensors") for each in (folder, to_hf(checkpoint, scratch)))
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_the_last_checkpoint_is_exported_when_the_run_ends(work: Path, tmp_path: Path) -> None:
    """With ASYNC_SAVE, where a checkpoint is published steps after its own; the other tests save synchronously."""
    more = {"TRAIN_ITERS": 30, "EXPORT_HF": "last", "KEEP_CHECKPOINTS": 1, "ASYNC_SAVE": "true"}
    log = Run(settings(work, "last", **more), work / "last.log").end(0)
    hf = work / "last" / "hf"
    assert f"exported iteration 30: {hf / 'last'}" in log
    assert {path.name for path in hf.iterdir()} == {"last", "iter_0000030", "export.log"}
    assert [path.name for path in sorted((work / "last").glob("iter_*"))] == ["iter_0000030"]
    assert same(hf / "last", work / "last", tmp_path / "hf")
    assert "all bits agree" in (hf / "export.log").read_text()


def test_each_checkpoint_is_exported_though_it_is_not_kept(work: Path, tmp_path: Path) -> None:
    more = {"TRAIN_ITERS": 30, "EXPORT_HF": "each", "KEEP_CHECKPOINTS": 1}
    log = Run(settings(work, "each", **more), work / "each.log").end(0)
    names = [f"iter_{iteration:07d}" for iteration in (10, 20, 30)]
    assert sorted(path.name for path in (work / "each" / "hf").glob("iter_*")) == names
    assert all(f"exported iteration {iteration}: " in log for iteration in (10, 20, 30))
    assert [path.name for path in (work / "each").glob("iter_*")] == names[-1:]
    weights = [load_file(work / "each" / "hf" / name / "model.safetensors")["model.norm.weight"] for name in names]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_best_names_the_checkpoint_of_the_lowest_validation_loss(work: Path) -> None:
    # The rate rises until it is far too high: the loss falls at first, and rises.
    more = {"TRAIN_ITERS": 40, "EXPORT_HF": "best", "LR": 10, "LR_WARMUP_ITERS": 38, "KEEP_CHECKPOINTS": 1}
    log = Run(settings(work, "best", **more), work / "best.log").end(0)
    lines = [line for line in log.splitlines() if "validation at iteration" in line]
    losses = {int(line.split("iteration ")[1].split()[0]): float(line.split("loss ")[1].split()[0]) for line in lines}
    best = min(losses, key=losses.__getitem__)
    assert best < 40, losses
    assert (work / "best" / "hf" / "best").readlink().name == f"iter_{best:07d}"


def test_an_export_that_fails_costs_the_run_nothing(work: Path) -> None:
    folder = work / "fails"
    (folder / "hf" / "iter_0000010").mkdir(parents=True)
    (folder / "hf" / "iter_0000010" / "mine.txt").write_text("a user's file")
    log = Run(settings(work, "fails", TRAIN_ITERS=20, EXPORT_HF="each"), work / "fails.log").end(0)
    assert "EXPORT_HF: iteration 10 is not exported: error: SAVE_CHECKPOINT_PATH=" in log and "mine.txt" in log
    assert "exported iteration 20: " in log and (folder / "hf" / "iter_0000010" / "mine.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_export_outlives_its_run(work: Path, number: signal.Signals) -> None:
    name = f"stopped_{number.name}"
    started = Run(settings(work, name, TRAIN_ITERS=ENDLESS, EXPORT_HF="each", SAVE_INTERVAL=2), work / f"{name}.log")
    wait_for(lambda: list((work / name / "hf").glob("iter_*/config.json")) != [], 120)
    began = time.monotonic()
    if number == signal.SIGKILL:
        started.kill()
    else:
        started.process.send_signal(number)
        log = started.end(75, 60)
        assert "EXPORT_HF: the run stops before iterations" in log
    assert time.monotonic() - began < 30 and not started.processes()


def test_best_needs_a_validation(work: Path) -> None:
    more = {"TRAIN_ITERS": 5, "EXPORT_HF": "best", "EVAL_INTERVAL": 0}
    log = Run(settings(work, "none", **more), work / "none.log").end(2)
    assert "EXPORT_HF=best needs the validation loss, and EVAL_INTERVAL=0: change one of them" in log
