"""Step 3's settings: which are accepted, and which are refused with value, rule and remedy."""

import argparse
import re
from typing import Any

import pytest

from common.errors import KitError
from common.settings import add_options, from_namespace, to_flags
from common.training.settings import TrainSettings


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"save_checkpoint_path": "save", "dataset_path": "data", "epochs": 1.0, **changes})


def test_the_defaults_are_a_run() -> None:
    train_settings = settings()
    assert train_settings.sizes.world_size == train_settings.sizes.dp == 1
    assert settings(gpus=8, nnodes=2, tp=2, pp=2).sizes.dp == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"train_iters": 5, "epochs": None},
        {"exit_interval": 1, "eval_interval": 0, "keep_checkpoints": 0, "clip_grad": 0.0, "num_workers": 0},
        {"min_lr": 1e-5},
        {"min_lr": 0.0},
        {"node_rank": 1, "nnodes": 2, "master_addr": "a"},
        {"nnodes": 2, "rdzv_endpoint": "[::1]:29400", "max_restarts": 1},
        {"max_restarts": 1},
        {"train_mode": "finetune", "packing": True},
        {"train_mode": "pretrain", "reset_attention": True},
        {"train_or_convert_ckpt": "convert", "load_checkpoint_path": "l", "dataset_path": None, "epochs": None},
    ],
    ids=str,
)
def test_values_at_the_limit_are_accepted(changes: dict[str, Any]) -> None:
    settings(**changes)


@pytest.mark.parametrize(
    "name",
    ["seq_length", "micro_batch_size", "global_batch_size", "save_interval", "log_interval", "gpus", "nnodes",
     "distributed_timeout_min", "exit_interval", "train_iters"],
)  # fmt: skip
def test_a_count_is_at_least_one(name: str) -> None:
    changes: dict[str, Any] = {name: 0} | ({"epochs": None} if name == "train_iters" else {})
    with pytest.raises(KitError, match=f"{name.upper()}=0: it must be at least 1"):
        settings(**changes)


@pytest.mark.parametrize(
    "name", ["keep_checkpoints", "eval_interval", "eval_iters", "lr_warmup_iters", "clip_grad", "max_restarts"]
)
def test_what_may_be_zero_is_not_negative(name: str) -> None:
    settings(**{name: 0})
    with pytest.raises(KitError, match=f"{name.upper()}=-1: it must not be negative"):
        settings(**{name: -1})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0.0}, "EPOCHS=0.0: it must be a number above 0"),
        ({"epochs": float("inf")}, "EPOCHS=inf: it must be a number above 0"),
        ({"epochs": float("nan")}, "EPOCHS=nan: it must be a number above 0"),
        ({"train_iters": 5}, "EPOCHS=1.0 and TRAIN_ITERS=5: set one of them"),
        ({"epochs": None}, "EPOCHS=None and TRAIN_ITERS=None: set one of them"),
        ({"min_lr": 1e-3}, "MIN_LR=0.001: it must lie between 0 and LR=1e-05"),
        ({"min_lr": -1e-9}, "MIN_LR=-1e-09: it must lie between 0 and LR=1e-05"),
        ({"lr_warmup_fraction": 1.0}, "LR_WARMUP_FRACTION=1.0: it must be at least 0 and below 1"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 5}, "LR_WARMUP_ITERS=5 is set too: set one of them"),
        ({"weight_decay": -0.1}, "WEIGHT_DECAY=-0.1: it must not be negative"),
        ({"profile": "12-10"}, "PROFILE=12-10: give a step or a range of them, counted from 1, as 10-12"),
        ({"profile": "0-2"}, "PROFILE=0-2: give a step"),
        ({"profile": "2", "profile_ranks": "0,1"}, "PROFILE_RANKS=0,1: give ranks from 0 to 0, as 0,1, or all"),
        ({"profile_ranks": ""}, "PROFILE_RANKS=: give ranks"),
        ({"lr_decay_style": "WSD"}, "LR_DECAY_STYLE=WSD needs the length of its decay: set LR_WSD_DECAY_ITERS"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 0}, "LR_WSD_DECAY_ITERS=0: it must be at least 1"),
        ({"lr_wsd_decay_iters": 9}, "LR_WSD_DECAY_ITERS=9 has no effect with LR_DECAY_STYLE=cosine"),
        ({"adam_beta1": 1.0}, "ADAM_BETA1=1.0: it must be at least 0 and below 1"),
        ({"adam_beta2": -0.1}, "ADAM_BETA2=-0.1: it must be at least 0 and below 1"),
        ({"node_rank": 1}, "NODE_RANK=1: it must be below NNODES=1"),
        ({"node_rank": -1, "nnodes": 2}, "NODE_RANK=-1: it must be below NNODES=2"),
        ({"node_rank": 1, "nnodes": 2}, "MASTER_ADDR=localhost on NODE_RANK=1: set it to the address of node 0"),
        ({"max_restarts": 1, "nnodes": 2}, "MAX_RESTARTS=1 with NNODES=2: restarted nodes need a rendezvous"),
        ({"rdzv_endpoint": "node0"}, "RDZV_ENDPOINT=node0: give host:port"),
        ({"max_restarts": 1, "is_initial_run": "true"}, "IS_INITIAL_RUN=true with MAX_RESTARTS=1"),
        ({"dataset_path": None}, "training needs what step 1 wrote: set DATASET_PATH"),
        ({"train_or_convert_ckpt": "convert"}, "LOAD_CHECKPOINT_PATH is not set: convert reads"),
        ({"tp": 0}, "TP=0: it must be at least 1"),
        ({"tp": 3}, "1 GPUs (GPUS x NNODES) cannot be divided by TP=3"),
        ({"vpp": 2}, "VPP=2 needs pipeline stages, but PP=1"),
        ({"gpus": 2, "tp": 2, "seq_length": 33}, "SEQ_LENGTH=33 cannot be divided by TP=2"),
        ({"gpus": 4, "global_batch_size": 12}, "GLOBAL_BATCH_SIZE=12 cannot be divided by MICRO_BATCH_SIZE=2 x 4"),
        ({"packing": True}, "PACKING=true is for TRAIN_MODE=finetune"),
        ({"recompute_num_layers": 2}, "RECOMPUTE_NUM_LAYERS=2 needs RECOMPUTE=full, not none"),
        ({"recompute_num_layers": 0, "recompute": "full"}, "RECOMPUTE_NUM_LAYERS=0: it must be at least 1"),
        ({"precision": "fp32", "fp8_format": "e4m3"}, "FP8_FORMAT=e4m3 and OPTIMIZER_STATE=fp32 need PRECISION=bf16"),
        (
            {"precision": "fp32", "optimizer_state": "cpu_bf16"},
            "OPTIMIZER_STATE=cpu_bf16 need PRECISION=bf16, not fp32",
        ),
        ({"train_mode": "finetune", "reset_attention": True}, "RESET_ATTENTION=true is for TRAIN_MODE=pretrain"),
    ],
)
def test_a_contradiction_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KitError, match=re.escape(message)):
        settings(**changes)


def test_what_is_not_given_is_the_modes_default() -> None:
    tuned, pretrained = settings(train_mode="finetune"), settings()
    names = ("lr", "min_lr", "lr_warmup_iters", "lr_warmup_fraction", "adam_beta2", "weight_decay")
    assert [getattr(tuned, name) for name in names] == [1e-5, 1e-6, 0, 0.03, 0.95, 0.1]
    assert [getattr(pretrained, name) for name in names] == [1e-5, 1e-6, 0, 0.01, 0.95, 0.1]
    given = settings(lr=3e-3)
    assert (given.min_lr, settings(lr=3e-3, min_lr=0.0).min_lr) == (3e-4, 0.0)
    for steps in (0, 7):  # a number of steps, none included, leaves no room for the fraction
        one = settings(lr_warmup_iters=steps)
        assert (one.lr_warmup_iters, one.lr_warmup_fraction) == (steps, 0.0)
    assert settings(lr_warmup_fraction=0.2).lr_warmup_iters == 0


def test_the_ranks_get_the_values_that_were_taken() -> None:
    tuned = settings(train_mode="finetune", packing=True)
    flags = to_flags(tuned)
    assert {"--lr=1e-05", "--min-lr=1e-06", "--lr-warmup-iters=0", "--lr-warmup-fraction=0.03", "--packing=true"} <= {
        *flags
    }
    parser = argparse.ArgumentParser()
    add_options(parser, TrainSettings)
    assert from_namespace(TrainSettings, parser.parse_args(flags)) == tuned
    automatic = parser.parse_args([each for each in flags if "packing" not in each] + ["--packing=auto"])
    assert from_namespace(TrainSettings, automatic).packing is None
