"""Writes nvidia/recipes: `python -m tests.recipes`; tests/unit/estimate/test_recipes.py compares.

A recipe is a settings file of step 3 for one size, task and set of GPUs: the fastest layout that fits by
`common.estimate`, and the task's own settings. OPTIMIZER_STATE is fp32 where that fits, else bf16, else cpu_bf16.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common.estimate.gpus import find_gpu
from common.estimate.layouts import EstimateSettings, estimate_all
from common.estimate.settings_file import settings_lines
from common.model.shape.config import QwenConfig, load_config

FOLDER = Path(__file__).parents[1] / "nvidia" / "recipes"
# config.json of Qwen2.5's sizes: hidden_size, intermediate_size, layers, heads, key-value heads, vocabulary, tied.
SIZES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
NAMES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "tie_word_embeddings",
)  # fmt: skip
GPUS = {"80GB": "H100", "141GB": "H200"}
NODES = {1: (1, 1), 8: (8, 1), 16: (8, 2), 32: (8, 4)}  # GPUs of a node, nodes
SEQ_LENGTH = 4096
# Long rows of 7B on 8 GPUs: their length, and YaRN's factor where config.json must have it (docs/en/long-rows.md).
LONG: dict[str, tuple[int, float | None]] = {"32K": (32768, None), "128K": (131072, 4.0)}
TASKS = {
    "sft": (
        128,
        """\
# Fine-tuning. Qwen2.5's report (arXiv 2412.15115, 4.1): 2 epochs, weight decay 0.1, clipping at 1, a rate that falls to
# a tenth; Qwen's (arXiv 2309.16609, 3.1): Adam's betas, 128 samples a step, a warm-up. LR, MIN_LR: Pai-Megatron-Patch,
# examples/qwen2_5/README.md.
EPOCHS=2
LR=1e-5
MIN_LR=1e-6
LR_WARMUP_FRACTION=0.03
WEIGHT_DECAY=0.1
ADAM_BETA2=0.95
SPLIT=99,1,0
""",
    ),
    "cpt": (
        256,
        """\
# Continued pre-training, one pass over the data. LR and MIN_LR: Pai-Megatron-Patch, examples/qwen2_5/README.md; Adam's
# betas, a rate that falls to a tenth: Qwen's report (arXiv 2309.16609, 2.4); weight decay as in fine-tuning.
TRAIN_MODE=pretrain
EPOCHS=1
LR=1e-5
MIN_LR=1e-6
LR_WARMUP_FRACTION=0.01
WEIGHT_DECAY=0.1
ADAM_BETA2=0.95
SPLIT=99.5,0.5,0
""",
    ),
}


def write_config(folder: Path, size: str, yarn: float | None = None) -> QwenConfig:
    """The config of Qwen2.5 of that size, extended by YaRN's factor `yarn`, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(zip(NAMES, SIZES[size], strict=True)) | {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    }  # fmt: skip
    if yarn:
        config["rope_scaling"] = {"factor": yarn, "original_max_position_embeddings": 32768, "type": "yarn"}
    (folder / "config.json").write_text(json.dumps(config))
    return load_config(folder)


def recipe(qwen: QwenConfig, task: str, memory: str, num_gpus: int, seq_length: int = SEQ_LENGTH) -> str | None:
    """The text of a recipe; None if the model does not fit. A step has as many tokens at any `seq_length`."""
    batch, task_lines = TASKS[task]
    gpu, (gpus, nnodes) = find_gpu(GPUS[memory]), NODES[num_gpus]
    base = EstimateSettings(
        hf_model_path="-", gpu=gpu.name, gpus=gpus, nnodes=nnodes, seq_length=seq_length, packing=task == "sft",
        global_batch_size=batch * SEQ_LENGTH // seq_length,
    )  # fmt: skip
    for state in ("fp32", "bf16", "cpu_bf16"):
        best = estimate_all(replace(base, optimizer_state=state), qwen, gpu)[0][0]
        if best.fits == "yes":
            return "".join(f"{line}\n" for line in settings_lines(best, gpu)) + task_lines
    return None


def long_recipes(folder: Path) -> Iterator[tuple[str, str]]:
    """(file name, text) of each recipe for long rows; configs are written to `folder`."""
    for length, (seq_length, yarn) in LONG.items():
        qwen = write_config(folder / length, "7B", yarn)
        needs = f"# config.json must have YaRN's factor {yarn:g}: docs/en/long-rows.md.\n" if yarn else ""
        for task in TASKS:
            for memory in GPUS:
                text = recipe(qwen, task, memory, 8, seq_length)
                assert text
                yield f"7B-{task}-{length}-8x{memory}.env", needs + text


def recipes() -> Iterator[tuple[str, str]]:
    """(file name, text) of each recipe."""
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES:
            qwen = write_config(Path(scratch) / size, size)
            for task in TASKS:
                for memory in GPUS:
                    for num_gpus in NODES:
                        text = recipe(qwen, task, memory, num_gpus)
                        if text:
                            yield f"{size}-{task}-{num_gpus}x{memory}.env", text
        yield from long_recipes(Path(scratch))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.env"):
        old.unlink()
    for name, text in recipes():
        (FOLDER / name).write_text(text)
