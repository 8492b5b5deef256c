"""The peak of a rank: the chunks of logits, the loss, and a whole step's tensors on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.estimate import activations, memory
from common.estimate.memory import rank_memories, work_of
from common.estimate.weights import Chunk, chunk_parameters
from common.model.kernels import peer_copies
from common.model.layers import loss
from common.model.layers.loss import TorchKernels
from common.model.shape import chunks
from common.model.shape.config import QwenConfig, load_config
from common.platforms.base import Platform
from common.platforms.cpu import CPU
from common.platforms.metax import METAX
from common.platforms.nvidia import NVIDIA
from common.training.settings import TrainSettings
from common.training.state import optimizer, optimizer_offload
from tests.unit.estimate.ranks import batch, count, counts_attention, write_config

WHOLE = Chunk(4, first=True, last=True)
STEPS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"precision": "fp32", "micro_batch_size": 4}),
    (1, {"recompute": "full"}),
    (1, {"recompute": "selective"}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "vpp": 2, "recompute": "full"}),
]


@counts_attention
def test_a_steps_tensors_are_those_that_the_formulas_count(tmp_path: Path) -> None:
    folder = write_config(tmp_path, hidden_size=128, intermediate_size=512)
    tasks, formulas = [], []
    for world, changes in STEPS:
        tp, pp = changes.get("tp", 1), changes.get("pp", 1)
        settings = {"seq_length": 128, **batch(pp, changes.get("micro_batch_size", 2)), **changes}
        for stage in range(pp):
            tasks.append(
                {"folder": str(folder), "world": world, "rank": stage * tp, "settings": settings, "peak": True}
            )
            train_settings = TrainSettings(
                save_checkpoint_path="-", dataset_path="-", train_iters=1, gpus=world, **settings
            )
            formulas.append(rank_memories(train_settings, CPU, load_config(folder))[stage].activations)
    found = [one["peak"] for one in count(tasks)]
    for task, real, formula in zip(tasks, found, formulas, strict=True):
        # What pipeline stages send and receive is counted in hidden states [s, b, h], whatever its kind.
        bound = 0.03 if task["settings"].get("pp", 1) == 1 else 0.07
        assert abs(formula / real - 1) < bound, (task["settings"], task["rank"], real, formula)


class Recorder(TorchKernels):
    """Records how many tokens' logits there are at once."""

    rows: list[int]

    @classmethod
    def statistics(cls, logits: torch.Tensor, local: torch.Tensor) -> Any:
        cls.rows.append(len(logits))
        return TorchKernels.statistics(logits, local)


def test_logits_come_in_the_chunks_that_the_loss_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert activations.chunk_size is loss.chunk_size
    qwen = load_config(write_config(tmp_path))
    monkeypatch.setattr(chunks, "MAX_LOGITS_BYTES", 600 * 301 * 4)
    Recorder.rows = []
    hidden, weight = torch.zeros(1280, 64), torch.zeros(301, 64)
    vocabulary = loss.Vocabulary(None, 0, 301)
    loss.LinearCrossEntropy.apply(
        hidden, weight, torch.zeros(1280, dtype=torch.long), torch.ones(1280), vocabulary, Recorder(), False
    )
    assert Recorder.rows == [512, 512, 256]
    settings = TrainSettings(
        save_checkpoint_path="-", dataset_path="-", train_iters=1, seq_length=640, micro_batch_size=2,
        global_batch_size=2, precision="fp32",
    )  # fmt: skip
    # A chunk's own logits and the last one's, float32, and its exponents' copy.
    assert activations.logits_bytes(work_of(settings, CPU, qwen)) == (512 + 512 + 512) * 301 * 4
    assert activations.logits_bytes(work_of(settings, NVIDIA, qwen)) == (512 + 512) * 301 * 4


def test_the_optimizers_step_needs_copies_of_what_it_holds_small(tmp_path: Path) -> None:
    qwen = load_config(write_config(tmp_path, vocab_size=8_000_000))
    two = load_config(write_config(tmp_path, vocab_size=3_000_000, tie_word_embeddings=False))
    vocabulary = 8_000_000 * 64

    def step(platform: Platform, qwen: QwenConfig = qwen, **changes: Any) -> int:
        settings = TrainSettings(save_checkpoint_path="-", dataset_path="-", train_iters=1, **changes)
        return rank_memories(settings, platform, qwen)[0].step

    assert step(NVIDIA) == step(CPU) == 0
    assert step(METAX) == 4 * chunk_parameters(qwen, 1, WHOLE)
    assert vocabulary > memory.OPTIMIZER_PART and step(NVIDIA, optimizer_state="bf16") == 10 * vocabulary
    assert step(NVIDIA, two, optimizer_state="bf16") == 10 * memory.OPTIMIZER_PART
    assert step(NVIDIA, two, optimizer_state="cpu") == 3 * 12 * memory.OFFLOADED_PART
    assert step(NVIDIA, two, optimizer_state="cpu", precision="fp32") == 3 * 8 * memory.OFFLOADED_PART
    assert step(METAX, two, optimizer_state="cpu") == (3 * 12 + 4) * memory.OFFLOADED_PART
    assert step(METAX, two, optimizer_state="cpu_bf16") == 44 * memory.OFFLOADED_PART
    assert step(NVIDIA, optimizer_state="bf16", gpus=4) == 10 * -(-chunk_parameters(qwen, 1, WHOLE) // 4)


def test_the_optimizers_part_and_the_slots_are_those_of_training() -> None:
    assert memory.OPTIMIZER_PART == optimizer.PART
    assert len(peer_copies.KINDS) * peer_copies.SLOTS == memory.EXCHANGE_SLOTS
    assert memory.OFFLOADED_PART == optimizer_offload.OFFLOADED_PART
