"""The run itself, in each of its processes."""

import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.checkpoint.formats.layout import iteration_dir, read_tracker
from common.data.dataset.data_loader import Batch, MicroBatchLoader
from common.data.dataset.sample_dataset import SampleDataset
from common.log import logger
from common.training.launching.hang_detector import HangDetector
from common.training.launching.process_group import check_same_start, fail_together, process_group
from common.training.launching.rank_exit import STOPPED_AT, write_exit_reason
from common.training.launching.signals import StopRequests
from common.training.loop.memory import explained_lack_of_memory, memory_line
from common.training.loop.metrics import Interval, Meter, Stopwatch, flops_per_token, peak_tflops
from common.training.loop.step import StepResult, evaluate, mean_loss, total_of, train_step
from common.training.loop.tracking import Tracking
from common.training.planning.deadline import Deadline
from common.training.planning.plan import Plan, Progress
from common.training.settings import TrainSettings
from common.training.state.load import load_weights, resume
from common.training.state.save import Store
from common.training.state.training_state import TrainingState, build_training_state

RETRY_S = 10  # between two tries to save at the end of a run


def run_plan(plan: Plan, requests: StopRequests) -> None:
    """Trains, or converts the newest distributed checkpoint to torch format, as `plan` says."""
    settings = plan.settings
    if plan.train and plan.progress.iteration >= plan.train_iters:
        if int(os.environ["RANK"]) == 0:
            logger.info("done already: iteration %d of %d", plan.progress.iteration, plan.train_iters)
        return
    readers = Readers.of(plan)  # before CUDA begins: they are forked
    group = process_group(plan.platform, plan.sizes, settings.seed, settings.distributed_timeout_min)
    with group, explained_lack_of_memory(plan):
        if settings.nnodes > 1:
            check_same_start(plan.start)
        training_state = build_training_state(plan)
        if settings.train_or_convert_ckpt == "convert":
            Store(plan, training_state.heartbeat).write_converted(training_state, begin(plan, training_state))
            return
        assert readers
        watch_for_hangs(settings, training_state)
        store = Store(plan, training_state.heartbeat)  # takes the folder's lock
        Training(plan, training_state, begin(plan, training_state), store, readers, requests).run()


def begin(plan: Plan, training_state: TrainingState) -> Progress:
    """Loads what the plan starts from; returns how far it is."""
    checkpoint = plan.start.checkpoint
    if checkpoint is None:
        return Progress()
    if plan.start.kind == "resume":
        return resume(plan, training_state, checkpoint)
    load_weights(plan, training_state, checkpoint)
    return Progress()


def watch_for_hangs(settings: TrainSettings, training_state: TrainingState) -> None:
    """Starts the detector of HANG_TIMEOUT_MIN, unless it is 0."""
    minutes = settings.hang_timeout_min
    minutes = 0.8 * settings.distributed_timeout_min if minutes is None else minutes
    if minutes:
        HangDetector(training_state.heartbeat, 60 * minutes, dist.get_rank(), dist.get_world_size())


class Readers:
    """What reads this rank's training and validation batches, in processes of its own."""

    def __init__(self, plan: Plan, train: SampleDataset, valid: SampleDataset | None) -> None:
        self.num_chunks = plan.sizes.vpp
        self.train = open_batches(plan, train, plan.progress.consumed_samples)
        self.valid = open_batches(plan, valid, 0) if valid and plan.settings.eval_interval else None

    @classmethod
    def of(cls, plan: Plan) -> "Readers | None":
        """Those of `plan`; None where it does not train."""
        return cls(plan, plan.train, plan.valid) if plan.train else None


class Training:
    """The loop over steps, with its logging, evaluation and checkpoints."""

    def __init__(
        self,
        plan: Plan,
        training_state: TrainingState,
        progress: Progress,
        store: Store,
        readers: Readers,
        requests: StopRequests,
    ) -> None:
        assert progress == plan.progress, (progress, plan.progress)  # by which the batches are read already
        self.plan, self.training_state, self.progress = plan, training_state, progress
        self.store, self.readers, self.requests = store, readers, requests
        self.deadline = Deadline(plan.settings.exit_duration_min)
        self.watch = Stopwatch()
        self.tracking = Tracking(plan.settings, dist.get_rank())
        device = torch.cuda.get_device_name() if plan.platform.device == "cuda" else plan.platform.name
        self.meter = Meter(
            train_iters=plan.train_iters,
            global_batch_size=plan.settings.global_batch_size,
            seq_length=plan.settings.seq_length,
            world_size=plan.sizes.world_size,
            flops_per_token=flops_per_token(plan.qwen, plan.settings.seq_length),
            peak_tflops=peak_tflops(plan.platform, device),
        )
        self.report = total_of(plan, [])
        self.since_log = self.steps = 0
        self.bad_steps = self.skipped_steps = 0  # in a row; since the start
        self.memory_told = self.postponed = False  # postponed: a save that was due at a bad step

    def run(self) -> None:
        """Trains to the last step, or to the one at which it is to stop; the last step done is saved."""
        data = self.readers.train.read_from(self.progress.consumed_samples, self.readers.num_chunks)
        bar = progress_bar(self.plan, self.progress)
        self.watch.lap()
        stopped = False
        with self.tracking:
            while self.progress.iteration < self.plan.train_iters and not stopped:
                stopped = self.step(data)
                bar.update()
            bar.close()
            self.store.close()
        iteration = self.progress.iteration
        if stopped and iteration < self.plan.train_iters and not self._exits_here():
            write_exit_reason(STOPPED_AT, f"stopped and saved at iteration {iteration} of {self.plan.train_iters}")
        logger.info("stopped after iteration %d of %d", iteration, self.plan.train_iters)

    def step(self, data: list[Iterator[Batch]]) -> bool:
        """One step and what is due after it; whether the run stops here."""
        settings, before = self.plan.settings, self.progress
        learning_rate = self.training_state.optimizer.param_groups[0]["lr"]
        self.training_state.heartbeat.beat("training", before.iteration)
        result = train_step(self.plan, self.training_state, data, before.consumed_samples, self._is_to_stop())
        self.progress = Progress(before.iteration + 1, before.consumed_samples + settings.global_batch_size)
        self._count(result)
        iteration, last = self.progress.iteration, self.progress.iteration == self.plan.train_iters
        if iteration % settings.log_interval == 0 or last or iteration == 1:
            self.log(result.grad_norm, learning_rate)
        self.check_bad_steps()
        self.store.prepare(self.training_state)
        self.store.finish(wait=False)
        stop = result.stop
        if not stop and self.readers.valid and (iteration % settings.eval_interval == 0 or last):
            stop = self.evaluate(self.readers.valid)
        return self.save_if_due(stop, before)

    def _is_to_stop(self) -> bool:
        """Whether this rank is asked to stop, or the time is up."""
        return self.requests.received is not None or self.deadline.is_near(self.store.seconds)

    def _exits_here(self) -> bool:
        interval = self.plan.settings.exit_interval
        return bool(interval and self.progress.iteration % interval == 0)

    def _count(self, result: StepResult) -> None:
        """Adds the step to the interval's figures, or tells why it changed nothing."""
        self.since_log += 1
        if not result.skipped:
            self.report += result.report
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.skipped_steps += 1
        iteration = self.progress.iteration
        with tqdm.external_write_mode():
            logger.info("iteration %d changed nothing: %s (%d skipped)", iteration, result.skipped, self.skipped_steps)

    def check_bad_steps(self) -> None:
        """Raises KitError after MAX_BAD_STEPS bad steps in a row, or where the run's last two are such.

        Two look like the weights' fault and not a sample's, and no step is left that would tell.
        """
        iteration, most = self.progress.iteration, self.plan.settings.max_bad_steps
        if most and (self.bad_steps >= most or (self.bad_steps > 1 and iteration == self.plan.train_iters)):
            fail_together(
                f"{self.bad_steps} steps in a row changed nothing, the last at iteration {iteration}, and nothing of"
                f" this was saved: MAX_BAD_STEPS={most}; {newest_checkpoint(self.plan)}; lower LR, raise"
                " LR_WARMUP_ITERS, or look at the samples that are named above with `python -m common.preprocess show`"
            )

    def log(self, grad_norm: float, learning_rate: float) -> None:
        """Logs the interval that ends here."""
        loss = mean_loss(self.report)
        interval = Interval(loss, grad_norm, learning_rate, self.since_log, self.watch.lap())
        line = self.meter.line(self.progress.iteration, self.progress.consumed_samples, interval)
        with tqdm.external_write_mode():
            logger.info(line)
        figures = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        if self.skipped_steps:
            figures["skipped_steps"] = self.skipped_steps
        self.tracking.log(self.progress.iteration, **figures, **self.meter.rates(interval))
        self.steps += self.since_log
        if self.steps > 1 and not self.memory_told and self.plan.platform.device == "cuda":
            logger.info(memory_line())
            self.memory_told = True
        if self.progress.iteration == 1 and not self.skipped_steps:
            check_first_loss(self.plan, loss)
        self.report.zero_()
        self.since_log = 0

    def evaluate(self, valid: MicroBatchLoader) -> bool:
        """Logs the loss on the validation samples, from their beginning, EVAL_ITERS global batches at most.

        Returns whether it was broken off since a rank was asked to stop.
        """
        self.watch.pause()
        batch, iteration = self.plan.settings.global_batch_size, self.progress.iteration
        assert self.plan.valid
        iterations = min(self.plan.settings.eval_iters, max(1, self.plan.valid.samples_per_epoch // batch))
        data = valid.read_from(0, self.readers.num_chunks)
        loss = evaluate(self.plan, self.training_state, data, iterations, self._is_to_stop)
        with tqdm.external_write_mode():
            if loss is None:
                logger.info("validation at iteration %d broken off: asked to stop", iteration)
            else:
                logger.info(
                    "validation at iteration %d | loss %.6f | perplexity %.3f | %d samples",
                    iteration, loss, math.exp(min(20.0, loss)), iterations * batch,
                )  # fmt: skip
        if loss is not None:
            self.tracking.log(iteration, validation_loss=loss)
            self.store.note(iteration, validation_loss=loss)
        self.watch.go_on()
        return loss is None

    def save_if_due(self, stop: bool, before: Progress) -> bool:
        """Saves what is due after the step that began at `before`; whether the run ends after it."""
        settings, iteration = self.plan.settings, self.progress.iteration
        assert self.plan.train
        epoch = self.plan.train.samples_per_epoch
        epoch_ends = self.progress.consumed_samples // epoch > before.consumed_samples // epoch
        if settings.keep_epochs and epoch_ends:
            self.store.note(iteration, epoch_ends=True)
        last = iteration == self.plan.train_iters
        ends = stop or last or self._exits_here()
        due = ends or iteration % settings.save_interval == 0 or (settings.keep_epochs and epoch_ends)
        if self.bad_steps and last:
            check_weights(self.training_state)
        elif self.bad_steps:  # nothing is saved and nothing ends on a bad step: the next decides
            self.postponed = self.postponed or due
            return False
        if due or self.postponed or (self.store.overdue and iteration % settings.log_interval == 0):
            if stop:
                logger.info("asked to stop: saving iteration %d", iteration)
            self.watch.pause()
            self.postponed = False
            self.save(ends)
            self.watch.go_on()
        return ends

    def save(self, ends: bool) -> None:
        """Saves, at the end of the run as often as it takes: what was computed would be lost."""
        self.training_state.heartbeat.beat("saving", self.progress.iteration)
        while not self.store.save(self.training_state, self.progress) and ends:
            self.training_state.heartbeat.beat("waiting for the disk")
            time.sleep(RETRY_S)
        self.training_state.heartbeat.beat("training")


def check_weights(training_state: TrainingState) -> None:
    """Raises KitError unless all weights are finite; a collective call."""
    finite = [torch.isfinite(param).all() for chunk in training_state.model for param in chunk.parameters()]
    bad = (~torch.stack(finite).all()).to(torch.int32)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if bad.item():
        fail_together("weights are not finite: nothing of this is saved; go on from the newest checkpoint, lower LR")


def newest_checkpoint(plan: Plan) -> str:
    """The checkpoint that the same command goes on from, in words."""
    folder = plan.settings.save_checkpoint_path
    iteration = read_tracker(Path(folder))
    return (
        f"the newest checkpoint is {iteration_dir(Path(folder), iteration)}"
        if iteration
        else f"none is in {folder} yet"
    )


def check_first_loss(plan: Plan, loss: float) -> None:
    """Raises KitError when the first loss is over MAX_FIRST_LOSS; tells when weights know no more than random ones."""
    most = plan.settings.max_first_loss
    told = (
        "a wrong tokenizer, rms_norm_eps or rope_theta shows here; compare the converted weights with the model's by"
        " `python -m common.convert verify --logits true`"
    )
    if most is not None and loss > most:
        fail_together(f"the first loss is {loss:.4f}, over MAX_FIRST_LOSS={most:g}: {told}")
    guess = math.log(plan.qwen.vocab_size)
    if plan.start.kind == "weights" and loss > 0.9 * guess:
        logger.info("note: the first loss is %.2f, and guessing among all tokens gives %.2f: %s", loss, guess, told)


def open_batches(plan: Plan, samples: SampleDataset, start_sample: int) -> MicroBatchLoader:
    """This rank's endless micro-batches from `start_sample` on."""
    settings = plan.settings
    return MicroBatchLoader(
        samples,
        start_sample=start_sample,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        dp_rank=plan.sizes.dp_rank(int(os.environ["RANK"])),
        dp_size=plan.sizes.dp,
        num_workers=settings.num_workers,
    )


def progress_bar(plan: Plan, progress: Progress) -> tqdm:
    """A bar over the steps on rank 0 when a person watches."""
    watched = dist.get_rank() == 0 and sys.stderr.isatty()
    return tqdm(total=plan.train_iters, initial=progress.iteration, disable=not watched, unit="step", leave=False)
