"""Step 2: `python -m common.convert` converts a Hugging Face model to a Megatron checkpoint and back.

It needs no GPU, no Megatron-Core and no model in memory: tensors are copied from file to file, one at a time.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common import errors, log
from common.checkpoint.conversion.common_steps import DROP_ROWS_HELP, DTYPES
from common.checkpoint.conversion.hf_to_megatron import HfToMegatron, convert_hf_to_megatron
from common.checkpoint.conversion.megatron_to_hf import MegatronToHf, convert_megatron_to_hf
from common.checkpoint.conversion.state_dict_adapter import hf_shapes
from common.checkpoint.formats.adapter_checkpoint import check_whole
from common.checkpoint.formats.checkpoint_paths import require_checkpoint
from common.checkpoint.formats.hf_folder import HfReader, check_unquantized, check_weights
from common.checkpoint.formats.megatron_folder import open_megatron
from common.checkpoint.io.checksums import check_all_files
from common.checkpoint.verification.inspection import inspect_folder
from common.checkpoint.verification.report import check_report, check_report_path, write_report
from common.checkpoint.verification.verify import verify
from common.log import logger
from common.model.shape.config import load_config
from common.settings import add_options, check_environment, from_namespace, option
from common.start import from_kit


@dataclass(frozen=True)
class Verify:
    """Compares a Hugging Face folder with a Megatron checkpoint, bit for bit."""

    hf_model_path: str = option(help="Hugging Face folder", hub="model")
    load_checkpoint_path: str = option(help="Megatron checkpoint: its folder, or the folder of an iteration")
    dtype: str | None = option(None, "cast both sides to it before comparing", tuple(DTYPES))
    drop_rows: bool = option(False, DROP_ROWS_HELP)
    report: str | None = option(None, "JSON file for the shape, dtype, bytes and checksum of every tensor")
    logits: bool = option(False, "also run both models in float32, with 8 bytes per parameter")
    text: str | None = option(None, "input text for --logits; default: a few lines")


@dataclass(frozen=True)
class Inspect:
    """Prints the format of a folder, its layout and size, and what wrote it."""

    path: str = option(help="Hugging Face folder, or Megatron checkpoint")


def run_verify(settings: Verify, check: bool) -> None:
    """Compares the two sides; `check`: only check that they can be compared."""
    folder, checkpoint = Path(settings.hf_model_path), require_checkpoint(Path(settings.load_checkpoint_path))
    report_path = Path(settings.report) if settings.report else None
    if report_path:
        check_report_path(report_path)
    qwen = load_config(folder)
    check_unquantized(folder)
    check_weights(HfReader(folder), hf_shapes(qwen), qwen)
    check_whole(checkpoint, "compare its export, which step 2 has verified")
    open_megatron(checkpoint, qwen, drop_rows=settings.drop_rows)
    if check:
        print(f"ok: {folder} and {checkpoint.path} can be compared")
        return
    num_files = check_all_files(checkpoint.path)
    if num_files:
        logger.info("%s: %d files match checksums.json (size and CRC-32)", checkpoint.path, num_files)
    dtype = DTYPES[settings.dtype] if settings.dtype else None
    report = verify(folder, checkpoint, qwen, dtype, drop_rows=settings.drop_rows)
    if report_path:
        write_report(report_path, report, settings)
    check_report(report, report_path)
    if settings.logits:
        _compare_logits(settings)


def _compare_logits(settings: Verify) -> None:
    """Runs `common.logits` in its own process, since this command does not import Megatron-Core."""
    flags = [f"--hf-model-path={settings.hf_model_path}", f"--load-checkpoint-path={settings.load_checkpoint_path}"]
    flags += [f"--text={settings.text}"] if settings.text else []
    with from_kit():
        process = subprocess.run([sys.executable, "-m", "common.logits", *flags], check=False)
    if process.returncode:
        raise SystemExit(process.returncode)


def run_inspect(settings: Inspect, check: bool) -> None:
    """Prints the properties of the folder."""
    print(*(f"{name}: {value}" for name, value in inspect_folder(Path(settings.path)).items()), sep="\n")


COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    "hf-to-megatron": (HfToMegatron, convert_hf_to_megatron),
    "megatron-to-hf": (MegatronToHf, convert_megatron_to_hf),
    "verify": (Verify, run_verify),
    "inspect": (Inspect, run_inspect),
}


def parse_arguments() -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m common.convert", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (settings, _) in COMMANDS.items():
        command = commands.add_parser(name, help=settings.__doc__, description=settings.__doc__)
        if settings is Inspect:
            command.add_argument("path", help="Hugging Face folder, or Megatron checkpoint")
        else:
            add_options(command, settings)
        if settings in (HfToMegatron, MegatronToHf):
            command.add_argument("--plan", action="store_true", help="print the target of every tensor, and exit")
        command.add_argument("--check", action="store_true", help="check that it can be done, and exit")
    return parser.parse_args()


def main() -> None:
    """Runs the command."""
    arguments = parse_arguments()
    log.setup()
    torch.set_num_threads(1)  # the disk and two of our threads are the bottleneck; more would only spin
    settings_type, run = COMMANDS[arguments.command]
    plan = {"plan": True} if getattr(arguments, "plan", False) else {}
    settings: Any = from_namespace(settings_type, arguments)
    if settings_type in (HfToMegatron, MegatronToHf):  # used by a script, which reads the environment
        check_environment(settings)
    run(settings, arguments.check, **plan)


if __name__ == "__main__":
    errors.run(main)
