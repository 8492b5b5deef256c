"""The end-of-document token (eod) of a tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data.tokenizer.text_tokenizer import TextTokenizer
from common.errors import KitError
from common.json_file import read_json, shown

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class EodToken:
    """The end-of-document token and, for the log, its source."""

    id: int
    token: str
    source: str


def find_eod(tokenizer: TextTokenizer, requested: str) -> EodToken:
    """The end-of-document token; `requested` is its text, or "auto". Raises KitError when it is not one token.

    auto: <|endoftext|>, even for Instruct models, whose eos token ends a turn. A tokenizer without it uses the eos
    token of the folder's tokenizer_config.json or generation_config.json.
    """
    if requested != "auto":
        number = tokenizer.token_id(requested)
        if number is None:
            ids = tokenizer.encode_batch([requested], parse_special=True)[0]
            if len(ids) != 1:
                raise KitError(f"EOD_TOKEN={requested} is {len(ids)} tokens of this tokenizer: give a single token")
            number = ids[0]
        return EodToken(number, requested, "EOD_TOKEN")
    number = tokenizer.token_id(END_OF_TEXT)
    if number is not None:
        return EodToken(number, END_OF_TEXT, "the tokenizer")
    path = tokenizer.folder / "tokenizer_config.json"
    named = _read(path).get("eos_token")
    token = named.get("content") if isinstance(named, dict) else named
    if token is not None and not isinstance(token, str):
        raise KitError(f"{path}: eos_token={shown(named)} is not a token: set EOD_TOKEN")
    if token and (number := tokenizer.token_id(token)) is not None:
        return EodToken(number, token, "tokenizer_config.json")
    path = tokenizer.folder / "generation_config.json"
    ends = _read(path).get("eos_token_id")
    first = ends[0] if isinstance(ends, list) and ends else ends
    if ends not in (None, []):
        if type(first) is not int or not 0 <= first < 1 << 32 or not (token := tokenizer.decode([first])):
            raise KitError(f"{path}: eos_token_id={shown(ends)} is not a token of the tokenizer: set EOD_TOKEN")
        return EodToken(first, token, "generation_config.json")
    raise KitError(
        f"{tokenizer.folder}: the tokenizer has no {END_OF_TEXT}, and neither tokenizer_config.json nor"
        " generation_config.json names an eos token: set EOD_TOKEN"
    )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "copy it again from the model") if path.is_file() else {}
