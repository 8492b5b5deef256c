"""What the kind of layers cannot do is refused before anything starts."""

import re
from typing import Any

import pytest

from common.errors import KitError
from common.platforms import PLATFORMS
from common.training.config import TrainSettings
from common.training.fit import check_layers


def settings(**changes: Any) -> TrainSettings:
    given: dict[str, Any] = {"save_checkpoint_path": "s", "dataset_path": "d", "train_iters": 1, "seq_length": 32}
    return TrainSettings(**{**given, **changes})


@pytest.mark.parametrize(
    ("platform", "changes", "said"),
    [
        ("cpu", {"gpus": 2, "cp": 2}, "CP=2 needs TRANSFORMER_IMPL=transformer_engine"),
        ("nvidia", {"gpus": 2, "cp": 2, "seq_length": 30}, "SEQ_LENGTH=30 cannot be divided by 2 x CP x TP = 4"),
        ("nvidia", {"gpus": 2, "cp": 2, "reset_attention": True}, "CP=2 and RESET_ATTENTION=true do not go together"),
        ("cpu", {"fp8_format": "hybrid"}, "FP8_FORMAT=hybrid needs TRANSFORMER_IMPL="),
        ("cpu", {"tp_comm_overlap": True, "gpus": 2, "tp": 2}, "TP_COMM_OVERLAP=true needs TRANSFORMER_IMPL="),
        ("nvidia", {"tp_comm_overlap": True}, "TP_COMM_OVERLAP=true with TP=1 and SEQUENCE_PARALLEL=True: it needs TP"),
        (
            "nvidia",
            {"core_attention": "flash_attn_4", "gpus": 2, "cp": 2},
            "CORE_ATTENTION=flash_attn_4 cannot do CP=2",
        ),
        (
            "nvidia",
            {"core_attention": "sdpa", "packing": True, "train_mode": "finetune"},
            "CORE_ATTENTION=sdpa cannot do PACKING=true",
        ),
        ("metax", {"fused_products": "true"}, "FUSED_PRODUCTS=true needs an NVIDIA GPU, and this is metax"),
        (
            "nvidia",
            {"fused_products": "true", "fp8_format": "hybrid"},
            "FUSED_PRODUCTS=true does not go together with FP8_FORMAT=hybrid",
        ),
        (
            "nvidia",
            {"fused_products": "true", "precision": "fp32"},
            "FUSED_PRODUCTS=true does not go together with PRECISION=fp32",
        ),
        ("metax", {"optimizer_state": "bf16"}, "OPTIMIZER_STATE=bf16 needs Transformer Engine, and metax has none"),
        ("metax", {"transformer_impl": "transformer_engine"}, "metax has no Transformer Engine: set it to local"),
    ],
    ids=str,
)
def test_refusals(platform: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KitError, match=re.escape(said)):
        check_layers(settings(**changes), PLATFORMS[platform])


@pytest.mark.parametrize(
    ("platform", "changes"),
    [
        ("nvidia", {"gpus": 2, "cp": 2}),
        ("nvidia", {"fp8_format": "hybrid", "optimizer_state": "bf16"}),
        ("nvidia", {"fused_products": "true", "packing": True, "train_mode": "finetune"}),
        ("nvidia", {"tp_comm_overlap": True, "gpus": 2, "tp": 2}),
        ("cpu", {"reset_attention": True}),
    ],
    ids=str,
)
def test_what_goes_together_is_let_pass(platform: str, changes: dict[str, Any]) -> None:
    check_layers(settings(**changes), PLATFORMS[platform])
