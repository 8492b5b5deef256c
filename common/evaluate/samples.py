"""Held-out rows to windows of tokens, encoded and masked by step 1's own encoders."""

import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.data.encoders.encoded import DROPPED
from common.data.encoders.pretrain import PretrainEncoder
from common.data.encoders.sft import SftEncoder
from common.data.sources.bad_rows import BadRowError, BadRows
from common.data.sources.discovery import exists, find_inputs
from common.data.sources.jsonl import first_rows
from common.data.templates.chat_template import ChatTemplate
from common.data.templates.row_formats import TEXT_FORMAT, format_of_rows
from common.data.tokenizer.eod import find_eod
from common.data.tokenizer.text_tokenizer import TextTokenizer
from common.errors import KitError
from common.evaluate.settings import EvaluateSettings
from common.log import logger


class Window(NamedTuple):
    """Tokens of one forward pass, int32 [n + 1], the last only a label; weights of the labels, float32 [n]."""

    ids: np.ndarray
    weights: np.ndarray


@dataclass
class RowSet:
    """The windows of the files that are reported under one name.

    format: of the rows. stride: of windows over long texts; None for conversations. counts: of rows by what happened
    to them, and other counts of step 1.
    """

    name: str
    files: list[Path]
    format: str
    seq_length: int
    stride: int | None
    rows: int = 0
    windows: list[Window] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def read_row_sets(settings: EvaluateSettings, tokenizer: TextTokenizer, longest: int) -> list[RowSet]:
    """The row sets of INPUT for a model of `longest` positions; raises KitError with the place of an unusable row."""
    seq_length = settings.seq_length or longest
    stride = settings.stride or seq_length
    if seq_length > longest:
        raise KitError(f"SEQ_LENGTH={seq_length} exceeds the {longest} positions of the model (config.json): lower it")
    if stride > seq_length:
        raise KitError(f"STRIDE={stride} exceeds SEQ_LENGTH={seq_length}: tokens between windows would not be scored")
    assert settings.input
    return [_read(settings, tokenizer, name, files, seq_length, stride) for name, files in named_inputs(settings.input)]


def named_inputs(text: str) -> list[tuple[str, list[Path]]]:
    """(name, files) of each path, folder or glob in INPUT `text`; the name is that of NAME=..., or the path."""
    try:
        words = [text] if any(map(exists, (text, _split(text)[1]))) else shlex.split(text)
    except ValueError as error:
        raise KitError(f"INPUT={text}: {error}: quote paths that hold spaces, or escape the quote") from error
    found = []
    for word in words:
        name, path = _split(word)
        found.append((name, find_inputs(path if exists(path) else shlex.quote(path))))
    if not found:
        find_inputs(text)  # raises: INPUT is empty
    repeated = [name for name, times in Counter(name for name, _ in found).items() if times > 1]
    if repeated:
        raise KitError(f"INPUT has {repeated[0]} more than once: give each its own name, as NAME=FILE")
    return found


def _split(word: str) -> tuple[str, str]:
    """(name, path) of NAME=PATH; of a path without a name both are the path."""
    named = None if exists(word) else re.fullmatch(r"([A-Za-z0-9_.-]+)=(.+)", word)
    return (named[1], named[2]) if named else (word, word)


def _read(
    settings: EvaluateSettings, tokenizer: TextTokenizer, name: str, files: list[Path], seq_length: int, stride: int
) -> RowSet:
    kind = format_of_rows(files, settings.json_key) if settings.format == "auto" else settings.format
    row_set = RowSet(name, files, kind, seq_length, stride if kind == TEXT_FORMAT else None)
    encoder = _encoder(settings, tokenizer, kind)
    for chunk, offset, _ in first_rows(files):
        encoded = encoder(chunk)
        row_set.counts.update({what: n for what, n in encoded.counts.items() if what not in ("read", "supervised")})
        row_set.rows += 1
        with BadRows(chunk).row(offset):
            ids = encoded.streams["tokens"].astype(np.int32)
            mask = encoded.streams.get("loss_mask", np.ones(ids.size, np.float32)).astype(np.float32)
            if kind == TEXT_FORMAT:
                row_set.windows += _windows(ids, mask, seq_length, stride)
            else:
                row_set.windows += _sample(ids, mask, seq_length, settings.truncate, row_set.counts)
            if 0 < ids.size < 2:
                row_set.counts[f"{DROPPED}fewer than two tokens"] += 1
    if not row_set.windows:
        raise KitError(f"INPUT: {name} has no row that can be scored: {_counted(row_set.counts) or 'it is blank'}")
    windows = f" in {len(row_set.windows)} windows of {seq_length} tokens, every {stride}" if row_set.stride else ""
    logger.info("%s: %d rows of format %s%s%s", name, row_set.rows, kind, windows, _and(row_set.counts))
    return row_set


def _encoder(settings: EvaluateSettings, tokenizer: TextTokenizer, kind: str) -> PretrainEncoder | SftEncoder:
    append = kind == TEXT_FORMAT if settings.append_eod is None else settings.append_eod
    eod = find_eod(tokenizer, settings.eod_token) if append else None
    if kind == TEXT_FORMAT:
        return PretrainEncoder(tokenizer, settings.json_key, eod, settings.special_tokens)
    # Weights of any size: a mask of zeros and ones has the same values in float32.
    return SftEncoder(
        tokenizer, ChatTemplate(tokenizer), kind, settings.roles, settings.loss_on, settings.loss_turns, eod,
        same_format=settings.format == "auto", weighted=True,
    )  # fmt: skip


def _windows(ids: np.ndarray, mask: np.ndarray, seq_length: int, stride: int) -> list[Window]:
    """Windows of at most `seq_length` inputs that begin every `stride` tokens; each label counts in the first only."""
    made, scored, last = [], 0, ids.size - 1
    for start in range(0, last, stride):
        end = min(start + seq_length, last)
        weights = mask[start + 1 : end + 1].copy()
        weights[: scored - start] = 0
        made.append(Window(ids[start : end + 1], weights))
        scored = end
        if end == last:
            break
    return made


def _sample(ids: np.ndarray, mask: np.ndarray, seq_length: int, truncate: str, counts: Counter[str]) -> list[Window]:
    """The row as step 3 takes it, none where it is dropped, which is counted; raises BadRowError at TRUNCATE=error."""
    limit = seq_length + 1
    if ids.size > limit:
        over = f"more than SEQ_LENGTH + 1 = {limit} tokens"
        if truncate == "error":
            raise BadRowError(
                f"it has {ids.size} tokens, {over}: set TRUNCATE=drop, left or right, or a larger SEQ_LENGTH"
            )
        if truncate == "drop":
            counts[f"{DROPPED}{over}"] += 1
            return []
        counts[f"truncated from the {truncate}: {over}"] += 1
        part = slice(-limit, None) if truncate == "left" else slice(limit)
        ids, mask = ids[part], mask[part]
    if ids.size > 1 and not mask[1:].any():
        counts[f"{DROPPED}nothing to score after truncation"] += 1
        return []
    return [Window(ids, mask[1:])] if ids.size > 1 else []


def _counted(counts: Counter[str]) -> str:
    return "; ".join(f"{number} {what}" for what, number in counts.items() if number)


def _and(counts: Counter[str]) -> str:
    return f"; {text}" if (text := _counted(counts)) else ""
