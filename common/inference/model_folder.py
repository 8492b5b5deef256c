"""An exported model: a Hugging Face folder with config.json, safetensors and tokenizer, checked before it is loaded."""

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint.conversion.state_dict_adapter import hf_shapes
from common.checkpoint.formats.checkpoint_paths import RELEASE, TRACKER, format_of
from common.checkpoint.formats.hf_folder import INDEX, SINGLE, HfReader, check_unquantized, check_weights
from common.data.tokenizer.eod import END_OF_TEXT
from common.data.tokenizer.text_tokenizer import TextTokenizer, load_tokenizer
from common.errors import KitError
from common.json_file import read_json, shown
from common.model.shape.config import QwenConfig, load_config

END_OF_TURN = "<|im_end|>"
GIVE = "give the folder that step 2 wrote (megatron-to-huggingface), or another Hugging Face model, of Qwen2 or Qwen3"


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose weights are complete and belong to its config.json.

    generation: its generation_config.json, empty without one.
    """

    path: Path
    qwen: QwenConfig
    tokenizer: TextTokenizer
    generation: dict[str, Any]

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: <|im_end|>, <|endoftext|>, and the eos tokens that the folder's files name."""
        named = (self.tokenizer.token_id(token) for token in (END_OF_TURN, END_OF_TEXT, *_eos_texts(self.path)))
        ids = {number for number in named if number is not None}
        config = read_json(self.path / "config.json", "copy it again from the model")
        for source, values in (("generation_config.json", self.generation), ("config.json", config)):
            ids |= _eos_ids(self.path / source, values, self.qwen.vocab_size)
        return sorted(ids)

    def room(self, max_new_tokens: int) -> int:
        """The longest prompt in tokens that leaves room for `max_new_tokens`; raises KitError when there is none."""
        longest = self.qwen.longest_sequence
        if max_new_tokens >= longest:
            raise KitError(
                f"MAX_NEW_TOKENS={max_new_tokens}: the model has {longest} positions (max_position_embeddings) for the"
                f" prompt and the answer: set it below {longest}"
            )
        return longest - max_new_tokens


def open_model_folder(path: Path) -> ModelFolder:
    """The model in `path`, none of whose weights are read; raises KitError where it is no exported model."""
    _check_exported(path)
    qwen = load_config(path)
    check_unquantized(path)
    check_weights(HfReader(path), hf_shapes(qwen), qwen)
    generation = path / "generation_config.json"
    values = read_json(generation, "copy it again from the model, or remove it") if generation.is_file() else {}
    return ModelFolder(path, qwen, load_tokenizer(path), values)


def _check_exported(path: Path) -> None:
    name = f"HF_MODEL_PATH={path}"
    if not path.is_dir():
        raise KitError(f"{name} is not a folder: {GIVE}")
    if not any(path.iterdir()):
        raise KitError(f"{name} is an empty folder: {GIVE}")
    has_weights = any((path / weights).is_file() for weights in (SINGLE, INDEX))
    if not has_weights and (path / "adapter_config.json").is_file():
        raise KitError(f"{name} holds a LoRA adapter alone: export the whole model in step 2, with EXPORT=merged")
    if not has_weights and _is_megatron(path):
        script = f"{os.environ.get('KIT_PLATFORM') or 'cpu'}/2_convert_between_hf_megatron.sh"
        raise KitError(
            f"{name} is a Megatron checkpoint, not an exported model: run step 2,"
            f" CONVERT_TYPE=megatron-to-huggingface LOAD_CHECKPOINT_PATH={shlex.quote(str(path))}"
            f" SAVE_CHECKPOINT_PATH=NEW_FOLDER bash {script}, and set HF_MODEL_PATH=NEW_FOLDER"
        )
    missing = [each for each in ("config.json", "tokenizer.json") if not (path / each).is_file()]
    missing += [] if has_weights else ["safetensors"]
    if missing:
        raise KitError(f"{name} is no exported model, since it has no {', no '.join(missing)}: {GIVE}")


def _is_megatron(path: Path) -> bool:
    """Whether `path` is a checkpoint's folder, that of one iteration, or that of one rank."""
    folders = (path, *path.glob("iter_*"), path / RELEASE)
    return (path / TRACKER).exists() or any(map(format_of, folders)) or path.name.startswith("mp_rank_")


def _eos_ids(path: Path, values: dict[str, Any], vocab_size: int) -> set[int]:
    given = values.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(each) is int and 0 <= each < vocab_size for each in ids):
        raise KitError(f"{path}: eos_token_id={shown(given)} is not a token of the model: correct or remove it")
    return set(ids)


def _eos_texts(path: Path) -> Iterator[str]:
    config = path / "tokenizer_config.json"
    named = read_json(config, "copy it again from the model").get("eos_token") if config.is_file() else None
    text = named.get("content") if isinstance(named, dict) else named
    if isinstance(text, str):
        yield text
