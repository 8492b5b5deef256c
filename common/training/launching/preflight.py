"""The roll of a run's nodes, called before torchrun starts: all of them are there, alike, and share one folder.

It lives in torchrun's own store, which is opened a little earlier: at MASTER_ADDR:MASTER_PORT, or at RDZV_ENDPOINT. The
nodes compare themselves with one of them, the reference: node 0, or at a rendezvous the first to come. With NODE_RANK
none goes on before node 0 has heard from all; at a rendezvous each newcomer goes on or is sent away by itself, also in
the middle of a run.
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
from common.training.settings import TrainSettings

TOKEN_FILE = ".nodes"  # in SAVE_CHECKPOINT_PATH: the reference writes it, every other node looks for it
TOKEN_WAIT_S = 30  # shared file systems show a new file late
TELL_S = 30  # how long a node that cannot start stays to tell the others why
# The store's keys.
FIRST, REFERENCE, ANSWER, COMPLAINTS, VERDICT, HEARD = (
    f"kit/{name}" for name in ("first", "reference", "answer", "complaints", "verdict", "heard")
)


@contextmanager
def called_roll(settings: TrainSettings, facts: Facts) -> Iterator["Roll | None"]:
    """The roll on which this node stands, None where it is the only one; to be kept until torchrun has ended.

    Raises KitError when a node is missing or another than the reference: on all nodes, at a rendezvous on that one.
    """
    if settings.nnodes == 1:
        yield None
        return
    roll = Roll(settings, 60 * settings.distributed_timeout_min)
    roll.join(facts)
    yield roll
    roll.finish()


def report_failure(settings: TrainSettings, error: KitError) -> None:
    """Tells the other nodes that this one cannot start, so that they need not wait for it."""
    logger.info("this node cannot start: telling the others, for %d seconds at most", TELL_S)
    try:
        Roll(settings, TELL_S).report(str(error))
    except (KitError, RuntimeError):
        logger.info("no other node was reached")


class Roll:
    """One node's part in the roll; `timeout_s` seconds after it was made, waiting ends."""

    def __init__(self, settings: TrainSettings, timeout_s: float) -> None:
        self.settings, self.numbered = settings, settings.rdzv_endpoint is None
        self.name = node_name(settings.node_rank if self.numbered else None)
        self.deadline = time.monotonic() + timeout_s
        self.host, self.port = settings.meeting_place
        self.serves = settings.node_rank == 0 if self.numbered else is_own_host(self.host)
        self.store = self._open()
        self.is_reference = settings.node_rank == 0 if self.numbered else self.store.add(FIRST, 1) == 1

    def _open(self) -> TCPStore:
        place = f"MASTER_ADDR={self.host} MASTER_PORT={self.port}"
        if not self.numbered:
            place = f"RDZV_ENDPOINT={self.settings.rdzv_endpoint}"
        logger.info("%s: %s %s", self.name, "waiting for the other nodes at" if self.serves else "going to", place)
        if self.serves and not is_own_host(self.host):
            logger.warning("note: %s is no address of this machine (%s)", self.host, self.name)
        if not self.serves and (why := wait_for_port(self.host, self.port, self._left())):
            host = "node 0 (NODE_RANK=0)" if self.numbered else "the host of the rendezvous"
            raise KitError(
                f"{self.name} did not reach {host} at {place} within {self._timeout()} ({why}): does the same command"
                " run there, and is the port open between the two?"
            )
        try:
            # Tenants of one process share a server: torchrun, in this process, will find this one.
            return TCPStore(
                self.host, self.port, is_master=self.serves, timeout=timedelta(seconds=self._left()),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise KitError(
                f"{self.name} cannot meet the other nodes at {place} ({why}): is the port taken by another run, or the"
                " address another machine's?"
            ) from None

    def join(self, facts: Facts) -> None:
        """Returns when this node is found to be like the reference and, with NODE_RANK, so is every other."""
        problem = ""
        if self.is_reference:
            token = secrets.token_hex(16)
            self._publish({"facts": facts, "token": token})
            write_token(self.folder, token)  # only now: a second node with this number has been turned away
        else:
            problem = self._compare(facts)
        if problem:
            self._complain(problem)
        if self.numbered:
            self._hear_all() if self.is_reference else self._hear_verdict(problem)
        elif problem:
            self.store.add(HEARD, 1)
            raise KitError(problem)
        else:
            logger.info(
                "%s is %s: going on to torchrun", self.name, "the first" if self.is_reference else "like the first"
            )

    def report(self, text: str) -> None:
        """Tells the other nodes that this one cannot start, and why."""
        text = f"{self.name} cannot start: {text}"
        if self.is_reference:
            self._publish({"error": text})
            self._end(text, self.settings.nnodes - 1)
        else:
            self._complain(text)
            self.store.add(HEARD, 1)

    def complaints(self) -> list[str]:
        """What was wrong with the nodes that could not join."""
        number = self.store.add(COMPLAINTS, 0)
        return [self._get(f"{COMPLAINTS}/{index + 1}") for index in range(number)]

    def finish(self) -> None:
        """To be called when the run has ended well."""
        if self.is_reference:
            (self.folder / TOKEN_FILE).unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """Where the run's checkpoints go, which all nodes share."""
        return Path(self.settings.save_checkpoint_path)

    def _left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def _timeout(self) -> str:
        return f"DISTRIBUTED_TIMEOUT_MIN={self.settings.distributed_timeout_min}"

    def _put(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def _put_first(self, key: str, value: dict[str, Any]) -> None:
        """Puts `value`, unless another node has that number already: then raises KitError, here and there."""
        mine = json.dumps({**value, "id": secrets.token_hex(8)})
        kept = self.store.compare_set(key, "", mine).decode()
        if kept != mine:
            text = (
                f"NODE_RANK={self.settings.node_rank} is set on {self.name} and on {json.loads(kept)['name']}: give"
                f" each of the {self.settings.nnodes} nodes a number of its own, from 0 (if that is this very node, the"
                " run before has not ended yet)"
            )
            self._complain(text)
            self.store.add(HEARD, 1)
            raise KitError(text)

    def _publish(self, content: dict[str, Any]) -> None:
        self._put_first(REFERENCE, {"name": self.name, **content})

    def _complain(self, text: str) -> None:
        self._put(f"{COMPLAINTS}/{self.store.add(COMPLAINTS, 1)}", text)

    def _compare(self, facts: Facts) -> str:
        """What is wrong with this node beside the reference; empty where nothing is."""
        reference = self._wait_for(REFERENCE)
        if "error" in reference:
            return str(reference["error"])
        there = reference["name"]
        if found := differences(reference["facts"], there, facts, self.name):
            return f"{self.name} is not like {there}: {found}"
        if not finds_token(self.folder, reference["token"], min(TOKEN_WAIT_S, self._left())):
            return (
                f"SAVE_CHECKPOINT_PATH={self.folder} on {self.name} is not the folder that {there} writes to: its file"
                f" {TOKEN_FILE} did not appear there; put the folder on storage that all nodes share"
            )
        return ""

    def _hear_all(self) -> None:
        """Node 0: waits for every other node, then tells all of them the verdict."""
        answers = {rank: f"{ANSWER}/{rank}" for rank in range(1, self.settings.nnodes)}
        names = [self.name]
        while answers and not self.complaints():
            if time.monotonic() > self.deadline:
                self._complain(self._missing())
            for rank in [rank for rank, key in answers.items() if self.store.check([key])]:
                names.append(self._get(answers.pop(rank))["name"])
            time.sleep(0.2)
        text = "; ".join(dict.fromkeys(self.complaints()))
        if text:
            self._end(text, len(names) - 1 if time.monotonic() > self.deadline else self.settings.nnodes - 1)
            raise KitError(text)
        self._put(VERDICT, "")
        logger.info("all %d nodes are there, and alike: %s", self.settings.nnodes, ", ".join(names))

    def _hear_verdict(self, problem: str) -> None:
        """Every other node: answers, and waits for what node 0 says."""
        if not problem:
            self._put_first(f"{ANSWER}/{self.settings.node_rank}", {"name": self.name})
        verdict = self._wait_for(VERDICT)
        self.store.add(HEARD, 1)
        if verdict:
            raise KitError(verdict)

    def _end(self, text: str, num_others: int) -> None:
        """Tells the others that there will be no run; stays until so many have heard, TELL_S seconds at most."""
        self._put(VERDICT, text)
        end = time.monotonic() + TELL_S
        while self.store.add(HEARD, 0) < num_others and time.monotonic() < end:
            time.sleep(0.2)

    def _wait_for(self, key: str) -> Any:
        try:
            self.store.wait([key], timedelta(seconds=self._left()))
            return self._get(key)
        except RuntimeError as error:
            if time.monotonic() < self.deadline:
                raise KitError(
                    f"{self.name} lost the connection to {self.host}:{self.port} ({str(error).splitlines()[0]}): the"
                    " log of the node there tells why it ended"
                ) from None
            text = self._missing()
            self._complain(text)
            raise KitError(text) from None

    def _missing(self) -> str:
        """Which nodes have not come."""
        if not self.store.check([REFERENCE]):
            return f"{self.name} heard nothing from the first node within {self._timeout()}"
        there = [0, *(rank for rank in range(1, self.settings.nnodes) if self.store.check([f"{ANSWER}/{rank}"]))]
        gone = [str(rank) for rank in range(self.settings.nnodes) if rank not in there]
        return (
            f"no word from NODE_RANK={', '.join(gone)} of NNODES={self.settings.nnodes} within {self._timeout()}: start"
            f" the same command there, with MASTER_ADDR={self.host} MASTER_PORT={self.port}"
        )


def write_token(folder: Path, token: str) -> None:
    """Writes the token file into `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{TOKEN_FILE}.partial"
    partial.write_text(f"{token}\n", encoding="utf-8")
    partial.replace(folder / TOKEN_FILE)


def finds_token(folder: Path, token: str, seconds: float) -> bool:
    """Whether `token` can be read in `folder`, now or within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            if (folder / TOKEN_FILE).read_text(encoding="utf-8").strip() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
