"""What is compared between nodes: each kind of difference is found and named."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.checkpoint.formats.checkpoint_paths import find_checkpoint, write_tracker
from common.platforms.cpu import CPU
from common.training.launching import nodes
from common.training.launching.nodes import data_facts, differences, facts_of, hash_file, hash_samples, start_facts
from common.training.planning.plan import Plan, Start, plan_run
from common.training.settings import TrainSettings
from tests.tiny import tiny_qwen, write_ramps


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    tiny_qwen(folder / "qwen")
    write_ramps(folder / "a", 20, 17)
    return folder


def plan(work: Path, **changes: Any) -> Plan:
    values = {
        "save_checkpoint_path": str(work / "save"), "dataset_path": str(work / "a"), "epochs": 1.0, "nnodes": 2,
        "hf_model_path": str(work / "qwen"), "seq_length": 16, "precision": "fp32", "master_addr": "a",
    }  # fmt: skip
    return plan_run(TrainSettings(**(values | changes)), CPU)


def test_settings_specific_to_a_node_are_no_difference(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work, tmp_path / "copy")
    here = facts_of(plan(work, node_rank=0))
    there = facts_of(plan(tmp_path / "copy", node_rank=1, master_addr="localhost.", rdzv_endpoint="b:1"))
    assert differences(here, "a", there, "b") == ""
    own = {name for name in (field.name.upper() for field in dataclasses.fields(TrainSettings)) if name not in here}
    assert own == {name.upper() for name in nodes.NOT_COMPARED}
    assert {"torch", "megatron-core", "Python", "KIT_PLATFORM", "the model's config.json"} <= here.keys()
    assert here["common/training/launching/nodes.py"] == hash_file(Path(nodes.__file__))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": 1e-3}, "LR is 0.001 on b, 1e-05 on a, MIN_LR is 0.0001 on b, 1e-06 on a"),
        ({"gpus": 2}, "GPUS is 2 on b, 1 on a"),
        ({"train_iters": 5, "epochs": None}, "EPOCHS is None on b, 1.0 on a, TRAIN_ITERS is 5 on b, None on a"),
    ],
)
def test_a_setting_is_reported_with_both_values(work: Path, changes: dict[str, Any], expected: str) -> None:
    assert differences(facts_of(plan(work)), "a", facts_of(plan(work, **changes)), "b") == expected


def test_what_one_node_lacks_and_what_is_over_five_is_reported() -> None:
    assert differences({"x": "1"}, "a", {"y": "2"}, "b") == "x exists only on a, y exists only on b"
    many = {str(number): "1" for number in range(8)}
    text = differences(many, "a", dict.fromkeys(many, "2"), "b")
    assert text.count(" is 2 on b") == 5 and text.endswith(", and 3 more")


def test_data_differs_by_weight_index_and_tokens(work: Path, tmp_path: Path) -> None:
    for end in (".bin", ".idx"):
        shutil.copy(work / f"a{end}", tmp_path / f"a{end}")
    reference = data_facts("DATASET_PATH", str(work / "a"))
    assert data_facts("DATASET_PATH", str(tmp_path / "a")) == reference and len(reference) == 3
    blend = data_facts("DATASET_PATH", f"0.7 {work / 'a'} 0.3 {tmp_path / 'a'}")
    assert blend["DATASET_PATH[0]'s weight"] == "7/10" and blend["DATASET_PATH[1]'s weight"] == "3/10"
    data = bytearray((tmp_path / "a.bin").read_bytes())
    data[11] ^= 1
    (tmp_path / "a.bin").write_bytes(data)
    text = differences(reference, "a", data_facts("DATASET_PATH", str(tmp_path / "a")), "b")
    assert text == "DATASET_PATH[0] a.bin differs"


def test_samples_reach_from_the_first_byte_to_the_last(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = bytes(1 << 20)
    found = set()
    for at in (None, 0, 4095, (1 << 20) - 4096, (1 << 20) - 1):
        changed = bytearray(content)
        if at is not None:
            changed[at] = 1
        path.write_bytes(changed)
        found.add(hash_samples(path, 4))
    path.write_bytes(content + b"\0")
    found.add(hash_samples(path, 4))
    assert len(found) == 6
    path.write_bytes(content[:-1])
    assert len(path.read_bytes()) and hash_samples(path, 4) not in found


def test_starts_differ_by_iteration_and_by_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for iteration in (1, 2):
        rank = folder / f"iter_{iteration:07d}" / "mp_rank_00"
        rank.mkdir(parents=True)
        (rank / "model_optim_rng.pt").write_bytes(bytes([iteration]))

    def facts(iteration: int) -> dict[str, str]:
        write_tracker(folder, iteration)
        return start_facts(Start("resume", folder, find_checkpoint(folder)))

    assert facts(1) == facts(1)
    assert "start is resume from iter_0000002 on b, resume from iter_0000001 on a" in differences(
        facts(1), "a", facts(2), "b"
    )
    before = facts(2)
    (folder / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"\7")
    expected = "iter_0000002/mp_rank_00/model_optim_rng.pt differs"
    assert differences(before, "a", facts(2), "b") == expected
    assert start_facts(Start("random", folder, None)) == {"start": "random"}
