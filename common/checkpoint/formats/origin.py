"""What a checkpoint says of where it comes from: the run that wrote it, and the layout of its files."""

import re
from pathlib import Path
from typing import Any

from common.checkpoint.formats.archive import MappedFile
from common.checkpoint.formats.layout import MODEL_FILE, Checkpoint, rank_dir_name
from common.checkpoint.formats.mapping import num_layers
from common.checkpoint.formats.torch_dist import DistReader
from common.checkpoint.formats.torch_format import load_rank_file
from common.errors import KitError
from common.model.shape.config import QwenConfig
from common.parallel import ParallelSizes

COMMON_OBJECT = "common_state/shard_0_1"


def description_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What this kit's training notes in each checkpoint under `run`; empty in a checkpoint of others."""
    run = common_state(checkpoint).get("run") or {}
    if not isinstance(run, dict):
        raise KitError(f"{checkpoint.path}: what it says of the run that wrote it is no dict: copy it again")
    return run


def common_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors, or with those of its first rank."""
    if checkpoint.format == "torch":
        return _first_rank_file(checkpoint)
    path = checkpoint.path / "common.pt"
    state = MappedFile(path).read() if path.is_file() else _common_object(checkpoint.path)
    if not isinstance(state, dict):
        raise KitError(f"{path} holds no dict: it is no file of a Megatron checkpoint")
    return state


def _common_object(path: Path) -> Any:
    """The common state where Megatron-Core writes it from 0.19 on: as an object beside the tensors; {} without one."""
    if not (path / ".metadata").is_file():
        return {}
    reader = DistReader(path)
    if COMMON_OBJECT not in reader.objects:
        return {}
    saved = reader.object(COMMON_OBJECT)  # of each shard, and it has one
    return saved[0] if isinstance(saved, list) and len(saved) == 1 else saved


def _first_rank_file(checkpoint: Checkpoint) -> dict[str, Any]:
    return load_rank_file(min(checkpoint.path.glob(f"mp_rank_*/{MODEL_FILE}")))


def check_ranks(checkpoint: Checkpoint, sizes: ParallelSizes, qwen: QwenConfig) -> None:
    """Raises KitError unless a checkpoint in torch format has the TP, PP, VPP and stages of the run that loads it."""
    if checkpoint.format == "torch_dist":
        return
    ranks = [[int(word) for word in folder.name.split("_")[2:]] for folder in checkpoint.path.glob("mp_rank_*")]
    found: dict[str, Any] = {
        "TP": 1 + max(rank[0] for rank in ranks),
        "PP": 1 + max(rank[1] if len(rank) > 1 else 0 for rank in ranks),
        "VPP": sum(1 for key in _first_rank_file(checkpoint) if re.fullmatch(r"model\d*", key)),
    }
    wanted: dict[str, Any] = {"TP": sizes.tp, "PP": sizes.pp, "VPP": sizes.vpp}
    if found == wanted and sizes.pp > 1:
        layers = qwen.chunk_layers(sizes.pp, sizes.vpp, sizes.pipeline_layers)
        found["PIPELINE_LAYERS"] = ",".join(map(str, _chunk_layers(checkpoint, sizes)))
        wanted["PIPELINE_LAYERS"] = ",".join(map(str, layers))
    if found != wanted:
        was, now = (" ".join(f"{name}={value}" for name, value in each.items()) for each in (found, wanted))
        raise KitError(
            f"{checkpoint.path} is in torch format at {was}, this run has {now}: use the same sizes, or convert the"
            " model again by step 2 with these (CKPT_FORMAT=torch_dist loads at any)"
        )


def _chunk_layers(checkpoint: Checkpoint, sizes: ParallelSizes) -> list[int]:
    """The layers of each chunk in the model's order, as tensor rank 0's files hold them."""
    folders = [checkpoint.path / rank_dir_name(0, pp_rank, sizes.pp) for pp_rank in range(sizes.pp)]
    files = [load_rank_file(folder / MODEL_FILE) for folder in folders]
    keys = ["model"] if sizes.vpp == 1 else [f"model{number}" for number in range(sizes.vpp)]
    return [num_layers(file[key]) for key in keys for file in files]
