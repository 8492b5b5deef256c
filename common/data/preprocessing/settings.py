"""The settings of step 1, and the jobs that they describe."""

import os
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.data.dataset.id_range import warn_if_vocab_exceeds_model
from common.data.dataset.indexed_dataset import bin_path, idx_path, token_dtype
from common.data.dataset.manifest import manifest_path
from common.data.encoders.preference import PreferenceEncoder
from common.data.encoders.pretrain import SPECIAL_TOKENS, PretrainEncoder
from common.data.encoders.sft import SftEncoder, sample_segments
from common.data.preprocessing.job import Job
from common.data.preprocessing.rejects import rejects_path
from common.data.preprocessing.workers import num_workers
from common.data.sources.bad_rows import BadRows, ignore_bad_row
from common.data.sources.discovery import find_inputs
from common.data.sources.file_format import KINDS_OF_FILES
from common.data.sources.jsonl import first_rows
from common.data.sources.row_blocks import MAX_ROW_BYTES
from common.data.sources.spans import whole_spans
from common.data.templates.chat_template import ChatTemplate
from common.data.templates.row_formats import FORMATS, PREFERENCE, detect_format, is_weighted
from common.data.tokenizer import engines
from common.data.tokenizer.eod import EodToken, find_eod
from common.data.tokenizer.text_tokenizer import TextTokenizer, load_tokenizer
from common.errors import KitError
from common.log import logger
from common.settings import option

FIRST_ROWS = 200
HELP_TOKENIZER = "Hugging Face folder with tokenizer.json"
HELP_ROW = "a longer row is a bad row; a byte of text takes some 10 bytes of memory in gigatoken, 330 in tokenizers"


@dataclass(frozen=True)
class PreprocessSettings:
    """The settings that pretraining and fine-tuning share."""

    input: str = option(help=f"a file ({KINDS_OF_FILES}); a folder or a glob of them, or several of these")
    output_prefix: str = option(help="prefix of the files to write")
    tokenizer_path: str = option(help=HELP_TOKENIZER, hub="tokenizer")
    append_eod: bool = option(True, "end each document with EOD_TOKEN")
    eod_token: str = option("auto", "auto: <|endoftext|>, or the tokenizer's eos token; else the token itself")
    on_error: str = option(
        "stop", "stop at the first bad row, or skip: write bad rows to {OUTPUT_PREFIX}.rejects and count them",
        ("stop", "skip"),
    )  # fmt: skip
    max_row_bytes: int = option(MAX_ROW_BYTES, HELP_ROW)
    tokenizer_engine: str = option(
        "auto", "auto: gigatoken if it gives the same ids; or gigatoken, or tokenizers", engines.ENGINES
    )
    workers: int | None = option(None, "processes; default: one per core")
    partitions: int = option(1, "runs that share the work by PARTITION_INDEX; alone, it sets the least number of parts")
    partition_index: int | None = option(
        None, "run this partition only, from 0; after the last one: python -m common.preprocess merge"
    )
    verify_input: bool = option(False, "compare the input of a finished run by hash instead of size and time")

    @property
    def skip_bad_rows(self) -> bool:
        """Whether bad rows are skipped."""
        return self.on_error == "skip"

    def job(self) -> Job:
        """The job; raises KitError for every mistake that can be found before the input is read."""
        raise NotImplementedError

    def _check(self) -> None:
        check_output(self.output_prefix)
        check_partitions(self.partitions, self.partition_index)
        at_least_one("MAX_ROW_BYTES", self.max_row_bytes)

    def _load(self) -> tuple[TextTokenizer, EodToken | None, list[Path]]:
        """(tokenizer, end-of-document token, inputs)."""
        tokenizer = load_tokenizer(Path(self.tokenizer_path))
        eod = find_eod(tokenizer, self.eod_token) if self.append_eod else None
        if eod:
            logger.info("end of document: %s, id %d, from %s", eod.token, eod.id, eod.source)
        return tokenizer, eod, find_inputs(self.input)

    def _job(self, **fields: Any) -> Job:
        """The job with `fields` and the settings that all jobs share."""
        job = Job(
            output_prefix=Path(self.output_prefix),
            workers=num_workers(self.workers),
            partitions=self.partitions,
            partition_index=self.partition_index,
            verify_input=self.verify_input,
            skip_bad_rows=self.skip_bad_rows,
            max_row_bytes=self.max_row_bytes,
            **fields,
        )
        check_output_is_no_input(job)
        return job

    def _row_limit(self) -> dict[str, int]:
        """MAX_ROW_BYTES for the manifest, only if it was changed and may have skipped rows.

        So a run that stopped at a long row can be resumed with a larger limit.
        """
        is_recorded = self.skip_bad_rows and self.max_row_bytes != MAX_ROW_BYTES
        return {"max_row_bytes": self.max_row_bytes} if is_recorded else {}


@dataclass(frozen=True)
class PretrainSettings(PreprocessSettings):
    """The settings of step 1 for pretraining."""

    output_prefix: str = option(help="writes {OUTPUT_PREFIX}_{JSON_KEY}_document.bin/.idx and {OUTPUT_PREFIX}.json")
    json_key: str = option("text", "the field that holds the text")
    special_tokens: str = option("text", "special tokens in a document: text, error or parse", SPECIAL_TOKENS)

    def job(self) -> Job:
        """The job of pretraining data."""
        self._check()
        tokenizer, eod, inputs = self._load()
        spans = whole_spans(inputs, self.max_row_bytes)
        sample = engines.sample_texts(spans, self.json_key)
        engines.select_engine(tokenizer, self.tokenizer_engine, self.special_tokens == "parse", sample)
        return self._job(
            kind="pretrain",
            inputs=inputs,
            spans=spans,
            streams={"tokens": (f"{self.json_key}_document", token_dtype(tokenizer.vocab_size))},
            encode=PretrainEncoder(tokenizer, self.json_key, eod, self.special_tokens, self.skip_bad_rows),
            described={
                "tokenizer": tokenizer_section(tokenizer, eod),
                "settings": {
                    "json_key": self.json_key,
                    "append_eod": self.append_eod,
                    "special_tokens": self.special_tokens,
                    **self._row_limit(),
                },
            },
        )


@dataclass(frozen=True)
class SftSettings(PreprocessSettings):
    """The settings of step 1 for fine-tuning."""

    output_prefix: str = option(help="writes {OUTPUT_PREFIX}_text_document and _loss_mask_document (.bin/.idx)")
    tokenizer_path: str = option(help=HELP_TOKENIZER + ", and chat template", hub="tokenizer")
    append_eod: bool = option(False, "end each conversation with EOD_TOKEN, which is not trained on")
    format: str = option("auto", "the format of a row; auto: that of the first row", ("auto", *FORMATS, PREFERENCE))
    roles: str = option("system", "instruction is the system turn, or alpaca: the user turn", ("system", "alpaca"))
    loss_on: str = option("answer", "answer: its text and end token; turn: its header too", ("answer", "turn"))
    loss_turns: str = option("all", "which answers are trained on", ("all", "last"))
    loss_weights: str = option(
        "auto", "a turn's `loss` may be any weight; auto: if one of the first rows has one", ("auto", "true", "false")
    )
    seq_length: int | None = option(None, "that of step 3, to count longer samples; default: at 2048, 4096, ...")

    def job(self) -> Job:
        """The job of fine-tuning data."""
        self._check()
        if self.seq_length is not None:
            at_least_one("SEQ_LENGTH", self.seq_length)
        tokenizer, eod, inputs = self._load()
        encoder = self._encoder(tokenizer, eod, inputs)
        # The loss mask first: tokens alone under their final name would look like pretraining data.
        streams: dict[str, tuple[str, np.dtype[Any]]] = {
            "loss_mask": ("loss_mask_document", encoder.mask_dtype),
            "tokens": ("text_document", token_dtype(tokenizer.vocab_size)),
        }
        kind = PREFERENCE if isinstance(encoder, PreferenceEncoder) else "sft"
        return self._job(kind=kind, inputs=inputs, streams=streams, encode=encoder, described=self._described(encoder))

    def _described(self, encoder: SftEncoder) -> dict[str, dict[str, Any]]:
        return {
            "tokenizer": tokenizer_section(encoder.tokenizer, encoder.eod),
            "chat_template": {
                "chat_template_sha256": encoder.template.sha256,
                "in_tokenizer": encoder.template.own,
            },
            "settings": {
                "format": encoder.format,
                "roles": self.roles,
                "loss_on": self.loss_on,
                "loss_turns": encoder.loss_turns,
                "loss_weights": encoder.weighted,
                "append_eod": self.append_eod,
                **self._row_limit(),
            },
        }

    def _encoder(self, tokenizer: TextTokenizer, eod: EodToken | None, inputs: list[Path]) -> SftEncoder:
        """The encoder, as the first rows need it; also selects the engine of `tokenizer`."""
        skip = self.skip_bad_rows
        kind = detect_input_format(inputs, skip, self.max_row_bytes) if self.format == "auto" else self.format
        rows = [
            (f"a turn of {chunk.path} at byte {chunk.start + at}", row)
            for chunk, at, row in islice(first_rows(inputs, True, self.max_row_bytes), FIRST_ROWS)
        ]
        pairs = kind == PREFERENCE
        if pairs and self.loss_weights == "true":
            raise KitError("LOSS_WEIGHTS=true is for conversations, and these are preferences: set it to auto")
        encoder = (PreferenceEncoder if pairs else SftEncoder)(
            tokenizer,
            ChatTemplate(tokenizer),
            kind,
            self.roles,
            self.loss_on,
            "last" if pairs else self.loss_turns,
            eod,
            same_format=self.format == "auto",
            weighted=self.loss_weights == "true",
            skip_bad_rows=skip,
        )
        if self.loss_weights == "auto" and not pairs and any(has_loss_weights(encoder, row) for _, row in rows):
            logger.info("the first rows set weights in 'loss': the loss mask is float32")
            encoder = replace(encoder, weighted=True)
        sample = sample_segments(encoder, rows, engines.SAMPLE_BYTES)
        engines.select_engine(tokenizer, self.tokenizer_engine, True, sample)
        return encoder


def has_loss_weights(encoder: SftEncoder, row: dict[str, Any]) -> bool:
    """Whether `row` sets a loss that is neither true nor false; False for a row that cannot be used."""
    with ignore_bad_row():
        return is_weighted(encoder.conversation(row))
    return False


def check_partitions(partitions: int, index: int | None) -> None:
    """Raises KitError unless `index` is None or below `partitions`."""
    at_least_one("PARTITIONS", partitions)
    if index is not None and not 0 <= index < partitions:
        raise KitError(f"PARTITION_INDEX={index}: it must lie between 0 and PARTITIONS - 1 = {partitions - 1}")


def at_least_one(name: str, value: int) -> int:
    """`value`; raises KitError when it is below 1."""
    if value < 1:
        raise KitError(f"{name}={value}: it must be at least 1")
    return value


def check_output(output_prefix: str) -> None:
    """Raises KitError unless files can be created at `output_prefix`."""
    if output_prefix.endswith("/") or Path(output_prefix).is_dir():
        raise KitError(
            f"OUTPUT_PREFIX={output_prefix} is a folder: add the beginning of a file name, as {{folder}}/data"
        )
    folder = Path(output_prefix).absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise KitError(f"OUTPUT_PREFIX={output_prefix}: nothing can be written to {folder}: choose another place")


def check_output_is_no_input(job: Job) -> None:
    """Raises KitError when `job` would overwrite one of its inputs."""
    prefix = job.output_prefix
    finals = [path(job.final(name)) for name in job.streams for path in (bin_path, idx_path)]
    existing = [path.stat() for path in [manifest_path(prefix), rejects_path(prefix), *finals] if path.exists()]
    for path in job.inputs if existing else []:
        found = path.stat()
        if any(os.path.samestat(found, each) for each in existing):
            raise KitError(f"OUTPUT_PREFIX={prefix} would overwrite the input {path}: choose another OUTPUT_PREFIX")


def tokenizer_section(tokenizer: TextTokenizer, eod: EodToken | None) -> dict[str, Any]:
    """The manifest's section on the tokenizer; also warns when the model next to it has a smaller vocabulary."""
    warn_if_vocab_exceeds_model(tokenizer.folder, tokenizer.vocab_size)
    return {
        "tokenizer_sha256": tokenizer.sha256,
        "engine": tokenizer.engine,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": eod.id if eod else None,
        "eod_token": eod.token if eod else None,
    }


def detect_input_format(inputs: list[Path], skip: bool = False, max_row_bytes: int = MAX_ROW_BYTES) -> str:
    """The format of the first row, with `skip` of the first valid row; logs it. Raises KitError without any."""
    for chunk, offset, row in first_rows(inputs, skip, max_row_bytes):
        with BadRows(chunk, skip).row(offset):
            kind = detect_format(row)
            logger.info("rows are of format %s, as the first of %s", kind, chunk.path)
            return kind
    raise KitError(f"INPUT holds no row of a known format: {', '.join(map(str, inputs))}")
