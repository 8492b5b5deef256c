"""What a conversion will do: where every tensor goes, the bytes of each file, time and memory. No weight is read."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from common.checkpoint.conversion.state_dict_adapter import Source, dist_blocks, hf_shapes
from common.checkpoint.formats.checkpoint_paths import MODEL_FILE, RELEASE, rank_dir_name
from common.checkpoint.formats.hf_folder import INDEX, plan_shards, read_index, shard_names
from common.checkpoint.formats.mapping import check_names
from common.checkpoint.formats.parallel_layout import ParallelLayout, chunks_of, tensors_of
from common.checkpoint.formats.torch_dist_writer import DATA_FILE
from common.checkpoint.io.disk import BLOCK_BYTES
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.model.shape.config import QwenConfig

DISK_BYTES_PER_SECOND = 1e9
BASE_MEMORY_BYTES = 400 << 20  # of a process that has imported torch, with the blocks on their way


class ExpectedFolder:
    """The tensors that a Hugging Face folder of this config must hold, in place of its HfReader; without its weights.

    Raises KitError when its index names others.
    """

    def __init__(self, folder: Path, qwen: QwenConfig, dtype: torch.dtype) -> None:
        self.folder, self._dtype = folder, dtype
        if (folder / INDEX).is_file():
            tied_head = {"lm_head.weight"} if qwen.tie_word_embeddings else set()
            check_names(set(read_index(folder / INDEX)) - tied_head, hf_shapes(qwen), str(folder))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that config.json tells."""
        return self._dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Nothing: a plan reads no weights."""
        raise AssertionError(name)


def plan_ranks(source: Source, layout: ParallelLayout) -> Iterator[str]:
    """The lines of a conversion to torch format."""
    files: dict[str, list[LazyTensor]] = {}
    at_once = 0  # what is divided by columns is held for all tensor ranks
    for pp_rank in range(layout.pp):
        for tp_rank in range(layout.tp):
            file = f"{RELEASE}/{rank_dir_name(tp_rank, pp_rank, layout.pp)}/{MODEL_FILE}"
            files[file] = []
            for chunk in chunks_of(source.qwen, layout):
                if chunk.pp_rank != pp_rank:
                    continue
                for placed in tensors_of(source.qwen, layout, chunk):
                    tensor = source.megatron(placed.row, placed.layer, tp_rank, layout.tp)
                    files[file].append(tensor)
                    if placed.row.axis == 1 and layout.tp > 1:
                        at_once = max(at_once, tensor.num_bytes * layout.tp)
                    yield _line(placed.row.hf_names(placed.layer), file, f"{chunk.key}/{placed.name}", tensor)
    yield from _totals(files, at_once + layout.tp * 2 * BLOCK_BYTES)


def plan_dist(source: Source) -> Iterator[str]:
    """The lines of a conversion to torch_dist."""
    file = f"{RELEASE}/{DATA_FILE}"
    blocks = list(dist_blocks(source))
    for block in blocks:
        at = f"[{block.offsets[0]}]" if block.global_shape != block.tensor.shape else ""
        yield f"{file}  {block.key}{at}  {_shown(block.tensor)}"
    yield from _totals({file: [block.tensor for block in blocks]})


def plan_hf(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> Iterator[str]:
    """The lines of a conversion to Hugging Face's format."""
    shards = plan_shards(tensors, max_shard_bytes)
    files = dict(zip(shard_names(len(shards)), shards, strict=True))
    for file, names in files.items():
        for name in names:
            yield f"{file}  {name}  {_shown(tensors[name])}"
    yield from _totals({file: [tensors[name] for name in names] for file, names in files.items()})


def _line(sources: tuple[str, ...], file: str, name: str, tensor: LazyTensor) -> str:
    return f"{' + '.join(sources)}  ->  {file}  {name}  {_shown(tensor)}"


def _shown(tensor: LazyTensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.num_bytes:,} bytes"


def _totals(files: Mapping[str, Iterable[LazyTensor]], memory_bytes: int = 0) -> Iterator[str]:
    sizes = {file: [tensor.num_bytes for tensor in tensors] for file, tensors in files.items()}
    for file, each in sizes.items():
        yield f"{file}: {len(each)} tensors, {sum(each):,} bytes"
    total, count = sum(map(sum, sizes.values())), sum(map(len, sizes.values()))
    seconds = 2 * total / DISK_BYTES_PER_SECOND
    yield f"together: {count} tensors, {total:,} bytes in {len(files)} files"
    yield (
        f"time: about {seconds:.0f} s to read and write them on a disk of {DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s,"
        f" and as long again for the proof; memory: at most {(BASE_MEMORY_BYTES + memory_bytes) / 2**30:.1f} GiB"
    )
