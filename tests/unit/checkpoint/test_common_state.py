"""The common state of torch_dist checkpoints, wherever the Megatron-Core version that wrote them puts it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.formats.common_state import common_state, run_metadata
from common.checkpoint.formats.torch_dist_writer import SHARDED_BACKEND, finish_checkpoint, write_data_file
from common.checkpoint.io.checksums import CHECKSUMS
from common.checkpoint.verification.pickle_scan import check_pickles
from common.errors import KitError

STATE = {"iteration": 3, "run": {"progress": {"iteration": 3}}}


def write(path: Path, **objects: Any) -> Checkpoint:
    """A checkpoint without common.pt, as Megatron-Core writes it from 0.19 on."""
    saved = {}
    for key, value in objects.items():
        stream = io.BytesIO()
        torch.save(value, stream)
        saved[f"{key}/shard_0_1"] = stream.getvalue()
    path.mkdir()
    finish_checkpoint(path, [write_data_file(path / "__0_0.distcp", [], saved, iter(()))], {})
    (path / CHECKSUMS).unlink()
    (path / "common.pt").unlink()
    (path / "metadata.json").write_text(json.dumps(SHARDED_BACKEND))
    return Checkpoint(path.parent, path, 3, "torch_dist")


def test_it_is_read_from_among_the_objects(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "iter_0000003", common_state=[STATE])
    check_pickles(checkpoint)
    assert common_state(checkpoint) == STATE
    assert run_metadata(checkpoint) == STATE["run"]


def test_a_checkpoint_without_one_has_none(tmp_path: Path) -> None:
    assert common_state(write(tmp_path / "iter_0000003", rng_state=[1])) == {}


def test_one_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError, match="holds no dict: it is not a Megatron checkpoint file"):
        common_state(write(tmp_path / "iter_0000003", common_state=[1]))
