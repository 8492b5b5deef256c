"""`--plan`: the target of every tensor, the bytes of each file, time and memory. Reads no weights."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from common.checkpoint.conversion.state_dict_adapter import MegatronTensors, hf_shapes, torch_dist_shards
from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, RELEASE, rank_dir_name
from common.checkpoint.formats.hf_folder import INDEX, plan_shards, read_index, shard_names
from common.checkpoint.formats.mapping import check_names
from common.checkpoint.formats.parallel_layout import ParallelLayout, chunk_tensors, model_chunks
from common.checkpoint.formats.torch_dist_writer import DATA_FILE
from common.checkpoint.io.direct_io import BLOCK_BYTES
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.model.shape.config import QwenConfig

DISK_BYTES_PER_SECOND = 1e9
BASE_MEMORY_BYTES = 400 << 20  # a process with torch imported, and the blocks in flight


class ExpectedFolder:
    """The tensors that config.json describes; takes the place of HfReader when there are no weights.

    Raises KitError when the folder's index names others.
    """

    def __init__(self, folder: Path, qwen: QwenConfig, dtype: torch.dtype) -> None:
        self.folder, self._dtype = folder, dtype
        if (folder / INDEX).is_file():
            tied_head = {"lm_head.weight"} if qwen.tie_word_embeddings else set()
            check_names(set(read_index(folder / INDEX)) - tied_head, hf_shapes(qwen), str(folder))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in config.json."""
        return self._dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Never called: a plan reads no weights."""
        raise AssertionError(name)


def plan_torch(source: MegatronTensors, layout: ParallelLayout) -> Iterator[str]:
    """The plan of a conversion to torch format, line by line."""
    files: dict[str, list[LazyTensor]] = {}
    in_memory = 0  # a tensor sharded by columns is kept for all TP ranks
    for pp_rank in range(layout.pp):
        for tp_rank in range(layout.tp):
            file = f"{RELEASE}/{rank_dir_name(tp_rank, pp_rank, layout.pp)}/{MODEL_FILE}"
            files[file] = []
            for chunk in (chunk for chunk in model_chunks(source.qwen, layout) if chunk.pp_rank == pp_rank):
                for each in chunk_tensors(source.qwen, layout, chunk):
                    tensor = source.tensor(each.mapping, each.layer, tp_rank, layout.tp)
                    files[file].append(tensor)
                    if each.mapping.axis == 1 and layout.tp > 1:
                        in_memory = max(in_memory, tensor.num_bytes * layout.tp)
                    names = " + ".join(each.mapping.hf_names(each.layer))
                    yield f"{names}  ->  {file}  {chunk.key}/{each.name}  {_describe(tensor)}"
    yield from _totals(files, in_memory + layout.tp * 2 * BLOCK_BYTES)


def plan_torch_dist(source: MegatronTensors) -> Iterator[str]:
    """The plan of a conversion to torch_dist, line by line."""
    file = f"{RELEASE}/{DATA_FILE}"
    shards = list(torch_dist_shards(source))
    for shard in shards:
        layer = f"[{shard.global_offset[0]}]" if shard.global_shape != shard.tensor.shape else ""
        yield f"{file}  {shard.key}{layer}  {_describe(shard.tensor)}"
    yield from _totals({file: [shard.tensor for shard in shards]})


def plan_hf(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> Iterator[str]:
    """The plan of a conversion to Hugging Face format, line by line."""
    shards = plan_shards(tensors, max_shard_bytes)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    for file, names in files.items():
        for name in names:
            yield f"{file}  {name}  {_describe(tensors[name])}"
    yield from _totals({file: [tensors[name] for name in names] for file, names in files.items()})


def _describe(tensor: LazyTensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.num_bytes:,} bytes"


def _totals(files: Mapping[str, Iterable[LazyTensor]], memory_bytes: int = 0) -> Iterator[str]:
    sizes = {file: [tensor.num_bytes for tensor in tensors] for file, tensors in files.items()}
    for file, each in sizes.items():
        yield f"{file}: {len(each)} tensors, {sum(each):,} bytes"
    total, count = sum(map(sum, sizes.values())), sum(map(len, sizes.values()))
    seconds = 2 * total / DISK_BYTES_PER_SECOND
    yield f"total: {count} tensors, {total:,} bytes in {len(files)} files"
    yield (
        f"time: about {seconds:.0f} s to read and write at {DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s, and as long again"
        f" to verify; memory: up to {(BASE_MEMORY_BYTES + memory_bytes) / 2**30:.1f} GiB"
    )
