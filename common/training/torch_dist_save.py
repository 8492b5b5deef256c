"""A synchronous save of torch_dist: Megatron-Core's shards and planner, torch's own writer.

Megatron-Core's strategy forks processes that write, and spawns a manager for their results
(dist_checkpointing/strategies/filesystem_async.py): each holds what the rank holds of a GPU, and rank 0's failure to
write `.metadata` or `common.pt` leaves the others waiting. torch's writer works in the rank itself, and what fails on
one rank is raised on all (_DistWrapper in torch/distributed/checkpoint/utils.py). The files are the same.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed import checkpoint

from common.data.indexed import sync


def save_torch_dist(state: dict[str, Any], folder: Path) -> None:
    """Writes a sharded state dict to the empty `folder`; a collective call.

    Raises torch's CheckpointException on every rank where a shard could not be written, OSError on rank 0 alone after
    that, for what it writes by itself.
    """
    sharded, common = save_preprocess(state)
    renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)  # one replica of each shard
    save = getattr(checkpoint, "save", None) or checkpoint.save_state_dict  # torch 2.1
    save(
        state_dict=mcore_to_pyt_state_dict(renamed, False),
        # One thread: what fails in another is lost (FileSystemWriter._write_data in its filesystem.py).
        storage_writer=checkpoint.FileSystemWriter(str(folder), thread_count=1),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    if dist.get_rank() == 0:
        with (folder / "common.pt").open("wb") as stream:
            torch.save(common, stream)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        for name in ("common.pt", "metadata.json", ".metadata"):
            sync(folder / name)
