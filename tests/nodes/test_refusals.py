"""Nodes that do not match: each ends, and names the node and what differs."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conversion import to_megatron
from tests.nodes.conftest import HEAVY
from tests.nodes.network import ROOT, Node
from tests.tiny import tiny_qwen

pytestmark = pytest.mark.usefixtures("waiting")  # begins what test_waiting.py sees


def pair(nodes: list[Node], port: int, settings: dict[str, Any], **of_second: Any) -> list[str]:
    """The logs of two nodes that must both exit 2, long before a timeout."""
    same = {**settings, "nnodes": 2, "master_addr": nodes[0].address, "master_port": port}
    runs = [nodes[0].train(**same, node_rank=0), nodes[1].train(**{**same, "node_rank": 1, **of_second})]
    try:
        return [run.end(2, 150) for run in runs]
    except AssertionError as error:
        raise AssertionError("\n\n".join([str(error), *(run.text()[-3000:] for run in runs)])) from None


def test_other_settings_code_and_data_are_named_on_both_nodes(
    nodes: list[Node], work: Path, common: dict[str, Any]
) -> None:
    kit = work / "kit"
    for part in ("common", "cpu"):
        shutil.copytree(ROOT / part, kit / part, ignore=shutil.ignore_patterns("__pycache__"))
    with (kit / "common" / "training" / "loop" / "train_step.py").open("a") as stream:
        stream.write("# a line more\n")
    data = bytearray((work / "text_text_document.bin").read_bytes())
    data[-2] ^= 1  # the last token is another
    (work / "other.bin").write_bytes(data)
    mounts = {work / "text_text_document.bin": work / "other.bin"}

    settings = {**common, "save_checkpoint_path": work / "refused"}
    logs = pair(nodes, 29610, settings, lr=2e-3, kit=kit, mounts=mounts)
    message = (
        "error: node 1 (node1) is not like node 0 (node0): LR is 0.002 on node 1 (node1), 0.001 on node 0 (node0),"
        " common/training/loop/train_step.py differs, DATASET_PATH[0] text_text_document.bin differs\n"
    )
    assert all(message in log and "Traceback" not in log for log in logs), logs
    assert "iteration" not in logs[0] and not [*(work / "refused").glob("iter_*")]


@HEAVY
def test_other_weights_to_start_from_are_noticed_before_they_are_read(
    nodes: list[Node], work: Path, common: dict[str, Any]
) -> None:
    tiny_qwen(work / "other_qwen", std=0.05, spread=0.05, seed=1)
    to_megatron(work / "other_qwen", work / "trained_further", ckpt_format="torch_dist")
    file = next((work / "trained_further" / "release").glob("*.distcp"))
    settings = {**common, "save_checkpoint_path": work / "two_starts"}
    logs = pair(nodes, 29640, settings, mounts={work / "start": work / "trained_further"})
    message = f"error: node1 does not start from what node0 starts from: release/{file.name} differs, "
    assert all(message in log and "iteration 1/" not in log for log in logs), logs


def test_two_nodes_with_the_same_rank_are_named(nodes: list[Node], work: Path, common: dict[str, Any]) -> None:
    logs = pair(nodes, 29630, {**common, "save_checkpoint_path": work / "twice"}, node_rank=0)
    message = "error: NODE_RANK=0 is set on node 0 (node1) and on node 0 (node0)"
    either = [message, message.replace("1)", "x)").replace("0 (node0)", "0 (node1)").replace("x)", "0)")]
    assert all(log.count("error: ") == 1 and any(each in log for each in either) for log in logs), logs


def test_a_node_that_cannot_start_sends_the_reason_to_the_others(
    nodes: list[Node], work: Path, common: dict[str, Any]
) -> None:
    settings = {**common, "save_checkpoint_path": work / "lacks"}
    logs = pair(nodes, 29650, settings, dataset_path=work / "nowhere")
    assert f"error: node 1 (node1) cannot start: DATASET_PATH={work / 'nowhere'} is not a dataset" in logs[0]
    assert f"error: DATASET_PATH={work / 'nowhere'} is not a dataset" in logs[1]
