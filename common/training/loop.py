"""The run itself, in each of its processes."""

import math
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.data.batches import batches
from common.data.samples import Samples
from common.log import logger
from common.training.distributed import StopSignal, check_same_start, fail_together, process_group
from common.training.lifetime import end_with_parent
from common.training.memory import explained_lack_of_memory, memory_line
from common.training.metrics import Interval, Meter, Stopwatch, flops_per_token, peak_tflops
from common.training.optimizer import Trainee, build_trainee
from common.training.plan import Plan
from common.training.state import Progress
from common.training.step import Batch, evaluate, mean_loss, train_step
from common.training.store import Store, load_weights, resume
from common.training.tracking import Tracking


def run_plan(plan: Plan) -> None:
    """Trains, or converts the newest distributed checkpoint to torch format, as `plan` says."""
    settings = plan.settings
    end_with_parent()
    group = process_group(plan.platform, plan.sizes, settings.seed, settings.distributed_timeout_min)
    with group, explained_lack_of_memory(plan):
        if settings.nnodes > 1:
            check_same_start(plan.start)
        trainee = build_trainee(plan)
        progress = begin(plan, trainee)
        if settings.train_or_convert_ckpt == "convert":
            Store(plan).write_converted(trainee, progress)
        else:
            Training(plan, trainee, progress).run()


def begin(plan: Plan, trainee: Trainee) -> Progress:
    """Loads what the plan starts from; returns how far it is."""
    checkpoint = plan.start.checkpoint
    if checkpoint is None:
        return Progress()
    if plan.start.kind == "resume":
        return resume(plan, trainee, checkpoint)
    load_weights(plan, trainee, checkpoint)
    return Progress()


class Training:
    """The loop over steps, with its logging, evaluation and checkpoints."""

    def __init__(self, plan: Plan, trainee: Trainee, progress: Progress) -> None:
        self.plan, self.trainee, self.progress = plan, trainee, progress
        self.store = Store(plan)
        self.stop = StopSignal(plan.settings.distributed_timeout_min)
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
        self.report = torch.zeros(2, dtype=torch.float64, device=torch.device(plan.platform.device))
        self.since_log = self.steps = 0
        self.memory_told = False

    def run(self) -> None:
        """Trains to the last step, or to the one at which it is to stop; the last step done is saved."""
        assert self.plan.train is not None
        if self.progress.iteration >= self.plan.train_iters:
            logger.info("done already: iteration %d of %d", self.progress.iteration, self.plan.train_iters)
            return
        data = open_batches(self.plan, self.plan.train, self.progress.consumed_samples)
        bar = progress_bar(self.plan, self.progress)
        self.watch.lap()
        with self.tracking:
            while self.progress.iteration < self.plan.train_iters:
                self.step(data)
                bar.update()
                if self.stop_here():
                    break
            bar.close()
            self.store.finish(wait=True)
        logger.info("stopped after iteration %d of %d", self.progress.iteration, self.plan.train_iters)

    def step(self, data: list[Iterator[Batch]]) -> None:
        """One step and what is due after it."""
        settings = self.plan.settings
        learning_rate = self.trainee.optimizer.param_groups[0]["lr"]
        report, grad_norm = train_step(self.plan, self.trainee, data)
        self.report += report
        self.since_log += 1
        self.progress.iteration += 1
        self.progress.consumed_samples += settings.global_batch_size
        iteration, last = self.progress.iteration, self.progress.iteration == self.plan.train_iters
        if iteration % settings.log_interval == 0 or last or iteration == 1:
            self.log(grad_norm, learning_rate)
        self.store.finish(wait=False)
        if self.plan.valid and settings.eval_interval and (iteration % settings.eval_interval == 0 or last):
            self.evaluate(self.plan.valid)

    def log(self, grad_norm: float, learning_rate: float) -> None:
        """Logs the interval that ends here; raises KitError when its loss is no number."""
        loss = mean_loss(self.report)
        interval = Interval(loss, grad_norm, learning_rate, self.since_log, self.watch.lap())
        line = self.meter.line(self.progress.iteration, self.progress.consumed_samples, interval)
        with tqdm.external_write_mode():
            logger.info(line)
        figures = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        self.tracking.log(self.progress.iteration, **figures, **self.meter.rates(interval))
        self.steps += self.since_log
        if self.steps > 1 and not self.memory_told and self.plan.platform.device == "cuda":
            logger.info(memory_line())
            self.memory_told = True
        if self.progress.iteration == 1:
            check_first_loss(self.plan, loss)
        if not math.isfinite(loss):
            fail_together(
                f"the loss is {loss} at iteration {self.progress.iteration}, and nothing of this was saved:"
                " lower LR, raise LR_WARMUP_ITERS, or look at the data with `python -m common.preprocess show`"
            )
        self.report.zero_()
        self.since_log = 0

    def evaluate(self, valid: Samples) -> None:
        """Logs the loss on the validation samples, from their beginning, EVAL_ITERS global batches at most."""
        self.watch.pause()
        batch = self.plan.settings.global_batch_size
        iterations = min(self.plan.settings.eval_iters, max(1, valid.samples_per_epoch // batch))
        loss = evaluate(self.plan, self.trainee, open_batches(self.plan, valid, 0), iterations)
        with tqdm.external_write_mode():
            logger.info(
                "validation at iteration %d | loss %.6f | perplexity %.3f | %d samples",
                self.progress.iteration, loss, math.exp(min(20.0, loss)), iterations * batch,
            )  # fmt: skip
        self.tracking.log(self.progress.iteration, validation_loss=loss)
        self.watch.go_on()

    def stop_here(self) -> bool:
        """Saves what is due; whether the run ends after this step."""
        settings, iteration = self.plan.settings, self.progress.iteration
        stop = self.stop.everywhere()
        if stop:
            logger.info("asked to stop: saving iteration %d", iteration)
        stop = stop or bool(settings.exit_interval and iteration % settings.exit_interval == 0)
        if stop or iteration % settings.save_interval == 0 or iteration == self.plan.train_iters:
            self.watch.pause()
            self.store.save(self.trainee, self.progress)
            self.watch.go_on()
        return stop


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


def open_batches(plan: Plan, samples: Samples, start_sample: int) -> list[Iterator[Batch]]:
    """This replica's endless micro-batches from `start_sample` on, one iterator a virtual chunk."""
    from megatron.core import parallel_state

    settings = plan.settings
    return [
        batches(
            samples,
            start_sample=start_sample,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=plan.sizes.dp,
            num_workers=settings.num_workers,
            pin_memory=plan.platform.device == "cuda",
        )
        for _ in range(plan.sizes.vpp)
    ]


def progress_bar(plan: Plan, progress: Progress) -> tqdm:
    """A bar over the steps on rank 0 when a person watches."""
    watched = dist.get_rank() == 0 and sys.stderr.isatty()
    return tqdm(total=plan.train_iters, initial=progress.iteration, disable=not watched, unit="step", leave=False)
