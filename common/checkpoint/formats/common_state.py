"""The common state of a checkpoint (all but its sharded tensors): the run that wrote it, its parallel sizes."""

import re
from pathlib import Path
from typing import Any

from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, Checkpoint, rank_dir_name
from common.checkpoint.formats.mapping import num_layers
from common.checkpoint.formats.torch_archive import ArchiveFile
from common.checkpoint.formats.torch_dist_reader import TorchDistReader
from common.checkpoint.formats.torch_format import load_rank_file
from common.errors import KitError
from common.model.shape.config import QwenConfig
from common.parallel import ParallelSizes

COMMON_OBJECT = "common_state/shard_0_1"


def run_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The metadata that this kit's training saves under `run`; empty in a checkpoint of other software."""
    run = common_state(checkpoint).get("run") or {}
    if not isinstance(run, dict):
        raise KitError(f"{checkpoint.path}: its metadata of the run is no dict: copy it again")
    return run


def common_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of common.pt; in torch format, of the first rank's file, tensors included."""
    if checkpoint.format == "torch":
        return _first_rank_file(checkpoint)
    path = checkpoint.path / "common.pt"
    state = ArchiveFile(path).read() if path.is_file() else _common_object(checkpoint.path)
    if not isinstance(state, dict):
        raise KitError(f"{path} holds no dict: it is not a Megatron checkpoint file")
    return state


def _common_object(path: Path) -> Any:
    """The common state where Megatron-Core writes it from 0.19 on: as an object beside the tensors; {} without one."""
    if not (path / ".metadata").is_file():
        return {}
    reader = TorchDistReader(path)
    if COMMON_OBJECT not in reader.objects:
        return {}
    saved = reader.object(COMMON_OBJECT)  # of each shard, and it has one
    return saved[0] if isinstance(saved, list) and len(saved) == 1 else saved


def _first_rank_file(checkpoint: Checkpoint) -> dict[str, Any]:
    return load_rank_file(min(checkpoint.path.glob(f"mp_rank_*/{MODEL_FILE}")))


def check_parallel_sizes(checkpoint: Checkpoint, sizes: ParallelSizes, qwen: QwenConfig) -> None:
    """Raises KitError unless a torch-format checkpoint has the TP, PP, VPP and stage sizes of the run that loads it."""
    if checkpoint.format == "torch_dist":
        return
    ranks = [[int(word) for word in folder.name.split("_")[2:]] for folder in checkpoint.path.glob("mp_rank_*")]
    found: dict[str, Any] = {
        "TP": 1 + max(rank[0] for rank in ranks),
        "PP": 1 + max(rank[1] if len(rank) > 1 else 0 for rank in ranks),
        "VPP": sum(1 for key in _first_rank_file(checkpoint) if re.fullmatch(r"model\d*", key)),
    }
    expected: dict[str, Any] = {"TP": sizes.tp, "PP": sizes.pp, "VPP": sizes.vpp}
    if found == expected and sizes.pp > 1:
        layers = qwen.chunk_layers(sizes.pp, sizes.vpp, sizes.pipeline_layers)
        found["PIPELINE_LAYERS"] = ",".join(map(str, _chunk_layers(checkpoint, sizes)))
        expected["PIPELINE_LAYERS"] = ",".join(map(str, layers))
    if found != expected:
        was, now = (" ".join(f"{name}={value}" for name, value in each.items()) for each in (found, expected))
        raise KitError(
            f"{checkpoint.path} is in torch format at {was}, this run has {now}: use the same sizes, or convert the"
            " model again with these in step 2 (CKPT_FORMAT=torch_dist loads at any)"
        )


def _chunk_layers(checkpoint: Checkpoint, sizes: ParallelSizes) -> list[int]:
    """The number of layers of each model chunk, in model order, in tensor-parallel rank 0's files."""
    folders = [checkpoint.path / rank_dir_name(0, pp_rank, sizes.pp) for pp_rank in range(sizes.pp)]
    files = [load_rank_file(folder / MODEL_FILE) for folder in folders]
    keys = ["model"] if sizes.vpp == 1 else [f"model{number}" for number in range(sizes.vpp)]
    return [num_layers(file[key]) for key in keys for file in files]
