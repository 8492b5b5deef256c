"""Megatron-Core 0.19, the newest: for Python 3.12 and later."""

from common.engine.base import Engine


class MegatronCore019(Engine):
    """As Engine."""

    release = "0.19.2"
    environment = "torch 2.6 or later on Python 3.12 or later (a CPU, NGC 24.12 and later, MACA 3.8)"
    oldest_torch = (2, 6)
    quiet_loggers = ("megatron.core.models.gpt.gpt_model",)  # warns that GPTModel only gets fixes
