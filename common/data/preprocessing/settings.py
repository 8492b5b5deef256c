"""The settings of step 1, and the jobs that follow from them."""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from common.data.dataset.id_range import warn_if_vocab_exceeds_model
from common.data.dataset.indexed_dataset import bin_path, idx_path, token_dtype
from common.data.dataset.manifest import manifest_path
from common.data.encoders.pretrain import SPECIAL_TOKENS, PretrainEncoder
from common.data.encoders.sft import SftEncoder, sample_segments
from common.data.preprocessing.job import Job
from common.data.preprocessing.rejects import rejects_path
from common.data.preprocessing.workers import num_workers
from common.data.sources.bad_rows import BadRowError, BadRows, as_bad_row_error
from common.data.sources.discovery import find_inputs
from common.data.sources.file_format import KINDS_OF_FILES
from common.data.sources.jsonl import first_rows
from common.data.sources.row_blocks import MAX_ROW_BYTES
from common.data.sources.spans import whole_spans
from common.data.templates.chat_template import ChatTemplate
from common.data.templates.row_formats import FORMATS, detect_format, is_weighted
from common.data.tokenizer import engines
from common.data.tokenizer.eod import EodToken, find_eod
from common.data.tokenizer.text_tokenizer import TextTokenizer, load_tokenizer
from common.errors import KitError
from common.log import logger
from common.settings import option

FIRST_ROWS = 200
HELP_INPUT = f"a file ({KINDS_OF_FILES}); a folder or a glob of them, or several of these"
HELP_TOKENIZER = "Hugging Face folder with tokenizer.json"
HELP_EOD = "auto: <|endoftext|>, or the tokenizer's own end of text; else a token's text"
HELP_ENGINE = "auto: gigatoken where it gives the same ids; or gigatoken, or tokenizers"
HELP_ERROR = "stop at the first bad row, or skip: write bad rows to {OUTPUT_PREFIX}.rejects and count them"
HELP_ROW = (
    "a row of more bytes is a bad row; a byte of text takes some 10 bytes of memory in gigatoken, 330 in tokenizers"
)
HELP_WORKERS = "processes; default: one a core"
HELP_PARTITIONS = "runs that share the work by PARTITION_INDEX; a run by itself cuts a part a GiB without it"
HELP_INDEX = "do this share alone, from 0; when all are there: python -m common.preprocess merge"
HELP_VERIFY = "a finished run asked again: compare its input by hash, not by size and time"


@dataclass(frozen=True)
class PretrainSettings:
    """The settings of step 1 for pretraining."""

    input: str = option(help=HELP_INPUT)
    output_prefix: str = option(help="writes {OUTPUT_PREFIX}_{JSON_KEY}_document.bin/.idx and {OUTPUT_PREFIX}.json")
    tokenizer_path: str = option(help=HELP_TOKENIZER)
    json_key: str = option("text", "the field that holds the text")
    append_eod: bool = option(True, "end each document with EOD_TOKEN")
    eod_token: str = option("auto", HELP_EOD)
    special_tokens: str = option("text", "special tokens spelled in a document: text, error or parse", SPECIAL_TOKENS)
    on_error: str = option("stop", HELP_ERROR, ("stop", "skip"))
    max_row_bytes: int = option(MAX_ROW_BYTES, HELP_ROW)
    tokenizer_engine: str = option("auto", HELP_ENGINE, engines.ENGINES)
    workers: int | None = option(None, HELP_WORKERS)
    partitions: int = option(1, HELP_PARTITIONS)
    partition_index: int | None = option(None, HELP_INDEX)
    verify_input: bool = option(False, HELP_VERIFY)

    def job(self) -> Job:
        """What is to be done; raises KitError for all that can be known to be wrong beforehand."""
        check_output(self.output_prefix)
        check_partitions(self.partitions, self.partition_index)
        at_least_one("MAX_ROW_BYTES", self.max_row_bytes)
        tokenizer = load_tokenizer(Path(self.tokenizer_path))
        eod = append_eod_token(tokenizer, self.append_eod, self.eod_token)
        inputs = find_inputs(self.input)
        spans = whole_spans(inputs, self.max_row_bytes)
        sample = engines.sample_texts(spans, self.json_key)
        engines.select_engine(tokenizer, self.tokenizer_engine, self.special_tokens == "parse", sample)
        skip = self.on_error == "skip"
        job = Job(
            kind="pretrain",
            output_prefix=Path(self.output_prefix),
            inputs=inputs,
            streams={"tokens": (f"{self.json_key}_document", token_dtype(tokenizer.vocab_size))},
            encode=PretrainEncoder(tokenizer, self.json_key, eod, self.special_tokens, skip),
            described={
                "tokenizer": tokenizer_section(tokenizer, eod),
                "settings": {
                    "json_key": self.json_key,
                    "append_eod": self.append_eod,
                    "special_tokens": self.special_tokens,
                    **row_limit_section(self.max_row_bytes, skip),
                },
            },
            workers=num_workers(self.workers),
            partitions=self.partitions,
            partition_index=self.partition_index,
            verify_input=self.verify_input,
            skip_bad_rows=skip,
            spans=spans,
            max_row_bytes=self.max_row_bytes,
        )
        return check_output_is_no_input(job)


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
    loss_weights: str = option(
        "auto", "a turn's `loss` may be any weight; auto: if one of the first rows has such", ("auto", "true", "false")
    )
    seq_length: int | None = option(None, "step 3's, to count what is too long; without it: at 2048, 4096, ...")
    append_eod: bool = option(False, "end each conversation with EOD_TOKEN, which is not learned")
    eod_token: str = option("auto", HELP_EOD)
    on_error: str = option("stop", HELP_ERROR, ("stop", "skip"))
    max_row_bytes: int = option(MAX_ROW_BYTES, HELP_ROW)
    tokenizer_engine: str = option("auto", HELP_ENGINE, engines.ENGINES)
    workers: int | None = option(None, HELP_WORKERS)
    partitions: int = option(1, HELP_PARTITIONS)
    partition_index: int | None = option(None, HELP_INDEX)
    verify_input: bool = option(False, HELP_VERIFY)

    def job(self) -> Job:
        """What is to be done; raises KitError for all that can be known to be wrong beforehand."""
        check_output(self.output_prefix)
        check_partitions(self.partitions, self.partition_index)
        at_least_one("MAX_ROW_BYTES", self.max_row_bytes)
        if self.seq_length is not None:
            at_least_one("SEQ_LENGTH", self.seq_length)
        tokenizer = load_tokenizer(Path(self.tokenizer_path))
        eod = append_eod_token(tokenizer, self.append_eod, self.eod_token)
        inputs = find_inputs(self.input)
        encoder = self._encoder(tokenizer, eod, inputs)
        job = Job(
            kind="sft",
            output_prefix=Path(self.output_prefix),
            inputs=inputs,
            # The mask first: tokens alone under their final name would pass for pretraining data.
            streams={
                "loss_mask": ("loss_mask_document", encoder.mask_dtype),
                "tokens": ("text_document", token_dtype(tokenizer.vocab_size)),
            },
            encode=encoder,
            described={
                "tokenizer": tokenizer_section(tokenizer, eod),
                "chat_template": {
                    "chat_template_sha256": encoder.template.sha256,
                    "in_tokenizer": encoder.template.own,
                },
                "settings": {
                    "format": encoder.format,
                    "roles": self.roles,
                    "loss_on": self.loss_on,
                    "loss_turns": self.loss_turns,
                    "loss_weights": encoder.weighted,
                    "append_eod": self.append_eod,
                    **row_limit_section(self.max_row_bytes, encoder.skip_bad_rows),
                },
            },
            workers=num_workers(self.workers),
            partitions=self.partitions,
            partition_index=self.partition_index,
            verify_input=self.verify_input,
            skip_bad_rows=encoder.skip_bad_rows,
            max_row_bytes=self.max_row_bytes,
        )
        return check_output_is_no_input(job)

    def _encoder(self, tokenizer: TextTokenizer, eod: EodToken | None, inputs: list[Path]) -> SftEncoder:
        """The encoder, by what the first rows tell; `tokenizer` has its engine then."""
        skip = self.on_error == "skip"
        kind = detect_input_format(inputs, skip, self.max_row_bytes) if self.format == "auto" else self.format
        rows = [
            (f"a turn of {chunk.path} at byte {chunk.start + at}", row)
            for chunk, at, row in islice(first_rows(inputs, True, self.max_row_bytes), FIRST_ROWS)
        ]
        encoder = SftEncoder(
            tokenizer,
            ChatTemplate(tokenizer),
            kind,
            self.roles,
            self.loss_on,
            self.loss_turns,
            eod,
            same_format=self.format == "auto",
            weighted=self.loss_weights == "true",
            skip_bad_rows=skip,
        )
        if self.loss_weights == "auto" and any(has_loss_weights(encoder, row) for _, row in rows):
            logger.info("the first rows give weights in 'loss': the loss mask is float32")
            encoder = replace(encoder, weighted=True)
        engines.select_engine(
            tokenizer, self.tokenizer_engine, True, sample_segments(encoder, rows, engines.SAMPLE_BYTES)
        )
        return encoder


def has_loss_weights(encoder: SftEncoder, row: dict[str, Any]) -> bool:
    """Whether `row` gives a loss that is neither true nor false; one that cannot be used has none."""
    with suppress(BadRowError), as_bad_row_error():
        return is_weighted(encoder.conversation(row))
    return False


def row_limit_section(max_row_bytes: int, skip: bool) -> dict[str, int]:
    """What the manifest says of MAX_ROW_BYTES: only where rows may have been left out by a limit of the user's.

    So a run that a long row stopped goes on with what it had written when the limit is set higher.
    """
    return {"max_row_bytes": max_row_bytes} if skip and max_row_bytes != MAX_ROW_BYTES else {}


def check_partitions(partitions: int, index: int | None) -> None:
    """Raises KitError unless `index` is None or one of `partitions` parts."""
    at_least_one("PARTITIONS", partitions)
    if index is not None and not 0 <= index < partitions:
        raise KitError(f"PARTITION_INDEX={index}: it must lie between 0 and PARTITIONS - 1 = {partitions - 1}")


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


def check_output_is_no_input(job: Job) -> Job:
    """`job`; raises KitError when it would write over one of its inputs."""
    prefix = job.output_prefix
    finals = [path(job.final(name)) for name in job.streams for path in (bin_path, idx_path)]
    there = [path.stat() for path in [manifest_path(prefix), rejects_path(prefix), *finals] if path.exists()]
    for path in job.inputs if there else []:
        found = path.stat()
        if any(os.path.samestat(found, each) for each in there):
            raise KitError(f"OUTPUT_PREFIX={prefix} would write over the input {path}: choose another OUTPUT_PREFIX")
    return job


def append_eod_token(tokenizer: TextTokenizer, append_eod: bool, eod_token: str) -> EodToken | None:
    """The end-of-document token, said in the log; None when none is to be appended."""
    if not append_eod:
        return None
    eod = find_eod(tokenizer, eod_token)
    logger.info("end of document: %s, id %d, from %s", eod.token, eod.id, eod.source)
    return eod


def tokenizer_section(tokenizer: TextTokenizer, eod: EodToken | None) -> dict[str, Any]:
    """The manifest's section on the tokenizer; a model beside it that is too small is told in the log."""
    warn_if_vocab_exceeds_model(tokenizer.folder, tokenizer.vocab_size)
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "engine": tokenizer.engine,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": eod.id if eod else None,
        "eod_token": eod.token if eod else None,
    }


def detect_input_format(inputs: list[Path], skip: bool = False, max_row_bytes: int = MAX_ROW_BYTES) -> str:
    """The format of the first row, with `skip` of the first good one, said in the log; raises KitError without any."""
    for chunk, offset, row in first_rows(inputs, skip, max_row_bytes):
        with BadRows(chunk, skip).row(offset):
            kind = detect_format(row)
            logger.info("rows are of format %s, as the first of %s", kind, chunk.path)
            return kind
    raise KitError(f"INPUT holds no row of a known format: {', '.join(map(str, inputs))}")
