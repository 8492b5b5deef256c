"""Rendezvous of the nodes, restarts and timeouts."""

from dataclasses import dataclass

from common.errors import KitError
from common.settings import option, require

MASTER_PORT = 29500  # torchrun's own


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """Nodes and processes."""

    node_rank: int = option(0, "rank of this node, from 0")
    master_addr: str = option("localhost", "address of node 0")
    master_port: int | None = option(None, "a free port on node 0; default: any free port with one node, else 29500")
    rdzv_endpoint: str | None = option(
        None, "host:port of the rendezvous, in place of NODE_RANK, MASTER_ADDR and MASTER_PORT"
    )
    rdzv_id: str = option("kit", "the run's id at the rendezvous")
    max_restarts: int = option(0, "how many times to restart the processes from the latest checkpoint")
    distributed_timeout_min: int = option(10, "minutes after which a waiting rank or node times out")
    hang_timeout_min: float | None = option(
        None,
        "minutes without progress until hung ranks are reported; default: 0.8 of DISTRIBUTED_TIMEOUT_MIN; 0: never",
    )

    def check_launch(self, nnodes: int) -> None:
        """Raises KitError for values out of range or in conflict, in a run on `nnodes` nodes."""
        limit = self.distributed_timeout_min
        require(self, "distributed_timeout_min", limit >= 1, "it must be at least 1")
        for name in ("max_restarts", "hang_timeout_min"):
            require(self, name, (getattr(self, name) or 0) >= 0, "it must not be negative")
        require(self, "node_rank", 0 <= self.node_rank < nnodes, f"it must be below NNODES={nnodes}")
        if self.rdzv_endpoint:
            host, _, port = self.rdzv_endpoint.rpartition(":")
            require(self, "rdzv_endpoint", bool(host) and port.isdecimal(), "give host:port, such as node0:29400")
        elif self.max_restarts and nnodes > 1:
            raise KitError(
                f"MAX_RESTARTS={self.max_restarts} with NNODES={nnodes}: restarted nodes need a rendezvous:"
                " set RDZV_ENDPOINT=host:port on every node, to one of them and a free port on it"
            )
        elif nnodes > 1 and self.node_rank and self.master_addr == "localhost":
            raise KitError(f"MASTER_ADDR=localhost on NODE_RANK={self.node_rank}: set it to the address of node 0")

    @property
    def meeting_place(self) -> tuple[str, int]:
        """Host and port of the rendezvous."""
        if not self.rdzv_endpoint:
            return self.master_addr, self.master_port or MASTER_PORT
        host, _, port = self.rdzv_endpoint.rpartition(":")
        return host.strip("[]"), int(port)
