"""NEW_TOKENS: tokens that a model gets on its way to Megatron, each with a row of embedding and output layer.

A row is the mean of the rows of the tokens of its description (Hewitt, "Initializing New Word Embeddings for Pretrained
Language Models", 2021, has the mean of all). Rows between the tokenizer's last token and `vocab_size`, of which Qwen2.5
has some hundreds, are used first; then both matrices grow to a multiple of ROUND, with the mean of all rows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from common.checkpoint.conversion.state_dict_adapter import HfTensors
from common.errors import KitError
from common.json_file import read_json
from common.model.shape.config import QwenConfig

ROUND = 128
BLOCK_ROWS = 8192
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class NewToken:
    """A token to add; sources: the ids whose rows' mean it starts from."""

    content: str
    special: bool
    id: int
    sources: tuple[int, ...]


@dataclass(frozen=True)
class NewTokens:
    """The tokens to add, in the order of their ids, and the rows of the vocabulary with them."""

    tokens: tuple[NewToken, ...]
    vocab_size: int

    def description(self, rows_before: int) -> str:
        """One line for the log."""
        first, last = self.tokens[0].id, self.tokens[-1].id
        grown = (
            f", vocab_size {rows_before} -> {self.vocab_size}" if self.vocab_size > rows_before else ", in spare rows"
        )
        return f"{len(self.tokens)} new tokens: ids {first} to {last}{grown}; step 1 takes the tokenizer written here"

    @property
    def sources(self) -> dict[int, tuple[int, ...]]:
        """The ids that each new row starts from, by its id."""
        return {token.id: token.sources for token in self.tokens}


def read_new_tokens(path: Path, folder: Path, qwen: QwenConfig) -> NewTokens:
    """The tokens of `path`, JSON lines, with ids of the tokenizer in `folder`; raises KitError naming the line.

    A line has `token`, and may have `description` (default: the token's text) and `special` (default: false).
    """
    before, after = _tokenizer(folder), _tokenizer(folder)
    rows = list(_rows(path))
    known = before.get_vocab(with_added_tokens=True)
    for number, row in rows:
        if known.get(row["token"], qwen.vocab_size) < qwen.vocab_size:
            raise KitError(f"{path}:{number}: {row['token']!r} is token {known[row['token']]} already: remove the line")
    after.add_tokens([AddedToken(row["token"], special=row["special"], normalized=False) for _, row in rows])
    found = []
    for number, row in rows:
        sources = before.encode(row["description"], add_special_tokens=False).ids
        if not sources or max(sources) >= qwen.vocab_size:
            raise KitError(
                f"{path}:{number}: its description {row['description']!r} has no token with a row: change it"
            )
        new_id = after.token_to_id(row["token"])
        assert new_id is not None
        found.append(NewToken(row["token"], row["special"], new_id, tuple(sources)))
    found.sort(key=lambda token: token.id)
    needed = found[-1].id + 1
    return NewTokens(tuple(found), qwen.vocab_size if needed <= qwen.vocab_size else -(-needed // ROUND) * ROUND)


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) with all three fields."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(f"NEW_TOKENS={path} cannot be read: {error}: give a file of JSON lines") from error
    rows: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise KitError(f"{path}:{number}: it is no JSON ({error}): write it as {EXAMPLE}") from error
        if not isinstance(row, dict) or set(row) - {"token", "description", "special"}:
            raise KitError(f"{path}:{number}: it has other fields than token, description and special: see {EXAMPLE}")
        token, special = row.get("token"), row.get("special", False)
        description = row.get("description", token)
        if not isinstance(token, str) or not token.strip() or not isinstance(description, str):
            raise KitError(f"{path}:{number}: token and description must be texts: write it as {EXAMPLE}")
        if not isinstance(special, bool):
            raise KitError(f"{path}:{number}: special is {special!r}: it must be true or false")
        if token in rows:
            raise KitError(f"{path}:{number}: {token!r} is on line {rows[token][0]} too: remove one")
        rows[token] = number, {"token": token, "description": description, "special": special}
    if not rows:
        raise KitError(f"NEW_TOKENS={path} names no token: write lines as {EXAMPLE}")
    return list(rows.values())


EXAMPLE = '{"token": "<tool>", "description": "call of a tool", "special": true}'


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise KitError(f"{folder} has no tokenizer.json, which NEW_TOKENS extends: copy it from the model")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise KitError(f"{path} is not a tokenizer ({error}): copy it again from the model") from error


def write_model_files(folder: Path, new: NewTokens) -> None:
    """Adds the tokens to the copied files of the tokenizer, and sets vocab_size in config.json."""
    tokenizer = _tokenizer(folder)
    tokenizer.add_tokens([AddedToken(each.content, special=each.special, normalized=False) for each in new.tokens])
    assert all(tokenizer.token_to_id(each.content) == each.id for each in new.tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = read_json(folder / "config.json", "copy it again from the model")
    _write_json(folder / "config.json", {**config, "vocab_size": new.vocab_size})
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    for name, key in (("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", None)):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name, "copy it again from the model")
        if key is None:
            content |= {each.content: each.id for each in new.tokens}
        elif key in content:
            added = {str(each.id): {"content": each.content, **flags, "special": each.special} for each in new.tokens}
            content = {**content, key: {**content[key], **added}}
        _write_json(folder / name, content)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class WithNewTokens:
    """The tensors of a Hugging Face folder, with the rows of new tokens in embedding and output layer."""

    def __init__(self, reader: HfTensors, new: NewTokens) -> None:
        self.reader, self.new, self.folder = reader, new, reader.folder
        self._extended = lru_cache(maxsize=1)(self._extend)  # the shards of one tensor are made in turn

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `name`."""
        return self.reader.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`; embedding and output layer in memory."""
        return self._extended(name) if name in VOCABULARY else self.reader.tensor(name)

    def _extend(self, name: str) -> Tensor:
        before = self.reader.tensor(name)
        after = before.new_empty((self.new.vocab_size, before.shape[1]))
        after[: len(before)] = before
        if self.new.vocab_size > len(before):
            after[len(before) :] = mean_row(before, range(len(before)))
        for row, sources in self.new.sources.items():
            after[row] = mean_row(before, sources)
        return after


def mean_row(rows: Tensor, ids: Sequence[int]) -> Tensor:
    """The mean of the rows `ids` in float64, summed some at a time."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for start in range(0, len(ids), BLOCK_ROWS):
        part = ids[start : start + BLOCK_ROWS]
        index = slice(part.start, part.stop) if isinstance(part, range) else list(part)
        total += rows[index].double().sum(0)
    return total / len(ids)
