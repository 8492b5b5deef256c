"""The training loop: steps, and the logging, evaluation and checkpoints that are due after each."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch.distributed as dist

from common.data.dataset.data_loader import Batch
from common.log import logger
from common.training.checkpointing.checkpointer import Checkpointer
from common.training.launching.rank_exit import STOPPED_AT, write_exit_reason
from common.training.launching.signals import StopRequests
from common.training.loop.bad_steps import BadSteps, check_weights
from common.training.loop.data_loading import DataLoaders
from common.training.loop.evaluation import evaluate, log_evaluation, validation_metrics
from common.training.loop.first_loss import check_first_loss
from common.training.loop.profiling import Profiler
from common.training.loop.progress_bar import progress_bar
from common.training.loop.train_step import train_step
from common.training.loop.training_log import TrainingLog
from common.training.planning.deadline import Deadline
from common.training.planning.plan import Plan, Progress
from common.training.state.training_state import TrainingState
from common.training.tracking.tracker import Tracker

SAVE_RETRY_S = 10  # between attempts to save at the end of a run


class Trainer:
    """Trains from `plan.progress` on, and saves the last step that it runs."""

    def __init__(
        self,
        plan: Plan,
        training_state: TrainingState,
        checkpointer: Checkpointer,
        loaders: DataLoaders,
        requests: StopRequests,
        tracker: Tracker,
    ) -> None:
        self.plan, self.training_state, self.progress = plan, training_state, plan.progress
        self.checkpointer, self.loaders, self.requests = checkpointer, loaders, requests
        self.deadline = Deadline(plan.settings.exit_duration_min)
        self.training_log = TrainingLog(plan, tracker, training_state.times)
        self.tracker, self.bad_steps = tracker, BadSteps(plan)
        self.loss_is_checked = False
        self.save_is_postponed = False  # a save was due at a bad step
        self.profiler = Profiler(plan, dist.get_rank())

    def run(self) -> None:
        """Trains to the last step, or until a stop is requested; the last completed step is saved."""
        data_iterators = self.loaders.train_iterators(self.progress.consumed_samples, self.training_state)
        bar = progress_bar(self.plan, self.progress)
        self.training_log.stopwatch.lap()
        stopped = False
        while self.progress.iteration < self.plan.train_iters and not stopped:
            stopped = self.step(data_iterators)
            bar.update()
        bar.close()
        self.profiler.close()
        iteration = self.progress.iteration
        interrupted = stopped and iteration < self.plan.train_iters and not self._exits_here()
        self.checkpointer.close(lambda: interrupted or self._should_stop())
        if interrupted:
            write_exit_reason(STOPPED_AT, f"stopped and saved at iteration {iteration} of {self.plan.train_iters}")
        logger.info("stopped after iteration %d of %d", iteration, self.plan.train_iters)

    def step(self, data_iterators: list[Iterator[Batch]]) -> bool:
        """One step and what is due after it; returns whether the run stops here."""
        settings, before = self.plan.settings, self.progress
        learning_rate = self.training_state.optimizer.param_groups[0]["lr"]
        self.training_state.heartbeat.beat("training", before.iteration)
        self.profiler.before(before.iteration + 1)
        result = train_step(
            self.plan, self.training_state, data_iterators, before.consumed_samples, self._should_stop()
        )
        self.progress = Progress(
            before.iteration + 1, before.consumed_samples + settings.global_batch_size, before.loss
        )
        iteration = self.tracker.iteration = self.progress.iteration
        self.profile()
        self.training_log.add(result)
        self.bad_steps.count(iteration, result)
        if self.training_log.is_due(iteration):
            loss = self.training_log.log(self.progress, result.grad_norm, learning_rate, self.bad_steps)
            if not self.loss_is_checked and not self.bad_steps.total:
                check_first_loss(self.plan, loss)
            self.loss_is_checked = True
            if math.isfinite(loss):
                self.progress = replace(self.progress, loss=loss)
        self.bad_steps.check(iteration)
        self.checkpointer.allocate_staging(self.training_state)
        self.checkpointer.finalize(wait=False)
        self.checkpointer.poll_exports()
        stop = result.stop
        if not stop and self.loaders.valid and (iteration % settings.eval_interval == 0 or self._is_last()):
            stop = self.evaluate()
        return self.save_if_due(before, stop)

    def profile(self) -> None:
        """Ends the step for the profiler; the time in which it writes is not the step's."""
        writes = self.profiler.is_due(self.progress.iteration)
        if writes:
            self.training_log.stopwatch.pause("profiling")
            self.training_state.heartbeat.beat("writing the profile")
        self.profiler.after(self.progress.iteration)
        if writes:
            self.training_log.stopwatch.resume()

    def evaluate(self) -> bool:
        """Evaluates and logs the losses on the validation samples; returns whether a stop request interrupted it."""
        self.training_log.stopwatch.pause("evaluation")
        iteration = self.progress.iteration
        data_iterators = self.loaders.valid_iterators(self.training_state)
        results = evaluate(self.plan, self.training_state, data_iterators, self._should_stop)
        losses = {name: means.loss for name, means in (results or {}).items()}
        log_evaluation(self.plan, iteration, results, self.tracker.best.update(losses))
        if results is not None:
            self.tracker.log(iteration, **validation_metrics(results))
            self.checkpointer.record(iteration, validation_loss=losses[""])
        self.training_log.stopwatch.resume()
        return results is None

    def save_if_due(self, before: Progress, stop: bool) -> bool:
        """Saves if a checkpoint is due after the step that began at `before`; returns whether the run stops here."""
        settings, iteration = self.plan.settings, self.progress.iteration
        epoch_ends = self._is_epoch_end(before)
        if settings.keep_epochs and epoch_ends:
            self.checkpointer.record(iteration, epoch_ends=True)
        ends = stop or self._is_last() or self._exits_here()
        due = ends or iteration % settings.save_interval == 0 or (settings.keep_epochs and epoch_ends)
        if self.bad_steps.in_a_row and self._is_last():
            check_weights(self.training_state.model)
        elif self.bad_steps.in_a_row:  # a run neither saves nor stops at a bad step; the next one decides
            self.save_is_postponed = self.save_is_postponed or due
            return False
        retry = self.checkpointer.overdue and iteration % settings.log_interval == 0
        if due or self.save_is_postponed or retry:
            if stop:
                logger.info("stop requested: saving iteration %d", iteration)
            self.training_log.stopwatch.pause("saving")
            self.save_is_postponed = False
            self.save(ends)
            self.training_log.stopwatch.resume()
        return ends

    def save(self, ends: bool) -> None:
        """Saves; at the end of the run, retries until it succeeds, since the run's work would be lost."""
        self.training_state.heartbeat.beat("saving", self.progress.iteration)
        while not self.checkpointer.save(self.training_state, self.progress) and ends:
            self.training_state.heartbeat.beat("waiting for the disk")
            time.sleep(SAVE_RETRY_S)
        self.training_state.heartbeat.beat("training")

    def _should_stop(self) -> bool:
        """Whether this rank received a stop request, or the deadline is near."""
        return self.requests.received is not None or self.deadline.is_near(self.checkpointer.last_save_s)

    def _is_last(self) -> bool:
        return self.progress.iteration == self.plan.train_iters

    def _exits_here(self) -> bool:
        interval = self.plan.settings.exit_interval
        return bool(interval and self.progress.iteration % interval == 0)

    def _is_epoch_end(self, before: Progress) -> bool:
        assert self.plan.train
        epoch = self.plan.train.samples_per_epoch
        return self.progress.consumed_samples // epoch > before.consumed_samples // epoch
