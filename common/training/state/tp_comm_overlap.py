"""TP_COMM_OVERLAP: Transformer Engine's communication buffers for tensor parallelism."""

from common.training.settings import TrainSettings


def initialize_tp_communicators(settings: TrainSettings, hidden_size: int) -> None:
    """Allocates the buffers with which Transformer Engine overlaps communication and GEMMs.

    As _initialize_tp_communicators in Megatron-LM's training/initialize.py, with one shape for the whole run:
    [s * b / cp, h].
    """
    from transformer_engine.pytorch.module.base import initialize_ub

    rows = settings.seq_length * settings.micro_batch_size // settings.cp
    fp8 = settings.fp8_format != "none"
    initialize_ub(shape=[rows, hidden_size], tp_size=settings.tp, use_fp8=fp8, bootstrap_backend="nccl")
