"""Converts a Hugging Face folder to a Megatron checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.checkpoint.conversion.common_steps import (
    DTYPE_HELP,
    DTYPES,
    other_files_bytes,
    set_config_dtype,
    verify_output,
)
from common.checkpoint.conversion.conversion_plan import ExpectedFolder, plan_torch, plan_torch_dist
from common.checkpoint.conversion.new_tokens import EXAMPLE, WithNewTokens, read_new_tokens, write_model_files
from common.checkpoint.conversion.output_folder import check_disk_space, check_output_folder, write_folder_atomically
from common.checkpoint.conversion.state_dict_adapter import (
    MegatronTensors,
    hf_shapes,
    rank_state_dict,
    torch_dist_shards,
)
from common.checkpoint.formats.checkpoint_paths import (
    MODEL_FILE,
    RELEASE,
    rank_dir_name,
    require_checkpoint,
    write_tracker,
)
from common.checkpoint.formats.hf_folder import HfReader, check_unquantized, check_weights
from common.checkpoint.formats.mapping import IMPLEMENTATIONS
from common.checkpoint.formats.megatron_args import megatron_arguments
from common.checkpoint.formats.model_files import copy_model_files
from common.checkpoint.formats.parallel_layout import ParallelLayout
from common.checkpoint.formats.torch_dist_writer import write_torch_dist
from common.checkpoint.formats.torch_format import save_rank_files
from common.checkpoint.io.lazy_tensor import LazyTensor
from common.checkpoint.verification.inspection import WRITTEN_BY
from common.log import logger
from common.model.shape.config import QwenConfig, load_config
from common.parallel import parse_pipeline_layers
from common.progress import Progress
from common.settings import option

VERSION = {"checkpoint_version": 3.0, "iteration": 0, **WRITTEN_BY}


@dataclass(frozen=True)
class HfToMegatron:
    """Converts a Hugging Face folder to a Megatron checkpoint: weights only, under `release`."""

    load_checkpoint_path: str = option(help="Hugging Face folder: config.json, safetensors, tokenizer", hub="model")
    save_checkpoint_path: str = option(help="new folder for the Megatron checkpoint")
    tp: int = option(1, "tensor parallel size")
    pp: int = option(1, "pipeline parallel size")
    vpp: int = option(1, "virtual pipeline size: model chunks per stage")
    pipeline_layers: str | None = option(None, "layers of each stage (with VPP: of each model chunk), such as 7,7,8,6")
    ckpt_format: str = option("torch", "torch: a file per rank; torch_dist: for any sizes", ("torch", "torch_dist"))
    transformer_impl: str = option("transformer_engine", "layer implementation, for parameter names", IMPLEMENTATIONS)
    dtype: str | None = option(None, DTYPE_HELP, tuple(DTYPES))
    new_tokens: str | None = option(None, f"file of tokens to add to the model, a line each: {EXAMPLE}")


def convert_hf_to_megatron(settings: HfToMegatron, check: bool, plan: bool = False) -> None:
    """Writes the Megatron checkpoint; `check`: only check that it can be written; `plan`: only print the plan."""
    source_folder, target = Path(settings.load_checkpoint_path), Path(settings.save_checkpoint_path)
    check_output_folder(target, source_folder)
    qwen = original = load_config(source_folder)
    check_unquantized(source_folder)
    new = read_new_tokens(Path(settings.new_tokens), source_folder, qwen) if settings.new_tokens else None
    if new:
        qwen = replace(qwen, vocab_size=new.vocab_size)
    layout = _parallel_layout(settings, qwen)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    if plan:
        # Of a model that grows: the names and dtypes are those of the original.
        expected = MegatronTensors(ExpectedFolder(source_folder, original, getattr(torch, qwen.dtype)), qwen, dtype)
        print(*(plan_torch(expected, layout) if layout else plan_torch_dist(expected)), sep="\n")
        return
    reader = HfReader(source_folder)
    check_weights(reader, hf_shapes(original), original)
    source = MegatronTensors(WithNewTokens(reader, new) if new else reader, qwen, dtype)
    weight_bytes = sum(tensor.num_bytes for tensor in _tensors(source, layout))
    check_disk_space(target, weight_bytes + other_files_bytes(source_folder))
    if check:
        print(f"ok: {len(reader.names)} tensors can be converted to {target}")
        return

    def write(folder: Path) -> None:
        copy_model_files(source_folder, folder)
        if new:
            write_model_files(folder, new)
        if dtype:
            set_config_dtype(folder / "config.json", dtype)
        with Progress(weight_bytes) as progress:
            if layout:
                _write_torch(source, layout, folder / RELEASE, progress)
            else:
                write_torch_dist(folder / RELEASE, torch_dist_shards(source), VERSION, progress.update)
        write_tracker(folder, RELEASE)
        options: dict[str, Any] = {"new_rows": (new.sources, new.vocab_size)} if new else {}
        verify_output(
            source_folder, require_checkpoint(folder), qwen, settings, output=folder, target=target, **options
        )

    write_folder_atomically(target, write)
    if new:
        logger.info(new.description(original.vocab_size))
    logger.info("LOAD_CHECKPOINT_PATH=%s", target)


def _parallel_layout(settings: HfToMegatron, qwen: QwenConfig) -> ParallelLayout | None:
    """The layout of a checkpoint in torch format; None for torch_dist, which has none."""
    pipeline_layers = parse_pipeline_layers(settings.pipeline_layers)
    if settings.ckpt_format == "torch_dist":
        logger.info(
            "torch_dist holds whole tensors: TP, PP, VPP, PIPELINE_LAYERS and TRANSFORMER_IMPL are set in training"
        )
        return None
    layout = ParallelLayout(settings.tp, settings.pp, settings.vpp, settings.transformer_impl, pipeline_layers)
    layout.check(qwen)
    return layout


def _tensors(source: MegatronTensors, layout: ParallelLayout | None) -> list[LazyTensor]:
    """Every tensor that is written."""
    if layout is None:
        return [shard.tensor for shard in torch_dist_shards(source)]
    states = [rank_state_dict(source, layout, p, t) for p in range(layout.pp) for t in range(layout.tp)]
    return [tensor for state in states for chunk in state.values() for tensor in chunk.values()]


def _write_torch(source: MegatronTensors, layout: ParallelLayout, folder: Path, progress: Progress) -> None:
    """Writes the rank files, those of all TP ranks of a stage in parallel."""
    common_state = {"args": megatron_arguments(source.qwen, layout), **VERSION}
    for pp_rank in range(layout.pp):
        files: dict[Path, dict[str, Any]] = {}
        for tp_rank in range(layout.tp):
            path = folder / rank_dir_name(tp_rank, pp_rank, layout.pp) / MODEL_FILE
            files[path] = {**common_state, **rank_state_dict(source, layout, pp_rank, tp_rank)}
        save_rank_files(files, progress.update)
