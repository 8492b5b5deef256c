"""Readers of a checkpoint or a model's small files, as in the commands; each takes the bytes of one case."""

import json
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from common.checkpoint.conversion.state_dict_adapter import hf_shapes, hf_state_dict
from common.checkpoint.formats.checkpoint_paths import find_checkpoint
from common.checkpoint.formats.hf_folder import HfReader, check_weights
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.verification.inspection import inspect_folder
from common.checkpoint.verification.pickle_scan import check_pickles
from common.data.tokenizer.eod import find_eod
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.model.shape.config import load_config
from tests.fuzz import configs, pickles
from tests.fuzz.bounds import Case
from tests.unit.checkpoint.small import dist_state, megatron_state, save_with_torch, write_hf


def read_checkpoint(folder: Path) -> None:
    """Reads as inspect, step 2 and step 3 do."""
    inspect_folder(folder / "megatron")
    checkpoint = find_checkpoint(folder / "megatron")
    assert checkpoint is not None
    check_pickles(checkpoint)
    qwen = load_config(folder / "hf")
    for tensor in hf_state_dict(open_megatron(checkpoint, qwen), qwen, None).values():
        for _ in tensor.blocks():
            pass


def writes(path: Path, folder: Path) -> Case:
    """A case: its bytes in the file at `path`, and the checkpoint read."""

    def take(data: bytes) -> None:
        path.write_bytes(data)
        read_checkpoint(folder)

    return take


def _arguments() -> Namespace:
    return Namespace(num_layers=4, params_dtype=torch.bfloat16, sizes=torch.Size([1, 2]), names={"a", "b"}, rate=0.5)


def rank_file(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """The file of one rank, in torch format."""
    qwen, weights = write_hf(folder / "hf")
    path = folder / "megatron/release/mp_rank_00/model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    (folder / "megatron/latest_checkpointed_iteration.txt").write_text("release")
    rng = [{"np_rng_state": numpy.random.get_state(), "torch_rng_state": torch.get_rng_state()}]
    model = OrderedDict(megatron_state(weights, qwen, range(4), first=True, last=True))
    torch.save({"args": _arguments(), "iteration": 3, "model": model, "rng_state": rng}, path)
    return pickles.archive_cases(seed, count, path.read_bytes()), writes(path, folder)


def _torch_dist(folder: Path) -> Path:
    qwen, weights = write_hf(folder / "hf")
    release = folder / "megatron/release"
    save_with_torch(dist_state(weights, qwen), release)
    state = {"args": _arguments(), "iteration": 3, "run": {"dtype": torch.float32, "sizes": [1, 2, (3, 4.5)]}}
    torch.save(state, release / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (release / "metadata.json").write_text(
        json.dumps({**backends, "common_backend": "torch", "common_backend_version": 1})
    )
    (folder / "megatron/latest_checkpointed_iteration.txt").write_text("release")
    return release


def metadata(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """`.metadata` of torch_dist."""
    path = _torch_dist(folder) / ".metadata"
    return pickles.cases(seed, count, path.read_bytes()), writes(path, folder)


def common(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """common.pt of torch_dist."""
    path = _torch_dist(folder) / "common.pt"
    return pickles.archive_cases(seed, count, path.read_bytes()), writes(path, folder)


def distcp(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """A file of weights of torch_dist."""
    (path, *_) = _torch_dist(folder).glob("*.distcp")
    return pickles.byte_cases(seed, count, path.read_bytes()), writes(path, folder)


CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 11,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 16, "torch_dtype": "float32",
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
FIELDS = ("head_dim", "dtype", "layer_types", "rope_parameters", "initializer_range", "attention_bias", "auto_map",
          "quantization_config", "partial_rotary_factor", "type", "rope_type", "beta_fast", "unknown")  # fmt: skip


def config(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """config.json, with valid weights beside it."""
    write_hf(folder)
    reader = HfReader(folder)

    def take(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        qwen = load_config(folder)
        check_weights(reader, hf_shapes(qwen), qwen)
        qwen.check_trainable()
        qwen.check_tensor_parallel(2)
        qwen.chunk_layers(2)

    return configs.cases(seed, count, CONFIG, FIELDS), take


def tokenizer_config(folder: Path, seed: int, count: int) -> tuple[Iterator[bytes], Case]:
    """tokenizer_config.json and generation_config.json, where they name the end of a document."""
    words = {"a": 0, "<end>": 1, "b": 2}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    made.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    source = {"eos_token": {"content": "<end>", "special": True}, "eos_token_id": [1, 2], "model_max_length": 10**30}

    def take(data: bytes) -> None:
        for name in ("tokenizer_config.json", "generation_config.json"):
            (folder / name).write_bytes(data)
        find_eod(tokenizer, "auto")

    return configs.cases(seed, count, source), take


SURFACES = {each.__name__: each for each in (rank_file, metadata, common, distcp, config, tokenizer_config)}
