"""Step 1: `python -m common.preprocess pretrain|sft` turns jsonl into Megatron's .bin and .idx.

`merge` joins parts that were written apart, `show` prints documents, `stats` counts them, `import-legacy` reads the
old kit's fine-tuning data.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import errors, log
from common.data.dataset import stats
from common.data.dataset.indexed_dataset import IndexedDataset
from common.data.dataset.legacy import import_legacy, legacy_prefix, refuse_legacy
from common.data.dataset.manifest import resolve
from common.data.dataset.show import show
from common.data.preprocessing import runner
from common.data.preprocessing.job import Job
from common.data.preprocessing.settings import HELP_TOKENIZER, PretrainSettings, SftSettings, at_least_one, check_output
from common.data.sources.jsonl import first_row
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError
from common.log import logger
from common.settings import add_options, check_environment, from_namespace, option

HELP_DATA = "OUTPUT_PREFIX of step 1, or the full ..._document prefix"


@dataclass(frozen=True)
class MergeSettings:
    """The settings of `merge`."""

    output_prefix: str = option(help="OUTPUT_PREFIX of the parts, which PARTITION_INDEX wrote")


@dataclass(frozen=True)
class ShowSettings:
    """The settings of `show`."""

    data: str = option(help=HELP_DATA)
    tokenizer_path: str = option(help=HELP_TOKENIZER)
    count: int = option(3, "documents to print")
    index: int | None = option(None, "number of the first one; default: any, by SEED")
    seed: int = option(0, "which ones, without INDEX")
    ids: bool = option(False, "print their ids too")


@dataclass(frozen=True)
class StatsSettings:
    """The settings of `stats`."""

    data: str = option(help=HELP_DATA)
    seq_lengths: str = option("1024,2048,4096,8192", "sequence lengths to tell the rows of, by commas")
    global_batch_size: int | None = option(None, "samples in one step, to tell the steps an epoch")
    png: str | None = option(None, "draw the lengths into this file too")


@dataclass(frozen=True)
class LegacySettings:
    """The settings of `import-legacy`."""

    input: str = option(help="the old kit's fine-tuning data: its OUTPUT_PREFIX, or the full ..._document prefix")
    output_prefix: str = option(help="writes {OUTPUT_PREFIX}_text_document and _loss_mask_document (.bin/.idx)")
    tokenizer_path: str = option(help="Hugging Face folder with the tokenizer that the data was made with")


USUAL_SEQ_LENGTHS = (2048, 4096, 8192, 16384, 32768)  # the first is the scripts' own


def check_first_row(job: Job) -> None:
    """Raises KitError when the first row cannot be encoded as `job` asks."""
    chunk, _, _ = first_row(job.inputs, job.skip_bad_rows, job.max_row_bytes)
    job.encode(chunk)


def report_too_long(job: Job, seq_length: int | None) -> None:
    """Logs how many samples training would not take whole at `seq_length`, or at the usual ones that are too small."""
    lengths = IndexedDataset(job.final("tokens")).lengths
    told = []
    for tokens in [seq_length] if seq_length else USUAL_SEQ_LENGTHS:
        too_long = int((lengths > tokens + 1).sum())
        if not seq_length and not too_long:
            break
        told.append(f"{too_long} of {lengths.size} samples have more than SEQ_LENGTH + 1 = {tokens + 1} tokens")
    if told:
        logger.info("%s: step 3 refuses them unless TRUNCATE is drop, left or right", "; ".join(told))


def write(settings: PretrainSettings | SftSettings, check: bool) -> None:
    """Writes the dataset, or with `check` only looks whether it can be written."""
    job = settings.job()
    check_first_row(job)
    if check:
        runner.check(job)
        print(f"ok: {len(job.inputs)} input files can be read and written to {job.output_prefix}")
        return
    logger.info(
        "%d input files, %d workers, %s, vocabulary of %d tokens",
        len(job.inputs), job.workers,
        f"{len(job.plan)} parts" if job.partition_index is None else f"share {job.partition_index} of {job.partitions}",
        job.described["tokenizer"]["vocab_size"],
    )  # fmt: skip
    written = runner.run(job)
    if written and isinstance(settings, SftSettings):
        report_too_long(job, settings.seq_length)


def join_parts(settings: MergeSettings, check: bool) -> None:
    """Joins the parts, or with `check` only looks whether all are there."""
    runner.merge(Path(settings.output_prefix), check)
    if check:
        print(f"ok: the parts of {settings.output_prefix} can be joined")


def print_documents(settings: ShowSettings, check: bool) -> None:
    """Prints documents, or with `check` only looks whether they can be read."""
    files = resolve(settings.data)
    refuse_legacy(files)
    lines = show(
        files,
        load_tokenizer(Path(settings.tokenizer_path)),
        settings.index,
        at_least_one("COUNT", settings.count),
        sys.stdout.isatty(),
        settings.ids,
        settings.seed,
    )
    if check:
        next(lines)
        print("ok: the documents can be shown")
        return
    for line in lines:
        print(line)


def print_stats(settings: StatsSettings, check: bool) -> None:
    """Prints what the data amounts to, or with `check` only looks whether it can be read."""
    files = resolve(settings.data)
    refuse_legacy(files)
    try:
        seq_lengths = [at_least_one("SEQ_LENGTHS", int(word)) for word in settings.seq_lengths.split(",")]
    except ValueError as error:
        raise KitError(f"SEQ_LENGTHS={settings.seq_lengths}: give whole numbers, by commas") from error
    if settings.global_batch_size is not None:
        at_least_one("GLOBAL_BATCH_SIZE", settings.global_batch_size)
    lines = stats.report(files, seq_lengths, settings.global_batch_size)
    if check:
        next(lines)
        print("ok: the data can be read")
        return
    for line in lines:
        print(errors.visible(line))
    if settings.png:
        stats.write_png(IndexedDataset(files.tokens).lengths, files.tokens.name, Path(settings.png))


def take_over(settings: LegacySettings, check: bool) -> None:
    """Imports the old kit's data, or with `check` only looks whether it can be read."""
    check_output(settings.output_prefix)
    tokenizer = load_tokenizer(Path(settings.tokenizer_path))
    if check:
        print(f"ok: {len(IndexedDataset(legacy_prefix(Path(settings.input))))} rows can be read")
        return
    content = import_legacy(Path(settings.input), Path(settings.output_prefix), tokenizer)
    logger.info(
        "%d rows were %d conversations of %d tokens, %d of them learned",
        content["notes"]["rows of the old kit"], content["documents"]["kept"], content["tokens"],
        content["supervised_tokens"],
    )  # fmt: skip
    logger.info("DATASET_PATH=%s", settings.output_prefix)


COMMANDS: dict[str, tuple[Any, Any]] = {
    "pretrain": (PretrainSettings, write),
    "sft": (SftSettings, write),
    "merge": (MergeSettings, join_parts),
    "show": (ShowSettings, print_documents),
    "stats": (StatsSettings, print_stats),
    "import-legacy": (LegacySettings, take_over),
}


def main() -> None:
    """Runs the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m common.preprocess", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, (kind, _) in COMMANDS.items():
        command = commands.add_parser(name, help=kind.__doc__, description=kind.__doc__)
        add_options(command, kind)
        command.add_argument("--check", action="store_true", help="check the settings and the data, and stop")
    arguments = parser.parse_args()
    log.setup()
    kind, do = COMMANDS[arguments.command]
    settings = from_namespace(kind, arguments)
    if kind in (PretrainSettings, SftSettings):  # those of scripts, which read the environment
        check_environment(settings)
    do(settings, arguments.check)


if __name__ == "__main__":
    errors.run(main)
