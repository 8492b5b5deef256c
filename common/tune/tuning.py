"""Tunes a run: its best layouts by the estimate are tried one after the other, and the fastest is written to a file."""

from pathlib import Path

from common.errors import KitError, writing
from common.log import logger
from common.model.shape.config import load_config
from common.platforms import check_machine
from common.platforms.base import Platform
from common.settings import check_environment
from common.training.planning.compatibility import with_packing
from common.training.planning.devices import check_devices
from common.training.planning.plan import find_start
from common.training.settings import TrainSettings
from common.tune.candidates import candidates, check_tunable, find_device, with_layout
from common.tune.options import Trials
from common.tune.results import settings_lines, table
from common.tune.trial import run_trial


def tune(settings: TrainSettings, platform: Platform, output: Path, trials: Trials) -> None:
    """Prints what each of the best layouts reached in `trials`, and writes the fastest to `output`.

    Layout, checkpoints, evaluation and the length of the run are not taken from `settings`, everything else is. Raises
    KitError if no layout fits, or none ran.
    """
    check_environment(settings)
    check_machine(platform)
    check_devices(settings, platform)
    check_tunable(settings)
    start = find_start(settings)
    model_folder, even = start.model_folder, start.in_torch_format
    qwen, gpu = load_config(model_folder), find_device(settings, platform)
    settings = with_packing(settings, platform)
    tried, limit_s = [], 60 * trials.trial_limit_min
    for number, one in enumerate(chosen := candidates(settings, qwen, gpu, trials.trials, even=even), 1):
        layout = one.settings
        sizes = f"TP={layout.tp} PP={layout.pp} VPP={layout.vpp} CP={layout.cp}"
        sizes += f" PIPELINE_LAYERS={layout.pipeline_layers}" if layout.pipeline_layers else ""
        own = f"MICRO_BATCH_SIZE={layout.micro_batch_size} RECOMPUTE={layout.recompute}"
        logger.info("trial %d of %d: %s %s", number, len(chosen), sizes, own)
        trial = run_trial(with_layout(settings, one), model_folder, trials.trial_iterations, limit_s)
        logger.info("%s", trial.reason or f"{trial.tokens_per_s:,.0f} tokens/s, {trial.memory_gib:.1f} GiB")
        tried.append((one, trial))
    best, trial = max(tried, key=lambda each: each[1].tokens_per_s)
    if not trial.tokens_per_s:
        raise KitError(f"no layout ran: {trial.reason}")
    print(*table(tried), sep="\n")
    with writing(output):
        output.write_text("".join(f"{line}\n" for line in settings_lines(best, trial, gpu, trials.trial_iterations)))
    print(f"ok: SETTINGS={output} is the fastest layout")
