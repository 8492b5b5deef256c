"""Fixtures of the tests of many nodes: four nodes, a tiny model and its data."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conversion import to_megatron
from tests.distributed.launch import run, words
from tests.nodes.network import Node, Run, network, why_not
from tests.tiny import TEXTS, tiny_qwen

HEAVY = pytest.mark.skipif(not os.environ.get("HEAVY"), reason="takes minutes: HEAVY=1 bash tests/run.sh nodes")


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Four nodes that reach each other."""
    if reason := why_not():
        pytest.skip(reason)
    with network(4, tmp_path_factory.mktemp("logs")) as made:
        yield made


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (`qwen`), its weights (`start`) and data (`text`)."""
    folder = tmp_path_factory.mktemp("nodes")
    tiny_qwen(folder / "qwen", std=0.05, spread=0.05)
    rows = (json.dumps({"text": f"{i} " + TEXTS[i % 4] * (1 + i % 3)}, ensure_ascii=False) + "\n" for i in range(200))
    (folder / "text.jsonl").write_text("".join(rows), encoding="utf-8")
    flags = {"input": folder / "text.jsonl", "output_prefix": folder / "text", "tokenizer_path": folder / "qwen"}
    run("-m", "common.preprocess", "pretrain", *words({**flags, "workers": 1}))
    to_megatron(folder / "qwen", folder / "start", ckpt_format="torch_dist")
    return folder


@pytest.fixture(scope="session")
def common(work: Path) -> dict[str, Any]:
    """The settings that all runs here have."""
    return {
        "dataset_path": work / "text", "load_checkpoint_path": work / "start", "seq_length": 32, "micro_batch_size": 2,
        "global_batch_size": 8, "lr": 1e-3, "min_lr": 1e-4, "split": "100,0,0", "eval_interval": 0, "log_interval": 1,
        "train_iters": 6,
    }  # fmt: skip


@pytest.fixture(scope="session")
def waiting(nodes: list[Node], work: Path, common: dict[str, Any]) -> dict[str, tuple[Run, Run]]:
    """Runs that take a minute to end, for test_waiting.py: started early, so that the other tests fill the time."""
    same = {**common, "nnodes": 2, "distributed_timeout_min": 1}
    unreachable = {**same, "save_checkpoint_path": work / "out_of_reach"}
    meeting = {**same, "save_checkpoint_path": work / "meeting", "rdzv_endpoint": f"{nodes[2].address}:29400"}
    private = {name: work / name for name in ("shared", "own")}
    for folder in private.values():
        folder.mkdir()
    divided = {**same, "save_checkpoint_path": private["shared"], "master_addr": nodes[2].address, "master_port": 29600}
    first = nodes[2].train(**meeting)
    first.wait_for("starting torchrun")
    return {
        "out of reach": (
            nodes[2].train(**unreachable, node_rank=0, master_addr=nodes[2].address),
            nodes[3].train(**unreachable, node_rank=1, master_addr="10.77.0.99"),
        ),
        "not shared": (
            nodes[2].train(**divided, node_rank=0),
            nodes[3].train(**divided, node_rank=1, mounts={private["shared"]: private["own"]}),
        ),
        "at a rendezvous": (first, nodes[3].train(**{**meeting, "seed": 7})),
    }
