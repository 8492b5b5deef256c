"""The preflight check of several nodes, each a thread here with a connection of its own to a real store."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.errors import KitError
from common.ports import free_port
from common.training.launching import preflight
from common.training.launching.preflight import Preflight, preflight_check, report_failure
from common.training.settings import TrainSettings

ALIKE = {"LR": "1", "common/x.py": "sha256:1"}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "TOKEN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(preflight, "LINGER_S", 5)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., TrainSettings]:
    port = free_port()

    def make(node_rank: int | None = None, **changes: Any) -> TrainSettings:
        values = {"save_checkpoint_path": str(tmp_path / "save"), "dataset_path": "d", "epochs": 1.0, "nnodes": 3}
        values["global_batch_size"] = 12
        where = {"node_rank": node_rank, "master_addr": "127.0.0.1", "master_port": port}
        where = {"rdzv_endpoint": f"127.0.0.1:{port}"} if node_rank is None else where
        return TrainSettings(**{**values, **where, **changes})

    return make


def together(*parts: Callable[[], Any]) -> list[Any]:
    """What each of `parts` returns or raises, all run concurrently."""
    with ThreadPoolExecutor(len(parts)) as pool:
        done: list[Future[Any]] = [pool.submit(part) for part in parts]
    return [each.exception() or each.result() for each in done]


def check(settings: TrainSettings, facts: dict[str, str] = ALIKE, timeout_s: float = 20) -> Callable[[], Preflight]:
    def part() -> Preflight:
        node = Preflight(settings, timeout_s)
        node.check(facts)
        return node

    return part


def test_nodes_that_are_alike_all_continue(settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    passed = together(*(check(settings(rank)) for rank in (2, 0, 1)))
    assert [node.is_store_host for node in passed] == [False, True, False]
    assert (tmp_path / "save" / ".nodes").is_file()
    for node in passed:
        node.finish()
    assert not (tmp_path / "save" / ".nodes").exists()


def test_every_node_is_sent_which_ones_differ(settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    ends = together(
        check(settings(0)), check(settings(1), ALIKE | {"LR": "2"}),
        check(settings(2, save_checkpoint_path=str(tmp_path / "own"))),
    )  # fmt: skip
    assert all(isinstance(end, KitError) for end in ends) and len({str(end) for end in ends}) == 1
    assert "node 1 (" in str(ends[0]) and "LR is 2 on node 1 (" in str(ends[0])


def test_a_folder_without_the_token_is_reported(settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / ".nodes").write_text("of another run\n")
    ends = together(
        check(settings(0, nnodes=2)), check(settings(1, nnodes=2, save_checkpoint_path=str(tmp_path / "own")))
    )
    assert all(f"SAVE_CHECKPOINT_PATH={tmp_path / 'own'} on node 1 (" in str(end) for end in ends)


def test_two_nodes_with_the_same_rank_are_reported(settings: Callable[..., TrainSettings]) -> None:
    ends = together(check(settings(0)), check(settings(1)), check(settings(1)))
    assert all("NODE_RANK=1 is set on node 1 (" in str(end) for end in ends), ends


def test_a_node_that_does_not_join_is_reported(settings: Callable[..., TrainSettings]) -> None:
    began = time.monotonic()
    ends = together(check(settings(0), timeout_s=2), check(settings(2), timeout_s=20))
    assert time.monotonic() - began < 15
    assert all("no word from NODE_RANK=1 of NNODES=3" in str(end) for end in ends), ends
    (end,) = together(check(settings(1, master_port=free_port()), timeout_s=1))
    assert "did not reach node 0 (NODE_RANK=0) at MASTER_ADDR=127.0.0.1" in str(end)


@pytest.mark.parametrize("lame", [0, 1])
def test_a_node_that_cannot_start_notifies_the_others(settings: Callable[..., TrainSettings], lame: int) -> None:
    ends = together(
        lambda: report_failure(settings(lame, nnodes=2), KitError("no data")), check(settings(1 - lame, nnodes=2))
    )
    assert ends[0] is None and f"node {lame} (" in str(ends[1]) and "cannot start: no data" in str(ends[1])


def test_a_node_that_joins_a_rendezvous_is_compared_with_the_first(settings: Callable[..., TrainSettings]) -> None:
    first = check(settings())()
    assert first.is_store_host and first.is_reference and first.problems() == []
    again, other = together(check(settings()), check(settings(), ALIKE | {"common/x.py": "sha256:2"}))
    assert not again.is_reference
    assert isinstance(other, KitError) and first.problems() == [str(other)]
    assert "common/x.py differs" in str(other)


def test_one_node_needs_no_check(settings: Callable[..., TrainSettings]) -> None:
    with preflight_check(settings(0, nnodes=1), {}) as passed:
        assert passed is None


def test_a_port_that_is_taken_is_reported(settings: Callable[..., TrainSettings]) -> None:
    import socket

    train_settings = settings(0)
    with socket.socket() as taken:
        taken.bind(("", train_settings.master_port))
        taken.listen()
        with pytest.raises(
            KitError, match=rf"cannot open the store .* MASTER_PORT={train_settings.master_port} .*taken"
        ):
            Preflight(train_settings, 2)
