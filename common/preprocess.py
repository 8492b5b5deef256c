"""Step 1: `python -m common.preprocess pretrain|sft` turns jsonl into Megatron's .bin and .idx; `show` prints them."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import errors, log
from common.data import engine
from common.data.chat import ChatTemplate
from common.data.indexed import IndexedReader, token_dtype
from common.data.inputs import find_inputs
from common.data.jsonl import BadRowError, first_row
from common.data.manifest import resolve
from common.data.pretrain import PretrainEncoder
from common.data.rows import FORMATS, format_of
from common.data.sft import SftEncoder
from common.data.show import show
from common.data.tokenizer import EndToken, TextTokenizer, find_eod, load_tokenizer
from common.data.workers import count_workers
from common.errors import KitError
from common.log import logger
from common.settings import add_options, from_namespace, option

HELP_INPUT = "a .jsonl or .jsonl.gz file, a folder or a glob of them, or several of these"
HELP_TOKENIZER = "Hugging Face folder with tokenizer.json"
HELP_EOD = "auto: <|endoftext|>, or the tokenizer's own end of text; else a token's text"


@dataclass(frozen=True)
class PretrainSettings:
    """The settings of step 1 for pretraining."""

    input: str = option(help=HELP_INPUT)
    output_prefix: str = option(help="writes {OUTPUT_PREFIX}_{JSON_KEY}_document.bin/.idx and {OUTPUT_PREFIX}.json")
    tokenizer_path: str = option(help=HELP_TOKENIZER)
    json_key: str = option("text", "the field that holds the text")
    append_eod: bool = option(True, "end each document with EOD_TOKEN")
    eod_token: str = option("auto", HELP_EOD)
    workers: int | None = option(None, "processes; default: one a core")
    partitions: int = option(1, "parts that are written apart, then joined; a run taken up again keeps finished ones")

    def job(self) -> engine.Job:
        """What is to be done; raises KitError for all that can be known to be wrong beforehand."""
        check_output(self.output_prefix)
        tokenizer = load_tokenizer(Path(self.tokenizer_path))
        eod = chosen_eod(tokenizer, self.append_eod, self.eod_token)
        return engine.Job(
            kind="pretrain",
            output_prefix=Path(self.output_prefix),
            inputs=find_inputs(self.input),
            streams={"tokens": (f"{self.json_key}_document", token_dtype(tokenizer.vocab_size))},
            encode=PretrainEncoder(tokenizer, self.json_key, eod),
            described={
                "tokenizer": describe_tokenizer(tokenizer, eod),
                "settings": {"json_key": self.json_key, "append_eod": self.append_eod},
            },
            workers=count_workers(self.workers),
            partitions=at_least_one("PARTITIONS", self.partitions),
        )


@dataclass(frozen=True)
class SftSettings:
    """The settings of step 1 for fine-tuning."""

    input: str = option(help=HELP_INPUT)
    output_prefix: str = option(help="writes {OUTPUT_PREFIX}_text_document and _loss_mask_document (.bin/.idx)")
    tokenizer_path: str = option(help=HELP_TOKENIZER + ", and chat template")
    format: str = option("auto", "what a row is; auto: told from the first", ("auto", *FORMATS))
    roles: str = option("system", "instruction is the system's turn, or alpaca: the user's", ("system", "alpaca"))
    loss_on: str = option("answer", "answer: its text and end token; turn: its header too", ("answer", "turn"))
    loss_turns: str = option("all", "which answers are learned", ("all", "last"))
    seq_length: int | None = option(None, "only to report what would be too long")
    append_eod: bool = option(False, "end each conversation with EOD_TOKEN, which is not learned")
    eod_token: str = option("auto", HELP_EOD)
    workers: int | None = option(None, "processes; default: one a core")
    partitions: int = option(1, "parts that are written apart, then joined; a run taken up again keeps finished ones")

    def job(self) -> engine.Job:
        """What is to be done; raises KitError for all that can be known to be wrong beforehand."""
        check_output(self.output_prefix)
        if self.seq_length is not None:
            at_least_one("SEQ_LENGTH", self.seq_length)
        tokenizer = load_tokenizer(Path(self.tokenizer_path))
        eod = chosen_eod(tokenizer, self.append_eod, self.eod_token)
        inputs = find_inputs(self.input)
        kind = detect_format(inputs) if self.format == "auto" else self.format
        template = ChatTemplate(tokenizer)
        encoder = SftEncoder(
            tokenizer, template, kind, self.roles, self.loss_on, self.loss_turns, eod, self.format == "auto"
        )
        return engine.Job(
            kind="sft",
            output_prefix=Path(self.output_prefix),
            inputs=inputs,
            # The mask first: tokens alone under their final name would pass for pretraining data.
            streams={
                "loss_mask": ("loss_mask_document", np.dtype(np.uint8)),
                "tokens": ("text_document", token_dtype(tokenizer.vocab_size)),
            },
            encode=encoder,
            described={
                "tokenizer": describe_tokenizer(tokenizer, eod),
                "chat_template": {"chat_template_sha256": template.sha256, "in_tokenizer": template.own},
                "settings": {
                    "format": kind,
                    "roles": self.roles,
                    "loss_on": self.loss_on,
                    "loss_turns": self.loss_turns,
                    "append_eod": self.append_eod,
                },
            },
            workers=count_workers(self.workers),
            partitions=at_least_one("PARTITIONS", self.partitions),
        )


@dataclass(frozen=True)
class ShowSettings:
    """The settings of `show`."""

    data: str = option(help="OUTPUT_PREFIX of step 1, or the full ..._document prefix")
    tokenizer_path: str = option(help=HELP_TOKENIZER)
    count: int = option(3, "documents to print")
    index: int = option(0, "number of the first one")


def at_least_one(name: str, value: int) -> int:
    """`value`; raises KitError when it is under 1."""
    if value < 1:
        raise KitError(f"{name}={value}: it must be at least 1")
    return value


def check_output(output_prefix: str) -> None:
    """Raises KitError unless files can be made at `output_prefix`."""
    if output_prefix.endswith("/") or Path(output_prefix).is_dir():
        raise KitError(
            f"OUTPUT_PREFIX={output_prefix} is a folder: add the beginning of a file name, as {{folder}}/data"
        )
    folder = Path(output_prefix).absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise KitError(f"OUTPUT_PREFIX={output_prefix}: nothing can be written to {folder}: choose another place")


def chosen_eod(tokenizer: TextTokenizer, append_eod: bool, eod_token: str) -> EndToken | None:
    """The end-of-document token, said in the log; None when none is to be appended."""
    if not append_eod:
        return None
    eod = find_eod(tokenizer, eod_token)
    logger.info("end of document: %s, id %d, from %s", eod.token, eod.id, eod.source)
    return eod


def describe_tokenizer(tokenizer: TextTokenizer, eod: EndToken | None) -> dict[str, Any]:
    """The manifest's section on the tokenizer."""
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": eod.id if eod else None,
        "eod_token": eod.token if eod else None,
    }


def detect_format(inputs: list[Path]) -> str:
    """The format of the first row, said in the log; raises KitError when it is of none."""
    chunk, offset, row = first_row(inputs)
    try:
        kind = format_of(row)
    except BadRowError as error:
        raise chunk.error(offset, error) from None
    logger.info("rows are of format %s, as the first of %s", kind, chunk.path)
    return kind


def check_first_row(job: engine.Job) -> None:
    """Raises KitError when the first row cannot be encoded as `job` asks."""
    chunk, _, _ = first_row(job.inputs)
    job.encode(chunk)


def report_too_long(job: engine.Job, seq_length: int) -> None:
    """Logs how many samples training at `seq_length` would have to drop or cut."""
    lengths = IndexedReader(job.final("tokens")).lengths
    logger.info(
        "%d of %d samples have more than SEQ_LENGTH + 1 = %d tokens: TRUNCATE=drop, left or right is for them",
        int((lengths > seq_length + 1).sum()), lengths.size, seq_length + 1,
    )  # fmt: skip


def write(settings: PretrainSettings | SftSettings, check: bool) -> None:
    """Writes the dataset, or with `check` only looks whether it can be written."""
    job = settings.job()
    check_first_row(job)
    if check:
        print(f"ok: {len(job.inputs)} input files can be read and written to {job.output_prefix}")
        return
    logger.info(
        "%d input files, %d workers, %d parts, vocabulary of %d tokens",
        len(job.inputs), job.workers, job.partitions, job.described["tokenizer"]["vocab_size"],
    )  # fmt: skip
    engine.run(job)
    if isinstance(settings, SftSettings) and settings.seq_length:
        report_too_long(job, settings.seq_length)


def print_documents(settings: ShowSettings, check: bool) -> None:
    """Prints documents, or with `check` only looks whether they can be read."""
    lines = show(
        resolve(settings.data),
        load_tokenizer(Path(settings.tokenizer_path)),
        settings.index,
        at_least_one("COUNT", settings.count),
        sys.stdout.isatty(),
    )
    if check:
        next(lines)
        print("ok: the documents can be shown")
        return
    for line in lines:
        print(line)


def main() -> None:
    """Runs the command that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m common.preprocess", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="pretrain|sft|show")
    kinds: dict[str, Any] = {"pretrain": PretrainSettings, "sft": SftSettings, "show": ShowSettings}
    for name, kind in kinds.items():
        command = commands.add_parser(name, help=kind.__doc__, description=kind.__doc__)
        add_options(command, kind)
        command.add_argument("--check", action="store_true", help="check the settings and the first row, and stop")
    arguments = parser.parse_args()
    log.setup()
    settings = from_namespace(kinds[arguments.command], arguments)
    if isinstance(settings, ShowSettings):
        print_documents(settings, arguments.check)
    else:
        write(settings, arguments.check)


if __name__ == "__main__":
    errors.run(main)
