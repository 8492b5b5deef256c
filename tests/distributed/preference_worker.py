"""Runs in each rank: the losses, metrics and gradients of preference pairs, for tests that compare them.

    python -m tests.distributed.preference_worker '{"settings": {...}, "weights": DIR, "joined": false, "runs": [...]}'

`settings` are those of step 3, whose LOAD_CHECKPOINT_PATH is the reference; the model has the weights in `weights`. A
run is {"settings": {...}, "out": DIR}, whose settings change the loss. A global batch of all samples is computed, and
`out` becomes a checkpoint with the gradients in place of the weights, beside means.json. With `joined`, rows of a
micro-batch are joined to one, as for Transformer Engine.
"""

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from common import log
from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.engine.installation import prepare
from common.platforms.cpu import CPU
from common.training.planning.plan import Plan, Progress, plan_run
from common.training.settings import TrainSettings
from tests.distributed.packing_worker import SegmentAttention


def compute(plan: Plan, training_state: Any, loaders: Any, out: Path) -> None:
    """Writes the means of a global batch, and its gradients as a checkpoint, to `out`."""
    from common.training.checkpointing.save_torch import make_rank_dirs, save_torch
    from common.training.loop.forward_step import forward_backward, mean_loss, sum_reporting_losses

    for chunk in training_state.model:
        chunk.zero_grad_buffer()
    reports = forward_backward(plan, training_state, loaders.train.read_from(0, training_state), forward_only=False)
    means = mean_loss(sum_reporting_losses(plan, reports))
    params = [param for chunk in training_state.model for param in chunk.parameters()]
    weights = [param.detach().clone() for param in params]
    for param in params:
        param.data.copy_(param.main_grad)
    folder = out / "iter_0000001"
    if dist.get_rank() == 0:
        shutil.copytree(plan.start.model_folder, out, ignore=lambda *_: ["release"])
        folder.mkdir()
        make_rank_dirs(plan, folder)
        (out / "latest_checkpointed_iteration.txt").write_text("1")
        (out / "means.json").write_text(json.dumps({"loss": means.loss, "tokens": means.num_tokens, **means.of_pairs}))
    dist.barrier()
    save_torch(plan, training_state, Progress(1), folder, weights_only=True)
    for param, weight in zip(params, weights, strict=True):
        param.data.copy_(weight)


def main() -> None:
    log.quiet_libraries()
    prepare(CPU)
    from common.training.checkpointing.load import load_weights
    from common.training.launching.process_group import process_group
    from common.training.loop.data_loading import DataLoaders
    from common.training.loop.reference_pass import with_references
    from common.training.state.training_state import build_training_state

    task = json.loads(sys.argv[1])
    plan = plan_run(TrainSettings(**task["settings"]), CPU)
    assert plan.train
    plan = replace(plan, settings=replace(plan.settings, global_batch_size=plan.train.samples_per_epoch))
    loaders = DataLoaders(plan)
    with process_group(CPU, plan.sizes, 1234, 5), ExitStack() as stack:
        if task["joined"]:
            stack.enter_context(patch("common.model.kernels.selection.core_attention", lambda *_: SegmentAttention))
            stack.enter_context(patch.object(Plan, "packed_sequences", True))
        training_state = build_training_state(plan)
        if task.get("stopped"):  # on one of the ranks, while nothing is stored yet
            assert with_references(plan, training_state, lambda: dist.get_rank() == dist.get_world_size() - 1) is None
            return
        training_state = with_references(plan, training_state, lambda: False)
        assert training_state
        weights = find_checkpoint(Path(task["weights"]))
        assert weights
        load_weights(plan, training_state, weights)
        for run in task["runs"]:
            changed = replace(plan, settings=replace(plan.settings, **run["settings"]))
            compute(changed, training_state, loaders, Path(run["out"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
