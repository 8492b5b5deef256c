"""Verifies that a Hugging Face folder and a Megatron checkpoint hold the same weights, bit for bit.

This shares no code with the conversion: names, head order and sharding are written a second time
(independent_mapping.py), and files are read by other readers (independent_readers.py). Every Hugging Face element must
be found on the Megatron side, and every Megatron element must be one of them or vocabulary padding.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.checkpoint.formats.checkpoint_paths import Checkpoint
from common.checkpoint.formats.vocab_padding import VocabPadding
from common.checkpoint.io.crc32 import crc32
from common.checkpoint.io.direct_io import BLOCK_BYTES, prefetch
from common.checkpoint.io.lazy_tensor import all_finite, bitwise_equal, tensor_bytes
from common.checkpoint.verification.adapters import Deltas
from common.checkpoint.verification.independent_mapping import Slice, slices
from common.checkpoint.verification.independent_readers import (
    HfTensor,
    HfTensors,
    StoredTensor,
    num_bytes,
)
from common.checkpoint.verification.new_rows import GrownHfTensors
from common.checkpoint.verification.report import Report
from common.checkpoint.verification.shards import SKIPPED, Shard, checkpoint_shards, mean_shards
from common.model.shape.config import QwenConfig

NORMS = re.compile(r"norm\.weight$|layer_norm_weight$")  # replicated over TP ranks
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def verify(
    folder: Path,
    checkpoint: Checkpoint,
    qwen: QwenConfig,
    dtype: torch.dtype | None = None,
    *,
    from_megatron: bool = False,
    drop_rows: bool = False,
    earlier: Sequence[Checkpoint] = (),
    deltas: Deltas | None = None,
    new_rows: tuple[Mapping[int, Sequence[int]], int] | None = None,
) -> Report:
    """The comparison of the two sides; `dtype`: what the written side was cast to, if anything.

    from_megatron: only count norm weights of other TP ranks that differ from rank 0's. drop_rows: only count rows above
    `vocab_size` that hold values. earlier: checkpoints whose mean with `checkpoint` is compared. deltas: what was added
    to the weights of `checkpoint` as they were written. new_rows: of the vocabulary, each with those whose mean it is,
    and the number of all rows.
    """
    report, hf = Report(), GrownHfTensors(folder, *new_rows) if new_rows else HfTensors(folder)
    shards = mean_shards([checkpoint_shards(each, qwen) for each in (*earlier, checkpoint)])
    comparison = _Comparison(report, dtype, from_megatron, deltas)
    for block in prefetch(_blocks(shards, hf, qwen)):
        comparison.add(block)
    for name, padding in comparison.paddings.items():
        if padding.trained and drop_rows:
            report.dropped_rows += padding.num_rows
        elif padding.trained:
            report.errors.append(
                f"{name} has {padding.num_rows} rows above vocab_size={qwen.vocab_size} that hold values"
            )
    _add_hf_tensors(hf, qwen, comparison, checkpoint.path)
    return report


class _Comparison:
    """Compares block by block, and keeps track of what was found."""

    def __init__(
        self, report: Report, dtype: torch.dtype | None, from_megatron: bool, deltas: Deltas | None = None
    ) -> None:
        self.report, self._dtype, self._from_megatron, self._deltas = report, dtype, from_megatron, deltas
        self.found: Counter[str] = Counter()
        self.checksums: dict[str, _RowChecksum] = {}
        self.paddings: dict[str, VocabPadding] = {}
        self.tp = 1
        self._shard_checksum = _RowChecksum()
        self._differing: set[str] = set()  # messages, each reported once

    def add(self, block: "_Block") -> None:
        """Compares a block, or adds its shard to the report at the end of the shard."""
        shard = block.shard
        if block.values is None:
            self.report.megatron.append(
                _entry(shard.tensor, self._shard_checksum, shard.name, tensor_rank=shard.tp_rank)
            )
            self._shard_checksum, self.tp = _RowChecksum(), shard.tp
            return
        self._shard_checksum.add(block.row, block.values)
        if block.hf_slice is not None:
            self._compare(block, block.values, block.hf_slice)
        elif shard.name in VOCABULARY:
            self.paddings.setdefault(shard.name, VocabPadding()).add(block.values)
        else:
            excess = f"{len(block.values)} rows too many"
            self.report.errors.append(f"{shard.name} of TP rank {shard.tp_rank} has {excess}")

    def _compare(self, block: "_Block", values: Tensor, part: Slice) -> None:
        shard, source = block.shard, block.source
        if source is not None:
            self.found[part.name] += source.numel()
            if part.columns is None:
                self.checksums.setdefault(part.name, _RowChecksum()).add(block.source_row, source)
            self._count_cast_losses(values, source, part.name)
        self.report.non_finite += _non_finite(values if self._dtype is None else values.to(self._dtype))
        if self._agree(block, values, part):
            return
        message = f"{shard.name} of TP rank {shard.tp_rank} differs from {part.name}"
        if message in self._differing:
            return
        self._differing.add(message)
        if self._from_megatron and source is not None and shard.tp_rank and NORMS.search(shard.name):
            self.report.differing_replicas += 1
        else:
            self.report.errors.append(message)

    def _agree(self, block: "_Block", values: Tensor, part: Slice) -> bool:
        if self._deltas and block.source is not None:
            merged = self._deltas.agree(part.name, block.source_row, part.columns, values, block.source)
            if merged is not None:
                return merged
        return _same_values(values, block.source, self._dtype)

    def _count_cast_losses(self, values: Tensor, source: Tensor, name: str) -> None:
        """Counts values that the cast makes zero, and adds an error where it makes values infinite."""
        for before in (values, source):
            if self._dtype is None or before.dtype == self._dtype:
                continue
            after = before.to(self._dtype)
            self.report.made_zero += int(torch.count_nonzero(before) - torch.count_nonzero(after))
            infinite = _non_finite(after) - _non_finite(before)
            if infinite:
                dtype = str(self._dtype).removeprefix("torch.")
                self.report.errors.append(f"{name}: {infinite} values overflow {dtype}")


def _add_hf_tensors(hf: HfTensors, qwen: QwenConfig, comparison: _Comparison, path: Path) -> None:
    """Adds every Hugging Face tensor to the report, and an error for those with elements that were not found."""
    report, tied_head = comparison.report, {"lm_head.weight"} if qwen.tie_word_embeddings else set()
    for name in hf.names:
        if name in tied_head or SKIPPED.search(name):
            continue
        tensor = hf.tensor(name)
        report.hugging_face.append(_entry(tensor, comparison.checksums.get(name, _RowChecksum()), name))
        numel = torch.Size(tensor.shape).numel()
        report.num_tensors += 1
        report.num_bytes += num_bytes(tensor)
        expected = {comparison.tp * numel} if name.endswith("norm.weight") else {numel}  # norms are replicated
        if name == "model.embed_tokens.weight" and qwen.tie_word_embeddings:
            expected.add(2 * numel)  # the last stage's copy
        if comparison.found[name] not in expected:
            report.errors.append(f"{name}: {comparison.found[name]} of its {numel} elements are in {path}")


class _Block(NamedTuple):
    """Rows of a Megatron tensor, and of the Hugging Face tensor that they should equal, in memory."""

    shard: Shard
    values: Tensor | None  # None: the end of the shard
    row: int = 0  # of the shard
    hf_slice: Slice | None = None  # None: vocabulary padding
    source: Tensor | None = None  # None: Hugging Face has no such rows
    source_row: int = 0


def _blocks(shards: Iterable[Shard], hf: HfTensors, qwen: QwenConfig) -> Iterator[_Block]:
    """Every shard from its first row to its last, then a block that marks its end."""
    for shard in shards:
        covered, num_rows = 0, shard.tensor.shape[0]
        for part in slices(shard.name, shard.tp_rank, shard.tp, qwen, num_rows):
            part = part._replace(columns=part.columns if shard.tp > 1 else None)
            yield from _slice_blocks(shard, part, hf.get(part.name))
            covered += len(part.rows)
        for start, stop in _row_ranges(shard.tensor, covered, num_rows):
            yield _Block(shard, shard.tensor.rows(start, stop), start)
        yield _Block(shard, None)


def _slice_blocks(shard: Shard, part: Slice, source: HfTensor | None) -> Iterator[_Block]:
    """The rows of `part` on both sides; only Megatron's where the shapes differ."""
    tensor, first = shard.tensor, part.row
    last = min(part.row + len(part.rows), tensor.shape[0])
    fits = source is not None and last - first == len(part.rows) and part.rows.stop <= source.shape[0]
    width = () if source is None else source.shape[1:] if part.columns is None else (len(part.columns),)
    fits = fits and tensor.shape[1:] == width
    for start, stop in _row_ranges(tensor, first, last):
        source_row, source_rows = part.rows.start + start - first, None
        if fits and source is not None:
            source_rows = source.rows(source_row, source_row + stop - start, part.columns).contiguous()
        yield _Block(shard, tensor.rows(start, stop), start, part, source_rows, source_row)


def _row_ranges(tensor: StoredTensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) in ranges of a few megabytes."""
    step = max(1, BLOCK_BYTES // max(num_bytes(tensor) // max(tensor.shape[0], 1), 1))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


class _RowChecksum:
    """The CRC-32 of a tensor whose rows are added in order; rows that come again are ignored."""

    def __init__(self) -> None:
        self.value, self.num_rows = 0, 0

    def add(self, row: int, block: Tensor) -> None:
        """Adds the rows of `block`, which start at `row` of the tensor."""
        if row == self.num_rows:
            self.value = crc32(tensor_bytes(block), self.value)
            self.num_rows += len(block)


def _entry(tensor: StoredTensor, checksum: _RowChecksum, name: str, **more: int) -> dict[str, Any]:
    """The report's entry of a tensor, which is read again where `checksum` did not see all of its rows."""
    num_rows = tensor.shape[0]
    if checksum.num_rows != num_rows:
        checksum = _RowChecksum()
        for start, stop in _row_ranges(tensor, 0, num_rows):
            checksum.add(start, tensor.rows(start, stop))
    dtype = str(tensor.dtype).removeprefix("torch.")
    fields = {"shape": list(tensor.shape), "dtype": dtype, "bytes": num_bytes(tensor)}
    return {"name": name, **more, **fields, "crc32": f"{checksum.value:08x}"}


def _same_values(values: Tensor, source: Tensor | None, dtype: torch.dtype | None) -> bool:
    if source is None:
        return False
    if dtype is not None:
        values, source = values.to(dtype), source.to(dtype)
    return bitwise_equal(values, source)


def _non_finite(tensor: Tensor) -> int:
    """The number of NaN or infinite values."""
    return 0 if all_finite(tensor) else int((~torch.isfinite(tensor)).sum())
