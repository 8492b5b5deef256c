"""Nodes that wait in vain, started by conftest.py: each ends at its timeout, and names what was missing."""

import pytest

from tests.nodes.network import Run

pytestmark = pytest.mark.lane

LIMIT_S = 60 + 60  # DISTRIBUTED_TIMEOUT_MIN=1, and time to start on a busy machine


def test_a_node_that_cannot_reach_the_master_is_reported_on_both_nodes(waiting: dict[str, tuple[Run, Run]]) -> None:
    first, second = (run.end(2, LIMIT_S) for run in waiting["out of reach"])
    assert "error: no word from NODE_RANK=1 of NNODES=2 within DISTRIBUTED_TIMEOUT_MIN=1" in first
    message = "error: node 1 (node3) did not reach node 0 (NODE_RANK=0) at MASTER_ADDR=10.77.0.99 MASTER_PORT=29500"
    assert message in second and "No route to host" in second and "Traceback" not in first + second


def test_a_checkpoint_folder_that_is_not_shared_is_noticed_before_training(waiting: dict[str, tuple[Run, Run]]) -> None:
    logs = [run.end(2, LIMIT_S) for run in waiting["not shared"]]
    for log in logs:
        assert "error: SAVE_CHECKPOINT_PATH=" in log and "Traceback" not in log
        assert "/shared on node 1 (node3) is not the folder that node 0 (node2) writes to" in log


def test_a_node_that_differs_is_rejected_by_a_rendezvous(waiting: dict[str, tuple[Run, Run]]) -> None:
    first, second = (run.end(2, LIMIT_S) for run in waiting["at a rendezvous"])
    message = "node3 is not like node2: SEED is 7 on node3, 1234 on node2"
    assert f"error: {message}" in second
    assert "error: NNODES=2 nodes did not join RDZV_ENDPOINT=" in first and f"rejected: {message}" in first
    assert "Traceback" not in first + second
