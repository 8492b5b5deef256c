"""Whether a Hugging Face folder and a Megatron checkpoint hold the same weights, bit for bit.

Nothing here is shared with what converts: names, order of heads and divisions are written down once more
(proof_slices.py), and files are read by other ways (proof_files.py). Every element of the Hugging Face side must be met
on the Megatron side, and every element of the Megatron side must be one of them, or in a row that pads the vocabulary.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.checkpoint.formats.layout import MODEL_FILE, Checkpoint
from common.checkpoint.formats.vocabulary import Padding
from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.disk import BLOCK_BYTES, ahead
from common.checkpoint.io.lazy import all_finite, same_bits, tensor_bytes
from common.checkpoint.verification.proof_files import DistTensors, HfTensor, HfTensors, Stored, num_bytes, rank_state
from common.checkpoint.verification.proof_slices import Slice, slices
from common.model.shape.config import QwenConfig


class Shard(NamedTuple):
    """A Megatron tensor of a file: which part of the model it is."""

    name: str  # with the layer's number in the whole model
    tp_rank: int
    tp: int
    tensor: Stored


@dataclass
class Report:
    """What was compared."""

    num_tensors: int = 0
    num_bytes: int = 0
    non_finite: int = 0
    made_zero: int = 0  # values that are not zero, and are by the cast
    other_copies: int = 0  # of norms, by tensor ranks that hold another than rank 0
    dropped_rows: int = 0  # above vocab_size, that hold values
    errors: list[str] = field(default_factory=list)
    hugging_face: list[dict[str, Any]] = field(default_factory=list)  # every tensor, with its checksum
    megatron: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        """The report in one line."""
        told = f"{self.num_tensors} tensors, {self.num_bytes / 1e9:.2f} GB: "
        told += "all bits agree" if not self.errors else f"{len(self.errors)} differences"
        counted = {
            "values are NaN or infinite": self.non_finite,
            "values became zero by the cast": self.made_zero,
            "copies of norms differ from rank 0's, which was taken": self.other_copies,
            "rows above vocab_size were left out": self.dropped_rows,
        }
        return told + "".join(f"; {number} {what}" for what, number in counted.items() if number)


NORMS = re.compile(r"norm\.weight$|layer_norm_weight$")  # which every tensor rank holds whole
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
IGNORED = re.compile(r"(^|\.)_extra_state(\d+|/.*)?$|\.rotary_(pos_)?emb\.inv_freq$|^rotary_pos_emb\.inv_freq$")
OTHERS = re.compile(r"^((chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine_state|opt_param_scheduler)")


def verify(
    folder: Path,
    checkpoint: Checkpoint,
    qwen: QwenConfig,
    dtype: torch.dtype | None = None,
    *,
    from_megatron: bool = False,
    drop_rows: bool = False,
) -> Report:
    """The comparison of the two sides; `dtype`: what the side that was written was cast to, if it was.

    from_megatron: norms are rank 0's, and copies of other tensor ranks that differ are counted only. drop_rows: so are
    rows above `vocab_size` that hold values.
    """
    report, hf = Report(), HfTensors(folder)
    shards = _dist_shards if checkpoint.format == "torch_dist" else _rank_shards
    proof = _Proof(report, dtype, from_megatron)
    for block in ahead(_blocks(shards(checkpoint.path, qwen), hf, qwen)):
        proof.take(block)
    for name, padding in proof.paddings.items():
        if padding.trained and drop_rows:
            report.dropped_rows += padding.rows
        elif padding.trained:
            report.errors.append(f"{name} has {padding.rows} rows above vocab_size={qwen.vocab_size} that hold values")
    _account(hf, qwen, proof, checkpoint.path)
    return report


class _Proof:
    """What was seen so far, block by block."""

    def __init__(self, report: Report, dtype: torch.dtype | None, from_megatron: bool) -> None:
        self.report, self._dtype, self._from_megatron = report, dtype, from_megatron
        self.met: Counter[str] = Counter()
        self.checksums: dict[str, _Checksum] = {}
        self.paddings: dict[str, Padding] = {}
        self.tp = 1
        self._mine = _Checksum()
        self._differing: set[str] = set()  # what was said of a tensor, once

    def take(self, block: "_Block") -> None:
        """Compares a block, and notes its shard when that has ended."""
        shard = block.shard
        if block.mine is None:
            self.report.megatron.append(_noted(shard.tensor, self._mine, shard.name, tensor_rank=shard.tp_rank))
            self._mine, self.tp = _Checksum(), shard.tp
            return
        self._mine.add(block.row, block.mine)
        if block.piece is not None:
            self._compare(block, block.mine, block.piece)
        elif shard.name in VOCABULARY:
            self.paddings.setdefault(shard.name, Padding()).add(block.mine)
        else:
            told = f"{len(block.mine)} rows too many"
            self.report.errors.append(f"{shard.name} of tensor rank {shard.tp_rank} has {told}")

    def _compare(self, block: "_Block", mine: Tensor, piece: Slice) -> None:
        shard, source = block.shard, block.source
        if source is not None:
            self.met[piece.name] += source.numel()
            if piece.columns is None:
                self.checksums.setdefault(piece.name, _Checksum()).add(block.source_row, source)
            self._count_lost(mine, source, piece.name)
        self.report.non_finite += _non_finite(mine if self._dtype is None else mine.to(self._dtype))
        if _same_bits(mine, source, self._dtype):
            return
        told = f"{shard.name} of tensor rank {shard.tp_rank} differs from {piece.name}"
        if told in self._differing:
            return
        self._differing.add(told)
        if self._from_megatron and source is not None and shard.tp_rank and NORMS.search(shard.name):
            self.report.other_copies += 1
        else:
            self.report.errors.append(told)

    def _count_lost(self, mine: Tensor, source: Tensor, name: str) -> None:
        """Counts what the cast made zero, and notes an error where it made values infinite."""
        for before in (mine, source):
            if self._dtype is None or before.dtype == self._dtype:
                continue
            after = before.to(self._dtype)
            self.report.made_zero += int(torch.count_nonzero(before) - torch.count_nonzero(after))
            infinite = _non_finite(after) - _non_finite(before)
            if infinite:
                kind = str(self._dtype).removeprefix("torch.")
                self.report.errors.append(f"{name}: {infinite} values are beyond {kind} and became infinite")


def _account(hf: HfTensors, qwen: QwenConfig, proof: _Proof, where: Path) -> None:
    """Notes every Hugging Face tensor, and those of which not every element was met."""
    report, tied_head = proof.report, {"lm_head.weight"} if qwen.tie_word_embeddings else set()
    for name in hf.names:
        if name in tied_head or IGNORED.search(name):
            continue
        tensor = hf.tensor(name)
        report.hugging_face.append(_noted(tensor, proof.checksums.get(name, _Checksum()), name))
        size = torch.Size(tensor.shape).numel()
        report.num_tensors += 1
        report.num_bytes += num_bytes(tensor)
        wanted = {proof.tp * size} if name.endswith("norm.weight") else {size}  # every tensor rank holds the norms
        if name == "model.embed_tokens.weight" and qwen.tie_word_embeddings:
            wanted.add(2 * size)  # the last stage's copy
        if proof.met[name] not in wanted:
            report.errors.append(f"{name}: {proof.met[name]} of its {size} elements are in {where}")


class _Block(NamedTuple):
    """Rows of a Megatron tensor and of the Hugging Face tensor that they should be, in memory."""

    shard: Shard
    mine: Tensor | None  # None: this was all of the shard
    row: int = 0  # of the shard
    piece: Slice | None = None  # None: rows that pad the vocabulary
    source: Tensor | None = None  # None: it has no such rows
    source_row: int = 0


def _blocks(shards: Iterable[Shard], hf: HfTensors, qwen: QwenConfig) -> Iterator[_Block]:
    """Every shard from its first row to its last, then that it ended."""
    for shard in shards:
        covered, rows = 0, shard.tensor.shape[0]
        for piece in slices(shard.name, shard.tp_rank, shard.tp, qwen, rows):
            piece = piece._replace(columns=piece.columns if shard.tp > 1 else None)
            yield from _pairs(shard, piece, hf.get(piece.name))
            covered += len(piece.rows)
        for start, stop in _row_blocks(shard.tensor, covered, rows):
            yield _Block(shard, shard.tensor.rows(start, stop), start)
        yield _Block(shard, None)


def _pairs(shard: Shard, piece: Slice, source: HfTensor | None) -> Iterator[_Block]:
    """The rows of `piece` on both sides; those of Megatron's alone where the shapes are not the same."""
    mine, first = shard.tensor, piece.row
    last = min(piece.row + len(piece.rows), mine.shape[0])
    fits = source is not None and last - first == len(piece.rows) and piece.rows.stop <= source.shape[0]
    width = () if source is None else source.shape[1:] if piece.columns is None else (len(piece.columns),)
    fits = fits and mine.shape[1:] == width
    for start, stop in _row_blocks(mine, first, last):
        at, its = piece.rows.start + start - first, None
        if fits and source is not None:
            its = source.rows(at, at + stop - start, piece.columns).contiguous()
        yield _Block(shard, mine.rows(start, stop), start, piece, its, at)


def _row_blocks(tensor: Stored, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in parts of a few megabytes."""
    step = max(1, BLOCK_BYTES // max(num_bytes(tensor) // max(tensor.shape[0], 1), 1))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


class _Checksum:
    """The CRC-32 of a tensor whose rows come in their order; what comes again is passed over."""

    def __init__(self) -> None:
        self.value, self.rows = 0, 0

    def add(self, row: int, block: Tensor) -> None:
        """Takes the rows of `block`, the first of which is the tensor's number `row`."""
        if row == self.rows:
            self.value = crc32(tensor_bytes(block), self.value)
            self.rows += len(block)


def _noted(tensor: Stored, checksum: _Checksum, name: str, **more: int) -> dict[str, Any]:
    """What a report tells of a tensor; it is read once more where not all rows of it went by."""
    rows = tensor.shape[0]
    if checksum.rows != rows:
        checksum = _Checksum()
        for start, stop in _row_blocks(tensor, 0, rows):
            checksum.add(start, tensor.rows(start, stop))
    kind = str(tensor.dtype).removeprefix("torch.")
    told = {"shape": list(tensor.shape), "dtype": kind, "bytes": num_bytes(tensor)}
    return {"name": name, **more, **told, "crc32": f"{checksum.value:08x}"}


def _same_bits(mine: Tensor, source: Tensor | None, dtype: torch.dtype | None) -> bool:
    if source is None:
        return False
    if dtype is not None:
        mine, source = mine.to(dtype), source.to(dtype)
    return same_bits(mine, source)


def _non_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    return 0 if all_finite(tensor) else int((~torch.isfinite(tensor)).sum())


def _rank_shards(path: Path, qwen: QwenConfig) -> Iterator[Shard]:
    """Every tensor of every rank's file, its layer numbered over the whole model."""
    ranks = {}
    for folder in path.glob("mp_rank_*"):
        tp_rank, stage = (int(word) for word in f"{folder.name}_0".split("_")[2:4])
        ranks[tp_rank, stage] = folder
    tp, pp = (1 + max(numbers) for numbers in zip(*ranks, strict=True))
    files = {rank: rank_state(folder / MODEL_FILE) for rank, folder in ranks.items()}
    names = [key for key in files[0, 0] if re.fullmatch(r"model\d*", key)]
    before = 0
    for chunk in sorted(names, key=lambda name: (len(name), name)):  # model2 before model10
        for stage in range(pp):
            states = [files[tp_rank, stage][chunk] for tp_rank in range(tp)]
            held = dict.fromkeys(name for state in states for name in state if not IGNORED.search(name))
            for name, (tp_rank, state) in itertools.product(held, enumerate(states)):
                if name in state:
                    yield Shard(_numbered(name, before), tp_rank, tp, state[name])
            numbers = [int(found[1]) for name in held if (found := re.match(r"decoder\.layers\.(\d+)\.", name))]
            before += 1 + max(numbers, default=-1)


def _numbered(name: str, before: int) -> str:
    """The name with `before` added to its layer's number."""
    return re.sub(r"^(decoder\.layers\.)(\d+)", lambda found: found[1] + str(int(found[2]) + before), name)


def _dist_shards(path: Path, qwen: QwenConfig) -> Iterator[Shard]:
    """Every weight of a torch_dist checkpoint, whole, one a layer."""
    files = DistTensors(path)
    for key in files.entries:
        if IGNORED.search(key) or OTHERS.search(key):
            continue
        stacked = re.fullmatch(r"decoder\.layers\.(\D.*)", key)
        if stacked is None:
            yield Shard(key, 0, 1, files.tensor(key))
            continue
        for layer in range(qwen.num_hidden_layers):
            yield Shard(f"decoder.layers.{layer}.{stacked[1]}", 0, 1, files.tensor(key, layer))
