"""Training over nodes in separate network namespaces: the same losses as on one, and resumption after a lost node."""

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import steps
from tests.nodes.conftest import HEAVY
from tests.nodes.network import Node, Run

pytestmark = [pytest.mark.lane, pytest.mark.usefixtures("waiting")]  # which begins what test_waiting.py sees
LAYOUT = {"tp": 2, "pp": 2}  # x DP 2 = 8 processes


def start_on(nodes: list[Node], port: int, **settings: Any) -> list[Run]:
    """Step 3 on each of `nodes`, numbered."""
    same = {"nnodes": len(nodes), "master_addr": nodes[0].address, "master_port": port, **settings}
    return [node.train(node_rank=rank, **same) for rank, node in enumerate(nodes)]


def test_two_nodes_train_to_the_losses_of_one(nodes: list[Node], work: Path, common: dict[str, Any]) -> None:
    expected = steps(nodes[0].train(**common, save_checkpoint_path=work / "one").end(0))
    runs = start_on(nodes[:2], 29510, **common, **LAYOUT, gpus=4, save_checkpoint_path=work / "two")
    logs = [run.end(0) for run in runs]
    found = steps(logs[0])
    assert [iteration for iteration, _, _ in found] == [1, 2, 3, 4, 5, 6]
    for (iteration, loss, norm), (_, expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert abs(loss - expected_loss) <= 1e-4, iteration  # one process: sums are made in another order
        assert abs(norm - expected_norm) <= 1e-3 * expected_norm, iteration
    assert "preflight check passed on all 2 nodes: node 0 (node0), node 1 (node1)" in logs[0]
    assert "gloo uses eth0 (10.77.0.2), the route to the first node" in logs[1]
    assert not (work / "two" / ".nodes").exists()


@HEAVY
def test_two_and_four_nodes_train_to_the_very_losses_of_one(
    nodes: list[Node], work: Path, common: dict[str, Any]
) -> None:
    settings = {**common, **LAYOUT, "train_iters": 20}
    expected = steps(nodes[0].train(**settings, gpus=8, save_checkpoint_path=work / "exact_1").end(0))
    assert len(expected) == 20
    for number in (2, 4):
        same = {**settings, "gpus": 8 // number, "save_checkpoint_path": work / f"exact_{number}"}
        logs = [run.end(0) for run in start_on(nodes[:number], 29511, **same)]
        assert steps(logs[0]) == expected


def test_a_killed_node_that_is_restarted_resumes_from_the_newest_checkpoint(
    nodes: list[Node], work: Path, common: dict[str, Any]
) -> None:
    settings = {
        **common, "nnodes": 2, "gpus": 1, "rdzv_endpoint": f"{nodes[0].address}:29520", "max_restarts": 2,
        "train_iters": 120, "save_interval": 20, "save_checkpoint_path": work / "killed",
    }  # fmt: skip
    first, second = (node.train(**settings) for node in nodes[:2])
    first.wait_for("saved")
    first.wait_for("iteration 30/120")
    nodes[1].kill()
    second.end(-9)
    third = nodes[1].train(**settings)
    logs = [run.end(0) for run in (first, third)]
    found = steps(logs[0])
    resumed = next(at for at in range(1, len(found)) if found[at][0] <= found[at - 1][0])
    assert (found[resumed][0] - 1) % 20 == 0 and found[-1][0] == 120
    again = {iteration: rest for iteration, *rest in found[resumed:]}
    before = [(iteration, rest) for iteration, *rest in found[:resumed] if iteration in again]
    assert before and all(again[iteration] == rest for iteration, rest in before)
    assert [iteration for iteration, _, _ in found[resumed:]] == list(range(found[resumed][0], 121))


@HEAVY
def test_a_run_whose_node_died_ends_on_the_others_and_resumes_when_all_start_again(
    nodes: list[Node], work: Path, common: dict[str, Any]
) -> None:
    settings = {**common, "gpus": 1, "train_iters": 120, "save_interval": 20, "save_checkpoint_path": work / "died"}
    first, second = start_on(nodes[:2], 29530, **settings)
    first.wait_for("iteration 30/120")
    nodes[1].kill()
    second.end(-9)
    first.end(1)
    first, second = start_on(nodes[:2], 29530, **settings)
    found = steps(first.end(0))
    second.end(0)
    assert (found[0][0] - 1) % 20 == 0 and found[0][0] > 20 and found[-1][0] == 120


@pytest.mark.parametrize("port", [29560, pytest.param(29570, marks=HEAVY)])
def test_a_stop_signal_to_one_launcher_stops_the_run_on_all_nodes(
    nodes: list[Node], work: Path, common: dict[str, Any], port: int
) -> None:
    settings = {**common, "gpus": 1, "train_iters": 100000, "save_checkpoint_path": work / f"stopped_{port}"}
    if port == 29570:
        settings |= {"rdzv_endpoint": f"{nodes[0].address}:{port}", "max_restarts": 2}
    first, second = start_on(nodes[:2], port, **settings)
    first.wait_for("iteration 30/100000")
    second.process.send_signal(signal.SIGTERM)
    first.end(75)
    log = second.end(75)
    (stopped,) = re.findall(r"stop requested: saving iteration (\d+)", first.text())
    assert f"stopped after iteration {stopped} of 100000" in first.text() and "Traceback" not in first.text() + log
    assert (work / f"stopped_{port}" / "latest_checkpointed_iteration.txt").read_text().strip() == stopped


@HEAVY
def test_a_rendezvous_that_loses_its_host_ends_on_all_nodes(
    nodes: list[Node], work: Path, common: dict[str, Any]
) -> None:
    settings = {
        **common, "nnodes": 2, "gpus": 1, "rdzv_endpoint": f"{nodes[0].address}:29540", "max_restarts": 2,
        "train_iters": 100000, "save_checkpoint_path": work / "host_lost", "distributed_timeout_min": 1,
    }  # fmt: skip
    first, second = (node.train(**settings) for node in nodes[:2])
    first.wait_for("iteration 30/100000")
    nodes[0].kill()
    first.end(-9)
    log = second.end(2)
    assert f"RDZV_ENDPOINT={nodes[0].address}:29540" in log and "start the same command on all nodes again" in log


@HEAVY
def test_a_lost_connection_ends_the_run_within_the_timeout(
    nodes: list[Node], work: Path, common: dict[str, Any]
) -> None:
    settings = {**common, "gpus": 1, "train_iters": 100000, "save_checkpoint_path": work / "cut"}
    runs = start_on(nodes[2:4], 29550, **settings, distributed_timeout_min=1)
    runs[0].wait_for("iteration 30/100000")
    nodes[3].cut()
    cut = time.monotonic()
    for run in runs:
        run.end(1, cut - run.began + 60 + 60)  # DISTRIBUTED_TIMEOUT_MIN=1, and time to end
