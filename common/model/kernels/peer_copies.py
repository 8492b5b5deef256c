"""Exchange of hidden states between the GPUs of a tensor-parallel group by their copy engines.

A collective's kernel takes multiprocessors from a GEMM that runs beside it, and a GEMM whose blocks stay on theirs then
takes up to twice as long (docs/benchmarks.md, "Several GPUs"). Here each GPU copies to memory of its peers that it has
mapped (PyTorch's symmetric memory). Streams wait for numbers in that memory (cuStreamWaitValue32 of CUDA's driver API),
so neither copies nor waiting take a multiprocessor.

A rank's slots are used in turn. A writer sets its number `ready` at the owner of a slot once it has written its part;
an owner sets its number `free` at the writers once it has read what the slot held, for which they wait before they
write the next. All ranks of a group make the same calls in the same order, so both sides know the number.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from common.model.layers.exchange import Pieces
from common.model.probe import PROBED, need

SLOTS = 2  # of each kind: one can be read while the next is written
FLAGS = 4096  # bytes for the numbers, before the slots
ALIGNED = 512  # bytes of which a slot is a multiple
LEAST_ROWS = 4096  # of a rank, for a GEMM of their own: fewer leave multiprocessors idle in its last round
KINDS = {"gather": 0, "scatter": 1}
READY, FREE = 0, 1


class PeerMemory:
    """The slots of a group, on every rank. A collective call; raises whatever CUDA or PyTorch does without them."""

    def __init__(self, group: Any, slot_bytes: int, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.slot_bytes = slot_bytes
        self._buffer = symmetric_memory.empty(FLAGS + 2 * SLOTS * slot_bytes, dtype=torch.uint8, device=device)
        self._buffer[:FLAGS].zero_()
        torch.cuda.synchronize(device)
        self._handle = symmetric_memory.rendezvous(self._buffer, group)
        dist.barrier(group)  # all flags are zero before the first is written
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def slot(self, owner: int, kind: str, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Slot `number` of `kind` of rank `owner`, as a tensor of `shape`."""
        start = FLAGS + (KINDS[kind] * SLOTS + number) * self.slot_bytes
        found: torch.Tensor = self._handle.get_buffer(owner, shape, dtype, start // dtype.itemsize)
        return found

    def _flag(self, owner: int, kind: str, number: int, what: int, writer: int) -> int:
        """The address of the number that `writer` sets at `owner`."""
        index = ((KINDS[kind] * SLOTS + number) * 2 + what) * self._size + writer
        return int(self._handle.buffer_ptrs[owner]) + 4 * index

    def tell(self, peer: int, kind: str, number: int, what: int, use: int) -> None:
        """Sets the number of this rank at `peer`, once the current stream got here."""
        write_number(self._flag(peer, kind, number, what, self._rank), use)

    def wait(self, peer: int, kind: str, number: int, what: int, use: int) -> None:
        """Has the current stream wait until `peer` has set its number here to `use` or more."""
        await_number(self._flag(self._rank, kind, number, what, peer), use)

    @staticmethod
    def copy(values: torch.Tensor, place: torch.Tensor) -> None:
        """Copies `values` to `place`, in a slot of any rank, once the current stream got here."""
        place.copy_(values, non_blocking=True)


def write_number(address: int, number: int) -> None:
    """Has the current stream write `number`, 32 bits, after what it wrote before is visible to other GPUs."""
    from cuda.bindings import driver

    stream = torch.cuda.current_stream().cuda_stream
    _check(driver.cuStreamWriteValue32(stream, address, number, 0))


def await_number(address: int, number: int) -> None:
    """Has the current stream wait until the 32 bits there are `number` or more."""
    from cuda.bindings import driver

    stream = torch.cuda.current_stream().cuda_stream
    at_least = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
    _check(driver.cuStreamWaitValue32(stream, address, number, int(at_least)))


def _check(result: tuple[Any, ...]) -> None:
    if int(result[0]):
        raise RuntimeError(f"CUDA's driver: {result[0]}")


class PeerCopies:
    """An Exchange (layers/exchange.py) between the GPUs of a tensor-parallel group on one host.

    The first call, and one that needs larger slots, is a collective one and waits for the GPU.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        # The other ranks, each rank's own next one first; and as (first, end), those before this one and after it.
        self.peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        self.spans = [(first, end) for first, end in ((0, self.rank), (self.rank + 1, self.size)) if first < end]
        self.copies = torch.cuda.Stream(priority=-1)
        self._memory: PeerMemory | None = None
        self._uses = dict.fromkeys(KINDS, 0)

    def memory(self, num_bytes: int) -> PeerMemory:
        """Slots of at least `num_bytes` each."""
        if self._memory is None or self._memory.slot_bytes < num_bytes:
            torch.cuda.synchronize()
            if self._memory is not None:
                dist.barrier(self.group)  # no peer reads the slots that are given up
            self._memory = PeerMemory(self.group, -(-num_bytes // ALIGNED) * ALIGNED, _device())
            self._uses = dict.fromkeys(KINDS, 0)
        return self._memory

    def begin(self, kind: str, num_bytes: int) -> "Turn":
        """The next slot of `kind`, of at least `num_bytes`; peers write over what it held once the stream got here."""
        memory = self.memory(num_bytes)
        use, number = divmod(self._uses[kind], SLOTS)
        self._uses[kind] += 1
        turn = Turn(self, memory, kind, number, use + 1)
        for peer in self.peers if use else ():
            turn.tell(peer, FREE)
        return turn

    def gather(self, part: torch.Tensor) -> "Gathering":
        """Begins to gather `part` [m, h] of each rank."""
        return Gathering(self, part)

    def scatter(self, rows: int, width: int, like: torch.Tensor) -> "Scattering":
        """Begins a sum of [rows, width] over the ranks, in dtype and on the device of `like`."""
        return Scattering(self, rows, width, like)


@dataclass(frozen=True)
class Turn:
    """The use of a slot by all ranks."""

    exchange: PeerCopies
    memory: PeerMemory
    kind: str
    number: int
    use: int

    def slot(self, owner: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The slot of rank `owner`."""
        return self.memory.slot(owner, self.kind, self.number, shape, dtype)

    def tell(self, peer: int, what: int) -> None:
        """Tells `peer` that the current stream got here: its slot is READY, or this rank's FREE for this use."""
        self.memory.tell(peer, self.kind, self.number, what, self.use)

    def await_(self, peer: int, what: int) -> None:
        """Has the current stream wait until `peer` told that."""
        self.memory.wait(peer, self.kind, self.number, what, self.use)

    def send(self, peer: int, values: torch.Tensor, place: torch.Tensor) -> torch.cuda.Event:
        """Copies `values`, once the current stream has them, to `place` in the slot of `peer`; the end of the copy."""
        copies = self.exchange.copies
        copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(copies):
            if self.use > 1:
                self.await_(peer, FREE)
            self.memory.copy(values, place)
            self.tell(peer, READY)
            return copies.record_event()


class Gathering:
    """`part` of all ranks."""

    def __init__(self, exchange: PeerCopies, part: torch.Tensor) -> None:
        self._exchange, self._part, shape = exchange, part, (len(part) * exchange.size, part.shape[1])
        self._turn = exchange.begin("gather", part.nbytes * exchange.size)
        self._whole = self._turn.slot(exchange.rank, shape, part.dtype)
        self._single = len(part) >= LEAST_ROWS
        mine = self._rows(exchange.rank)
        self._sent = [
            self._turn.send(peer, part, self._turn.slot(peer, shape, part.dtype)[mine]) for peer in exchange.peers
        ]

    def _rows(self, rank: int) -> slice:
        return slice(rank * len(self._part), (rank + 1) * len(self._part))

    def pieces(self) -> Pieces:
        """(rows of the whole, their values): this rank's own first, others' once the current stream has them."""
        peers = reversed(self._exchange.peers)  # the first to send to this rank is the one before it
        yield from self._arriving([(peer, peer + 1) for peer in peers] if self._single else self._exchange.spans)

    def blocks(self) -> Pieces:
        """As `pieces`, but others' rows before this rank's own are one, and those after them."""
        yield from self._arriving(self._exchange.spans)

    def _arriving(self, spans: list[tuple[int, int]]) -> Pieces:
        """This rank's own rows, and those of each span of ranks."""
        yield self._rows(self._exchange.rank), self._part
        for sent in self._sent:  # the memory of `part` may be used again afterwards
            torch.cuda.current_stream().wait_event(sent)
        for first, end in spans:
            for peer in range(first, end):
                self._turn.await_(peer, READY)
            rows = slice(first * len(self._part), end * len(self._part))
            yield rows, self._whole[rows]


class Scattering:
    """The sum over ranks of [rows, width], computed piece by piece."""

    def __init__(self, exchange: PeerCopies, rows: int, width: int, like: torch.Tensor) -> None:
        self._exchange, self._shape = exchange, (exchange.size, rows // exchange.size, width)
        self._turn = exchange.begin("scatter", rows * width * like.element_size())
        self._addends = self._turn.slot(exchange.rank, self._shape, like.dtype)  # of all ranks, here
        self._spans = [(span, like.new_empty(span[1] - span[0], *self._shape[1:])) for span in exchange.spans]
        self._parts = {peer: parts[peer - span[0]] for span, parts in self._spans for peer in range(*span)}
        self._sent: list[torch.cuda.Event] = []

    def pieces(self) -> Pieces:
        """(rows of the whole, where to write them): other ranks' first, each sent while the next is computed."""
        rank, rows = self._exchange.rank, self._shape[1]
        if rows >= LEAST_ROWS:
            for peer in self._exchange.peers:
                yield slice(peer * rows, (peer + 1) * rows), self._parts[peer]
                self._send(peer)
        else:
            for (first, end), parts in self._spans:
                yield slice(first * rows, end * rows), parts.flatten(0, 1)
                for peer in self._exchange.peers:
                    if first <= peer < end:
                        self._send(peer)
        yield slice(rank * rows, (rank + 1) * rows), self._addends[rank]

    def _send(self, peer: int) -> None:
        place = self._turn.slot(peer, self._shape, self._addends.dtype)[self._exchange.rank]
        self._sent.append(self._turn.send(peer, self._parts[peer], place))

    def total(self) -> torch.Tensor:
        """This rank's part of the sum, [rows / ranks, width]."""
        for sent in self._sent:  # the memory of what was sent may be used again afterwards
            torch.cuda.current_stream().wait_event(sent)
        for peer in self._exchange.peers:
            self._turn.await_(peer, READY)
        if self._exchange.size == 2:
            return self._addends[0] + self._addends[1]
        return self._addends.sum(0)  # read once, and added in float32


def need_peers() -> None:
    """Raises whatever the packages or CUDA do on a rank that cannot; before any rank waits for another."""
    import torch.distributed._symmetric_memory
    from cuda.bindings import driver  # noqa: F401

    here = torch.cuda.current_device()
    peers = [each for each in range(torch.cuda.device_count()) if each != here]
    need("" if all(torch.cuda.can_device_access_peer(here, each) for each in peers) else "the GPUs are not linked")
    number = torch.zeros(1, dtype=torch.int32, device=_device())
    write_number(number.data_ptr(), 2)
    await_number(number.data_ptr(), 1)
    need("" if number.item() == 2 else "streams do not write numbers")


def unusable_reason(group: Any, width: int) -> str:
    """Why PeerCopies cannot be used in `group`; empty if it gathers and sums as torch.distributed does.

    A rank whose values are wrong goes on: the others wait for what it sends.
    """
    rank, size, wrong = dist.get_rank(group), dist.get_world_size(group), set[str]()
    exchange = PeerCopies(group)
    whole = torch.randn(size * PROBED, width, generator=torch.Generator().manual_seed(0)).to(_device(), torch.bfloat16)
    part = whole.chunk(size)[rank].contiguous()
    factor = sum(2.0**-each for each in range(size))
    for _ in range(2 * SLOTS):  # each slot twice
        gathering = exchange.gather(part)
        for rows, values in [*gathering.pieces(), *gathering.blocks()]:
            if not torch.equal(values, whole[rows]):
                wrong.add("gathered values are wrong")
        scattering = exchange.scatter(len(whole), width, whole)
        for rows, out in scattering.pieces():
            out.copy_(whole[rows] * 2.0**-rank)
        if not torch.allclose(scattering.total().float(), part.float() * factor, rtol=2**-6):
            wrong.add("sums are wrong")
    return ", ".join(sorted(wrong))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())
