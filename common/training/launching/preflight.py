"""The preflight check: before torchrun starts, all nodes are there, alike, and share one checkpoint folder.

It runs in the TCPStore that torchrun will use, opened a little earlier: at MASTER_ADDR:MASTER_PORT, or at
RDZV_ENDPOINT. Each node compares itself with the reference: node 0, or at a rendezvous the first node to join. With
NODE_RANK no node continues before node 0 has a result from all of them; at a rendezvous each node passes or fails by
itself, also when it joins in the middle of a run.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from common.errors import KitError
from common.log import logger
from common.training.launching.interfaces import is_own_host, wait_for_port
from common.training.launching.nodes import Facts, differences, node_name
from common.training.launching.store_keys import announce, is_set
from common.training.settings import TrainSettings

TOKEN_FILE = ".nodes"  # in SAVE_CHECKPOINT_PATH: the reference writes it, every other node looks for it
TOKEN_TIMEOUT_S = 30  # shared file systems show a new file late
LINGER_S = 30  # how long a node that cannot start keeps the store up, so that the others read why
POLL_S = 0.2
# The store's keys.
JOINED, REFERENCE, NODE, PROBLEMS, RESULT, ACKNOWLEDGED = (
    f"kit/{name}" for name in ("joined", "reference", "node", "problems", "result", "acknowledged")
)


@contextmanager
def preflight_check(settings: TrainSettings, facts: Facts) -> Iterator["Preflight | None"]:
    """This node's passed check, None for a run on one node; the store must stay open until torchrun has ended.

    Raises KitError when a node is missing or differs from the reference: on all nodes, at a rendezvous on that one.
    """
    if settings.nnodes == 1:
        yield None
        return
    preflight = Preflight(settings, 60 * settings.distributed_timeout_min)
    preflight.check(facts)
    yield preflight
    preflight.finish()


def report_failure(settings: TrainSettings, error: Exception) -> None:
    """Tells the other nodes that this one cannot start, so that they need not wait for it."""
    logger.info("this node cannot start: reporting it to the others, for up to %d seconds", LINGER_S)
    try:
        Preflight(settings, LINGER_S).report(str(error))
    except (KitError, RuntimeError):
        logger.info("no other node was reached")


class Preflight:
    """One node's part in the check; waiting ends `timeout_s` seconds after it was made.

    is_numbered: nodes have a NODE_RANK, and no rendezvous. is_store_host: this node runs the store's server.
    """

    def __init__(self, settings: TrainSettings, timeout_s: float) -> None:
        self.settings, self.is_numbered = settings, settings.rdzv_endpoint is None
        self.name = node_name(settings.node_rank if self.is_numbered else None)
        self.deadline = time.monotonic() + timeout_s
        self.host, self.port = settings.meeting_place
        self.is_store_host = settings.node_rank == 0 if self.is_numbered else is_own_host(self.host)
        self.store = self._open_store()
        self.is_reference = settings.node_rank == 0 if self.is_numbered else self.store.add(JOINED, 1) == 1

    def _open_store(self) -> TCPStore:
        endpoint = f"MASTER_ADDR={self.host} MASTER_PORT={self.port}"
        if not self.is_numbered:
            endpoint = f"RDZV_ENDPOINT={self.settings.rdzv_endpoint}"
        action = "waiting for the other nodes at" if self.is_store_host else "connecting to"
        logger.info("%s: %s %s", self.name, action, endpoint)
        if self.is_store_host and not is_own_host(self.host):
            logger.warning("%s is not an address of this machine (%s)", self.host, self.name)
        if not self.is_store_host and (cause := wait_for_port(self.host, self.port, self._remaining_s())):
            host = "node 0 (NODE_RANK=0)" if self.is_numbered else "the host of the rendezvous"
            raise KitError(
                f"{self.name} did not reach {host} at {endpoint} within {self._timeout()} ({cause}): does the same"
                " command run there, and is the port open between the two?"
            )
        try:
            # multi_tenant: torchrun's agent, in this process, then shares the server at this port.
            return TCPStore(
                self.host, self.port, is_master=self.is_store_host, timeout=timedelta(seconds=self._remaining_s()),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise KitError(
                f"{self.name} cannot open the store at {endpoint} ({cause}): is the port taken by another run, or the"
                " address another machine's?"
            ) from None

    def check(self, facts: Facts) -> None:
        """Returns when this node is like the reference and, with NODE_RANK, so is every other; else raises KitError."""
        problem = ""
        if self.is_reference:
            token = secrets.token_hex(16)
            self._publish({"facts": facts, "token": token})
            write_token(self.folder, token)  # not before: a second node with this number has failed by now
        else:
            problem = self._compare(facts)
        if problem:
            self._add_problem(problem)
        if self.is_numbered:
            self._wait_for_nodes() if self.is_reference else self._wait_for_result(problem)
        elif problem:
            self.store.add(ACKNOWLEDGED, 1)
            raise KitError(problem)
        else:
            result = "is the first node" if self.is_reference else "is like the first node"
            logger.info("%s %s: starting torchrun", self.name, result)

    def report(self, text: str) -> None:
        """Tells the other nodes that this one cannot start, and why."""
        text = f"{self.name} cannot start: {text}"
        if self.is_reference:
            self._publish({"error": text})
            self._fail(text, self.settings.nnodes - 1)
        else:
            self._add_problem(text)
            self.store.add(ACKNOWLEDGED, 1)

    def problems(self) -> list[str]:
        """Why nodes failed the check."""
        number = self.store.add(PROBLEMS, 0)
        return [self._get(f"{PROBLEMS}/{index + 1}") for index in range(number)]

    def finish(self) -> None:
        """Removes the token file; to be called when the run has succeeded."""
        if self.is_reference:
            (self.folder / TOKEN_FILE).unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """SAVE_CHECKPOINT_PATH, which all nodes share."""
        return Path(self.settings.save_checkpoint_path)

    def _remaining_s(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def _timeout(self) -> str:
        return f"DISTRIBUTED_TIMEOUT_MIN={self.settings.distributed_timeout_min}"

    def _set(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def _set_once(self, key: str, value: dict[str, Any]) -> None:
        """Sets `key`; if another node with the same number has set it, raises KitError here and on all nodes."""
        own = json.dumps({**value, "id": secrets.token_hex(8)})
        stored = self.store.compare_set(key, "", own).decode()
        if stored != own:
            text = (
                f"NODE_RANK={self.settings.node_rank} is set on {self.name} and on {json.loads(stored)['name']}: give"
                f" each of the {self.settings.nnodes} nodes a number of its own, from 0 (if both are this node, an"
                " earlier run has not ended yet)"
            )
            self._add_problem(text)
            self.store.add(ACKNOWLEDGED, 1)
            raise KitError(text)
        announce(self.store, key)

    def _publish(self, content: dict[str, Any]) -> None:
        self._set_once(REFERENCE, {"name": self.name, **content})

    def _add_problem(self, text: str) -> None:
        self._set(f"{PROBLEMS}/{self.store.add(PROBLEMS, 1)}", text)

    def _compare(self, facts: Facts) -> str:
        """How this node differs from the reference; empty if it does not."""
        reference = self._wait_for(REFERENCE)
        if "error" in reference:
            return str(reference["error"])
        name = reference["name"]
        if found := differences(reference["facts"], name, facts, self.name):
            return f"{self.name} is not like {name}: {found}"
        if not finds_token(self.folder, reference["token"], min(TOKEN_TIMEOUT_S, self._remaining_s())):
            return (
                f"SAVE_CHECKPOINT_PATH={self.folder} on {self.name} is not the folder that {name} writes to: its file"
                f" {TOKEN_FILE} did not appear there; put the folder on storage that all nodes share"
            )
        return ""

    def _wait_for_nodes(self) -> None:
        """Node 0: waits for every other node, then publishes the result."""
        pending = {rank: f"{NODE}/{rank}" for rank in range(1, self.settings.nnodes)}
        names = [self.name]
        while pending and not self.problems():
            if time.monotonic() > self.deadline:
                self._add_problem(self._missing_nodes())
            for rank in [rank for rank, key in pending.items() if is_set(self.store, key)]:
                names.append(self._get(pending.pop(rank))["name"])
            time.sleep(POLL_S)
        text = "; ".join(dict.fromkeys(self.problems()))
        if text:
            self._fail(text, len(names) - 1 if time.monotonic() > self.deadline else self.settings.nnodes - 1)
            raise KitError(text)
        self._set(RESULT, "")
        logger.info("preflight check passed on all %d nodes: %s", self.settings.nnodes, ", ".join(names))

    def _wait_for_result(self, problem: str) -> None:
        """Every other node: reports to node 0 unless it has a `problem`, and waits for the result."""
        if not problem:
            self._set_once(f"{NODE}/{self.settings.node_rank}", {"name": self.name})
        failure = self._wait_for(RESULT)
        self.store.add(ACKNOWLEDGED, 1)
        if failure:
            raise KitError(failure)

    def _fail(self, text: str, num_others: int) -> None:
        """Publishes the failure; returns when `num_others` nodes have read it, or after LINGER_S seconds."""
        self._set(RESULT, text)
        end = time.monotonic() + LINGER_S
        while self.store.add(ACKNOWLEDGED, 0) < num_others and time.monotonic() < end:
            time.sleep(POLL_S)

    def _wait_for(self, key: str) -> Any:
        try:
            self.store.wait([key], timedelta(seconds=self._remaining_s()))
            return self._get(key)
        except RuntimeError as error:
            if time.monotonic() < self.deadline:
                raise KitError(
                    f"{self.name} lost the connection to {self.host}:{self.port} ({str(error).splitlines()[0]}): see"
                    " the log of that node for why it ended"
                ) from None
            text = self._missing_nodes()
            self._add_problem(text)
            raise KitError(text) from None

    def _missing_nodes(self) -> str:
        """Which nodes have not joined in time."""
        if not is_set(self.store, REFERENCE):
            return f"{self.name} heard nothing from the first node within {self._timeout()}"
        ranks = range(1, self.settings.nnodes)
        missing = [str(rank) for rank in ranks if not is_set(self.store, f"{NODE}/{rank}")]
        return (
            f"no word from NODE_RANK={', '.join(missing)} of NNODES={self.settings.nnodes} within {self._timeout()}:"
            f" start the same command there, with MASTER_ADDR={self.host} MASTER_PORT={self.port}"
        )


def write_token(folder: Path, token: str) -> None:
    """Writes the token file into `folder`, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{TOKEN_FILE}.partial"
    partial.write_text(f"{token}\n", encoding="utf-8")
    partial.replace(folder / TOKEN_FILE)


def finds_token(folder: Path, token: str, timeout_s: float) -> bool:
    """Whether `token` can be read in `folder` within `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            if (folder / TOKEN_FILE).read_text(encoding="utf-8").strip() == token:
                return True
        except OSError:  # not there yet
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
