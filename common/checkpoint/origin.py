"""What a checkpoint says of where it comes from: the run that wrote it, and the layout of its files."""

import re
from typing import Any

from common.checkpoint.archive import MappedFile
from common.checkpoint.layout import MODEL_FILE, Checkpoint
from common.checkpoint.torch_format import load_rank_file
from common.errors import KitError
from common.parallel import ParallelSizes


def description_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What this kit's training notes in each checkpoint under `run`; empty in a checkpoint of others."""
    if checkpoint.format == "torch_dist":
        path = checkpoint.path / "common.pt"
        state = MappedFile(path).read() if path.is_file() else {}
    else:
        state = _first_rank_file(checkpoint)
    return dict(state.get("run") or {})


def _first_rank_file(checkpoint: Checkpoint) -> dict[str, Any]:
    return load_rank_file(min(checkpoint.path.glob(f"mp_rank_*/{MODEL_FILE}")))


def check_ranks(checkpoint: Checkpoint, sizes: ParallelSizes) -> None:
    """Raises KitError unless a checkpoint in torch format has the TP, PP and VPP of the run that is to load it."""
    if checkpoint.format == "torch_dist":
        return
    ranks = [[int(word) for word in folder.name.split("_")[2:]] for folder in checkpoint.path.glob("mp_rank_*")]
    found = {
        "TP": 1 + max(rank[0] for rank in ranks),
        "PP": 1 + max(rank[1] if len(rank) > 1 else 0 for rank in ranks),
        "VPP": sum(1 for key in _first_rank_file(checkpoint) if re.fullmatch(r"model\d*", key)),
    }
    wanted = {"TP": sizes.tp, "PP": sizes.pp, "VPP": sizes.vpp}
    if found != wanted:
        was, now = (" ".join(f"{name}={value}" for name, value in each.items()) for each in (found, wanted))
        raise KitError(
            f"{checkpoint.path} is in torch format at {was}, this run has {now}: use the same sizes, or convert the"
            " model again by step 2 with these (CKPT_FORMAT=torch_dist loads at any)"
        )
