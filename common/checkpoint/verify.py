"""Whether a Hugging Face folder and a Megatron checkpoint hold the same weights, bit for bit.

Nothing here is shared with what converts: names, order of heads and divisions are written down once more, from the
definition of each layout, and compared slice by slice. Every element of the Hugging Face side must be met on the
Megatron side, and every element of the Megatron side must be one of them, or in a row that pads the vocabulary.
"""

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.checkpoint.disk import ahead, load
from common.checkpoint.hf_folder import HfReader
from common.checkpoint.layout import MODEL_FILE, Checkpoint
from common.checkpoint.lazy import in_rows, same_bits, tensor_bytes
from common.checkpoint.torch_dist import DistReader
from common.checkpoint.torch_format import load_rank_file
from common.model.config import QwenConfig


class Slice(NamedTuple):
    """Rows (and columns) of a Hugging Face tensor that lie at `row` of a Megatron tensor."""

    name: str
    rows: range
    columns: range | None  # None: all
    row: int


class Shard(NamedTuple):
    """A Megatron tensor of a file: which part of the model it is."""

    name: str  # with the layer's number in the whole model
    tp_rank: int
    tp: int
    tensor: Tensor


@dataclass
class Report:
    """What was compared."""

    num_tensors: int = 0
    num_bytes: int = 0
    non_finite: int = 0
    errors: list[str] = field(default_factory=list)
    hugging_face: list[dict[str, Any]] = field(default_factory=list)  # every tensor, with its checksum
    megatron: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        """The report in one line."""
        told = f"{self.num_tensors} tensors, {self.num_bytes / 1e9:.2f} GB: "
        told += "all bits agree" if not self.errors else f"{len(self.errors)} differences"
        return told + (f"; {self.non_finite} values are NaN or infinite" if self.non_finite else "")


HF_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
HEAD_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")  # of one head's size
COLUMNS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")  # divided by columns
OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
IGNORED = re.compile(r"_extra_state|inv_freq")


def verify(folder: Path, checkpoint: Checkpoint, qwen: QwenConfig, dtype: torch.dtype | None = None) -> Report:
    """The comparison of the two sides; `dtype`: what the side that was written was cast to, if it was."""
    report, hf = Report(), HfReader(folder)
    shards = _dist_shards if checkpoint.format == "torch_dist" else _rank_shards
    met: Counter[str] = Counter()
    checksums: dict[str, _Checksum] = {}
    mine, tp = _Checksum(), 1
    for block in ahead(_blocks(shards(checkpoint.path, qwen), hf, qwen, checksums)):
        if block.mine is None:
            report.megatron.append(_noted(block.shard.tensor, mine, block.shard.name, tensor_rank=block.shard.tp_rank))
            mine, tp = _Checksum(), block.shard.tp
            continue
        mine.add(block.row, block.mine)
        if block.piece is None:
            if block.shard.name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
                told = f"{len(block.mine)} rows too many"
                report.errors.append(f"{block.shard.name} of tensor rank {block.shard.tp_rank} has {told}")
            continue
        if block.source is not None:
            met[block.piece.name] += block.source.numel()
            if block.piece.columns is None:
                checksums.setdefault(block.piece.name, _Checksum()).add(block.source_row, block.source)
        told = f"{block.shard.name} of tensor rank {block.shard.tp_rank} differs from {block.piece.name}"
        if told not in report.errors and not _same_bits(block.mine, block.source, dtype):
            report.errors.append(told)
        report.non_finite += _non_finite(block.mine if dtype is None else block.mine.to(dtype))
    _account(hf, qwen, tp, met, checksums, report, checkpoint.path)
    return report


def _account(
    hf: HfReader,
    qwen: QwenConfig,
    tp: int,
    met: Counter[str],
    checksums: dict[str, "_Checksum"],
    report: Report,
    where: Path,
) -> None:
    """Notes every Hugging Face tensor, and those of which not every element was met."""
    tied_head = {"lm_head.weight"} if qwen.tie_word_embeddings else set()
    for name in sorted(set(hf.names) - tied_head):
        tensor = hf.tensor(name)
        report.hugging_face.append(_noted(tensor, checksums.get(name, _Checksum()), name))
        size = tensor.numel()
        report.num_tensors += 1
        report.num_bytes += size * tensor.element_size()
        wanted = {tp * size} if name.endswith("norm.weight") else {size}  # every tensor rank holds the norms
        if name == "model.embed_tokens.weight" and qwen.tie_word_embeddings:
            wanted.add(2 * size)  # the last stage's copy
        if met[name] not in wanted:
            report.errors.append(f"{name}: {met[name]} of its {size} elements are in {where}")


class _Block(NamedTuple):
    """Rows of a Megatron tensor and of the Hugging Face tensor that they should be, in memory."""

    shard: Shard
    mine: Tensor | None  # None: this was all of the shard
    row: int = 0  # of the shard
    piece: Slice | None = None  # None: rows that pad the vocabulary
    source: Tensor | None = None  # None: it has no such rows
    source_row: int = 0


def _blocks(
    shards: Iterable[Shard], hf: HfReader, qwen: QwenConfig, checksums: dict[str, "_Checksum"]
) -> Iterator[_Block]:
    """Every shard from its first row to its last, then that it ended."""

    @lru_cache(maxsize=1)  # tensor ranks take columns of one in turn
    def whole(name: str) -> Tensor:
        tensor = load(hf.tensor(name))
        checksums.setdefault(name, _Checksum()).add(0, tensor)
        return tensor

    for shard in shards:
        covered = 0
        for piece in slices(shard.name, shard.tp_rank, shard.tp, qwen, shard.tensor.shape[0]):
            piece = piece._replace(columns=piece.columns if shard.tp > 1 else None)
            source = hf.tensor(piece.name) if piece.columns is None else whole(piece.name)
            source = source[piece.rows.start : piece.rows.stop]
            if piece.columns is not None:
                source = source[:, piece.columns.start : piece.columns.stop]
            mine = shard.tensor[piece.row : piece.row + len(piece.rows)]
            at = piece.row, piece.rows.start
            for pair in in_rows([mine, source] if mine.shape == source.shape else [mine]):
                loaded = [load(part) for part in pair]
                yield _Block(shard, loaded[0], at[0], piece, loaded[1] if len(loaded) > 1 else None, at[1])
                at = at[0] + len(loaded[0]), at[1] + len(loaded[0])
            covered += len(piece.rows)
        for (padding,) in in_rows([shard.tensor[covered:]]):
            yield _Block(shard, load(padding), covered)
            covered += len(padding)
        yield _Block(shard, None)


class _Checksum:
    """The CRC-32 of a tensor whose rows come in their order; what comes again is passed over."""

    def __init__(self) -> None:
        self.value, self.rows = 0, 0

    def add(self, row: int, block: Tensor) -> None:
        """Takes the rows of `block`, the first of which is the tensor's number `row`."""
        if row == self.rows:
            self.value = zlib.crc32(tensor_bytes(block), self.value)
            self.rows += len(block)


def _noted(tensor: Tensor, checksum: _Checksum, name: str, **more: int) -> dict[str, Any]:
    """What a report tells of a tensor; it is read once more where not all rows of it went by."""
    if checksum.rows != len(tensor):
        checksum = _Checksum()
        for (rows,) in in_rows([tensor]):
            checksum.add(checksum.rows, load(rows))
    told = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "bytes": tensor.nbytes}
    return {"name": name, **more, **told, "crc32": f"{checksum.value:08x}"}


def _same_bits(mine: Tensor, source: Tensor | None, dtype: torch.dtype | None) -> bool:
    if source is None:
        return False
    if dtype is not None:
        mine, source = mine.to(dtype), source.to(dtype)
    return same_bits(mine, source)


def _non_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite; aminmax, which passes NaN on, sees none far faster than they are counted."""
    if not tensor.numel() or all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def slices(name: str, tp_rank: int, tp: int, qwen: QwenConfig, num_rows: int) -> Iterator[Slice]:
    """Which Hugging Face rows a Megatron tensor of `num_rows` rows holds, in its own order."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
    if found is None:
        hf_name = OUTSIDE[name]
        if name == "decoder.final_layernorm.weight":
            yield Slice(hf_name, range(qwen.hidden_size), None, 0)
            return
        if name == "output_layer.weight" and qwen.tie_word_embeddings:
            hf_name = "model.embed_tokens.weight"
        first = tp_rank * num_rows
        yield Slice(hf_name, range(first, min(first + num_rows, qwen.vocab_size)), None, 0)
        return
    prefix, kind = f"model.layers.{found[1]}.", found[2]
    if kind.startswith("self_attention.linear_qkv.") and kind not in HF_LAYER:
        yield from _attention(f"{prefix}self_attn.", kind.rsplit(".", 1)[-1], tp_rank, tp, qwen)
    elif kind == "mlp.linear_fc1.weight":
        size = qwen.intermediate_size // tp
        for i, part in enumerate(("gate", "up")):
            yield Slice(f"{prefix}mlp.{part}_proj.weight", range(tp_rank * size, (tp_rank + 1) * size), None, i * size)
    elif kind in COLUMNS:
        width = qwen.num_attention_heads * qwen.head_dim if "proj" in kind else qwen.intermediate_size
        columns = range(tp_rank * width // tp, (tp_rank + 1) * width // tp)
        yield Slice(prefix + HF_LAYER[kind], range(qwen.hidden_size), columns, 0)
    else:
        size = qwen.head_dim if kind in HEAD_NORMS else qwen.hidden_size
        yield Slice(prefix + HF_LAYER[kind], range(size), None, 0)


def _attention(prefix: str, kind: str, tp_rank: int, tp: int, qwen: QwenConfig) -> Iterator[Slice]:
    """For each group of this rank: the heads of its queries, its key head, its value head."""
    heads_a_group = qwen.num_attention_heads // qwen.num_key_value_heads
    groups = qwen.num_key_value_heads // tp
    row = 0
    for group in range(tp_rank * groups, (tp_rank + 1) * groups):
        for part, first_head, heads in (("q", group * heads_a_group, heads_a_group), ("k", group, 1), ("v", group, 1)):
            rows = range(first_head * qwen.head_dim, (first_head + heads) * qwen.head_dim)
            yield Slice(f"{prefix}{part}_proj.{kind}", rows, None, row)
            row += len(rows)


def _rank_shards(path: Path, qwen: QwenConfig) -> Iterator[Shard]:
    """Every tensor of every rank's file, its layer numbered over the whole model."""
    ranks = {}
    for folder in path.glob("mp_rank_*"):
        tp_rank, stage = (int(word) for word in f"{folder.name}_0".split("_")[2:4])
        ranks[tp_rank, stage] = folder
    tp, pp = (1 + max(numbers) for numbers in zip(*ranks, strict=True))
    files = {rank: load_rank_file(folder / MODEL_FILE) for rank, folder in ranks.items()}
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
    reader = DistReader(path)
    for key in reader.tensors:
        if IGNORED.search(key) or not key.startswith(("embedding.", "decoder.", "output_layer.")):
            continue
        stacked = re.fullmatch(r"decoder\.layers\.(\D.*)", key)
        if stacked is None:
            yield Shard(key, 0, 1, reader.read(key))
            continue
        for layer in range(qwen.num_hidden_layers):
            yield Shard(f"decoder.layers.{layer}.{stacked[1]}", 0, 1, reader.read(key, layer))
