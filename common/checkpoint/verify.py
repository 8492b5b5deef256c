"""Whether a Hugging Face folder and a Megatron checkpoint hold the same weights, bit for bit.

Nothing here is shared with what converts: names, order of heads and divisions are written down once more, from the
definition of each layout, and compared slice by slice. Every element of the Hugging Face side must be met on the
Megatron side, and every element of the Megatron side must be one of them, or in a row that pads the vocabulary.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.checkpoint.hf_folder import HfReader
from common.checkpoint.layout import MODEL_FILE, Checkpoint
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
    met: Counter[str] = Counter()
    shards = _dist_shards if checkpoint.format == "torch_dist" else _rank_shards
    tp = 1
    for shard in shards(checkpoint.path, qwen):
        _compare(shard, hf, qwen, dtype, met, report)
        report.megatron.append({"name": shard.name, "tensor_rank": shard.tp_rank, **_noted(shard.tensor)})
        tp = shard.tp
    tied_head = {"lm_head.weight"} if qwen.tie_word_embeddings else set()
    for name in sorted(set(hf.names) - tied_head):
        report.hugging_face.append({"name": name, **_noted(hf.tensor(name))})
        size = hf.tensor(name).numel()
        report.num_tensors += 1
        report.num_bytes += size * hf.dtype(name).itemsize
        wanted = {tp * size} if name.endswith("norm.weight") else {size}  # every tensor rank holds the norms
        if name == "model.embed_tokens.weight" and qwen.tie_word_embeddings:
            wanted.add(2 * size)  # the last stage's copy
        if met[name] not in wanted:
            report.errors.append(f"{name}: {met[name]} of its {size} elements are in {checkpoint.path}")
    return report


def _compare(
    shard: Shard, hf: HfReader, qwen: QwenConfig, dtype: torch.dtype | None, met: Counter[str], report: Report
) -> None:
    covered = 0
    for piece in slices(shard.name, shard.tp_rank, shard.tp, qwen, shard.tensor.shape[0]):
        source = hf.tensor(piece.name)[piece.rows.start : piece.rows.stop]
        if piece.columns is not None:
            source = source[:, piece.columns.start : piece.columns.stop]
        mine = shard.tensor[piece.row : piece.row + len(piece.rows)]
        if mine.shape != source.shape or not _same_bits(mine, source, dtype):
            report.errors.append(f"{shard.name} of tensor rank {shard.tp_rank} differs from {piece.name}")
        report.non_finite += _non_finite(mine if dtype is None else mine.to(dtype))
        met[piece.name] += source.numel()
        covered += len(piece.rows)
    padding = shard.tensor[covered:]
    if padding.numel() and (shard.name not in ("embedding.word_embeddings.weight", "output_layer.weight")):
        report.errors.append(f"{shard.name} of tensor rank {shard.tp_rank} has {padding.shape[0]} rows too many")


def _same_bits(mine: Tensor, source: Tensor, dtype: torch.dtype | None) -> bool:
    if dtype is not None:
        mine, source = mine.to(dtype), source.to(dtype)
    if mine.dtype != source.dtype:
        return False
    words = torch.int32 if mine.dtype == torch.float32 else torch.int16
    return torch.equal(mine.view(words), source.view(words))


def _noted(tensor: Tensor) -> dict[str, Any]:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    told = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "bytes": data.nbytes}
    return {**told, "crc32": f"{zlib.crc32(data):08x}"}


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
    for tp_rank in range(tp):
        files = [load_rank_file(ranks[tp_rank, stage] / MODEL_FILE) for stage in range(pp)]
        names = [key for key in files[0] if re.fullmatch(r"model\d*", key)]
        chunks = sorted(names, key=lambda name: (len(name), name))  # model2 before model10
        before = 0
        for chunk in chunks:
            for file in files:
                state = {name: value for name, value in file[chunk].items() if not IGNORED.search(name)}
                numbers = [int(found[1]) for name in state if (found := re.match(r"decoder\.layers\.(\d+)\.", name))]
                for name, tensor in state.items():
                    yield Shard(_numbered(name, before), tp_rank, tp, tensor)
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
