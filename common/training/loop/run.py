"""A rank's run: data loaders, process group, training state, checkpoint, and then the training loop."""

import os

import torch.distributed as dist

from common.log import logger
from common.training.checkpointing.checkpointer import Checkpointer
from common.training.checkpointing.load import load_checkpoint
from common.training.launching.hang_detector import HangDetector, Heartbeat
from common.training.launching.process_group import check_same_start, process_group
from common.training.launching.rank_exit import STOPPED_AT, write_exit_reason
from common.training.launching.signals import StopRequests
from common.training.loop.data_loading import DataLoaders
from common.training.loop.memory import explain_out_of_memory
from common.training.loop.profiling import record_memory
from common.training.loop.reference_pass import with_references
from common.training.loop.trainer import Trainer
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings
from common.training.state.training_state import build_training_state
from common.training.tracking.tracker import tracking


def run_plan(plan: Plan, requests: StopRequests) -> None:
    """Trains, or converts the newest distributed checkpoint to torch format, as planned."""
    settings = plan.settings
    if plan.train and plan.progress.iteration >= plan.train_iters:
        if int(os.environ["RANK"]) == 0:
            logger.info("training is already complete: iteration %d of %d", plan.progress.iteration, plan.train_iters)
        return
    loaders = DataLoaders(plan) if plan.train else None  # before CUDA is initialized, since their workers are forked
    group = process_group(plan.platform, plan.sizes, settings.seed, settings.distributed_timeout_min)
    with group, explain_out_of_memory(plan):
        if settings.nnodes > 1:
            check_same_start(plan.start)
        if settings.memory_snapshot:
            record_memory()
        training_state = build_training_state(plan)
        if settings.train_or_convert_ckpt == "convert":
            checkpointer = Checkpointer(plan, training_state.heartbeat)
            checkpointer.save_converted(training_state, load_checkpoint(plan, training_state))
            return
        assert loaders
        start_hang_detector(settings, training_state.heartbeat)
        checkpointer = Checkpointer(plan, training_state.heartbeat)  # locks the folder before the checkpoint is read
        with tracking(plan, dist.get_rank()) as tracker:
            with_reference = with_references(plan, training_state, lambda: requests.received is not None)
            if with_reference is None:
                write_exit_reason(STOPPED_AT, "stopped before the first step, while the reference was computed")
                return
            training_state = with_reference
            progress = load_checkpoint(plan, training_state)
            assert progress == plan.progress, (progress, plan.progress)  # the data loaders started from the latter
            Trainer(plan, training_state, checkpointer, loaders, requests, tracker).run()


def start_hang_detector(settings: TrainSettings, heartbeat: Heartbeat) -> None:
    """Starts the detector of HANG_TIMEOUT_MIN, unless it is 0."""
    minutes = settings.hang_timeout_min
    minutes = 0.8 * settings.distributed_timeout_min if minutes is None else minutes
    if minutes:
        HangDetector(heartbeat, 60 * minutes, dist.get_rank(), dist.get_world_size())
