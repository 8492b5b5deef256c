"""torchrun's arguments, the port of a single node, and what is logged of a rank that fails."""

import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import config_from_args, parse_args

from common.training.launching import launcher
from common.training.launching.agent_patches import keep_rendezvous, limit_shutdown
from common.training.launching.launcher import describe_first_failure, run_agent, torchrun_arguments, with_port
from common.training.launching.rank_exit import EXIT_REASONS
from common.training.settings import TrainSettings


def config(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """torchrun's own reading of the arguments, with environment variables that contradict them."""
    for name, value in {"NNODES": "9", "NODE_RANK": "0", "RDZV_BACKEND": "etcd", "RDZV_ENDPOINT": "x:1"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    monkeypatch.setenv("PET_MAX_RESTARTS", "7")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    words = torchrun_arguments(settings(**changes), "10.0.0.3")
    return config_from_args(parse_args([*words, "-m", "common.train"]))[0]


def test_numbered_nodes_meet_at_the_master_for_as_long_as_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found = config(
        monkeypatch, nnodes=4, node_rank=3, gpus=2, master_addr="a", master_port=7, distributed_timeout_min=3
    )
    assert (found.min_nodes, found.max_nodes, found.nproc_per_node, found.max_restarts) == (4, 4, 2, 0)
    assert (found.rdzv_backend, found.rdzv_endpoint) == ("static", "a:7")
    assert found.rdzv_configs["rank"] == 3 and int(found.rdzv_configs["timeout"]) == 180


def test_a_rendezvous_has_the_timeout_and_the_preflight_checks_store(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    given = {"nnodes": 2, "rdzv_endpoint": "a:7", "rdzv_id": "run", "max_restarts": 3, "distributed_timeout_min": 2}
    found = config(monkeypatch, **given)
    assert (found.rdzv_backend, found.rdzv_endpoint, found.run_id) == ("c10d", "a:7", "run")
    assert (found.max_restarts, found.local_addr) == (3, "10.0.0.3")
    configuration = {"join_timeout": "120", "read_timeout": "120", "is_host": "false"}
    assert {name: str(value) for name, value in found.rdzv_configs.items() if name != "timeout"} == configuration
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_one_node_restarts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = config(monkeypatch, max_restarts=1)
    assert (found.rdzv_backend, found.rdzv_endpoint, found.max_nodes) == ("c10d", "localhost:0", 1)
    assert found.rdzv_configs["is_host"] == "true"


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(save_checkpoint_path="s", dataset_path="d", epochs=1.0, **changes)


def test_a_single_node_uses_a_free_port_so_that_runs_do_not_collide() -> None:
    ports = [with_port(settings()).meeting_place[1] for _ in range(2)]
    taken = [socket.socket() for _ in ports]
    for port, one in zip(ports, taken, strict=True):
        assert 1024 <= port < 29500  # no other connection gets one, nor torchrun by default
        one.bind(("", port))
    for one in taken:
        one.close()


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"nnodes": 2}, ("localhost", 29500)),  # the others cannot know of another
        ({"master_port": 7}, ("localhost", 7)),
        ({"rdzv_endpoint": "a:8"}, ("a", 8)),
    ],
)
def test_a_port_that_other_nodes_use_is_not_changed(changes: dict[str, Any], place: tuple[str, int]) -> None:
    assert with_port(settings(**changes)).meeting_place == place


def failure(local_rank: int, exitcode: int, timestamp: int) -> ProcessFailure:
    found = ProcessFailure(local_rank, 100 + local_rank, exitcode, "/nowhere")
    found.timestamp = timestamp
    return found


def test_the_killed_process_is_named_before_those_that_failed_because_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(EXIT_REASONS, str(tmp_path))
    (tmp_path / "traceback_0").write_text("connection reset by peer")
    failures = {4: failure(0, 1, 10), 5: failure(1, 1, 11), 6: failure(2, -9, 12), 7: failure(3, -15, 13)}
    rank, messages = describe_first_failure(ChildFailedError("train", failures))
    assert (rank, messages) == (6, ["rank 6 failed first, killed by SIGKILL: is the host out of memory (dmesg)?"])


def test_of_processes_that_failed_the_first_is_named_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(EXIT_REASONS, str(tmp_path))
    (tmp_path / "traceback_1").write_text("ValueError: it")
    failures = {4: failure(0, 1, 12), 5: failure(1, 3, 11)}
    rank, messages = describe_first_failure(ChildFailedError("train", failures))
    assert (rank, messages) == (5, ["rank 5 failed first, with exit code 3", "traceback of rank 5:\nValueError: it"])


@pytest.mark.parametrize(("exitcode", "code"), [(3, 3), (-9, 1)])
def test_the_launcher_ends_with_the_code_of_the_rank_that_failed_and_passes_on_what_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exitcode: int, code: int
) -> None:
    monkeypatch.setenv(EXIT_REASONS, str(tmp_path))
    error, told = ChildFailedError("train", {5: failure(1, exitcode, 11)}), list[tuple[int, list[str]]]()

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(launcher, "run", fail)
    with pytest.raises(SystemExit) as end:
        run_agent(settings(), None, lambda rank, messages: told.append((rank, messages)))
    assert end.value.code == code and told == [describe_first_failure(error)]


def test_ranks_that_hang_are_killed_soon_however_long_torchrun_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(PContext, "close", lambda self, death_sig=None, timeout=30: waits.append(timeout))
    limit_shutdown(5)
    for given in ((), (3,), (60,)):
        PContext.close(SimpleNamespace(), signal.SIGTERM, *given)  # type: ignore[arg-type]
    assert waits == [5, 3, 5]


def test_ranks_are_stopped_without_closing_the_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, group: str, is_restart: bool = False) -> None:  # as in torch 2.3.0
        stopped.append((group, is_restart, self._rdzv_handler))

    stopped: list[tuple[str, bool, Any]] = []
    monkeypatch.setattr(LocalElasticAgent, "_stop_workers", stop)
    keep_rendezvous()
    agent: Any = SimpleNamespace(_rdzv_handler="open")
    LocalElasticAgent._stop_workers(agent, "ranks", is_restart=True)  # type: ignore[arg-type]
    assert stopped == [("ranks", True, None)] and agent._rdzv_handler == "open"
