"""What a run is told before it starts: that other layers in each pipeline stage would be faster."""

from dataclasses import replace

from common.estimate.balance import REASON, faster_split
from common.estimate.check import NEAR, as_installed
from common.estimate.gpus import gpu_of_device
from common.estimate.memory import rank_memories, work_of
from common.log import logger
from common.training.planning.devices import smallest_device
from common.training.planning.plan import Plan
from common.training.settings import TrainSettings

LEAST_GAIN = 0.03  # of a step, by the estimate


def suggest_layers(plan: Plan) -> None:
    """Logs PIPELINE_LAYERS that are LEAST_GAIN faster than the run's even stages, if its checkpoint loads at them.

    Not if they need more memory than the devices have, nor on a CPU or with frozen weights, whose speed is not
    estimated. Queries the devices as check_memory does.
    """
    settings = plan.settings
    if settings.pp == 1 or settings.pipeline_layers or plan.in_torch_format:
        return
    if plan.platform.device == "cuda" and not plan.frozen and (device := smallest_device(settings.gpus)):
        compare_layers(plan, *device)


def compare_layers(plan: Plan, name: str, total_bytes: int) -> None:
    """As suggest_layers, for a device of that name and memory."""
    settings = as_installed(plan.settings, plan.platform)
    work = work_of(settings, plan.platform, plan.qwen)
    split = faster_split(settings, work, gpu_of_device(name, total_bytes, plan.platform))
    if split is None or split.gain < LEAST_GAIN:
        return
    now, then = _peak(plan, settings), _peak(plan, replace(settings, pipeline_layers=split.layers))
    if then <= max(now, NEAR * total_bytes):
        logger.info(
            "PIPELINE_LAYERS is empty, so all stages have the same number of layers: PIPELINE_LAYERS=%s would be about"
            " %.0f%% faster by the estimate, %s", split.layers, 100 * split.gain, REASON,
        )  # fmt: skip


def _peak(plan: Plan, settings: TrainSettings) -> int:
    return max(rank.peak for rank in rank_memories(settings, plan.platform, plan.qwen))
