"""`python -m common.logits` compares the outputs of a Megatron checkpoint and its Hugging Face folder, layer by layer.

Run by `python -m common.convert verify --logits`. Both models run in float32 on the CPU in one process, Megatron-Core's
at TP=PP=1 for any layout of the checkpoint, so they take 8 bytes per parameter. Another order of float32 sums changes
the outputs by about 1e-6 of the largest value; one lost bias changes the logits by more than 1e-2.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import errors, log
from common.checkpoint.conversion.state_dict_adapter import MegatronTensors, hf_state_dict, rank_state_dict
from common.checkpoint.formats.checkpoint_paths import Checkpoint, require_checkpoint
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.formats.parallel_layout import ParallelLayout
from common.engine import installation
from common.errors import KitError
from common.model.shape.config import QwenConfig, load_config
from common.parallel import ParallelSizes
from common.platforms.cpu import CPU
from common.ports import free_port
from common.settings import add_options, from_namespace, option

BOUND = 1e-4  # relative to Hugging Face's largest value
TEXT = """The quick brown fox jumps over the lazy dog. 12 + 30 = 42.
今天天气很好，我们去公园散步吧。
def add(a, b):
    return a + b
"""


@dataclass(frozen=True)
class Settings:
    """Compares the outputs of a Hugging Face folder and a Megatron checkpoint for a text."""

    hf_model_path: str = option(help="Hugging Face folder, with its tokenizer", hub="model")
    load_checkpoint_path: str = option(help="Megatron checkpoint: its folder, or the folder of an iteration")
    text: str = option(TEXT, "input text")


class CheckpointTensors:
    """The weights of a Megatron checkpoint under Hugging Face's names, as input for MegatronTensors."""

    def __init__(self, checkpoint: Checkpoint, qwen: QwenConfig) -> None:
        self.folder = checkpoint.path
        self._tensors = hf_state_dict(open_megatron(checkpoint, qwen), qwen, None)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor, materialized."""
        return self._tensors[name].materialize()


def hugging_face_outputs(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """The outputs of each part of Hugging Face's model: embedding, layers, norm [s, h], logits [s, v]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()  # no dtype=: transformers 4.55 lacks it
    parts = {"embedding": model.model.embed_tokens}
    parts |= {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    parts |= {"final norm": model.model.norm}
    with torch.no_grad():
        outputs, result = record_outputs(parts, lambda: model(tokens))
    return {**{name: output[0] for name, output in outputs.items()}, "logits": result.logits[0]}


def megatron_outputs(checkpoint: Checkpoint, qwen: QwenConfig, tokens: Tensor) -> dict[str, Tensor]:
    """The same outputs of Megatron-Core's model with the checkpoint's weights."""
    from common.model.build import ModelOptions, build_model
    from common.training.launching.process_group import process_group

    sizes = ParallelSizes(1)
    with process_group(CPU, sizes, 1234, 5):
        (model,) = build_model(qwen, sizes, ModelOptions("fp32", "local", "none"), CPU, tokens.shape[1])
        source = MegatronTensors(CheckpointTensors(checkpoint, qwen), qwen, torch.float32)
        state = rank_state_dict(source, ParallelLayout(1, 1, 1, "local"), 0, 0)["model"]
        model.load_state_dict({name: tensor.materialize() for name, tensor in state.items()}, strict=False)
        missing = {name for name, _ in model.named_parameters()} - set(state)
        assert not missing, missing
        gpt: Any = model.eval()
        parts = {"embedding": gpt.embedding}
        parts |= {f"layer {i}": layer for i, layer in enumerate(gpt.decoder.layers)}
        parts |= {"final norm": gpt.decoder.final_layernorm}
        positions = torch.arange(tokens.shape[1])[None]
        with torch.no_grad():
            outputs, logits = record_outputs(parts, lambda: gpt(tokens, positions, None))
    found = {name: output[:, 0] for name, output in outputs.items()}  # [s, 1, h]
    return {**found, "logits": logits[0, :, : qwen.vocab_size]}


def record_outputs(parts: dict[str, Any], run: Callable[[], Any]) -> tuple[dict[str, Tensor], Any]:
    """The outputs of the modules `parts` during `run`, and the result of `run`."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    for name, module in parts.items():
        module.register_forward_hook(hook(name))
    return seen, run()


def compare(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[list[str], str | None]:
    """The lines to print, and the first part (in model order) whose outputs differ by more than BOUND."""
    deviations = {name: float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs}
    deviations = {name: value if value == value else float("inf") for name, value in deviations.items()}  # NaN
    first = next((name for name, value in deviations.items() if value > BOUND), None)
    one, other = (outputs["logits"].double().log_softmax(-1) for outputs in (mine, theirs))
    divergence = (other.exp() * (other - one)).sum(-1).mean()
    same = (one.argmax(-1) == other.argmax(-1)).double().mean()
    worst = max(deviations, key=lambda name: deviations[name])
    largest = float((mine["logits"] - theirs["logits"]).abs().max())
    return [
        f"{len(one)} tokens, {len(deviations)} places; the largest difference is {deviations[worst]:.1e} of the largest"
        f" value, at {worst}",
        f"logits: largest difference {largest:.1e}, KL {divergence:.1e}, the same most likely token at {same:.1%}",
    ], first


def main() -> None:
    """Runs both models; raises KitError where they differ."""
    parser = argparse.ArgumentParser(prog="python -m common.logits", description=Settings.__doc__)
    add_options(parser, Settings)
    settings = from_namespace(Settings, parser.parse_args())
    log.setup()
    log.quiet_libraries()
    folder, checkpoint = Path(settings.hf_model_path), require_checkpoint(Path(settings.load_checkpoint_path))
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(settings.text, return_tensors="pt")["input_ids"]
    if not tokens.numel():
        raise KitError("--text is empty: give at least one word")
    theirs = hugging_face_outputs(folder, tokens)
    set_single_process_environment()
    installation.prepare(CPU)
    lines, first = compare(megatron_outputs(checkpoint, load_config(folder), tokens), theirs)
    print(*lines, sep="\n")
    if first:
        raise KitError(
            f"{first} is the first that differs by more than {BOUND} of its largest value: {checkpoint.path} is not"
            f" what {folder} holds; convert it again, or give the folder it came from"
        )
    print("the models agree")


def set_single_process_environment() -> None:
    """Sets torch.distributed's environment variables for a single process."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))


if __name__ == "__main__":
    errors.run(main)
