"""The learning rates that step 3 logs are those of the published formulas, also after a stop and in a branch."""

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.formats.checkpoint_paths import require_checkpoint
from common.checkpoint.formats.common_state import common_state
from common.training.tracking.records import read_metrics
from tests.distributed.launch import ROOT
from tests.distributed.user import TINY, step3_forked

LR, MIN_LR, WARMUP = TINY["LR"], TINY["MIN_LR"], 3
# The share of LR - MIN_LR that is left after a share r of the decay. MiniCPM (arXiv 2404.06395, 4.2) takes an
# exponential, which Megatron-LM (docs of --lr-wsd-decay-style) moves so that it ends at 0; 1 - sqrt: arXiv 2405.18392.
SHAPES: dict[str, Callable[[float], float]] = {
    "exponential": lambda r: 2 * math.exp(-r * math.log(2)) - 1,
    "minus_sqrt": lambda r: 1 - r**0.5,
}


def wsd(steps: int, decay: int, shape: str) -> list[float]:
    """The rate of each step of a run of `steps`, the last `decay` of which decay."""
    rises = [LR * step / WARMUP for step in range(WARMUP)]
    stays = [LR] * (steps - WARMUP - decay)
    return rises + stays + [MIN_LR + (LR - MIN_LR) * SHAPES[shape](step / decay) for step in range(1, decay + 1)]


def train(work: Path, name: str, code: int = 0, **more: Any) -> str:
    paths = {"DATASET_PATH": work / "pretrain", "LOAD_CHECKPOINT_PATH": work / "start"}
    same = {"SAVE_CHECKPOINT_PATH": work / name, "GPUS": 1, "EVAL_INTERVAL": 0, "LR_WARMUP_ITERS": WARMUP}
    return step3_forked({**paths, **same, **more}, code)


def branch(work: Path) -> None:
    """Runs the commands of docs/reliability.md, of `stable` at iteration 6 to `branch`."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"```bash\n(mkdir .*?)```", text, re.DOTALL)
    for old, new in {"/ckpt/run": work / "stable", "/ckpt/": f"{work}/", "0000900": "0000006", " 900 ": " 6 "}.items():
        assert old in commands
        commands = commands.replace(old, str(new))
    subprocess.run(["bash", "-ec", commands], check=True)


def rates(folder: Path) -> list[float]:
    return [line["learning_rate"] for line in read_metrics(folder)]


def test_wsd_resumes_and_another_decay_branches_from_its_stable_part(work: Path) -> None:
    plan = {"LR_DECAY_STYLE": "WSD", "LR_WSD_DECAY_ITERS": 4, "TRAIN_ITERS": 12}
    train(work, "stable", **plan, EXIT_INTERVAL=6)
    branch(work)
    log = train(work, "stable", **plan, EXIT_INTERVAL=9)  # within the decay
    log += train(work, "stable", **plan)
    assert rates(work / "stable") == pytest.approx(wsd(12, 4, "exponential"), rel=1e-9)
    assert "by the checkpoint's schedule" not in log

    refused = train(work, "branch", 2, **plan | {"TRAIN_ITERS": 9})
    assert "LR_WSD_DECAY_ITERS=4: 3 steps are left after the checkpoint" in refused and "use at most 3," in refused
    shorter = plan | {"TRAIN_ITERS": 9, "LR_WSD_DECAY_ITERS": 3, "LR_WSD_DECAY_STYLE": "minus_sqrt"}
    log = train(work, "branch", **shorter)
    assert rates(work / "branch") == pytest.approx(wsd(9, 3, "minus_sqrt")[6:], rel=1e-9)
    assert f"constant at {LR:g}, and minus_sqrt to {MIN_LR:g} in the last 3 of 9 steps" in log
    assert f"next step's learning rate was {LR:.3g} by the checkpoint's schedule, and is 0.00048" in log

    convert = {"TRAIN_OR_CONVERT_CKPT": "convert", "LOAD_CHECKPOINT_PATH": work / "branch", "GPUS": 1}
    step3_forked({**convert, "SAVE_CHECKPOINT_PATH": work / "torch"})  # its own settings name no schedule
    schedule = common_state(require_checkpoint(work / "torch"))["opt_param_scheduler"]
    batch = TINY["GLOBAL_BATCH_SIZE"]
    assert {"lr_decay_style": "WSD", "wsd_decay_steps": 3 * batch, "num_steps": 9 * batch}.items() <= schedule.items()
    assert schedule["lr_wsd_decay_style"] == "minus_sqrt"


def test_inverse_square_root_falls_from_the_warm_up_on(work: Path) -> None:
    train(work, "root", LR_DECAY_STYLE="inverse-square-root", MIN_LR=6e-4, TRAIN_ITERS=12)
    falls = [max(6e-4, LR * math.sqrt(WARMUP / step)) for step in range(WARMUP, 12)]
    assert falls[-1] == 6e-4 < falls[-5]  # both sides of the limit
    assert rates(work / "root") == pytest.approx([LR * step / WARMUP for step in range(WARMUP)] + falls, rel=1e-9)
