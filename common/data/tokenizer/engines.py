"""The tokenizer engine: gigatoken when it gives the same ids as Hugging Face tokenizers, else tokenizers."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from common.data.sources.bad_rows import BadRows, ignore_bad_row
from common.data.sources.chunks import read_chunks
from common.data.sources.jsonl import records, string_field
from common.data.sources.spans import Span, line_start
from common.data.tokenizer.gigatoken import EngineUnavailableError, Gigatoken
from common.data.tokenizer.text_tokenizer import EncodeBatchFlat, TextTokenizer
from common.data.tokenizer.unicode_differences import with_exact_ids
from common.errors import KitError
from common.log import logger

ENGINES = ("auto", "gigatoken", "tokenizers")
SETTING = "TOKENIZER_ENGINE"
SAMPLE_BYTES = 1 << 19
SAMPLE_PLACES = 16
SAMPLE_READ_BYTES = 1 << 16  # at a time
# Cases that a sample of the user's text may lack: composed and decomposed characters, lone marks, NUL, line ends,
# digits, contractions, trailing spaces, right-to-left text, four-byte characters and joiners.
PROBE_TEXTS = (
    "e\u0301\u00e9 \u0301\u0327a \u1100\u1161 \uac00 \u212b\ufb01",
    "a\x00b\r\n\r\n\t \u3000\u00a0\u2028 \ufeff x  ",
    "I'LL we've 12345 1.5e-3 \u0664\u0665 \u00bd \u2167",
    "\u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 \u4eca\u5929",
    "\U0001f469\u200d\U0001f469 \U00020000",
)


def select_engine(tokenizer: TextTokenizer, requested: str, parse_special: bool, sample: list[tuple[str, str]]) -> None:
    """Sets the engine of `tokenizer` by TOKENIZER_ENGINE, and logs it.

    sample: (place, text) of the user's documents. Both engines encode them; raises KitError when they differ.
    """
    if requested == "tokenizers":
        logger.info("tokenizer engine: tokenizers, set by %s", SETTING)
        return
    data = (tokenizer.folder / "tokenizer.json").read_bytes()
    probes = [" ".join(tokenizer.special_tokens), *PROBE_TEXTS]
    try:
        encode_flat = with_exact_ids(Gigatoken(data).encode_flat, tokenizer)
        for place, text in [*sample, *(("a built-in probe text", text) for text in probes)]:
            _compare(tokenizer, encode_flat, place, text, parse_special)
    except EngineUnavailableError as error:
        if requested == "gigatoken":
            raise KitError(f"{SETTING}=gigatoken: {error}: set {SETTING}=auto or tokenizers") from error
        logger.info("tokenizer engine: tokenizers; gigatoken is not used: %s", error)
        return
    tokenizer.use(encode_flat, "gigatoken")
    logger.info(
        "tokenizer engine: gigatoken; same ids as tokenizers, which is slower, on %d documents of the input",
        len(sample),
    )


def _compare(
    tokenizer: TextTokenizer, encode_flat: EncodeBatchFlat, place: str, text: str, parse_special: bool
) -> None:
    expected = tokenizer.encode_batch([text], parse_special)[0]
    found = encode_flat([text], parse_special)[0].tolist()
    if found == expected:
        return
    at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(expected))
    around = tokenizer.decode(expected[max(0, at - 5) : at + 5])
    raise KitError(
        f"gigatoken and tokenizers differ on {place}, from token {at} on, near {around!r}:"
        f" set {SETTING}=tokenizers, the reference"
    )


def sample_texts(spans: list[Span], json_key: str, limit_bytes: int = SAMPLE_BYTES) -> list[tuple[str, str]]:
    """(place, text) of documents from places spread evenly over `spans`, about `limit_bytes` in total.

    Rows that are not as they should be are passed over: their own turn comes.
    """
    found = []
    each = limit_bytes // SAMPLE_PLACES
    for span, offset in _places(spans):
        left = each
        for text, place in _texts_from(span, offset, json_key):
            found.append((place, text[:left]))
            left -= len(text)
            if left <= 0:
                break
    return found


def _places(spans: list[Span]) -> list[tuple[Span, int]]:
    """SAMPLE_PLACES of (span, byte offset in it); sequential files are sampled at their beginning."""
    total = sum(span.size for span in spans)
    places, before = [], 0
    for span in spans:
        size = span.size
        here = [i * total // SAMPLE_PLACES - before for i in range(SAMPLE_PLACES)]
        offsets = [offset for offset in here if 0 <= offset < size]
        places += [(span, 0)] if span.end is None and offsets else [(span, offset) for offset in offsets]
        before += size
    return places


def _texts_from(span: Span, offset: int, json_key: str) -> Iterator[tuple[str, str]]:
    """(text, place) of the rows of `span`, from the first one that begins at or after `offset`."""
    rows = span if span.end is None else replace(span, start=line_start(span.path, span.start + offset))
    if rows.end is not None and rows.start >= rows.end:
        return
    for chunk in read_chunks(rows, SAMPLE_READ_BYTES):
        for at, row in records(chunk, Counter(), BadRows(chunk, skip=True)):
            text = None
            with ignore_bad_row():
                text = string_field(row, json_key)
            if text is not None:
                yield text, f"the document at byte {chunk.start + at} of {chunk.path}"
