"""What a checkpoint holds and how it is used, with the script's own defaults.

Runs that no test signals are forked: torchrun changes nothing in what they save.
"""

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import KitError
from common.training.checkpointing.folder_lock import take_lock
from common.training.tracking.records import read_metrics
from tests.conversion import to_hf
from tests.distributed.launch import steps
from tests.distributed.user import ENDLESS, Run, step3_forked

LEARNING_RATE = re.compile(r"iteration \d+/\d+ +\S+ +\S+ +(\S+)")  # after loss and grad norm


def settings(work: Path, name: str, **more: Any) -> dict[str, Any]:
    paths = {"DATASET_PATH": work / "pretrain", "LOAD_CHECKPOINT_PATH": work / "start"}
    return {**paths, "SAVE_CHECKPOINT_PATH": work / name, "GPUS": 2, "EVAL_INTERVAL": 0, **more}


def train(work: Path, name: str, code: int = 0, **more: Any) -> str:
    return step3_forked(settings(work, name, **more), code)


def weights(work: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(to_hf(work / name, work / f"{name}_exported") / "model.safetensors")


def assert_same_weights(work: Path, one: str, other: str) -> None:
    expected, found = weights(work, one), weights(work, other)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("iter_*"))


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_what_is_saved_is_one_steps_weights_with_and_without_overlap(work: Path, ckpt_format: str) -> None:
    same = {"PRECISION": "bf16", "CKPT_FORMAT": ckpt_format, "TRAIN_ITERS": 6}
    if ckpt_format == "torch":  # at other sizes its weights would be refused
        same |= {"HF_MODEL_PATH": work / "qwen", "LOAD_CHECKPOINT_PATH": ""}
    name = f"one_step_{ckpt_format}"
    train(work, f"{name}_stopped", **same, EXIT_INTERVAL=3)
    # Departs from the defaults: this is what they are held against.
    train(work, f"{name}_plain", **same, EXIT_INTERVAL=3, OVERLAP_PARAM_GATHER="false", OVERLAP_GRAD_REDUCE="false")
    assert_same_weights(work, f"{name}_plain", f"{name}_stopped")
    rest = steps(train(work, f"{name}_stopped", **same))
    uninterrupted = steps(train(work, f"{name}_uninterrupted", **same))
    assert [i for i, _, _ in rest] == [4, 5, 6] and rest == uninterrupted[3:]


def test_an_asynchronous_checkpoint_bears_its_own_iteration(work: Path) -> None:
    run = Run(settings(work, "async", ASYNC_SAVE="true", SAVE_INTERVAL=4, TRAIN_ITERS=ENDLESS), work / "async.log")
    run.wait_for("saved " + str(work / "async" / "iter_0000012"))
    run.kill()
    done = run.tracker()
    assert done % 4 == 0 and done in saved(work / "async")
    again = train(work, "async", ASYNC_SAVE="true", TRAIN_ITERS=done + 1)
    assert [iteration for iteration, _, _ in steps(again)] == [done + 1]


def test_a_stop_waits_for_an_asynchronous_save(work: Path) -> None:
    run = Run(settings(work, "async_stop", ASYNC_SAVE="true", SAVE_INTERVAL=4, TRAIN_ITERS=ENDLESS), work / "as.log")
    run.wait_for("saved " + str(work / "async_stop" / "iter_0000004"))
    run.process.send_signal(signal.SIGTERM)
    log = run.end(75, 60)
    assert f"stop requested: saving iteration {run.tracker()}" in log and run.tracker() in saved(work / "async_stop")


def test_the_newest_checkpoint_and_newer_ones_are_kept_where_the_tracker_was_set_back(work: Path) -> None:
    train(work, "set_back", TRAIN_ITERS=6, SAVE_INTERVAL=1, KEEP_CHECKPOINTS=0)
    tracker = work / "set_back" / "latest_checkpointed_iteration.txt"
    tracker.write_text("2\n")
    train(work, "set_back", TRAIN_ITERS=6, SAVE_INTERVAL=1, KEEP_CHECKPOINTS=2, EXIT_INTERVAL=3)
    assert tracker.read_text() == "3\n" and saved(work / "set_back") == [2, 3, 4, 5, 6]
    train(work, "set_back", TRAIN_ITERS=6, SAVE_INTERVAL=1, KEEP_CHECKPOINTS=2)
    assert tracker.read_text() == "6\n" and saved(work / "set_back") == [5, 6]


def test_every_mth_the_best_and_the_last_of_each_epoch_are_kept_besides(work: Path) -> None:
    # 3 epochs of so many steps; at this learning rate the validation loss is lowest in the middle.
    flags = {"SPLIT": "80,20,0", "EVAL_INTERVAL": 1, "EVAL_ITERS": 1, "GLOBAL_BATCH_SIZE": 32, "EPOCHS": 3}
    log = train(
        work, "kept", **flags, SAVE_INTERVAL=1, KEEP_CHECKPOINTS=1, KEEP_EVERY=7, KEEP_BEST=2, KEEP_EPOCHS="true"
    )
    (samples,) = re.findall(r"data: (\d+) samples", log)
    losses = {int(i): float(loss) for i, loss in re.findall(r"validation at iteration (\d+) +loss ([\d.]+)", log)}
    last = steps(log)[-1][0]
    epochs = {next(i for i in range(1, last + 1) if i * 32 >= n * int(samples)) for n in (1, 2, 3)}
    best = sorted(losses, key=losses.__getitem__)[:2]
    assert saved(work / "kept") == sorted({last, *range(7, last + 1, 7), *best, *epochs})


def test_weights_alone_are_exported_and_not_resumed(work: Path) -> None:
    log = train(work, "alone", TRAIN_ITERS=3, SAVE_OPTIMIZER="false")
    train(work, "whole", TRAIN_ITERS=3)
    assert_same_weights(work, "whole", "alone")
    size = {name: sum(path.stat().st_size for path in (work / name).rglob("*.distcp")) for name in ("alone", "whole")}
    assert size["alone"] < 0.4 * size["whole"], log
    assert "holds weights only (SAVE_OPTIMIZER=false)" in train(work, "alone", 2, TRAIN_ITERS=6)
    again = train(work, "alone_again", TRAIN_ITERS=1, LOAD_CHECKPOINT_PATH=work / "alone")
    assert "start: weights from" in again


def test_settings_given_on_resume_hold(work: Path) -> None:
    train(work, "changed", TRAIN_ITERS=10, EXIT_INTERVAL=3, LR_DECAY_STYLE="constant")
    more = {"LR": 2e-4, "MIN_LR": 1e-5, "ADAM_BETA2": 0.5, "ADAM_EPS": 1e-7}
    log = train(work, "changed", TRAIN_ITERS=10, EXIT_INTERVAL=6, LR_DECAY_STYLE="constant", **more)
    assert "resumed with changed settings: LR 0.001 -> 0.0002, MIN_LR 0.0001 -> 1e-05, ADAM_EPS 1e-08 -> 1e-07" in log
    assert "ADAM_BETA1, ADAM_BETA2 (0.9, 0.95) -> (0.9, 0.5)" in log
    assert LEARNING_RATE.findall(log) == ["2.00e-04"] * 3
    log = train(work, "changed", TRAIN_ITERS=10, LR_DECAY_STYLE="cosine", **more)
    assert LEARNING_RATE.findall(log)[-1] == "1.00e-05" and "other settings" not in log


@pytest.mark.parametrize(("first", "steps_done", "then", "rest"), [(4, 10, 8, 9), (4, 20, 8, 4), (8, 10, 4, 7)])
def test_an_epoch_is_an_epoch_at_another_batch_size(
    work: Path, first: int, steps_done: int, then: int, rest: int
) -> None:
    # 105 samples: what is left after `first` x `steps_done` of them is trained by batches of `then`.
    name, flags = f"batch_{first}_{steps_done}", {"MIN_LR": 0, "EPOCHS": 1, "MICRO_BATCH_SIZE": 1, "SPLIT": "100,0,0"}
    flags |= {"DATASET_PATH": work / "sft_105", "TRAIN_MODE": "finetune", "SEQ_LENGTH": 96, "PACKING": "false"}
    train(work, name, **flags, GLOBAL_BATCH_SIZE=first, EXIT_INTERVAL=steps_done)
    log = train(work, name, **flags, GLOBAL_BATCH_SIZE=then)
    assert [i for i, _, _ in steps(log)] == list(range(steps_done + 1, steps_done + rest + 1))
    rates = [float(rate) for rate in LEARNING_RATE.findall(log)]
    assert rates[-1] == 0 and all(rates[:-1])
    assert read_metrics(work / name)[-1]["consumed_samples"] == first * steps_done + then * rest


def test_other_data_of_as_many_rows_is_noticed(work: Path) -> None:
    train(work, "mended", TRAIN_ITERS=2)
    log = train(work, "mended", 2, TRAIN_ITERS=4, DATASET_PATH=work / "pretrain_mended")
    assert "was trained on other samples (content " in log
    assert steps(train(work, "mended", TRAIN_ITERS=3, DATASET_PATH=work / "pretrain_copied"))[0][0] == 3


def test_a_second_run_in_a_folder_waits_for_the_first_and_resumes_it(work: Path) -> None:
    run = Run(settings(work, "taken", TRAIN_ITERS=ENDLESS), work / "taken.log")
    run.wait_for("iteration 3/")
    with pytest.raises(KitError, match=r"taken is being written by another run \(process \d+ on .*: wait for it"):
        take_lock(work / "taken", timeout_s=0)  # what the command says after half a minute
    second = Run(settings(work, "taken", TRAIN_ITERS=ENDLESS), work / "taken_too.log")
    second.wait_for(f"waiting for the run that writes to {work / 'taken'} (process ")
    run.process.send_signal(signal.SIGTERM)
    run.end(75)
    second.wait_for("start: resume from ")
