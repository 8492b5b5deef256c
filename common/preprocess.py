"""Step 1: `python -m common.preprocess pretrain|sft` turns jsonl into Megatron's .bin and .idx.

`merge` merges runs that shared the work, `show` prints documents, `stats` prints statistics, `import-legacy` imports
fine-tuning data of the legacy kit.
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
from common.data.dataset.manifest import DataFiles, resolve
from common.data.dataset.show import show
from common.data.preprocessing import runner
from common.data.preprocessing.job import Job
from common.data.preprocessing.settings import HELP_TOKENIZER, PretrainSettings, SftSettings, at_least_one, check_output
from common.data.sources.jsonl import first_row
from common.data.tokenizer.text_tokenizer import load_tokenizer
from common.errors import KitError
from common.log import logger
from common.settings import add_commands, check_environment, from_namespace, option

HELP_DATA = "OUTPUT_PREFIX of step 1, or the full ..._document prefix"


@dataclass(frozen=True)
class MergeSettings:
    """The settings of `merge`."""

    output_prefix: str = option(help="OUTPUT_PREFIX of the runs with PARTITION_INDEX")


@dataclass(frozen=True)
class ShowSettings:
    """The settings of `show`."""

    data: str = option(help=HELP_DATA)
    tokenizer_path: str = option(help=HELP_TOKENIZER, hub="tokenizer")
    count: int = option(3, "documents to print")
    index: int | None = option(None, "index of the first document; default: random documents, by SEED")
    seed: int = option(0, "selects the documents without INDEX")
    ids: bool = option(False, "print the token ids too")


@dataclass(frozen=True)
class StatsSettings:
    """The settings of `stats`."""

    data: str = option(help=HELP_DATA)
    seq_lengths: str = option("1024,2048,4096,8192", "sequence lengths to report the rows for, comma-separated")
    global_batch_size: int | None = option(None, "samples per step, to report the steps per epoch")
    png: str | None = option(None, "also plot the document lengths to this file")


@dataclass(frozen=True)
class LegacySettings:
    """The settings of `import-legacy`."""

    input: str = option(help="fine-tuning data of the legacy kit: its OUTPUT_PREFIX, or the full ..._document prefix")
    output_prefix: str = option(help="writes {OUTPUT_PREFIX}_text_document and _loss_mask_document (.bin/.idx)")
    tokenizer_path: str = option(help="Hugging Face folder with the tokenizer that wrote the data", hub="tokenizer")


COMMON_SEQ_LENGTHS = (2048, 4096, 8192, 16384, 32768)  # the first is the scripts' default


def check_first_row(job: Job) -> None:
    """Raises KitError when the first row cannot be encoded."""
    chunk, _, _ = first_row(job.inputs, job.skip_bad_rows, job.max_row_bytes)
    job.encode(chunk)


def report_too_long(job: Job, seq_length: int | None) -> None:
    """Logs how many samples are too long for `seq_length`, or for each of the common lengths that is exceeded."""
    lengths, what = IndexedDataset(job.final("tokens")).lengths, "samples"
    if job.kind == "preference":  # a row of an answer each; packed, both must fit into one
        lengths, what = lengths.reshape(-1, 2).max(1), "pairs"
    counts = []
    for tokens in [seq_length] if seq_length else COMMON_SEQ_LENGTHS:
        too_long = int((lengths > tokens + 1).sum())
        if not seq_length and not too_long:
            break
        counts.append(f"{too_long} of {lengths.size} {what} have more than SEQ_LENGTH + 1 = {tokens + 1} tokens")
    if counts:
        logger.info("%s: step 3 rejects them unless TRUNCATE is drop, left or right", "; ".join(counts))


def preprocess(settings: PretrainSettings | SftSettings, check: bool) -> None:
    """Writes the dataset, or with `check` only checks that it can be written."""
    job = settings.job()
    check_first_row(job)
    if check:
        runner.check(job)
        print(f"ok: {len(job.inputs)} input files can be read and written to {job.output_prefix}")
        return
    logger.info(
        "%d input files, %d workers, %s, vocabulary of %d tokens",
        len(job.inputs), job.workers,
        f"{len(job.plan)} parts"
        if job.partition_index is None
        else f"partition {job.partition_index} of {job.partitions}",
        job.described["tokenizer"]["vocab_size"],
    )  # fmt: skip
    written = runner.run(job)
    if written and isinstance(settings, SftSettings):
        report_too_long(job, settings.seq_length)


def merge(settings: MergeSettings, check: bool) -> None:
    """Merges the partitions, or with `check` only checks that all are finished."""
    runner.merge(Path(settings.output_prefix), check)
    if check:
        print(f"ok: the partitions of {settings.output_prefix} can be merged")


def _resolve(data: str) -> DataFiles:
    files = resolve(data)
    refuse_legacy(files)
    return files


def print_documents(settings: ShowSettings, check: bool) -> None:
    """Prints documents, or with `check` only checks that they can be read."""
    lines = show(
        _resolve(settings.data),
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
    """Prints statistics of the data, or with `check` only checks that it can be read."""
    files = _resolve(settings.data)
    try:
        seq_lengths = [at_least_one("SEQ_LENGTHS", int(word)) for word in settings.seq_lengths.split(",")]
    except ValueError as error:
        raise KitError(f"SEQ_LENGTHS={settings.seq_lengths}: give integers separated by commas") from error
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


def import_legacy_data(settings: LegacySettings, check: bool) -> None:
    """Imports fine-tuning data of the legacy kit, or with `check` only checks that it can be read."""
    check_output(settings.output_prefix)
    tokenizer = load_tokenizer(Path(settings.tokenizer_path))
    if check:
        print(f"ok: {len(IndexedDataset(legacy_prefix(Path(settings.input))))} rows can be read")
        return
    content = import_legacy(Path(settings.input), Path(settings.output_prefix), tokenizer)
    logger.info(
        "%d rows held %d conversations of %d tokens, %d of them supervised",
        content["notes"]["rows of the legacy kit"], content["documents"]["kept"], content["tokens"],
        content["supervised_tokens"],
    )  # fmt: skip
    logger.info("DATASET_PATH=%s", settings.output_prefix)


COMMANDS: dict[str, tuple[Any, Any]] = {
    "pretrain": (PretrainSettings, preprocess),
    "sft": (SftSettings, preprocess),
    "merge": (MergeSettings, merge),
    "show": (ShowSettings, print_documents),
    "stats": (StatsSettings, print_stats),
    "import-legacy": (LegacySettings, import_legacy_data),
}


def main() -> None:
    """Runs the requested command."""
    parser = argparse.ArgumentParser(prog="python -m common.preprocess", description=(__doc__ or "").split("\n")[0])
    for command in add_commands(parser, COMMANDS).values():
        command.add_argument("--check", action="store_true", help="check the settings and the data, and stop")
    arguments = parser.parse_args()
    log.setup()
    kind, do = COMMANDS[arguments.command]
    settings = from_namespace(kind, arguments)
    if kind in (PretrainSettings, SftSettings):  # the commands of scripts, whose settings come from the environment
        check_environment(settings)
    do(settings, arguments.check)


if __name__ == "__main__":
    errors.run(main)
