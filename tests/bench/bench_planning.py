"""Planning a save of 1,024 ranks on one machine: Qwen2.5-72B at TP 8, PP 4, DP 32, with the optimizer.

    python -m tests.bench.bench_planning

No tensor is made: what each rank would write is worked out from the shapes as `state/shards.py` does it, then
what rank 0 does with all of it: receive the lists, build `.metadata`, pickle it. Reading it again is what each
rank does to resume.
"""

import json
import os
import pickle
import resource
import time
from math import prod

import torch

from common.checkpoint.formats.mapping import megatron_shape, param_mappings
from common.checkpoint.formats.torch_dist_writer import RankWriteResults, WriteResult, build_metadata
from common.checkpoint.io.chunks import Chunk, chunks_of_range
from common.model.shape.config import QwenConfig
from tests.bench.goodput import models

TP, PP, DP = 8, 4, 32
KINDS = {
    "": torch.bfloat16,
    **{f"optimizer.state.{name}.": torch.float32 for name in ("param", "exp_avg", "exp_avg_sq")},
}


def tensors(qwen: QwenConfig, tp: int, pp: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Chunk, bool]]:
    """Key, whole shape, this rank's flat shape, its place, and whether it is the rank that saves it."""
    layers = range(pp * qwen.num_hidden_layers // PP, (pp + 1) * qwen.num_hidden_layers // PP)
    found = []
    for row in param_mappings(qwen):
        if (row.stage == "first" and pp) or (row.stage == "last" and pp < PP - 1):
            continue
        full, part = megatron_shape(row, qwen), megatron_shape(row, qwen, TP)
        start = tuple(tp * size if axis == row.axis else 0 for axis, size in enumerate(part))
        saves = row.axis is not None or tp == 0
        if row.stage != "layer":
            found.append((row.te, full, part, Chunk(start, part), saves))
            continue
        key = row.te.replace("{i}.", "")
        shape = (qwen.num_hidden_layers, *full)
        for layer in layers:
            found.append((key, shape, part, Chunk((layer, *start), (1, *part)), saves))
    return found


def share(qwen: QwenConfig, tp: int, pp: int, dp: int, rank: int) -> RankWriteResults:
    """What the rank would write."""
    own = tensors(qwen, tp, pp)
    total = sum(prod(part) for _, _, part, _, _ in own)
    first, last = dp * total // DP, (dp + 1) * total // DP
    entries, position, begin, file = [], 0, 0, f"__{rank}_0.distcp"
    for key, shape, part, place, saves in own:
        start, end = max(first, begin) - begin, min(last, begin + prod(part)) - begin
        for block in chunks_of_range(part, start, end) if saves else []:
            stacked = place.offsets[: len(shape) - len(part)]
            offsets = (*stacked, *(a + b for a, b in zip(place.offsets[len(stacked) :], block.offsets, strict=True)))
            for prefix, dtype in KINDS.items():
                length = block.numel * dtype.itemsize + 1024
                sizes = (1,) * len(stacked) + block.sizes
                entries.append(WriteResult(prefix + key, file, position, length, dtype, shape, offsets, sizes))
                position += length
        begin += prod(part)
    return RankWriteResults(tuple(entries), {file: {"bytes": position, "crc32": 0}})


def main() -> None:
    """Prints a JSON line."""
    qwen = models()["72B"]
    began = time.monotonic()
    shares = [
        share(qwen, tp, pp, dp, (pp * DP + dp) * TP + tp) for pp in range(PP) for dp in range(DP) for tp in range(TP)
    ]
    planned = time.monotonic()
    sent = [pickle.dumps(each) for each in shares]
    received = [pickle.loads(each) for each in sent]
    listed = time.monotonic()
    content = pickle.dumps(build_metadata(received))
    made = time.monotonic()
    read = pickle.loads(content)
    entries = [len(each.results) for each in shares]
    print(
        json.dumps({
            "ranks": len(shares), "entries": sum(entries), "most_of_a_rank": max(entries),
            "files": sum(map(bool, entries)), "bytes_of_a_list": max(map(len, sent)),
            "ranks_plan_s": round(planned - began, 2),
            "of_one_rank_ms": round(1000 * (planned - began) / len(shares), 2),
            "lists_s": round(listed - planned, 2), "metadata_s": round(made - listed, 2),
            "metadata_mb": round(len(content) / 1e6, 1), "read_again_s": round(time.monotonic() - made, 2),
            "in_all_s": round(made - began, 2), "tensors": len(read.state_dict_metadata),
            "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), "cpus": os.cpu_count(),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
