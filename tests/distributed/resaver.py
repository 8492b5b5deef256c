"""`python -m common.train`, that saves what it resumes from and trains no step; or Megatron-Core itself loads or saves.

The checkpoint in SAVE_CHECKPOINT_PATH is loaded, its folder moved aside, and written anew at this command's parallel
sizes. RESAVER=theirs_load: by dist_checkpointing.load, as Megatron-Core's `fully_reshardable` is loaded; RESAVER=
theirs_save: by dist_checkpointing.save, as this kit wrote before.
"""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from megatron.core import dist_checkpointing

from common import errors, train
from common.engine.dist_checkpointing import OPTIMIZER_SHARDING, content_metadata, save_options
from common.training.checkpointing import load
from common.training.checkpointing.state_dict import describe_run, sharded_model_state_dict, sharded_object
from common.training.launching.process_group import random_state
from common.training.loop import trainer as loop


def save_theirs(trainer: Any, folder: Path) -> None:
    """Megatron-Core's own path: gathered, and written by its strategy."""
    training_state = trainer.training_state
    state = sharded_model_state_dict(training_state.model)
    how = {"metadata": content_metadata(OPTIMIZER_SHARDING)}
    state["optimizer"] = training_state.optimizer.sharded_state_dict(state, is_loading=False, **how)
    state["rng_state"] = sharded_object("rng_state", [random_state()])
    state |= {"opt_param_scheduler": training_state.scheduler.state_dict(), "iteration": trainer.progress.iteration}
    state |= {"run": describe_run(trainer.plan, trainer.progress), "checkpoint_version": 3.0} | save_options()
    dist_checkpointing.save(state, str(folder))
    for child in multiprocessing.active_children():  # its writers, which a rank's exit leaves behind
        child.terminate()


def resave(trainer: Any) -> None:
    """Replaces Trainer.run."""
    final = Path(trainer.plan.settings.save_checkpoint_path) / f"iter_{trainer.progress.iteration:07d}"
    dist.barrier()  # some may still read
    if dist.get_rank() == 0:
        final.rename(final.with_name(f"before_{time.monotonic_ns()}"))
        if os.environ["RESAVER"] == "theirs_save":
            final.mkdir()
    dist.barrier()
    if os.environ["RESAVER"] == "theirs_save":
        save_theirs(trainer, final)
    else:
        assert trainer.checkpointer.save(trainer.training_state, trainer.progress)
    trainer.checkpointer.close(lambda: False)


def main() -> None:
    """Loads and saves."""
    ours = OPTIMIZER_SHARDING if os.environ["RESAVER"] != "theirs_load" else "none, so that it takes the old way"
    with patch.object(loop.Trainer, "run", resave), patch.object(load, "OPTIMIZER_SHARDING", ours):
        errors.run(train.main)


if __name__ == "__main__":
    main()
