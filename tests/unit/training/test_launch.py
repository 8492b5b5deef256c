"""The words that torchrun is started with."""

from typing import Any

import pytest
from torch.distributed.run import config_from_args, parse_args

from common.training.config import TrainSettings
from common.training.launch import torchrun_words


def config(monkeypatch: pytest.MonkeyPatch, serves: bool = False, **changes: Any) -> Any:
    """torchrun's own reading of the words, among variables that would say otherwise."""
    for name, value in {"NNODES": "9", "NODE_RANK": "0", "RDZV_BACKEND": "etcd", "RDZV_ENDPOINT": "x:1"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    monkeypatch.setenv("PET_MAX_RESTARTS", "7")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    settings = TrainSettings(save_checkpoint_path="s", dataset_path="d", epochs=1.0, **changes)
    words = torchrun_words(settings, "10.0.0.3", serves)
    return config_from_args(parse_args([*words, "-m", "common.train"]))[0]


def test_numbered_nodes_meet_at_the_master_for_as_long_as_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found = config(
        monkeypatch, nnodes=4, node_rank=3, gpus=2, master_addr="a", master_port=7, distributed_timeout_min=3
    )
    assert (found.min_nodes, found.max_nodes, found.nproc_per_node, found.max_restarts) == (4, 4, 2, 0)
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("static", "a:7")
    assert found.rdzv_configs["rank"] == 3 and int(found.rdzv_configs["timeout"]) == 180


@pytest.mark.parametrize("serves", [True, False])
def test_a_rendezvous_has_the_timeout_and_one_host(monkeypatch: pytest.MonkeyPatch, serves: bool) -> None:
    import os

    given = {"nnodes": 2, "rdzv_endpoint": "a:7", "rdzv_id": "run", "max_restarts": 3, "distributed_timeout_min": 2}
    found = config(monkeypatch, serves, **given)
    assert (found.rdzv_backend, found.rdzv_endpoint, found.run_id) == ("c10d", "a:7", "run")
    assert (found.max_restarts, found.local_addr) == (3, "10.0.0.3")
    configuration = {"join_timeout": "120", "read_timeout": "120", "is_host": str(serves).lower()}
    assert {name: str(value) for name, value in found.rdzv_configs.items() if name != "timeout"} == configuration
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_one_node_restarts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = config(monkeypatch, max_restarts=1)
    assert (found.rdzv_backend, found.rdzv_endpoint, found.max_nodes) == ("c10d", "localhost:0", 1)
    assert found.rdzv_configs["is_host"] == "true"
