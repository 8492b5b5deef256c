"""`python -m common.logits`: a Megatron checkpoint and its Hugging Face folder read the same text, layer by layer.

The second half of `python -m common.convert verify --logits`. Both models run in float32 on the CPU in one process, the
Megatron-Core one at TP=PP=1 whatever the checkpoint's layout, so they take 8 bytes a parameter. Float32 sums in another
order differ by about 1e-6 of the largest value; one lost bias moves the logits by more than 1e-2.
"""

import argparse
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import errors, log
from common.checkpoint.conversion.streams import Source, hf_tensors, rank_chunks
from common.checkpoint.formats.layout import Checkpoint, find_checkpoint
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.formats.pipeline import Layout
from common.engine import installation
from common.errors import KitError
from common.model.shape.config import QwenConfig, load_config
from common.parallel import ParallelSizes
from common.platforms.cpu import CPU
from common.settings import add_options, from_namespace, option

BOUND = 1e-4  # of the largest value of Hugging Face's
TEXT = """The quick brown fox jumps over the lazy dog. 12 + 30 = 42.
今天天气很好，我们去公园散步吧。
def add(a, b):
    return a + b
"""


@dataclass(frozen=True)
class Settings:
    """Compares what a Hugging Face folder and a Megatron checkpoint make of a text."""

    hf_model_path: str = option(help="Hugging Face folder, with its tokenizer")
    load_checkpoint_path: str = option(help="Megatron checkpoint: its folder, or one iteration's")
    text: str = option(TEXT, "what they read")


class CheckpointTensors:
    """A Megatron checkpoint's weights under Hugging Face's names, as a Source takes them."""

    def __init__(self, checkpoint: Checkpoint, qwen: QwenConfig) -> None:
        self.folder = checkpoint.path
        self._tensors = hf_tensors(open_megatron(checkpoint, qwen), qwen, None)

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """The tensor, made now."""
        return self._tensors[name].produce()


def hugging_face_outputs(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """What each part of Hugging Face's model gives: embedding, layers, norm [s, h], logits [s, v]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()  # no dtype=: transformers 4.55 lacks it
    parts = {"embedding": model.model.embed_tokens}
    parts |= {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    parts |= {"final norm": model.model.norm}
    with torch.no_grad():
        outputs, result = watch(parts, lambda: model(tokens))
    return {**{name: output[0] for name, output in outputs.items()}, "logits": result.logits[0]}


def megatron_outputs(checkpoint: Checkpoint, qwen: QwenConfig, tokens: Tensor) -> dict[str, Tensor]:
    """The same of Megatron-Core's model with the checkpoint's weights."""
    from common.model.build import ModelOptions, build_model
    from common.training.launching.process_group import process_group

    sizes = ParallelSizes(1)
    with process_group(CPU, sizes, 1234, 5):
        (model,) = build_model(qwen, sizes, ModelOptions("fp32", "local", "none"), CPU, tokens.shape[1])
        source = Source(CheckpointTensors(checkpoint, qwen), qwen, torch.float32)
        state = rank_chunks(source, Layout(1, 1, 1, "local"), 0, 0)["model"]
        model.load_state_dict({name: tensor.produce() for name, tensor in state.items()}, strict=False)
        missing = {name for name, _ in model.named_parameters()} - set(state)
        assert not missing, missing
        gpt: Any = model.eval()
        parts = {"embedding": gpt.embedding}
        parts |= {f"layer {i}": layer for i, layer in enumerate(gpt.decoder.layers)}
        parts |= {"final norm": gpt.decoder.final_layernorm}
        positions = torch.arange(tokens.shape[1])[None]
        with torch.no_grad():
            outputs, logits = watch(parts, lambda: gpt(tokens, positions, None))
    found = {name: output[:, 0] for name, output in outputs.items()}  # [s, 1, h]
    return {**found, "logits": logits[0, :, : qwen.vocab_size]}


def watch(parts: dict[str, Any], run: Callable[[], Any]) -> tuple[dict[str, Tensor], Any]:
    """What each of the modules `parts` gives while `run` runs, and what that returns."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given, output: seen.__setitem__(name, output[0] if isinstance(output, tuple) else output)

    for name, module in parts.items():
        module.register_forward_hook(keep(name))
    return seen, run()


def compare(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[list[str], str | None]:
    """What to tell, and the first part whose outputs differ by more than BOUND; both in the model's order."""
    shares = {name: float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs}
    shares = {name: share if share == share else float("inf") for name, share in shares.items()}  # NaN is far off
    first = next((name for name, share in shares.items() if share > BOUND), None)
    one, other = (outputs["logits"].double().log_softmax(-1) for outputs in (mine, theirs))
    divergence = (other.exp() * (other - one)).sum(-1).mean()
    same = (one.argmax(-1) == other.argmax(-1)).double().mean()
    worst = max(shares, key=lambda name: shares[name])
    largest = float((mine["logits"] - theirs["logits"]).abs().max())
    return [
        f"{len(one)} tokens, {len(shares)} places; the largest difference is {shares[worst]:.1e} of the largest value,"
        f" at {worst}",
        f"logits: largest difference {largest:.1e}, KL {divergence:.1e}, the same most likely token at {same:.1%}",
    ], first


def main() -> None:
    """Runs both models; raises KitError where they differ."""
    parser = argparse.ArgumentParser(prog="python -m common.logits", description=Settings.__doc__)
    add_options(parser, Settings)
    settings = from_namespace(Settings, parser.parse_args())
    log.setup()
    log.quiet_libraries()
    folder, checkpoint = Path(settings.hf_model_path), find_checkpoint(Path(settings.load_checkpoint_path))
    if checkpoint is None:
        raise KitError(f"LOAD_CHECKPOINT_PATH={settings.load_checkpoint_path} holds no Megatron checkpoint: give one")
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(settings.text, return_tensors="pt")["input_ids"]
    if not tokens.numel():
        raise KitError("--text is empty: give at least one word")
    theirs = hugging_face_outputs(folder, tokens)
    alone_in_a_group()
    installation.prepare(CPU)
    lines, first = compare(megatron_outputs(checkpoint, load_config(folder), tokens), theirs)
    print(*lines, sep="\n")
    if first:
        raise KitError(
            f"{first} is the first that differs by more than {BOUND} of its largest value: {checkpoint.path} is not"
            f" what {folder} holds; convert it again, or give the folder it came from"
        )
    print("the models agree")


def alone_in_a_group() -> None:
    """Sets what torch.distributed asks the environment for, as the only process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))


if __name__ == "__main__":
    errors.run(main)
