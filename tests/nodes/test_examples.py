"""What docs/examples/ gives to Slurm and Kubernetes becomes the right command on each node."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow.training import ApiClient as TrainingClient
from kubernetes.client import ApiClient

from tests.nodes.network import ROOT

EXAMPLES = ROOT / "docs" / "examples"
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s ' "$@" >>"$RECORD"
echo >>"$RECORD"
"""
FAKE_SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@"; done
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $* == "show hostnames n[7-9]" ]]; then printf "n%s\\n" 7 8 9; else echo "scontrol $*"; fi
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(*command: str | Path, code: int = 0, **settings: Any) -> str:
    given = {name: str(value) for name, value in settings.items()}
    done = subprocess.run(
        [str(word) for word in command], env={**os.environ, "PYTHON": sys.executable, **given}, cwd="/", text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def flags(line: str) -> dict[str, str]:
    """A command's flags and their values."""
    words = line.split()
    return {name: value for name, value in zip(words, words[1:], strict=False) if name.startswith("--")}


@pytest.mark.parametrize("restarts", [0, 3])
def test_the_slurm_job_numbers_its_nodes_and_finds_the_first(tmp_path: Path, restarts: int) -> None:
    python = program(tmp_path / "bin" / "python", FAKE_PYTHON)
    program(tmp_path / "bin" / "srun", FAKE_SRUN)
    program(tmp_path / "bin" / "scontrol", FAKE_SCONTROL)
    settings = {"DATASET_PATH": "/d", "HF_MODEL_PATH": "/m", "SAVE_CHECKPOINT_PATH": "/s", "MAX_RESTARTS": restarts}
    slurm = {"JOB_NUM_NODES": 3, "JOB_NODELIST": "n[7-9]", "JOB_ID": 1234567, "SUBMIT_DIR": ROOT}
    run(
        "bash", EXAMPLES / "slurm_train.sh", **settings, PYTHON=python, RECORD=tmp_path / "record",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", **{f"SLURM_{name}": value for name, value in slurm.items()},
    )  # fmt: skip
    found = [flags(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert [each["--node-rank"] for each in found] == ["0", "1", "2"]
    expected = {"--nnodes": "3", "--master-addr": "n7", "--master-port": "24567", "--max-restarts": str(restarts)}
    if restarts:
        expected |= {"--rdzv-endpoint": "n7:24567", "--rdzv-id": "1234567"}
    assert all({**each, **expected} == each and ("--rdzv-endpoint" in each) == bool(restarts) for each in found)


@pytest.mark.parametrize(
    ("status", "requeue", "queued"), [(75, "true", True), (75, "false", False), (1, "true", False)]
)
def test_a_slurm_job_that_has_stopped_before_the_end_is_queued_again(
    tmp_path: Path, status: int, requeue: str, queued: bool
) -> None:
    program(tmp_path / "bin" / "srun", f'#!/usr/bin/env bash\necho "cpus $SRUN_CPUS_PER_TASK"\nexit {status}')
    program(tmp_path / "bin" / "scontrol", FAKE_SCONTROL)
    slurm = {"JOB_NUM_NODES": 3, "JOB_NODELIST": "n[7-9]", "JOB_ID": 12, "SUBMIT_DIR": ROOT, "CPUS_PER_TASK": 64}
    log = run(
        "bash", EXAMPLES / "slurm_train.sh", REQUEUE=requeue, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        code=status, **{f"SLURM_{name}": value for name, value in slurm.items()},
    )  # fmt: skip
    assert "cpus 64" in log and ("scontrol requeue 12" in log) == queued


def test_a_slurm_array_writes_what_one_process_writes(tmp_path: Path, work: Path) -> None:
    settings = {
        "INPUT": work / "text.jsonl", "OUTPUT_PREFIX": tmp_path / "parts", "TOKENIZER_PATH": work / "qwen",
        "SCRIPT": "cpu/1_preprocess_pretrain.sh", "SLURM_SUBMIT_DIR": ROOT, "SLURM_CPUS_PER_TASK": 1,
        "SLURM_ARRAY_TASK_COUNT": 2,
    }  # fmt: skip
    for task in (1, 0):
        run("bash", EXAMPLES / "slurm_preprocess.sh", **settings, SLURM_ARRAY_TASK_ID=task)
    run("bash", EXAMPLES / "slurm_preprocess.sh", **settings, MERGE="true")
    for end in ("bin", "idx"):
        name = f"text_document.{end}"
        assert (tmp_path / f"parts_{name}").read_bytes() == (work / f"text_{name}").read_bytes()


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text())


def through(client: Any, content: dict[str, Any], kind: str) -> dict[str, Any]:
    """`content` read into the client's own classes and written out again: unknown fields are lost."""
    response = type("Response", (), {"data": json.dumps(content)})
    return client.sanitize_for_serialization(client.deserialize(response, kind))


def test_the_manifests_hold_only_what_kubernetes_and_kubeflow_know() -> None:
    train, data = document("kubernetes_train.yaml"), document("kubernetes_preprocess.yaml")
    assert through(TrainingClient(), train, "KubeflowOrgV1PyTorchJob") == train
    assert through(ApiClient(), data, "V1Job") == data
    train["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["container"] = []
    assert through(TrainingClient(), train, "KubeflowOrgV1PyTorchJob") != train


def command(spec: dict[str, Any], **of_pod: str) -> dict[str, str]:
    """The flags of the command that a pod's container runs."""
    (container,) = spec["template"]["spec"]["containers"]
    shell, option, line = container["command"]
    settings = {each["name"]: each["value"] for each in container["env"]}
    script = ROOT / line.split()[-1]
    assert all(f'"${{{name}:=' in script.read_text() for name in settings), settings
    done = run(shell, option, f"cd {ROOT}; {line} -n", **settings, **of_pod)
    return flags(done)


def test_the_pods_of_the_training_job_are_numbered_by_the_operator() -> None:
    spec = document("kubernetes_train.yaml")["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    for rank, role in enumerate(("Master", "Worker")):
        found = command(
            replicas[role], RANK=str(rank), MASTER_ADDR="qwen-master-0", MASTER_PORT="23456", WORLD_SIZE="2"
        )
        assert found["--node-rank"] == str(rank) and found["--master-addr"] == "qwen-master-0"
        assert int(found["--nnodes"]) == sum(each["replicas"] for each in replicas.values())
        assert found["--gpus"] == spec["nprocPerNode"] == limit(replicas[role])


def limit(spec: dict[str, Any]) -> str:
    return spec["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]


def test_the_pods_of_the_indexed_job_take_a_part_each() -> None:
    spec = document("kubernetes_preprocess.yaml")["spec"]
    found = command(spec, JOB_COMPLETION_INDEX="5")
    assert found["--partition-index"] == "5" and found["--partitions"] == str(spec["completions"])
